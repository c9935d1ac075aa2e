"""The state of optimizers and schedulers that a resumed training takes over."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.optim import MultiStepLR, OptimWrapper, OptimWrapperDict
from torch import nn

from grootvl_mm.engine.hooks import UntrustedCheckpointHook
from grootvl_mm.engine.resumed_state import check_resumed_state
from grootvl_mm.utils.safe_checkpoints import CheckpointError, load_safely
from tests.helpers.small_runs import run


class Scaler:
    def state_dict(self) -> dict:
        return {"scale": 2.0, "_growth_tracker": 0}


class Scaled(OptimWrapper):
    """Scales losses, as mmengine's AmpOptimWrapper does on GPUs."""

    loss_scaler = Scaler()

    def state_dict(self) -> dict:
        return {"loss_scaler": self.loss_scaler.state_dict(), **super().state_dict()}


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, 0.1, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9),
    "plain SGD": lambda groups: torch.optim.SGD(groups, 0.1),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, 0.1, momentum=0.9, centered=True),
    "Adadelta": torch.optim.Adadelta,
    "Adagrad": torch.optim.Adagrad,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "LBFGS": lambda groups: torch.optim.LBFGS(groups[0]["params"]),
    **({"Adafactor": torch.optim.Adafactor} if hasattr(torch.optim, "Adafactor") else {}),
}


