"""layer_norm and residual_layer_norm, their gradients and their checks."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grootvl_mm.ops import layer_norm, reference_neighbours, residual_layer_norm
from tests.helpers.marks import HALVES
from tests.helpers.threads import assert_same_with_any_number_of_threads
from tests.helpers.trees import SEEDS

EPS = 1e-6
BACKWARD = torch.ops.grootvl.layer_norm_backward
# Few and many, in packs and not, up to the widest rows of the kernels' own and beyond.
CHANNELS = (2, 3, 8, 40, 80, 160, 516, 640, 1000, 1024, 1028)
PRECISIONS = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Dtypes of x, and of the branch and the result beside it.
DTYPES = [(dtype, dtype) for dtype in PRECISIONS] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]


def sample(shape: tuple[int, ...], seed: int, dtype: torch.dtype, narrow: torch.dtype) -> dict[str, Tensor]:
    """Inputs far from the origin, as residual streams are, and a factor for each sample."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, mean: float = 0.0) -> Tensor:
        return mean + torch.randn(shape, generator=generator, dtype=torch.float64)

    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": normal(*shape, mean=3.0).to(dtype),
        "branch": normal(*shape).to(narrow),
        "weight": normal(shape[-1], mean=1.0).to(parameters),
        "bias": normal(shape[-1]).to(parameters),
        "factor": torch.rand(shape[0], generator=generator).to(parameters),
    }


