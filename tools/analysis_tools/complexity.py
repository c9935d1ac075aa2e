"""Measure how time and memory of one layer grow with the image: tree, raster and cross scan, Swin, ConvNeXt, attention.

Each contender is one whole block (token mixer and MLP, residual branches and norms) of the same width on the map of
stride 4 of one image: GrootV's block with its three scans, torchvision's Swin and ConvNeXt blocks, and a transformer
block with global attention (PyTorch's fused kernel, whose memory is linear). The operators alone are measured up to
larger images. All run in turn on distinct maps; peak memory is that of a new process for each. The slope is that of the
logarithm of the time over the logarithm of the number of positions: 1 is linear, 2 quadratic; its interval (95 %) is by
the bootstrap over the rounds. A contender whose next call would take longer than --limit ends there.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from measuring import (
    MEMORY_ENVIRONMENT,
    at_least,
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

from grootvl_mm.models.grootv import Block
from grootvl_mm.ops import grid_edge_weight, grid_tree, tree_scan

NAME = "complexity"
STRIDE = 4
HEAD = 32  # channels to a head of attention
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
    """torchvision's block with its channels last."""

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
    """Of (1, H, W, D)."""
    return grid_edge_weight(x.permute(0, 3, 1, 2))


OPERATORS = ("grid_edge_weight", "grid_tree", "tree_scan")


class Settings(NamedTuple):
    """How it is measured."""

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
    """Seconds of some operators on one size, with the 2 C channels that they have in a block."""
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


def memory_of_block(side: int, name: str, settings: Settings) -> int:
    """Peak bytes of one call beyond the block and its input; the first call, which loads code, does not count."""
    block = build(name, settings)
    run_block(block, settings.step, make_maps(32, settings.width, settings.device)[0])
    block.zero_grad(set_to_none=True)
    x = make_maps(side, settings.width, settings.device)[0]
    return peak_memory(lambda: run_block(block, settings.step, x), settings.device)


