"""Selective activation checkpointing and faster functions for the modules of a block.

Inside :func:`lean`, the modules of a block are called and differentiated as usual, with two changes:

- The outputs of layer norms, GELU, SiLU, masks and depth-wise convolutions are cheap to recompute but take much memory.
  Instead of such an output, autograd saves a recipe that recomputes it from tensors that are saved anyway. A block
  saves 12 tensors of the size of its input instead of 18.
- ``F.linear`` in float32 on the CPU uses oneDNN, see :mod:`grootvl_mm.layers.linear`; ``F.layer_norm`` on GPUs and
  under autocast uses our operator, see :mod:`grootvl_mm.layers.norm`.

Both replace functions that modules call, not the modules, so hooks, adapters, parametrizations and replaced modules
behave as in any other model. A torch function mode intercepts these calls, which takes longer than launching a kernel.
Where all modules of a block are untouched, their functions are therefore called directly, see
:mod:`grootvl_mm.layers.calls`. PyTorch's defaults apply under ``torch.compile``, tracers, ``torch.func`` transforms,
other torch function modes and replaced functions of PyTorch. They also apply where transforms, activation checkpointing
or other saved-tensor hooks start inside a block, because these call parts of the block again themselves.
"""

import contextlib
from collections.abc import Callable
from types import MethodWrapperType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from grootvl_mm.layers.calls import set_policy
from grootvl_mm.layers.linear import linear
from grootvl_mm.layers.norm import layer_norm, narrow_layer_norm
from grootvl_mm.layers.padding import masked
from grootvl_mm.layers.untouched import are_functions_watched, is_wholly_untouched
from grootvl_mm.ops import depthwise_conv_silu, residual_layer_norm
from grootvl_mm.ops import layer_norm as own_layer_norm
from grootvl_mm.ops._compat import (
    are_saved_tensors_hooks_enabled,
    autocast_dtype,
    is_autocast_enabled,
    is_compiling,
    is_eager,
    is_forward_ad,
    is_transformed,
    top_saved_tensors_hooks,
)

Unpack = Callable[[], Tensor]


def fast(x: Tensor) -> contextlib.AbstractContextManager:
    """Context manager that uses the faster functions of ``_FAST`` for layers applied to ``x``."""
    return _Fast(_FAST) if _applies_to(x) else contextlib.nullcontext()


def narrow(x: Tensor) -> contextlib.AbstractContextManager:
    """Like :func:`fast`; under autocast, norms also return the dtype that the following layers would cast to."""
    return _Fast(_FAST_IN_BLOCKS) if _applies_to(x) else contextlib.nullcontext()


def lean(x: Tensor, block: nn.Module | None = None) -> contextlib.AbstractContextManager:
    """Context manager for a block applied to ``x``: recomputation, and norms in the dtype of linear layers.

    Only the modules of ``block`` may be called inside, by :func:`grootvl_mm.layers.calls.call_module`; None for any.
    """
    if not _applies_to(x):
        return contextlib.nullcontext()
    is_direct = block is not None and is_wholly_untouched(block)
    if torch.is_grad_enabled() and are_saved_tensors_hooks_enabled():
        return _Lean(x.device.type, is_direct)
    return _Fast(_FAST_IN_BLOCKS, is_direct)


def _applies_to(x: Tensor) -> bool:
    return is_eager(x) and top_saved_tensors_hooks is not None and not are_functions_watched()


_FAST = {F.linear: linear, F.layer_norm: layer_norm}
_FAST_IN_BLOCKS = {F.linear: linear, F.layer_norm: narrow_layer_norm}


