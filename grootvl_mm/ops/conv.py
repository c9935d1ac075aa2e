"""The depth-wise convolution of the tree state space layer."""

import torch
from torch import Tensor

from grootvl_mm.ops import _neighbours  # noqa: F401  defines torch.ops.grootvl
from grootvl_mm.ops._checks import check_parameter_dtype, check_same_device, check_tensor, checked, unwatched
from grootvl_mm.ops._compat import call_operator


def depthwise_conv_silu(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of a depth-wise 3x3 convolution with padding 1 and no bias, in channels-last layout.

    If the channels of ``x`` are contiguous in memory, ``x`` is read without a copy, for example half of a projection's
    result. The backward pass recomputes the convolution, so autograd saves only the inputs. 16-bit inputs are
    computed in float32 and rounded once. Supports derivatives of any order.

    Args:
        x: (B, H, W, D) float32, float64, float16 or bfloat16. Under autocast it is cast like the input of ``F.conv2d``.
        weight: (D, 1, 3, 3), like that of ``nn.Conv2d(D, D, 3, groups=D)``; dtype of ``x``, or float32 if ``x`` is
            16-bit.

    Returns:
        (B, H, W, D), dtype of ``x``, contiguous.

    Raises:
        TypeError: an argument is not a tensor, or the dtypes do not match.
        ValueError: shapes or devices do not match.
    """
    return checked(_check, _convolve, (x, weight))


def _convolve(inputs: tuple[Tensor, Tensor]) -> Tensor:
    return call_operator(torch.ops.grootvl.depthwise_conv_silu.default, *inputs)


@unwatched
def _check(inputs: tuple[Tensor, Tensor]) -> None:
    x, weight = inputs
    check_tensor("x", x, "(B, H, W, D)", 4)
    shape = (x.shape[3], 1, 3, 3)
    check_tensor("weight", weight, shape, 4)
    if weight.shape != shape:
        raise ValueError(f"weight must have shape {shape} for x {tuple(x.shape)}, got {tuple(weight.shape)}")
    check_parameter_dtype("weight", weight, x)
    check_same_device(x=x, weight=weight)
