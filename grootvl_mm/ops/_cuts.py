"""Caches the cuts of trees: pieces that CUDA scans process in parallel, computed once per tree.

Scans on other devices need no cut. A cut is valid as long as its tree is not modified. Scans therefore share a cut only
along trees from ``grid_tree`` or ``graph_tree``, whose memory has no other owner, and only until the tree is modified
in place. Along any other tree, each scan computes a separate cut, which its backward pass reuses. So do scans in
inference mode, where tensors do not count their modifications.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from grootvl_mm.ops import _library
from grootvl_mm.ops._compat import is_eager, is_exporting

if TYPE_CHECKING:
    from grootvl_mm.ops.tree import Tree

# Keyed by Tree.parent, since a Tree is a plain tuple that cannot hold its cut.
_SHARED = WeakTensorKeyDictionary()


class _SharedCut:
    """The cut of a tree, with the stream that it was computed on."""

    def __init__(self, tree: "Tree", cut: Tensor | None) -> None:
        self.order = tree.order
        self._versions = _versions(tree)
        self._cut = None if cut is None else (_stream(tree), cut)  # replaced as a whole, for threads

    def of(self, tree: "Tree") -> Tensor:
        """The cut, recomputed if the current stream is another one or the tree was ever modified in place.

        A modification that was captured in a CUDA graph increments the version only once, but each replay repeats it.
        """
        if _versions(tree) != self._versions:
            return torch.ops.grootvl.tree_cut(*tree)
        stream, shared = _stream(tree), self._cut
        if shared is None or shared[0] != stream:
            self._cut = shared = stream, torch.ops.grootvl.tree_cut(*tree)
        return shared[1]


def _versions(tree: "Tree") -> tuple[int, ...]:
    return tuple(part._version for part in tree)


def _stream(tree: "Tree") -> int | None:
    # Called twice per tree; torch.cuda.current_stream would create a Python object each time.
    return torch._C._cuda_getCurrentRawStream(tree.parent.get_device()) if tree.parent.is_cuda else None


def share_cut(tree: "Tree", cut: Tensor | None = None) -> None:
    """Let all scans along a newly computed tree share its cut, which is computed when needed if not given."""
    if may_share(tree.parent):
        _SHARED[tree.parent] = _SharedCut(tree, cut)


def cut_of(tree: "Tree") -> Tensor | None:
    """The cut for a scan along a tree, (B, N) int32, or None if the device uses none.

    Also None in exported and traced programs, which must run on any device.
    """
    if tree.parent.device.type not in _library.CUTTING_DEVICES or is_exporting() or torch.jit.is_tracing():
        return None
    if may_share(tree.parent):
        shared = _SHARED.get(tree.parent)
        if shared is not None and shared.order is tree.order:
            return shared.of(tree)
    return torch.ops.grootvl.tree_cut(tree.parent, tree.order)


def may_share(tensor: Tensor) -> bool:
    """Whether scans may share the cut of a tree that is, or is computed from, a tensor.

    Not during CUDA graph capture, since replays change the tree without changing its version, nor in inference mode,
    compilers and tracers.
    """
    return (
        tensor.device.type in _library.CUTTING_DEVICES
        and is_eager(tensor)
        and not (tensor.is_inference() or torch.is_inference_mode_enabled())
        and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )
