"""Validates the optimizer and scheduler states of a checkpoint before a training resumes from it.

PyTorch and mmengine load these states unchecked. Momenta of the wrong shape or with NaN, and learning rates that are
strings, cause errors only some steps later, or wrong results without any error.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor
from torch.optim import Optimizer

from grootvl_mm.utils.safe_checkpoints import CheckpointError

# Options that select an implementation, some of which need a GPU or parameters of certain dtypes.
_IMPLEMENTATIONS = ("foreach", "fused", "capturable", "differentiable")
_SHOWN = 3


def check_resumed_state(checkpoint: dict[str, Any], optim_wrapper: Any, schedulers: Any) -> None:
    """Compare the optimizer and scheduler states of a checkpoint with those of the run that resumes from it.

    Args:
        checkpoint: content of the file; entries that are unknown to the run's schedulers are removed from it.
        optim_wrapper: mmengine's wrapper of one or more optimizers.
        schedulers: a list of mmengine's schedulers, a dictionary of lists, or None.

    Raises:
        CheckpointError: the states do not have the structure of the run's, or contain numbers that are not finite.
    """
    problems = []
    if "optimizer" in checkpoint:
        problems += _wrapper_problems(optim_wrapper, checkpoint["optimizer"], "optimizer")
    if schedulers is not None and "param_schedulers" in checkpoint:
        problems += _schedulers_problems(schedulers, checkpoint["param_schedulers"])
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"the checkpoint cannot be resumed: {'; '.join(problems[:_SHOWN])}{more}")


def _wrapper_problems(wrapper: Any, state: Any, name: str) -> list[str]:
    if isinstance(wrapper, OptimWrapperDict):
        if not isinstance(state, Mapping) or set(state) != set(wrapper.keys()):
            return [f"{name} must have an entry for each of the optimizers {', '.join(wrapper.keys())}"]
        return [
            problem for key, part in wrapper.items() for problem in _wrapper_problems(part, state[key], f"{name}.{key}")
        ]
    # Other wrappers, and optimizers whose state is distributed over processes, use other formats.
    if not isinstance(wrapper, OptimWrapper) or not type(wrapper.optimizer).__module__.startswith("torch.optim."):
        return []
    groups, states = (state.get(key) if isinstance(state, Mapping) else None for key in ("param_groups", "state"))
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return [f"{name} has no list of param_groups"]
    if not isinstance(states, Mapping):
        return [f"{name} has no state for each parameter"]
    problems = [*_group_problems(wrapper.optimizer, groups, name)]
    if problems:
        return problems
    problems += _state_problems(wrapper.optimizer, groups, states, name)
    scaler = getattr(wrapper, "loss_scaler", None)
    if scaler is not None and "loss_scaler" in state:
        problems += differences(scaler.state_dict(), state["loss_scaler"], f"{name}.loss_scaler")
    return problems


def _group_problems(optimizer: Optimizer, groups: list[Mapping], name: str) -> Iterator[str]:
    if len(groups) != len(optimizer.param_groups):
        yield f"{name} has {len(groups)} groups of parameters, expected {len(optimizer.param_groups)}"
        return
    numbers: Counter = Counter()
    for position, (own, group) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        where, ids = f"{name}.param_groups[{position}]", group.get("params")
        if not isinstance(ids, list) or len(ids) != len(own["params"]) or not all(type(id_) is int for id_ in ids):
            yield f"{where} must have {len(own['params'])} parameters"
            continue
        numbers.update(ids)
        options = _upgraded(optimizer, group)
        yield from (f"{where} has no {key}" for key in optimizer.defaults if key not in options)
        yield from differences({key: value for key, value in own.items() if key != "params"}, group, where)
    if any(count > 1 for count in numbers.values()):
        yield f"{name}.param_groups name a parameter twice"


def _upgraded(optimizer: Optimizer, group: Mapping) -> Mapping:
    """A group with the options that ``optimizer`` adds to those of old versions of PyTorch."""
    shell = object.__new__(type(optimizer))
    shell.__setstate__({"defaults": dict(optimizer.defaults), "state": {}, "param_groups": [dict(group)]})
    return shell.param_groups[0]


def _state_problems(optimizer: Optimizer, groups: list[Mapping], states: Mapping, name: str) -> Iterator[str]:
    parameters = {
        number: (parameter, group)
        for group, own in zip(groups, optimizer.param_groups, strict=True)
        for number, parameter in zip(group["params"], own["params"], strict=True)
    }
    if not all(isinstance(state, Mapping) for state in states.values()) or not set(states) <= set(parameters):
        yield f"{name}.state does not match the parameters"
        return
    storages: set[int] = set()
    for number, state in states.items():
        where, (parameter, group) = f"{name}.state[{number}]", parameters[number]
        expected = _new_state(optimizer, group, parameter) if state else {}
        yield from (f"{where} has no {key}" for key in expected if key not in state)
        for key, value in state.items():
            form = _expected_form(value, expected.get(key))
            if form:
                yield f"{where}.{key} is {_form(value)}, expected {form}"
            elif isinstance(value, Tensor) and not _owns_memory(value, storages):
                # The optimizer updates it in place: two momenta in the same memory would change each other.
                state[key] = value.clone(memory_format=torch.contiguous_format)


def _new_state(optimizer: Optimizer, group: Mapping, parameter: Tensor) -> dict[str, Any]:
    """The state that the first step of ``optimizer`` creates for a parameter, as far as that works on meta tensors."""
    sample = torch.empty_like(parameter, device="meta").requires_grad_()
    sample.grad = torch.empty_like(sample)
    options = {key: False if key in _IMPLEMENTATIONS else value for key, value in group.items()}
    with contextlib.suppress(RuntimeError, TypeError, ValueError):
        other = type(optimizer)([options | {"params": [sample]}])
        with contextlib.suppress(RuntimeError, TypeError):
            other.step()
        return dict(other.state[sample])
    return {}


def _expected_form(value: Any, new: Any) -> str:
    """What an entry of a parameter's state should be, or "" if it is that; ``new`` is the entry after a first step."""
    if isinstance(new, Tensor) and new.ndim:
        alike = isinstance(value, Tensor) and value.shape == new.shape and value.is_floating_point()
        return "" if alike and _is_finite(value) else f"a tensor of shape {tuple(new.shape)}"
    if isinstance(new, (Tensor, Real)):  # such as the step, a number in old versions of PyTorch, a tensor in new ones
        is_number = isinstance(value, Real)
        if isinstance(value, Tensor):
            is_number = value.numel() == 1 and value.dtype != torch.bool and not value.is_complex()
        return "" if is_number and _is_finite(value) and value >= 0 else "a number, 0 or larger"
    return "" if _is_finite(value) else "numbers"


