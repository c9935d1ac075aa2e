"""Measure the GrootV-tiny backbone against the hosts' Swin-T and ConvNeXt-T.

224x224 against mmpretrain's, 800x1333 against mmdet's and 512x512 against mmseg's: inference, and training steps of
forward, the sum of the means of the outputs, and backward. The models run in turn in the same process, on several
distinct images. A ratio is that of the median times, its spread the 10th to 90th percentile of the ratios of the single
rounds. All models are built without stochastic depth.

The share of the tree part in GrootV-tiny's forward is the time of grid_edge_weight and grid_tree inside a forward, seen
by torch's profiler, and of the scan, over the time of a forward without the profiler. The scan is part of a fused
operator that holds the elementwise work around it too, so the plain tree_scan is timed in its place: on the trees that
the forward built, at the shape of each block.

The peak memory of a training step is measured in a new process for each model: on the CPU the growth of the resident
size above what it is before the step (parameters and images), on CUDA that of the allocated memory.
"""

import argparse
import functools
import importlib
import importlib.util
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measuring import (
    MEMORY_ENVIRONMENT,
    Goal,
    add_common_arguments,
    at_least,
    check_common_arguments,
    describe_machine,
    format_limit,
    format_ratio,
    format_seconds,
    format_table,
    format_threads,
    machine_lines,
    natural_features,
    peak_memory,
    ratio_of,
    run_fresh,
    spread,
    time_in_turn,
    timed,
    write_results,
)
from mmengine.logging import MMLogger
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from grootvl_mm.models import GrootV
from grootvl_mm.models.tree_ssm import TreeSSM
from grootvl_mm.ops import Tree, tree_scan

NAME = "benchmark_model"
OURS = "GrootV-T"
ROUNDS = 20
IMAGES = 4  # distinct batches of images, cycled
TREE_OPERATORS = ("grid_edge_weight", "grid_tree")
STEPS = ("inference", "training")


class Shape(NamedTuple):
    """Images of one task, and whose models see them."""

    host: str  # package with the peers
    peers: tuple[str, ...]
    batch: int
    size: tuple[int, int]
    quick_size: tuple[int, int]
    out_indices: tuple[int, ...]  # stages whose maps the task needs


SHAPES = {
    "224": Shape(
        "mmpretrain", ("Swin-T", "ConvNeXt-T"), 8, (224, 224), (224, 224), (3,)
    ),  # mmpretrain's Swin-T takes nothing smaller
    "800x1333": Shape("mmdet", ("Swin-T",), 1, (800, 1333), (64, 100), (0, 1, 2, 3)),
    "512": Shape("mmseg", ("Swin-T",), 1, (512, 512), (64, 64), (0, 1, 2, 3)),
}
HOST_PACKAGES = {"mmpretrain": "mmpretrain", "mmdet": "mmdet", "mmseg": "mmsegmentation"}
# Throughput of GrootV-T over the peer's, by (shape, step, peer). The aim of "224" is to be as fast as ConvNeXt-T.
THROUGHPUT_GOALS = {
    ("224", "inference", "Swin-T"): Goal(1.0),
    ("224", "inference", "ConvNeXt-T"): Goal(None, 1.0),
    ("224", "training", "Swin-T"): Goal(0.8, 1.0),
    ("800x1333", "inference", "Swin-T"): Goal(1.0, 1.3),
    ("800x1333", "training", "Swin-T"): Goal(0.8, 1.0),
    ("512", "inference", "Swin-T"): Goal(1.0, 1.3),
    ("512", "training", "Swin-T"): Goal(0.8, 1.0),
}
SHARE_GOALS = {name: Goal(0.10, 0.06, lower_is_better=True) for name in ("224", "800x1333")}
# Peak memory of GrootV-T over the peer's.
MEMORY_GOALS = {"Swin-T": Goal(1.0, 0.8, lower_is_better=True)}


class Settings(NamedTuple):
    """How it is measured."""

    device: str
    amp: bool
    rounds: int
    quick: bool
    steps: tuple[str, ...]


