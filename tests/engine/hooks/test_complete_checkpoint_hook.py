"""Runs resume and test exactly the weights in the checkpoint, including averaged weights."""

from pathlib import Path

import pytest
import torch

from grootvl_mm.utils.safe_checkpoints import CheckpointError, load_safely
from tests.helpers.small_runs import run

HOOK = {"type": "grootvl_mm.CompleteCheckpointHook"}
EMA = {"type": "EMAHook"}
CHANGES = {
    "missing": lambda weights, name: weights.pop(name),
    "reshaped": lambda weights, name: weights.update({name: torch.zeros(7)}),
    "half": lambda weights, name: weights.update({name: weights[name].half()}),
    "NaN": lambda weights, name: weights.update({name: weights[name] * torch.nan}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", ["state_dict", "ema_state_dict", "without EMA"])
def test_resuming(part: str, change: str, tmp_path: Path) -> None:
    hooks = [{"type": "grootvl_mm.UntrustedCheckpointHook"}, HOOK, *([] if part == "without EMA" else [EMA])]
    run(tmp_path, 1, custom_hooks=hooks)
    run(tmp_path, 2, tmp_path / "iter_1.pth", custom_hooks=hooks)
    content = load_safely(tmp_path / "iter_1.pth")
    averaged = part == "ema_state_dict"
    CHANGES[change](content[part if averaged else "state_dict"], "module.linear.bias" if averaged else "linear.bias")
    torch.save(content, tmp_path / "iter_1.pth")
    with pytest.raises(CheckpointError) as raised:
        run(tmp_path, 2, tmp_path / "iter_1.pth", custom_hooks=hooks)
    assert "\n" not in str(raised.value)
    assert "linear.bias" in str(raised.value) or "ema_state_dict" in str(raised.value)


def test_a_training_from_weights_may_have_new_heads(tmp_path: Path) -> None:
    run(tmp_path, 1, custom_hooks=[HOOK])
    content = load_safely(tmp_path / "iter_1.pth")
    content["state_dict"]["linear.bias"] = torch.zeros(7)
    torch.save(content, tmp_path / "weights.pth")
    runner = run(tmp_path, 2, custom_hooks=[HOOK], load_from=str(tmp_path / "weights.pth"))
    assert not any(module._load_state_dict_pre_hooks for module in runner.model.modules())


@pytest.mark.parametrize("allow", [False, True])
def test_testing(allow: bool, tmp_path: Path) -> None:
    runner = run(tmp_path, 1)
    content = load_safely(tmp_path / "iter_1.pth")
    del content["state_dict"]["linear.bias"]
    torch.save(content, tmp_path / "weights.pth")
    runner._hooks.clear()
    runner.register_hook({**HOOK, "allow_mismatch": allow})
    runner.load_checkpoint(str(tmp_path / "weights.pth"))
    if allow:
        runner.val()
    else:
        with pytest.raises(CheckpointError, match=r"^1 of 2 weights .* 'linear.bias' is missing$"):
            runner.val()
