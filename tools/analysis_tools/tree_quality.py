"""Measure the trees of a model against ground-truth masks: how many of their edges cross the borders of objects.

The data are a folder of pictures with a file of COCO instances. For every block: the share of tree edges that cross a
border, beside that of the tree with eight neighbours to a position (cosine), the maximum spanning tree of the same
weights, random spanning trees, the raster path, and the least that any spanning tree can have; the probability that an
edge at a border weighs more than one that is not (AUC); the weights and the decays themselves. Further, how far trees
agree: between blocks of a stage, between stages, between metrics, between a picture and its mirror image, and between
checkpoints. Of trained detectors, also how the quality of a picture's trees goes with its mask AP and IoU. Intervals
are 95 %, by the bootstrap over pictures.

Several checkpoints of one training show how the trees develop; 'none' stands for the weights before it.
"""

import argparse
import contextlib
import io
import itertools
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from matplotlib.figure import Figure
from measuring import at_least, format_table, write_results
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
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
from grootvl_mm.ops import grid_tree
from grootvl_mm.ops.tree import METRICS
from grootvl_mm.visualization import find_backbone, record_trees

NAME = "tree_quality"
KINDS = ("tree", "8-connected", "maximum", "random", "raster", "least")
RANDOM_TREES = 4  # for each picture and block
CONFIDENT = 0.3  # score from which a detection counts for the IoU
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Samples = dict[str, list[float]]


def label_map(coco: COCO, image: dict[str, Any]) -> np.ndarray:
    """(H, W) int64, 0 for the background, then the number of the smallest instance at a pixel."""
    labels = np.zeros((image["height"], image["width"]), np.int64)
    instances = coco.loadAnns(coco.getAnnIds(image["id"], iscrowd=False))
    for number, instance in enumerate(sorted(instances, key=lambda item: -item["area"]), start=1):
        labels[coco.annToMask(instance) > 0] = number
    return labels


def labels_of_positions(
    labels: np.ndarray, image_size: Sequence[int], map_size: Sequence[int], stride: int
) -> np.ndarray:
    """The labels (H, W) at the centres of a map's positions, ``OUTSIDE`` where these leave the image.

    Args:
        labels: of the picture's pixels, whose size may differ from the image's.
        image_size: height and width of the image that the backbone got.
        map_size: height and width of the map.
        stride: pixels of the image to a position.
    """
    centres = [stride * np.arange(count) + (stride - 1) / 2 for count in map_size]
    inside = [centre < size for centre, size in zip(centres, image_size, strict=True)]
    pixels = [
        np.minimum(((centre + 0.5) * whole / size).astype(int), whole - 1)
        for centre, size, whole in zip(centres, image_size, labels.shape, strict=True)
    ]
    return np.where(np.outer(*inside), labels[np.ix_(*pixels)], OUTSIDE)


def measure_level(level: Level, labels: np.ndarray, metric: str, generator: torch.Generator) -> dict[str, float]:
    """Shares of crossing edges, AUC and weights of one block."""
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
    """How far trees of one picture agree with each other, by what differs between them."""
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
        # Strides of 2 see a mirrored picture in the same positions only where sizes are odd.
        mirrored = find_levels(model, image.flip(3 if horizontal else 2))
        for level, other in zip(levels, mirrored, strict=True):
            width = level.feature.shape[3]
            shares[name].append(flip_agreement(level.tree, other.tree, width, horizontal=horizontal))
    return {name: float(np.mean(values)) for name, values in shares.items()}


