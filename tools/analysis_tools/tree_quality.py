"""Compare a model's trees with ground-truth masks: how many tree edges cross object borders.

The data are a folder of images with a JSON file of COCO instances, or with a folder of class maps: PNG files of the
same names, in which 255 marks pixels without a class.

For every block: the share of tree edges that cross a border, next to that of the tree with eight neighbours per
position (cosine), the maximum spanning tree of the same weights, random spanning trees, the raster path, and the least
that any spanning tree can have; the probability that an edge at a border weighs more than another one (AUC); the
distributions of weights and decays. Also, how far trees agree: between blocks of a stage, between stages, between
metrics, between an image and its mirror image, and between checkpoints. For trained models, the rank correlation of
the quality of an image's trees with its mask AP and IoU (detectors, given instances) or its mIoU (segmenters, given
class maps). Intervals are 95 %, by the bootstrap over the images.

Several checkpoints of one training show how the trees develop. Stages and blocks are counted from 0.
"""

import argparse
import itertools
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_results import RESULTS, ClassMaps, Instances, choose_results
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measuring import add_output_argument, at_least, format_table, write_results
from torch import Tensor, nn
from tqdm import tqdm
from tree_measures import (
    OUTSIDE,
    Level,
    add_model_arguments,
    agreement,
    border_auc,
    build_model,
    coarse_agreement,
    crossing_share,
    find_levels,
    flip_agreement,
    format_interval,
    grid_borders,
    interval,
    is_initial,
    least_crossing_share,
    metric_weight,
    normalize,
    other_trees,
    rank_correlation,
    read_picture,
)

from grootvl_mm.apis import cli
from grootvl_mm.apis.images import read_image
from grootvl_mm.ops import grid_tree
from grootvl_mm.ops.tree import METRICS
from grootvl_mm.visualization import find_backbone, record_trees

NAME = "tree_quality"
KINDS = {  # what is compared, with colours and names in the figure
    "tree": ("tab:blue", "tree"),
    "8-connected": ("tab:cyan", "tree, eight neighbours"),
    "maximum": ("tab:red", "maximum spanning tree"),
    "random": ("tab:gray", "random spanning trees"),
    "raster": ("tab:orange", "raster path"),
    "least": ("black", "best possible tree"),
}
RANDOM_TREES = 4  # for each picture and block
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Samples = dict[str, list[float]]


def labels_of_positions(
    labels: np.ndarray, image_size: Sequence[int], map_size: Sequence[int], stride: int
) -> np.ndarray:
    """The labels (H, W) at the centres of a map's positions, ``OUTSIDE`` outside the image.

    Args:
        labels: Labels of the original image's pixels.
        image_size: Height and width of the backbone's input.
        map_size: Height and width of the map.
        stride: Pixels of the backbone's input per position.
    """
    centres = [stride * np.arange(count) + (stride - 1) / 2 for count in map_size]
    inside = [centre < size for centre, size in zip(centres, image_size, strict=True)]
    pixels = [
        np.minimum(((centre + 0.5) * whole / size).astype(int), whole - 1)
        for centre, size, whole in zip(centres, image_size, labels.shape, strict=True)
    ]
    return np.where(np.outer(*inside), labels[np.ix_(*pixels)], OUTSIDE)


def measure_level(level: Level, labels: np.ndarray, metric: str, generator: torch.Generator) -> dict[str, float]:
    """Crossing shares, AUC and weights of one block."""
    flat = torch.from_numpy(labels.ravel())
    trees = {"tree": level.tree, **other_trees(level.feature, metric, generator, RANDOM_TREES)}
    found = {kind: crossing_share(tree, flat) for kind, tree in trees.items()}
    weight = metric_weight(level.feature, metric)[0]
    found |= {"least": least_crossing_share(labels), "auc": border_auc(weight, labels)}
    border, inside = grid_borders(labels)
    for where, chosen in (("border", border & inside), ("interior", ~border & inside)):
        values = np.quantile(weight.numpy()[chosen], QUANTILES)
        found |= {f"{where} weight {quantile}": float(value) for quantile, value in zip(QUANTILES, values, strict=True)}
    return found


