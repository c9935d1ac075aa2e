"""The page on language models: its Python is run, its commands are parsed, and its recipe trains a step."""

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

from mmengine.config import Config

from grootvl_mm.language.training import build_trainer
from tests.helpers.doc_pages import LANGUAGE, all_commands, check_command, python_blocks
from tests.helpers.language import save_base, words
from tests.helpers.tool_runs import ROOT


@pytest.mark.parametrize("command", [command for command in all_commands() if "language" in command])
def test_command_is_valid(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check_command(command, tmp_path, monkeypatch)


def of_page(kind: str) -> list:
    """The Python of the page alone."""
    return [block for block in python_blocks(kind) if block.id.startswith(LANGUAGE)]


@pytest.mark.parametrize("code", of_page("code"))
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page", "exec"), {})


@pytest.mark.parametrize("code", of_page("own data"))
def test_recipe_trains_a_step(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "base")
    records = [{"instruction": words(5, i), "output": words(2, i)} for i in range(4)]
    for name in ("train", "val"):
        (tmp_path / f"{name}.json").write_text(json.dumps(records))
    (tmp_path / "recipe.py").write_text(code)
    cfg = Config.fromfile("recipe.py")
    cfg.merge_from_dict({"model.pretrained": "base", "trainer.max_steps": 1, "trainer.use_cpu": True})
    assert build_trainer(cfg, tmp_path / "work").train().training_loss > 0


def test_page_has_a_recipe() -> None:
    assert len(of_page("own data")) == 1