class Detections:
    """Mask AP and IoU of single pictures, for models of mmdet that predict masks."""

    def __init__(self, model: nn.Module, coco: COCO) -> None:
        from mmcv.transforms import Compose
        from mmdet.utils import get_test_pipeline_cfg

        self.model, self.coco = model, coco
        pipeline = [step for step in get_test_pipeline_cfg(model.cfg) if step["type"] != "LoadAnnotations"]
        self.pipeline = Compose([{**pipeline[0], "type": "mmdet.LoadImageFromNDArray"}, *pipeline[1:]])
        names = model.cfg.test_dataloader.dataset.metainfo.classes
        self.categories = [coco.getCatIds(catNms=[name])[0] for name in names]

    def measure(self, picture: np.ndarray, image: dict[str, Any]) -> dict[str, float]:
        """AP as COCO defines it on the picture alone, and the mean over its instances of the best mask IoU."""
        from mmdet.apis import inference_detector

        found = inference_detector(self.model, picture, test_pipeline=self.pipeline).pred_instances
        masks = [coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in found.masks]
        results = [
            {"image_id": image["id"], "category_id": self.categories[label], "score": score, "segmentation": mask}
            for label, score, mask in zip(found.labels.tolist(), found.scores.tolist(), masks, strict=True)
        ]
        best = []
        for instance in self.coco.loadAnns(self.coco.getAnnIds(image["id"], iscrowd=False)):
            same = [result["segmentation"] for result in results
                    if result["category_id"] == instance["category_id"] and result["score"] >= CONFIDENT]  # fmt: skip
            overlaps = coco_mask.iou(same, [self.coco.annToRLE(instance)], [0]) if same else np.zeros(1)
            best.append(float(overlaps.max()))
        return {"mask AP": self._average_precision(results, image["id"]), "mask IoU": float(np.mean(best))}

    def _average_precision(self, results: list[dict[str, Any]], image: int) -> float:
        if not results:
            return 0.0
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self.coco, self.coco.loadRes(results), "segm")
            evaluation.params.imgIds = [image]
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        return float(precision[precision > -1].mean())


def measure_checkpoint(args: argparse.Namespace, config: Any, checkpoint: str, coco: COCO) -> dict[str, Any]:
    """All measures of one checkpoint, by picture, and its trees."""
    model = build_model(config, checkpoint)
    metric = find_backbone(model).stages[0].blocks[0].mixer.tree_metric
    detections = None
    if args.detections and not is_initial(checkpoint) and "roi_head" in config.model:
        detections = Detections(model, coco)
    generator = torch.Generator().manual_seed(0)
    blocks: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    agreements, per_picture, trees = defaultdict(list), defaultdict(list), []
    for image in tqdm(chosen_images(coco, args.number), desc=Path(checkpoint).stem, unit="picture"):
        pixels = label_map(coco, image)
        path = Path(args.images, image["file_name"])
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
        if qualities and detections is not None:
            per_picture["quality"].append(float(np.mean(qualities)))
            for name, value in detections.measure(mmcv.imread(str(path)), image).items():
                per_picture[name].append(value)
    return {"blocks": blocks, "agreement": agreements, "pictures": per_picture, "trees": trees, "metric": metric,
            "decays": decays}  # fmt: skip


def measure_decays(model: nn.Module, image: Tensor) -> dict[str, list[float]]:
    """Quantiles of the decays over positions and channels, by block."""
    with record_trees(model) as records, torch.no_grad():
        find_backbone(model)(image)
    return {
        f"stage {record.stage}, block {record.block}": np.quantile(record.decay.numpy(), QUANTILES).tolist()
        for record in records
    }


def chosen_images(coco: COCO, number: int) -> list[dict[str, Any]]:
    """The first pictures that have instances."""
    return [image for image in coco.loadImgs(sorted(coco.getImgIds())) if coco.getAnnIds(image["id"])][:number]


def summarize(found: dict[str, Any]) -> dict[str, Any]:
    """Means over the pictures with intervals."""
    correlation = {}
    for name in ("mask AP", "mask IoU"):
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
    """The share of edges that trees of one picture and block have in common, for each two checkpoints."""
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
    lines = [f"Trees of {data['config']} on {data['count']} pictures of {data['images']}, metric {data['metric']}"]
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
        lines += ["", f"{name}: quantiles of the decays, first picture", table]
        rows = [[what, format_interval(value)] for what, value in found["agreement"].items()]
        lines += ["", f"{name}: share of edges in common", format_table(["trees of", "share"], rows)]
        for what, value in found["correlation of quality with"].items():
            count = value["count"]
            lines.append(f"rank correlation of tree quality with {what}: {format_interval(value)}, {count} pictures")
    if data["between checkpoints"]:
        rows = [[pair, format_interval(value)] for pair, value in data["between checkpoints"].items()]
        lines += ["", "share of edges in common between checkpoints", format_table(["checkpoints", "share"], rows)]
    return "\n".join(lines) + "\n"


