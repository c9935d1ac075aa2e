"""Layer norm, optionally fused with the residual connection before it."""

import torch
from torch import Tensor

from grootvl_mm.ops import _neighbours  # noqa: F401  defines torch.ops.grootvl
from grootvl_mm.ops._checks import FLOATING, check_parameter_dtype, check_same_device, check_tensor, checked, unwatched
from grootvl_mm.ops._compat import call_operator


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None) -> Tensor:
    """Layer norm over the last axis, with a choice of the output dtype.

    16-bit inputs are computed in float32. Supports derivatives of any order.

    Args:
        x: (..., C) float32, float64, float16 or bfloat16.
        weight: (C), dtype of ``x``, or float32 if ``x`` is 16-bit.
        bias: (C), likewise.
        eps: added to the variance.
        dtype: dtype of the result: that of ``x``, or a 16-bit dtype if ``x`` is float32. By default that of ``x``; for
            a float32 ``x`` under autocast, that of autocast.

    Returns:
        (..., C), contiguous.

    Raises:
        TypeError: an argument is not a tensor, or the dtypes do not match.
        ValueError: shapes or devices do not match.
    """
    return checked(_check_norm, _norm, (x, weight, bias), eps, dtype)


def residual_layer_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    factor: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Residual connection and layer norm: ``x + factor * branch`` and the layer norm of this sum.

    A 16-bit branch is added to a float32 residual stream without a cast. Supports derivatives of any order, except with
    respect to ``factor``.

    Args:
        x: (B, ..., C) float32, float64, float16 or bfloat16.
        branch: (B, ..., C), dtype of ``x``, or a 16-bit dtype if ``x`` is float32.
        weight: (C), dtype of ``x``, or float32 if ``x`` is 16-bit.
        bias: (C), likewise.
        eps: added to the variance.
        factor: (B), any floating dtype: one factor per sample, as in stochastic depth.
        dtype: dtype of the norm, as in :func:`layer_norm`.

    Returns:
        The sum in the dtype of ``x``, and its layer norm; both (B, ..., C), contiguous.

    Raises:
        TypeError: an argument is not a tensor, or the dtypes do not match.
        ValueError: shapes or devices do not match, or ``factor`` requires a gradient.
    """
    if factor is not None:
        _check_factor(x, factor)
    return checked(_check_residual_norm, _residual_norm, (x, branch, weight, bias), eps, dtype, factor)


def _norm(inputs: tuple[Tensor, Tensor, Tensor], eps: float, dtype: torch.dtype | None) -> Tensor:
    return call_operator(torch.ops.grootvl.layer_norm.default, *inputs, eps, dtype)


def _residual_norm(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], eps: float, dtype: torch.dtype | None, factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    x, branch, weight, bias = inputs
    return call_operator(torch.ops.grootvl.residual_layer_norm.default, x, branch, factor, weight, bias, eps, dtype)


@unwatched
def _check_residual_norm(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor], eps: float, dtype: torch.dtype | None, factor: Tensor | None
) -> None:
    x, branch, weight, bias = inputs
    _check_norm((x, weight, bias), eps, dtype)
    check_tensor("branch", branch, "(B, ..., C)", x.dim())
    if branch.shape != x.shape:
        raise ValueError(f"branch must have the shape of x {tuple(x.shape)}, got {tuple(branch.shape)}")
    _check_dtype("branch", branch.dtype, x)
    check_same_device(x=x, branch=branch)


@unwatched
def _check_factor(x: Tensor, factor: Tensor) -> None:
    _check_rank(x)
    check_tensor("factor", factor, "(B)", 1)
    if x.dim() < 2 or factor.shape[0] != x.shape[0]:
        raise ValueError(f"factor must have shape (B) for x (B, ..., C) {tuple(x.shape)}, got {tuple(factor.shape)}")
    check_same_device(x=x, factor=factor)
    if factor.requires_grad:
        raise ValueError("factor must not require a gradient; multiply branch by it instead")


@unwatched
def _check_norm(inputs: tuple[Tensor, Tensor, Tensor], eps: float, dtype: torch.dtype | None) -> None:
    x, weight, bias = inputs
    _check_rank(x)
    for name, parameter in (("weight", weight), ("bias", bias)):
        check_tensor(name, parameter, "(C)", 1)
        if parameter.shape != x.shape[-1:]:
            raise ValueError(f"{name} must have shape {tuple(x.shape[-1:])}, got {tuple(parameter.shape)}")
        check_parameter_dtype(name, parameter, x)
    check_same_device(x=x, weight=weight, bias=bias)
    if dtype is not None:
        _check_dtype("dtype", dtype, x)


def _check_rank(x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise TypeError(f"x must be a tensor (..., C), got {type(x).__name__}")
    check_tensor("x", x, "(..., C)", x.dim())


def _check_dtype(name: str, dtype: torch.dtype, x: Tensor) -> None:
    if dtype != x.dtype and not (x.dtype == torch.float32 and dtype in FLOATING[2:]):
        raise TypeError(f"{name} must be {x.dtype} like x, or 16-bit if x is float32, got {dtype}")
