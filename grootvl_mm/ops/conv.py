"""The depth-wise convolution of the tree state space layer."""

import torch
from torch import Tensor

from grootvl_mm.ops import _neighbours  # noqa: F401  defines torch.ops.grootvl
from grootvl_mm.ops._checks import check_parameter_dtype, check_same_device, check_tensor, unwatched


def depthwise_conv_silu(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of a depth-wise 3x3 convolution with padding 1 and no bias, channels last.

    ``x`` is read where it lies as long as its channels are neighbours in memory; half of a projection's result needs no
    copy. The backward pass computes the convolution again, so nothing but the inputs is kept. 16-bit inputs are
    computed in float32 and rounded once. Differentiable twice.

    Args:
        x: (B, H, W, D) float32, float64, float16 or bfloat16. Under autocast it is cast as for a convolution.
        weight: (D, 1, 3, 3), as that of ``nn.Conv2d(D, D, 3, groups=D)``; dtype of ``x``, or float32 where ``x`` has 16
            bits.

    Returns:
        (B, H, W, D), dtype of ``x``, contiguous.

    Raises:
        TypeError: an argument is no tensor, or dtypes do not fit together.
        ValueError: shapes or devices do not fit together.
    """
    _check(x, weight)
    return torch.ops.grootvl.depthwise_conv_silu(x, weight)


@unwatched
def _check(x: Tensor, weight: Tensor) -> None:
    check_tensor("x", x, "(B, H, W, D)", 4)
    shape = (x.shape[3], 1, 3, 3)
    check_tensor("weight", weight, shape, 4)
    if weight.shape != shape:
        raise ValueError(f"weight must have shape {shape} for x {tuple(x.shape)}, got {tuple(weight.shape)}")
    check_parameter_dtype("weight", weight, x)
    check_same_device(x=x, weight=weight)