def _owns_memory(value: Tensor, storages: set[int]) -> bool:
    """Whether a tensor's storage is large enough and not one of ``storages``, to which it is added."""
    storage = value.untyped_storage()
    is_first = storage._cdata not in storages
    storages.add(storage._cdata)
    return is_first and storage.nbytes() >= value.nbytes


def _schedulers_problems(schedulers: Any, states: Any) -> Iterator[str]:
    if isinstance(schedulers, Mapping):
        lists = states if isinstance(states, Mapping) else {}
        if set(lists) != set(schedulers):
            yield f"param_schedulers must have an entry for each of the optimizers {', '.join(schedulers)}"
            return
        pairs = [(schedulers[key], lists[key], f"param_schedulers.{key}") for key in schedulers]
    else:
        pairs = [(schedulers, states, "param_schedulers")]
    for own, parts, name in pairs:
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            yield f"{name} is not a list of states"
            continue
        for position, (scheduler, state) in enumerate(zip(own, parts, strict=False)):
            expected = scheduler.state_dict()
            # mmengine sets them as attributes, which could shadow the scheduler's methods.
            for key in [key for key in state if key not in expected]:
                del state[key]
            yield from differences(expected, state, f"{name}[{position}]")


def differences(own: Any, value: Any, name: str) -> Iterator[str]:
    """Yield structural differences between ``value`` and ``own``, ignoring keys that only one of two dictionaries has.

    Numbers must be finite if those in ``own`` are, and strings equal. None and bools may replace each other.
    """
    if isinstance(own, Mapping):
        kinds = {type(key) for key in own}
        if not isinstance(value, Mapping) or (kinds and not {type(key) for key in value} <= kinds):
            yield f"{name} is {_form(value)}, expected a dictionary of {', '.join(kind.__name__ for kind in kinds)}"
            return
        for key in [key for key in own if key in value]:
            yield from differences(own[key], value[key], f"{name}.{key}")
    elif isinstance(own, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(own):
            yield f"{name} is {_form(value)}, expected {len(own)} values"
            return
        for position, (expected, item) in enumerate(zip(own, value, strict=True)):
            yield from differences(expected, item, f"{name}[{position}]")
    elif not _is_alike(own, value):
        yield f"{name} is {_form(value)}, expected {_form(own)}"


def _is_alike(own: Any, value: Any) -> bool:
    if own is None or isinstance(own, bool):
        return value is None or isinstance(value, (bool, str) if own is None else bool) or _is_number(value, own)
    if isinstance(own, Real):
        return _is_number(value, own)
    if isinstance(own, Tensor):
        return isinstance(value, Tensor) and value.shape == own.shape and _is_finite(value)
    return isinstance(value, type(own)) and (not isinstance(own, str) or value == own)


def _is_number(value: Any, own: Any) -> bool:
    number = isinstance(value, Real) and not isinstance(value, bool) and not isinstance(own, bool)
    return number and (_is_finite(value) or value == own)


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, (list, tuple)):
        # No nested lists: a small file can nest one list in itself so often that traversing it would take forever.
        return all(not isinstance(item, (list, tuple)) and _is_finite(item) for item in value)
    # Larger integers cannot be compared with floats by math.isfinite.
    return value is None or (isinstance(value, Real) and abs(value) <= sys.float_info.max)


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        dtype = "" if value.is_floating_point() else f" and {value.dtype}"
        return (
            f"a tensor of shape {tuple(value.shape)}{dtype}" if _is_finite(value) else "a tensor with NaN or infinity"
        )
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, Real):
        return str(value)
    if isinstance(value, str):
        return repr(value[:40])
    return "None" if value is None else f"a {type(value).__name__}"