def measure_agreement(model: nn.Module, image: Tensor, levels: Sequence[Level], metric: str) -> dict[str, float]:
    """Agreement of the trees of one image, by what differs between them."""
    shares: Samples = defaultdict(list)
    for first, second in itertools.combinations(levels, 2):
        sizes = tuple(tuple(level.feature.shape[2:]) for level in (first, second))
        if first.stage == second.stage:
            shares["blocks of a stage"].append(agreement(first.tree, second.tree))
        elif first.stage + 1 == second.stage:
            shares["a stage and the next"].append(coarse_agreement(first.tree, second.tree, sizes))
    generator = torch.Generator().manual_seed(0)
    for level in levels:
        height, width = level.feature.shape[2:]
        for other in METRICS:
            if other != metric:
                tree = grid_tree(metric_weight(level.feature, other), height, width)
                shares[f"{metric} and {other}"].append(agreement(level.tree, tree))
        pair = torch.rand(2, metric_weight(level.feature, metric).shape[1], generator=generator)
        first, second = (grid_tree(weight[None], height, width) for weight in pair)
        shares["two random trees"].append(agreement(first, second))
    for name, horizontal in (("left and right mirrored", True), ("upside down", False)):
        # Strided convolutions sample the mirrored image at the same positions only if its size is odd.
        mirrored = find_levels(model, image.flip(3 if horizontal else 2))
        for level, other in zip(levels, mirrored, strict=True):
            width = level.feature.shape[3]
            shares[name].append(flip_agreement(level.tree, other.tree, width, horizontal=horizontal))
    return {name: float(np.mean(values)) for name, values in shares.items()}


def measure_checkpoint(
    args: argparse.Namespace, config: Any, checkpoint: str, truth: Instances | ClassMaps
) -> dict[str, Any]:
    """All measures of one checkpoint, by picture, and its trees."""
    model = build_model(config, checkpoint)
    metric = find_backbone(model).stages[0].blocks[0].mixer.tree_metric
    results = None if is_initial(checkpoint) else choose_results(model, truth)
    generator = torch.Generator().manual_seed(0)
    blocks: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    agreements, per_picture, trees = defaultdict(list), defaultdict(list), []
    for image in tqdm(truth.images(args.number), desc=Path(checkpoint).stem, unit="image"):
        pixels = truth.labels(image)
        path = args.images / image["file_name"]
        picture = read_picture(path, args.longest)
        tensor = normalize(model, picture)
        levels = find_levels(model, tensor)
        if not trees:
            decays = measure_decays(model, tensor)
        trees.append([level.tree for level in levels])
        qualities = []
        for level in levels:
            size = level.feature.shape[2:]
            labels = labels_of_positions(pixels, picture.shape[:2], size, 4 * 2**level.stage)
            border, inside = grid_borders(labels)
            if not (border & inside).any() or not (~border & inside).any():
                continue
            found = measure_level(level, labels, metric, generator)
            for name, value in found.items():
                blocks[level.name][name].append(value)
            qualities.append(1 - found["tree"] / max(found["random"], 1e-9))
        for name, share in measure_agreement(model, tensor, levels, metric).items():
            agreements[name].append(share)
        if qualities and results is not None:
            per_picture["quality"].append(float(np.mean(qualities)))
            for name, value in results.measure(read_image(path), image).items():
                per_picture[name].append(value)
    if not blocks:
        cli.fail(f"none of the {len(trees)} images has a border of the ground truth between positions of a feature map")
    return {"blocks": blocks, "agreement": agreements, "pictures": per_picture, "trees": trees, "metric": metric,
            "decays": decays}  # fmt: skip