def draw(data: dict[str, Any]) -> Figure:
    """Crossing edges by block, weights at borders and elsewhere, and the way through the checkpoints."""
    figure = Figure(figsize=(14, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    *_, (last, found) = data["checkpoints"].items()
    blocks = list(found["blocks"])
    for kind, colour in zip(KINDS, ("tab:blue", "tab:cyan", "tab:red", "tab:gray", "tab:orange", "black"), strict=True):
        left.plot([100 * found["blocks"][block][kind]["value"] for block in blocks], "o-", color=colour, label=kind)
    ticks = [block.replace("stage ", "").replace(", block ", ".") for block in blocks]
    left.set_xticks(range(len(blocks)), ticks)
    left.set(title=f"crossing edges, {last}", xlabel="stage.block", ylabel="%", ylim=(0, None))
    left.legend(fontsize=8)
    for where, shift, colour in (("interior", -0.15, "tab:blue"), ("border", 0.15, "tab:red")):
        low, median, high = (
            np.array([found["blocks"][block][f"{where} weight {quantile}"]["value"] for block in blocks])
            for quantile in (0.25, 0.5, 0.75)
        )
        middle.errorbar(np.arange(len(blocks)) + shift, median, [median - low, high - median], fmt="o", color=colour,
                        label=where, capsize=3)  # fmt: skip
    middle.set_xticks(range(len(blocks)), ticks)
    middle.set(title=f"weights of edges ({data['metric']}), quartiles", xlabel="stage.block")
    middle.legend(fontsize=8)
    for stage in sorted({block.split(",")[0] for block in blocks}):
        points = []
        for values in data["checkpoints"].values():
            own = [value for block, value in values["blocks"].items() if block.startswith(stage)]
            ratios = [value["tree / random"]["value"] for value in own]
            points.append(np.mean(ratios) if ratios else np.nan)
        right.plot(points, "o-", label=stage)
    right.axhline(1, color="black", linewidth=0.8)
    right.set_xticks(range(len(data["checkpoints"])), list(data["checkpoints"]), rotation=30, fontsize=8)
    right.set(title="crossing edges, tree over random", ylim=(0, 1.1))
    right.legend(fontsize=8)
    return figure


def short_names(checkpoints: Sequence[str]) -> list[str]:
    """The names of the files, with that of their folder where several have the same."""
    names = [Path(checkpoint).stem for checkpoint in checkpoints]
    if len(set(names)) < len(names):
        names = ["/".join(Path(checkpoint).with_suffix("").parts[-2:]) for checkpoint in checkpoints]
    return names


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--images", required=True, help="folder of the pictures")
    parser.add_argument("--annotations", required=True, help="JSON file of COCO instances")
    parser.add_argument(
        "--number", type=at_least(2), default=100, metavar="N", help="pictures to measure (default: %(default)s)"
    )
    parser.add_argument("--no-detections", dest="detections", action="store_false", help="leave out AP and IoU")
    parser.add_argument(
        "--out", type=Path, default=Path("work_dirs", NAME), help="folder for the results (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    args = parse_args()
    cli.check_file(args.annotations, "annotations", "give a JSON file of COCO instances")
    config = cli.load_config(args.config, args.cfg_options)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(args.annotations)
    found = {
        name: measure_checkpoint(args, config, checkpoint, coco)
        for name, checkpoint in zip(short_names(args.checkpoints), args.checkpoints, strict=True)
    }
    first = next(iter(found.values()))
    data = {
        "config": Path(args.config).stem,
        "images": args.images,
        "count": len(first["trees"]),
        "metric": first["metric"],
        "checkpoints": {name: summarize(values) for name, values in found.items()},
        "between checkpoints": between_checkpoints(found),
    }
    text = report(data)
    sys.stdout.write(text)
    write_results(args.out, NAME, data, text, draw(data))


if __name__ == "__main__":
    main()
