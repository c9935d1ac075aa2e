"""The MLP in pieces of rows."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from grootvl_mm.layers import mlp_in_pieces
from grootvl_mm.layers.mlp import MLP

CHANNELS = 6


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows in a piece."""
    monkeypatch.setattr(mlp_in_pieces, "PIECE", 7 * 4 * CHANNELS)


def make(dtype: torch.dtype, device: torch.device | str = "cpu") -> tuple[MLP, Tensor]:
    mlp = MLP(CHANNELS)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mlp.to(device, dtype), torch.randn(2, 3, 5, CHANNELS, device=device, dtype=dtype, requires_grad=True)


def composed(mlp: MLP, x: Tensor) -> Tensor:
    return mlp.fc2(mlp.act(mlp.fc1(x)))


def is_in_pieces(mlp: MLP, x: Tensor) -> bool:
    with torch.no_grad():
        return mlp_in_pieces.mlp_in_pieces(x, mlp.fc1, mlp.act, mlp.fc2) is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_those_of_the_modules(device: torch.device, dtype: torch.dtype) -> None:
    mlp, x = make(dtype, device)
    assert is_in_pieces(mlp, x) == (device.type == "cpu")
    bound = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.06}[dtype]
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), composed(mlp, x), rtol=bound, atol=bound)
        rows = x.permute(1, 2, 0, 3)  # not contiguous
        torch.testing.assert_close(mlp(rows), composed(mlp, rows), rtol=bound, atol=bound)


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(input_dtype: torch.dtype) -> None:
    mlp, x = make(torch.float32)
    x = x.detach().to(input_dtype)
    exact = composed(copy.deepcopy(mlp).double(), x.double())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert is_in_pieces(mlp, x)
        y, of_modules = mlp(x), composed(mlp, x)
    assert y.dtype == torch.bfloat16
    error, usual = (float((of.double() - exact).norm() / exact.norm()) for of in (y, of_modules))
    assert error < max(0.01, 1.2 * usual)


@pytest.mark.parametrize("trained", ["x", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"])
def test_modules_are_called_where_gradients_are_needed(trained: str) -> None:
    mlp, x = make(torch.float32)
    leaves = {"x": x, **dict(mlp.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == trained)
    assert mlp_in_pieces.mlp_in_pieces(x, mlp.fc1, mlp.act, mlp.fc2) is None
    assert mlp(x).requires_grad


TOUCHES: dict[str, Callable[[MLP], object]] = {
    "hook on a layer": lambda mlp: mlp.fc1.register_forward_hook(lambda *args: None),
    "hook on the activation": lambda mlp: mlp.act.register_forward_hook(lambda *args: None),
    "other activation": lambda mlp: setattr(mlp, "act", nn.ReLU()),
    "approximate GELU": lambda mlp: setattr(mlp, "act", nn.GELU(approximate="tanh")),
    "no bias": lambda mlp: setattr(mlp, "fc2", nn.Linear(4 * CHANNELS, CHANNELS, bias=False)),
    "adapter": lambda mlp: setattr(mlp, "fc1", nn.Sequential(mlp.fc1)),
    "other dtype": lambda mlp: mlp.fc1.double(),
    "other width": lambda mlp: setattr(mlp, "fc2", nn.Linear(CHANNELS, CHANNELS)),
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
def test_where_the_modules_are_called(touch: Callable) -> None:
    mlp, x = make(torch.float32)
    assert is_in_pieces(mlp, x)
    touch(mlp)
    assert not is_in_pieces(mlp, x)


def test_one_piece_is_left_to_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, x = make(torch.float32)
    monkeypatch.setattr(mlp_in_pieces, "PIECE", 30 * 4 * CHANNELS)
    assert not is_in_pieces(mlp, x)


def test_operations_are_counted() -> None:
    mlp, x = make(torch.float32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mlp(x)
    assert counter.get_total_flops() == 2 * 2 * 30 * CHANNELS * 4 * CHANNELS
