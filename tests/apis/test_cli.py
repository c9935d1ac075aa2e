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
    with pytest.raises(
        SystemExit, match=r"needs mmseg .* run: mim install mmsegmentation \(onedl stack: mim install onedl-"
    ):
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
    with (
        pytest.raises(SystemExit, match="is not a checkpoint, or is damaged"),
        cli.checkpoint_errors(damaged),
    ):
        torch.load(damaged)
    # Errors that have another reason stay what they are.
    for path in (str(good), str(tmp_path / "nowhere.pth"), None):
        with pytest.raises(RuntimeError, match="out of memory"), cli.checkpoint_errors(path):
            raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), r"^error: cannot write a file: No space left on device$"),
        (OSError(30, "Read-only file system", "a.log"), r"^error: a\.log: Read-only file system$"),
        (PermissionError(13, "Permission denied", "a.log"), r"^error: a\.log: Permission denied$"),
        (
            RuntimeError("Error(s) in loading state_dict for A:\n\tsize mismatch"),
            r"^error: the checkpoint does not fit",
        ),
        (ValueError("loaded state dict contains a parameter group that"), r"^error: the checkpoint does not fit"),
    ],
)
def test_what_a_run_may_meet_is_one_line(error: Exception, message: str):
    with pytest.raises(SystemExit, match=message) as raised, cli.checkpoint_errors():
        raise error
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_written():
    with pytest.raises(SystemExit, match=r"^error: cannot write out: No space"), cli.file_errors("out"):
        raise OSError(28, "No space left on device")


def test_processes_wait_for_each_other_for_a_stated_time(monkeypatch):
    monkeypatch.setattr(cli, "get_device", lambda: "cuda")
    cfg = cli.Config({"launcher": "pytorch"})
    cli.finish_runner_config(cfg)
    assert cfg.env_cfg.dist_cfg.timeout == cli.DIST_TIMEOUT
    cfg = cli.Config({"launcher": "pytorch", "env_cfg": {"dist_cfg": {"backend": "nccl", "timeout": 60}}})
    cli.finish_runner_config(cfg)
    assert cfg.env_cfg.dist_cfg == {"backend": "nccl", "timeout": 60}
