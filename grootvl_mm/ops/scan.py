"""The tree scan, a linear recurrence along the paths of a spanning tree (sections 3.1 and 3.2 of the paper)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grootvl_mm.ops import _library  # noqa: F401  defines torch.ops.grootvl
from grootvl_mm.ops._checks import (
    FLOATING,
    check_choice,
    check_parameter_dtype,
    check_same_device,
    check_tensor,
    checked,
    unwatched,
)
from grootvl_mm.ops._compat import call_operator, is_autocast_enabled, is_forward_ad
from grootvl_mm.ops._cuts import cut_of
from grootvl_mm.ops.reference import SelectiveScanInputs, selective_scan
from grootvl_mm.ops.tree import Tree

__all__ = ["PROPAGATIONS", "SelectiveScanInputs", "selective_scan", "tree_scan", "tree_selective_scan"]

PROPAGATIONS = ("all", "up", "down")


def tree_scan(x: Tensor, decay: Tensor, tree: Tree, propagation: str = "all") -> Tensor:
    """Tree scan: ``h_i = sum_j S(i, j) x_j``, with S(i, j) the product of the decays on the path from i to j.

    Equation 4 and algorithm 1 of the paper. With ``a_v`` the decay of the edge from v to its parent p, the up pass from
    the leaves to the root computes ``u_v = x_v + sum_{children c} a_c u_c``, and the down pass from the root to the
    leaves computes ``h_v = u_v + a_v (h_p - a_v u_v)``. 16-bit inputs are accumulated in float32. Under autocast, ``x``
    and ``decay`` keep their dtype, or are cast to the wider one if their dtypes differ. Supports reverse-mode
    derivatives of any order.

    Args:
        x: (B, L, D) float32, float64, float16 or bfloat16.
        decay: (B, L, D), same dtype and device as ``x``, usually in (0, 1]. The value at the root is ignored.
        tree: B trees with L vertices, on the same device.
        propagation: ``all`` sums over all vertices; ``up`` over the subtree of each vertex (``h = u``); ``down`` over
            the path from each vertex to the root (``h_v = x_v + a_v h_p``).

    Returns:
        (B, L, D), dtype of ``x``, contiguous.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match, or ``propagation`` is unknown.
        ValueError, RuntimeError: ``tree`` is not a tree in topological order (not checked on CUDA).
        NotImplementedError: an argument has a forward-mode tangent.
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
    """Selective tree scan: a tree state space layer without its projections and convolution (section 3.2 of the paper).

    ``delta = softplus(dt dt_weight^T + dt_bias)``, ``decay = exp(-exp(A_log) delta)``,
    ``h = tree_scan(delta b x, decay, tree)`` and ``y = LayerNorm_out(LayerNorm_h(h) c + Ds x) SiLU(gate)``. The
    backward pass recomputes everything from the inputs, so autograd saves only these. Supports reverse-mode derivatives
    of any order.

    16 bits are used for storage only: with 16-bit activations (``x``, ``dt``, ``b``, ``c``, ``gate``), the result has
    16 bits, but decays and all arithmetic are float32, and each parameter may be float32. Under autocast, activations
    therefore keep their dtype (the widest one if their dtypes differ), and parameters are float32.

    Args:
        x: (B, L, D) float32, float64, float16 or bfloat16; the other activations have the same dtype.
        dt: (B, L, R), low-rank step sizes.
        b: (B, L, 1), input matrix of the state space model with state size 1.
        c: (B, L, 1), output matrix.
        gate: (B, L, D).
        dt_weight: (D, R), dtype of ``x``, or float32 with 16-bit activations; likewise all other parameters.
        dt_bias: (D).
        A_log: (D), logarithm of the negated state matrix.
        Ds: (D), skip connection.
        h_norm_weight: (D).
        h_norm_bias: (D).
        out_norm_weight: (D).
        out_norm_bias: (D).
        tree: B trees with L vertices.
        eps: epsilon of both layer norms.
        propagation: ``all``, ``up`` or ``down``, see :func:`tree_scan`.

    Returns:
        (B, L, D), dtype of ``x``, contiguous.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes or devices do not match, or ``propagation`` is unknown.
        ValueError, RuntimeError: ``tree`` is not a tree in topological order (not checked on CUDA).
        NotImplementedError: an argument has a forward-mode tangent.
    """
    inputs = SelectiveScanInputs(
        *(x, dt, b, c, gate, dt_weight, dt_bias, A_log, Ds),
        *(h_norm_weight, h_norm_bias, out_norm_weight, out_norm_bias),
    )
    return checked(_check_selective_scan, _selective_scan, inputs, tree, eps, propagation)


