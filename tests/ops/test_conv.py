"""depthwise_conv_silu, its gradients and its checks."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grootvl_mm.ops import depthwise_conv_silu, reference_neighbours
from tests.helpers.marks import HALVES
from tests.helpers.threads import assert_same_with_any_number_of_threads
from tests.helpers.trees import SEEDS, SIZES

BACKWARD = torch.ops.grootvl.depthwise_conv_silu_backward
PRECISIONS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def sample(
    batch: int, height: int, width: int, channels: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """x, the weight and the gradient of y."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, height, width, channels)
    x, grad_y = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = torch.randn((channels, 1, 3, 3), generator=generator, dtype=torch.float64)
    return x, weight.to(torch.float64 if dtype == torch.float64 else torch.float32), grad_y


def by_pytorch(x: Tensor, weight: Tensor) -> Tensor:
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1, groups=weight.shape[0])
    return F.silu(y).permute(0, 2, 3, 1)


def exact(value: Tensor) -> Tensor:
    return value.detach().cpu().double()


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize(
    # Odd and even, one row and one column, wider than a segment, more channels than a block has and not in packs.
    ("size", "channels"),
    [((7, 9), 32), ((6, 5), 17), ((1, 1), 8), ((1, 37), 16), ((9, 1), 2), ((3, 50), 40), ((4, 3), 640), ((2, 3), 1030)],
)
def test_all_dtypes(device: torch.device, dtype: torch.dtype, size: tuple, channels: int) -> None:
    x, weight, grad_y = sample(2, *size, channels, dtype=dtype)
    y = depthwise_conv_silu(x.to(device), weight.to(device))
    assert y.dtype == dtype
    assert y.is_contiguous()
    tolerance = PRECISIONS[dtype]
    torch.testing.assert_close(exact(y), by_pytorch(exact(x), exact(weight)), rtol=tolerance, atol=tolerance)
    grads = BACKWARD(*(value.to(device) for value in (grad_y, x, weight)))
    expected = reference_neighbours.depthwise_conv_silu_backward(*map(exact, (grad_y, x, weight)))
    assert [grad.dtype for grad in grads] == [dtype, weight.dtype]
    assert grads[0].is_contiguous()
    torch.testing.assert_close(exact(grads[0]), expected[0], rtol=4 * tolerance, atol=4 * tolerance)
    assert (exact(grads[1]) - expected[1]).norm() <= 2e-5 * expected[1].norm()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), SIZES, st.integers(1, 40), SEEDS)
def test_equals_the_reference(batch: int, size: tuple, channels: int, seed: int) -> None:
    x, weight, grad_y = sample(batch, *size, channels, seed)
    torch.testing.assert_close(depthwise_conv_silu(x, weight), reference_neighbours.depthwise_conv_silu(x, weight))
    expected = reference_neighbours.depthwise_conv_silu_backward(grad_y, x, weight)
    torch.testing.assert_close(BACKWARD(grad_y, x, weight), expected)


def test_reference_backward_is_the_derivative_of_pytorch() -> None:
    x, weight, grad_y = sample(2, 5, 6, 4)
    leaves = (x.requires_grad_(), weight.requires_grad_())
    expected = torch.autograd.grad(by_pytorch(*leaves), leaves, grad_y)
    torch.testing.assert_close(reference_neighbours.depthwise_conv_silu_backward(grad_y, *leaves), expected)


@pytest.mark.parametrize("channels", [2, 3])
def test_gradients_by_finite_differences(device: torch.device, channels: int) -> None:
    x, weight, _ = sample(2, 3, 4, channels)
    leaves = (x.to(device).requires_grad_(), weight.to(device).requires_grad_())
    assert torch.autograd.gradcheck(depthwise_conv_silu, leaves)
    assert torch.autograd.gradgradcheck(depthwise_conv_silu, leaves)


def test_slices_of_projections_are_taken_as_they_are(device: torch.device) -> None:
    """Halves, transposed maps, a slice that begins where no pack may, and gradients without memory of their own."""
    x, weight, grad_y = (value.to(device) for value in sample(2, 5, 6, 16, dtype=torch.float32))
    expected, expected_grads = depthwise_conv_silu(x, weight), BACKWARD(grad_y, x, weight)
    twice = torch.cat([x, x], dim=-1)
    shifted = torch.cat([x[..., :1], x, x[..., :2]], dim=-1)
    strided = (
        *twice.chunk(2, dim=-1),
        shifted[..., 1:17],
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        twice.flip(0)[:, :, :, :16].flip(0),
    )
    for value in strided:
        before = value.clone()
        torch.testing.assert_close(depthwise_conv_silu(value, weight), expected, rtol=1e-6, atol=1e-6)
        for grad, other in zip(BACKWARD(grad_y, value, weight), expected_grads, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-5)
        assert torch.equal(value, before)
    one = torch.ones((), device=device).expand(grad_y.shape)
    actual = BACKWARD(one, x, weight.transpose(2, 3).contiguous().transpose(2, 3))
    torch.testing.assert_close(actual, BACKWARD(one.contiguous(), x, weight), rtol=1e-5, atol=1e-5)


