"""Linear layers by the faster one of the two matrix libraries that PyTorch has for the CPU.

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

    Args:
        in_features: last axis of the input.
        out_features: last axis of the result.
        bias: add a bias.
        gelu: apply the exact GELU to the result.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, gelu: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.gelu = gelu

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Any float32 tensor on the CPU goes to oneDNN, all else to PyTorch's own linear layer."""
        if not _is_for_onednn(x, self.weight):
            y = F.linear(x, self.weight, self.bias)
        elif torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            y = _OneDNNLinear.apply(x, self.weight, self.bias)
        else:
            return _ONEDNN_LINEAR(x, self.weight, self.bias, "gelu" if self.gelu else "none", [], "none")
        return F.gelu(y) if self.gelu else y

    def extra_repr(self) -> str:
        """The sizes, and GELU where it follows."""
        return super().extra_repr() + (", gelu=True" if self.gelu else "")


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


class _OneDNNLinear(torch.autograd.Function):
    """The linear layer with a gradient that oneDNN computes too."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _ONEDNN_LINEAR(x, weight, bias, "none", [], "none")

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        multiply = _OneDNNLinear.apply  # a b^T; differentiable once more
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
