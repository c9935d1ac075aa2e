"""When an operator may replace a module."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode

from grootvl_mm.layers.mlp import MLP
from grootvl_mm.layers.untouched import _are_original, is_wholly_untouched, untouched


class OtherLinear(nn.Linear):
    """A layer that may do anything."""


class Quantized(Tensor):
    """A tensor subclass, as weight-only quantization makes them."""


def with_forward(layer: nn.Linear) -> None:
    layer.forward = lambda x: x


def with_subclass(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantized))


def with_sparse_weight(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse())


def with_values(layer: nn.Linear) -> None:
    del layer.weight
    layer.weight = torch.ones(3, 3)


TOUCHES: dict[str, Callable[[nn.Linear], object]] = {
    "forward hook": lambda layer: layer.register_forward_hook(print),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(print),
    "backward hook": lambda layer: layer.register_full_backward_hook(print),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(print),
    "own forward": with_forward,
    "own call": lambda layer: setattr(layer, "_call_impl", print),
    "adapter inside": lambda layer: layer.add_module("adapter", nn.Linear(3, 3)),
    "compiled": lambda layer: layer.compile(),
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    "spectral norm of old": torch.nn.utils.spectral_norm,
    "spectral norm": parametrizations.spectral_norm,
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "quantized weight": with_subclass,
    "sparse weight": with_sparse_weight,
    "weight is a tensor": with_values,
    "no bias": lambda layer: layer.register_parameter("bias", None),
    "further parameter": lambda layer: layer.register_parameter("scale", nn.Parameter(torch.ones(1))),
    "subclass": lambda layer: setattr(layer, "__class__", OtherLinear),
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES)
def test_what_touches_a_module(touch: Callable) -> None:
    layer = nn.Linear(3, 3)
    assert untouched(layer, kinds=(nn.Linear,))
    assert untouched(copy.deepcopy(layer), kinds=(nn.Linear,))
    touch(layer)
    assert not untouched(layer, kinds=(nn.Linear,))
    assert not untouched(nn.Linear(3, 3), layer, kinds=(nn.Linear,))


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_on_all_modules(register: Callable) -> None:
    layer = nn.Linear(3, 3)
    handle = register(lambda *args: None)
    try:
        assert not untouched(layer, kinds=(nn.Linear,))
    finally:
        handle.remove()
    assert untouched(layer, kinds=(nn.Linear,))


class Watching(TorchFunctionMode):
    """A mode that has to see what functions a module calls."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        return func(*args, **(kwargs or {}))


def test_modes_and_patches_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profilers replace the forward of a class, the call of all modules, or functions."""
    layer = nn.Linear(3, 3)
    with Watching():
        assert not untouched(layer, kinds=(nn.Linear,))
    with torch.device("cpu"):
        assert untouched(layer, kinds=(nn.Linear,))
    methods = [(owner, name) for owner in (nn.Linear, nn.Module) for name in ("__call__", "_call_impl")]
    for owner, name in ((nn.Linear, "forward"), *methods, (F, "linear"), (F, "silu")):
        plain = getattr(owner, name)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *args, plain=plain: plain(*args))
            assert not untouched(layer, kinds=(nn.Linear,))
        assert untouched(layer, kinds=(nn.Linear,))


def test_what_was_replaced_before_the_import() -> None:
    assert _are_original([nn.Linear.forward, MLP.forward, F.linear, F.layer_norm])
    assert not _are_original([nn.Linear.forward, functools.wraps(F.linear)(lambda *args: F.linear(*args))])


def test_what_comes_off_again() -> None:
    layer = nn.Linear(3, 3)
    handle = layer.register_forward_hook(print)
    handle.remove()
    prune.remove(prune.identity(layer, "weight"), "weight")
    assert untouched(layer, kinds=(nn.Linear,))


def test_what_touches_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers, its parts, and what watches all modules and functions; not the block itself."""
    block = nn.Module()
    block.mlp = MLP(3, ratio=1)
    assert is_wholly_untouched(block)
    block.register_forward_hook(print)
    assert is_wholly_untouched(block)
    for touch in [*TOUCHES.values(), lambda layer: setattr(layer, "__class__", nn.Bilinear)]:
        if touch is not TOUCHES["no bias"] and touch is not TOUCHES["further parameter"]:  # computed as they are
            touched = copy.deepcopy(block)
            touch(touched.mlp.fc1)
            assert not is_wholly_untouched(touched)
    names = ("forward hook", "forward pre-hook", "backward hook", "own forward", "own call", "compiled")
    for name in (*names, "adapter inside"):
        touched = copy.deepcopy(block)
        TOUCHES[name](touched.mlp)
        assert is_wholly_untouched(touched) == (name == "adapter inside")  # an untouched layer, which nobody calls
    with Watching():
        assert not is_wholly_untouched(block)
    monkeypatch.setattr(MLP, "forward", lambda self, x: x)
    assert not is_wholly_untouched(block)