# ---- Models


def missing(shape: Shape) -> str | None:
    """Why the peers of a shape cannot be built, or None when they can."""
    if importlib.util.find_spec(shape.host) is None:
        return f"{HOST_PACKAGES[shape.host]} not installed"
    try:
        importlib.import_module(f"{shape.host}.models.backbones")
    except ImportError as error:  # without a compiled mmcv, for example
        return f"{HOST_PACKAGES[shape.host]} does not import: {error}"
    return None


def build(model: str, shape: Shape, device: str) -> nn.Module:
    """A backbone with random weights, as the task of the shape uses it."""
    torch.manual_seed(0)
    if model == OURS:
        return GrootV("tiny", out_indices=shape.out_indices).to(device)
    backbones = importlib.import_module(f"{shape.host}.models.backbones")
    if model == "ConvNeXt-T":
        return backbones.ConvNeXt("tiny", drop_path_rate=0.0).to(device)
    return backbones.SwinTransformer(out_indices=shape.out_indices, drop_path_rate=0.0).to(device)


def make_images(shape: Shape, settings: Settings) -> list[Tensor]:
    """Distinct batches of images with the spectrum of photographs."""
    generator = torch.Generator(settings.device).manual_seed(0)
    return [natural_features(generator, *image_shape(shape, settings.quick)) for _ in range(IMAGES)]


def image_shape(shape: Shape, quick: bool) -> tuple[int, ...]:
    """(B, 3, H, W)."""
    return (1, 3, *shape.quick_size) if quick else (shape.batch, 3, *shape.size)


def autocast(settings: Settings) -> torch.autocast:
    """Mixed precision, where it was asked for."""
    return torch.autocast(settings.device, dtype=torch.bfloat16, enabled=settings.amp)


def infer(model: nn.Module, settings: Settings, images: Tensor) -> Any:
    """A forward without gradients; the model is in evaluation mode."""
    with torch.no_grad(), autocast(settings):
        return model(images)


def train(model: nn.Module, settings: Settings, images: Tensor) -> None:
    """Forward and backward; the model is in training mode. The gradients are replaced, as after an optimizer's step."""
    model.zero_grad(set_to_none=True)
    with autocast(settings):
        outputs = model(images)
        loss = sum(output.float().mean() for output in outputs)
    loss.backward()


# ---- Time


def measure_shape(name: str, settings: Settings) -> dict[str, Any]:
    """Times of all models on one shape, and the share of the tree part."""
    shape = SHAPES[name]
    images = make_images(shape, settings)
    reason = missing(shape)
    models = {model: build(model, shape, settings.device) for model in (OURS, *(() if reason else shape.peers))}
    rows = []
    for step in settings.steps:
        for model in models.values():
            model.train(step == "training")
        call = train if step == "training" else infer
        times = time_in_turn(
            {label: functools.partial(call, model, settings) for label, model in models.items()},
            itertools.cycle(images),
            settings.rounds,
            settings.device,
            f"{name} {step}",
            hold=IMAGES,
        )
        for label, seconds in times.items():
            row = {"shape": name, "step": step, "model": label, "batch": len(images[0]), "seconds": spread(seconds)}
            row["images_per_second"] = len(images[0]) / row["seconds"]["median"]
            if label != OURS:
                row["throughput_ratio"] = ratio_of(seconds, times[OURS])
            rows.append(row)
        rows += [{"shape": name, "step": step, "model": peer, "not_measured": reason} for peer in shape.peers if reason]
    result = {"threads": torch.get_num_threads(), "rows": rows}
    if "inference" in settings.steps:
        result["share"] = {"shape": name, **measure_share(models[OURS].eval(), images, settings)}
    return result


