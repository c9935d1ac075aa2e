"""Validates the optimizer and scheduler states of a checkpoint before a training resumes from it.

PyTorch and mmengine load these states unchecked. Momenta of the wrong shape or with NaN, and learning rates that are
strings, cause errors only some steps later, or wrong results without any error.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from numbers import Real
from typing import Any

from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import Tensor
from torch.optim import Optimizer

from grootvl_mm.utils.safe_checkpoints import CheckpointError

# Tensors that PyTorch's optimizers keep for each element of a parameter.
_ELEMENTWISE = frozenset(
    ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "acc_delta"]
)
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
            return [f"{name} is not of the optimizers {', '.join(wrapper.keys())}"]
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
            yield f"{where} is not of {len(own['params'])} parameters"
            continue
        numbers.update(ids)
        if "lr" not in group:
            yield f"{where} has no lr"
        yield from differences({key: value for key, value in own.items() if key != "params"}, group, where)
    if any(count > 1 for count in numbers.values()):
        yield f"{name}.param_groups name a parameter twice"


def _state_problems(optimizer: Optimizer, groups: list[Mapping], states: Mapping, name: str) -> Iterator[str]:
    own = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    parameters = dict(zip(chain.from_iterable(group["params"] for group in groups), own, strict=True))
    if not all(isinstance(state, Mapping) for state in states.values()) or not set(states) <= set(parameters):
        yield f"{name}.state is not of the parameters"
        return
    kept = {key for state in states.values() for key in state if key in _ELEMENTWISE and state[key] is not None}
    for number, state in states.items():
        where, shape = f"{name}.state[{number}]", parameters[number].shape
        missing = kept - set(state)
        if state and missing:
            yield f"{where} has no {min(missing)}"
        for key, value in state.items():
            if key in _ELEMENTWISE and value is not None and getattr(value, "shape", None) != shape:
                yield f"{where}.{key} is {_form(value)}, expected a tensor of shape {tuple(shape)}"
            elif not _is_finite(value):
                yield f"{where}.{key} is {_form(value)}, expected numbers"


def _schedulers_problems(schedulers: Any, states: Any) -> Iterator[str]:
    if isinstance(schedulers, Mapping):
        lists = states if isinstance(states, Mapping) else {}
        if set(lists) != set(schedulers):
            yield f"param_schedulers are not of the optimizers {', '.join(schedulers)}"
            return
        pairs = [(schedulers[key], lists[key], f"param_schedulers.{key}") for key in schedulers]
    else:
        pairs = [(schedulers, states, "param_schedulers")]
    for own, parts, name in pairs:
        if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            yield f"{name} is no list of states"
            continue
        for position, (scheduler, state) in enumerate(zip(own, parts, strict=False)):
            expected = scheduler.state_dict()
            # mmengine sets them as attributes, which could shadow the scheduler's methods.
            for key in [key for key in state if key not in expected]:
                del state[key]
            yield from differences(expected, state, f"{name}[{position}]")


def differences(own: Any, value: Any, name: str) -> Iterator[str]:
    """Yield structural differences between ``value`` and ``own``, ignoring keys that only one of two dictionaries has.

    Numbers must be finite if those in ``own`` are. None and bools may replace each other.
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
    return isinstance(value, type(own))


def _is_number(value: Any, own: Any) -> bool:
    number = isinstance(value, Real) and not isinstance(value, bool) and not isinstance(own, bool)
    return number and (math.isfinite(value) or value == own)


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_floating_point() and value.isnan().any())
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return value is None or (isinstance(value, Real) and math.isfinite(value))


def _form(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}" if _is_finite(value) else "a tensor with NaN"
    if isinstance(value, Real):
        return str(value)
    return "None" if value is None else f"a {type(value).__name__}"
