"""Shared code of the tree studies: models and images, features and trees of all blocks, and measures of trees."""

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import mmcv
import numpy as np
import torch
import torch.nn.functional as F
from measuring import at_least
from mmengine.config import Config
from scipy import ndimage
from scipy.stats import rankdata
from torch import Tensor, nn

from grootvl_mm.apis import cli
from grootvl_mm.apis.images import read_image
from grootvl_mm.apis.models import NO_CHECKPOINT, load_grootv
from grootvl_mm.models import TreeSSM
from grootvl_mm.models.tree_ssm import raster_path
from grootvl_mm.ops import Tree, graph_tree, grid_edge_weight, grid_tree
from grootvl_mm.ops.reference import grid_edges
from grootvl_mm.visualization import find_backbone, parent_edges

OUTSIDE = -1  # label of positions outside the image
RESAMPLES = 2000


class Level(NamedTuple):
    """The features and trees of one block.

    Attributes:
        stage: Index of the stage.
        block: Index of the block in its stage.
        feature: (B, D, H, W), from which the trees are built.
        tree: The trees that the block scanned.
    """

    stage: int
    block: int
    feature: Tensor
    tree: Tree

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"stage {self.stage}, block {self.block}"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add config, checkpoints and image size."""
    cli.add_config_arguments(parser)
    parser.add_argument(
        "--checkpoints", nargs="+", default=[NO_CHECKPOINT], metavar="FILE",
        help=f"checkpoints of the config, in training order; {NO_CHECKPOINT} or {NO_CHECKPOINT}-SEED stands for "
        f"initial weights (default: {NO_CHECKPOINT})",
    )  # fmt: skip
    parser.add_argument(
        "--longest",
        type=at_least(1),
        metavar="N",
        help="scale the longer side of images to N pixels (default: no scaling)",
    )


def build_model(config: Config, checkpoint: str) -> nn.Module:
    """The model of a config on the CPU in evaluation mode, with the weights of a checkpoint or of ``none-SEED``.

    Exits with an error if the file does not exist, or the model has no GrootV backbone.
    """
    name, _, seed = checkpoint.partition("-")
    initial = is_initial(checkpoint)
    model, _ = load_grootv(config, name if initial else checkpoint, int(seed or 0) if initial else 0)
    model.cfg = config
    return model


def is_initial(checkpoint: str) -> bool:
    """Whether the name stands for initial weights."""
    return re.fullmatch(rf"{NO_CHECKPOINT}(-\d+)?", checkpoint) is not None


def read_picture(path: Path, longest: int | None) -> np.ndarray:
    """Read an image, (H, W, 3) uint8, BGR, and scale its longer side if ``longest`` is set, or exit with an error."""
    picture = read_image(path)
    if longest:
        picture = mmcv.imrescale(picture, longest / max(picture.shape[:2]))
    return picture


def normalize(model: nn.Module, picture: np.ndarray) -> Tensor:
    """Normalize (H, W, 3), BGR, 0 to 255, to the backbone's input (1, 3, H, W) like the model's data preprocessor."""
    mean, std = pixel_statistics(model)
    rgb = torch.from_numpy(picture[..., ::-1].copy()).permute(2, 0, 1).float()
    return ((rgb - mean) / std)[None]


def pixel_statistics(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the data preprocessor, (3, 1, 1) each."""
    preprocessor = model.data_preprocessor
    return preprocessor.mean.cpu().view(3, 1, 1), preprocessor.std.cpu().view(3, 1, 1)


@contextmanager
def watch_levels(model: nn.Module, choose: Callable[[int, Tree], Tree] | None = None) -> Iterator[list[Level]]:
    """Collect the features and trees of all blocks, in order, while the backbone runs.

    Args:
        model: A model with a GrootV backbone with ``tree_sharing='block'``.
        choose: Called with the number of the block and its tree; returns the tree to scan instead.
    """
    levels: list[Level] = []
    mixers: list[TreeSSM] = []
    for stage, blocks in enumerate(stage.blocks for stage in find_backbone(model).stages):
        for block, module in enumerate(blocks):
            number, mixer = len(mixers), module.mixer

            def build(feature, padding=None, *, where=(stage, block), number=number, mixer=mixer) -> Tree:
                tree = TreeSSM.build_tree(mixer, feature, padding)
                tree = choose(number, tree) if choose else tree
                levels.append(Level(*where, feature, tree))
                return tree

            mixer.build_tree = build
            mixers.append(mixer)
    try:
        yield levels
    finally:
        for mixer in mixers:
            del mixer.build_tree


