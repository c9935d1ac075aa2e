"""The linear layer that oneDNN computes on the CPU."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from grootvl_mm.layers.linear import linear, linear_in_chunks


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    *(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.booleans()),
)
def test_equals_pytorch(shape: list, features: int, results: int, bias: bool, expanded: bool) -> None:
    """The result, its gradients, and theirs."""
    x = torch.randn(*shape, 1 if expanded else features).expand(*shape, features).requires_grad_()
    parameters = [torch.randn(results, features, requires_grad=True)]
    parameters += [torch.randn(results, requires_grad=True)] if bias else []
    actual, expected = linear(x, *parameters), F.linear(x, *parameters)
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
        torch.testing.assert_close(linear(x, *parameters), expected, rtol=1e-4, atol=1e-4)


BIASES = {
    "every second value": torch.randn(14)[::2],
    "expanded": torch.randn(1).expand(7),
    "of one value": torch.randn(1),
    "without axes": torch.randn(()),
    "of each row": torch.randn(6, 7),
}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES)
def test_other_biases_are_added_as_by_pytorch(bias: torch.Tensor) -> None:
    """Those that adapters cut out of tables or share."""
    x, weight = torch.randn(6, 5), torch.randn(7, 5)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)], ids=str)
def test_gradients_are_contiguous(shape: tuple[int, int]) -> None:
    """``grad.view(-1)`` is how optimizers and analyses join them."""
    leaves = [torch.randn(3, 5, shape[1], requires_grad=True), torch.randn(shape, requires_grad=True)]
    assert all(grad.is_contiguous() for grad in torch.autograd.grad(linear(*leaves).sum(), leaves))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_pytorchs(device: torch.device, dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 6, device=device, dtype=dtype), torch.randn(4, 6, device=device, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_autocast_has_the_last_word() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear(torch.randn(3, 6), torch.randn(4, 6)).dtype == torch.bfloat16


@pytest.mark.parametrize("gradient", [False, True])
def test_operations_are_counted_as_those_of_any_linear_layer(gradient: bool) -> None:
    with FlopCounterMode(display=False) as counter:
        linear(torch.randn(3, 5, 6, requires_grad=gradient), torch.randn(4, 6))
    assert counter.get_total_flops() == 2 * 15 * 6 * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_chunks_are_those_of_one_product(device: torch.device, dtype: torch.dtype) -> None:
    layer = nn.Linear(6, 8, bias=False).to(device, dtype)
    x = torch.randn(3, 5, 6, device=device, dtype=dtype, requires_grad=True)
    actual, expected = linear_in_chunks(layer, x, 2), layer(x).chunk(2, -1)
    torch.testing.assert_close(actual, expected)
    grads = [torch.randn_like(value) for value in expected]
    leaves = (x, layer.weight)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, grads), torch.autograd.grad(expected, leaves, grads), rtol=0.02, atol=0.02
    )
    assert all(value.is_contiguous() for value in actual) == (device.type == "cpu")


def test_chunks_of_a_layer_with_a_hook() -> None:
    layer = nn.Linear(6, 8, bias=False)
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    x = torch.randn(3, 6)
    assert torch.equal(torch.cat(linear_in_chunks(layer, x, 2), -1), F.linear(x, layer.weight) + 1)
