"""Detects weights that a checkpoint lacks; mmengine only logs a warning and continues with random weights."""

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
# Batch norm's counters: old checkpoints do not have them, and results do not depend on them.
_OPTIONAL = "num_batches_tracked"


def check_weights(content: Mapping[str, Any]) -> None:
    """Check that the weights in a checkpoint are plain, dense, numeric tensors.

    Args:
        content: A checkpoint with its weights under ``state_dict``, or a bare state dict, maybe with other entries.

    Raises:
        CheckpointError: A weight is a NumPy array or a sparse, meta or quantized tensor, or contains NaN; or the state
            dict is not a dictionary.
    """
    named = "state_dict" in content
    weights = content["state_dict"] if named else content
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise CheckpointError(f"'state_dict' must map names to tensors, got a {type(weights).__name__}")
    # The extra state of a module (torch's get_extra_state) can have any type.
    checked = {name: value for name, value in weights.items() if not name.endswith("_extra_state")}
    problems = {name: _fault(value) for name, value in checked.items() if named or isinstance(value, _NUMBERS)}
    _raise("weights cannot be loaded", {name: fault for name, fault in problems.items() if fault}, len(weights))


def _fault(value: Any) -> str | None:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}, expected a tensor"
    if value.is_meta:
        return "a meta tensor, without data"
    if value.layout != torch.strided or value.is_nested:
        return "a sparse or nested tensor, expected a dense one"
    if value.is_quantized:
        return "quantized, expected plain numbers"
    if value.is_floating_point() and value.isnan().any():
        return "NaN in at least one element"
    return None


class LoadedWeights:
    """Records which weights of a model ``load_state_dict`` leaves unloaded, after all renaming hooks of its modules.

    Args:
        model: The model; nothing else may load weights into it meanwhile.
        at_once: Raise the error during loading, at the first module with a problem. Otherwise :meth:`finish` raises one
            error for all of them.
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
            CheckpointError: Some weights were not loaded.
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
    """Raise a :class:`CheckpointError` if the block leaves some of the model's weights unloaded."""
    watched = LoadedWeights(model)
    try:
        yield
    except BaseException:
        watched.stop()
        raise
    watched.finish()
