"""The linear layers that oneDNN computes on the CPU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from grootvl_mm.layers.linear import MLP, Linear


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def plain_mlp(x: Tensor, *parameters: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, *parameters[:2])), *parameters[2:])


def assert_equal_with_gradients(layer: nn.Module, plain: Callable[..., Tensor], x: Tensor) -> None:
    """The result, its gradients, and theirs."""
    parameters = tuple(layer.parameters())
    for parameter in parameters:
        nn.init.normal_(parameter)
    actual, expected = layer(x), plain(x, *parameters)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(actual)
    first, first_expected = (
        torch.autograd.grad(y, (x, *parameters), grad, create_graph=True) for y in (actual, expected)
    )
    torch.testing.assert_close(first, first_expected, rtol=1e-4, atol=1e-3)
    second, second_expected = (
        torch.autograd.grad(sum(value.sum() for value in values), (x, parameters[0]), allow_unused=True)
        for values in (first, first_expected)
    )
    torch.testing.assert_close(second, second_expected, rtol=1e-3, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=3)


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_linear_equals_pytorch(shape: list, features: int, results: int, bias: bool) -> None:
    layer = Linear(features, results, bias=bias)
    assert_equal_with_gradients(layer, plain_linear, torch.randn(*shape, features, requires_grad=True))


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(1, 20))
def test_mlp_equals_pytorch(shape: list, channels: int) -> None:
    assert_equal_with_gradients(MLP(channels), plain_mlp, torch.randn(*shape, channels, requires_grad=True))


class Normed(nn.Module):
    """A layer of a layer norm, as the backbone's blocks use it."""

    def __init__(self, layer: nn.Module, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-3)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, self.norm)


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-3)


@pytest.mark.parametrize("shape", [(3,), (2, 5), (0, 4)])
def test_layers_of_a_norm_equal_pytorch(shape: tuple) -> None:
    for layer, plain in ((Linear(7, 5, bias=False), plain_linear), (MLP(7), plain_mlp)):
        assert_equal_with_gradients(
            Normed(layer, 7),
            lambda x, weight, bias, *rest, plain=plain: plain(plain_norm(x, weight, bias), *rest),
            torch.randn(*shape, 7, requires_grad=True),
        )


@pytest.mark.parametrize(
    "needs_grad", [(True, True, True), (False, True, True), (True, False, True), (True, True, False)]
)
def test_gradients_of_a_norm_and_a_layer_by_finite_differences(device: torch.device, needs_grad: tuple) -> None:
    """Also where the input, the norm or the layer is frozen."""
    module = Normed(MLP(3), 3).to(device, torch.float64)
    leaves = [torch.randn(2, 3, dtype=torch.float64, device=device), *(p.detach() for p in module.parameters())]
    names = [name for name, _ in module.named_parameters()]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(needs_grad[0 if i == 0 else 1 if names[i - 1].startswith("norm") else 2])

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_only_inputs_and_the_hidden_layer_are_kept() -> None:
    """Neither what the norm returns nor what GELU returns."""
    module, kept = Normed(MLP(8), 8), []
    x = torch.randn(5, 8)
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        module(x)
    assert sum(value.shape == (5, 32) for value in kept) == 1
    assert {value.data_ptr() for value in kept if value.shape == x.shape} == {x.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_pytorchs(device: torch.device, dtype: torch.dtype) -> None:
    layer = MLP(6).to(device, dtype)
    x = torch.randn(3, 6, device=device, dtype=dtype)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), plain_mlp(x, *layer.parameters()))


def test_autocast_has_the_last_word() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Linear(6, 4)(torch.randn(3, 6)).dtype == torch.bfloat16


def test_operations_are_counted_as_those_of_any_linear_layer() -> None:
    layer = MLP(6)
    for gradient in (False, True):
        x = torch.randn(3, 5, 6, requires_grad=gradient)
        with torch.set_grad_enabled(gradient), FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * 15 * 6 * 24 * 2


def test_functional_transforms() -> None:
    layer = Linear(6, 4)
    x = torch.randn(3, 2, 6)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    gradient = torch.func.grad(lambda weight: F.linear(x, weight).square().sum())(layer.weight)
    own = torch.func.grad(
        lambda weight: torch.func.functional_call(layer, {"weight": weight, "bias": torch.zeros(4)}, x).square().sum()
    )(layer.weight.detach())
    torch.testing.assert_close(own, gradient)