def measure_share(model: GrootV, images: list[Tensor], settings: Settings) -> dict[str, Any]:
    """What edge weights, trees and scans take of a forward; see the head of this file."""
    parts: dict[str, list[float]] = {name: [] for name in ("forward", *TREE_OPERATORS, "tree_scan")}
    for batch in itertools.islice(itertools.cycle(images), settings.rounds):
        forward = functools.partial(infer, model, settings, batch)
        parts["forward"].append(timed(forward, settings.device))
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if settings.device == "cuda" else [])
        with _trees_of(model) as scans, profile(activities=activities, acc_events=True) as profiler:
            forward()
        for name in TREE_OPERATORS:
            parts[name].append(_operator_seconds(profiler, name, settings.device))
        parts["tree_scan"].append(sum(_scan_seconds(tree, channels, settings.device) for tree, channels in scans))
    totals = [sum(parts[name][i] for name in (*TREE_OPERATORS, "tree_scan")) for i in range(settings.rounds)]
    return {
        "batch": len(images[0]),
        "seconds": {name: spread(values) for name, values in parts.items()},
        "share": ratio_of(totals, parts["forward"]),
    }


@contextmanager
def _trees_of(model: GrootV) -> Iterator[list[tuple[Tree, int]]]:
    """Collect the trees that each mixer scans along, and its number of channels inside."""
    scans: list[tuple[Tree, int]] = []

    def keep(mixer: nn.Module, _inputs: Any, outputs: tuple[Tensor, Tree]) -> None:
        scans.append((outputs[1], mixer.Ds.numel()))

    handles = [module.register_forward_hook(keep) for module in model.modules() if isinstance(module, TreeSSM)]
    try:
        yield scans
    finally:
        for handle in handles:
            handle.remove()


def _operator_seconds(profiler: profile, name: str, device: str) -> float:
    """All calls of an operator, with what it calls itself (its allocations, say)."""
    key = f"grootvl::{name}"
    # The operator passes itself on, from its autograd kernel to that of the device: only the outer call is counted.
    calls = [event for event in profiler.events() if event.name == key and not _is_inside(event, key)]
    return sum(event.device_time_total if device == "cuda" else event.cpu_time_total for event in calls) / 1e6


def _is_inside(event: Any, key: str) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name == key or _is_inside(parent, key))


def _scan_seconds(tree: Tree, channels: int, device: str) -> float:
    x = torch.rand(*tree.parent.shape, channels, device=device)
    decay = torch.rand_like(x).mul_(0.2).add_(0.8)
    return timed(lambda: tree_scan(x, decay, tree), device)


# ---- Memory


def measure_memory(name: str, model: str, settings: Settings) -> int:
    """Peak bytes of a training step of one model; the first step, which loads code, does not count."""
    shape = SHAPES[name]
    images = make_images(shape, settings)[0]
    backbone = build(model, shape, settings.device)
    backbone.train()  # not chained: mmpretrain's returns None
    step = functools.partial(train, backbone, settings, images)
    step()
    backbone.zero_grad(set_to_none=True)
    return peak_memory(step, settings.device)


def measure_memories(names: list[str], settings: Settings, threads: int, logger: MMLogger) -> list[dict[str, Any]]:
    """All models on all shapes."""
    rows = []
    for name in names:
        shape = SHAPES[name]
        reason = missing(shape)
        peaks = {}
        for model in (OURS, *shape.peers):
            row = {"shape": name, "model": model}
            if model != OURS and reason:
                row["not_measured"] = reason
            else:
                logger.info("Measuring the memory of a training step: %s, %s.", name, model)
                arguments = {"threads": threads, "environment": MEMORY_ENVIRONMENT}
                row["bytes"] = peaks[model] = run_fresh(measure_memory, name, model, settings, **arguments)
            if model in peaks and model != OURS:
                row["ratio"] = peaks[OURS] / peaks[model]
            rows.append(row)
    return rows


# ---- Reporting


