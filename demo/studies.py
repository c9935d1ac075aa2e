"""Shared code of the studies: results that survive interruption, config overrides and Markdown tables."""

import json
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from grootvl_mm.apis import cli


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
