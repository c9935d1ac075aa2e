"""MLP inference on the CPU in pieces of rows, so that the hidden layer stays in the cache."""

import torch
from torch import Tensor, nn

from grootvl_mm.layers.linear import linear, linear_gelu
from grootvl_mm.layers.untouched import untouched
from grootvl_mm.ops._checks import has_own_kernels, unwatched
from grootvl_mm.ops._compat import autocast_dtype, is_autocast_enabled, is_eager

# Hidden values per piece: a few megabytes, which the last-level cache holds. Smaller matrix products are slower.
PIECE = 2**21


def mlp_in_pieces(x: Tensor, fc1: nn.Module, act: nn.Module, fc2: nn.Module) -> Tensor | None:
    """``fc2(act(fc1(x)))`` for (..., C), or None if the modules must be called.

    Applies on the CPU if no gradient is needed, to untouched linear layers around an untouched exact GELU, and if there
    is more than one piece.
    """
    if not (
        is_eager(x)
        and x.device.type == "cpu"
        and not _needs_gradient(x, fc1, fc2)
        and untouched(fc1, fc2, kinds=(nn.Linear,))
        and untouched(act, kinds=(nn.GELU,), bias=None)
        and act.approximate == "none"
    ):
        return None
    inputs = (x, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    dtype = _dtype(*inputs)
    if dtype is None:
        return None
    x, weight1, bias1, weight2, bias2 = (value.to(dtype) for value in inputs)
    y = x.new_empty((*x.shape[:-1], weight2.shape[0]))
    rows = y.numel() // y.shape[-1]
    count = -(-rows // _rows_per_piece(weight1.shape[0]))
    pieces = (value.reshape(rows, -1).split(-(-rows // count)) for value in (x, y))
    for of_x, of_y in zip(*pieces, strict=True):
        of_y.copy_(linear(linear_gelu(of_x, weight1, bias1), weight2, bias2))
    return y


@unwatched
def _needs_gradient(x: Tensor, *layers: nn.Module) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad or any(value.requires_grad for layer in layers for value in layer.parameters())
    )


@unwatched
def _dtype(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> torch.dtype | None:
    """The dtype in which PyTorch would compute, or None if the modules must be called."""
    parameters = (weight1, bias1, weight2, bias2)
    if not (
        has_own_kernels(x, *parameters)
        and x.shape[-1:] == weight1.shape[1:]
        and weight2.shape[1] == weight1.shape[0]
        and x.numel() // max(x.shape[-1], 1) > _rows_per_piece(weight1.shape[0])
    ):
        return None
    dtypes = {value.dtype for value in (x, *parameters)}
    if not is_autocast_enabled("cpu"):
        return x.dtype if dtypes == {x.dtype} else None
    return autocast_dtype("cpu") if dtypes <= {torch.float32, autocast_dtype("cpu")} else None


def _rows_per_piece(hidden: int) -> int:
    return max(1, PIECE // hidden)