def judge(data: dict[str, Any]) -> None:
    """Add goals and verdicts to what was measured."""

    def add(row: dict[str, Any], goal: Goal, ratio: float) -> None:
        goal = Goal() if data["quick"] else goal
        row |= {"goal": goal._asdict(), "verdict": goal.verdict(ratio)}

    for run in data["runs"]:
        seconds = {
            (row["shape"], row["step"], row["model"]): row["seconds"]["median"]
            for row in run["rows"]
            if "seconds" in row
        }
        for row in run["rows"]:
            if "throughput_ratio" in row:
                key = (row["shape"], row["step"], row["model"])
                goal = THROUGHPUT_GOALS.get(key, Goal())
                fastest = seconds.get(("224", "inference", "ConvNeXt-T"))
                if key == ("224", "inference", "Swin-T") and fastest is not None:
                    goal = goal._replace(aim=max(1.0, seconds[key] / fastest))
                add(row, goal, row["throughput_ratio"]["median"])
        for share in run["shares"]:
            add(share, SHARE_GOALS.get(share["shape"], Goal()), share["share"]["median"])
    for row in data["memory"]:
        if "ratio" in row:
            add(row, MEMORY_GOALS.get(row["model"], Goal()), row["ratio"])


def report(data: dict[str, Any]) -> str:
    """The results as text."""
    settings = data["settings"]
    lines = [
        f"Backbones: {OURS} against Swin-T and ConvNeXt-T",
        *machine_lines(data["machine"]),
        f"Device: {settings['device']}, {'bfloat16 autocast' if settings['amp'] else 'float32'}; rounds: "
        f"{settings['rounds']}, over {IMAGES} batches of images. Times are medians, ratios those of the medians, "
        "spread is the 10th to 90th percentile.",
    ]
    if data["quick"]:
        lines.append("QUICK: tiny images; the ratios mean nothing and are held against no floor.")
    columns = ["shape", "batch", "step", "threads", "model", "time", "spread", "images/s", "ratio", "spread"]
    body = [_time_cells(row, run["threads"]) for run in data["runs"] for row in run["rows"]]
    lines += ["", f"Time; the ratio is {OURS}'s throughput over the model's"]
    lines += [format_table([*columns, "floor", "aim", "result"], body)]
    shares = [(share, run["threads"]) for run in data["runs"] for share in run["shares"]]
    if shares:
        columns = ["shape", "batch", "threads", "forward", *TREE_OPERATORS, "tree_scan", "share", "spread"]
        lines += ["", f"Share of the tree part in {OURS}'s forward"]
        lines += [format_table([*columns, "floor", "aim", "result"], [_share_cells(*share) for share in shares])]
    if data["memory"]:
        columns = ["shape", "model", "peak memory", "ratio", "floor", "aim", "result"]
        threads = format_threads(settings["threads"][0])
        lines += ["", f"Peak memory of a training step, {threads}; the ratio is {OURS}'s over the model's"]
        lines += [format_table(columns, [_memory_cells(row) for row in data["memory"]])]
    return "\n".join(lines) + "\n"


def _time_cells(row: dict[str, Any], threads: int) -> list[str]:
    if "not_measured" in row:
        return [row["shape"], "-", row["step"], str(threads), row["model"], *["-"] * 7, row["not_measured"]]
    low, high = (format_seconds(row["seconds"][key]) for key in ("p10", "p90"))
    cells = [
        *(row["shape"], str(row["batch"]), row["step"], str(threads), row["model"]),
        *(format_seconds(row["seconds"]["median"]), f"{low} .. {high}", f"{row['images_per_second']:.2f}"),
    ]
    if "throughput_ratio" not in row:
        return [*cells, *["-"] * 4, ""]
    return [*cells, *format_ratio(row["throughput_ratio"]), *_goal_cells(row)]


def _share_cells(share: dict[str, Any], threads: int) -> list[str]:
    seconds = [format_seconds(value["median"]) for value in share["seconds"].values()]
    value = share["share"]
    low, high = (f"{100 * value[key]:.1f}" for key in ("p10", "p90"))
    percent = [f"{100 * value['median']:.1f} %", f"{low}..{high} %"]
    return [share["shape"], str(share["batch"]), str(threads), *seconds, *percent, *_goal_cells(share, percent=True)]


