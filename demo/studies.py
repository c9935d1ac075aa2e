"""Shared code of the studies: parallel trainings, results that survive interruption, overrides and Markdown tables."""

import json
import os
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config

from grootvl_mm.apis import cli

POLL_INTERVAL = 0.2  # seconds


class Training(NamedTuple):
    """A training to be run."""

    name: str
    folder: Path
    command: Sequence[str]


class Ended(NamedTuple):
    """A training that was run."""

    training: Training
    status: int  # exit status; negative if a signal ended it
    seconds: float
    output: Path | None  # file with its output; None if the output went to the terminal


def run_trainings(trainings: Iterable[Training], jobs: int) -> Iterator[Ended]:
    """Run trainings, ``jobs`` at a time, and yield each when it ends.

    Several at a time share the cores, unless ``OMP_NUM_THREADS`` is set, and print to ``FOLDER/output.txt``. Closing
    the generator stops the trainings that are running.

    Args:
        trainings: The trainings, started in this order.
        jobs: Number of trainings at a time.
    """
    cores = len(os.sched_getaffinity(0))
    env = {"OMP_NUM_THREADS": str(max(cores // jobs, 1)), **os.environ} if jobs > 1 else None
    waiting = deque(trainings)
    running: dict[subprocess.Popen, tuple[Training, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                training = waiting.popleft()
                output = output_of(training, jobs)
                running[start(training.command, output, env)] = training, time.monotonic()
            for process in [process for process in running if process.poll() is not None]:
                training, since = running.pop(process)
                yield Ended(training, process.returncode, time.monotonic() - since, output_of(training, jobs))
            time.sleep(POLL_INTERVAL)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def output_of(training: Training, jobs: int) -> Path | None:
    """The file for a training's output; None for the terminal."""
    return training.folder / "output.txt" if jobs > 1 else None


def start(command: Sequence[str], output: Path | None, env: dict[str, str] | None) -> subprocess.Popen:
    """Start a process whose output goes to a file, or to the terminal."""
    if output is None:
        return subprocess.Popen(command, env=env)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w") as file:
        return subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT)


def read_results(path: Path, initial: dict[str, Any]) -> dict[str, Any]:
    """Read the results of an earlier call, or return the initial ones."""
    return json.loads(path.read_text()) if path.is_file() else initial


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write the results."""
    with cli.output_file(path) as partial:
        partial.write_text(json.dumps(results, indent=2) + "\n")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}", *(f"| {' | '.join(cells)} |" for cells in rows)]
    return "\n".join(lines) + "\n"


def summary(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """Mean and, for several values, standard deviation."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{spread}"


def resized(cfg: Config, side: int) -> Iterator[str]:
    """Yield the overrides that make a config's pipelines resize images to a square of this side."""
    for part in ("train", "val", "test"):
        pipeline = cfg[f"{part}_dataloader"].dataset.pipeline
        (index,) = (index for index, transform in enumerate(pipeline) if transform.type == "Resize")
        yield f"{part}_dataloader.dataset.pipeline.{index}.scale=({side},{side})"


def scheduled(iters: int, seed: int) -> Iterator[str]:
    """Yield the overrides of a demo config for the length of a training; at most a fifth of it is warm-up."""
    warm_up = max(min(50, iters // 5), 1)
    yield from (f"train_cfg.max_iters={iters}", f"randomness.seed={seed}", f"param_scheduler.0.end={warm_up}")
    yield from (f"param_scheduler.1.begin={warm_up}", f"param_scheduler.1.end={iters}")
