"""Measure how time and memory of one block scale with the image size: GrootV, Swin, ConvNeXt and global attention.

Each contender is one whole block (token mixer and MLP, residual branches and norms) of the same width on the map of
stride 4 of one image: GrootV's block with its three scans, torchvision's Swin and ConvNeXt blocks, and a transformer
block with global attention (PyTorch's fused kernel, whose memory is linear). The operators alone are measured up to
larger images. All run in turn on distinct maps; peak memory is measured in a new process for each contender. The slope
is that of the logarithm of the time over the logarithm of the number of positions: 1 is linear, 2 quadratic; its
interval (95 %) is by the bootstrap over the rounds. A contender whose next call would take longer than --limit ends
there.

An interrupted run resumes when the same command is given again: each measurement goes to OUT/measured.json at once,
with the load of the machine at its start. A run can thus be made in pieces, for example with one more size each time.
"""

import argparse
import functools
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from measuring import (
    MEMORY_ENVIRONMENT,
    add_common_arguments,
    at_least,
    check_common_arguments,
    describe_machine,
    format_seconds,
    format_table,
    machine_lines,
    natural_features,
    peak_memory,
    run_fresh,
    spread,
    time_in_turn,
    write_results,
)
from mmengine.logging import MMLogger
from torch import Tensor, nn
from torchvision.models.convnext import CNBlock
from torchvision.models.swin_transformer import SwinTransformerBlock

from grootvl_mm.apis import cli
from grootvl_mm.apis.whole_files import whole_file
from grootvl_mm.models.grootv import Block
from grootvl_mm.ops import grid_edge_weight, grid_tree, tree_scan

NAME = "complexity"
STRIDE = 4
HEAD = 32  # channels per attention head
WINDOW = 7
DISTINCT_MAPS = 2
RESAMPLES = 2000