def _memory_cells(row: dict[str, Any]) -> list[str]:
    if "not_measured" in row:
        return [row["shape"], row["model"], *["-"] * 4, row["not_measured"]]
    cells = [row["shape"], row["model"], f"{row['bytes'] / 2**20:.0f} MiB"]
    if "ratio" not in row:
        return [*cells, *["-"] * 3, ""]
    return [*cells, f"{row['ratio']:.2f}x", *_goal_cells(row)]


def _goal_cells(row: dict[str, Any], *, percent: bool = False) -> tuple[str, str, str]:
    goal = Goal(**row["goal"])
    limits = (format_limit(limit, goal, percent=percent) for limit in (goal.floor, goal.aim))
    return *limits, row["verdict"]


def draw(data: dict[str, Any]) -> Figure:
    """Bars: throughput ratios, shares, memory."""
    settings, runs = data["settings"], data["runs"]
    ratios = [(row, run["threads"]) for run in runs for row in run["rows"] if "throughput_ratio" in row]
    shares = [(share, run["threads"]) for run in runs for share in run["shares"]]
    memory = [row for row in data["memory"] if "bytes" in row]
    panels = [
        (paint, bars, width)
        for paint, bars, width in ((_draw_ratios, ratios, 4), (_draw_shares, shares, 3), (_draw_memory, memory, 3))
        if bars
    ]
    widths = [width for *_, width in panels]
    height = 2.2 + 0.42 * max(len(bars) for _, bars, _ in panels)
    figure = Figure(figsize=(1.5 * sum(widths), height), layout="constrained")
    precision = "bfloat16 autocast" if settings["amp"] else "float32"
    quick = ", QUICK: meaningless" if data["quick"] else ""
    figure.suptitle(f"{OURS} backbone, {data['hardware']}, {precision}{quick}", fontsize=12)
    grid = figure.subplots(1, len(panels), squeeze=False, width_ratios=widths)
    for axes, (paint, bars, _) in zip(grid[0], panels, strict=True):
        paint(axes, bars)
        axes.set_ylim(len(bars) - 0.4, -0.6)  # the first bar on top
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        handles, _ = axes.get_legend_handles_labels()
        if handles:
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.6 / height), ncols=3)
    return figure


def _draw_ratios(axes: Axes, bars: list[tuple[dict[str, Any], int]]) -> None:
    rows = [row for row, _ in bars]
    labels = [f"{row['shape']}, {row['step']}\n{row['model']}, {format_threads(threads)}" for row, threads in bars]
    values = [row["throughput_ratio"] for row in rows]
    medians = [value["median"] for value in values]
    # The ratio of the medians may lie outside of a narrow spread of the single ratios.
    below = [max(0.0, value["median"] - value["p10"]) for value in values]
    above = [max(0.0, value["p90"] - value["median"]) for value in values]
    _bars(axes, labels, medians, xerr=[below, above], ecolor="black", capsize=2)
    axes.axvline(1, color="black", linewidth=0.8)
    _mark_goals(axes, [(i, row["goal"], 1) for i, row in enumerate(rows)])
    axes.set(title=f"Throughput of {OURS} over a peer's", xlabel="ratio (higher is better)")


def _draw_shares(axes: Axes, bars: list[tuple[dict[str, Any], int]]) -> None:
    rows = [row for row, _ in bars]
    left = [0.0] * len(rows)
    for name, colour in zip((*TREE_OPERATORS, "tree_scan"), ("tab:blue", "tab:orange", "tab:purple"), strict=True):
        seconds = [row["seconds"] for row in rows]
        widths = [100 * value[name]["median"] / value["forward"]["median"] for value in seconds]
        axes.barh(range(len(rows)), widths, left=left, height=0.6, color=colour, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [f"{row['shape']}\n{format_threads(threads)}" for row, threads in bars])
    _mark_goals(axes, [(i, row["goal"], 100) for i, row in enumerate(rows)])
    axes.set(title=f"Tree part of {OURS}'s forward", xlabel="% of the time (lower is better)")


