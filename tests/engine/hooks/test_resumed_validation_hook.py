"""A training that dies between a checkpoint and the end of its validation loses no best checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from grootvl_mm.utils.safe_checkpoints import load_safely
from tests.helpers.small_runs import best, run

HOOKS = [
    {"type": "grootvl_mm.UntrustedCheckpointHook"},
    {"type": "grootvl_mm.ResumedValidationHook"},
]
EPOCHS = {
    "train_cfg": {"by_epoch": True, "max_epochs": 3, "val_interval": 1},
    "checkpoint": {"by_epoch": True},
}
SCORES = (1.0, 5.0, 2.0)


class Killed(BaseException):
    """Stands in for a killed process."""


def kill_at(moment: str, step: int) -> tuple[type, str, Callable]:
    """Run a method of CheckpointHook or Runner up to a moment of a step."""
    owner, name, after = {
        "before the validation": (CheckpointHook, "_save_best_checkpoint", False),
        "before the best checkpoint is written": (Runner, "save_checkpoint", False),
        "before the checkpoint is written again": (CheckpointHook, "_save_checkpoint_with_step", False),
        "after it": (CheckpointHook, "_save_best_checkpoint", True),
    }[moment]
    original = getattr(owner, name)

    def wrapped(self: object, *arguments: object, **options: object) -> None:
        runner = self if isinstance(self, Runner) else arguments[0]
        # Runner also writes the checkpoint of the step itself, in training.
        if runner.message_hub.get_info("loop_stage") != "val" or runner.iter < step:
            return original(self, *arguments, **options)
        if after:
            original(self, *arguments, **options)
        raise Killed

    return owner, name, wrapped


@pytest.mark.parametrize(
    "moment",
    [
        "before the validation",
        "before the best checkpoint is written",
        "before the checkpoint is written again",
        "after it",
    ],
)
@pytest.mark.parametrize("by_epoch", [False, True], ids=["iterations", "epochs"])
def test_step_that_dies_in_its_validation(moment: str, by_epoch: bool, tmp_path: Path) -> None:
    settings = {**EPOCHS} if by_epoch else {}
    name = "epoch" if by_epoch else "iter"
    killed = kill_at(moment, 8 if by_epoch else 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*killed)
        with pytest.raises(Killed):
            run(tmp_path, 3, scores=SCORES, custom_hooks=HOOKS, **settings)
    again = SCORES[2:] if moment == "after it" else SCORES[1:]
    run(tmp_path, 3, tmp_path / f"{name}_2.pth", scores=again, custom_hooks=HOOKS, **settings)
    assert best(tmp_path) == [f"best_a_{name}_2.pth"]
    info = load_safely(tmp_path / f"{name}_3.pth")["message_hub"]["runtime_info"]
    assert info["best_score"] == 5.0
    assert Path(info["best_ckpt"]).name == f"best_a_{name}_2.pth"


def test_last_step_is_validated_when_a_finished_training_is_resumed(tmp_path: Path) -> None:
    killed = kill_at("before the validation", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*killed)
        with pytest.raises(Killed):
            run(tmp_path, 2, scores=SCORES, custom_hooks=HOOKS)
    run(tmp_path, 2, tmp_path / "iter_2.pth", scores=SCORES[1:], custom_hooks=HOOKS)
    assert best(tmp_path) == ["best_a_iter_2.pth"]


def test_best_checkpoint_that_is_newer_than_what_is_resumed(tmp_path: Path) -> None:
    run(tmp_path, 3, scores=(1.0, 2.0, 5.0), custom_hooks=HOOKS)
    run(tmp_path, 4, tmp_path / "iter_1.pth", scores=(1.5, 2.5, 3.0, 4.0), custom_hooks=HOOKS)
    assert best(tmp_path) == ["best_a_iter_3.pth"]
    content = load_safely(tmp_path / "best_a_iter_3.pth")
    assert content["message_hub"]["runtime_info"]["best_score"] == 5.0


def test_of_several_best_checkpoints_the_best_stays(tmp_path: Path) -> None:
    run(tmp_path, 1, scores=(3.0,), custom_hooks=HOOKS)
    first = (tmp_path / "best_a_iter_1.pth").read_bytes()
    run(tmp_path, 2, tmp_path / "iter_1.pth", scores=(4.0, 4.0), custom_hooks=HOOKS)
    (tmp_path / "best_a_iter_1.pth").write_bytes(first)
    (tmp_path / "best_a_iter_7.pth").write_bytes(first[:-100])
    (tmp_path / "best_ab_iter_1.pth").write_bytes(first)  # another score's
    (tmp_path / "best_a_iter_1.pth.txt").write_text("notes")
    run(tmp_path, 3, tmp_path / "iter_2.pth", scores=(1.0, 1.0), custom_hooks=HOOKS)
    assert best(tmp_path) == ["best_a_iter_1.pth.txt", "best_a_iter_2.pth", "best_ab_iter_1.pth"]
