"""Files are written whole or not at all."""

import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from grootvl_mm.apis import checkpoint_files
from grootvl_mm.apis.checkpoint_files import write_checkpoint
from grootvl_mm.apis.whole_files import exit_on_sigterm, whole_file
from grootvl_mm.utils.safe_checkpoints import CheckpointError

NEEDS_FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no disk that is always full")


def test_file_is_whole_when_it_has_its_name(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with whole_file(target) as partial:
        partial.write_text("new")
        assert partial.suffix == ".txt"
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, OSError, ZeroDivisionError])
def test_whatever_ends_the_writing_leaves_the_old_file(error: type[BaseException], tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("half of")
        raise error

    with pytest.raises(error), whole_file(target) as partial:
        fail(partial)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_sigterm_is_an_exception_for_these_lines_only(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def terminate(partial: Path) -> None:
        partial.write_text("half of")
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as raised, whole_file(tmp_path / "file.txt") as partial:
        terminate(partial)
    assert raised.value.code == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) == before
    # Signals belong to the main thread; elsewhere there is nothing to do.
    thread = threading.Thread(target=lambda: exit_on_sigterm().__enter__())
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before


def test_terminated_checkpoint_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(content: dict, file: object) -> None:
        file.write(b"half of it")
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint_files.torch, "save", terminated)
    with pytest.raises(SystemExit):
        write_checkpoint({}, tmp_path / "model.pth")
    assert list(tmp_path.iterdir()) == []


@NEEDS_FULL
def test_full_disk_is_named(tmp_path: Path) -> None:
    """torch itself speaks of an unexpected position."""
    with pytest.raises(OSError, match="No space left on device"), open("/dev/full", "wb", buffering=0) as file:
        checkpoint_files._save({"a": torch.zeros(100_000)}, file)


def test_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checkpoint_files.tempfile, "TemporaryDirectory", read_only)
    with pytest.raises(CheckpointError, match=r"^cannot write .*model.pth: Read-only file system$"):
        write_checkpoint({}, tmp_path / "model.pth")