def measure_decays(model: nn.Module, image: Tensor) -> dict[str, list[float]]:
    """Quantiles of each block's decays over positions and channels."""
    with record_trees(model) as records, torch.no_grad():
        find_backbone(model)(image)
    return {
        f"stage {record.stage}, block {record.block}": np.quantile(record.decay.numpy(), QUANTILES).tolist()
        for record in records
    }


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """Means over the images, with intervals."""
    correlation = {}
    for name in RESULTS:
        if name in found["pictures"]:
            pairs = np.stack([found["pictures"]["quality"], found["pictures"][name]], axis=1)
            if (pairs.std(axis=0) > 0).all():
                correlation[name] = interval(pairs, rank_correlation)
    ratio = {
        name: interval(
            np.stack([values["tree"], values["random"]], axis=1),
            lambda sample: sample[..., 0].mean(axis=1) / sample[..., 1].mean(axis=1),
        )
        for name, values in found["blocks"].items()
    }
    return {
        "blocks": {
            block: {name: interval(values) for name, values in measures.items()} | {"tree / random": ratio[block]}
            for block, measures in found["blocks"].items()
        },
        "agreement": {name: interval(values) for name, values in found["agreement"].items()},
        "correlation of quality with": correlation,
        "pictures": found["pictures"],
        "metric": found["metric"],
        "quantiles of decays": found["decays"],
    }