def find_levels(model: nn.Module, image: Tensor, choose: Callable[[int, Tree], Tree] | None = None) -> list[Level]:
    """Features and trees of all blocks for an image (1, 3, H, W)."""
    with watch_levels(model, choose) as levels, torch.no_grad():
        find_backbone(model)(image)
    return levels


def metric_weight(feature: Tensor, metric: str) -> Tensor:
    """Edge weights (B, E) that cannot overflow."""
    return grid_edge_weight(feature, metric, log=metric != "cosine")


def eight_neighbours(height: int, width: int) -> Tensor:
    """The edges (2, E) of the 8-connected grid: the edges of the 4-connected grid, then the diagonals."""
    vertex = torch.arange(height * width).view(height, width)
    diagonals = [(vertex[:-1, :-1], vertex[1:, 1:]), (vertex[:-1, 1:], vertex[1:, :-1])]
    ends = [torch.cat([pair[end].flatten() for pair in diagonals]) for end in (0, 1)]
    return torch.cat([torch.stack(grid_edges(height, width)), torch.stack(ends)], dim=1)


def eight_connected_tree(feature: Tensor) -> Tree:
    """The minimum spanning trees of features (B, D, H, W) on the 8-connected grid, with the cosine metric."""
    height, width = feature.shape[2:]
    edges = eight_neighbours(height, width)
    values = F.normalize(feature.flatten(2), dim=1)
    weight = -(values[:, :, edges[0]] * values[:, :, edges[1]]).sum(1)
    return graph_tree(edges, weight, height * width)


def other_trees(feature: Tensor, metric: str, generator: torch.Generator, count: int) -> dict[str, Tree]:
    """The trees to compare that of features (1, D, H, W) with, by name; ``count`` of them are random."""
    height, width = feature.shape[2:]
    weight = metric_weight(feature, metric)
    random = torch.rand(count, weight.shape[1], generator=generator)
    return {
        "maximum": grid_tree(-weight, height, width),
        "random": grid_tree(random, height, width),
        "raster": raster_path(1, height, width, "first", False, torch.device("cpu")),
        "8-connected": eight_connected_tree(feature),
    }


def edge_mask(tree: Tree, width: int) -> Tensor:
    """Which edges of the grid are in spanning trees of the 4-connected grid, (B, E) bool."""
    batch, vertices = tree.parent.shape
    height = vertices // width
    edges = (height - 1) * width + height * (width - 1)
    index = parent_edges(tree, height, width) % (edges + 1)  # -1, of the root, becomes an extra column
    return torch.zeros(batch, edges + 1, dtype=torch.bool).scatter_(1, index, True)[:, :-1]


def edge_keys(edges: Tensor, vertices: int) -> Tensor:
    """A unique number for each undirected edge (..., 2)."""
    low, high = edges.long().sort(dim=-1).values.unbind(-1)
    return low * vertices + high


def agreement(first: Tree, second: Tree) -> float:
    """The share of edges common to two spanning trees of one graph, averaged over the batch."""
    return shared_edges(first.edges(), second.edges())


def shared_edges(first: Tensor, second: Tensor) -> float:
    """The share of edges (B, L - 1, 2) that are also in ``second``."""
    vertices = first.shape[1] + 1
    keys = (edge_keys(edges, vertices) for edges in (first, second))
    shares = [torch.isin(one, other).float().mean() for one, other in zip(*keys, strict=True)]
    return float(torch.stack(shares).nan_to_num(1.0).mean())


