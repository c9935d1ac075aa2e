"""Trainings and converters interrupted at random moments."""

import collections
import hashlib
import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fault_campaign.forks import Fork, preload
from fault_campaign.results import TO_END, Result
from fault_campaign.trainings import make_config
from grootvl_mm.apis.resume import find_resumable_checkpoint
from grootvl_mm.utils.safe_checkpoints import read_checkpoint
from tests.helpers.faults import same

ITERATIONS = ("train_cfg.max_iters=16", "train_cfg.val_interval=4", "default_hooks.checkpoint.interval=2")
EPOCHS = (
    *("train_cfg._delete_=True", "train_cfg.by_epoch=True", "train_cfg.max_epochs=3", "train_cfg.val_interval=1"),
    *("default_hooks.checkpoint.by_epoch=True", "train_dataloader.sampler.type=DefaultSampler"),
)
KINDS = {"iterations": ITERATIONS, "epochs": EPOCHS}
COMPARED = ("state_dict", "optimizer", "param_schedulers")


class Recorded:
    """Runs cases in parallel and records their outcomes, so that an interrupted campaign can be resumed.

    Args:
        folder: Folder for outcomes and data; None for a temporary one, without resuming.
        jobs: Number of parallel cases.
    """

    def __init__(self, folder: Path | None, jobs: int) -> None:
        self.folder = folder
        self.jobs = jobs

    @contextmanager
    def place(self) -> Iterator[Path]:
        """Yield the folder."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield self.folder.resolve()
            return
        with TemporaryDirectory() as folder:
            yield Path(folder)

    def run(self, name: str, folder: Path, case: Callable[[int], dict], count: int) -> list[dict]:
        """The outcomes of ``case(0)`` to ``case(count - 1)``; recorded cases are not run again."""
        record = folder / f"{name}.jsonl"
        known = {}
        if record.exists():
            known = {line["number"]: line for line in map(json.loads, record.read_text().splitlines())}
        left = [number for number in range(count) if number not in known]
        with ProcessPoolExecutor(self.jobs, get_context("fork")) as pool, record.open("a") as file:
            for number, outcome in zip(left, pool.map(case, left), strict=True):
                known[number] = {"number": number, **outcome}
                file.write(json.dumps(known[number]) + "\n")
                file.flush()
        return [known[number] for number in range(count)]


def numbered_faults(outcomes: list[dict]) -> list[str]:
    """All faults, prefixed by the numbers of their cases."""
    return [f"{outcome['number']}: {fault}" for outcome in outcomes for fault in outcome["faults"]]


def train(config: Path, work_dir: Path, kind: str) -> Fork:
    """Start or resume a training."""
    work_dir.mkdir(exist_ok=True)
    options = (config, "--work-dir", work_dir, "--resume", "--exact-resume", "--cfg-options", *KINDS[kind])
    return Fork("tools/train.py", *options, folder=work_dir.parent, name=work_dir.name)


def make_whole(folder: Path) -> dict[str, float]:
    """Run one uninterrupted training of each kind; return their durations in seconds."""
    record = folder / "whole.json"
    if record.exists():
        return json.loads(record.read_text())
    config, seconds = make_config(folder), {}
    for kind in KINDS:
        shutil.rmtree(folder / kind, ignore_errors=True)
        begin = time.monotonic()
        training = train(config, folder / kind, kind)
        if training.wait() != 0:
            raise RuntimeError(f"{kind}: the training itself fails: {training.said()}")
        seconds[kind] = time.monotonic() - begin
    record.write_text(json.dumps(seconds))
    return seconds


def kill_one(folder: Path, seconds: dict[str, float], seed: int, number: int) -> dict[str, Any]:
    """Kill a training with SIGKILL once or twice, resume it, and compare it with the uninterrupted one."""
    rng = random.Random(f"kill {seed} {number}")
    kind = list(KINDS)[number % len(KINDS)]
    config, work_dir = folder / "config.py", folder / f"killed-{number}"
    faults, gone, kills = [], [], rng.choice([1, 1, 2])
    shutil.rmtree(work_dir, ignore_errors=True)
    done = 0
    while done < kills:
        training = train(config, work_dir, kind)
        done += training.stop_after(rng.uniform(0, seconds[kind]), signal.SIGKILL)
        gone.append(training.wait_for_descendants())
        if training.status >= 0:  # it ended before the signal
            if training.status:
                faults.append(f"{kind}: resuming failed: {training.said()}")
                break
            shutil.rmtree(work_dir)
    training = train(config, work_dir, kind)
    if training.wait():
        faults.append(f"{kind}: resuming failed: {training.said()}")
    if None in gone:
        faults.append(f"{kind}: processes were left")
    if not faults:
        faults += [f"{kind}: {problem}" for problem in differences(folder / kind, work_dir)]
        shutil.rmtree(work_dir)
    return {"faults": faults, "kills": done, "seconds": max((value or TO_END for value in gone), default=0)}


def differences(whole: Path, other: Path) -> Iterator[str]:
    """Yield bitwise differences between the last checkpoints of two trainings, and leftovers of the other one."""
    last = find_resumable_checkpoint(whole)
    if not (other / last.name).exists():
        yield f"there is no {last.name}"
        return
    expected, got = read_checkpoint(last), read_checkpoint(other / last.name)
    for part in COMPARED:
        if not same(expected.get(part), got.get(part)):
            yield f"{part} differs from that of the uninterrupted training"
    best = [sorted(path.name for path in folder.glob("best_*.pth")) for folder in (whole, other)]
    if best[0] != best[1]:
        yield f"the best checkpoints are {best[1]}, expected {best[0]}"
    yield from (f"left {path.name}" for path in other.rglob("*.part"))


def kills(count: int, rng: random.Random, recorded: Recorded) -> Result:
    """Kill trainings at random moments; after resuming, they are bitwise equal to an uninterrupted one."""
    seed = rng.randrange(2**31)
    with recorded.place() as folder:
        preload()
        outcomes = recorded.run("kills", folder, partial(kill_one, folder, make_whole(folder), seed), count)
    faults = numbered_faults(outcomes)
    number, longest = sum(o["kills"] for o in outcomes), max(o["seconds"] for o in outcomes)
    return Result(f"{count} trainings, {number} times SIGKILL; all processes gone within {longest:.1f} s", faults)


def stop_one(folder: Path, seconds: dict[str, float], seed: int, number: int) -> dict[str, Any]:
    """Stop a training with SIGTERM or SIGINT."""
    rng = random.Random(f"stop {seed} {number}")
    kind = rng.choice(list(KINDS))
    stop = (signal.SIGTERM, signal.SIGINT)[number % 2]
    work_dir = folder / f"stopped-{number}"
    shutil.rmtree(work_dir, ignore_errors=True)
    faults, in_time = [], False
    while not in_time:
        training = train(folder / "config.py", work_dir, kind)
        in_time = training.stop_after(rng.uniform(0, seconds[kind]), stop)
        gone = training.wait_for_descendants()
    if gone is None:
        faults.append(f"{kind}, {stop.name}: processes were left")
    if training.status == 0:
        faults.append(f"{kind}, {stop.name}: ended with status 0")
    faults += [f"{kind}, {stop.name}: left {path.name}" for path in work_dir.rglob("*.part")]
    shutil.rmtree(work_dir)
    return {"faults": faults, "stop": stop.name, "seconds": gone or TO_END}


def stops(count: int, rng: random.Random, recorded: Recorded) -> Result:
    """Stop trainings with SIGTERM and SIGINT at random moments: no process is left."""
    seed = rng.randrange(2**31)
    with recorded.place() as folder:
        preload()
        outcomes = recorded.run("stops", folder, partial(stop_one, folder, make_whole(folder), seed), count)
    faults = numbered_faults(outcomes)
    signals, longest = collections.Counter(o["stop"] for o in outcomes), max(o["seconds"] for o in outcomes)
    return Result(f"{dict(signals)}; all processes gone within {longest:.1f} s", faults)


# ---- converters ----


def make_sources(folder: Path) -> None:
    """Write the inputs of the converters: a training checkpoint and a published file."""
    from grootvl_mm.models import GrootV, GrootVNeck
    from tests.helpers.published import publish

    backbone = GrootV("pico")
    weights = publish(backbone, GrootVNeck(8 * backbone.channels, 12 * backbone.channels))
    torch.save({"model": weights}, folder / "published.pth")
    torch.save({"state_dict": backbone.state_dict(), "meta": {"epoch": 1}}, folder / "trained.pth")


CONVERTERS: dict[str, Callable[[Path, Path], tuple]] = {
    "tools/model_converters/publish_model.py": lambda source, out: (source / "trained.pth", out / "model.pth"),
    "tools/model_converters/grootv_to_mmpretrain.py": lambda source, out: (source / "published.pth", out / "model.pth"),
    "tools/dataset_converters/make_demo_data.py": lambda source, out: (
        *("--out", out / "demo", "--train", 12, "--val", 4, "--size", 64, "--workers", 2),
    ),
}


def contents(folder: Path) -> dict[str, str]:
    """The visible files below a folder, with their digests."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".")
    }


