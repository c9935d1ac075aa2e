"""Linear layers by the faster one of the two matrix libraries that PyTorch has for the CPU.

PyTorch multiplies float32 matrices by MKL, which leaves half of an AMD processor's width unused. oneDNN, which PyTorch
brings for its convolutions, uses all of it. PyTorch's compiler takes the same operator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from grootvl_mm.ops._compat import is_autocast_enabled, onednn_linear


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``; plain float32 tensors on the CPU go to oneDNN."""
    if not _is_for_onednn(input, weight, bias):
        return F.linear(input, weight, bias)
    if torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in (input, weight, bias)):
        return _OneDNNLinear.apply(input, weight, bias)
    return onednn_linear(input, weight, bias, "none", [], "none")


def _is_for_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        onednn_linear is not None
        and torch.backends.mkldnn.enabled
        and all(type(value) in (Tensor, torch.nn.Parameter, type(None)) for value in (x, weight, bias))
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.dim() == 2
        and x.numel() > 0
        and not is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()  # counters and tracers of operators know PyTorch's own
    )


class _OneDNNLinear(torch.autograd.Function):
    """``y = x weight^T + bias``; its gradients ``dy weight``, ``dy^T x`` and ``sum dy`` are linear layers again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return onednn_linear(x, weight, bias, "none", [], "none")

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, x_rows = grad.flatten(0, -2).contiguous(), x.flatten(0, -2)
        grad_x = linear(rows, weight.t()).view_as(x) if needs_x else None
        grad_weight = None
        if needs_weight:
            # oneDNN is faster where the result has more columns than rows.
            if weight.shape[0] <= weight.shape[1]:
                grad_weight = linear(rows.t(), x_rows.t())
            else:
                grad_weight = linear(x_rows.t(), rows.t()).t()
        return grad_x, grad_weight, rows.sum(0) if needs_bias else None
