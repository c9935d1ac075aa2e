"""The tree scan: a linear recurrence over all paths of a spanning tree (sections 3.1 and 3.2 of the paper)."""

import torch
from torch import Tensor

from grootvl_mm.ops import _library  # noqa: F401  defines torch.ops.grootvl
from grootvl_mm.ops._checks import FLOATING, check_choice, check_same_device, check_tensor
from grootvl_mm.ops.tree import Tree

PROPAGATIONS = ("all", "up", "down")


def tree_scan(x: Tensor, decay: Tensor, tree: Tree, propagation: str = "all") -> Tensor:
    """``h_i = sum_j S(i, j) x_j`` with S(i, j) the product of the decays on the tree path from i to j.

    With ``u`` the pass from the leaves to the root, ``u_v = x_v + sum_{children c} a_c u_c``, and ``a_v`` the decay of
    the edge from v to its parent p: ``h_v = u_v + a_v (h_p - a_v u_v)`` (equation 4 and algorithm 1 of the paper).
    16-bit inputs are accumulated in float32; under autocast the scan runs in float32. Differentiable twice.

    Args:
        x: (B, L, D) float32, float64, float16 or bfloat16.
        decay: (B, L, D), same dtype and device as ``x``, usually in (0, 1]. The root's is not used.
        tree: the trees of the B images with L vertices, on the same device.
        propagation: ``all`` sums over all vertices; ``up`` only over the subtree below each vertex (``h = u``);
            ``down`` only over the vertices between it and the root (``h_v = x_v + a_v h_p``).

    Returns:
        (B, L, D), dtype of ``x``, contiguous.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shapes, dtypes or devices that do not fit together, or an unknown propagation.
        ValueError, RuntimeError: ``tree`` is no tree in topological order (not checked on CUDA).
    """
    check_tensor("x", x, "(B, L, D)", 3)
    check_tensor("decay", decay, "(B, L, D)", 3, FLOATING)
    check_choice("propagation", propagation, PROPAGATIONS)
    if not isinstance(tree, Tree):
        raise TypeError(f"tree must be a grootvl_mm.ops.Tree, got {type(tree).__name__}")
    if decay.shape != x.shape:
        raise ValueError(f"decay must have the shape of x {tuple(x.shape)}, got {tuple(decay.shape)}")
    for name, vertices in zip(tree._fields, tree, strict=True):
        check_tensor(f"tree.{name}", vertices, "(B, L)", 2, (torch.int32,))
        if vertices.shape != x.shape[:2]:
            raise ValueError(
                f"tree.{name} must have shape {tuple(x.shape[:2])} for x {tuple(x.shape)}, got {tuple(vertices.shape)}"
            )
    if decay.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"decay must have the dtype of x {x.dtype}, got {decay.dtype}")
    check_same_device(x=x, decay=decay, parent=tree.parent, order=tree.order)
    return torch.ops.grootvl.tree_scan(x, decay, tree.parent, tree.order, propagation)
