"""Selective activation checkpointing and faster functions for the modules of a block.

Inside :func:`lean`, the modules of a block are called and differentiated as usual, with two changes:

- The outputs of layer norms, GELU, SiLU, masks and depth-wise convolutions are cheap to recompute but take much memory.
  Instead of such an output, autograd saves a recipe that recomputes it from tensors that are saved anyway. A block
  saves 12 tensors of the size of its input instead of 18.
- ``F.linear`` in float32 on the CPU uses oneDNN, see :mod:`grootvl_mm.layers.linear`; ``F.layer_norm`` on GPUs and
  under autocast uses our operator, see :mod:`grootvl_mm.layers.norm`.

Both replace functions that modules call, not the modules, so hooks, adapters, parametrizations and replaced modules
behave as in any other model. PyTorch's defaults apply under ``torch.compile``, tracers, ``torch.func`` transforms,
other torch function modes and replaced functions of PyTorch. They also apply where activation checkpointing or other
saved-tensor hooks start inside a block, because these call parts of the block again themselves.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from grootvl_mm.layers.linear import linear
from grootvl_mm.layers.norm import layer_norm, narrow_layer_norm
from grootvl_mm.layers.untouched import are_functions_watched
from grootvl_mm.ops._compat import (
    are_saved_tensors_hooks_enabled,
    autocast_dtype,
    is_autocast_enabled,
    is_compiling,
    is_eager,
    top_saved_tensors_hooks,
)

Unpack = Callable[[], Tensor]


def fast(x: Tensor) -> contextlib.AbstractContextManager:
    """Context manager that uses the faster functions of ``_FAST`` for layers applied to ``x``."""
    return _Fast(_FAST) if _applies_to(x) else contextlib.nullcontext()


def narrow(x: Tensor) -> contextlib.AbstractContextManager:
    """Like :func:`fast`; under autocast, norms also return the dtype that the following layers would cast to."""
    return _Fast(_FAST_IN_BLOCKS) if _applies_to(x) else contextlib.nullcontext()


def lean(x: Tensor) -> contextlib.AbstractContextManager:
    """Context manager for a block applied to ``x``: recomputation, and norms in the dtype of linear layers."""
    if not _applies_to(x):
        return contextlib.nullcontext()
    if torch.is_grad_enabled() and are_saved_tensors_hooks_enabled():
        return _Lean(x.device.type)
    return _Fast(_FAST_IN_BLOCKS)


def _applies_to(x: Tensor) -> bool:
    return is_eager(x) and not are_functions_watched()


_FAST = {F.linear: linear, F.layer_norm: layer_norm}
_FAST_IN_BLOCKS = {F.linear: linear, F.layer_norm: narrow_layer_norm}


class _Fast(TorchFunctionMode):
    """Replaces PyTorch functions by others."""

    keeps_results = True

    def __init__(self, functions: dict[Callable, Callable]) -> None:
        super().__init__()
        self.functions = functions
        self.outer = top_saved_tensors_hooks()
        self.top = self.outer  # the active hooks unless others were added within the block

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self._replaced(func)(*args, **(kwargs or {}))

    def _replaced(self, func: Callable) -> Callable:
        if func not in self.functions or is_compiling() or top_saved_tensors_hooks() != self.top:
            return func
        return self.functions[func]


class _Lean(_Fast):
    """Tracks the outputs of cheap functions by their storage; autograd saves recipes instead of them."""

    def __init__(self, device_type: str) -> None:
        super().__init__(_FAST_IN_BLOCKS)
        self.device_type = device_type
        self.recipes: dict[int, tuple[StorageWeakRef, int, _Recipe]] = {}
        self.top = self._pack, _unpack
        self.hooks = torch.autograd.graph.saved_tensors_hooks(*self.top)

    def __enter__(self) -> "_Lean":
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.hooks.__exit__(*error)
        self.recipes.clear()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        replaced = self._replaced(func)
        result = replaced(*args, **kwargs)
        if is_compiling():
            return result
        if func is torch.ops.grootvl.residual_layer_norm:
            total, normed = result
            _, _, _, *norm = args
            self._remember(normed, torch.ops.grootvl.layer_norm, (total, *norm), {})
        elif func in _CHEAP and type(result) is Tensor and _CHEAP[func](*args, **kwargs):
            self._remember(result, replaced, args, kwargs)
        return result

    def _remember(self, result: Tensor, func: Callable, args: tuple, kwargs: dict) -> None:
        """Record that ``func`` recomputes ``result``."""
        storage = result.untyped_storage()
        if not result.requires_grad or any(_is_in(storage, value) for value in (*args, *kwargs.values())):
            return
        autocast = {"device_type": self.device_type, "enabled": is_autocast_enabled(self.device_type)}
        if autocast["enabled"]:
            autocast["dtype"] = autocast_dtype(self.device_type)
        inputs = [self._input(value) for value in (*args, *kwargs.values())]
        # While the weak reference lives, no other storage gets this address.
        recipe = _Recipe(func, inputs, tuple(kwargs), autocast)
        self.recipes[storage._cdata] = StorageWeakRef(storage), result._version, recipe

    def _input(self, value: Any) -> Callable[[], Any]:
        if not isinstance(value, Tensor):
            return lambda: value
        return self._pack(value if value.is_leaf else value.detach())

    def _pack(self, value: Tensor) -> Unpack:
        """What autograd saves for a tensor: its recipe if there is one, otherwise the tensor itself."""
        _, version, recipe = self.recipes.get(value.untyped_storage()._cdata, (None, None, None))
        if recipe is not None and version == value._version and recipe.is_possible():
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


def _is_in(storage: torch.UntypedStorage, value: Any) -> bool:
    """Whether a tensor uses this storage: a function that modifies its input in place cannot be recomputed."""
    return isinstance(value, Tensor) and value.untyped_storage()._cdata == storage._cdata


class _Kept:
    """A saved tensor; raises an error if it has been modified in place."""

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

    def __init__(
        self, func: Callable, inputs: list[Callable[[], Any]], keywords: tuple[str, ...], autocast: dict[str, Any]
    ) -> None:
        self.func = func
        self.inputs = inputs
        self.keywords = keywords  # of the last inputs
        self.autocast = autocast
        self.uses = self.served = 0
        self.value: Tensor | None = None

    def is_possible(self) -> bool:
        """False if FSDP has freed a parameter, which it restores only in the backward pass of its own module."""
        kept = (value.value for value in self.inputs if isinstance(value, _Kept))
        return all(value.untyped_storage().nbytes() or not value.numel() for value in kept)

    def take(self) -> Tensor:
        if self.value is None:
            inputs = [value() for value in self.inputs]
            num_positional = len(inputs) - len(self.keywords)
            kwargs = dict(zip(self.keywords, inputs[num_positional:], strict=True))
            with torch.no_grad(), torch.autocast(**self.autocast):
                self.value = self.func(*inputs[:num_positional], **kwargs)
        value = self.value
        self.served += 1
        if self.served % self.uses == 0:
            self.value = None
        return value


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _is_depthwise(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> bool:
    return weight.shape[1] == 1


def _is_mask(x: Tensor, mask: Tensor, **kwargs: Any) -> bool:
    return isinstance(mask, Tensor) and not mask.requires_grad and not kwargs


_CHEAP = {
    F.layer_norm: _always,
    F.gelu: _always,
    F.silu: _always,
    F.conv2d: _is_depthwise,
    torch.mul: _is_mask,
    torch.ops.grootvl.depthwise_conv_silu: _always,
}