def test_extreme_values(device: torch.device) -> None:
    """Where the exponential overflows, SiLU and its slope are those of float64."""
    weight = torch.zeros(32, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    x = torch.linspace(-200, 200, 2 * 3 * 32).view(1, 2, 3, 32)
    y = depthwise_conv_silu(x.to(device), weight.to(device))
    torch.testing.assert_close(exact(y), F.silu(exact(x)), rtol=1e-5, atol=1e-6)
    grads = BACKWARD(torch.ones_like(x).to(device), x.to(device), weight.to(device))
    expected = reference_neighbours.depthwise_conv_silu_backward(torch.ones_like(exact(x)), exact(x), exact(weight))
    torch.testing.assert_close(exact(grads[0]), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_reaches_its_neighbours_only(device: torch.device, value: float) -> None:
    x, weight, grad_y = sample(1, 5, 40, 24, dtype=torch.float32)
    x[0, 2, 20, 3] = value
    y = depthwise_conv_silu(x.to(device), weight.to(device)).cpu()
    expected = by_pytorch(x, weight)
    # PyTorch makes SiLU(-inf) a NaN, where the limit is 0.
    has_value = ~expected.isnan()
    torch.testing.assert_close(y[has_value], expected[has_value], rtol=1e-5, atol=1e-5)
    is_near = torch.zeros_like(x, dtype=torch.bool)
    is_near[0, 1:4, 19:22, 3] = True
    grad_x = BACKWARD(*(value.to(device) for value in (grad_y, x, weight)))[0].cpu()
    wider = F.max_pool2d(is_near.float().permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1).bool()
    assert grad_x[~wider].isfinite().all()
    if value != value:
        assert torch.equal(y.isnan(), is_near)
        assert grad_x[is_near].isnan().all()


@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8), (2, 3, 4, 0)])
def test_empty(device: torch.device, shape: tuple) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.randn(shape[3], 1, 3, 3, device=device, requires_grad=True)
    y = depthwise_conv_silu(x, weight)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad.shape == shape
    assert not weight.grad.any()


@pytest.mark.parametrize("autocast", HALVES)
def test_autocast_casts_as_a_convolution_does(device: torch.device, autocast: torch.dtype) -> None:
    """But for the weight, which keeps its precision and gets its gradient in it."""
    x, weight, _ = (value.to(device) for value in sample(2, 5, 6, 16, dtype=torch.float32))
    leaves = (x.requires_grad_(), weight.requires_grad_())
    with torch.autocast(device.type, dtype=autocast):
        y = depthwise_conv_silu(*leaves)
        double = depthwise_conv_silu(x.double(), weight.double())
    assert (y.dtype, double.dtype) == (autocast, torch.float64)
    assert torch.equal(y, depthwise_conv_silu(x.to(autocast), weight))
    y.float().sum().backward()
    assert (x.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.cpu_kernels
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, weight, grad_y = sample(2, 70, 33, 48, dtype=torch.float32)
    assert_same_with_any_number_of_threads(lambda: (depthwise_conv_silu(x, weight), *BACKWARD(grad_y, x, weight)))


X, WEIGHT, _ = sample(2, 3, 4, 8, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X[0]}, ValueError, r"x must have shape \(B, H, W, D\), got \(3, 4, 8\)"),
        ({"x": X.int()}, TypeError, "x must be of dtype float32.*got torch.int32"),
        ({"weight": WEIGHT[:7]}, ValueError, r"weight must have shape \(8, 1, 3, 3\).*got \(7, 1, 3, 3\)"),
        ({"weight": WEIGHT.half()}, TypeError, "weight must be torch.float32 like x.*got torch.float16"),
        ({"weight": WEIGHT.to("meta")}, ValueError, "on one device.*weight on meta"),
    ],
)
def test_bad_input_is_explained(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        depthwise_conv_silu(**({"x": X, "weight": WEIGHT} | change))