def coarse_agreement(fine: Tree, coarse: Tree, sizes: tuple[tuple[int, int], tuple[int, int]]) -> float:
    """The share of the coarse tree's edges between whose positions the fine tree has an edge, too.

    Args:
        fine: Tree of the larger map.
        coarse: Tree of the smaller map, each of whose positions covers 2x2 positions of the larger map.
        sizes: Height and width of both maps.
    """
    (_, fine_width), (_, width) = sizes
    low, high = fine.edges()[0].long().unbind(1)
    cell = [(ends // fine_width // 2) * width + ends % fine_width // 2 for ends in (low, high)]
    crossed = {pair for pair in zip(*(ends.tolist() for ends in cell), strict=True) if pair[0] != pair[1]}
    edges = [tuple(pair) for pair in coarse.edges()[0].tolist()]
    return sum(pair in crossed for pair in edges) / max(len(edges), 1)


def flip_agreement(tree: Tree, mirrored: Tree, width: int, *, horizontal: bool) -> float:
    """The share of edges common to a tree and the tree of the mirrored image."""
    height = tree.parent.shape[1] // width
    ends = tree.edges().long()
    row, column = ends // width, ends % width
    flipped = row * width + (width - 1 - column) if horizontal else (height - 1 - row) * width + column
    return shared_edges(flipped, mirrored.edges())


def crossing_share(tree: Tree, labels: Tensor) -> float:
    """The share of edges between different labels (L,), averaged over the batch; edges to ``OUTSIDE`` are ignored."""
    ends = labels[tree.edges().long()]
    inside = (ends != OUTSIDE).all(2)
    crossing = inside & (ends[..., 0] != ends[..., 1])
    return float((crossing.sum(1) / inside.sum(1).clamp(min=1)).mean())


def least_crossing_share(labels: np.ndarray) -> float:
    """The lowest possible crossing share for labels (H, W): n connected regions need n - 1 crossing edges."""
    inside = labels != OUTSIDE
    regions = sum(ndimage.label(labels == label)[1] for label in np.unique(labels[inside]))
    return (regions - 1) / max(int(inside.sum()) - 1, 1)


def border_auc(weight: Tensor, labels: np.ndarray) -> float:
    """ROC AUC of the weights: the probability that a border edge weighs more than an interior one; ties count half.

    Args:
        weight: (E,), in the order of the grid's edges.
        labels: (H, W), with at least one border.
    """
    values = weight.double().numpy()
    border, inside = grid_borders(labels)
    values, border = values[inside], border[inside]
    positive, negative = int(border.sum()), int((~border).sum())
    return float((rankdata(values)[border].sum() - positive * (positive + 1) / 2) / (positive * negative))


def grid_borders(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether the edges of the grid (E,) join different labels (H, W), and whether both ends are inside the image."""
    pairs = [(labels[:-1], labels[1:]), (labels[:, :-1], labels[:, 1:])]
    different = np.concatenate([(low != high).ravel() for low, high in pairs])
    inside = np.concatenate([((low != OUTSIDE) & (high != OUTSIDE)).ravel() for low, high in pairs])
    return different, inside


def interval(values: Sequence[float], statistic: Callable[[np.ndarray], np.ndarray] | None = None) -> dict[str, float]:
    """A statistic with its 95 % bootstrap interval.

    Args:
        values: (N,) or, for statistics of pairs, (N, 2).
        statistic: Maps samples (S, N) or (S, N, 2) to (S,); default: the mean.
    """
    values = np.asarray(values, dtype=np.float64)
    statistic = statistic or (lambda sample: sample.mean(axis=1))
    chosen = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.nanquantile(statistic(values[chosen]), [0.025, 0.975])
    return {"value": float(statistic(values[None])[0]), "low": float(low), "high": float(high), "count": len(values)}


def rank_correlation(pairs: np.ndarray) -> np.ndarray:
    """Spearman's correlation of samples (S, N, 2); NaN for constant samples."""
    ranks = rankdata(pairs, axis=1)
    centred = ranks - ranks.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return centred.prod(axis=2).sum(axis=1) / np.sqrt(np.square(centred).sum(axis=1).prod(axis=1))


def format_interval(found: dict[str, float], digits: int = 3) -> str:
    """Format a value with its interval."""
    return f"{found['value']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