def exact(value: Tensor) -> Tensor:
    return value.detach().cpu().double()


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal to the precision of a dtype, which is that of the result."""
    assert actual.dtype == dtype
    tolerance = PRECISIONS[dtype]
    torch.testing.assert_close(exact(actual), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("dtype", "narrow"), DTYPES)
def test_all_dtypes(device: torch.device, dtype: torch.dtype, narrow: torch.dtype, channels: int) -> None:
    """Values and gradients are those of float64; rows that fill no block, and samples that end within one."""
    inputs = sample((3, 11, channels), channels, dtype, narrow)
    placed = {name: value.to(device) for name, value in inputs.items()}
    normed = layer_norm(placed["x"], placed["weight"], placed["bias"], EPS, narrow)
    parameters = [exact(inputs[name]) for name in ("weight", "bias")]
    close(normed, F.layer_norm(exact(inputs["x"]), (channels,), *parameters, EPS), narrow)

    total, normed = residual_layer_norm(**placed, eps=EPS, dtype=narrow)
    assert total.is_contiguous()
    assert normed.is_contiguous()
    close(total, exact(inputs["x"]) + exact(inputs["factor"]).view(-1, 1, 1) * exact(inputs["branch"]), dtype)
    # What is normed is what was stored.
    close(normed, F.layer_norm(exact(total), (channels,), *parameters, EPS), narrow)

    grad_sum, grad_normed = torch.randn(total.shape).to(dtype), torch.randn(total.shape).to(narrow)
    arguments = (grad_sum, grad_normed, total.cpu(), inputs["factor"], inputs["weight"])
    grads = BACKWARD(*(value.to(device) for value in arguments), EPS, narrow)
    expected = reference_neighbours.layer_norm_backward(*map(exact, arguments), EPS, torch.float64)
    # Sums over rows grow with their number.
    for grad, value, result in zip(grads, expected, (dtype, narrow, *[placed["weight"].dtype] * 2), strict=True):
        assert grad.dtype == result
        assert (exact(grad) - value).norm() <= PRECISIONS[result] * value.norm() + 1e-12


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 70), SEEDS, st.booleans(), st.booleans())
def test_equals_the_reference(rows: int, channels: int, seed: int, has_factor: bool, has_grad_sum: bool) -> None:
    inputs = sample((rows, channels), seed, torch.float64, torch.float64)
    factor = inputs["factor"] if has_factor else None
    arguments = (inputs["x"], inputs["branch"], factor, inputs["weight"], inputs["bias"], EPS, None)
    expected = reference_neighbours.residual_layer_norm(*arguments)
    torch.testing.assert_close(torch.ops.grootvl.residual_layer_norm(*arguments), expected)
    grads = (expected[1] if has_grad_sum else None, inputs["branch"], expected[0], factor, inputs["weight"], EPS)
    for branch_dtype in (None, torch.float64):
        torch.testing.assert_close(
            BACKWARD(*grads, branch_dtype), reference_neighbours.layer_norm_backward(*grads, branch_dtype)
        )


@pytest.mark.parametrize("channels", [6, 8])
def test_gradients_by_finite_differences(device: torch.device, channels: int) -> None:
    inputs = sample((2, 3, channels), 0, torch.float64, torch.float64)
    factor = inputs.pop("factor").to(device)
    x, branch, *parameters = (value.to(device).requires_grad_() for value in inputs.values())

    def alone(x: Tensor, *parameters: Tensor) -> Tensor:
        return layer_norm(x, *parameters, EPS)

    def residual(*values: Tensor) -> tuple[Tensor, Tensor]:
        return residual_layer_norm(*values, EPS, factor=factor)

    for function, leaves in ((alone, (x, *parameters)), (residual, (x, branch, *parameters))):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("used", [0, 1, (0, 1)], ids=["sum", "normed", "both"])
@pytest.mark.parametrize("has_factor", [False, True])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_gradients_equal_those_of_pytorch(
    device: torch.device, used: int | tuple, has_factor: bool, narrow: torch.dtype
) -> None:
    """Whichever of the results goes on."""
    inputs = {name: value.to(device) for name, value in sample((2, 5, 24), 0, torch.float32, narrow).items()}
    factor = inputs.pop("factor")
    leaves = [value.requires_grad_() for value in inputs.values()]
    x, branch, weight, bias = leaves
    ours = residual_layer_norm(*leaves, EPS, factor=factor if has_factor else None)
    total = x + (factor.view(-1, 1, 1) * branch if has_factor else branch)
    theirs = (total, F.layer_norm(total, (24,), weight, bias, EPS))
    grads = torch.randn(2, 2, 5, 24, device=device)
    chosen = [used] if isinstance(used, int) else used
    actual, expected = (
        torch.autograd.grad([results[i] for i in chosen], leaves, [grads[i] for i in chosen], allow_unused=used == 0)
        for results in (ours, theirs)
    )
    for mine, other in zip(actual, expected, strict=True):
        other = torch.zeros_like(mine) if other is None else other
        torch.testing.assert_close(mine, other, rtol=1e-2 if mine.dtype == narrow != torch.float32 else 1e-4, atol=1e-4)


def test_a_single_channel_is_all_bias(device: torch.device) -> None:
    x, weight, bias, grad = (torch.randn(shape, device=device) for shape in ((5, 1), (1,), (1,), (5, 1)))
    torch.testing.assert_close(layer_norm(x, weight, bias, EPS), bias.expand(5, 1))
    grad_x, _, grad_weight, grad_bias = BACKWARD(None, grad, x, None, weight, EPS, None)
    # The gradient is 0 but for the rounding of what is divided by the root of eps.
    torch.testing.assert_close(grad_x, torch.zeros_like(x), rtol=0, atol=1e-3)
    torch.testing.assert_close(grad_weight, torch.zeros_like(weight), rtol=0, atol=1e-6)
    torch.testing.assert_close(grad_bias, grad.sum(0))


def test_large_means_cost_no_precision(device: torch.device) -> None:
    """The variance is that of differences from the mean."""
    x = torch.randn(7, 64, device=device) + 1e4
    ones, zeros = torch.ones(64, device=device), torch.zeros(64, device=device)
    expected = F.layer_norm(exact(x), (64,), eps=EPS)
    # Float32 numbers near 1e4 are 1e-3 apart, and the mean is one of them.
    torch.testing.assert_close(exact(layer_norm(x, ones, zeros, EPS)), expected, rtol=1e-3, atol=2e-3)


def test_any_strides(device: torch.device) -> None:
    """Slices, transposed and shifted tensors, and gradients of a sum, which have no memory of their own."""
    inputs = {name: value.to(device) for name, value in sample((2, 6, 16), 0, torch.float32, torch.float32).items()}
    plain = [inputs[name] for name in ("x", "branch", "weight", "bias")]
    expected = residual_layer_norm(*plain, EPS)
    strided = [
        torch.cat([inputs["x"]] * 2, -1)[..., 16:],
        inputs["branch"].transpose(0, 1).contiguous().transpose(0, 1),
        torch.stack([inputs["weight"]] * 2, 1)[:, 1],
        # Not where packs may be loaded from.
        torch.cat([inputs["bias"][:1], inputs["bias"]])[1:],
    ]
    before = [value.clone() for value in strided]
    for actual, value in zip(residual_layer_norm(*strided, EPS), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(value, copy) for value, copy in zip(strided, before, strict=True))
    leaves = [value.detach().requires_grad_() for value in plain]
    total, normed = residual_layer_norm(*leaves, EPS)
    (total.sum() + normed.sum()).backward()
    torch.testing.assert_close(leaves[3].grad, torch.full((16,), 12.0, device=device))
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 3, 0)])
def test_empty(device: torch.device, shape: tuple) -> None:
    inputs = sample(shape, 0, torch.float32, torch.float32)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    factor = inputs.pop("factor")
    leaves = [value.requires_grad_() for value in inputs.values()]
    total, normed = residual_layer_norm(*leaves, factor=factor)
    assert total.shape == normed.shape == shape
    (total.sum() + normed.sum()).backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


def test_a_single_row_and_a_vector(device: torch.device) -> None:
    x, one = torch.randn(80, device=device), torch.ones(80, device=device)
    torch.testing.assert_close(layer_norm(x, one, one), F.layer_norm(x, (80,), one, one))
    torch.testing.assert_close(layer_norm(x[None], one, one), F.layer_norm(x[None], (80,), one, one))


@pytest.mark.parametrize("autocast", HALVES)
def test_autocast_norms_into_its_own_dtype(device: torch.device, autocast: torch.dtype) -> None:
    """And leaves the residual stream as it is."""
    inputs = sample((2, 9, 32), 0, torch.float32, autocast)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    parameters = (inputs["weight"], inputs["bias"])
    with torch.autocast(device.type, dtype=autocast):
        total, normed = residual_layer_norm(**inputs)
        alone = layer_norm(inputs["x"], *parameters)
        wide = layer_norm(inputs["x"], *parameters, dtype=torch.float32)
        narrow = layer_norm(inputs["x"].to(autocast), *parameters)
        double = layer_norm(*(value.double() for value in (inputs["x"], *parameters)))
    assert (total.dtype, normed.dtype, alone.dtype, narrow.dtype) == (torch.float32, autocast, autocast, autocast)
    assert (wide.dtype, double.dtype) == (torch.float32, torch.float64)
    assert torch.equal(total, residual_layer_norm(**inputs)[0])
    assert torch.equal(alone, layer_norm(inputs["x"], *parameters, dtype=autocast))


@pytest.mark.cpu_kernels
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    inputs = sample((4, 1000, 48), 0, torch.float32, torch.bfloat16)

    def run() -> tuple:
        total, normed = residual_layer_norm(**inputs)
        return total, normed, *BACKWARD(total, normed, total, None, inputs["weight"], EPS, None)

    assert_same_with_any_number_of_threads(run)


INPUTS = sample((2, 3, 4), 0, torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": 1.0}, TypeError, r"x must be a tensor \(..., C\), got float"),
        ({"x": INPUTS["x"].int()}, TypeError, "x must be of dtype float32.*got torch.int32"),
        ({"x": INPUTS["x"].half()}, TypeError, "branch must be torch.float16 like x.*got torch.bfloat16"),
        ({"branch": INPUTS["branch"][:1]}, ValueError, r"the shape of x \(2, 3, 4\), got \(1, 3, 4\)"),
        ({"branch": INPUTS["branch"].double()}, TypeError, "branch must be torch.float32 like x.*got torch.float64"),
        ({"weight": INPUTS["weight"][:3]}, ValueError, r"weight must have shape \(4,\), got \(3,\)"),
        ({"bias": INPUTS["bias"].half()}, TypeError, "bias must be torch.float32 like x.*got torch.float16"),
        ({"bias": INPUTS["bias"].to("meta")}, ValueError, "on one device.*bias on meta"),
        ({"factor": INPUTS["factor"][:1]}, ValueError, r"factor must have shape \(B\).*got \(1,\)"),
        ({"factor": INPUTS["factor"].clone().requires_grad_()}, ValueError, "multiply branch by it instead"),
        ({"dtype": torch.float64}, TypeError, "dtype must be torch.float32 like x.*got torch.float64"),
    ],
)
def test_bad_input_is_explained(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        residual_layer_norm(**(INPUTS | change))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_row(device: torch.device, value: float) -> None:
    x, weight = torch.randn(7, 40), torch.ones(40)
    x[3, 5] = value
    leaf = x.to(device).requires_grad_()
    y = layer_norm(leaf, weight.to(device), weight.to(device))
    y.sum().backward()
    for rows in (y, leaf.grad):
        finite = rows.isfinite()
        assert finite[[0, 1, 2, 4, 5, 6]].all()
        assert not finite[3].any()
