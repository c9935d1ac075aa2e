"""Linear layers, and the MLP made of them, by the faster one of the two matrix libraries that PyTorch has for the CPU.

PyTorch multiplies float32 matrices by MKL, which leaves half of an AMD processor's width unused. oneDNN, which PyTorch
brings for its convolutions, uses all of it, and can apply GELU to what it has just computed. PyTorch's compiler takes
the same operator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, register_flop_formula

# (x, weight, bias, activation, its scalars, its algorithm); not there if PyTorch was built without oneDNN.
_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None

if _ONEDNN_LINEAR is not None and _ONEDNN_LINEAR not in flop_registry:

    @register_flop_formula(_ONEDNN_LINEAR)
    def _(x_shape: torch.Size, weight_shape: torch.Size, *args: object, **kwargs: object) -> int:
        return 2 * x_shape.numel() * weight_shape[0]


class Linear(nn.Linear):
    """A linear layer over the last axis, (..., in_features) to (..., out_features).

    It starts as GrootV's linear layers do: weights truncated normal with deviation 0.02, bias 0.
    """

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Any float32 tensor on the CPU goes to oneDNN, all else to PyTorch's own linear layer."""
        if not _is_for_onednn(x, self.weight):
            return F.linear(x, self.weight, self.bias)
        if _keeps_graph(x, self.weight):
            return _OneDNNLinear.apply(x, self.weight, self.bias)
        return _onednn_linear(x, self.weight, self.bias)


class MLP(nn.Module):
    """Two linear layers with the exact GELU between, over the last axis."""

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = Linear(channels, ratio * channels)
        self.fc2 = Linear(ratio * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        if not _is_for_onednn(x, self.fc1.weight):
            return self.fc2(F.gelu(self.fc1(x)))
        if _keeps_graph(x, self.fc1.weight):
            return _OneDNNLinearOfGELU.apply(self.fc1(x), self.fc2.weight, self.fc2.bias)
        return self.fc2(_onednn_linear(x, self.fc1.weight, self.fc1.bias, "gelu"))


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        _ONEDNN_LINEAR is not None
        and torch.backends.mkldnn.enabled
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        # Subclasses (fake tensors) and tracers know PyTorch's operators only.
        and type(x) is Tensor
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"))
    )


def _keeps_graph(x: Tensor, weight: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    return _ONEDNN_LINEAR(x, weight, bias, activation, [], "none")


class _OneDNNLinear(torch.autograd.Function):
    """The linear layer with a gradient that oneDNN computes too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _onednn_linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return _linear_backward(grad, x, weight, ctx.needs_input_grad)


class _OneDNNLinearOfGELU(torch.autograd.Function):
    """The linear layer of GELU(x). It keeps x alone and applies GELU to it again in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _onednn_linear(F.gelu(x), weight, bias)

    setup_context = _OneDNNLinear.setup_context

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_gelu, grad_weight, grad_bias = _linear_backward(grad, F.gelu(x), weight, ctx.needs_input_grad)
        grad_x = None if grad_gelu is None else torch.ops.aten.gelu_backward(grad_gelu, x)
        return grad_x, grad_weight, grad_bias


def _linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias that are needed; differentiable once more."""
    needs_x, needs_weight, needs_bias = needs
    multiply = _OneDNNLinear.apply  # a b^T
    rows, x_rows = grad.flatten(0, -2).contiguous(), x.flatten(0, -2)
    grad_x = multiply(rows, weight.t(), None).view_as(x) if needs_x else None
    grad_weight = None
    if needs_weight:
        # oneDNN is faster where the result has more columns than rows.
        if weight.shape[0] <= weight.shape[1]:
            grad_weight = multiply(rows.t(), x_rows.t(), None)
        else:
            grad_weight = multiply(x_rows.t(), rows.t(), None).t()
    return grad_x, grad_weight, rows.sum(0) if needs_bias else None
