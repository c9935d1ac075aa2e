"""Records the trees, edge weights and decays of a model while it runs."""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grootvl_mm.layers.padding import Padding
from grootvl_mm.models.grootv import GrootV, Stage
from grootvl_mm.models.tree_ssm import TreeSSM
from grootvl_mm.ops import Tree
from grootvl_mm.ops._checks import unwatched
from grootvl_mm.ops.reference import accumulated, steps_and_decays

_POSITION = re.compile(r"(?:^|\.)stages\.(\d+)\.(?:.*\.)?blocks\.(\d+)(?:\.|$)")


class TreeRecord(NamedTuple):
    """One call of one tree state space layer. Tensors are on the model's device and detached.

    Shapes: B images, D inner channels, L = height * width vertices in row-major order and
    E = (height - 1) * width + height * (width - 1) edges of the grid: first the vertical edges ``(v, v + width)``, then
    the horizontal edges ``(v, v + 1)``, each row by row.

    Attributes:
        name: Name of the layer in the model, such as ``backbone.stages.0.blocks.1.mixer``.
        stage: Index of the stage, from 0; None for a layer outside a backbone.
        block: Index of the block in its stage, from 0; None for a layer outside a backbone.
        height: Rows of the feature map.
        width: Columns of the feature map.
        trees: The trees or paths that the layer scans, each with ``parent`` and ``order``, both (B, L) int32. There is
            one, but two with ``scan='cross'``: the paths by rows and by columns.
        edge_weight: (B, E) float32, weights by the layer's metric as the layer compares them: ``exp(-cos)``, or the
            exponent for the two distances. If padding is ignored, edges at padding weigh 2e38 or more. With
            ``scan='tree'``, ``grid_tree(edge_weight, height, width)`` is the tree; other scans do not use the weights.
        decay: (B, L, D) float32, the factor between each vertex and its parent; the root's is unused.
        scan: ``tree``, ``raster``, ``cross`` or another scan of the layer.
        metric: ``cosine``, ``euclidean`` or ``manhattan``.
        root: ``first`` or ``last`` vertex.
        propagation: ``all``, ``up`` or ``down``.
        tree_sharing: ``stage`` if the blocks of a stage share the tree of the first block, whose weights are then
            recorded; ``block`` otherwise.
        valid_sizes: (B, 2) int64, height and width of each image without padding, in vertices, if the layer ignores
            padding; otherwise None.
    """

    name: str
    stage: int | None
    block: int | None
    height: int
    width: int
    trees: tuple[Tree, ...]
    edge_weight: Tensor
    decay: Tensor
    scan: str
    metric: str
    root: str
    propagation: str
    tree_sharing: str
    valid_sizes: Tensor | None

    @property
    def tree(self) -> Tree:
        """The tree, or the path by rows of a cross scan."""
        return self.trees[0]

    @property
    def stride(self) -> int | None:
        """Stride in pixels of the image; None for a layer outside a backbone."""
        return None if self.stage is None else 4 * 2**self.stage


