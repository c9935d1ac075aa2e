"""Linear layers, and the MLP made of them, by the faster one of the two matrix libraries that PyTorch has for the CPU.

PyTorch multiplies float32 matrices by MKL, which leaves half of an AMD processor's width unused. oneDNN, which PyTorch
brings for its convolutions, uses all of it, and can apply GELU to what it has just computed. PyTorch's compiler takes
the same operator.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grootvl_mm.ops._compat import flop_registry, is_autocast_enabled, is_compiling, register_flop_formula

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

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """The layer of ``x``, or of ``norm(x)``, which is then computed again in the backward pass instead of kept."""
        if norm is None:
            return linear(x, self.weight, self.bias)
        if can_recompute(x, self.weight, norm.weight):
            return _LinearOfNorm.apply(x, norm.weight, norm.bias, norm.eps, self.weight, self.bias)
        return linear(norm(x), self.weight, self.bias)


class MLP(nn.Module):
    """Two linear layers with the exact GELU between, over the last axis."""

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = Linear(channels, ratio * channels)
        self.fc2 = Linear(ratio * channels, channels)

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """(..., C) to (..., C); of ``norm(x)`` if a norm is given, see :class:`Linear`."""
        if can_recompute(x, self.fc1.weight):
            return _LinearOfGELU.apply(self.fc1(x, norm), self.fc2.weight, self.fc2.bias)
        x = x if norm is None else norm(x)
        if _is_for_onednn(x, self.fc1.weight) and not _keeps_graph(x, self.fc1.weight):
            return self.fc2(_onednn_linear(x, self.fc1.weight, self.fc1.bias, "gelu"))
        return self.fc2(F.gelu(self.fc1(x)))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``; any float32 tensor on the CPU goes to oneDNN."""
    if not _is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    if _keeps_graph(x, weight):
        return _OneDNNLinear.apply(x, weight, bias)
    return _onednn_linear(x, weight, bias)


def can_recompute(*values: Tensor) -> bool:
    """Whether a function of own making, which computes again what it does not keep, may take the place of PyTorch's.

    Only where there are gradients, and neither a compiler, which decides that itself, nor a tracer, nor autocast, whose
    rules are for the single operators.
    """
    return _is_eager(values[0]) and _keeps_graph(*values)


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        _ONEDNN_LINEAR is not None
        and torch.backends.mkldnn.enabled
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() > 0
        and _is_eager(x)
    )


def _is_eager(x: Tensor) -> bool:
    # Subclasses (fake tensors) and tracers know PyTorch's operators only.
    if is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor:
        return False
    return not is_autocast_enabled(x.device.type)


def _keeps_graph(*values: Tensor) -> bool:
    return torch.is_grad_enabled() and any(value.requires_grad for value in values)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    if x.stride(-1) == 0:  # an expanded tensor: the oneDNN of torch 2.1 divides by that stride
        x = x.clone(memory_format=torch.contiguous_format)
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
        return linear_backward(grad, x, weight, ctx.needs_input_grad)


class _LinearOfGELU(torch.autograd.Function):
    """The linear layer of GELU(x). It keeps x alone and applies GELU to it again in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear(F.gelu(x), weight, bias)

    setup_context = _OneDNNLinear.setup_context

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        gelu = F.gelu(x)
        if gelu.requires_grad:  # differentiated twice: gelu_backward of torch 2.1 misreads a transposed gradient
            gelu.register_hook(lambda grad: None if grad is None else grad.contiguous())
        grad_gelu, grad_weight, grad_bias = linear_backward(grad, gelu, weight, ctx.needs_input_grad)
        grad_x = None if grad_gelu is None else torch.ops.aten.gelu_backward(grad_gelu, x)
        return grad_x, grad_weight, grad_bias


class _LinearOfNorm(torch.autograd.Function):
    """The linear layer of a layer norm. It keeps x alone and normalises it again in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        return linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight, bias)

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
        x, norm_weight, norm_bias, ctx.eps, weight, _ = inputs
        ctx.save_for_backward(x, norm_weight, norm_bias, weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm_weight, norm_bias, weight = ctx.saved_tensors
        *needs_norm, _, needs_weight, needs_bias = ctx.needs_input_grad
        norm = (x.shape[-1:], norm_weight, norm_bias)
        normed, mean, scale = torch.native_layer_norm(x, *norm, ctx.eps)
        grad_normed, grad_weight, grad_bias = linear_backward(
            grad, normed, weight, (any(needs_norm), needs_weight, needs_bias)
        )
        grads = (None, None, None)
        if grad_normed is not None:
            grads = torch.ops.aten.native_layer_norm_backward(
                grad_normed, x, norm[0], mean, scale, *norm[1:], needs_norm
            )
        return *grads, None, grad_weight, grad_bias


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, needs: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight and bias of a linear layer that are needed; differentiable once more."""
    needs_x, needs_weight, needs_bias = needs
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