class ScanBlock(nn.Module):
    """GrootV's block without its tree."""

    def __init__(self, channels: int, scan: str) -> None:
        super().__init__()
        self.block = Block(channels, scan=scan)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C)."""
        return self.block(x)[0]


class ConvNeXtBlock(nn.Module):
    """torchvision's ConvNeXt block for channels-last inputs."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block = CNBlock(channels, layer_scale=1.0, stochastic_depth_prob=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C)."""
        return self.block(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class AttentionBlock(nn.Module):
    """PyTorch's transformer block over all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.block = nn.TransformerEncoderLayer(channels, channels // HEAD, 4 * channels, **options)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C)."""
        return self.block(x.flatten(1, 2)).view_as(x)


BLOCKS: dict[str, Callable[[int], nn.Module]] = {
    "tree": functools.partial(ScanBlock, scan="tree"),
    "raster": functools.partial(ScanBlock, scan="raster"),
    "cross": functools.partial(ScanBlock, scan="cross"),
    "Swin": lambda channels: SwinTransformerBlock(channels, channels // HEAD, [WINDOW] * 2, [WINDOW // 2] * 2),
    "ConvNeXt": ConvNeXtBlock,
    "global attention": AttentionBlock,
}


def edge_weights(x: Tensor) -> Tensor:
    """Edge weights of features (1, H, W, D)."""
    return grid_edge_weight(x.permute(0, 3, 1, 2))


OPERATORS = ("grid_edge_weight", "grid_tree", "tree_scan")


class Settings(NamedTuple):
    """Settings of a measurement."""

    width: int
    step: str
    rounds: int
    device: str


def make_maps(side: int, channels: int, device: str) -> list[Tensor]:
    """Distinct maps (1, H, W, C) with the spectrum of photographs, for an image of ``side`` pixels."""
    generator = torch.Generator(device).manual_seed(0)
    size = -(-side // STRIDE)
    return [
        natural_features(generator, 1, channels, size, size).permute(0, 2, 3, 1).contiguous()
        for _ in range(DISTINCT_MAPS)
    ]


def build(name: str, settings: Settings) -> nn.Module:
    """One block with random weights."""
    torch.manual_seed(0)
    return BLOCKS[name](settings.width).to(settings.device).train(settings.step == "training")


def run_block(block: nn.Module, step: str, x: Tensor) -> None:
    """Forward, or forward and backward."""
    if step == "inference":
        with torch.no_grad():
            block(x)
        return
    block.zero_grad(set_to_none=True)
    block(x.requires_grad_()).mean().backward()
    x.grad = None


def time_blocks(side: int, names: Sequence[str], settings: Settings) -> dict[str, list[float]]:
    """Seconds of some blocks on one size."""
    blocks = {name: build(name, settings) for name in names}
    calls = {name: functools.partial(run_block, block, settings.step) for name, block in blocks.items()}
    maps = make_maps(side, settings.width, settings.device)
    return time_in_turn(calls, maps, settings.rounds, settings.device, f"{side} {settings.step}")


def time_operators(side: int, names: Sequence[str], settings: Settings) -> dict[str, list[float]]:
    """Seconds of some operators on one size, with 2 C channels as inside a block."""
    inputs = []
    for x in make_maps(side, 2 * settings.width, settings.device):
        weight = edge_weights(x)
        values = x.flatten(1, 2)
        inputs.append((x, weight, values, torch.sigmoid(values), grid_tree(weight, *x.shape[1:3])))
    calls = {
        "grid_edge_weight": lambda value: edge_weights(value[0]),
        "grid_tree": lambda value: grid_tree(value[1], *value[0].shape[1:3]),
        "tree_scan": lambda value: tree_scan(*value[2:]),
    }
    with torch.no_grad():
        chosen = {name: calls[name] for name in names}
        return time_in_turn(chosen, inputs, settings.rounds, settings.device, f"{side} operators")


def memory_of_block(sides: Sequence[int], name: str, settings: Settings) -> list[int]:
    """Peak bytes of one call beyond the block and its input, for ascending sizes.

    The first call, which loads code, does not count.
    """
    block = build(name, settings)
    run_block(block, settings.step, make_maps(32, settings.width, settings.device)[0])
    peaks = []
    for side in sides:
        block.zero_grad(set_to_none=True)
        x = make_maps(side, settings.width, settings.device)[0]
        peaks.append(peak_memory(lambda x=x: run_block(block, settings.step, x), settings.device))
    return peaks


class Measured:
    """What has been measured, in a file that outlives a killed process.

    Args:
        path: the file.
        conditions: what all measurements have in common; the command ends with an error if the file has others.
    """

    def __init__(self, path: Path, conditions: dict[str, Any]) -> None:
        self.path = path
        self.data = {"conditions": conditions, "seconds": {}, "bytes": {}, "load": {}}
        if path.is_file():
            found = json.loads(path.read_text())
            if found["conditions"] != conditions:
                cli.fail(
                    f"{path} was measured with {found['conditions']}, not {conditions}; give another folder to --out, "
                    "or delete the file to measure again"
                )
            self.data = found

    def complete(
        self, kind: str, group: str, names: Sequence[str], measure: Callable[[tuple[str, ...]], dict[str, Any]]
    ) -> dict[str, Any]:
        """The values of ``names`` in a group, after those that are missing have been measured together."""
        known = self.data[kind].setdefault(group, {})
        missing = tuple(name for name in names if name not in known)
        if missing:
            self.data["load"][f"{kind}, {group}"] = round(os.getloadavg()[0], 1)
            known.update(measure(missing))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(self.path) as partial:
                partial.write_text(json.dumps(self.data, indent=2) + "\n")
        return {name: known[name] for name in names}


def next_seconds(points: Sequence[tuple[int, float]], positions: int) -> float:
    """Predict the time of a call from the slope between the last two sizes, or quadratic growth after the first."""
    if not points:
        return 0.0
    (*_, before, last) = [points[0], *points]
    slope = np.log(last[1] / before[1]) / np.log(last[0] / before[0]) if last[0] > before[0] else 2.0
    return last[1] * (positions / last[0]) ** max(slope, 1.0)


def sweep(
    measure: Callable[..., dict[str, list[float]]],
    names: Sequence[str],
    sides: Sequence[int],
    settings: Settings,
    limit: float,
    threads: int,
    measured: Measured,
) -> dict[str, list[dict[str, Any]]]:
    """Times of contenders at all sizes that they reach within the limit."""
    logger = MMLogger.get_instance(NAME)
    points: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    running = list(names)
    for side in sides:
        positions = (-(-side // STRIDE)) ** 2
        for name in list(running):
            known = [(point["positions"], point["seconds"]["median"]) for point in points[name]]
            if next_seconds(known, positions) > limit:
                logger.info("%s, %s: %d pixels would take longer than --limit.", settings.step, name, side)
                running.remove(name)
        if not running:
            break
        times = measured.complete(
            "seconds",
            f"{settings.step}, {side}",
            running,
            lambda missing, side=side: run_fresh(measure, side, missing, settings, threads=threads),
        )
        medians = (f"{name} {format_seconds(float(np.median(seconds)))}" for name, seconds in times.items())
        logger.info("%s, %d pixels: %s", settings.step, side, ", ".join(medians))
        for name, seconds in times.items():
            points[name].append({"side": side, "positions": positions, "seconds": spread(seconds), "rounds": seconds})
    return points


def measure_memory(
    name: str, sides: Sequence[int], settings: Settings, threads: int, measured: Measured
) -> dict[str, int]:
    """Peak bytes by size, for one contender."""

    def measure(missing: Sequence[str]) -> dict[str, int]:
        MMLogger.get_instance(NAME).info("%s, %s: peak memory", settings.step, name)
        ascending = sorted(map(int, missing))
        peaks = run_fresh(memory_of_block, ascending, name, settings, threads=threads, environment=MEMORY_ENVIRONMENT)
        return dict(zip(map(str, ascending), peaks, strict=True))

    return measured.complete("bytes", f"{settings.step}, {name}", list(map(str, sides)), measure)


def slope_of(points: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """The log-log slope through the medians, with its bootstrap interval over the rounds."""
    if len(points) < 2:
        return None
    logs = np.log([point["positions"] for point in points])
    centred = logs - logs.mean()
    rng = np.random.default_rng(0)
    medians = []
    for point in points:
        seconds = np.asarray(point["rounds"])
        chosen = rng.integers(len(seconds), size=(RESAMPLES, len(seconds)))
        medians.append(np.concatenate([[np.median(seconds)], np.median(seconds[chosen], axis=1)]))
    slopes = (centred[:, None] * np.log(medians)).sum(axis=0) / np.square(centred).sum()
    low, high = np.quantile(slopes[1:], [0.025, 0.975])
    return {"value": float(slopes[0]), "low": float(low), "high": float(high)}


def report(data: dict[str, Any]) -> str:
    """The results as text."""
    loads = data["load"].values()
    lines = [
        f"One block of {data['width']} channels; threads: {data['threads']}",
        *machine_lines(data["machine"]),
        f"load average at the measurements: {min(loads)} to {max(loads)}",
    ]
    for step, found in data["steps"].items():
        sides = [point["side"] for point in max(found.values(), key=len)]
        if not sides:
            continue
        header = ["contender", *map(str, sides), "slope", "interval"]
        rows = []
        for name, points in found.items():
            cells = [format_seconds(point["seconds"]["median"]) for point in points]
            slope = data["slopes"][step][name]
            fitted = (f"{slope['value']:.2f}", f"{slope['low']:.2f}..{slope['high']:.2f}") if slope else ("-", "-")
            rows.append([name, *cells, *["-"] * (len(sides) - len(cells)), *fitted])
        lines += ["", f"{step}: time by side of the image in pixels", format_table(header, rows)]
        if memory := data["memory"].get(step):
            rows = [
                [name, *(f"{peaks[side] / 2**20:.0f} MiB" if side in peaks else "-" for side in map(str, sides))]
                for name, peaks in memory.items()
            ]
            lines += ["", f"{step}: peak memory", format_table(["", *map(str, sides)], rows)]
    return "\n".join(lines) + "\n"


def draw(data: dict[str, Any]) -> Figure:
    """Time, and memory below it, over the size; all axes are logarithmic."""
    rows = 2 if data["memory"] else 1
    figure = Figure(figsize=(5.2 * len(data["steps"]), 4.4 * rows), layout="constrained")
    grid = figure.subplots(rows, len(data["steps"]), squeeze=False)
    figure.suptitle(f"One block of {data['width']} channels, threads: {data['threads']}, {data['machine']['cpu']}")
    for axes in grid.flat:
        axes.set_axis_off()
    for column, (step, found) in enumerate(data["steps"].items()):
        sides = sorted({point["side"] for points in found.values() for point in points})
        times = {}
        for name, points in found.items():
            slope = data["slopes"][step][name]
            label = f"{name} ({slope['value']:.2f})" if slope else name
            times[label] = [(point["side"], 1e3 * point["seconds"]["median"]) for point in points]
        draw_curves(grid[0, column], times, sides, f"{step}: time", "milliseconds, median")
        grid[0, column].legend(fontsize=8, title="slope in brackets")
        if step in data["memory"]:
            peaks = {
                name: [(int(side), peak / 2**20) for side, peak in values.items() if peak > 0]
                for name, values in data["memory"][step].items()
            }
            draw_curves(grid[1, column], peaks, sides, f"{step}: peak memory", "MiB")
            grid[1, column].legend(fontsize=8)
    return figure


def draw_curves(
    axes: Axes, curves: dict[str, list[tuple[int, float]]], sides: Sequence[int], title: str, unit: str
) -> None:
    """One line per contender."""
    axes.set_axis_on()
    for (name, points), style in zip(
        curves.items(), itertools.cycle(("o-", "s--", "^-", "v-", "D-", "P-")), strict=False
    ):
        axes.loglog(*zip(*points, strict=True), style, label=name, markersize=4) if points else None
    axes.set_xticks(sides, map(str, sides))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set(title=title, xlabel="side of the image, pixels", ylabel=unit)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    side = at_least(32)
    parser.add_argument("--sides", type=side, nargs="+", default=[224, 448, 896, 1344, 2048], metavar="N",
                        help="image sides for the blocks, in pixels (default: 224 448 896 1344 2048)")  # fmt: skip
    parser.add_argument("--operator-sides", type=side, nargs="*", default=[224, 448, 896, 2048, 4096], metavar="N",
                        help="image sides for the operators, in pixels; without values, operators are skipped "
                        "(default: 224 448 896 2048 4096)")  # fmt: skip
    parser.add_argument(
        "--width",
        type=at_least(HEAD),
        default=96,
        metavar="N",
        help=f"channels, a multiple of {HEAD} (default: %(default)s)",
    )
    parser.add_argument("--contenders", nargs="+", choices=BLOCKS, default=list(BLOCKS), metavar="NAME",
                        help=f"some of {', '.join(BLOCKS)} (default: all)")  # fmt: skip
    parser.add_argument("--steps", nargs="*", choices=("inference", "training"), default=["inference", "training"],
                        help="default: both")  # fmt: skip
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="measure the time alone")
    parser.add_argument("--limit", type=float, default=20.0, metavar="SECONDS",
                        help="time limit of a call (default: %(default)s)")  # fmt: skip
    add_common_arguments(parser, NAME, rounds=7)
    args = parser.parse_args()
    check_common_arguments(parser, args)
    if args.width % HEAD:
        parser.error(f"--width must be a multiple of {HEAD}, got {args.width}")
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {args.rounds}")
    return args


def main() -> None:
    """Run the command."""
    args = parse_args()
    logger = MMLogger.get_instance(NAME)
    machine = describe_machine(args.device)
    conditions = {"cpu": machine["cpu"], "torch": machine["torch"], "grootvl_mm": machine["grootvl_mm"]}
    conditions |= {name: getattr(args, name) for name in ("device", "threads", "width", "rounds")}
    measured = Measured(args.out / "measured.json", conditions)
    steps, memory = {}, {}
    for step in args.steps:
        settings = Settings(args.width, step, args.rounds, args.device)
        steps[step] = sweep(
            time_blocks, args.contenders, sorted(args.sides), settings, args.limit, args.threads, measured
        )
        if args.memory:
            memory[step] = {
                name: measure_memory(name, [point["side"] for point in points], settings, args.threads, measured)
                for name, points in steps[step].items()
                if points
            }
    if args.operator_sides:
        settings = Settings(args.width, "operators", args.rounds, args.device)
        steps["operators"] = sweep(
            time_operators, OPERATORS, sorted(args.operator_sides), settings, args.limit, args.threads, measured
        )
    if not any(points for found in steps.values() for points in found.values()):
        cli.fail("nothing was measured; give --operator-sides, or --sides and --steps")
    slopes = {step: {name: slope_of(points) for name, points in found.items()} for step, found in steps.items()}
    data = {"machine": machine, "width": args.width, "threads": args.threads, "steps": steps, "slopes": slopes,
            "memory": memory, "load": measured.data["load"]}  # fmt: skip
    write_results(args.out, NAME, data, report(data), draw(data))
    logger.info("Results: %s", args.out)


if __name__ == "__main__":
    main()