def _draw_memory(axes: Axes, rows: list[dict[str, Any]]) -> None:
    colours = ["tab:blue" if row["model"] == OURS else "tab:gray" for row in rows]
    labels = [f"{row['shape']}\n{row['model']}" for row in rows]
    _bars(axes, labels, [row["bytes"] / 2**30 for row in rows], color=colours)
    ours = {row["shape"]: i for i, row in enumerate(rows) if row["model"] == OURS}
    # The limits of ours are shares of what the peer takes.
    _mark_goals(axes, [(ours[row["shape"]], row["goal"], row["bytes"] / 2**30) for row in rows if "goal" in row])
    axes.set(title="Peak memory of a training step", xlabel="GiB (lower is better)")


def _bars(axes: Axes, labels: list[str], values: list[float], **style: Any) -> None:
    bars = axes.barh(range(len(values)), values, height=0.6, **style)
    axes.bar_label(bars, fmt="%.2f", label_type="center", color="white", fontsize=8)
    axes.set_yticks(range(len(labels)), labels)


def _mark_goals(axes: Axes, bars: list[tuple[int, dict[str, Any], float]]) -> None:
    """A red stroke at the floor of each bar and a green one at its aim: place of the bar, goal and its unit."""
    for name, colour in (("floor", "tab:red"), ("aim", "limegreen")):
        marks = [(place, unit * goal[name]) for place, goal, unit in bars if goal[name] is not None]
        if marks:
            places, limits = zip(*marks, strict=True)
            low, high = [place - 0.42 for place in places], [place + 0.42 for place in places]
            axes.vlines(limits, low, high, color=colour, linewidth=2.5, label=name)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, f"work_dirs/{NAME}", [torch.get_num_threads()])
    parser.add_argument(
        "--rounds", type=at_least(1), metavar="N", help=f"measurements of each model (default: {ROUNDS}; quick: 2)"
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=SHAPES,
        default=list(SHAPES),
        metavar="NAME",
        help=f"some of: {', '.join(SHAPES)}",
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="default: both")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    args = parser.parse_args()
    check_common_arguments(parser, args)
    args.rounds = args.rounds or (2 if args.quick else ROUNDS)
    return args


def main() -> None:
    """Run the command."""
    args = parse_args()
    logger = MMLogger.get_instance(NAME)
    names = [name for name in SHAPES if name in args.shapes]
    steps = tuple(step for step in STEPS if step in args.steps)
    settings = Settings(args.device, args.amp, args.rounds, args.quick, steps)
    machine = describe_machine(args.device)
    runs = []
    for threads in args.threads:
        run: dict[str, Any] = {"threads": threads, "rows": [], "shares": []}
        for name in names:
            logger.info("Measuring %s with %s.", name, format_threads(threads))
            # The profiler's library reports the lack of a GPU as an error.
            quiet = {"KINETO_LOG_LEVEL": "99"}
            result = run_fresh(measure_shape, name, settings, threads=threads, environment=quiet)
            run["threads"] = result["threads"]
            run["rows"] += result["rows"]
            run["shares"] += [result["share"]] if "share" in result else []
        runs.append(run)
    memory = measure_memories(names, settings, args.threads[0], logger) if "training" in steps else []
    data = {
        "quick": args.quick,
        "hardware": machine.get("gpu", machine["cpu"]),
        "settings": {
            "device": args.device,
            "threads": args.threads,
            "rounds": args.rounds,
            "amp": args.amp,
            "shapes": {name: list(image_shape(SHAPES[name], args.quick)) for name in names},
        },
        "machine": machine,
        "runs": runs,
        "memory": memory,
    }
    judge(data)
    text = report(data)
    sys.stdout.write(text)
    for path in write_results(args.out, NAME, data, text, draw(data)):
        logger.info("Written: %s", path)


if __name__ == "__main__":
    main()
