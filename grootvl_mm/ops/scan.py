"""The tree scan: a linear recurrence over all paths of a spanning tree (sections 3.1 and 3.2 of the paper)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grootvl_mm.ops import _library  # noqa: F401  defines torch.ops.grootvl
from grootvl_mm.ops._checks import FLOATING, check_choice, check_same_device, check_tensor, unwatched
from grootvl_mm.ops._compat import is_autocast_enabled, is_forward_ad
from grootvl_mm.ops._cuts import cut_of
from grootvl_mm.ops.reference import SelectiveScanInputs, selective_scan
from grootvl_mm.ops.tree import Tree

__all__ = ["PROPAGATIONS", "SelectiveScanInputs", "selective_scan", "tree_scan", "tree_selective_scan"]

PROPAGATIONS = ("all", "up", "down")


def tree_scan(x: Tensor, decay: Tensor, tree: Tree, propagation: str = "all") -> Tensor:
    """``h_i = sum_j S(i, j) x_j`` with S(i, j) the product of the decays on the tree path from i to j.

    With ``u`` the pass from the leaves to the root, ``u_v = x_v + sum_{children c} a_c u_c``, and ``a_v`` the decay of
    the edge from v to its parent p: ``h_v = u_v + a_v (h_p - a_v u_v)`` (equation 4 and algorithm 1 of the paper).
    16 bits are storage: 16-bit values are read and written as such, and computed in float32. Under autocast nothing is
    cast, but to the wider dtype where ``x`` and ``decay`` differ. Differentiable as often as needed, in reverse mode.

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
    _check_scan(x, decay, tree, propagation)
    return torch.ops.grootvl.tree_scan(x, decay, tree.parent, tree.order, propagation, cut_of(tree))


def tree_selective_scan(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    gate: Tensor,
    *,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    Ds: Tensor,
    h_norm_weight: Tensor,
    h_norm_bias: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    tree: Tree,
    eps: float = 1e-5,
    propagation: str = "all",
) -> Tensor:
    """Everything between the projections of a tree state space layer, in one operator (section 3.2 of the paper).

    ``delta = softplus(dt dt_weight^T + dt_bias)``, ``decay = exp(-exp(A_log) delta)``,
    ``h = tree_scan(delta b x, decay, tree)`` and ``y = LayerNorm_out(LayerNorm_h(h) c + Ds x) SiLU(gate)``. The
    backward pass computes all of it again from the inputs, so nothing else is kept. Differentiable as often
    as needed, in reverse mode.

    16 bits are storage: 16-bit activations (``x``, ``dt``, ``b``, ``c``, ``gate``) are read and the result is written
    as such, all arithmetic and the decays are float32, and parameters may be float32 beside them. Under autocast
    activations therefore keep their dtype (the widest, where they differ) and parameters are float32.

    Args:
        x: (B, L, D) float32, float64, float16 or bfloat16; the other activations have the same dtype.
        dt: (B, L, R), the low-rank step size.
        b: (B, L, 1), input matrix of the state space model, state size 1.
        c: (B, L, 1), output matrix.
        gate: (B, L, D).
        dt_weight: (D, R), dtype of ``x``, or float32 beside 16-bit activations, as the other parameters.
        dt_bias: (D).
        A_log: (D), logarithm of minus the state matrix.
        Ds: (D), skip connection.
        h_norm_weight: (D).
        h_norm_bias: (D).
        out_norm_weight: (D).
        out_norm_bias: (D).
        tree: the trees of the B images with L vertices.
        eps: of both layer norms.
        propagation: ``all``, ``up`` or ``down``, see :func:`tree_scan`.

    Returns:
        (B, L, D), dtype of ``x``, contiguous.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shapes or devices that do not fit together, or an unknown propagation.
        ValueError, RuntimeError: ``tree`` is no tree in topological order (not checked on CUDA).
    """
    inputs = SelectiveScanInputs(
        *(x, dt, b, c, gate, dt_weight, dt_bias, A_log, Ds),
        *(h_norm_weight, h_norm_bias, out_norm_weight, out_norm_bias),
    )
    _check_selective_scan(inputs, tree, propagation)
    return torch.ops.grootvl.tree_selective_scan(*inputs, *tree, eps, propagation, cut_of(tree))


