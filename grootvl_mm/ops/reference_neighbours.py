"""Layer norm and depth-wise convolution in plain PyTorch: oracle for tests and fallback without the extension."""

import torch
import torch.nn.functional as F
from torch import Tensor

from grootvl_mm.ops.reference import accumulated, backward_kernel, smooth_layer_norm, vjp


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None) -> Tensor:
    """See :func:`grootvl_mm.ops.layer_norm`."""
    value, weight, bias = (accumulated(tensor) for tensor in (x, weight, bias))
    return F.layer_norm(value, x.shape[-1:], weight, bias, eps).to(dtype or x.dtype)


def residual_layer_norm(
    x: Tensor,
    branch: Tensor,
    factor: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`grootvl_mm.ops.residual_layer_norm`."""
    total = (accumulated(x) + _scaled(accumulated(branch), factor)).to(x.dtype)
    return total, layer_norm(total, weight, bias, eps, dtype)


@backward_kernel
def layer_norm_backward(
    grad_sum: Tensor | None,
    grad_normed: Tensor,
    value: Tensor,
    factor: Tensor | None,
    weight: Tensor,
    eps: float,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``value``, the normalized tensor (..., C), of the branch, and of weight and bias (C).

    The gradient of the branch is empty if ``branch_dtype`` is None.
    """

    def norm(value: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return smooth_layer_norm(value, value.shape[-1:], weight, bias, eps)

    inputs = (accumulated(value), accumulated(weight), torch.zeros_like(accumulated(weight)))
    grad_x, grad_weight, grad_bias = vjp(norm, inputs, accumulated(grad_normed))
    if grad_sum is not None:
        grad_x = grad_x + grad_sum
    grad_branch = value.new_empty(0) if branch_dtype is None else _scaled(grad_x, factor).to(branch_dtype, copy=True)
    return grad_x.to(value.dtype), grad_branch, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _scaled(value: Tensor, factor: Tensor | None) -> Tensor:
    """(B, ..., C) times one factor per sample, (B)."""
    if factor is None:
        return value
    return value * factor.to(value.dtype).view(-1, *[1] * (value.dim() - 1))


def depthwise_conv_silu(x: Tensor, weight: Tensor) -> Tensor:
    """See :func:`grootvl_mm.ops.depthwise_conv_silu`."""
    return _plain_conv_silu(accumulated(x), accumulated(weight)).to(x.dtype).contiguous()


def _plain_conv_silu(x: Tensor, weight: Tensor) -> Tensor:
    z = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1, groups=weight.shape[0])
    return F.silu(z).permute(0, 2, 3, 1)


@backward_kernel
def depthwise_conv_silu_backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` (B, H, W, D) and ``weight`` (D, 1, 3, 3)."""
    inputs = (accumulated(x), accumulated(weight))
    grad_x, grad_weight = vjp(_plain_conv_silu, inputs, accumulated(grad_y))
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(weight.dtype).contiguous()