def between_checkpoints(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Agreement of the trees of the same image and block, for each pair of checkpoints."""
    shares = {}
    for (first, a), (second, b) in itertools.combinations(found.items(), 2):
        values = [
            np.mean([agreement(one, other) for one, other in zip(*pair, strict=True)])
            for pair in zip(a["trees"], b["trees"], strict=True)
        ]
        shares[f"{first} and {second}"] = interval(values)
    return shares


def report(data: dict[str, Any]) -> str:
    """The results as text."""
    lines = [f"Trees of {data['config']} on {data['count']} images of {data['images']}, metric {data['metric']}"]
    for name, found in data["checkpoints"].items():
        header = ["block", *KINDS, "tree / random", "AUC of the weights"]
        rows = [
            [block, *(f"{100 * values[kind]['value']:.2f} %" for kind in KINDS),
             format_interval(values["tree / random"]), format_interval(values["auc"])]
            for block, values in found["blocks"].items()
        ]  # fmt: skip
        lines += ["", f"{name}: share of edges that cross a border", format_table(header, rows)]
        rows = [[block, *map("{:.3f}".format, row)] for block, row in found["quantiles of decays"].items()]
        table = format_table(["block", *map(str, QUANTILES)], rows)
        lines += ["", f"{name}: quantiles of the decays, first image", table]
        rows = [[what, format_interval(value)] for what, value in found["agreement"].items()]
        lines += ["", f"{name}: share of edges in common", format_table(["trees of", "share"], rows)]
        for what, value in found["correlation of quality with"].items():
            count = value["count"]
            lines.append(f"rank correlation of tree quality with {what}: {format_interval(value)}, {count} images")
    if data["between checkpoints"]:
        rows = [[pair, format_interval(value)] for pair, value in data["between checkpoints"].items()]
        lines += ["", "share of edges in common between checkpoints", format_table(["checkpoints", "share"], rows)]
    return "\n".join(lines) + "\n"


def draw(data: dict[str, Any]) -> Figure:
    """Crossing edges by block, weights at borders and elsewhere and, of several checkpoints, how they compare."""
    several = len(data["checkpoints"]) > 1
    figure = Figure(figsize=(15 if several else 11, 5), layout="constrained")
    left, middle, *right = figure.subplots(1, 3 if several else 2)
    *_, (last, found) = data["checkpoints"].items()
    left_panels = f"; left and middle: {readable_name(last)}" if several else f", {readable_name(last)}"
    figure.suptitle(f"{data['config']}, {data['count']} images{left_panels}", fontsize=11)
    blocks = list(found["blocks"])
    for kind, (colour, label) in KINDS.items():
        left.plot([100 * found["blocks"][block][kind]["value"] for block in blocks], "o-", color=colour, label=label)
    highest = 100 * max(found["blocks"][block][kind]["value"] for block in blocks for kind in KINDS)
    left.set(title="Edges that cross an object border", ylabel="% of the edges", ylim=(0, 1.3 * highest))
    left.legend(fontsize=8, loc="upper left", ncols=2)  # above the lines
    for where, shift, colour, label in (
        ("interior", -0.15, "tab:blue", "within a region"),
        ("border", 0.15, "tab:red", "across a border"),
    ):
        low, median, high = (
            np.array([found["blocks"][block][f"{where} weight {quantile}"]["value"] for block in blocks])
            for quantile in (0.25, 0.5, 0.75)
        )
        middle.errorbar(np.arange(len(blocks)) + shift, median, [median - low, high - median], fmt="o", color=colour,
                        label=label, capsize=3)  # fmt: skip
    middle.set(title="Weights of all grid edges: median, quartiles", ylabel=f"edge weight ({data['metric']})")
    middle.legend(fontsize=8)
    for axes in (left, middle):
        axes.set_xticks(range(len(blocks)), blocks, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    for axes in right:
        draw_checkpoints(axes, data["checkpoints"])
    return figure


def draw_checkpoints(axes: Axes, checkpoints: dict[str, Any]) -> None:
    """The mean ratio of crossing edges of tree and random tree, by stage; checkpoints need not be of one training."""
    stages = sorted({block.split(",")[0] for found in checkpoints.values() for block in found["blocks"]})
    for stage, marker in zip(stages, itertools.cycle("osD^"), strict=False):
        points = []
        for found in checkpoints.values():
            own = [value for block, value in found["blocks"].items() if block.startswith(f"{stage},")]
            points.append(np.mean([value["tree / random"]["value"] for value in own]) if own else np.nan)
        axes.plot(points, marker, label=stage)
    axes.axhline(1, color="black", linewidth=0.8)
    names = [readable_name(name) for name in checkpoints]
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set(title="Crossing edges, relative to random trees", ylabel="ratio (1: no better than random)", ylim=(0, 1.1))
    axes.legend(fontsize=8, loc="lower right")


def readable_name(name: str) -> str:
    """The name of a checkpoint for figures, e.g. "iteration 600, run" for ``run/iter_600``."""
    if is_initial(name):
        _, _, seed = name.partition("-")
        return f"random weights, seed {seed or 0}"
    folder, _, stem = name.rpartition("/")
    if found := re.fullmatch(r"(iter|epoch)_(\d+)", stem):
        stem = f"{'iteration' if found[1] == 'iter' else 'epoch'} {found[2]}"
    return f"{stem}, {folder}" if folder else stem


def short_names(checkpoints: Sequence[str]) -> list[str]:
    """The names of the files, with their folders if names are not unique."""
    names = [Path(checkpoint).stem for checkpoint in checkpoints]
    if len(set(names)) < len(names):
        names = ["/".join(Path(checkpoint).with_suffix("").parts[-2:]) for checkpoint in checkpoints]
    return names


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="names of the checkpoints in tables and figures (default: those of the files)",
    )
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument(
        "--annotations", type=Path, required=True, help="JSON file of COCO instances, or folder of class maps"
    )
    parser.add_argument(
        "--number", type=at_least(2), default=100, metavar="N", help="images to measure (default: %(default)s)"
    )
    add_output_argument(parser, NAME)
    args = parser.parse_args()
    args.names = args.names or short_names(args.checkpoints)
    if len(args.names) != len(args.checkpoints):
        parser.error(f"--names takes a name per checkpoint, got {len(args.names)} for {len(args.checkpoints)}")
    if len(set(args.names)) != len(args.names):
        parser.error(f"--names must differ, got {', '.join(args.names)}")
    return args


def main() -> None:
    """Run the command."""
    args = parse_args()
    if not args.annotations.is_dir():
        cli.check_file(
            str(args.annotations), "annotations", "give a JSON file of COCO instances, or a folder of class maps"
        )
    config = cli.load_config(args.config, args.cfg_options)
    is_folder = args.annotations.is_dir()
    truth = ClassMaps(args.annotations, args.images) if is_folder else Instances(args.annotations)
    if len(truth.images(2)) < 2:
        cli.fail(f"'{args.annotations}' has less than two images with {'borders' if is_folder else 'instances'}")
    found = {
        name: measure_checkpoint(args, config, checkpoint, truth)
        for name, checkpoint in zip(args.names, args.checkpoints, strict=True)
    }
    first = next(iter(found.values()))
    data = {
        "config": Path(args.config).stem,
        "images": str(args.images),
        "count": len(first["trees"]),
        "metric": first["metric"],
        "checkpoints": {name: summarize(values) for name, values in found.items()},
        "between checkpoints": between_checkpoints(found),
    }
    write_results(args.out, NAME, data, report(data), draw(data))


if __name__ == "__main__":
    main()
