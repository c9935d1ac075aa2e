"""Layer norms by our operators: the values of PyTorch's in the dtypes of PyTorch's, or in those that come next."""

import contextlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grootvl_mm.layers import norm as layers
from grootvl_mm.layers.norm import add_norm, layer_norm, narrow_layer_norm
from grootvl_mm.layers.recompute import lean
from tests.helpers.memory import kept_tensors

HALF = torch.bfloat16


def norm(device: torch.device, dtype: torch.dtype = torch.float32, channels: int = 24) -> nn.LayerNorm:
    module = nn.LayerNorm(channels, eps=1e-6)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.to(device, dtype)


def autocast(device: torch.device, enabled: bool) -> contextlib.AbstractContextManager:
    return torch.autocast(device.type, dtype=HALF, enabled=enabled)


def assert_equal(actual: object, expected: object) -> None:
    """Up to one rounding to 16 bits, where there is one."""
    actual, expected = ([value.detach() for value in values] for values in (actual, expected))
    assert [value.dtype for value in actual] == [value.dtype for value in expected]
    for value, other in zip(actual, expected, strict=True):
        bound = 2e-2 if value.dtype == HALF else 1e-4
        torch.testing.assert_close(value, other, rtol=bound, atol=bound)


@pytest.mark.parametrize(
    ("dtype", "parameters", "is_autocast"),
    [
        (torch.float32, torch.float32, False),
        (torch.float32, torch.float32, True),
        (HALF, HALF, False),
        (HALF, torch.float32, True),
        (torch.float64, torch.float64, False),
    ],
)
def test_equals_pytorchs(device: torch.device, dtype: torch.dtype, parameters: torch.dtype, is_autocast: bool) -> None:
    module = norm(device, parameters)
    x = torch.randn(2, 3, 5, 24, device=device, dtype=dtype, requires_grad=True)
    inputs = (x, (24,), module.weight, module.bias, module.eps)
    results = []
    for function in (layer_norm, F.layer_norm):
        with autocast(device, is_autocast):
            y = function(*inputs)
        results.append([y, *torch.autograd.grad(y.float().pow(3).sum(), (x, *module.parameters()))])
    assert_equal(*results)


def test_writes_what_linear_layers_read(device: torch.device) -> None:
    module, x = norm(device), torch.randn(2, 3, 5, 24, device=device)
    inputs = (x, (24,), module.weight, module.bias, module.eps)
    with autocast(device, True):
        narrow, double = narrow_layer_norm(*inputs), narrow_layer_norm(x.double(), (24,))
        assert_equal([narrow], [F.layer_norm(*inputs).to(HALF)])
    assert double.dtype == torch.float64
    assert_equal([narrow_layer_norm(*inputs)], [F.layer_norm(*inputs)])


def test_what_the_operator_does_not_take(device: torch.device) -> None:
    x, one = torch.randn(2, 3, 24, device=device), torch.ones(24, device=device)
    others = (
        ((24,),),
        ((24,), one),
        ((24,), None, one),
        ((3, 24), torch.ones(3, 24, device=device), torch.ones(3, 24, device=device)),
    )
    for arguments, function in itertools.product(others, (layer_norm, narrow_layer_norm)):
        with autocast(device, True):
            assert_equal([function(x, *arguments)], [F.layer_norm(x, *arguments)])
    with pytest.raises(RuntimeError):
        layer_norm(x, (23,), one, one)


@pytest.mark.parametrize("is_autocast", [False, True])
@pytest.mark.parametrize("branch_dtype", [torch.float32, HALF, torch.float64])
def test_sum_and_norm(device: torch.device, branch_dtype: torch.dtype, is_autocast: bool) -> None:
    """Values, gradients and their dtypes are those of an addition, a norm and a linear layer, watched or not."""
    module, linear = norm(device), nn.Linear(24, 8, device=device)
    if branch_dtype == torch.float64:
        module, linear = module.double(), linear.double()
    x = torch.randn(2, 3, 5, 24, device=device, requires_grad=True)
    branch = torch.randn(2, 3, 5, 24, device=device, dtype=branch_dtype, requires_grad=True)

    def run(fused: bool) -> list[Tensor]:
        with autocast(device, is_autocast), lean(x) if fused else contextlib.nullcontext():
            total, normed = add_norm(x, branch, module) if fused else (x + branch, module(x + branch))
            y = linear(normed)
        results = [total, y]
        if torch.is_grad_enabled():
            loss = total.float().square().sum() + y.float().square().sum()
            results += torch.autograd.grad(loss, (x, branch, *module.parameters()))
        return results

    expected = run(False)
    assert_equal(run(True), expected)
    with torch.no_grad():
        assert_equal(run(True), expected[:2])


def test_a_touched_norm_is_called(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    operator = layers.residual_layer_norm
    monkeypatch.setattr(
        layers, "residual_layer_norm", lambda *args, **kwargs: seen.append(1) or operator(*args, **kwargs)
    )
    module, x = norm(device), torch.randn(2, 3, 5, 24, device=device)
    with autocast(device, True):
        add_norm(x, x, module)
        assert len(seen) == 1
        handle = module.register_forward_hook(lambda module, inputs, output: 0 * output)
        assert not add_norm(x, x, module)[1].any()
        handle.remove()
        add_norm(x, x, nn.Identity())
        add_norm(x, x, nn.LayerNorm(24, elementwise_affine=False))
    assert len(seen) == 1


def test_the_norm_of_a_sum_is_not_kept(device: torch.device) -> None:
    module, linear = norm(device), nn.Linear(24, 8, device=device)
    x = torch.randn(2, 3, 5, 24, device=device, requires_grad=True)
    with kept_tensors() as kept, autocast(device, True), lean(x):
        linear(add_norm(x, x * 2, module)[1])
    own = {parameter.data_ptr() for parameter in (*module.parameters(), *linear.parameters())}
    maps = [value for at, value in kept.items() if at not in own and value.numel() == x.numel()]
    assert [value.dtype for value in maps] == [torch.float32]
