"""The linear layer that oneDNN computes on the CPU."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from grootvl_mm.models.linear import Linear


def plain(layer: Linear) -> Callable[..., Tensor]:
    """The same in PyTorch's own functions."""

    def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight, bias)
        return F.gelu(y) if layer.gelu else y

    return forward


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.booleans(),
)
def test_equals_pytorch_with_first_and_second_gradients(
    shape: list, features: int, results: int, bias: bool, gelu: bool
) -> None:
    layer = Linear(features, results, bias=bias, gelu=gelu)
    x = torch.randn(*shape, features, requires_grad=True)
    parameters = tuple(layer.parameters())
    torch.nn.init.normal_(layer.weight)
    actual, expected = layer(x), plain(layer)(x, *parameters)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(actual)
    first, first_expected = (
        torch.autograd.grad(y, (x, *parameters), grad, create_graph=True) for y in (actual, expected)
    )
    torch.testing.assert_close(first, first_expected, rtol=1e-4, atol=1e-4)
    second, second_expected = (
        torch.autograd.grad(sum(value.square().sum() for value in values), (x, layer.weight))
        for values in (first, first_expected)
    )
    torch.testing.assert_close(second, second_expected, rtol=1e-3, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_pytorchs(device: torch.device, dtype: torch.dtype) -> None:
    layer = Linear(6, 4, bias=True, gelu=True).to(device, dtype)
    x = torch.randn(3, 6, device=device, dtype=dtype)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x), plain(layer)(x, layer.weight, layer.bias))


def test_autocast_has_the_last_word() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Linear(6, 4, bias=True)(torch.randn(3, 6)).dtype == torch.bfloat16


def test_operations_are_counted_as_those_of_any_linear_layer() -> None:
    layer = Linear(6, 4, bias=True, gelu=True)
    for gradient in (False, True):
        x = torch.randn(3, 5, 6, requires_grad=gradient)
        with torch.set_grad_enabled(gradient), FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * 15 * 6 * 4


def test_functional_transforms() -> None:
    layer = Linear(6, 4, bias=True)
    x = torch.randn(3, 2, 6)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    gradient = torch.func.grad(lambda weight: F.linear(x, weight).square().sum())(layer.weight)
    own = torch.func.grad(
        lambda weight: torch.func.functional_call(layer, {"weight": weight, "bias": torch.zeros(4)}, x).square().sum()
    )(layer.weight.detach())
    torch.testing.assert_close(own, gradient)
