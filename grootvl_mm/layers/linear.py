"""Faster linear layers on the CPU: float32 matrix products by oneDNN instead of MKL.

On AMD processors, MKL uses only half of the vector width; oneDNN, which PyTorch includes for convolutions, uses all of
it. torch.compile uses the same oneDNN operator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grootvl_mm.layers.calls import call, call_module
from grootvl_mm.layers.untouched import untouched
from grootvl_mm.ops._checks import has_own_kernels
from grootvl_mm.ops._compat import is_autocast_enabled, is_eager, onednn_linear


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``, by oneDNN for plain float32 tensors on the CPU."""
    if not _is_for_onednn(input, weight, bias):
        return F.linear(input, weight, bias)
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in (input, weight, bias)):
        return _OneDNNLinear.apply(input, weight, bias)
    return _multiply(input, weight, bias)


def linear_in_chunks(projection: nn.Module, x: Tensor, chunks: int) -> tuple[Tensor, ...]:
    """``projection(x).chunk(chunks, -1)`` for a projection without a bias.

    On the CPU, an untouched linear layer computes each chunk by a separate product: the chunks are contiguous, and
    their gradients need not be concatenated.
    """
    if (
        is_eager(x)
        and x.device.type == "cpu"
        and untouched(projection, kinds=(nn.Linear,), bias=False)
        and has_own_kernels(x, projection.weight)
    ):
        return tuple(call(F.linear, x, part) for part in projection.weight.chunk(chunks))
    return call_module(projection, x).chunk(chunks, dim=-1)


def linear_gelu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.gelu(F.linear(...))``; without gradients, oneDNN fuses GELU into the product."""
    if torch.is_grad_enabled() or not _is_for_onednn(input, weight, bias):
        return F.gelu(linear(input, weight, bias))
    return onednn_linear(input, weight, bias, "gelu", [], "none")


def _is_for_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.device.type == weight.device.type == "cpu"
        and onednn_linear is not None
        and torch.backends.mkldnn.enabled
        and all(type(value) in (Tensor, torch.nn.Parameter, type(None)) for value in (x, weight, bias))
        and x.dtype == weight.dtype == torch.float32
        and weight.layout == torch.strided
        and weight.dim() == 2
        and (bias is None or (bias.shape == weight.shape[:1] and bias.is_contiguous()))  # oneDNN misreads others
        and x.dim() > 1
        and x.numel() > 0
        and not is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()  # FLOP counters and tracers expect PyTorch's operators
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = onednn_linear(x.reshape(-1, x.shape[-1]), weight, bias, "none", [], "none")
    # Not a differentiable view: autograd forbids in-place changes of such views of a custom function's result.
    return torch.ops.aten._unsafe_view(rows, (*x.shape[:-1], weight.shape[0]))


class _OneDNNLinear(torch.autograd.Function):
    """``y = x weight^T + bias``, with gradients ``dy weight``, ``dy^T x`` and ``sum dy``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _multiply(x, weight, bias)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        # Not flatten, which batched gradients (is_grads_batched) do not support.
        rows, x_rows = (value.reshape(-1, value.shape[-1]) for value in (grad.contiguous(), x))
        grad_x = linear(rows, weight.t()).view_as(x) if needs_x else None
        grad_weight = None
        if needs_weight:
            # oneDNN is faster if the result has at least as many columns as rows.
            if weight.shape[0] <= weight.shape[1]:
                grad_weight = linear(rows.t(), x_rows.t())
            else:
                # Contiguous like PyTorch's, since people call view(-1) on gradients.
                grad_weight = linear(x_rows.t(), rows.t()).t().contiguous()
        return grad_x, grad_weight, rows.sum(0) if needs_bias else None
