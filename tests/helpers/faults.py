"""Damaged checkpoints, and all ways in which this project loads them."""

import collections
import contextlib
import copy
import io
import random
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.runner import load_checkpoint
from torch import nn

from grootvl_mm.apis.checkpoint_files import rewrite_checkpoint
from grootvl_mm.apis.cli import checkpoint_errors
from grootvl_mm.apis.resume import check_resumable, find_resumable_checkpoint
from grootvl_mm.models import GrootV
from grootvl_mm.utils.host_loaders import safe_loaders
from grootvl_mm.utils.loaded_weights import all_weights_loaded
from grootvl_mm.utils.safe_checkpoints import CheckpointError, read_checkpoint
from tests.helpers.small_runs import run as train_small
from tests.helpers.tool_runs import load_script

ARCH = {"channels": 8, "depths": [1, 1]}
HOOKS = [
    {"type": f"grootvl_mm.{name}"}
    for name in ("UntrustedCheckpointHook", "CompleteCheckpointHook", "ResumedValidationHook")
]
# Of a training whose checkpoints have all that there can be in one.
TRAINING = {
    "custom_hooks": [*HOOKS, {"type": "EMAHook"}],
    "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 0.1}},
    "param_scheduler": [{"type": "MultiStepLR", "by_epoch": False, "milestones": [1, 3]}],
}


class Way(NamedTuple):
    """A way of loading: what it does with a file, and whether it must find weights that do not fit."""

    load: Callable[[Path], Any]
    complete: bool


def make_files(folder: Path) -> dict[str, Path]:
    """A checkpoint of a training, and one of a backbone."""
    runner_folder = folder / "run"
    train_small(runner_folder, 1, **TRAINING)
    torch.save({"state_dict": GrootV(ARCH, out_indices=(0, 1)).state_dict()}, folder / "backbone.pth")
    return {"training": runner_folder / "iter_1.pth", "backbone": folder / "backbone.pth"}


def ways(folder: Path) -> dict[str, dict[str, Way]]:
    """All ways of loading, by what they load."""
    publish = load_script("tools/model_converters/publish_model.py").publish

    def resume(path: Path) -> None:
        with safe_loaders(), checkpoint_errors():
            train_small(folder / "resumed", 2, path, **TRAINING)

    def newest(path: Path) -> None:
        if find_resumable_checkpoint(path.parent) is None:
            raise CheckpointError("none")
        check_resumable(path)

    def test(path: Path) -> None:
        model = nn.Sequential(collections.OrderedDict(linear=nn.Linear(3, 2)))
        with safe_loaders(), all_weights_loaded(model):
            load_checkpoint(model, str(path), map_location="cpu", logger="silent")

    def pretrained(path: Path) -> None:
        GrootV(ARCH, out_indices=(0, 1), init_cfg={"type": "Pretrained", "checkpoint": str(path)}).init_weights()

    def write_again(path: Path) -> None:
        _, written = rewrite_checkpoint(path, folder / "published.pth", publish)
        written.unlink()

    return {
        "training": {
            "read": Way(read_checkpoint, complete=False),
            "choose": Way(newest, complete=False),
            "resume": Way(resume, complete=True),
            "test": Way(test, complete=True),
            "publish": Way(write_again, complete=False),
        },
        "backbone": {"read": Way(read_checkpoint, complete=False), "pretrained": Way(pretrained, complete=True)},
    }


