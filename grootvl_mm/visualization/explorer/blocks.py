"""What the explorer shows of a block, from the recorded trees of a model."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grootvl_mm.layers.padding import LARGEST_WEIGHT, PADDING_WEIGHT
from grootvl_mm.models.tree_ssm import TreeSSM
from grootvl_mm.ops import grid_edge_weight, grid_tree
from grootvl_mm.ops.tree import METRICS
from grootvl_mm.visualization.paths import join_ranks, mean_decay, parent_edges
from grootvl_mm.visualization.recorder import TreeRecord

PATHS = ("raster", "cross")  # scans without a tree
NUM_VARYING = 2  # channels that are shown because their decays vary


class ExplorerTree(NamedTuple):
    """A spanning tree of L positions.

    Attributes:
        metric: ``cosine``, ``euclidean`` or ``manhattan``; or the name of another scan with a tree of its own.
        parent: (L,) int32, the root's is the root.
        rank: (L,) int64, when the edge to the parent joins the tree, see
            :func:`~grootvl_mm.visualization.join_ranks`: 1 to L - 1; 0 for the root.
        edge_weight: (L,) float32, of the edge to the parent, as the layer compares it: 2e38 or more at padding that is
            ignored. The root's means nothing.
    """

    metric: str
    parent: np.ndarray
    rank: np.ndarray
    edge_weight: np.ndarray


class ExplorerBlock(NamedTuple):
    """One block of a backbone, for one image.

    Attributes:
        stage: from 0.
        block: from 0, within the stage.
        height: rows of the map.
        width: columns of the map, L = height * width.
        valid_size: rows and columns without padding that the layer ignores.
        root: of the trees, 0 or L - 1.
        scan: what the layer scans along, ``tree``, ``raster``, ``cross`` or another.
        propagation: ``all``, ``up`` or ``down``.
        trees: one for each metric; that of the layer, if it has one, is the first.
        decays: title of a channel to its decays (L,), float32: first the geometric mean over all channels.
    """

    stage: int
    block: int
    height: int
    width: int
    valid_size: tuple[int, int]
    root: int
    scan: str
    propagation: str
    trees: tuple[ExplorerTree, ...]
    decays: dict[str, np.ndarray]

    @property
    def stride(self) -> int:
        """Pixels of the image to a position."""
        return 4 * 2**self.stage


class TreeFeatures:
    """Keeps the features from which layers build their trees, beside :func:`~grootvl_mm.visualization.record_trees`.

    ::

        with record_trees(model) as records, TreeFeatures(model) as features:
            model(image)
        blocks = explorer_blocks(records, features)

    Args:
        model: a module with layers of the kind :class:`~grootvl_mm.models.TreeSSM`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: dict[str, Tensor] = {}  # name of a layer to (B, H, W, D)
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> "TreeFeatures":
        for name, module in self.model.named_modules():
            if isinstance(module, TreeSSM):
                # x_proj reads exactly what the tree is built from.
                self.handles.append(module.x_proj.register_forward_pre_hook(self._keep(name)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _keep(self, name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def keep(module: nn.Module, inputs: tuple[Tensor]) -> None:
            self.found[name] = inputs[0].detach()

        return keep


def explorer_blocks(records: list[TreeRecord], features: TreeFeatures, image: int = 0) -> list[ExplorerBlock]:
    """What the explorer shows of the blocks of a backbone.

    Args:
        records: of one call of the model, or of several, of which the last counts.
        features: of the same call.
        image: index in the batch.

    Raises:
        ValueError: no layer of a backbone was recorded.
    """
    latest = {(record.stage, record.block): record for record in records if record.stage is not None}
    if not latest:
        raise ValueError(f"none of the {len(records)} recorded layers is part of a GrootV backbone: there is no block")
    blocks: list[ExplorerBlock] = []
    for (stage, block), record in sorted(latest.items()):
        if record.tree_sharing == "stage" and blocks and blocks[-1].stage == stage:
            trees = blocks[-1].trees
        else:
            feature = features.found[record.name][image : image + 1].permute(0, 3, 1, 2)
            trees = _trees(record, feature, image)
        size = (record.height, record.width)
        blocks.append(
            ExplorerBlock(
                stage=stage,
                block=block,
                height=record.height,
                width=record.width,
                valid_size=size if record.valid_sizes is None else tuple(record.valid_sizes[image].tolist()),
                root=_root(record),
                scan=record.scan,
                propagation=record.propagation,
                trees=trees,
                decays=_decays(record.decay[image]),
            )
        )
    return blocks


def _root(record: TreeRecord) -> int:
    return 0 if record.root == "first" else record.height * record.width - 1


@torch.no_grad()
def _trees(record: TreeRecord, feature: Tensor, image: int) -> tuple[ExplorerTree, ...]:
    """The trees of all metrics for (1, D, H, W) features, that of the layer first."""
    height, width = record.height, record.width
    own_weight = record.edge_weight[image : image + 1]
    at_padding = own_weight >= PADDING_WEIGHT
    weights: dict[str, Tensor] = {}
    if record.scan not in PATHS:
        weights[record.metric if record.scan == "tree" else record.scan] = own_weight
    for metric in METRICS:
        if metric not in weights:
            weight = grid_edge_weight(feature, metric, log=metric != "cosine").clamp(max=LARGEST_WEIGHT)
            weights[metric] = torch.where(at_padding, own_weight, weight)
    trees = []
    for name, weight in weights.items():
        tree = grid_tree(weight, height, width, _root(record))
        edge = parent_edges(tree, height, width).clamp(min=0)
        rank = join_ranks(tree, weight, height, width)
        of_parent = weight.gather(1, edge) if weight.shape[1] else torch.zeros_like(edge, dtype=torch.float32)
        trees.append(ExplorerTree(name, *(value[0].cpu().numpy() for value in (tree.parent, rank, of_parent))))
    return tuple(trees)


def _decays(decay: Tensor) -> dict[str, np.ndarray]:
    """(L, D) to the geometric mean over the channels, and telling single channels."""
    mean_over_positions = decay.log().mean(dim=0)
    spread = decay.std(dim=0, unbiased=False)
    chosen = [("reaches farthest", mean_over_positions.argmax()), ("reaches least", mean_over_positions.argmin())]
    varying = spread.argsort(descending=True, stable=True)[:NUM_VARYING]
    titles: dict[int, str] = {}
    for title, channel in [*chosen, *(("varies most", channel) for channel in varying)]:
        titles.setdefault(int(channel), f"channel {int(channel)}, {title}")
    values = {"all channels (geometric mean)": mean_decay(decay[None])[0, :, 0]}
    values |= {title: decay[:, channel] for channel, title in titles.items()}
    return {title: value.cpu().numpy() for title, value in values.items()}
