"""What the policy keeps, and that nothing but memory depends on it."""

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from grootvl_mm.layers import recompute
from grootvl_mm.layers.mlp import MLP
from grootvl_mm.layers.recompute import fast, lean, narrow
from tests.helpers.memory import kept_tensors


class Layers(nn.Module):
    """One of each function whose results are not kept, in a chain and shared."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.first = nn.Linear(channels, channels)
        self.second = nn.Linear(channels, channels, bias=False)
        self.mlp = MLP(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) to (B, H, W, C)."""
        y = self.norm(x).permute(0, 3, 1, 2)
        y = F.silu(self.conv(y)).permute(0, 2, 3, 1)
        return x + self.mlp(self.first(y) * self.second(y))


def make(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64) -> tuple[Layers, Tensor]:
    layers = Layers()
    for parameter in layers.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layers.to(device, dtype), torch.randn(2, 3, 4, 6, device=device, dtype=dtype, requires_grad=True)


def call(layers: nn.Module, x: Tensor, is_lean: bool = True) -> Tensor:
    if not is_lean:
        return layers(x)
    with lean(x):
        return layers(x)


def gradients(layers: nn.Module, x: Tensor, is_lean: bool) -> list[Tensor]:
    """The result, its gradients and theirs; the first ones twice, as ``retain_graph`` allows."""
    y = call(layers, x, is_lean)
    leaves = (x, *layers.parameters())
    loss = (y * y.detach()).sum()
    again = torch.autograd.grad(loss, leaves, retain_graph=True)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves, materialize_grads=True)
    return [y, *again, *first, *second]


def kept_bytes(layers: Callable[[Tensor], Tensor], x: Tensor, is_lean: bool = True) -> int:
    with kept_tensors() as kept:
        y = call(layers, x, is_lean)
    own = {value.data_ptr() for value in layers.parameters()} if isinstance(layers, nn.Module) else ()
    assert y.grad_fn is not None
    return sum(value.untyped_storage().nbytes() for at, value in kept.items() if at not in own)


def test_all_derivatives_are_pytorchs(device: torch.device) -> None:
    layers, x = make(device)
    torch.testing.assert_close(gradients(layers, x, True), gradients(layers, x, False))


def test_less_is_kept(device: torch.device) -> None:
    layers, x = make(device)
    # One pixel an image: NCHW and NHWC are the same, so that no device copies a map into another layout and keeps that.
    x = x.detach().view(-1, 1, 1, 6).requires_grad_()
    one_map = x.numel() * x.element_size()
    # Not those of: layer norm, convolution, SiLU, GELU of four times the width.
    assert kept_bytes(layers, x, False) - kept_bytes(layers, x) == (1 + 1 + 1 + 4) * one_map


@pytest.mark.parametrize("frozen", ["norm", "conv", "first", "mlp.fc2", "all but norm"])
def test_frozen_parts(frozen: str) -> None:
    layers, x = make()
    for name, parameter in layers.named_parameters():
        is_norm = name.startswith("norm")
        parameter.requires_grad_(is_norm if frozen == "all but norm" else not name.startswith(frozen))
    leaves = [x, *(p for p in layers.parameters() if p.requires_grad)]
    grads = [torch.autograd.grad(call(layers, x, is_lean).square().sum(), leaves) for is_lean in (True, False)]
    torch.testing.assert_close(*grads)


def test_under_autocast(device: torch.device) -> None:
    layers, x = make(device, torch.float32)
    grads = []
    for is_lean in (True, False):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = call(layers, x, is_lean)
        grads.append(torch.autograd.grad(y.float().square().sum(), (x, *layers.parameters())))
    torch.testing.assert_close(*grads)


def test_inside_activation_checkpointing() -> None:
    """The hooks of whoever checkpoints the whole see all that is kept."""
    layers, x = make()

    def run(is_lean: bool) -> Tensor:
        return checkpoint(call, layers, x, is_lean, use_reentrant=False).square().sum()

    leaves = (x, *layers.parameters())
    torch.testing.assert_close(*(torch.autograd.grad(run(is_lean), leaves) for is_lean in (True, False)))
    assert kept_bytes(lambda x: checkpoint(call, layers, x, use_reentrant=False), x, False) == x.nbytes


def test_offloaded_values(device: torch.device) -> None:
    layers, x = make(device)
    with torch.autograd.graph.save_on_cpu():
        y = call(layers, x)
    leaves = (x, *layers.parameters())
    expected = torch.autograd.grad(layers(x).square().sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaves), expected)