def next_seconds(points: Sequence[tuple[int, float]], positions: int) -> float:
    """What a call will take, by the slope between the last two sizes, or quadratically after one."""
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
) -> dict[str, list[dict[str, Any]]]:
    """Times of contenders at all sizes that they reach within the limit."""
    points: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    running = list(names)
    for side in sides:
        positions = (-(-side // STRIDE)) ** 2
        for name in list(running):
            known = [(point["positions"], point["seconds"]["median"]) for point in points[name]]
            if next_seconds(known, positions) > limit:
                running.remove(name)
        if not running:
            break
        times = run_fresh(measure, side, tuple(running), settings, threads=threads)
        for name, seconds in times.items():
            points[name].append({"side": side, "positions": positions, "seconds": spread(seconds), "rounds": seconds})
    return points


def slope_of(points: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """The slope in log-log through the medians, with its interval by the bootstrap over the rounds."""
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
    lines = [f"One block of {data['width']} channels, {data['threads']} threads", *machine_lines(data["machine"])]
    for step, found in data["steps"].items():
        sides = [point["side"] for point in max(found.values(), key=len)]
        header = ["contender", *map(str, sides), "slope", "interval"]
        rows = []
        for name, points in found.items():
            cells = [format_seconds(point["seconds"]["median"]) for point in points]
            slope = data["slopes"][step][name]
            fitted = (f"{slope['value']:.2f}", f"{slope['low']:.2f}..{slope['high']:.2f}") if slope else ("-", "-")
            rows.append([name, *cells, *["-"] * (len(sides) - len(cells)), *fitted])
        lines += ["", f"{step}: seconds by side of the image", format_table(header, rows)]
        if memory := data["memory"].get(step):
            rows = [
                [name, *(f"{peaks[side] / 2**20:.0f} MiB" if side in peaks else "-" for side in map(str, sides))]
                for name, peaks in memory.items()
            ]
            lines += ["", f"{step}: peak memory", format_table(["contender", *map(str, sides)], rows)]
    return "\n".join(lines) + "\n"


def draw(data: dict[str, Any]) -> Figure:
    """Time and memory over the size, both axes logarithmic."""
    panels = [(step, "seconds") for step in data["steps"]] + [(step, "MiB") for step in data["memory"]]
    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    for axes, (step, unit) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        curves = data["steps"][step] if unit == "seconds" else data["memory"][step]
        for name, values in curves.items():
            if unit == "seconds":
                points = [(point["side"], point["seconds"]["median"]) for point in values]
                slope = data["slopes"][step][name]
                label = f"{name} ({slope['value']:.2f})" if slope else name
            else:
                points, label = [(int(side), peak / 2**20) for side, peak in values.items() if peak > 0], name
            axes.loglog(*zip(*points, strict=True), "o-", label=label, markersize=4) if points else None
        sides = sorted({point["side"] for points in data["steps"][step].values() for point in points})
        axes.set_xticks(sides, map(str, sides))
        axes.minorticks_off()
        axes.set(title=f"{step}, {data['width']} channels", xlabel="side of the image", ylabel=unit)
        axes.legend(fontsize=8, title="slope in brackets" if unit == "seconds" else None)
    return figure


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    side = at_least(32)
    parser.add_argument("--sides", type=side, nargs="+", default=[224, 448, 896, 1344, 2048], metavar="N",
                        help="default: 224 448 896 1344 2048")  # fmt: skip
    parser.add_argument("--operator-sides", type=side, nargs="*", default=[224, 448, 896, 2048, 4096], metavar="N",
                        help="default: 224 448 896 2048 4096")  # fmt: skip
    parser.add_argument(
        "--width", type=at_least(HEAD), default=96, help=f"channels, a multiple of {HEAD} (default: %(default)s)"
    )
    parser.add_argument("--steps", nargs="+", choices=("inference", "training"), default=["inference", "training"],
                        help="default: both")  # fmt: skip
    parser.add_argument("--limit", type=float, default=20.0, metavar="SECONDS",
                        help="longest call (default: %(default)s)")  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=at_least(1), default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=at_least(2), default=7, metavar="N", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("work_dirs", NAME), help="default: %(default)s")
    args = parser.parse_args()
    if args.width % HEAD:
        parser.error(f"--width must be a multiple of {HEAD}, got {args.width}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and torch.cuda.is_available() is False")
    return args


def main() -> None:
    """Run the command."""
    args = parse_args()
    logger = MMLogger.get_instance(NAME)
    machine = describe_machine(args.device)
    steps, memory = {}, {}
    for step in args.steps:
        logger.info("Measuring the time of %s.", step)
        settings = Settings(args.width, step, args.rounds, args.device)
        steps[step] = sweep(time_blocks, tuple(BLOCKS), sorted(args.sides), settings, args.limit, args.threads)
        memory[step] = {}
        for name, points in steps[step].items():
            logger.info("Measuring the memory of %s, %s.", step, name)
            memory[step][name] = {
                str(point["side"]): run_fresh(
                    memory_of_block, point["side"], name, settings, threads=args.threads, environment=MEMORY_ENVIRONMENT
                )
                for point in points
            }
    if args.operator_sides:
        settings = Settings(args.width, "operators", args.rounds, args.device)
        steps["operators"] = sweep(
            time_operators, OPERATORS, sorted(args.operator_sides), settings, args.limit, args.threads
        )
    slopes = {step: {name: slope_of(points) for name, points in found.items()} for step, found in steps.items()}
    data = {"machine": machine, "width": args.width, "threads": args.threads, "steps": steps, "slopes": slopes,
            "memory": memory}  # fmt: skip
    text = report(data)
    sys.stdout.write(text)
    write_results(args.out, NAME, data, text, draw(data))


if __name__ == "__main__":
    main()
