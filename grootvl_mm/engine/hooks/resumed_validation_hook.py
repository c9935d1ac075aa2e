"""Repeats, on resume, a validation that was interrupted after its checkpoint was written."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import IterBasedTrainLoop, Runner

from grootvl_mm.engine.hooks.untrusted_checkpoint_hook import checkpoint_folder
from grootvl_mm.registry import HOOKS
from grootvl_mm.utils.safe_checkpoints import CheckpointError, read_checkpoint

_VALIDATED = "validated_step"


@HOOKS.register_module()
class ResumedValidationHook(Hook):
    """Keep the best checkpoint correct if a training dies during validation.

    mmengine writes a checkpoint before it validates, and resumes training right after that checkpoint. An interrupted
    validation would never be repeated, and its checkpoint never be compared with the best one. This hook validates
    first. The best checkpoints on disk may also be newer than the resumed one: the one with the best stored score is
    kept, and the others are deleted, as mmengine would have done.
    """

    # After CheckpointHook (VERY_LOW), which saves the best checkpoint after the validation that this hook runs.
    priority = "LOWEST"

    def __init__(self) -> None:
        self._resumed = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Enter the best checkpoints found on disk into the resumed checkpoint's message hub."""
        if not runner._resume:
            return
        self._resumed = True
        # Only one rank may decide, because it deletes files.
        info = checkpoint["message_hub"]["runtime_info"]
        shared = [_best_on_disk(runner, info) if is_main_process() else None]
        broadcast_object_list(shared)
        info.update(shared[0])
        keys = checkpoint["message_hub"]["resumed_keys"]
        keys.update(dict.fromkeys(shared[0], True))

    def before_train(self, runner: Runner) -> None:
        """Validate the resumed epoch or iteration if that is due and the checkpoint does not record it as done."""
        resumed, self._resumed = self._resumed, False
        if not resumed or runner.val_loop is None:
            return
        loop, step = runner.train_loop, _step(runner)
        loop._decide_current_val_interval()
        last = loop.max_iters if isinstance(loop, IterBasedTrainLoop) else loop.max_epochs
        due = step >= loop.val_begin and (step % loop.val_interval == 0 or step == last)
        if step > 0 and due and runner.message_hub.runtime_info.get(_VALIDATED) != step:
            unit = "iteration" if isinstance(loop, IterBasedTrainLoop) else "epoch"
            print_log(
                f"Validating {unit} {step} first: the run was interrupted before its validation ended.", "current"
            )
            runner.val_loop.run()

    def before_val_epoch(self, runner: Runner) -> None:
        """Record in all later checkpoints that this epoch or iteration was validated."""
        runner.message_hub.update_info(_VALIDATED, _step(runner))


def _step(runner: Runner) -> int:
    return runner.iter if isinstance(runner.train_loop, IterBasedTrainLoop) else runner.epoch


def _best_on_disk(runner: Runner, info: dict[str, Any]) -> dict[str, Any]:
    """Find the best checkpoints in the folder of this run, as entries of the message hub."""
    hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook) and hook.save_best is not None]
    found = {}
    for hook in hooks:
        for indicator in hook.key_indicators:
            suffix = "" if len(hook.key_indicators) == 1 else f"_{indicator}"
            path_key, score_key = f"best_ckpt{suffix}", f"best_score{suffix}"
            paths = _files(checkpoint_folder(runner), hook.filename_tmpl, indicator)
            if not paths or [str(path) for path in paths] == [info.get(path_key)]:
                continue
            scores = {path: _score(path, score_key) for path in paths}
            best = _choose(scores, hook.is_better_than.get(indicator))
            for path in paths:
                if path != best:
                    path.unlink()
                    print_log(f"Removed {path}, which is damaged or no longer the best checkpoint.", "current")
            if best is not None:
                found |= {path_key: str(best), score_key: scores[best]}
    return found


def _files(folder: Path, template: str, indicator: str) -> list[Path]:
    """The files that CheckpointHook wrote as best checkpoints for an indicator, judging by their names."""
    name = ".+" if indicator == "auto" else re.escape(indicator.replace("/", "_"))
    pattern = re.compile(rf"best_{name}_{re.escape(template).replace(re.escape('{}'), '[0-9]+')}")
    return sorted(path for path in folder.glob("best_*") if pattern.fullmatch(path.name) and path.is_file())


def _score(path: Path, key: str) -> float | None:
    """The score stored in a best checkpoint, or None if there is none or the file is damaged."""
    try:
        hub = read_checkpoint(path, mmap=True).get("message_hub")
        return float(hub["runtime_info"][key])
    except (CheckpointError, KeyError, TypeError, ValueError, OverflowError):
        return None


def _choose(scores: dict[Path, float | None], better: Callable[[float, float], bool] | None) -> Path | None:
    """The file with the best score, or the newest one if no rule says which score is better."""
    whole = sorted((path for path, score in scores.items() if score is not None), key=lambda path: path.stat().st_mtime)
    best = None
    for path in whole:
        if best is None or better is None or better(scores[path], scores[best]):
            best = path
    return best
