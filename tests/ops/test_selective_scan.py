"""tree_selective_scan, its gradients and its checks."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grootvl_mm.ops import reference, tree_selective_scan
from grootvl_mm.ops.scan import PROPAGATIONS, SelectiveScanInputs
from tests.helpers.precision import assert_rounded_once, copied_elements
from tests.helpers.threads import assert_same_with_any_number_of_threads
from tests.helpers.trees import SEEDS, SIZES
from tests.helpers.trees import random_selective_scan as sample

NAMES = SelectiveScanInputs._fields
EPS = 1e-5
SCAN = torch.ops.grootvl.tree_selective_scan
BACKWARD = torch.ops.grootvl.tree_selective_scan_backward


def double(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [value.double() for value in inputs.values()]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    bound = {torch.float64: 1e-9, torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    return {"rtol": bound, "atol": bound}


@settings(max_examples=30, deadline=None)
@given(SIZES, st.integers(2, 70), st.integers(1, 9), SEEDS, st.sampled_from(PROPAGATIONS))
def test_equals_the_reference(size: tuple, channels: int, rank: int, seed: int, propagation: str) -> None:
    inputs, tree = sample(2, *size, channels, rank, seed)
    rest = (*tree, EPS, propagation)
    y = tree_selective_scan(**inputs, tree=tree, propagation=propagation)
    torch.testing.assert_close(y, reference.tree_selective_scan(*inputs.values(), *rest))
    grad_y = torch.randn_like(y)
    expected = reference.tree_selective_scan_backward(grad_y, *inputs.values(), *rest)
    torch.testing.assert_close(BACKWARD(grad_y, *inputs.values(), *rest), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("size", "channels", "rank"),
    [((12, 13), 16, 5), ((12, 13), 40, 16), ((5, 6), 40, 17), ((12, 13), 160, 5), ((3, 4), 2560, 80)],
)
def test_all_dtypes(device: torch.device, dtype: torch.dtype, size: tuple, channels: int, rank: int) -> None:
    inputs, tree = sample(2, *size, channels, rank, seed=channels, dtype=dtype)
    placed = {name: value.to(device) for name, value in inputs.items()}
    y = tree_selective_scan(**placed, tree=tree.to(device))
    assert y.dtype == dtype
    assert y.is_contiguous()
    exact = reference.tree_selective_scan(*double(inputs), *tree, EPS, "all")
    torch.testing.assert_close(y.cpu().double(), exact, **tolerance(dtype))
    grad_y = torch.randn_like(inputs["x"])
    grads = BACKWARD(grad_y.to(device), *placed.values(), *tree.to(device), EPS, "all")
    exact_grads = reference.tree_selective_scan_backward(grad_y.double(), *double(inputs), *tree, EPS, "all")
    for name, grad, expected in zip(NAMES, grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        error = (grad.cpu().double() - expected).norm() / expected.norm()
        assert error < tolerance(dtype)["rtol"], name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [32, 37])
def test_parameters_may_be_float32_beside_16_bit_activations(
    device: torch.device, dtype: torch.dtype, channels: int
) -> None:
    inputs, tree = sample(2, 7, 6, channels, 3, seed=1, dtype=torch.float32)
    inputs |= {name: inputs[name].to(dtype) for name in NAMES[:5]}
    leaves = {name: value.to(device).requires_grad_() for name, value in inputs.items()}
    y = tree_selective_scan(**leaves, tree=tree.to(device))
    assert y.dtype == dtype
    grad_y = torch.randn_like(y)
    grads = torch.autograd.grad(y, list(leaves.values()), grad_y, create_graph=True)
    exact = reference.tree_selective_scan(*double(inputs), *tree, EPS, "all")
    torch.testing.assert_close(y.detach().cpu().double(), exact, **tolerance(dtype))
    exact_grads = reference.tree_selective_scan_backward(grad_y.cpu().double(), *double(inputs), *tree, EPS, "all")
    for name, grad, expected in zip(NAMES, grads, exact_grads, strict=True):
        assert grad.dtype == inputs[name].dtype
        error = (grad.detach().cpu().double() - expected).norm() / expected.norm()
        assert error < tolerance(dtype)["rtol"], name
    second = torch.autograd.grad([grads[0].float().square().sum()], [leaves["x"], leaves["Ds"]])
    assert [value.dtype for value in second] == [dtype, torch.float32]
    assert all(value.isfinite().all() for value in second)


def test_some_parameters_may_be_float32(device: torch.device) -> None:
    """As models of 16 bits keep their norms, or the state matrix; it is as if all were."""
    inputs, tree = sample(2, 7, 6, 16, 3, seed=1, dtype=torch.bfloat16)
    some = {name: value.float() if "norm" in name or name == "A_log" else value for name, value in inputs.items()}
    wide = inputs | {name: inputs[name].float() for name in NAMES[5:]}
    results = []
    for values in (some, wide):
        leaves = {name: value.to(device).requires_grad_() for name, value in values.items()}
        y = tree_selective_scan(**leaves, tree=tree.to(device))
        grads = torch.autograd.grad(y.float().square().sum(), list(leaves.values()))
        assert [grad.dtype for grad in grads] == [value.dtype for value in values.values()]
        results.append([y, *(grad.bfloat16() for grad in grads)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_gradients_by_finite_differences(device: torch.device, propagation: str) -> None:
    inputs, tree = sample(2, 2, 3, 4, 2, seed=2)
    leaves = [value.to(device).requires_grad_() for value in inputs.values()]
    placed = tree.to(device)

    def scan(*values: Tensor) -> Tensor:
        return tree_selective_scan(**dict(zip(NAMES, values, strict=True)), tree=placed, propagation=propagation)

    assert torch.autograd.gradcheck(scan, leaves)
    assert torch.autograd.gradgradcheck(scan, leaves)


def test_extreme_steps_and_gates(device: torch.device) -> None:
    """Where softplus, exp and sigmoid run out of range, the result is that of float64."""
    inputs, tree = sample(1, 6, 6, 32, 1, seed=0, dtype=torch.float32)
    inputs["dt_weight"] = torch.ones_like(inputs["dt_weight"])
    inputs["dt_bias"] = torch.zeros_like(inputs["dt_bias"])
    inputs["dt"] = torch.linspace(-60, 100, 36).view(1, 36, 1)
    inputs["gate"] = torch.linspace(-120, 120, 36 * 32).view(1, 36, 32)
    y = tree_selective_scan(**{name: value.to(device) for name, value in inputs.items()}, tree=tree.to(device))
    exact = reference.tree_selective_scan(*double(inputs), *tree, EPS, "all")
    torch.testing.assert_close(y.cpu().double(), exact, rtol=1e-4, atol=1e-4)


def test_slices_of_projections_are_taken_as_they_are(device: torch.device) -> None:
    inputs, tree = sample(2, 5, 4, 24, 3, seed=0, dtype=torch.float32)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    expected = tree_selective_scan(**inputs, tree=tree.to(device))
    joined = torch.cat([inputs["dt"], inputs["b"], inputs["c"]], dim=-1)
    inputs["dt"], inputs["b"], inputs["c"] = joined.split([3, 1, 1], dim=-1)
    inputs["gate"] = torch.cat([inputs["gate"], inputs["gate"]], dim=-1)[..., 24:]
    inputs["x"] = inputs["x"].transpose(0, 1).contiguous().transpose(0, 1)
    before = {name: value.clone() for name, value in inputs.items()}
    assert torch.equal(tree_selective_scan(**inputs, tree=tree.to(device)), expected)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


def test_slices_of_a_flat_buffer(device: torch.device) -> None:
    """Parameters and activations that start anywhere in memory, as flat buffers of parameters make them."""
    inputs, tree = sample(2, 5, 4, 24, 3, seed=0, dtype=torch.float32)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    flat = torch.cat([torch.zeros(1, device=device), *(value.flatten() for value in inputs.values())])
    start, sliced = 1, {}
    for name, value in inputs.items():
        sliced[name] = flat[start : start + value.numel()].view_as(value)
        start += value.numel()
    results = []
    for values in (inputs, sliced):
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        y = tree_selective_scan(**leaves, tree=tree.to(device))
        y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves.values())])
    assert all(map(torch.equal, *results))


def test_strides_of_a_single_vertex(device: torch.device) -> None:
    """A dimension of size 1 may have any stride."""
    inputs, tree = sample(3, 1, 1, 24, 3, seed=0, dtype=torch.float32)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    expected = tree_selective_scan(**inputs, tree=tree.to(device))
    for name in ("x", "gate", "dt", "b", "c"):
        channels = inputs[name].shape[2]
        for stride in (1, 3 * channels, 7):
            strided = inputs[name].as_strided(inputs[name].shape, (channels, stride, 1))
            assert torch.equal(tree_selective_scan(**{**inputs, name: strided}, tree=tree.to(device)), expected)


@pytest.mark.cpu_kernels
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    def run() -> list[torch.Tensor]:
        results = []
        for batch in (1, 5):
            inputs, tree = sample(batch, 20, 27, 48, 3, seed=0, dtype=torch.float32)
            y = tree_selective_scan(**inputs, tree=tree)
            results += [y, *BACKWARD(y, *inputs.values(), *tree, EPS, "all")]
        return results

    assert_same_with_any_number_of_threads(run)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_kept_from_another_call_does_not_show(dtype: torch.dtype) -> None:
    inputs, tree = sample(1, 80, 90, 64, rank=4, seed=0, dtype=dtype)
    bad = {name: torch.full_like(value, torch.nan) for name, value in inputs.items()}
    grad_y = torch.randn_like(inputs["x"])
    results = []
    for _ in range(2):
        results.append(
            (SCAN(*inputs.values(), *tree, EPS, "all"), *BACKWARD(grad_y, *inputs.values(), *tree, EPS, "all"))
        )
        BACKWARD(grad_y, *bad.values(), *tree, EPS, "all")
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    assert all(result.isfinite().all() for result in results[0])


@pytest.mark.cpu_kernels
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is kept on Linux only")
def test_a_forward_pass_frees_what_a_backward_pass_keeps() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    inputs, tree = sample(1, 128, 128, 128, rank=4, seed=0, dtype=torch.float32)
    map_bytes = inputs["x"].nbytes
    small, small_tree = sample(1, 2, 2, 8, rank=1, seed=0, dtype=torch.float32)
    for _ in range(2):  # only the first call loads code
        BACKWARD(inputs["x"], *inputs.values(), *tree, EPS, "all")
        kept = resident_bytes()
        SCAN(*small.values(), *small_tree, EPS, "all")
    assert kept - resident_bytes() > 3 * map_bytes


@pytest.mark.cpu_kernels
@settings(max_examples=15, deadline=None)
@given(
    SIZES,
    st.integers(8, 70),  # fewer make the norms amplify every rounding
    st.integers(1, 9),
    SEEDS,
    st.sampled_from(PROPAGATIONS),
    st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_16_bits_are_rounded_once(
    size: tuple, channels: int, rank: int, seed: int, propagation: str, dtype: torch.dtype
) -> None:
    """Results and gradients are those of float32; the parameters' and their gradients are float32."""
    inputs, tree = sample(2, *size, channels, rank, seed, dtype=torch.float32)
    rest = (*tree, EPS, propagation)
    narrow = [value.to(dtype) if name in NAMES[:5] else value for name, value in inputs.items()]
    wide = [value.float() for value in narrow]
    grad_y = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert_rounded_once(SCAN(*narrow, *rest), SCAN(*wide, *rest))
    exact = BACKWARD(grad_y.float(), *wide, *rest)
    for name, grad, expected in zip(NAMES, BACKWARD(grad_y, *narrow, *rest), exact, strict=True):
        if name in NAMES[:5]:
            assert_rounded_once(grad, expected)
        else:
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_activation_is_cast_or_copied(dtype: torch.dtype) -> None:
    """Not by the operator, nor by its gradient or autocast, also where the inputs are slices of projections."""
    inputs, tree = sample(2, 20, 21, 32, 3, seed=0, dtype=torch.float32)
    leaves = {name: inputs[name].requires_grad_() for name in NAMES[5:]}
    joined = torch.cat([inputs[name] for name in ("dt", "b", "c")], dim=-1).to(dtype)
    both = torch.cat([inputs["gate"], inputs["x"]], dim=-1).to(dtype)
    leaves |= dict(zip(("dt", "b", "c"), (part.requires_grad_() for part in joined.split([3, 1, 1], -1)), strict=True))
    leaves |= {"gate": both[..., :32].requires_grad_(), "x": inputs["x"].to(dtype).requires_grad_()}
    grad_y = torch.randn(inputs["x"].shape).to(dtype)

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = tree_selective_scan(**leaves, tree=tree)
        torch.autograd.grad(y, list(leaves.values()), grad_y)

    assert copied_elements(run) < 2 * 20 * 21 * 3


