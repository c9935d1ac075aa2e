"""The explorer's data of a block, from the recorded trees of a model."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from grootvl_mm.layers.padding import LARGEST_WEIGHT
from grootvl_mm.models.tree_ssm import TreeSSM
from grootvl_mm.ops import grid_edge_weight, grid_tree
from grootvl_mm.ops.tree import METRICS
from grootvl_mm.visualization.paths import join_ranks, mean_decay, parent_edges
from grootvl_mm.visualization.recorder import TreeRecord

PATHS = ("raster", "cross")  # scans without a tree
NUM_VARYING = 2  # number of channels shown because their decays vary most


class ExplorerTree(NamedTuple):
    """A spanning tree of L positions.

    Attributes:
        metric: ``cosine``, ``euclidean`` or ``manhattan``, or the name of another scan along a tree.
        parent: (L,) int32; the root is its own parent.
        rank: (L,) int64, rank of the edge to the parent, see :func:`~grootvl_mm.visualization.join_ranks`: 1 to L - 1;
            0 for the root.
        edge_weight: (L,) float32, weight of the edge to the parent as the layer compares it: above 1e38 at ignored
            padding. The root's is undefined.
    """

    metric: str
    parent: np.ndarray
    rank: np.ndarray
    edge_weight: np.ndarray


class ExplorerBlock(NamedTuple):
    """One block of a backbone, for one image.

    Attributes:
        stage: Index of the stage, from 0.
        block: Index of the block in its stage, from 0.
        height: Rows of the map.
        width: Columns of the map, L = height * width.
        valid_size: Rows and columns without ignored padding.
        root: Root of the trees, 0 or L - 1.
        scan: The layer's scan, ``tree``, ``raster``, ``cross`` or another.
        propagation: ``all``, ``up`` or ``down``.
        trees: One tree per metric; the layer's own, if it has one, is the first.
        decays: Title of a channel to its decays (L,), float32; the first is the geometric mean over all channels.
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
        """Stride of the map in pixels."""
        return 4 * 2**self.stage


class TreeFeatures:
    """Records the features from which layers build their trees.

    Use it with :func:`~grootvl_mm.visualization.record_trees`::

        with record_trees(model) as records, TreeFeatures(model) as features:
            model(image)
        blocks = explorer_blocks(records, features)

    Args:
        model: A module with :class:`~grootvl_mm.models.TreeSSM` layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: dict[str, Tensor] = {}  # name of a layer to (B, H, W, D)
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> "TreeFeatures":
        for name, module in self.model.named_modules():
            if isinstance(module, TreeSSM):
                # x_proj has the same input as the tree.
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
    """Prepare the blocks of a backbone for the explorer.

    Args:
        records: Records of the model; of several calls, the last is used.
        features: Features of the same call.
        image: Index of the image in the batch.

    Raises:
        ValueError: No layer of a backbone was recorded.
    """
    latest = {(record.stage, record.block): record for record in records if record.stage is not None}
    if not latest:
        raise ValueError(
            f"none of the {len(records)} recorded layers is part of a GrootV backbone; record a whole model"
        )
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
    """The trees of all metrics for features (1, D, H, W), the layer's own first."""
    height, width = record.height, record.width
    own_weight = record.edge_weight[image : image + 1]
    at_padding = own_weight > LARGEST_WEIGHT
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
    """The geometric mean of decays (L, D) over the channels, and some characteristic channels."""
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