@contextmanager
def record_trees(model: Any) -> Iterator[list[TreeRecord]]:
    """Record the trees of all tree state space layers while ``model`` runs.

    ::

        with record_trees(model) as trees:
            model(images)
        for record in trees:
            print(record.name, record.tree.depth().max())

    Works for anything with :class:`~grootvl_mm.models.TreeSSM` layers: backbones, detectors, segmenters, classifiers,
    wrappers such as DDP or adapters, inferencers and runners (anything with a ``model``); in training, under autocast
    and with activation checkpointing, whose recomputation is not recorded. The model's results are bitwise the same,
    and all wrappers are removed at the end of the block, also on exceptions. Without recording there is no overhead.
    Compiled models run uncompiled while they are recorded (before torch 2.6, record the original model instead).

    Args:
        model: A module with such layers, or an object whose ``model`` is one.

    Yields:
        A list to which one :class:`TreeRecord` is appended for each block and call, in order. It holds the decays of
        all blocks, about 0.25 GB for GrootV-T and an image of 800x1333: clear it between batches.

    Raises:
        TypeError: ``model`` is not a module and has none, or it has a ``torch.nn.DataParallel`` over several devices.
        ValueError: The model has no such layers; exported and traced programs have none.
    """
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(module, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or have one as attribute model, got {type(model).__name__}")
    if any(isinstance(child, nn.DataParallel) and len(child.device_ids) > 1 for child in module.modules()):
        raise TypeError("DataParallel calls copies of its module, which cannot be recorded; pass its attribute module")
    mixers = {name: child for name, child in module.named_modules() if isinstance(child, TreeSSM)}
    if not mixers:
        raise ValueError(
            f"{type(module).__name__} has no {TreeSSM.__name__} layer, so there are no trees to record; pass a model "
            "with a GrootV backbone, not an exported or traced program"
        )
    stages = [stage for stage in module.modules() if isinstance(stage, Stage) and stage.share_tree]
    sharing = {child for stage in stages for child in stage.modules()}
    recorder = _Recorder()
    watches = []
    try:
        for name, mixer in mixers.items():
            watches += recorder.watch(name, mixer, "stage" if mixer in sharing else "block")
        with _UNCOMPILED:
            yield recorder.records
    finally:
        for watch in reversed(watches):
            watch.remove()


def find_backbone(model: nn.Module) -> GrootV:
    """Find the GrootV backbone in a model, however it is wrapped.

    Raises:
        ValueError: There is none.
    """
    found = next((module for module in model.modules() if isinstance(module, GrootV)), None)
    if found is None:
        kind, backbone = type(model).__name__, type(getattr(model, "backbone", model)).__name__
        raise ValueError(f"this {kind} has no GrootV backbone, but a {backbone}, so there are no trees")
    return found


class _Recorder:
    """The records, and the state of the call being recorded."""

    def __init__(self) -> None:
        self.records: list[TreeRecord] = []
        self.scans: list[tuple[Tree, Tensor]] | None = None  # trees and decays of the current call
        self.decay: Tensor | None = None
        self.weight: Tensor | None = None
        self.built: tuple[Tree, Tensor | None] | None = None  # the last tree built, and its edge weights

    def watch(self, name: str, mixer: TreeSSM, tree_sharing: str) -> list["_Watch"]:
        """Wrap the methods of a layer that build and scan trees."""

        def weigh(original: Callable, feature: Tensor) -> Tensor:
            self.weight = original(feature)
            return self.weight

        def build(original: Callable, feature: Tensor, padding: Padding | None = None) -> Tree:
            self.weight = None
            tree = original(feature, padding)
            if not _is_in_backward():
                self.built = tree, self._cut(self.weight, padding)
            return tree

        def layer(original: Callable, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if _is_in_backward():
                return original(x, *args, **kwargs)
            self.scans = []
            try:
                y = original(x, *args, **kwargs)
                padding = kwargs.get("padding", args[5] if len(args) > 5 else None)
                self.records.append(self._record(name, mixer, tree_sharing, x, padding))
            finally:
                self.scans = None
            return y

        def one_scan(original: Callable, x: Tensor, dt: Tensor, *args: Any) -> Tensor:
            self.decay = None
            y = original(x, dt, *args)
            if self.scans is not None:
                decay = _decay(mixer, dt) if self.decay is None else self.decay.detach().float()
                self.scans.append((args[-1], decay))
            return y

        def given_decays(original: Callable, x: Tensor, decay: Tensor, **kwargs: Any) -> Tensor:
            self.decay = decay
            return original(x, decay, **kwargs)

        watched = {
            "edge_weight": weigh,
            "build_tree": build,
            "selective_scan": layer,
            "_selective_scan": one_scan,
            "_tree_scan": given_decays,
        }
        return [_Watch(mixer, method, around) for method, around in watched.items()]

    @unwatched
    def _record(self, name: str, mixer: TreeSSM, tree_sharing: str, x: Tensor, padding: Padding | None) -> TreeRecord:
        trees = tuple(tree for tree, _ in self.scans)
        position = _POSITION.search(name)
        stage, block = map(int, position.groups()) if position else (None, None)
        weight = None
        # Module wrappers may have copied a shared tree between blocks.
        is_shared = tree_sharing == "stage" and block != 0
        if self.built is not None and (is_shared or self.built[0].parent is trees[0].parent):
            weight = self.built[1]
        if weight is None:  # a path, or a tree passed in by the caller
            weight = self._cut(mixer.edge_weight(x.detach().permute(0, 3, 1, 2)), padding)
            self.built = trees[0], weight
        _, height, width, _ = x.shape
        return TreeRecord(
            name=name,
            stage=stage,
            block=block,
            height=height,
            width=width,
            trees=trees,
            edge_weight=weight,
            decay=self.scans[0][1],
            scan=mixer.scan,
            metric=mixer.tree_metric,
            root=mixer.tree_root,
            propagation=mixer.propagation,
            tree_sharing=tree_sharing,
            valid_sizes=None if padding is None else _valid_sizes(padding),
        )

    @staticmethod
    @unwatched
    def _cut(weight: Tensor | None, padding: Padding | None) -> Tensor | None:
        return weight if weight is None or padding is None else padding.cut(weight)


def _is_in_backward() -> bool:
    """Whether activation checkpointing is recomputing a layer."""
    return torch._C._current_graph_task_id() != -1


class _Watch:
    """Replaces a method of one layer until it is removed."""

    def __init__(self, mixer: TreeSSM, name: str, around: Callable) -> None:
        self.mixer, self.name = mixer, name
        self.around: Callable | None = around
        self.previous = mixer.__dict__.get(name)  # the watch of an enclosing recording
        self.original = getattr(mixer, name)
        setattr(mixer, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.around is None:
            return self.original(*args, **kwargs)
        return self.around(self.original, *args, **kwargs)

    def __reduce__(self) -> tuple:
        """A copy of the model, such as an EMA model, gets its plain method."""
        return getattr, (self.mixer, self.name)

    def remove(self) -> None:
        """Restore the method; overlapping recordings may end in any order."""
        self.around = None
        if self.mixer.__dict__.get(self.name) is not self:
            return
        previous = self.previous
        while isinstance(previous, _Watch) and previous.around is None:
            previous = previous.previous
        if previous is None:
            delattr(self.mixer, self.name)
        else:
            setattr(self.mixer, self.name, previous)


@unwatched
def _decay(mixer: TreeSSM, dt: Tensor) -> Tensor:
    """The decays in the fused operator, which casts its inputs to float32."""
    weight, bias, a_log = (accumulated(value) for value in (mixer.dt_proj.weight, mixer.dt_proj.bias, mixer.A_log))
    with torch.no_grad(), torch.autocast(dt.device.type, enabled=False):
        return steps_and_decays(lambda value: F.linear(value, weight, bias), accumulated(dt), a_log)[1].float()


def _valid_sizes(padding: Padding) -> Tensor:
    inside = padding.valid.squeeze(-1) > 0
    return torch.stack([inside.any(dim=2).sum(dim=1), inside.any(dim=1).sum(dim=1)], dim=1)


class _Uncompiled:
    """A reentrant context, shared by all recordings, in which compiled models run uncompiled."""

    def __init__(self) -> None:
        self.users = 0
        self.stance: Any = None

    def __enter__(self) -> None:
        # Importing the compiler takes seconds; if it is not imported, nothing is compiled.
        if self.users == 0 and "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            self.stance = torch.compiler.set_stance("force_eager")
            self.stance.__enter__()
        self.users += 1

    def __exit__(self, *error: Any) -> None:
        self.users -= 1
        if self.users == 0 and self.stance is not None:
            self.stance.__exit__(*error)
            self.stance = None


_UNCOMPILED = _Uncompiled()
