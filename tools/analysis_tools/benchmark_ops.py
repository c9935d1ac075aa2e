"""Benchmark each operator against the alternative that one would use without it.

Both run alternately in one process, on distinct inputs, after their results have been compared. Ratios are those of the
median times, with the 10th to 90th percentiles over the rounds. Edge weights come from random maps with the spectrum of
photographs. GB/s count every input read once and every result written once. SciPy processes the graphs of a batch one
by one, on the CPU.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from measuring import (
    AUTOCAST,
    add_autocast_argument,
    add_common_arguments,
    check_common_arguments,
    describe_machine,
    format_ratio,
    format_seconds,
    format_table,
    machine_lines,
    natural_features,
    ratio_of,
    run_fresh,
    spread,
    time_in_turn,
    write_results,
)
from mmengine.logging import MMLogger
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree
from torch import Tensor

from grootvl_mm.ops import Tree, grid_edge_weight, grid_tree, tree_scan, tree_selective_scan
from grootvl_mm.ops.reference import SelectiveScanInputs, grid_edges, plain_selective_scan

NAME = "benchmark_ops"
DISTINCT_INPUTS = 8
RANK = 5  # of the step sizes, as in the first stage of GrootV-T
# Batch, height, width, inner channels: the first stage of a classifier and of a detector. Larger batches fill a GPU.
SHAPES = {"cpu": [(8, 56, 56, 160), (1, 200, 334, 160)], "cuda": [(128, 56, 56, 160), (2, 200, 334, 160)]}
CURVE_SIDES, CURVE_CHANNELS = (14, 28, 56, 112, 224, 448), 32


class Settings(NamedTuple):
    """Settings of a measurement."""

    device: str
    dtype: torch.dtype  # of the activations
    rounds: int


class Inputs(NamedTuple):
    """Random inputs of all operators for one batch of images."""

    feature: Tensor  # (B, D, H, W), channels-last
    weight: Tensor  # (B, E)
    tree: Tree
    x: Tensor  # (B, L, D)
    decay: Tensor  # (B, L, D), near 1 as in a trained model
    activations: dict[str, Tensor]  # of the selective scan
    parameters: dict[str, Tensor]
    grad: Tensor  # (B, L, D)


class Row(NamedTuple):
    """One operator, its alternative, and the minimum number of bytes that the operator moves."""

    name: str
    ours: Callable[[Inputs], Any]
    other_name: str
    other: Callable[[Inputs], Any]
    moved_bytes: int
    equal: Callable[[Any, Any], bool] | None = None


def make_inputs(seed: int, shape: tuple[int, int, int, int], settings: Settings) -> Inputs:
    """Inputs that depend on the seed only."""
    batch, height, width, channels = shape
    generator = torch.Generator(settings.device).manual_seed(seed)
    options = {"generator": generator, "device": settings.device}
    feature = natural_features(generator, batch, channels, height, width)
    feature = feature.contiguous(memory_format=torch.channels_last).to(settings.dtype)
    weight = grid_edge_weight(feature)

    def rows(columns: int) -> Tensor:
        value = torch.rand(batch, height * width, columns, **options).sub_(0.5).to(settings.dtype)
        return value.requires_grad_()

    def vector(offset: float) -> Tensor:
        return torch.rand(channels, **options).mul_(0.1).add_(offset).requires_grad_()

    offsets = {"dt_bias": -4.0, "A_log": 0.0, "Ds": 1.0}
    offsets |= {"h_norm_weight": 1.0, "h_norm_bias": 0.0, "out_norm_weight": 1.0, "out_norm_bias": 0.0}
    dt_weight = torch.rand(channels, RANK, **options).requires_grad_()
    decay = torch.rand(batch, height * width, channels, **options).mul_(0.2).add_(0.8).to(settings.dtype)
    return Inputs(
        feature,
        weight,
        grid_tree(weight, height, width),
        rows(channels),
        decay.requires_grad_(),
        {"x": rows(channels), "dt": rows(RANK), "b": rows(1), "c": rows(1), "gate": rows(channels)},
        {"dt_weight": dt_weight, **{name: vector(offset) for name, offset in offsets.items()}},
        rows(channels).detach(),
    )


def scan(inputs: Inputs) -> Tensor:
    """The plain scan."""
    return tree_scan(inputs.x, inputs.decay, inputs.tree)


def fused(inputs: Inputs) -> Tensor:
    """The selective scan as one operator."""
    return tree_selective_scan(**inputs.activations, **inputs.parameters, tree=inputs.tree)


def composed(inputs: Inputs) -> Tensor:
    """The selective scan as PyTorch operators around the plain scan, in float32."""
    values = SelectiveScanInputs(**inputs.activations, **inputs.parameters)
    values = SelectiveScanInputs(*(value.float() for value in values))
    return plain_selective_scan(lambda x, decay: tree_scan(x, decay, inputs.tree), values, 1e-5).to(inputs.x.dtype)


def gradients(forward: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
    """Forward and backward pass."""
    with torch.enable_grad():
        leaves = [inputs.x, inputs.decay] if forward is scan else [*inputs.activations.values()]
        leaves += [] if forward is scan else inputs.parameters.values()
        return torch.autograd.grad(forward(inputs), leaves, inputs.grad)


def weights_in_pytorch(feature: Tensor) -> Tensor:
    """``grid_edge_weight`` with the cosine metric in plain PyTorch: (B, C, H, W) to (B, E)."""
    feature = feature.float()
    vertical = torch.exp(-F.cosine_similarity(feature[:, :, :-1], feature[:, :, 1:], dim=1))
    horizontal = torch.exp(-F.cosine_similarity(feature[..., :-1], feature[..., 1:], dim=1))
    return torch.cat([vertical.flatten(1), horizontal.flatten(1)], 1)


def scipy_trees(inputs: Inputs, height: int, width: int) -> list[Tensor]:
    """Parents of SciPy's trees. SciPy treats weight 0 as no edge; exp(-cos) is always positive."""
    ends = tuple(end.numpy() for end in grid_edges(height, width))
    parents = []
    for row in inputs.weight.double().cpu().numpy():
        matrix = csr_matrix((row, ends), shape=(height * width,) * 2)
        _, parent = breadth_first_order(minimum_spanning_tree(matrix), 0, directed=False, return_predecessors=True)
        parents.append(torch.from_numpy(parent))
    return parents