def test_autocast_casts_no_activation(device: torch.device) -> None:
    inputs, tree = sample(1, 4, 4, 16, 2, seed=0, dtype=torch.float32)
    inputs = {name: value.to(device) for name, value in inputs.items()}
    rounded = inputs | {name: inputs[name].bfloat16() for name in NAMES[:5]}
    placed = tree.to(device)
    expected = tree_selective_scan(**rounded, tree=placed)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert torch.equal(tree_selective_scan(**rounded, tree=placed), expected)
        # 16-bit parameters, as of a model that was cast, are small enough to be cast again.
        halved = rounded | {name: inputs[name].bfloat16() for name in NAMES[5:]}
        assert tree_selective_scan(**halved, tree=placed).dtype == torch.bfloat16
        # The widest activation decides.
        assert tree_selective_scan(**rounded | {"gate": inputs["gate"]}, tree=placed).dtype == torch.float32
    assert expected.dtype == torch.bfloat16


def test_empty_batch_and_single_vertex(device: torch.device) -> None:
    for batch, side in ((0, 3), (2, 1)):
        inputs, tree = sample(batch, side, side, 8, 2, seed=0)
        leaves = {name: value.to(device).requires_grad_() for name, value in inputs.items()}
        y = tree_selective_scan(**leaves, tree=tree.to(device))
        y.sum().backward()
        assert y.shape == inputs["x"].shape
        assert all(value.grad.isfinite().all() for value in leaves.values())


