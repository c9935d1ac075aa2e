"""Derivatives of higher order, and the transforms of ``torch.func``, of all differentiable operators."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functionalize, grad, hessian, jacrev, vjp, vmap

from grootvl_mm.ops import (
    depthwise_conv_silu,
    grid_edge_weight,
    grid_tree,
    layer_norm,
    residual_layer_norm,
    tree_scan,
    tree_selective_scan,
)

HEIGHT, WIDTH, CHANNELS = 2, 3, 4
SHAPE = (1, HEIGHT * WIDTH, CHANNELS)


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def functions() -> dict[str, Callable[[Tensor], Tensor]]:
    """Each operator as a function of (B, L, D) alone that all of its inputs depend on."""
    torch.manual_seed(0)
    tree = grid_tree(grid_edge_weight(torch.randn(1, 3, HEIGHT, WIDTH)), HEIGHT, WIDTH)
    weight, bias, taps, matrix = draw(CHANNELS), draw(CHANNELS), draw(CHANNELS, 1, 3, 3), draw(CHANNELS, 1)

    def selective(x: Tensor) -> Tensor:
        parameters = {"dt_weight": matrix, "dt_bias": bias, "A_log": weight, "Ds": x[0, 0]}
        norms = ("h_norm_weight", "h_norm_bias", "out_norm_weight", "out_norm_bias")
        parameters |= dict(zip(norms, (weight, bias, x[0, 1], weight), strict=True))
        inputs = (x, x[..., :1].sin(), x[..., 1:2].cos(), x[..., 2:3], x + 1)
        return tree_selective_scan(*inputs, **parameters, tree=tree, eps=0.1)

    return {
        "tree_scan": lambda x: tree_scan(x.sin(), x.sigmoid(), tree),
        "tree_selective_scan": selective,
        "layer_norm": lambda x: layer_norm(x, x[0, 0], bias, 0.1),
        "residual_layer_norm": lambda x: sum(residual_layer_norm(x, x.sin(), x[0, 0], bias, 0.1)),
        "depthwise_conv_silu": lambda x: depthwise_conv_silu(x.view(1, HEIGHT, WIDTH, -1), taps * x[0, 0, 0]),
    }


FUNCTIONS = functions()
each = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def loss_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    weight = torch.linspace(-1, 1, HEIGHT * WIDTH * CHANNELS, dtype=torch.float64)
    return lambda x: (function(x).flatten() * weight).sum()


@each
def test_third_derivatives(function: Callable) -> None:
    loss, direction = loss_of(function), draw(*SHAPE)

    def second(x: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
        return torch.autograd.grad((first * direction).sum(), x, create_graph=True)[0]

    assert torch.autograd.gradcheck(second, draw(*SHAPE).requires_grad_())


@each
def test_transforms_in_reverse_mode(function: Callable) -> None:
    loss, direction = loss_of(function), draw(*SHAPE)
    x = draw(*SHAPE).requires_grad_()
    (first,) = torch.autograd.grad(loss(x), x, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), x)
    first, x = first.detach(), x.detach()

    torch.testing.assert_close(grad(loss)(x), first)
    y, pull = vjp(function, x)
    torch.testing.assert_close(y, function(x))
    (pulled,) = pull(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    torch.testing.assert_close(pulled, first)
    torch.testing.assert_close(vmap(grad(loss))(torch.stack([x, x + 1]))[0], first)
    torch.testing.assert_close(vmap(function)(torch.stack([x + 1, x]))[1], function(x))
    torch.testing.assert_close(grad(lambda x: (grad(loss)(x) * direction).sum())(x), second)
    matrix = jacrev(jacrev(loss))(x).view(x.numel(), -1)
    torch.testing.assert_close(matrix @ direction.flatten(), second.flatten())
    torch.testing.assert_close(functionalize(function)(x), function(x))


@each
def test_forward_mode_is_refused(function: Callable) -> None:
    with pytest.raises((NotImplementedError, RuntimeError), match=r"forward mode|forward-mode|reverse mode"):
        hessian(loss_of(function))(draw(*SHAPE))