def test_results_changed_in_place_are_kept() -> None:
    """As a forward hook may do."""
    layers, x = make()
    layers.norm.register_forward_hook(lambda module, inputs, output: output.mul_(2))
    torch.testing.assert_close(gradients(layers, x, True), gradients(layers, x, False))


def test_an_input_changed_in_place_is_an_error() -> None:
    layers, x = make()
    x = x * 1
    z = call(nn.Sequential(layers.norm, layers.first), x)
    x.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*\(2, 3, 4, 6\)"):
        z.sum().backward()


def test_parameters_that_are_gone_for_a_while() -> None:
    """FSDP frees the parameters of a module after its forward pass: what they gave is kept then."""
    layers, x = make()
    weight = layers.norm.weight.untyped_storage()
    values, size = layers.norm.weight.detach().clone(), weight.nbytes()

    def free(*args: object) -> None:
        weight.resize_(0)

    def gather(*args: object) -> None:
        weight.resize_(size)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(layers.norm.weight):
            layers.norm.weight.copy_(values)

    expected = torch.autograd.grad(layers(x).square().sum(), x)
    layers.norm.register_forward_hook(free)
    layers.norm.register_full_backward_pre_hook(gather)
    y = call(layers, x)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), x), expected)


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
def test_functional_transforms(transform: str) -> None:
    layers, x = make()
    run = {
        "grad": lambda f: torch.func.grad(lambda value: f(value).square().sum())(x),
        "vmap": lambda f: torch.func.vmap(f)(torch.stack([x, 2 * x])),
        "jvp": lambda f: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    }[transform]
    torch.testing.assert_close(run(lambda value: call(layers, value)), run(layers))


@pytest.mark.parametrize("part", ["norm", "conv", "first", "mlp"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_a_part(part: str, reentrant: bool) -> None:
    """The part is called again in the backward pass, where the policy does not apply."""
    layers, x = make(dtype=torch.float32)
    expected = gradients(layers, x, is_lean=True)[: 2 + len(list(layers.parameters()))]
    module = layers.get_submodule(part)
    plain = module.forward
    module.forward = lambda value: checkpoint(plain, value, use_reentrant=reentrant)
    y = call(layers, x)
    (y * y.detach()).sum().backward()
    actual = [y, x.grad, *(parameter.grad for parameter in layers.parameters())]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_where_hooks_on_saved_tensors_are_forbidden() -> None:
    layers, x = make()
    with torch.autograd.graph.disable_saved_tensors_hooks("none, please"):
        y = call(layers, x)
    torch.testing.assert_close(y, layers(x))


class Doubled(TorchFunctionMode):
    """Counts the calls of a function and doubles its results."""

    def __init__(self, function: Callable) -> None:
        super().__init__()
        self.function = function
        self.count = 0

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        self.count += func is self.function
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is self.function else result


@pytest.mark.parametrize("function", [F.silu, F.layer_norm, F.linear])
def test_function_modes_of_others_see_every_call(function: Callable) -> None:
    layers, x = make(dtype=torch.float32)
    results, counts = [], []
    for is_lean in (False, True):
        with Doubled(function) as seen:
            results.append(call(layers, x, is_lean))
        counts.append(seen.count)
    assert counts[0] == counts[1] > 0
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("context", [fast, narrow, lean])
def test_function_modes_of_others_see_norms_under_autocast(context: Callable) -> None:
    norm, x = torch.nn.LayerNorm(8), torch.randn(2, 4, 8)
    with Doubled(F.layer_norm) as seen, torch.autocast("cpu", dtype=torch.bfloat16), context(x):
        y = norm(x)
    assert seen.count == 1
    torch.testing.assert_close(y, 2 * norm(x))


def test_results_in_the_memory_of_an_input_are_kept() -> None:
    """``inplace`` by position, too."""
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)

    def run(is_lean: bool) -> Tensor:
        with lean(x) if is_lean else contextlib.nullcontext():
            y = F.silu(x * 2, True)
            y = y * y.sin()
        return torch.autograd.grad(y.sum(), x)[0]

    torch.testing.assert_close(run(True), run(False))


def test_inputs_that_pytorch_does_not_keep_may_change() -> None:
    x, mask = torch.randn(4, 6, requires_grad=True), torch.rand(4, 6)

    def run(is_lean: bool) -> Tensor:
        value = x * 1
        with lean(x) if is_lean else contextlib.nullcontext():
            y = torch.mul(value, mask).sin()
        value.add_(1)
        return torch.autograd.grad(y.sum(), x)[0]

    torch.testing.assert_close(run(True), run(False))


def test_without_gradients_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(recompute, "_Recipe")
    layers, x = make()
    with torch.no_grad():
        torch.testing.assert_close(call(layers, x), layers(x))
