"""The convolution with its SiLU: one operator where the module is as its class has it, the module otherwise."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from grootvl_mm.layers import conv as layer
from grootvl_mm.layers.conv import conv_silu


class OtherConv(nn.Conv2d):
    """A layer that may do anything."""


def depthwise(channels: int = 6, kind: type[nn.Conv2d] = nn.Conv2d, **options) -> nn.Conv2d:
    return kind(channels, **{"out_channels": channels, "kernel_size": 3, "padding": 1, "groups": channels} | options)


def composed(conv: nn.Module, x: Tensor) -> Tensor:
    return F.silu(conv(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the operator is called with."""
    seen = []
    operator = layer.depthwise_conv_silu

    def spy(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(x)
        return operator(x, weight)

    monkeypatch.setattr(layer, "depthwise_conv_silu", spy)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_the_module_and_silu(device: torch.device, calls: list, dtype: torch.dtype) -> None:
    conv = depthwise(bias=False).to(device, dtype)
    x = torch.randn(2, 5, 4, 12, device=device, dtype=dtype, requires_grad=True)
    results = []
    for function in (conv_silu, composed):
        y = function(conv, x.chunk(2, dim=-1)[0])
        results.append([y, *torch.autograd.grad(y.square().sum(), (x, conv.weight))])
    bounds = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(*results, **bounds)
    assert len(calls) == 1


OTHERS: dict[str, dict] = {
    "bias": {},
    "stride": {"bias": False, "stride": 2},
    "dilation": {"bias": False, "dilation": 2, "padding": 2},
    "kernel": {"bias": False, "kernel_size": 5, "padding": 2},
    "no padding": {"bias": False, "padding": 0},
    "padding in words": {"bias": False, "padding": "same"},
    "padding mode": {"bias": False, "padding_mode": "reflect"},
    "dense": {"bias": False, "groups": 1},
    "two filters a channel": {"bias": False, "out_channels": 12},
    "subclass": {"bias": False, "kind": OtherConv},
}


@pytest.mark.parametrize("options", OTHERS.values(), ids=OTHERS)
def test_other_convolutions_are_called(calls: list, options: dict) -> None:
    conv, x = depthwise(**options), torch.randn(2, 5, 4, 6)
    torch.testing.assert_close(conv_silu(conv, x), composed(conv, x))
    assert not calls


@pytest.mark.parametrize(
    "touch",
    [
        lambda conv: conv.register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda conv: nn.utils.parametrizations.weight_norm(conv),
        lambda conv: setattr(conv, "forward", lambda x: -x),
    ],
    ids=["hook", "weight norm", "own forward"],
)
def test_touched_modules_are_called(calls: list, touch: Callable) -> None:
    conv, x = depthwise(bias=False), torch.randn(2, 5, 4, 6)
    touch(conv)
    torch.testing.assert_close(conv_silu(conv, x), composed(conv, x))
    assert not calls


def test_an_input_that_does_not_fit_is_the_modules_error() -> None:
    for x in (torch.randn(2, 5, 4, 7), torch.randn(2, 5, 4, 6).double()):
        with pytest.raises(RuntimeError):
            conv_silu(depthwise(bias=False), x)


def test_counters_of_operators_see_a_convolution(calls: list) -> None:
    with FlopCounterMode(display=False) as counter:
        conv_silu(depthwise(bias=False), torch.randn(2, 5, 4, 6))
    assert counter.get_total_flops() > 0
    assert not calls
