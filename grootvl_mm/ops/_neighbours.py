"""Fake kernels, gradients, autocast rules and FLOP formulas of layer norm and depth-wise convolution."""

from typing import Any

import torch
from torch import Tensor

from grootvl_mm.ops import reference, reference_neighbours
from grootvl_mm.ops._compat import implement_autocast, register_autograd, register_fake, register_flop_formula
from grootvl_mm.ops._library import NAMESPACE, _operator


@register_fake(f"{NAMESPACE}::layer_norm")
def _(x: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(x, dtype=args[-1], memory_format=torch.contiguous_format)


@register_fake(f"{NAMESPACE}::residual_layer_norm")
def _(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, torch.empty_like(total, dtype=args[-1])


@register_fake(f"{NAMESPACE}::layer_norm_backward")
def _(grad_sum: Tensor | None, grad_normed: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    value, _, weight, _, branch_dtype = args
    grad_x = torch.empty_like(value, memory_format=torch.contiguous_format)
    grad_branch = value.new_empty(0) if branch_dtype is None else torch.empty_like(grad_x, dtype=branch_dtype)
    return grad_x, grad_branch, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


@register_fake(f"{NAMESPACE}::depthwise_conv_silu")
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@register_fake(f"{NAMESPACE}::depthwise_conv_silu_backward")
def _(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), weight.new_empty(weight.shape)


def _save_layer_norm(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, _, ctx.eps, _ = inputs
    ctx.save_for_backward(x, weight)


def _layer_norm_backward(ctx: Any, grad_normed: Tensor) -> tuple:
    x, weight = ctx.saved_tensors
    grad_x, _, *of_parameters = _operator("layer_norm_backward")(None, grad_normed, x, None, weight, ctx.eps, None)
    return grad_x, *of_parameters, None, None


def _save_residual_layer_norm(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, branch, factor, weight, _, ctx.eps, _ = inputs
    # Without a cast or a factor, the gradient of the branch is that of x.
    ctx.branch_dtype = None if branch.dtype == x.dtype and factor is None else branch.dtype
    ctx.normed_dtype = output[1].dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], factor, weight)


def _residual_layer_norm_backward(ctx: Any, grad_sum: Tensor | None, grad_normed: Tensor | None) -> tuple:
    total, factor, weight = ctx.saved_tensors
    if grad_normed is None:
        grad_normed = torch.zeros_like(total, dtype=ctx.normed_dtype)
    grad_x, grad_branch, *of_parameters = _operator("layer_norm_backward")(
        grad_sum, grad_normed, total, factor, weight, ctx.eps, ctx.branch_dtype
    )
    return grad_x, grad_x if ctx.branch_dtype is None else grad_branch, None, *of_parameters, None, None


def _save_layer_norm_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad_sum, grad_normed, value, factor, weight, ctx.eps, ctx.branch_dtype = inputs
    ctx.save_for_backward(grad_sum, grad_normed, value, factor, weight)


def _layer_norm_double_backward(ctx: Any, *grad_grads: Tensor) -> tuple:
    """Double backward through the backward formula in PyTorch operators."""
    grad_sum, grad_normed, value, factor, weight = ctx.saved_tensors
    has_branch, of_sum = ctx.branch_dtype is not None, () if grad_sum is None else (grad_sum,)

    def backward(grad_normed: Tensor, value: Tensor, weight: Tensor, grad_sum: Tensor | None = None) -> tuple:
        grad_x, grad_branch, *of_parameters = reference_neighbours.layer_norm_backward.__wrapped__(
            grad_sum, grad_normed, value, factor, weight, ctx.eps, ctx.branch_dtype
        )
        return (grad_x, grad_branch, *of_parameters) if has_branch else (grad_x, *of_parameters)

    grad_grads = grad_grads if has_branch else (grad_grads[0], *grad_grads[2:])
    of_normed, of_value, of_weight, *of_sum = reference.vjp(backward, (grad_normed, value, weight, *of_sum), grad_grads)
    return of_sum[0] if of_sum else None, of_normed, of_value, None, of_weight, None, None


register_autograd(f"{NAMESPACE}::layer_norm", _layer_norm_backward, setup_context=_save_layer_norm)
register_autograd(
    f"{NAMESPACE}::residual_layer_norm", _residual_layer_norm_backward, setup_context=_save_residual_layer_norm
)
register_autograd(
    f"{NAMESPACE}::layer_norm_backward", _layer_norm_double_backward, setup_context=_save_layer_norm_backward
)


def _save_conv(ctx: Any, inputs: tuple, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _conv_backward(ctx: Any, grad_y: Tensor) -> tuple:
    return _operator("depthwise_conv_silu_backward")(grad_y, *ctx.saved_tensors)


def _conv_double_backward(ctx: Any, *grad_grads: Tensor) -> tuple:
    return reference.vjp(reference_neighbours.depthwise_conv_silu_backward.__wrapped__, ctx.saved_tensors, grad_grads)


register_autograd(f"{NAMESPACE}::depthwise_conv_silu", _conv_backward, setup_context=_save_conv)
register_autograd(f"{NAMESPACE}::depthwise_conv_silu_backward", _conv_double_backward, setup_context=_save_conv)


def _autocast_norm(autocast: torch.dtype, x: Tensor, *inputs: Any) -> tuple:
    """By default, norm a float32 ``x`` into the dtype of autocast, to which the next linear layer would cast."""
    *inputs, dtype = inputs
    return x, *inputs, dtype or (autocast if x.dtype == torch.float32 else x.dtype)


def _autocast_conv(autocast: torch.dtype, x: Tensor, weight: Tensor) -> tuple:
    """Cast like ``F.conv2d``, but keep float64 inputs and the dtype of the weight."""
    return x if x.dtype == torch.float64 else x.to(autocast), weight


for _device_type in ("cpu", "cuda"):
    implement_autocast(f"{NAMESPACE}::layer_norm", _device_type, _autocast_norm)
    implement_autocast(f"{NAMESPACE}::residual_layer_norm", _device_type, _autocast_norm)
    implement_autocast(f"{NAMESPACE}::depthwise_conv_silu", _device_type, _autocast_conv)


# FLOPs per element; a multiply-add counts as two.
_NORM_FLOPS, _RESIDUAL_FLOPS, _TAPS_FLOPS, _SILU_FLOPS = 7, 2, 18, 4


@register_flop_formula(torch.ops.grootvl.layer_norm)
def _(x_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _NORM_FLOPS * x_shape.numel()


@register_flop_formula(torch.ops.grootvl.residual_layer_norm)
def _(x_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return (_RESIDUAL_FLOPS + _NORM_FLOPS) * x_shape.numel()


@register_flop_formula(torch.ops.grootvl.layer_norm_backward)
def _(grad_sum_shape: torch.Size | None, grad_normed_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return (_RESIDUAL_FLOPS + 2 * _NORM_FLOPS) * grad_normed_shape.numel()


@register_flop_formula(torch.ops.grootvl.depthwise_conv_silu)
def _(x_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return (_TAPS_FLOPS + _SILU_FLOPS) * x_shape.numel()


@register_flop_formula(torch.ops.grootvl.depthwise_conv_silu_backward)
def _(grad_y_shape: torch.Size, *args: Any, **kwargs: Any) -> int:
    return (3 * _TAPS_FLOPS + 2 * _SILU_FLOPS) * grad_y_shape.numel()
