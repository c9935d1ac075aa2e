"""Reading and writing checkpoint files: refused files, file names, and leftover files."""

import copy
import hashlib
import io
import sys
import tracemalloc
import types
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from grootvl_mm.apis import checkpoint_files
from grootvl_mm.apis.checkpoint_files import (
    CheckpointError,
    is_state_dict,
    read_checkpoint,
    rewrite_checkpoint,
    write_checkpoint,
)


def assert_one_line(message: str) -> None:
    assert "\n" not in message.strip()


def test_written_file_has_its_hash_in_the_name_and_reads_back(tmp_path: Path) -> None:
    path = write_checkpoint({"state_dict": {"a": torch.arange(5)}}, tmp_path / "model.pth")
    assert path.name == f"model-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"
    assert read_checkpoint(path)["state_dict"]["a"].tolist() == [0, 1, 2, 3, 4]
    # As mmengine and torch check it on downloads.
    torch.hub.load_state_dict_from_url(path.as_uri(), model_dir=str(tmp_path / "cache"), check_hash=True)


def test_equal_contents_give_equal_files(tmp_path: Path) -> None:
    content = {"a": torch.ones(2)}
    first, second = (write_checkpoint(content, tmp_path / name) for name in ("a.pth", "another_name.pth"))
    assert first.read_bytes() == second.read_bytes()
    assert write_checkpoint(content, tmp_path / "a.pth") == first
    assert sorted(tmp_path.iterdir()) == sorted([first, second])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("model.bin", "must be the path of a .pth file"),
        ("model", "must be the path of a .pth file"),
        ("nowhere/model.pth", "the folder of the target .* does not exist; create it first"),
    ],
)
def test_bad_targets_are_refused_before_the_source_is_read(target: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as raised:
        rewrite_checkpoint(tmp_path / "missing.pth", tmp_path / target, dict)
    assert_one_line(str(raised.value))


def test_failed_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(content: dict, file: object) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_files.torch, "save", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*model\.pth: .*No space left"):
        write_checkpoint({}, tmp_path / "model.pth")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(content: dict, file: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files.torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint({}, tmp_path / "model.pth")
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_conversion_name_the_source_and_write_nothing(tmp_path: Path) -> None:
    source = tmp_path / "source.pth"
    torch.save({"a": 1}, source)

    def refuse(content: dict) -> dict:
        raise CheckpointError(f"no use for {content}")

    with pytest.raises(CheckpointError, match=r"source\.pth: no use for \{'a': 1\}"):
        rewrite_checkpoint(source, tmp_path / "target.pth", refuse)
    assert list(tmp_path.iterdir()) == [source]


def damaged_files() -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(1000)}, buffer)
    whole = buffer.getvalue()
    middle = len(whole) // 2
    return {
        "empty": b"",
        "text": b"hello world",
        "cut": whole[:middle],
        "changed": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
    }


@pytest.mark.parametrize("name", ["empty", "text", "cut", "changed"])
def test_damaged_files_are_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    path.write_bytes(damaged_files()[name])
    with pytest.raises(CheckpointError, match=r"file\.pth is not a checkpoint, or is damaged: \w+") as raised:
        read_checkpoint(path)
    assert_one_line(str(raised.value))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nn.Linear(1, 1), "holds objects of torch.nn.modules.linear.Linear, which safe loading refuses"),
        ([1], "holds a list; expected a dictionary with string keys"),
        ({1: 2}, "holds a dict; expected a dictionary with string keys"),
    ],
    ids=["objects", "list", "numbers"],
)
def test_other_contents_are_refused(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message) as raised:
        read_checkpoint(path)
    assert_one_line(str(raised.value))


def test_archives_that_torch_does_not_write_are_refused_before_they_are_unpacked(tmp_path: Path) -> None:
    """Compressed, a few kilobytes become gigabytes; entries that share bytes do so, too."""
    path = tmp_path / "file.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
        with archive.open("file/data/9", "w") as entry:
            for _ in range(64):
                entry.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"compressed, which torch\.save never does"):
        read_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("file/data/0", bytes(2**16))
        for number in range(1, 100):
            again = copy.copy(archive.infolist()[0])
            again.filename = f"file/data/{number}"
            archive.filelist.append(again)
    with pytest.raises(CheckpointError, match="larger than the file"):
        read_checkpoint(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.pth does not exist"):
        read_checkpoint(tmp_path / "nothing.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(tmp_path)
    for impossible in (300 * "a", "a\0b", "file.pth/a"):
        with pytest.raises(CheckpointError, match="does not exist"):
            read_checkpoint(tmp_path / impossible)


def test_configs_of_the_published_training_code_come_as_dictionaries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code writes a ``CfgNode`` of yacs, a dictionary with attributes, which is not installed here."""
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    module = types.ModuleType("yacs.config")
    module.CfgNode = node
    config = node(MODEL=node(NAME="grootv", DEPTHS=[2, 2]))
    config.__dict__["__immutable__"] = True
    config.__dict__["__deprecated_keys__"] = set()
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    torch.save({"config": config, "model": {"a": torch.ones(1)}}, tmp_path / "file.pth")
    monkeypatch.undo()
    content = read_checkpoint(tmp_path / "file.pth")
    assert content["config"] == {"MODEL": {"NAME": "grootv", "DEPTHS": [2, 2]}}
    assert content["model"]["a"].item() == 1
    # A backbone reads the same file through mmengine's loader, and so through PyTorch's.
    if torch.__version__ >= "2.6":
        assert torch.load(tmp_path / "file.pth")["config"] == content["config"]


def test_is_state_dict() -> None:
    assert is_state_dict({"a": torch.ones(1)})
    for value in ({}, {"a": 1}, {1: torch.ones(1)}, [torch.ones(1)], None, {"a": {"b": torch.ones(1)}}):
        assert not is_state_dict(value)
