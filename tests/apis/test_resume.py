import os
from pathlib import Path

import pytest
import torch

from grootvl_mm.apis.resume import find_resumable_checkpoint, read_seed


def write(path: Path, age: int) -> Path:
    torch.save({"age": age}, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_nothing_to_resume(tmp_path: Path):
    assert find_resumable_checkpoint(tmp_path / "missing") is None
    write(tmp_path / "best_acc_iter_7.pth", 0)
    assert find_resumable_checkpoint(tmp_path) is None


def test_newest_of_iterations_and_epochs(tmp_path: Path):
    write(tmp_path / "iter_900.pth", 2)
    newest = write(tmp_path / "iter_1000.pth", 1)
    assert find_resumable_checkpoint(tmp_path) == newest
    newest = write(tmp_path / "epoch_2.pth", 0)
    assert find_resumable_checkpoint(tmp_path) == newest


def test_cut_off_checkpoint_is_passed_over(tmp_path: Path):
    whole = write(tmp_path / "iter_2.pth", 1)
    cut = write(tmp_path / "iter_4.pth", 0)
    cut.write_bytes(cut.read_bytes()[:-100])
    (tmp_path / "last_checkpoint").write_text(str(cut))
    assert find_resumable_checkpoint(tmp_path) == whole


def test_pointer_may_be_empty_stale_or_lead_elsewhere(tmp_path: Path):
    pointer = tmp_path / "last_checkpoint"
    pointer.write_text("")
    assert find_resumable_checkpoint(tmp_path) is None
    pointer.write_text(str(tmp_path / "removed.pth"))
    assert find_resumable_checkpoint(tmp_path) is None
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = write(elsewhere / "iter_6.pth", 0)
    pointer.write_text(f"{target}\n")
    assert find_resumable_checkpoint(tmp_path) == target


@pytest.mark.parametrize("content", [b"\xff\xfe", bytes(40), b"x" * 5000, b"a\nb", b".", b"iter_2.pth/"])
def test_pointer_may_be_damaged(content: bytes, tmp_path: Path):
    whole = write(tmp_path / "iter_2.pth", 0)
    (tmp_path / "last_checkpoint").write_bytes(content)
    assert find_resumable_checkpoint(tmp_path) == whole


def test_seed_of_a_checkpoint(tmp_path: Path):
    torch.save({"meta": {"seed": 7}, "state_dict": {"weight": torch.zeros(3)}}, tmp_path / "iter_1.pth")
    assert read_seed(tmp_path / "iter_1.pth") == 7
    torch.save({"state_dict": {}}, tmp_path / "weights.pth")
    assert read_seed(tmp_path / "weights.pth") is None
