"""Finds what a checkpoint left out: mmengine logs it as a warning and goes on with random weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from grootvl_mm.utils.safe_checkpoints import CheckpointError

SHOWN = 3
_NUMBERS = (Tensor, np.ndarray)
# Counters of batch norm, which files of old versions do not have and nothing is computed from.
_OPTIONAL = "num_batches_tracked"


def check_weights(content: Mapping[str, Any]) -> None:
    """Check that the weights in the content of a file are numbers that can be loaded.

    Args:
        content: with the weights under ``state_dict``, or a bare state dict, in which other things may be, too.

    Raises:
        CheckpointError: there are NumPy arrays, sparse, meta or quantized tensors, NaN, or no tensors at all.
    """
    named = "state_dict" in content
    weights = content["state_dict"] if named else content
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"'state_dict' is no dictionary of names to tensors, but a {type(weights).__name__}")
    # What a module keeps beside its weights, by torch's get_extra_state, is of any type.
    checked = {name: value for name, value in weights.items() if not name.endswith("_extra_state")}
    problems = {name: _fault(value) for name, value in checked.items() if named or isinstance(value, _NUMBERS)}
    _raise("weights cannot be loaded", {name: fault for name, fault in problems.items() if fault}, len(weights))


def _fault(value: Any) -> str | None:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}, expected a tensor"
    if value.is_meta:
        return "a meta tensor, which has no content"
    if value.layout != torch.strided or value.is_nested:
        return "a sparse or nested tensor, expected a dense one"
    if value.is_quantized:
        return "quantized, expected plain numbers"
    if value.is_floating_point() and value.isnan().any():
        return "NaN at least in part"
    return None


class LoadedWeights:
    """Watches a model while weights are loaded into it, after all the renaming that its modules do.

    Args:
        model: the model; it must not be loaded at the same time by others.
        at_once: raise the error while the weights are loaded, at the first module that has a problem; else
            :meth:`finish` raises it for all of them.
    """

    def __init__(self, model: nn.Module, at_once: bool = False) -> None:
        self.at_once = at_once
        self.problems: dict[str, str] = {}
        self.total = 0
        self._handles = [
            module._register_load_state_dict_pre_hook(partial(self._compare, module)) for module in model.modules()
        ]

    def _compare(self, module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
        buffers = {
            key: value for key, value in module._buffers.items() if key not in module._non_persistent_buffers_set
        }
        for key, own in {**module._parameters, **buffers}.items():
            if own is None or key == _OPTIONAL:
                continue
            self.total += 1
            name = prefix + key
            fault = _difference(own, state_dict[name]) if name in state_dict else "missing"
            if fault:
                self.problems[name] = fault
        if self.at_once:
            self._check()

    def stop(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def finish(self) -> None:
        """Stop watching.

        Raises:
            CheckpointError: something of the model was not loaded.
        """
        self.stop()
        self._check()

    def _check(self) -> None:
        _raise("weights of the model do not fit the checkpoint and would stay random", self.problems, self.total)


def _difference(own: Tensor, value: Any) -> str | None:
    fault = _fault(value)
    if fault:
        return fault
    if value.shape != own.shape:
        return f"{tuple(value.shape)}, expected {tuple(own.shape)}"
    loses = value.dtype != own.dtype and torch.promote_types(value.dtype, own.dtype) == own.dtype
    if own.is_floating_point() and loses:
        return f"{value.dtype}, expected {own.dtype}".replace("torch.", "")
    return None


def _raise(what: str, problems: Mapping[str, str], total: int) -> None:
    if problems:
        shown = "; ".join(f"{name!r} is {fault}" for name, fault in list(problems.items())[:SHOWN])
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CheckpointError(f"{len(problems)} of {total} {what}: {shown}{more}")


@contextmanager
def all_weights_loaded(model: nn.Module) -> Iterator[None]:
    """Raise a :class:`CheckpointError` if something of the model is not loaded by the lines below."""
    watched = LoadedWeights(model)
    try:
        yield
    except BaseException:
        watched.stop()
        raise
    watched.finish()