def convert(script: str, folder: Path, out: Path) -> Fork:
    """Start a converter."""
    out.mkdir()
    return Fork(script, *CONVERTERS[script](folder, out), folder=folder, name=out.name)


def interrupt_one(folder: Path, whole: dict[str, tuple[dict, float]], seed: int, number: int) -> dict[str, Any]:
    """Interrupt a converter: its output is complete or missing, and after SIGTERM and SIGINT nothing else is left."""
    rng = random.Random(f"converter {seed} {number}")
    script = list(CONVERTERS)[number % len(CONVERTERS)]
    stop = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
    expected, seconds = whole[script]
    out = folder / f"out-{number}"
    faults, in_time = [], False
    while not in_time:
        shutil.rmtree(out, ignore_errors=True)
        converter = convert(script, folder, out)
        in_time = converter.stop_after(rng.uniform(0, seconds), stop)
        gone = converter.wait_for_descendants()
    label = f"{Path(script).name}, {stop.name}"
    if gone is None:
        faults.append(f"{label}: processes were left")
    if contents(out) not in ({}, expected):
        faults.append(f"{label}: the output is incomplete: {list(contents(out))[:5]}")
    hidden = [path.name for path in out.iterdir() if path.name.startswith(".")]
    if hidden and stop != signal.SIGKILL:
        faults.append(f"{label}: left {hidden}")
    shutil.rmtree(out)
    return {"faults": faults, "stop": stop.name, "whole": bool(in_time and not hidden)}


def converters(count: int, rng: random.Random, recorded: Recorded) -> Result:
    """Interrupt the converters at random moments."""
    seed, whole = rng.randrange(2**31), {}
    with recorded.place() as folder:
        preload()
        make_sources(folder)
        for script in CONVERTERS:
            shutil.rmtree(folder / "whole", ignore_errors=True)
            begin = time.monotonic()
            converter = convert(script, folder, folder / "whole")
            if converter.wait():
                return Result(f"{script} itself fails", [converter.said()])
            whole[script] = contents(folder / "whole"), time.monotonic() - begin
        outcomes = recorded.run("converters", folder, partial(interrupt_one, folder, whole, seed), count)
    faults = numbered_faults(outcomes)
    signals = collections.Counter(outcome["stop"] for outcome in outcomes)
    return Result(f"{len(CONVERTERS)} converters: {dict(signals)}", faults)
