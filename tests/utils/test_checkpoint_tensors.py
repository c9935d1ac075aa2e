"""Tensors of hostile files, and of harmless ones."""

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from grootvl_mm.utils.safe_checkpoints import CheckpointError, load_safely, read_checkpoint
from tests.helpers.crafted_pickles import (
    HOSTILE_COPIES,
    HOSTILE_TENSORS,
    Op,
    build,
    call,
    named,
    storage,
    tensor,
    write,
    write_old,
)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("name", HOSTILE_TENSORS)
def test_hostile_tensors_are_refused(name: str, mmap: bool, tmp_path: Path):
    path = write(tmp_path / "crafted.pth", {"state_dict": {}, "optimizer": HOSTILE_TENSORS[name]()})
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(path, mmap=mmap)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", HOSTILE_COPIES)
def test_repeating_parts_of_a_file_does_not_fill_the_memory(name: str, tmp_path: Path):
    path = write(tmp_path / "crafted.pth", {"state_dict": {}, "optimizer": HOSTILE_COPIES[name]()})
    with pytest.raises(CheckpointError, match="together much larger than the file"):
        read_checkpoint(path)


TENSORS = {
    **{f"of {dtype}": torch.ones(2, 3).to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.int8, torch.bool)},
    "complex": torch.ones(3, dtype=torch.complex64),
    "transposed": torch.arange(6.0).reshape(2, 3).T,
    "a part": torch.arange(10.0)[3:8:2],
    "expanded": torch.arange(3.0).expand(1000, 3),
    "no axes": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "empty, of no strides": torch.zeros(0),
    "parameter": nn.Parameter(torch.ones(2)),
    "frozen parameter": nn.Parameter(torch.ones(2), requires_grad=False),
    "with a gradient to come": torch.ones(2, requires_grad=True),
}
if torch.__version__ >= "2.6":  # older versions do not save them
    TENSORS |= {
        "of unsigned integers": torch.ones(3).to(torch.uint16),
        "of 8 bits": torch.ones(3).to(torch.float8_e4m3fn),
    }


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("archive", [True, False])
def test_tensors_are_read_exactly(archive: bool, tmp_path: Path):
    whole = torch.arange(6.0)
    content = {**TENSORS, "whole": whole, "view": whole[2:4], "again": whole, "bytes": b"\0\xff"}
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=archive)
    loaded = load_safely(tmp_path / "file.pth")
    for name, value in TENSORS.items():
        got = loaded[name]
        assert (type(got), got.dtype, got.shape, got.stride(), got.requires_grad) == (
            *(type(value), value.dtype, value.shape, value.stride(), value.requires_grad),
        ), name
        assert got.detach().contiguous().view(-1).tolist() == value.detach().contiguous().view(-1).tolist(), name
    assert loaded["again"] is loaded["whole"]
    loaded["view"].fill_(9)
    assert loaded["whole"].tolist() == [0, 1, 9, 9, 4, 5]
    assert loaded["bytes"] == b"\0\xff"


def test_hooks_and_states_of_tensors_are_dropped(tmp_path: Path):
    hooks = {1: named("builtins.set")}
    parameter = named("torch._utils._rebuild_parameter_with_state")
    content = {"tensor": tensor(hooks=hooks), "parameter": call(parameter, tensor(), True, hooks, {"grad": tensor()})}
    loaded = load_safely(write(tmp_path / "crafted.pth", content))
    assert loaded["tensor"]._backward_hooks is None
    assert loaded["parameter"]._backward_hooks is None
    assert loaded["parameter"].grad is None


# What a file of torch before 1.6 could get at: its storages can be resized, and are filled last, or never.
OLD: dict[str, tuple[object, dict[str, bytes]]] = {
    "larger than its storage": (lambda: tensor((1000,), numbers=storage("0", 4, "FloatStorage", None)), {"0": 16}),
    "resized below another": (
        lambda: [
            tensor(numbers=storage("0", 4, "FloatStorage", ("1", 0, 4))),
            tensor((10**6,), numbers=storage("0", 4, "FloatStorage", None)),
        ],
        {"0": 16},
    ),
    "set again": (
        lambda: build(
            tensor(numbers=storage("0", 4, "FloatStorage", None)),
            (storage("0", 4, "FloatStorage", None), 0, (10**6,), (1,)),
        ),
        {"0": 16},
    ),
    "larger than the file": (lambda: tensor((10**6,), numbers=storage("0", 10**6, "FloatStorage", None)), {}),
    "larger than the file, all together": (
        lambda: [tensor((100,), numbers=storage(str(key), 100, "FloatStorage", None)) for key in range(99)],
        {},
    ),
    "a module": (lambda: Op(tensor().code + pickle.POP + b"."), {}),
}


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("name", OLD)
def test_hostile_files_of_old_torch_are_refused(name: str, tmp_path: Path):
    make, filled = OLD[name]
    content = {key: bytes(size) for key, size in filled.items()}
    path = write_old(tmp_path / "crafted.pth", {"a": make()}, content)
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(path)
    assert "\n" not in str(raised.value)


def test_old_files_that_fill_nothing_hold_zeros(tmp_path: Path):
    """PyTorch itself gives what happened to be in memory."""
    size = 10**4
    content = {"a": tensor((size,), numbers=storage("0", size, "FloatStorage", None)), "padding": "x" * 4 * size}
    used = [torch.full((size,), 7.0) for _ in range(9)]
    del used
    assert not read_checkpoint(write_old(tmp_path / "crafted.pth", content, {}))["a"].any()