INPUTS, TREE = sample(2, 3, 3, 4, 2, seed=0, dtype=torch.float32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": INPUTS["x"][0]}, ValueError, r"x must have shape \(B, L, D\), got \(9, 4\)"),
        ({"dt": INPUTS["dt"][..., :1]}, ValueError, r"dt must have shape \(2, 9, 2\).*got \(2, 9, 1\)"),
        ({"b": INPUTS["b"][:1]}, ValueError, r"b must have shape \(2, 9, 1\).*got \(1, 9, 1\)"),
        ({"Ds": INPUTS["Ds"][:3]}, ValueError, r"Ds must have shape \(4,\).*got \(3,\)"),
        (
            {"A_log": INPUTS["A_log"].double()},
            TypeError,
            "A_log must be torch.float32 like x, or float32 if x is 16-bit, got torch.float64",
        ),
        (
            {"gate": INPUTS["gate"].half()},
            TypeError,
            "gate must be torch.float32 like x, got torch.float16",
        ),
        (
            {name: INPUTS[name].half() for name in NAMES[:5]} | {"Ds": INPUTS["Ds"].bfloat16()},
            TypeError,
            "Ds must be torch.float16 like x, or float32 if x is 16-bit, got torch.bfloat16",
        ),
        ({"gate": INPUTS["gate"].int()}, TypeError, "gate must be of dtype float32.*got torch.int32"),
        ({"c": INPUTS["c"].to("meta")}, ValueError, "on one device.*c on meta"),
        ({"tree": tuple(TREE)}, TypeError, "must be a grootvl_mm.ops.Tree, got tuple"),
        ({"propagation": "both"}, ValueError, "all, up, down, got 'both'"),
    ],
)
def test_bad_input_is_explained(change: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        tree_selective_scan(**({**INPUTS, "tree": TREE} | change))
