"""The depth-wise convolution of the token mixer."""

import torch.nn.functional as F
from torch import Tensor, nn

from grootvl_mm.layers.calls import call, call_module, call_own
from grootvl_mm.layers.untouched import untouched
from grootvl_mm.ops import depthwise_conv_silu
from grootvl_mm.ops._checks import has_own_kernels, unwatched
from grootvl_mm.ops._compat import is_autocast_enabled, is_eager


def conv_silu(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``SiLU(conv(x))`` for (B, H, W, C): one fused operator if ``conv`` is an untouched depth-wise 3x3 convolution."""
    if is_eager(x) and _is_depthwise(conv) and _is_for_own(x, conv.weight):
        return call_own(depthwise_conv_silu, x, conv.weight)
    return call(F.silu, call_module(conv, x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


@unwatched
def _is_depthwise(conv: nn.Module) -> bool:
    return (
        untouched(conv, kinds=(nn.Conv2d,), bias=False)
        and conv.weight.shape[1:] == (1, 3, 3)
        and conv.in_channels == conv.out_channels
        and (conv.stride, conv.padding, conv.dilation, conv.padding_mode) == ((1, 1), (1, 1), (1, 1), "zeros")
    )


@unwatched
def _is_for_own(x: Tensor, weight: Tensor) -> bool:
    """Whether our kernel supports these inputs, and PyTorch accepts them as well."""
    return (
        has_own_kernels(x, weight)
        and x.dim() == 4
        and x.shape[3] == weight.shape[0]
        and (x.dtype == weight.dtype or (is_autocast_enabled(x.device.type) and weight.element_size() < 8))
    )
