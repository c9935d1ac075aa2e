"""Norm layers."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grootvl_mm.layers.calls import call_module, call_own
from grootvl_mm.layers.untouched import untouched
from grootvl_mm.ops import layer_norm as own_layer_norm
from grootvl_mm.ops import residual_layer_norm
from grootvl_mm.ops._checks import has_own_kernels, unwatched
from grootvl_mm.ops._compat import autocast_dtype, is_autocast_enabled, is_eager


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of feature maps (B, C, H, W); fastest in channels-last memory format."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in any memory format to (B, C, H, W) in channels-last memory format."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``F.layer_norm``; on GPUs our operator, which is twice as fast."""
    if not _is_for_own(input, normalized_shape, weight, bias) or input.device.type != "cuda":
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    if is_autocast_enabled("cuda"):  # F.layer_norm returns float32 under autocast
        return own_layer_norm(input.float(), weight, bias, eps, torch.float32)
    return own_layer_norm(input, weight, bias, eps)


def narrow_layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Layer norm before linear layers: under autocast, its output has the 16-bit dtype to which they would cast it."""
    dtype = _narrow_dtype(input)
    if dtype is not None and _is_for_own(input, normalized_shape, weight, bias):
        return own_layer_norm(input, weight, bias, eps, dtype)
    return layer_norm(input, normalized_shape, weight, bias, eps)


def add_norm(x: Tensor, branch: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """``x + branch`` and its norm before linear layers: one fused operator if possible.

    On the CPU, only under autocast: in float32, PyTorch's operators are as fast.
    """
    if is_eager(x) and untouched(norm, kinds=(nn.LayerNorm,)) and _takes_branch(x, branch, norm):
        dtype = _narrow_dtype(x)
        if dtype is not None or (x.device.type == "cuda" and not is_autocast_enabled("cuda")):
            return call_own(residual_layer_norm, x, branch, norm.weight, norm.bias, norm.eps, dtype=dtype)
    x = x + branch
    return x, call_module(norm, x)


@unwatched
def _takes_branch(x: Tensor, branch: Tensor, norm: nn.LayerNorm) -> bool:
    return (
        _is_for_own(x, norm.normalized_shape, norm.weight, norm.bias)
        and has_own_kernels(x, branch)
        and branch.shape == x.shape
        and torch.promote_types(branch.dtype, x.dtype) == x.dtype
    )


@unwatched
def _narrow_dtype(x: Tensor) -> torch.dtype | None:
    """The autocast dtype if linear layers would cast a norm of ``x`` to it; otherwise None."""
    device_type = x.device.type
    if not is_autocast_enabled(device_type) or x.dtype not in (torch.float32, autocast_dtype(device_type)):
        return None
    return autocast_dtype(device_type)


@unwatched
def _is_for_own(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether it is a norm over the last axis, with shapes and dtypes that PyTorch accepts as well."""
    return (
        has_own_kernels(x, weight, bias)
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and weight.dtype == bias.dtype
        and weight.dtype in (x.dtype, torch.float32)
        and len(normalized_shape) == 1
        and weight.shape == bias.shape == x.shape[-1:] == tuple(normalized_shape)
    )