def close(ours: Any, other: Any) -> bool:
    """Whether results agree on average; single positions may differ a lot if rounding changes an edge of the tree."""
    ours, other = ((value,) if isinstance(value, Tensor) else value for value in (ours, other))
    pairs = zip(ours, other, strict=True)
    return all((a.float() - b.float()).abs().mean() <= 0.05 * b.float().abs().mean() + 1e-6 for a, b in pairs)


def same_trees(ours: Tree, other: list[Tensor]) -> bool:
    """Whether the parents agree, except for ties."""
    parents = torch.stack(other).to(ours.parent)
    return bool((ours.parent[:, 1:] == parents[:, 1:]).float().mean() > 0.99)


def make_rows(shape: tuple[int, int, int, int], settings: Settings) -> Iterator[Row]:
    """The measurements for one shape."""
    batch, height, width, channels = shape
    size = batch * height * width * channels * settings.dtype.itemsize  # of one map
    trees = 8 * batch * height * width
    source = torch.zeros(2**28, dtype=torch.uint8, device=settings.device)
    target = torch.ones_like(source)

    def copy(_: Inputs) -> Tensor:
        return target.copy_(source)

    yield Row(
        "grid_edge_weight",
        lambda inputs: grid_edge_weight(inputs.feature),
        "cosine_similarity",
        lambda inputs: weights_in_pytorch(inputs.feature),
        size + trees,
        close,
    )
    beside_tree = ("copy of 256 MiB", copy, 2 * trees)
    if settings.device == "cpu":
        beside_tree = ("scipy", functools.partial(scipy_trees, height=height, width=width), 2 * trees, same_trees)
    yield Row("grid_tree", lambda inputs: grid_tree(inputs.weight, height, width), *beside_tree)
    yield Row("tree_scan", scan, "copy of 256 MiB", copy, 3 * size + trees)
    train = functools.partial(gradients, scan)
    yield Row("tree_scan, forward + backward", train, "its forward", scan, 8 * size + 2 * trees)
    yield Row("tree_selective_scan", fused, "PyTorch around tree_scan", composed, 3 * size + trees, close)
    yield Row(
        "tree_selective_scan, forward + backward",
        functools.partial(gradients, fused),
        "PyTorch around tree_scan",
        functools.partial(gradients, composed),
        8 * size + 2 * trees,
        close,
    )


def measure_shape(shape: tuple[int, int, int, int], settings: Settings) -> list[dict[str, Any]]:
    """All rows of one shape."""
    inputs = [make_inputs(seed, shape, settings) for seed in range(min(DISTINCT_INPUTS, settings.rounds))]
    results = []
    with torch.no_grad():
        for row in make_rows(shape, settings):
            if row.equal is not None and not row.equal(row.ours(inputs[0]), row.other(inputs[0])):
                raise AssertionError(f"the results of {row.name} and {row.other_name} differ")
            contenders = {"ours": row.ours, "other": row.other}
            times = time_in_turn(contenders, inputs, settings.rounds, settings.device, row.name)
            result = {"name": row.name, "ours": spread(times["ours"]), "other_name": row.other_name}
            result |= {"other": spread(times["other"]), "ratio": ratio_of(times["other"], times["ours"])}
            results.append({**result, "gigabytes_per_second": row.moved_bytes / result["ours"]["median"] / 1e9})
    return results