@unwatched
def _check_scan(x: Tensor, decay: Tensor, tree: Tree, propagation: str) -> None:
    check_tensor("x", x, "(B, L, D)", 3)
    check_tensor("decay", decay, "(B, L, D)", 3, FLOATING)
    check_choice("propagation", propagation, PROPAGATIONS)
    if decay.shape != x.shape:
        raise ValueError(f"decay must have the shape of x {tuple(x.shape)}, got {tuple(decay.shape)}")
    _check_tree(tree, x)
    if decay.dtype != x.dtype and not is_autocast_enabled(x.device.type):
        raise TypeError(f"decay must have the dtype of x {x.dtype}, got {decay.dtype}")
    check_same_device(x=x, decay=decay, parent=tree.parent, order=tree.order)
    _refuse_tangents("tree_scan", (x, decay))


@unwatched
def _check_selective_scan(inputs: SelectiveScanInputs, tree: Tree, propagation: str) -> None:
    check_choice("propagation", propagation, PROPAGATIONS)
    x, dt_weight = inputs.x, inputs.dt_weight
    check_tensor("x", x, "(B, L, D)", 3)
    check_tensor("dt_weight", dt_weight, "(D, R)", 2)
    batch, vertices, channels = x.shape
    shapes = dict.fromkeys(inputs._fields, (channels,)) | {
        "x": x.shape,
        "dt": (batch, vertices, dt_weight.shape[1]),
        "b": (batch, vertices, 1),
        "c": (batch, vertices, 1),
        "gate": x.shape,
        "dt_weight": (channels, dt_weight.shape[1]),
    }
    keeps_float32 = x.element_size() == 2 and dt_weight.dtype == torch.float32
    parameter_dtype = torch.float32 if keeps_float32 else x.dtype
    is_cast = is_autocast_enabled(x.device.type)
    dtypes = [x.dtype] * len(inputs.activations()) + [parameter_dtype] * len(inputs.parameters())
    for (name, shape), value, dtype in zip(shapes.items(), inputs, dtypes, strict=True):
        check_tensor(name, value, tuple(shape), len(shape))
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)} for x {tuple(x.shape)}, got {tuple(value.shape)}")
        if value.dtype != dtype and not is_cast:
            beside = f"x {x.dtype}" if dtype == x.dtype else f"x {x.dtype} and dt_weight {dt_weight.dtype}"
            raise TypeError(f"{name} must be {dtype} beside {beside}, got {value.dtype}")
    _check_tree(tree, x)
    check_same_device(**inputs._asdict(), parent=tree.parent, order=tree.order)
    _refuse_tangents("tree_selective_scan", inputs)


def _refuse_tangents(name: str, inputs: Sequence[Tensor]) -> None:
    """The operators would drop them in silence."""
    if is_forward_ad() and any(torch.autograd.forward_ad.unpack_dual(value).tangent is not None for value in inputs):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, dual numbers); use reverse mode: "
            "torch.func.vjp, jacrev, torch.autograd.grad"
        )


def _check_tree(tree: Tree, x: Tensor) -> None:
    """Trees for the images and vertices of ``x``."""
    if not isinstance(tree, Tree):
        raise TypeError(f"tree must be a grootvl_mm.ops.Tree, got {type(tree).__name__}")
    for name, vertices in zip(tree._fields, tree, strict=True):
        check_tensor(f"tree.{name}", vertices, "(B, L)", 2, (torch.int32,))
        if vertices.shape != x.shape[:2]:
            raise ValueError(
                f"tree.{name} must have shape {tuple(x.shape[:2])} for x {tuple(x.shape)}, got {tuple(vertices.shape)}"
            )