def make(optimizer: str = "AdamW", steps: int = 2, wrapper: type = OptimWrapper) -> tuple[OptimWrapper, list]:
    """An optimizer of two groups after some steps, and its schedulers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[1].bias.requires_grad = False  # without a state
    groups = [{"params": list(layer.parameters())} for layer in model]
    optim_wrapper = wrapper(OPTIMIZERS[optimizer](groups))
    schedulers: list = [MultiStepLR(optim_wrapper, milestones=[3, 5], by_epoch=False)]

    def loss() -> torch.Tensor:
        optim_wrapper.optimizer.zero_grad()
        value = model(torch.ones(4, 3)).pow(2).sum()
        value.backward()
        return value

    for _ in range(steps):
        optim_wrapper.optimizer.step(loss)
        schedulers[0].step()
    return optim_wrapper, schedulers


def checkpoint(optimizer: str = "AdamW", **options: Any) -> dict[str, Any]:
    optim_wrapper, schedulers = make(optimizer, **options)
    states = [scheduler.state_dict() for scheduler in schedulers]
    return copy.deepcopy({"optimizer": optim_wrapper.state_dict(), "param_schedulers": states})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_what_a_run_wrote_passes_unchanged(optimizer: str) -> None:
    content = checkpoint(optimizer)
    before = copy.deepcopy(content)
    check_resumed_state(content, *make(optimizer, steps=0))
    assert str(content) == str(before)


def at(*path: Any, value: Any) -> Callable[[dict], None]:
    """Put a value, or what a function makes of the old one, into a place of a checkpoint."""

    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value(content[path[-1]]) if callable(value) else value

    return change


def without(*path: Any) -> Callable[[dict], None]:
    """Take a place out of a checkpoint."""

    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def nested() -> list:
    """A list in itself so often that looking at each of its parts would take years."""
    value: list = []
    for _ in range(60):
        value = [value, value]
    return value


FIRST, STATE, SCHEDULER = ("optimizer", "param_groups", 0), ("optimizer", "state", 0), ("param_schedulers", 0)
WRONG: dict[str, tuple[Callable[[dict], None], str]] = {
    "no optimizer": (at("optimizer", value={}), "has no list of param_groups"),
    "optimizer is a list": (at("optimizer", value=[1]), "has no list of param_groups"),
    "no state": (without("optimizer", "state"), "has no state for each parameter"),
    "state is a number": (at("optimizer", "state", value=math.nan), "has no state for each parameter"),
    "state of others": (at("optimizer", "state", 77, value=lambda _: {}), "state does not match the parameters"),
    "states are lists": (at(*STATE, value=[1]), "state does not match the parameters"),
    "a group less": (at("optimizer", "param_groups", value=lambda groups: groups[:1]), "has 1 groups .* expected 2"),
    "groups are texts": (at("optimizer", "param_groups", value=["a", "b"]), "no list of param_groups"),
    "no rate": (without(*FIRST, "lr"), r"param_groups\[0\] has no lr"),
    "no epsilon": (without(*FIRST, "eps"), r"param_groups\[0\] has no eps"),
    "rate is a text": (at(*FIRST, "lr", value="0.1"), r"param_groups\[0\].lr is '0.1', expected 0.1"),
    "rate is NaN": (at(*FIRST, "lr", value=math.nan), "lr is nan, expected 0.1"),
    "rate is infinite": (at(*FIRST, "lr", value=math.inf), "lr is inf, expected 0.1"),
    "rate is a flag": (at(*FIRST, "lr", value=True), "lr is True, expected 0.1"),
    "rate is a tensor": (at(*FIRST, "lr", value=torch.ones(2)), r"lr is a tensor of shape \(2,\), expected 0.1"),
    "rate is none": (at(*FIRST, "lr", value=None), "lr is None, expected 0.1"),
    "betas are one": (at(*FIRST, "betas", value=(0.9,)), "betas is a tuple, expected 2 values"),
    "a beta is a text": (at(*FIRST, "betas", value=(0.9, "a")), r"betas\[1\] is 'a', expected 0.999"),
    "flag is a tensor": (at(*FIRST, "amsgrad", value=torch.ones(2)), "amsgrad is a tensor"),
    "unset flag is a list": (at(*FIRST, "foreach", value=[]), "foreach is a list, expected None"),
    "no parameters": (at(*FIRST, "params", value=None), "must have 2 parameters"),
    "a parameter less": (at(*FIRST, "params", value=[0]), "must have 2 parameters"),
    "parameters are texts": (at(*FIRST, "params", value=["0", "1"]), "must have 2 parameters"),
    "a parameter twice": (at(*FIRST, "params", value=[0, 0]), "name a parameter twice"),
    "momentum of another shape": (
        at(*STATE, "exp_avg", value=lambda old: old.T),
        r"state\[0\].exp_avg is a tensor of shape \(3, 2\), expected a tensor of shape \(2, 3\)",
    ),
    "momentum that would be broadcast": (at(*STATE, "exp_avg_sq", value=torch.ones(1)), r"of shape \(1,\), expected"),
    "momentum of NaN": (at(*STATE, "exp_avg", value=lambda old: old * math.nan), "is a tensor with NaN"),
    "momentum is infinite": (at(*STATE, "exp_avg_sq", value=lambda old: old + math.inf), "a tensor with NaN or inf"),
    "momentum is a number": (at(*STATE, "max_exp_avg_sq", value=1.0), "max_exp_avg_sq is 1.0, expected a tensor"),
    "momentum is missing": (without(*STATE, "exp_avg"), r"state\[0\] has no exp_avg"),
    "momentum is none": (at(*STATE, "exp_avg", value=None), "exp_avg is None, expected a tensor"),
    "step is a text": (at(*STATE, "step", value="2"), "step is '2', expected a number"),
    "step is negative": (at(*STATE, "step", value=-7), "step is -7, expected a number, 0 or larger"),
    "step is a tuple": (at(*STATE, "step", value=(2,)), "step is a tuple, expected a number"),
    "step is complex": (at(*STATE, "step", value=torch.tensor(2j)), "and torch.complex64, expected a number"),
    "step is a bool": (at(*STATE, "step", value=torch.tensor(True)), "and torch.bool, expected a number"),
    "momentum is complex": (at(*STATE, "exp_avg", value=lambda old: old + 1j), r"torch.complex64, expected a tensor"),
    "step is none": (at(*STATE, "step", value=None), "step is None, expected a number"),
    "steps of each element": (at(*STATE, "step", value=torch.ones(2, 3)), r"of shape \(2, 3\), expected a number"),
    "step is missing": (without(*STATE, "step"), r"state\[0\] has no step"),
    "other is a text": (at(*STATE, "other", value="2"), "other is '2', expected numbers"),
    "step is huge": (at(*STATE, "step", value=10**400), "step is an integer of 1329 bits, expected a number"),
    "step has more digits than Python writes": (at(*STATE, "step", value=10**5000), "an integer of 16610 bits"),
    "lists in lists": (at(*STATE, "step", value=nested()), "step is a list, expected a number"),
    "other has lists in lists": (at(*STATE, "other", value=nested()), "other is a list, expected numbers"),
    "rate is huge": (at(*FIRST, "lr", value=10**400), "lr is an integer of 1329 bits, expected 0.1"),
    "step is NaN": (at(*STATE, "step", value=torch.tensor(math.nan)), "step is a tensor with NaN"),
    "no list of schedulers": (at("param_schedulers", value={"a": 1}), "param_schedulers is not a list"),
    "scheduler is a text": (at("param_schedulers", value=["a"]), "param_schedulers is not a list of states"),
    "scheduler's step is a text": (at(*SCHEDULER, "last_step", value="2"), "last_step is '2', expected 0"),
    "scheduler's rates are NaN": (at(*SCHEDULER, "base_values", value=[math.nan] * 3), r"base_values\[0\] is nan"),
    "scheduler's rates are fewer": (at(*SCHEDULER, "_last_value", value=[0.1]), "_last_value is a list, expected 3"),
    "schedule of another option": (
        at(*SCHEDULER, "param_name", value="text"),
        "param_name is 'text', expected 'lr'",
    ),
    "schedule of an array": (at(*SCHEDULER, "param_name", value=np.ones(3)), "param_name is a ndarray, expected 'lr'"),
    "milestones are texts": (at(*SCHEDULER, "milestones", value={"3": 1}), "milestones is a dict, expected"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str) -> None:
    change, message = WRONG[name]
    content = checkpoint()
    if name == "state of others":
        content["optimizer"]["state"][77] = None
    change(content)
    with pytest.raises(CheckpointError, match=f"cannot be resumed: .*{message}") as raised:
        check_resumed_state(content, *make(steps=0))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shared", [lambda own: own, lambda own: own[:1, :1].expand(2, 3)], ids=["twice", "expanded"])
def test_momenta_do_not_share_memory(shared: Callable) -> None:
    content = checkpoint()
    state = content["optimizer"]["state"][0]
    state["exp_avg_sq"] = shared(state["exp_avg"])
    expected = state["exp_avg_sq"].tolist()
    check_resumed_state(content, *make(steps=0))
    state["exp_avg"].add_(1)
    state["exp_avg_sq"][0, 0].mul_(1)
    assert state["exp_avg_sq"].tolist() == expected


def test_other_settings_of_the_run_are_no_fault() -> None:
    """mmengine takes the checkpoint's over the config's."""
    content = checkpoint()
    content["optimizer"]["param_groups"][0].update(lr=0.5, foreach=False, fused=None, of_another_version="x")
    del content["optimizer"]["param_groups"][0]["maximize"]  # a newer option
    content["param_schedulers"][0].update(gamma=0.5, milestones={7: 1})
    check_resumed_state(content, *make(steps=0))
    del content["param_schedulers"]
    check_resumed_state(content, *make(steps=0))
    check_resumed_state({}, None, None)


def test_methods_of_schedulers_stay_their_own() -> None:
    content = checkpoint()
    content["param_schedulers"][0].update(step=1, optimizer={}, _get_value="x")
    optim_wrapper, schedulers = make(steps=0)
    check_resumed_state(content, optim_wrapper, schedulers)
    schedulers[0].load_state_dict(content["param_schedulers"][0])
    schedulers[0].step()
    assert schedulers[0].optimizer is optim_wrapper


def test_several_optimizers_and_scaled_losses() -> None:
    optim_wrapper, schedulers = make(wrapper=Scaled)
    both, lists = OptimWrapperDict(a=optim_wrapper, b=make("SGD")[0]), {"a": schedulers, "b": []}
    states = {key: [scheduler.state_dict() for scheduler in value] for key, value in lists.items()}
    content = copy.deepcopy({"optimizer": both.state_dict(), "param_schedulers": states})
    check_resumed_state(content, both, lists)
    for path, value, message in (
        (("optimizer", "b"), {}, r"optimizer.b has no list"),
        (("optimizer", "a", "loss_scaler"), {"scale": "x"}, "loss_scaler.scale is 'x', expected 2.0"),
        (("optimizer", "a", "state", 0), [], r"optimizer.a.state does not match"),
        (("param_schedulers", "a", 0, "last_step"), [], r"param_schedulers.a\[0\].last_step is a list"),
        (("param_schedulers",), {}, "must have an entry for each of the optimizers a, b"),
        (("optimizer",), {"a": {}}, "optimizer must have an entry for each of the optimizers a, b"),
    ):
        changed = copy.deepcopy(content)
        at(*path, value=value)(changed)
        with pytest.raises(CheckpointError, match=message):
            check_resumed_state(changed, both, lists)


@pytest.mark.parametrize("runner_type", ["Runner", "FlexibleRunner"])
def test_a_training_does_not_go_on_from_them(runner_type: str, tmp_path: Path) -> None:
    settings = {
        "runner_type": runner_type,
        "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 0.1}},
        "custom_hooks": [{"type": f"grootvl_mm.{UntrustedCheckpointHook.__name__}"}],
    }
    run(tmp_path / "run", 1, **settings)
    path = tmp_path / "run" / "iter_1.pth"
    content = load_safely(path)
    content["optimizer"]["state"][0]["exp_avg"] = torch.ones(1)
    torch.save(content, tmp_path / "crafted.pth")
    with pytest.raises(CheckpointError, match=r"exp_avg is a tensor of shape \(1,\)"):
        run(tmp_path / "run", 2, tmp_path / "crafted.pth", **settings)
