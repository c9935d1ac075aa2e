"""The commands in tools/language."""

import importlib
import json
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from grootvl_mm.language.loading import load_model
from tests.helpers.language import make_tokenizer, save_base, words
from tests.helpers.tool_runs import ROOT, Command, load_script

CONFIG = """
model = dict(pretrained="base", tree_scale=0.3)
lora = dict(targets="{targets}", r=2, lora_alpha=4)
data = dict(train="train.json", max_length=64)
trainer = dict(max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, save_steps=1, use_cpu=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, data and recipes."""
    folder = tmp_path_factory.mktemp("tools")
    save_base(folder / "base")
    records = [{"instruction": words(4 + i % 5, i), "output": words(1 + i % 3, 2 * i)} for i in range(12)]
    (folder / "train.json").write_text(json.dumps(records))
    for targets in ("default", "published"):
        (folder / f"{targets}.py").write_text(CONFIG.format(targets=targets))
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Run a tool in this process, as starting another one takes seconds, and return what it wrote to stdout."""
    monkeypatch.chdir(folder)

    def call(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        load_script(f"tools/language/{name}.py").main()
        captured = capsys.readouterr()
        call.progress = captured.err
        return captured.out

    return call


def error(run: Callable[..., str], *arguments: object) -> str:
    """The one line with which a tool ends."""
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert str(caught.value).startswith("error: ")
    return str(caught.value)


def logits(path: Path) -> torch.Tensor:
    ids = torch.tensor([make_tokenizer()(words(9))["input_ids"]])
    with torch.no_grad():
        return load_model(path)(ids, prompt_lengths=torch.tensor([6])).logits


@pytest.mark.parametrize("targets", ["default", "published"])
def test_finetune_merge_and_generate(targets: str, folder: Path, run: Callable[..., str]) -> None:
    output = run("finetune", f"{targets}.py", "--work-dir", targets, "--cfg-options", "trainer.max_steps=4")
    assert "Wrote the trained adapter to" in output
    assert "4/4" in run.progress
    assert not torch.allclose(logits(folder / targets), logits(folder / "base"), atol=1e-3)
    run("merge_lora", targets, f"{targets}-merged")
    merged = folder / f"{targets}-merged"
    assert not (merged / "adapter_config.json").exists()
    torch.testing.assert_close(logits(merged), logits(folder / targets), rtol=1e-5, atol=2e-5)
    answers = [run("generate", path, "--prompt", words(6), "--max-new-tokens", 5) for path in (targets, merged)]
    assert answers[0] == answers[1]
    assert re.fullmatch(r"(w\d+\s)*", answers[0])


def test_generate_samples_by_seed(run: Callable[..., str]) -> None:
    arguments = ("generate", "base", "--instruction", words(6), "--temperature", 5.0, "--max-new-tokens", 12)
    first, same, other = (run(*arguments, "--seed", seed) for seed in (1, 1, 2))
    assert first == same != other


def test_interrupted_finetuning_goes_on(folder: Path, run: Callable[..., str], tmp_path: Path) -> None:
    """A process that is killed between checkpoints ends, resumed, with the same weights as one that was not."""
    run("finetune", "default.py", "--work-dir", tmp_path / "whole")
    process = Command(folder).popen("language/finetune.py", "default.py", "--work-dir", tmp_path / "killed")
    try:
        while not (tmp_path / "killed" / "checkpoint-2" / "trainer_state.json").exists():
            assert process.poll() is None, process.stdout.read()[-4000:]
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (tmp_path / "killed" / "adapter_config.json").exists()
    output = run("finetune", "default.py", "--work-dir", tmp_path / "killed", "--resume")
    assert re.search(r"Resuming from .*checkpoint-[2-5]", output)
    torch.testing.assert_close(logits(tmp_path / "killed"), logits(tmp_path / "whole"), rtol=0, atol=1e-6)


def test_resume_without_checkpoint_starts_anew(run: Callable[..., str], tmp_path: Path) -> None:
    options = ("--cfg-options", "trainer.max_steps=1", "lora=None")
    output = run("finetune", "default.py", "--work-dir", tmp_path, "--resume", *options)
    assert "No checkpoint to resume" in output
    assert "Wrote the trained model to" in output
    assert (tmp_path / "model.safetensors").is_file()


def test_one_clear_error(folder: Path, run: Callable[..., str], tmp_path: Path) -> None:
    assert "config 'none.py' does not exist" in error(run, "finetune", "none.py")
    assert "is not a complete checkpoint" in error(run, "finetune", "default.py", "--resume", "base")
    message = error(run, "finetune", "default.py", "--cfg-options", "trainer.max_step=1")
    assert "'max_step'" in message
    assert "\n" not in message
    bad = tmp_path / "bad.json"
    bad.write_text('[{"instruction": "a"}]')
    assert "bad.json, record 0 has no 'output'" in error(
        run, "finetune", "default.py", "--work-dir", tmp_path, "--cfg-options", f"data.train={bad}"
    )
    assert "it has no adapter_config.json" in error(run, "merge_lora", "base", tmp_path / "merged")
    assert "--layers must be between 0 and 1, got 2" in error(
        run, "draw_text_tree", "base", words(4), tmp_path / "a.png", "--layers", 2
    )
    assert "1 tokens; expected 2 to 96" in error(run, "draw_text_tree", "base", "w1", tmp_path / "a.png")


def test_recipes_of_language_models_are_for_their_tool() -> None:
    with pytest.raises(SystemExit, match=r"run it with tools/language/finetune\.py"):
        importlib.import_module("grootvl_mm.apis.cli").load_config(
            str(ROOT / "configs" / "language" / "grootl-pico_full_demo.py")
        )


@pytest.mark.parametrize("suffix", ["html", "png", "pdf"])
def test_text_trees_are_drawn(suffix: str, run: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / f"trees.{suffix}"
    run("draw_text_tree", "base", f"{words(9)} <b>", path)
    content = path.read_bytes()
    start = {"html": b"<!DOCTYPE html>", "png": b"\x89PNG", "pdf": b"%PDF"}[suffix]
    assert content.startswith(start)
    if suffix == "html":
        page = content.decode()
        assert len(re.findall(r'<g id="arc-[01]-\d"', page)) == 2 * 9  # edges of two trees of ten tokens
        assert len(re.findall(r'<g id="token-\d"', page)) == 10
        assert not re.search(r'(?:src|href)="(?!#)', page)  # nothing outside of the page
        assert "<b>" not in page


def test_text_trees_are_those_of_the_model(
    run: Callable[..., str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load_script("tools/language/draw_text_tree.py")
    monkeypatch.chdir(folder)
    drawn = tool.find_trees("base", words(12), None, 96)
    ids = torch.tensor([make_tokenizer()(words(12))["input_ids"]])
    trees = load_model("base")(ids, prompt_lengths=torch.tensor([12]), output_trees=True).trees
    for layer, tree in enumerate(trees):
        parents = drawn.parents[layer]
        assert parents[-1] == -1
        assert parents[:-1] == tree.parent[0, :-1].tolist()
        assert all(0 < abs(parent - token) <= 3 for token, parent in enumerate(parents[:-1]))
    assert drawn.tokens == words(12).split()
    assert tool.find_trees("base", words(12), [1], 96).parents == {1: drawn.parents[1]}


def test_measures_of_trees() -> None:
    tool = load_script("tools/language/draw_text_tree.py")
    chain, star = [1, 2, 3, -1], [3, 3, 3, -1]
    assert tool.depths(chain) == [3, 2, 1, 0]
    assert tool.depths(star) == [1, 1, 1, 0]
    assert tool.depths([-1, 0, 0, 2]) == [0, 1, 1, 2]
    assert tool.agreement({0: chain, 1: star}) == pytest.approx(1 / 3)
    assert tool.agreement({0: chain}) is None
    widths = {arc.child: arc.width for arc in tool.arcs(chain)}
    assert widths[0] < widths[1] < widths[2]


def test_evaluate_runs_a_task(run: Callable[..., str], folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "task.yaml").write_text(
        "task: successor\ndataset_path: json\ndataset_kwargs: {data_files: {test: %s}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: text\ndoc_to_choice: choices\ndoc_to_target: label\n"
        "metric_list: [{metric: acc}]\n" % (tmp_path / "docs.json")
    )
    documents = [{"text": words(5, i), "choices": [words(1, i), words(2, i + 1)], "label": i % 2} for i in range(4)]
    (tmp_path / "docs.json").write_text(json.dumps(documents))
    options = ("--tasks", "successor", "--include_path", tmp_path, "--batch_size", 2, "--output_path", tmp_path / "out")
    assert "successor" in run("evaluate", "base", *options)
    (results,) = (tmp_path / "out").rglob("results*.json")
    assert 0 <= json.loads(results.read_text())["results"]["successor"]["acc,none"] <= 1
    with pytest.raises(SystemExit):
        run("evaluate", "base", "--tasks", "successor", "--no-such-option")
    with pytest.raises(SystemExit):
        run("evaluate", "base")
