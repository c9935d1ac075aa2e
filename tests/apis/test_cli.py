from pathlib import Path

import pytest
import torch

from grootvl_mm.apis import cli
from grootvl_mm.apis.checkpoint_files import CheckpointError


def write(folder: Path, text: str) -> str:
    path = folder / "config.py"
    path.write_text(text)
    return str(path)


def test_missing_config(tmp_path: Path):
    with pytest.raises(SystemExit, match=r"error: config '.*nowhere.py' does not exist .*give the path"):
        cli.load_config(str(tmp_path / "nowhere.py"))


@pytest.mark.parametrize(
    ("text", "came"), [("a = 1", "no default_scope"), ("default_scope = 'mmyolo'", "default_scope='mmyolo'")]
)
def test_unknown_scope(text: str, came: str, tmp_path: Path):
    with pytest.raises(SystemExit, match=f"{came}; expected one of 'mmdet', 'mmseg', 'mmpretrain'"):
        cli.load_config(write(tmp_path, text))


def test_host_that_is_not_installed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"needs mmseg .* run: mim install mmsegmentation \(with onedl-mim: onedl-"):
        cli.load_config(write(tmp_path, "default_scope = 'mmseg'"))


def test_overrides(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: name)
    cfg = cli.load_config(write(tmp_path, "default_scope = 'mmdet'\na = dict(b=1)"), {"a.b": 2})
    assert cfg.a.b == 2


def test_addresses_are_not_looked_for_on_disk():
    cli.check_file("https://example.org/model.pth", "checkpoint", "hint")
    with pytest.raises(SystemExit, match=r"checkpoint 'model\.pth' does not exist .*; hint"):
        cli.check_file("model.pth", "checkpoint", "hint")


def test_checkpoints_that_do_not_fit_or_cannot_be_read(tmp_path: Path):
    damaged, good = tmp_path / "damaged.pth", tmp_path / "good.pth"
    damaged.write_text("hello")
    torch.save({"state_dict": {}}, good)
    with pytest.raises(SystemExit, match=r"^error: a\.pth: another model$"), cli.checkpoint_errors("a.pth"):
        raise CheckpointError("another model")
    with pytest.raises(SystemExit, match=r"^error: another model$"), cli.checkpoint_errors():
        raise CheckpointError("another model")
    with pytest.raises(SystemExit, match="is no checkpoint, or is cut off or damaged"), cli.checkpoint_errors(damaged):
        torch.load(damaged)
    # Errors that have another reason stay what they are.
    for path in (str(good), str(tmp_path / "nowhere.pth"), None):
        with pytest.raises(RuntimeError, match="out of memory"), cli.checkpoint_errors(path):
            raise RuntimeError("out of memory")
