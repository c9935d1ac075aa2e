"""Takes trees, edge weights and decays from a model while it runs."""

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
    """One call of one tree state space layer. Tensors are on the model's device and have no gradient.

    There are B images, D channels inside of the layer, L = height * width vertices in row-major order and
    E = (height - 1) * width + height * (width - 1) edges of the grid: first the vertical edges ``(v, v + width)``, then
    the horizontal edges ``(v, v + 1)``, each row by row.

    Attributes:
        name: of the layer in the model, such as ``backbone.stages.0.blocks.1.mixer``.
        stage: index of the stage, from 0; None for a layer outside of a backbone.
        block: index of the block in its stage, from 0; None for a layer outside of a backbone.
        height: rows of the feature map.
        width: columns of the feature map.
        trees: what the layer scans along, each with ``parent`` and ``order``, both (B, L) int32. One, but two with
            ``scan='cross'``: the paths by rows and by columns.
        edge_weight: (B, E) float32, what the layer's metric says of the features that the tree is built from, as the
            layer compares it: ``exp(-cos)`` or, for the two distances, the exponent itself. Where padding is ignored,
            edges at padding weigh 2e38 or more. With ``scan='tree'``, ``grid_tree(edge_weight, height, width)`` is the
            tree; other scans have the weights, but do not heed them.
        decay: (B, L, D) float32, the factor on the way between each vertex and its parent; the root's is not used.
        scan: ``tree``, ``raster``, ``cross`` or another that the layer knows.
        metric: ``cosine``, ``euclidean`` or ``manhattan``.
        root: ``first`` or ``last`` vertex.
        propagation: ``all``, ``up`` or ``down``.
        tree_sharing: ``stage`` if the layer's stage shares the trees of its first block, whose weights these are then;
            ``block`` otherwise.
        valid_sizes: (B, 2) int64, height and width of each image without padding, in vertices, where the layer ignores
            padding; None elsewhere.
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
        """The tree; of a cross scan, the path by rows."""
        return self.trees[0]

    @property
    def stride(self) -> int | None:
        """Pixels of the image to a vertex, in either direction; None for a layer outside of a backbone."""
        return None if self.stage is None else 4 * 2**self.stage


@contextmanager
def record_trees(model: Any) -> Iterator[list[TreeRecord]]:
    """Record what every tree state space layer scans along while ``model`` runs.

    ::

        with record_trees(model) as trees:
            model(images)
        for record in trees:
            print(record.name, record.tree.depth().max())

    Works for whatever has :class:`~grootvl_mm.models.TreeSSM` inside: backbones, detectors, segmenters, classifiers,
    wrappers such as DDP or adapters, inferencers and runners (anything with a ``model``); in training, under
    autocast and with gradient checkpointing, whose second computation is not recorded. What the model computes stays
    the same to the bit, and nothing is left behind when the block ends, by an exception or not. A model that is not
    recorded pays nothing. Compiled models run uncompiled while they are recorded (before torch 2.6, record the model
    that was compiled instead).

    Args:
        model: a module with layers of this kind, or an object whose ``model`` is one.

    Yields:
        A list that grows by one :class:`TreeRecord` for each block and call, in the order of the calls. It holds the
        decays of all blocks, about 0.25 GB for an image of 800x1333 and GrootV-T: clear it between batches.

    Raises:
        TypeError: ``model`` is no module and has none.
        ValueError: it has no such layer, as exported and traced programs have none.
    """
    module = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(module, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or have one as its model, got {type(model).__name__}")
    mixers = {name: child for name, child in module.named_modules() if isinstance(child, TreeSSM)}
    if not mixers:
        raise ValueError(
            f"{type(module).__name__} has no {TreeSSM.__name__}, so there is no tree to record; give a model with a "
            "GrootV backbone, not an exported or traced program"
        )
    sharing = {child for stage in module.modules() if isinstance(stage, Stage) and stage.share_tree
               for child in stage.modules()}  # fmt: skip
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
    """The GrootV inside of a model, however it is wrapped.

    Raises:
        ValueError: there is none.
    """
    found = next((module for module in model.modules() if isinstance(module, GrootV)), None)
    if found is None:
        kind, backbone = type(model).__name__, type(getattr(model, "backbone", model)).__name__
        raise ValueError(f"no GrootV in this {kind} (its backbone is a {backbone}), so there are no trees")
    return found


class _Recorder:
    """The records, and what is known of the call that is being recorded."""

    def __init__(self) -> None:
        self.records: list[TreeRecord] = []
        self.scans: list[tuple[Tree, Tensor]] | None = None  # of the call, with the decays
        self.decay: Tensor | None = None
        self.weight: Tensor | None = None
        self.built: tuple[Tree, Tensor | None] | None = None  # the newest tree, and the edge weights it was built from

    def watch(self, name: str, mixer: TreeSSM, tree_sharing: str) -> list["_Watch"]:
        """Watch the methods of a layer by which all it does passes."""

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
        # Wrappers of modules may have copied a shared tree on its way from block to block.
        is_shared = tree_sharing == "stage" and block != 0
        if self.built is not None and (is_shared or self.built[0].parent is trees[0].parent):
            weight = self.built[1]
        if weight is None:  # a path, or a tree that came from outside
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
    """Where gradient checkpointing computes a layer a second time."""
    return torch._C._current_graph_task_id() != -1


class _Watch:
    """Stands for a method of one layer until it is removed."""

    def __init__(self, mixer: TreeSSM, name: str, around: Callable) -> None:
        self.mixer, self.name = mixer, name
        self.around: Callable | None = around
        self.previous = mixer.__dict__.get(name)  # the watch of a recording around this one
        self.original = getattr(mixer, name)
        setattr(mixer, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.around is None:
            return self.original(*args, **kwargs)
        return self.around(self.original, *args, **kwargs)

    def __reduce__(self) -> tuple:
        """A copy of the model, as for an average of its weights, has its own plain method."""
        return getattr, (self.mixer, self.name)

    def remove(self) -> None:
        """Recordings may end in another order than that in which they began."""
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
    """The decays of the fused operator, which casts what it gets to float32."""
    weight, bias, a_log = (accumulated(value) for value in (mixer.dt_proj.weight, mixer.dt_proj.bias, mixer.A_log))
    with torch.no_grad(), torch.autocast(dt.device.type, enabled=False):
        return steps_and_decays(lambda value: F.linear(value, weight, bias), accumulated(dt), a_log)[1].float()


def _valid_sizes(padding: Padding) -> Tensor:
    inside = padding.valid.squeeze(-1) > 0
    return torch.stack([inside.any(dim=2).sum(dim=1), inside.any(dim=1).sum(dim=1)], dim=1)


class _Uncompiled:
    """A context, shared by all recordings, in which compiled models run as they were before."""

    def __init__(self) -> None:
        self.users = 0
        self.stance: Any = None

    def __enter__(self) -> None:
        # The compiler takes seconds to import, and nothing is compiled where nobody has.
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