def damage_bytes(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Cut, flip, zero or exchange some bytes of a file."""
    kind = rng.choice(["cut", "flipped", "zeroed", "exchanged", "filled", "grown"])
    damaged = bytearray(content)
    start, length = rng.randrange(len(content)), rng.randint(1, 4096)
    if kind == "cut":
        damaged = damaged[:start]
    elif kind == "flipped":
        for _ in range(rng.randint(1, 8)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    elif kind == "zeroed":
        damaged[start : start + length] = bytes(len(damaged[start : start + length]))
    elif kind == "filled":
        damaged[start : start + length] = rng.randbytes(len(damaged[start : start + length]))
    elif kind == "exchanged":
        other = rng.randrange(len(content))
        damaged[start : start + 64], damaged[other : other + 64] = (
            damaged[other : other + 64],
            damaged[start : start + 64],
        )
    else:
        damaged[start:start] = rng.randbytes(length)
    return kind, bytes(damaged)


WRONG_VALUES: dict[str, Callable[[torch.Tensor], Any]] = {
    "NaN": lambda value: value.new_full(value.shape, torch.nan) if value.is_floating_point() else value.numpy(),
    "NumPy": lambda value: value.numpy(),
    "list": lambda value: value.tolist(),
    "text": str,
    "none": lambda value: None,
    "sparse": lambda value: value.to_sparse(),
    "meta": lambda value: value.to("meta"),
    "half": lambda value: value.half(),
    "integers": lambda value: value.int(),
    "reshaped": lambda value: value.new_zeros((*value.shape, 2)),
    "flattened": lambda value: value.new_zeros(value.numel() + 1),
    "empty": lambda value: value.new_zeros(0),
}


def with_wrong_weight(content: dict[str, Any], name: str, kind: str) -> dict[str, Any]:
    """A file in which one weight is ``dropped``, or of one of :data:`WRONG_VALUES`."""
    weights = dict(content["state_dict"])
    value = weights.pop(name)
    return {**content, "state_dict": weights if kind == "dropped" else {**weights, name: WRONG_VALUES[kind](value)}}


def damage_weights(content: dict[str, Any], rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Drop, rename or change a weight; such a file is whole, but does not hold the model."""
    content = copy.deepcopy(content)
    weights = content["state_dict"]
    name = rng.choice([name for name, value in weights.items() if value.is_floating_point()])
    kind = rng.choice(["dropped", "renamed", "halved", "nothing", *WRONG_VALUES])
    if kind == "dropped":
        del weights[name]
    elif kind == "renamed":
        weights[f"{name}x"] = weights.pop(name)
    elif kind == "halved":
        content["state_dict"] = dict(list(weights.items())[: len(weights) // 2])
    elif kind == "nothing":
        content["state_dict"] = rng.choice([{}, None, [], "weights", 5])
    else:
        weights[name] = WRONG_VALUES[kind](weights[name])
    return kind, content


# What anything else in a checkpoint may be, but for what it should.
WRONG_PARTS: tuple[Callable[[], Any], ...] = (
    *(lambda: "text", lambda: None, lambda: [1, "a"], lambda: {"a": 1}, lambda: -7, lambda: 2**60, lambda: ((1,),)),
    *(lambda: float("nan"), lambda: torch.ones(2, 7), lambda: torch.full((2,), torch.nan), lambda: np.ones((2, 2))),
)


def damage_parts(content: dict[str, Any], rng: random.Random) -> tuple[str, dict[str, Any]]:
    """Drop something beside the weights, wherever it is, or put something else in its place."""
    content = copy.deepcopy(content)
    place, path = content, [rng.choice([name for name in content if name != "state_dict"])]
    while isinstance(place[path[-1]], (dict, list)) and place[path[-1]] and rng.random() < 0.8:
        place = place[path[-1]]
        path.append(rng.choice(list(place) if isinstance(place, dict) else range(len(place))))
    if rng.random() < 0.1:
        del place[path[-1]]
    else:
        place[path[-1]] = rng.choice(WRONG_PARTS)()
    return f"part {path}", content


def same(first: Any, second: Any) -> bool:
    """Whether two contents are bitwise equal."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return isinstance(second, np.ndarray) and first.tobytes() == second.tobytes()
    if isinstance(first, Mapping):
        return (
            isinstance(second, Mapping)
            and first.keys() == second.keys()
            and all(same(first[k], second[k]) for k in first)
        )
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(same, first, second))
    return True  # numbers and texts are covered by the checksum of the pickle


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise a TimeoutError after some seconds; for the main thread."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def attempt(way: Way, path: Path) -> str | None:
    """Try a way of loading: None if it worked, the message if it ended clearly; anything else is raised."""
    try:
        with time_limit(300), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            way.load(path)
    except (CheckpointError, SystemExit) as error:
        clear = isinstance(error, CheckpointError) or str(error).startswith("error: ")
        if not clear or "\n" in str(error):
            raise RuntimeError(f"several lines: {error}") from error
        return str(error)
    return None
