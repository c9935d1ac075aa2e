"""What CUDA kernels find out about trees before they scan along them: computed once, kept as long as the trees.

The scans of other devices need no cut. A cut is only as good as the vertices it was made from, so it is shared by
several scans only along a tree that ``grid_tree`` or ``graph_tree`` has made, in memory that nobody else has, and while
that stays as it is. Elsewhere a scan has one of its own, which its backward pass uses again.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from grootvl_mm.ops import _library
from grootvl_mm.ops._compat import is_eager, is_exporting

if TYPE_CHECKING:
    from grootvl_mm.ops.tree import Tree

# By the parents of the trees: a Tree is a tuple of two tensors and has no room for more.
_SHARED = WeakTensorKeyDictionary()


class _SharedCut:
    """The cut of a tree, and what it was made under."""

    def __init__(self, order: Tensor) -> None:
        self.order = order
        self._made_under: tuple | None = None
        self._cut: Tensor | None = None

    def of(self, tree: "Tree") -> Tensor:
        """The cut, made again if the tree has been changed in place, or if the one here belongs to another stream."""
        stream = torch.cuda.current_stream(tree.parent.device).cuda_stream if tree.parent.is_cuda else None
        now = (stream, *(None if part.is_inference() else part._version for part in tree))
        if self._cut is None or self._made_under != now:
            self._cut, self._made_under = torch.ops.grootvl.tree_cut(*tree), now
        return self._cut


def share_cut(tree: "Tree") -> None:
    """Let the scans along a fresh tree share its cut."""
    if _may_share(tree.parent):
        _SHARED[tree.parent] = _SharedCut(tree.order)


def cut_of(tree: "Tree") -> Tensor | None:
    """The cut for a scan along a tree, (B, N) int32, or None where it has none.

    Exported and traced programs are for every device, so they have none.
    """
    if tree.parent.device.type not in _library.CUTTING_DEVICES or is_exporting() or torch.jit.is_tracing():
        return None
    if _may_share(tree.parent):
        shared = _SHARED.get(tree.parent)
        if shared is not None and shared.order is tree.order:
            return shared.of(tree)
    return torch.ops.grootvl.tree_cut(tree.parent, tree.order)


def _may_share(parent: Tensor) -> bool:
    """Whether a cut may outlive the scan it was made for.

    Not in a CUDA graph, whose replays change the tree unnoticed, nor where compilers and tracers watch.
    """
    return (
        parent.device.type in _library.CUTTING_DEVICES
        and is_eager(parent)
        and not (parent.is_cuda and torch.cuda.is_current_stream_capturing())
    )