class _Fast(TorchFunctionMode):
    """Replaces PyTorch functions by others; if direct, only those that are called through :meth:`call`."""

    keeps_results = True

    def __init__(self, functions: dict[Callable, Callable], is_direct: bool = False) -> None:
        super().__init__()
        self.functions = functions
        self.is_direct = is_direct
        self.outer = top_saved_tensors_hooks()

    def __enter__(self) -> "_Fast":
        self.outer_policy = set_policy(self)
        return self if self.is_direct else super().__enter__()

    def __exit__(self, *error: Any) -> None:
        set_policy(self.outer_policy)
        if not self.is_direct:
            super().__exit__(*error)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if type(func) is MethodWrapperType:  # a property such as the shape
            return func(*args, **(kwargs or {}))
        return self.call(func, args, kwargs or {})

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Call a function, or the one that replaces it."""
        if func in self.functions and not self._is_suspended():
            func = self.functions[func]
        return func(*args, **kwargs)

    def _is_suspended(self) -> bool:
        """Whether a module of the block compiles or transforms what it calls, or hooks the tensors that this saves."""
        return not self.is_direct and (
            is_compiling()
            or is_transformed()
            or is_forward_ad()
            or not are_saved_tensors_hooks_enabled()
            or top_saved_tensors_hooks() != self.outer
        )


class _Lean(_Fast):
    """Tracks the outputs of cheap functions by their storage; autograd saves recipes instead of them."""

    def __init__(self, device_type: str, is_direct: bool) -> None:
        super().__init__(_FAST_IN_BLOCKS, is_direct)
        self.device_type = device_type
        self.recipes: dict[int, tuple[StorageWeakRef, int, _Recipe]] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.recipes.clear()

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Call a function and record how to recompute its result, if it is cheap."""
        if self._is_suspended():
            return func(*args, **kwargs)
        replaced = self.functions.get(func, func)
        # Not around the whole block: hooks take time for every tensor, and torch.func allows none in its transforms.
        with self.hooks if self._has_recipe(*args, *kwargs.values()) else contextlib.nullcontext():
            result = replaced(*args, **kwargs)
        if func is residual_layer_norm:
            total, normed = result
            _, _, *norm = args
            self._remember(normed, own_layer_norm, (total, *norm), kwargs)
        elif func in _CHEAP and type(result) is Tensor and _CHEAP[func](*args, **kwargs):
            self._remember(result, replaced, args, kwargs)
        return result

    def _has_recipe(self, *values: Any) -> bool:
        return any(_storage_of(value) in self.recipes for value in values)

    def _remember(self, result: Tensor, func: Callable, args: tuple, kwargs: dict) -> None:
        """Record that ``func`` recomputes ``result``."""
        if not result.requires_grad:
            return
        storage = result.untyped_storage()
        values = (*args, *kwargs.values())
        for value in values:
            # A result that was written in place cannot be recomputed.
            if isinstance(value, Tensor) and _storage_of(value) in (None, storage._cdata):
                return
        autocast = {"device_type": self.device_type, "enabled": is_autocast_enabled(self.device_type)}
        if autocast["enabled"]:
            autocast["dtype"] = autocast_dtype(self.device_type)
        inputs = [self._input(value) if isinstance(value, Tensor) else value for value in values]
        # While the weak reference lives, no other storage gets this address.
        recipe = _Recipe(func, inputs, tuple(kwargs), autocast)
        self.recipes[storage._cdata] = StorageWeakRef(storage), result._version, recipe

    def _input(self, value: Tensor) -> Unpack:
        return self._pack(value if value.is_leaf else value.detach())

    def _pack(self, value: Tensor) -> Unpack:
        """What autograd saves for a tensor: its recipe if there is one, otherwise the tensor itself."""
        found = self.recipes.get(_storage_of(value))
        if found is not None:
            _, version, recipe = found
            if version == value._version and recipe.is_possible():
                recipe.uses += 1
                view = value.size(), value.stride(), value.storage_offset()
                return lambda: recipe.take().as_strided(*view)
        if self.outer is not None:
            pack, unpack = self.outer
            packed = pack(value)
            return lambda: unpack(packed)
        return _Kept(value)


def _unpack(kept: Unpack) -> Tensor:
    return kept()


class _Kept:
    """A saved tensor; raises an error if it has been modified in place."""

    __slots__ = ("value", "version")

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self.version = value._version

    def __call__(self) -> Tensor:
        if self.value._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"tensor of shape {tuple(self.value.shape)} is at version {self.value._version}; expected version "
                f"{self.version} instead"
            )
        return self.value


class _Recipe:
    """Recomputes an output once for all autograd nodes that saved it, and frees it after its last use."""

    def __init__(self, func: Callable, inputs: list[Any], keywords: tuple[str, ...], autocast: dict[str, Any]) -> None:
        self.func = func
        self.inputs = inputs  # how to get tensors, and other values
        self.keywords = keywords  # of the last inputs
        self.autocast = autocast
        self.uses = self.served = 0
        self.value: Tensor | None = None

    def is_possible(self) -> bool:
        """False if FSDP has freed a parameter, which it restores only in the backward pass of its own module."""
        for value in self.inputs:
            if type(value) is _Kept and not value.value.untyped_storage().nbytes() and value.value.numel():
                return False
        return True

    def take(self) -> Tensor:
        value = self.value  # another thread, which differentiates the same graph, may free it
        if value is None:
            with torch.no_grad():  # even if the backward pass records a graph
                value = self.value = self._compute()
        self.served += 1
        if self.served % self.uses == 0:
            self.value = None
        return value

    def _compute(self) -> Tensor:
        inputs = [value() if callable(value) else value for value in self.inputs]
        num_positional = len(inputs) - len(self.keywords)
        args, kwargs = inputs[:num_positional], dict(zip(self.keywords, inputs[num_positional:], strict=True))
        if not (self.autocast["enabled"] or is_autocast_enabled(self.autocast["device_type"])):
            return self.func(*args, **kwargs)
        with torch.autocast(**self.autocast):
            return self.func(*args, **kwargs)


def _storage_of(value: Any) -> int | None:
    """The address of a tensor's storage, or None for sparse tensors, subclasses that wrap tensors, and other values."""
    if type(value) not in (Tensor, nn.Parameter) or not torch._C._has_storage(value):
        return None
    return value.untyped_storage()._cdata


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _is_depthwise(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> bool:
    return weight.shape[1] == 1


_CHEAP = {
    F.layer_norm: _always,
    F.gelu: _always,
    F.silu: _always,
    F.conv2d: _is_depthwise,
    masked: _always,
    depthwise_conv_silu: _always,
}
