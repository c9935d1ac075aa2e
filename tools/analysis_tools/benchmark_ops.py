"""Measure the operators and the tree state space layer, each against what one would use without them.

Both sides of a row run in turn in the same process, on many distinct inputs. A ratio is that of the two medians; its
spread is the 10th to 90th percentile of the ratios of the single measurements. Before they are timed, the results of
both sides are compared. Edge weights come from random maps with the spectrum of photographs.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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
    write_results,
)
from mmengine.logging import MMLogger
from torch import Tensor, nn

from grootvl_mm.apis import cli
from grootvl_mm.layers.recompute import lean
from grootvl_mm.models.tree_ssm import TreeSSM
from grootvl_mm.ops import Tree, grid_edge_weight, grid_tree, tree_scan
from grootvl_mm.ops.reference import grid_edges, selective_scan

try:
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
except ImportError:  # its rows are left out then
    minimum_spanning_tree = None

NAME = "benchmark_ops"
INPUTS, ROUNDS = 64, 3
TREE_CHANNELS = 8  # of the features that the trees are built from, where only their shape matters
HELD_BYTES = 2**29  # of inputs that are made at a time
GOALS = {
    "spanning_tree_14x14": Goal(18, 25),
    "spanning_tree_56x56": Goal(9, 14),
    "spanning_tree_200x334": Goal(9, 14),
    "tree_and_order_14x14": Goal(9, 13),
    "tree_and_order_56x56": Goal(9, 13),
    "tree_and_order_200x334": Goal(9, 13),
    "edge_weight": Goal(30, 70),
    "scan": Goal(0.45, 0.65),
    "scan_backward": Goal(2.4, 1.9, lower_is_better=True),
    "growth": Goal(1.6, 1.2, lower_is_better=True),
    "layer": Goal(2.5, 4),
    "layer_training": Goal(2.5, 4),
}
SCIPY_GROUPS = {"spanning_tree": "spanning tree", "tree_and_order": "tree + order"}
GROUPS = (*SCIPY_GROUPS, "edge_weight", "scan", "scan_backward", "growth", "layer", "curves")

Grid = tuple[int, int]


class Sizes(NamedTuple):
    """What is measured."""

    trees: tuple[Grid, ...] = ((14, 14), (56, 56), (200, 334))
    tree_vertices: int = 2**14  # grid_tree gets so many in one call, but at least one graph; scipy gets graphs singly
    grid: Grid = (56, 56)
    channels: int = 160
    weight_batch: int = 8
    scan_batch: int = 16
    layer_batch: int = 8
    growth: tuple[Grid, Grid] = ((56, 56), (400, 672))
    growth_channels: int = 32
    copied_bytes: int = 2**28  # beyond every cache
    curves: tuple[Grid, ...] = ((14, 14), (28, 28), (56, 56), (112, 112), (200, 334), (400, 672))
    memory: tuple[Grid, ...] = ((56, 56), (112, 112), (200, 334), (400, 672))


# A GPU is full only with the batches that it is used for.
GPU = Sizes(weight_batch=128, scan_batch=128, layer_batch=128)
QUICK = Sizes(
    trees=((4, 4), (8, 8)),
    tree_vertices=2**7,
    grid=(8, 8),
    channels=32,
    weight_batch=2,
    scan_batch=2,
    layer_batch=2,
    growth=((8, 8), (16, 16)),
    growth_channels=16,
    copied_bytes=2**22,
    curves=((8, 8), (16, 16)),
    memory=((32, 32), (96, 96)),
)


class Settings(NamedTuple):
    """How it is measured."""

    sizes: Sizes
    groups: tuple[str, ...]
    device: str
    inputs: int
    rounds: int
    no_scipy: str | None  # why not


@dataclass(frozen=True)
class Contest:
    """One row: a thing of ours, what it is measured against, and how the ratio follows from their times.

    The ratio is ``factor`` times the time of the other over ours.
    """

    name: str
    title: str
    shape: str
    ours: str
    other: str
    make: Callable[[torch.Generator], Any]
    run_ours: Callable[[Any], object]
    run_other: Callable[[Any], object]
    input_bytes: int
    check: Callable[[Any, Any, Any], None] | None = None  # input, our result, the other's
    factor: float = 1.0
    moved_bytes: tuple[int, int] | None = None  # by ours and by the other


# ---- Spanning trees against scipy


class Graphs(NamedTuple):
    """The same graphs for both sides."""

    weight: Tensor  # (B, E)
    grid: Grid
    matrices: list  # of scipy.sparse.csr_matrix, float64 as scipy wants it


def tree_contest(group: str, grid: Grid, settings: Settings) -> Contest:
    """The trees of one grid size against scipy's, without its order or with it."""
    height, width = grid
    batch = max(1, settings.sizes.tree_vertices // (height * width))
    with_order = group == "tree_and_order"
    call = scipy_order if with_order else minimum_spanning_tree
    return Contest(
        name=f"{group}_{height}x{width}",
        title=SCIPY_GROUPS[group],
        shape=f"{height}x{width}, {batch} graphs",
        ours="grid_tree (tree and order in one)",
        other="scipy minimum_spanning_tree" + (" + breadth_first_order" if with_order else ""),
        make=functools.partial(make_graphs, batch=batch, height=height, width=width),
        run_ours=lambda graphs: grid_tree(graphs.weight, *graphs.grid),
        run_other=lambda graphs: [call(matrix) for matrix in graphs.matrices],
        input_bytes=batch * height * width * 40,
        check=check_order if with_order else check_tree,
    )


def scipy_order(matrix: Any) -> tuple:
    """Vertices in breadth-first order, and the predecessor of each."""
    return breadth_first_order(minimum_spanning_tree(matrix), 0, directed=False, return_predecessors=True)


def check_tree(graphs: Graphs, ours: Tree, found: list) -> None:
    """The trees weigh the same. Equal weights leave a choice, so their edges may differ."""
    torch.testing.assert_close(tree_weights(graphs, ours.parent), [float(matrix.sum()) for matrix in found])


def check_order(graphs: Graphs, ours: Tree, found: list) -> None:
    """The rooted trees weigh the same and hold all vertices."""
    predecessors = torch.stack([torch.from_numpy(predecessor) for _, predecessor in found])
    torch.testing.assert_close(tree_weights(graphs, ours.parent), tree_weights(graphs, predecessors))
    vertices = torch.arange(ours.order.shape[1])
    for order in (*ours.order, *(torch.from_numpy(order) for order, _ in found)):
        torch.testing.assert_close(order.long().sort().values, vertices)


def tree_weights(graphs: Graphs, parent: Tensor) -> list[float]:
    """The sum of the edge weights of each tree with its root at vertex 0."""
    totals = []
    for matrix, parents in zip(graphs.matrices, parent.numpy(), strict=True):
        below_root = range(1, len(parents))
        totals.append(float((matrix + matrix.T)[below_root, parents[1:]].sum()))
    return totals


def make_graphs(generator: torch.Generator, batch: int, height: int, width: int) -> Graphs:
    """The graphs of natural features."""
    weight = grid_edge_weight(natural_features(generator, batch, TREE_CHANNELS, height, width))
    return Graphs(weight, (height, width), make_matrices(weight, height, width))


def make_matrices(weight: Tensor, height: int, width: int) -> list:
    """What scipy takes. It drops edges of weight 0, and exp(-cos) is positive."""
    ends = tuple(end.numpy() for end in grid_edges(height, width))
    vertices = height * width
    return [csr_matrix((row.double().numpy(), ends), shape=(vertices, vertices)) for row in weight]


# ---- Edge weights, scan, growth


def weights_in_pytorch(feature: Tensor) -> Tensor:
    """``grid_edge_weight`` with the cosine, as one would write it: (B, C, H, W) to (B, E)."""
    vertical = torch.exp(-F.cosine_similarity(feature[:, :, :-1], feature[:, :, 1:], dim=1))
    horizontal = torch.exp(-F.cosine_similarity(feature[..., :-1], feature[..., 1:], dim=1))
    return torch.cat([vertical.flatten(1), horizontal.flatten(1)], dim=1)


def weight_contests(settings: Settings) -> Iterator[Contest]:
    """The edge weights against PyTorch, which is given each of the two memory formats."""
    batch, channels, (height, width) = settings.sizes.weight_batch, settings.sizes.channels, settings.sizes.grid

    def make(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        feature = natural_features(generator, batch, channels, height, width)
        return feature.contiguous(memory_format=torch.channels_last), feature

    contest = functools.partial(
        Contest,
        title="edge weight",
        shape=f"{height}x{width}, D {channels}, batch {batch}",
        ours="grid_edge_weight (NHWC)",
        make=make,
        run_ours=lambda features: grid_edge_weight(features[0]),
        input_bytes=batch * channels * height * width * 8,
        check=lambda _, ours, other: torch.testing.assert_close(ours, other),
    )
    yield contest("edge_weight", other="PyTorch (NCHW)", run_other=lambda features: weights_in_pytorch(features[1]))
    yield contest(
        "edge_weight_nhwc", other="PyTorch (NHWC)", run_other=lambda features: weights_in_pytorch(features[0])
    )


class Scan(NamedTuple):
    """The inputs of a scan."""

    x: Tensor
    decay: Tensor
    tree: Tree

    def forward(self) -> Tensor:
        """Past the checks of the public function, as the backward is called."""
        return torch.ops.grootvl.tree_scan(self.x, self.decay, *self.tree, "all")

    def backward(self, grad_h: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of x and decay."""
        return torch.ops.grootvl.tree_scan_backward(grad_h, self.x, self.decay, *self.tree, "all")


def make_scan(generator: torch.Generator, batch: int, height: int, width: int, channels: int) -> Scan:
    """Values, decays near 1 as in a trained model, and trees of natural features."""
    device = generator.device
    shape = (batch, height * width, channels)
    x = torch.rand(shape, generator=generator, device=device).sub_(0.5)
    decay = torch.rand(shape, generator=generator, device=device).mul_(0.2).add_(0.8)
    weight = grid_edge_weight(natural_features(generator, batch, TREE_CHANNELS, height, width))
    return Scan(x, decay, grid_tree(weight, height, width))


def scan_contests(settings: Settings) -> Iterator[Contest]:
    """The scan against copying memory, and its backward against its forward."""
    sizes = settings.sizes
    batch, channels, (height, width) = sizes.scan_batch, sizes.channels, sizes.grid
    shape = f"{height}x{width}, D {channels}, batch {batch}"
    size = batch * height * width * channels * 4
    make = functools.partial(make_scan, batch=batch, height=height, width=width, channels=channels)
    if "scan" in settings.groups:
        source = torch.zeros(sizes.copied_bytes, dtype=torch.uint8, device=settings.device)
        target = torch.ones_like(source)
        moved = (3 * size, 2 * sizes.copied_bytes)
        yield Contest(
            name="scan",
            title="scan, bytes / s",
            shape=shape,
            ours="tree_scan (x, decay, h once each)",
            other=f"copy_ of {sizes.copied_bytes / 2**20:g} MiB (read + written)",
            make=make,
            run_ours=lambda scan: tree_scan(*scan),
            run_other=lambda _: target.copy_(source),
            input_bytes=2 * size,
            factor=moved[0] / moved[1],
            moved_bytes=moved,
        )
    if "scan_backward" in settings.groups:
        yield Contest(
            name="scan_backward",
            title="scan backward / forward",
            shape=shape,
            ours="tree_scan",
            other="tree_scan_backward",
            make=lambda generator: with_gradient(make(generator)),
            run_ours=lambda value: value[0].forward(),
            run_other=lambda value: value[0].backward(value[1]),
            input_bytes=3 * size,
        )


def with_gradient(scan: Scan) -> tuple[Scan, Tensor]:
    """A scan and a gradient of its result, in memory of its own."""
    return scan, scan.x.flip(0)


def growth_contests(settings: Settings) -> Iterator[Contest]:
    """Seconds for each vertex of a large grid over those of a small one.

    One large image against as many small ones as have about its number of vertices, so that both move the same memory
    and only the growth of the algorithm shows.
    """
    small, large = settings.sizes.growth
    channels = settings.sizes.growth_channels
    batch = round(large[0] * large[1] / (small[0] * small[1]))
    few, many = small[0] * small[1] * batch, large[0] * large[1]

    class Work(NamedTuple):
        weight: Tensor
        grid: Grid
        x: Tensor
        decay: Tensor

    def make_work(generator: torch.Generator, images: int, grid: Grid) -> Work:
        shape = (images, grid[0] * grid[1], channels)
        weight = grid_edge_weight(natural_features(generator, images, TREE_CHANNELS, *grid))
        x = torch.rand(shape, generator=generator, device=generator.device)
        return Work(weight, grid, x, torch.rand_like(x).mul_(0.2).add_(0.8))

    def run(work: Work) -> Tensor:
        return tree_scan(work.x, work.decay, grid_tree(work.weight, *work.grid))

    yield Contest(
        name="growth",
        title="growth, s / vertex",
        shape=f"D {channels}",
        ours=f"tree + scan, {batch} of {small[0]}x{small[1]}",
        other=f"tree + scan, 1 of {large[0]}x{large[1]}",
        make=lambda generator: (make_work(generator, batch, small), make_work(generator, 1, large)),
        run_ours=lambda works: run(works[0]),
        run_other=lambda works: run(works[1]),
        input_bytes=4 * many * channels * 4,
        factor=few / many,
    )


# ---- The layer


def make_layer(channels: int, device: str) -> TreeSSM:
    """A layer with ``channels`` inside, without its projections: it takes what the first of them would return."""
    torch.manual_seed(0)
    layer = TreeSSM(channels // 2).to(device)
    layer.in_proj, layer.out_proj = nn.Identity(), nn.Identity()
    return layer


def run_layer(layer: TreeSSM, projected: Tensor) -> Tensor:
    """(B, H, W, 2 D) to (B, H, W, D) by the layer's own code, as a block calls it."""
    with lean(projected):
        return layer(projected)[0]


def run_layer_in_pytorch(layer: TreeSSM, projected: Tensor) -> Tensor:
    """The same in PyTorch operators; only the tree itself and the scan, for which PyTorch has none, are ours."""
    x, gate = projected.chunk(2, dim=-1)
    x = F.silu(layer.conv2d(x.permute(0, 3, 1, 2)))
    tree = grid_tree(weights_in_pytorch(x.detach()), *x.shape[2:])
    x = x.permute(0, 2, 3, 1).flatten(1, 2)
    dt, b, c = layer.x_proj(x).split([layer.dt_rank, 1, 1], dim=-1)
    y = selective_scan(
        lambda value, decay: tree_scan(value, decay, tree),
        *(layer.dt_proj, layer.h_norm, layer.out_norm),
        *(x, dt, b, c, gate.flatten(1, 2), layer.A_log, layer.Ds),
    )
    return y.view(gate.shape)


VARIANTS = {"TreeSSM": run_layer, "PyTorch operators": run_layer_in_pytorch}


def train_layer(run: Callable[[TreeSSM, Tensor], Tensor], layer: TreeSSM, projected: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward to the input and to every parameter."""
    with torch.enable_grad():
        leaf = projected.detach().requires_grad_()
        y = run(layer, leaf)
        return torch.autograd.grad(y, [leaf, *layer.parameters()], y.detach())


def layer_contests(settings: Settings) -> Iterator[Contest]:
    """The layer between its projections against PyTorch operators around the scan."""
    batch, channels, (height, width) = settings.sizes.layer_batch, settings.sizes.channels, settings.sizes.grid
    layer = make_layer(channels, settings.device)

    def check(_: Tensor, ours: Any, other: Any) -> None:
        # Rounding may turn an edge of near-equal weights, which changes single positions much: compared in the mean.
        for value, expected in zip(_as_tuple(ours), _as_tuple(other), strict=True):
            if not (value - expected).abs().mean() <= 0.05 * expected.abs().mean():
                raise AssertionError("the layer and its PyTorch operators differ")

    contest = functools.partial(
        Contest,
        shape=f"{height}x{width}, D {channels}, batch {batch}",
        ours="TreeSSM between its projections",
        other="PyTorch operators around tree_scan",
        make=lambda generator: make_projected(generator, batch, height, width, channels),
        input_bytes=batch * height * width * channels * 8,
        check=check,
    )
    yield contest(
        "layer",
        title="layer, forward",
        run_ours=lambda projected: run_layer(layer, projected),
        run_other=lambda projected: run_layer_in_pytorch(layer, projected),
    )
    yield contest(
        "layer_training",
        title="layer, forward + backward",
        run_ours=lambda projected: train_layer(run_layer, layer, projected),
        run_other=lambda projected: train_layer(run_layer_in_pytorch, layer, projected),
    )


def make_projected(generator: torch.Generator, batch: int, height: int, width: int, channels: int) -> Tensor:
    """What the first projection would return, in its memory format."""
    return natural_features(generator, batch, 2 * channels, height, width).permute(0, 2, 3, 1).contiguous()


def _as_tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


# ---- Measuring


def all_contests(settings: Settings) -> Iterator[Contest]:
    """The rows that were asked for, one at a time: some hold large tensors."""
    if settings.no_scipy is None:
        for group in SCIPY_GROUPS:
            if group in settings.groups:
                yield from (tree_contest(group, grid, settings) for grid in settings.sizes.trees)
    if "edge_weight" in settings.groups:
        yield from weight_contests(settings)
    yield from scan_contests(settings)
    if "growth" in settings.groups:
        yield from growth_contests(settings)
    if "layer" in settings.groups:
        yield from layer_contests(settings)


def measure(settings: Settings) -> dict[str, Any]:
    """All rows and curves with this process's number of threads."""
    rows = []
    if settings.no_scipy is not None:
        for group, grid in itertools.product(SCIPY_GROUPS, settings.sizes.trees):
            if group in settings.groups:
                contest = tree_contest(group, grid, settings)
                skipped = {"name": contest.name, "title": contest.title, "shape": contest.shape}
                rows.append({**skipped, "not_measured": settings.no_scipy})
    curves = []
    with torch.no_grad():
        for contest in all_contests(settings):
            rows.append(measure_contest(contest, settings))
        if "curves" in settings.groups:
            curves = [measure_curve(grid, settings) for grid in settings.sizes.curves]
    return {"threads": torch.get_num_threads(), "rows": rows, "curves": curves}


def inputs_of(make: Callable[[torch.Generator], Any], device: str) -> Iterator[Any]:
    """Distinct inputs without end, the same in every run."""
    for seed in itertools.count():
        yield make(torch.Generator(device).manual_seed(seed))


def measure_contest(contest: Contest, settings: Settings) -> dict[str, Any]:
    """One row: both sides on all inputs."""
    if contest.check is not None:
        value = next(inputs_of(contest.make, settings.device))
        try:
            contest.check(value, contest.run_ours(value), contest.run_other(value))
        except AssertionError as error:
            cli.fail(f"{contest.name}: the two sides do not compute the same: {error}")
    times = time_in_turn(
        {"ours": contest.run_ours, "other": contest.run_other},
        inputs_of(contest.make, settings.device),
        settings.inputs,
        settings.device,
        contest.name,
        hold=max(1, min(settings.inputs, HELD_BYTES // contest.input_bytes)),
        rounds=settings.rounds,
    )
    row = {
        "name": contest.name,
        "title": contest.title,
        "shape": contest.shape,
        "inputs": settings.inputs,
        "measurements": len(times["ours"]),
        "ours": {"label": contest.ours, "seconds": spread(times["ours"])},
        "other": {"label": contest.other, "seconds": spread(times["other"])},
        "ratio": ratio_of(times["other"], times["ours"], contest.factor),
    }
    if contest.moved_bytes is not None:
        for side, moved in zip(("ours", "other"), contest.moved_bytes, strict=True):
            row[side]["gigabytes_per_second"] = moved / row[side]["seconds"]["median"] / 1e9
    return row


def measure_curve(grid: Grid, settings: Settings) -> dict[str, Any]:
    """Times of the operators on one image of this size."""
    height, width = grid
    channels = settings.sizes.growth_channels

    class Image(NamedTuple):
        feature: Tensor
        weight: Tensor
        matrices: list
        scan: Scan
        grad_h: Tensor

    def make(generator: torch.Generator) -> Image:
        feature = natural_features(generator, 1, channels, height, width).contiguous(memory_format=torch.channels_last)
        weight = grid_edge_weight(feature)
        matrices = make_matrices(weight, height, width) if settings.no_scipy is None else []
        return Image(feature, weight, matrices, *with_gradient(make_scan(generator, 1, height, width, channels)))

    contenders: dict[str, Callable[[Image], object]] = {
        "grid_edge_weight": lambda image: grid_edge_weight(image.feature),
        "grid_tree": lambda image: grid_tree(image.weight, height, width),
        "tree_scan": lambda image: image.scan.forward(),
        "tree_scan_backward": lambda image: image.scan.backward(image.grad_h),
    }
    if settings.no_scipy is None:
        contenders["scipy tree + order"] = lambda image: scipy_order(image.matrices[0])
    times = time_in_turn(
        contenders,
        inputs_of(make, settings.device),
        max(2, settings.inputs // 4),
        settings.device,
        f"curves {height}x{width}",
        hold=max(1, min(settings.inputs, HELD_BYTES // (height * width * channels * 16))),
        rounds=settings.rounds,
    )
    seconds = {name: spread(values) for name, values in times.items()}
    return {"height": height, "width": width, "vertices": height * width, "seconds": seconds}


def measure_memory(variant: str, settings: Settings) -> list[dict[str, int]]:
    """Peak memory of a training step of the layer, for each size; see :func:`measuring.peak_memory`."""
    channels, grids = settings.sizes.growth_channels, settings.sizes.memory
    layer = make_layer(channels, settings.device)
    run = VARIANTS[variant]
    generator = torch.Generator(settings.device).manual_seed(0)
    train_layer(run, layer, make_projected(generator, 1, *grids[0], channels))  # loads code, fills pools
    peaks = []
    for height, width in grids:
        projected = make_projected(generator, 1, height, width, channels)
        peak = peak_memory(functools.partial(train_layer, run, layer, projected), settings.device)
        peaks.append({"vertices": height * width, "bytes": peak})
    return peaks


# ---- Reporting


def report(data: dict[str, Any]) -> str:
    """The results as text."""
    settings = data["settings"]
    lines = [
        "Operators of grootvl_mm",
        *machine_lines(data["machine"]),
        f"Device: {settings['device']}; distinct inputs: {settings['inputs']}, rounds: {settings['rounds']}. Times are "
        "medians, ratios those of the medians, spread is the 10th to 90th percentile of the single ratios.",
    ]
    if data["quick"]:
        lines.append("QUICK: tiny sizes; the ratios mean nothing and are held against no floor.")
    rows = [_table_row(row, run["threads"]) for run in data["runs"] for row in run["rows"]]
    if rows:
        columns = ["measured", "shape", "threads", "ours", "time", "against", "time", "ratio", "spread"]
        lines += ["", format_table([*columns, "floor", "aim", "result"], rows)]
    for run in data["runs"]:
        if run["curves"]:
            names = list(run["curves"][0]["seconds"])
            body = [
                [str(curve["vertices"]), *(format_seconds(curve["seconds"][name]["median"]) for name in names)]
                for curve in run["curves"]
            ]
            title = f"One image, D {settings['curve_channels']}, {format_threads(run['threads'])}"
            lines += ["", title, format_table(["vertices", *names], body)]
    if data["memory"]:
        body = [
            [str(cells[0]["vertices"]), *(f"{cell['bytes'] / 2**20:.1f} MiB" for cell in cells)]
            for cells in zip(*data["memory"].values(), strict=True)
        ]
        title = f"Peak memory of a training step of the layer, one image, D {settings['curve_channels']}"
        lines += ["", title, format_table(["vertices", *data["memory"]], body)]
    return "\n".join(lines) + "\n"


def _table_row(row: dict[str, Any], threads: int) -> list[str]:
    if "not_measured" in row:
        return [row["title"], row["shape"], str(threads), *["-"] * 8, row["not_measured"]]

    def time_of(side: dict[str, Any]) -> str:
        rate = side.get("gigabytes_per_second")
        return format_seconds(side["seconds"]["median"]) + ("" if rate is None else f" ({rate:.1f} GB/s)")

    goal = Goal(**row["goal"])
    return [
        *(row["title"], row["shape"], str(threads)),
        *(row["ours"]["label"], time_of(row["ours"]), row["other"]["label"], time_of(row["other"])),
        *format_ratio(row["ratio"]),
        *(format_limit(goal.floor, goal), format_limit(goal.aim, goal), row["verdict"]),
    ]


def draw(data: dict[str, Any]) -> Figure | None:
    """Time and memory over the number of vertices; None if the curves were not measured."""
    runs = [run for run in data["runs"] if run["curves"]]
    if not runs:
        return None
    channels, quick = data["settings"]["curve_channels"], ", QUICK: meaningless" if data["quick"] else ""
    figure = Figure(figsize=(5.2 * (len(runs) + 1), 4.6), layout="constrained")
    figure.suptitle(f"Operators of grootvl_mm, one image, D = {channels}, {data['hardware']}{quick}", fontsize=11)
    panels = figure.subplots(1, len(runs) + 1)
    for axes, run in zip(panels, runs, strict=False):
        vertices = [curve["vertices"] for curve in run["curves"]]
        for name in run["curves"][0]["seconds"]:
            spreads = [curve["seconds"][name] for curve in run["curves"]]
            style = "--" if name.startswith("scipy") else "-"
            medians = [1e3 * value["median"] for value in spreads]
            (line,) = axes.plot(vertices, medians, linestyle=style, marker="o", ms=4, label=name)
            low, high = ([1e3 * value[key] for value in spreads] for key in ("p10", "p90"))
            axes.fill_between(vertices, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        last = max(value["median"] for value in run["curves"][-1]["seconds"].values())
        guide = [2e3 * last * count / vertices[-1] for count in vertices]
        axes.plot(vertices, guide, color="grey", linestyle=":", label="proportional to vertices")
        axes.set(
            title=f"Time, {format_threads(run['threads'])}", ylabel="milliseconds (median, 10th to 90th percentile)"
        )
    for variant, peaks in data["memory"].items():
        panels[-1].plot(
            [peak["vertices"] for peak in peaks],
            [peak["bytes"] / 2**20 for peak in peaks],
            marker="o",
            ms=4,
            label=variant,
        )
    panels[-1].set(title="Peak memory of a training step of the layer", ylabel="MiB")
    for axes in panels:
        axes.set(xscale="log", yscale="log", xlabel="vertices (height x width)")
        axes.grid(which="major", alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser, f"work_dirs/{NAME}", [1])
    parser.add_argument(
        "--inputs", type=at_least(1), metavar="N", help=f"distinct inputs of a row (default: {INPUTS}; quick: 2)"
    )
    parser.add_argument(
        "--rounds", type=at_least(1), metavar="N", help=f"measurements on each input (default: {ROUNDS}; quick: 1)"
    )
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=GROUPS, metavar="NAME", help=f"some of: {', '.join(GROUPS)}"
    )
    args = parser.parse_args()
    check_common_arguments(parser, args)
    args.inputs = args.inputs or (2 if args.quick else INPUTS)
    args.rounds = args.rounds or (1 if args.quick else ROUNDS)
    return args


def main() -> None:
    """Run the command."""
    args = parse_args()
    logger = MMLogger.get_instance(NAME)
    groups = tuple(group for group in GROUPS if group in args.only)
    no_scipy = None
    if args.device == "cuda":
        no_scipy = "scipy has no CUDA"
    elif minimum_spanning_tree is None:
        no_scipy = "scipy not installed"
    full_sizes = GPU if args.device == "cuda" else Sizes()
    sizes = QUICK if args.quick else full_sizes
    settings = Settings(sizes, groups, args.device, args.inputs, args.rounds, no_scipy)

    machine = describe_machine(args.device)
    runs = []
    for threads in args.threads:
        logger.info("Measuring %s with %s.", ", ".join(groups), format_threads(threads))
        runs.append(run_fresh(measure, settings, threads=threads))
    for row in (row for run in runs for row in run["rows"]):
        goal = Goal() if args.quick else GOALS.get(row["name"], Goal())
        row["goal"] = goal._asdict()
        if "ratio" in row:
            row["verdict"] = goal.verdict(row["ratio"]["median"])
    memory = {}
    if "curves" in groups:
        for variant in VARIANTS:
            logger.info("Measuring the memory of the layer: %s.", variant)
            memory[variant] = run_fresh(
                measure_memory, variant, settings, threads=args.threads[0], environment=MEMORY_ENVIRONMENT
            )
    data = {
        "quick": args.quick,
        "hardware": machine.get("gpu", machine["cpu"]),
        "settings": {
            "device": args.device,
            "threads": args.threads,
            "inputs": args.inputs,
            "rounds": args.rounds,
            "curve_channels": sizes.growth_channels,
        },
        "machine": machine,
        "runs": runs,
        "memory": memory,
    }
    text = report(data)
    sys.stdout.write(text)
    for path in write_results(args.out, NAME, data, text, draw(data)):
        logger.info("Written: %s", path)


if __name__ == "__main__":
    main()