def _selective_scan(inputs: SelectiveScanInputs, tree: Tree, eps: float, propagation: str) -> Tensor:
    if not tree.parent.device == tree.order.device == inputs.x.device:  # the kernels of another device would be called
        raise ValueError("the trees must be on the device of x")
    dtype = inputs.dt_weight.dtype
    is_mixed = any(parameter.dtype != dtype for parameter in inputs.parameters())
    if is_mixed and not is_autocast_enabled(inputs.x.device.type):
        _check_selective_scan(inputs, tree, eps, propagation)  # before the dtypes change
        wide = (parameter.float() for parameter in inputs.parameters())
        inputs = SelectiveScanInputs(*inputs.activations(), *wide)
    operator = torch.ops.grootvl.tree_selective_scan.default
    return call_operator(operator, *inputs, tree.parent, tree.order, eps, propagation, cut_of(tree))


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
def _check_selective_scan(inputs: SelectiveScanInputs, tree: Tree, eps: float, propagation: str) -> None:
    check_choice("propagation", propagation, PROPAGATIONS)
    x, dt_weight = inputs.x, inputs.dt_weight
    check_tensor("x", x, "(B, L, D)", 3)
    check_tensor("dt_weight", dt_weight, "(D, R)", 2)
    batch, vertices, channels = x.shape
    # Dynamo of PyTorch 2.6 supports neither the operator | nor the methods of instances here.
    shapes = {
        **dict.fromkeys(SelectiveScanInputs._fields, (channels,)),
        "x": x.shape,
        "dt": (batch, vertices, dt_weight.shape[1]),
        "b": (batch, vertices, 1),
        "c": (batch, vertices, 1),
        "gate": x.shape,
        "dt_weight": (channels, dt_weight.shape[1]),
    }
    is_cast = is_autocast_enabled(x.device.type)
    activations = SelectiveScanInputs._fields[: len(inputs.activations())]
    for (name, shape), value in zip(shapes.items(), inputs, strict=True):
        check_tensor(name, value, tuple(shape), len(shape))
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)} for x {tuple(x.shape)}, got {tuple(value.shape)}")
        if is_cast:
            continue
        if name not in activations:
            check_parameter_dtype(name, value, x)
        elif value.dtype != x.dtype:
            raise TypeError(f"{name} must be {x.dtype} like x, got {value.dtype}")
    _check_tree(tree, x)
    check_same_device(**dict(zip(shapes, inputs, strict=True)), parent=tree.parent, order=tree.order)
    _refuse_tangents("tree_selective_scan", inputs)


def _refuse_tangents(name: str, inputs: Sequence[Tensor]) -> None:
    """Raise if an input has a forward-mode tangent, which the operators would silently drop."""
    if is_forward_ad() and any(torch.autograd.forward_ad.unpack_dual(value).tangent is not None for value in inputs):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (torch.func.jvp, jacfwd, dual numbers); use reverse mode: "
            "torch.func.vjp, jacrev, torch.autograd.grad"
        )


def _check_tree(tree: Tree, x: Tensor) -> None:
    """Check that the trees match the batch and the vertices of ``x``."""
    if not isinstance(tree, Tree):
        raise TypeError(f"tree must be a grootvl_mm.ops.Tree, got {type(tree).__name__}")
    for name, vertices in zip(Tree._fields, tree, strict=True):
        check_tensor(f"tree.{name}", vertices, "(B, L)", 2, (torch.int32,))
        if vertices.shape != x.shape[:2]:
            raise ValueError(
                f"tree.{name} must have shape {tuple(x.shape[:2])} for x {tuple(x.shape)}, got {tuple(vertices.shape)}"
            )