def measure_curve(settings: Settings, sides: tuple[int, ...]) -> dict[str, list[float]]:
    """Median seconds of each operator on a square image, by its side."""
    curves: dict[str, list[float]] = {}
    operators = {
        "grid_edge_weight": lambda inputs: grid_edge_weight(inputs.feature),
        "tree_scan": scan,
        "tree_selective_scan": fused,
    }
    with torch.no_grad():
        for side in sides:
            contenders = {**operators, "grid_tree": lambda inputs, side=side: grid_tree(inputs.weight, side, side)}
            inputs = [make_inputs(seed, (1, side, side, CURVE_CHANNELS), settings) for seed in range(DISTINCT_INPUTS)]
            times = time_in_turn(contenders, inputs, settings.rounds, settings.device, f"{side}x{side}")
            for name, seconds in times.items():
                curves.setdefault(name, []).append(spread(seconds)["median"])
    return curves


def report(data: dict[str, Any]) -> str:
    """The results as text."""
    body = [
        [
            *(shape["shape"], row["name"], format_seconds(row["ours"]["median"])),
            *(f"{row['gigabytes_per_second']:.3g}", row["other_name"], format_seconds(row["other"]["median"])),
            *format_ratio(row["ratio"]),
        ]
        for shape in data["shapes"]
        for row in shape["rows"]
    ]
    columns = ["batch, size, channels", "operator", "time", "GB/s", "alternative", "time", "ratio", "spread"]
    lines = [f"Operators, {data['precision']}", *machine_lines(data["machine"]), "", format_table(columns, body)]
    names = list(data["curves"])
    body = [
        [f"{side}x{side}", *(format_seconds(data["curves"][name][place]) for name in names)]
        for place, side in enumerate(data["sides"])
    ]
    lines += ["", f"One image, {CURVE_CHANNELS} channels", format_table(["size", *names], body)]
    return "\n".join(lines) + "\n"


def draw(data: dict[str, Any]) -> Figure:
    """Plot the time over the number of vertices."""
    figure = Figure(figsize=(6, 4.6), layout="constrained")
    axes = figure.subplots()
    vertices = [side**2 for side in data["sides"]]
    for name, seconds in data["curves"].items():
        axes.plot(vertices, [1e3 * value for value in seconds], marker="o", markersize=4, label=name)
    slowest = max(seconds[-1] for seconds in data["curves"].values())
    guide = [1e3 * slowest * count / vertices[-1] for count in vertices]
    axes.plot(vertices, guide, color="grey", linestyle=":", label="proportional to vertices")
    title = f"One image, {CURVE_CHANNELS} channels, {data['precision']}\n{data['hardware']}"
    axes.set(xscale="log", yscale="log", xlabel="vertices", ylabel="milliseconds (median)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def image_maps(text: str) -> tuple[int, int, int, int]:
    """Argparse type: ``8x56x56x160`` is a batch of 8 maps with 160 channels."""
    try:
        batch, height, width, channels = (int(number) for number in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected BATCHxHEIGHTxWIDTHxCHANNELS, got {text!r}") from None
    if min(batch, height, width, channels) < 1:
        raise argparse.ArgumentTypeError(f"expected positive numbers, got {text!r}")
    return batch, height, width, channels


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, NAME)
    add_autocast_argument(parser)
    parser.add_argument(
        "--maps",
        type=image_maps,
        nargs="+",
        metavar="BATCHxHEIGHTxWIDTHxCHANNELS",
        help="shapes of the feature maps (default: 8x56x56x160 1x200x334x160, on CUDA 128x56x56x160 2x200x334x160)",
    )
    parser.add_argument(
        "--sides",
        type=int,
        nargs="+",
        default=CURVE_SIDES,
        metavar="N",
        help=f"sides of the square maps for the curves, in vertices (default: {' '.join(map(str, CURVE_SIDES))})",
    )
    args = parser.parse_args()
    check_common_arguments(parser, args)
    return args


def main() -> None:
    """Run the command."""
    args = parse_args()
    logger = MMLogger.get_instance(NAME)
    settings = Settings(args.device, AUTOCAST[args.autocast] or torch.float32, args.rounds)
    machine = describe_machine(args.device)
    shapes = []
    for shape in args.maps or SHAPES[args.device]:
        text = "x".join(map(str, shape))
        logger.info("Measuring %s.", text)
        shapes.append({"shape": text, "rows": run_fresh(measure_shape, shape, settings, threads=args.threads)})
    logger.info("Measuring the curves.")
    curves = run_fresh(measure_curve, settings, tuple(args.sides), threads=args.threads)
    precision = f"{str(settings.dtype).removeprefix('torch.')}, {args.threads} thread{'s' * (args.threads > 1)}"
    data = {"hardware": machine.get("gpu", machine["cpu"]), "precision": precision, "machine": machine}
    data |= {"shapes": shapes, "sides": list(args.sides), "curves": curves}
    write_results(args.out, NAME, data, report(data), draw(data))


if __name__ == "__main__":
    main()
