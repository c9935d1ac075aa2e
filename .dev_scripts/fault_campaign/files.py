"""Damaged and hostile files, loaded in every supported way."""

import collections
import contextlib
import random
import tempfile
from pathlib import Path
from typing import Any

import torch

from fault_campaign.results import Result
from grootvl_mm.utils.safe_checkpoints import CheckpointError, read_checkpoint
from tests.helpers.crafted_pickles import HOSTILE, HOSTILE_TENSORS, NO_DATA, write
from tests.helpers.faults import Way, attempt, damage_bytes, damage_parts, damage_weights, make_files, same, ways


def checkpoints(count: int, rng: random.Random) -> Result:
    """Load damaged checkpoints in all ways: either correct content or a one-line error; no other files are written."""
    faults, outcomes, loads = [], collections.Counter(), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = make_files(folder)
        originals = {name: path.read_bytes() for name, path in files.items()}
        contents = {name: read_checkpoint(path) for name, path in files.items()}
        target = folder / "damaged" / "iter_9.pth"
        target.parent.mkdir()
        for number in range(count):
            what = rng.choice(list(files))
            damage = rng.choice([damage_bytes, damage_weights, damage_parts if what == "training" else damage_bytes])
            if damage is damage_bytes:
                kind, damaged = damage_bytes(originals[what], rng)
                target.write_bytes(damaged)
            else:
                kind, content = damage(contents[what], rng)
                torch.save(content, target)
            for name, way in ways(folder)[what].items():
                loads += 1
                try:
                    message = attempt(way, target)
                except BaseException as error:  # anything but a one-line error is a fault
                    faults.append(f"{number}: {kind} {what}, {name}: {type(error).__name__}: {str(error)[:200]}")
                    continue
                outcomes["refused" if message else "loaded"] += 1
                if message is None and damage is damage_bytes and not _holds(target, contents[what]):
                    faults.append(f"{number}: {kind} {what}, {name}: loaded other content")
                if message is None and damage is damage_weights and way.complete:
                    faults.append(f"{number}: {kind} {what}, {name}: loaded in silence")
                leftovers = [path.name for path in target.parent.iterdir() if path != target]
                leftovers += [path.name for path in folder.iterdir() if path.name.startswith((".", "published"))]
                if leftovers:
                    faults.append(f"{number}: {kind} {what}, {name}: left {leftovers}")
    return Result(f"{count} damaged files, {loads} loads: {dict(outcomes)}", faults)


def _holds(path: Path, content: dict[str, Any]) -> bool:
    with contextlib.suppress(CheckpointError):
        return same(read_checkpoint(path), content)
    return False


def pickles(count: int, rng: random.Random) -> Result:
    """Load hostile pickles with torch.load and in all other ways: refused, and nothing is executed."""
    faults, loads = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train = ways(folder)["training"]
        torchs_own = {**HOSTILE_TENSORS, **NO_DATA}
        for name, make in (HOSTILE | torchs_own).items():
            path = write(folder / "iter_1.pth", {"state_dict": {}, "meta": make()})
            for label, way in {"torch.load": Way(torch.load, complete=False), **train}.items():
                if label == "torch.load" and name in torchs_own:
                    continue
                loads += 1
                try:
                    message = attempt(way, path)
                except Exception as error:
                    if label != "torch.load":
                        faults.append(f"{name}, {label}: {type(error).__name__}: {str(error)[:200]}")
                    continue
                if message is None:
                    faults.append(f"{name}, {label}: loaded")
    return Result(f"{len(HOSTILE) + len(torchs_own)} hostile pickles, {loads} loads", faults)
