"""Removes from a checkpoint, before mmengine's Runner uses it, content that could run code or delete other files."""

import os
import sys
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any

from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import IterBasedTrainLoop, Runner

from grootvl_mm.engine.resumed_state import check_resumed_state
from grootvl_mm.registry import HOOKS
from grootvl_mm.utils.safe_checkpoints import CheckpointError


@HOOKS.register_module()
class UntrustedCheckpointHook(Hook):
    """Make it safe to load and resume checkpoints that are untrusted or were copied from another folder.

    - mmengine executes the text ``meta["config"]`` as a config. Inferencers execute ``meta["cfg"]`` and the message
      hub's ``cfg``, which would be copied to this run's own checkpoints. All of them are removed.
    - ``CheckpointHook`` deletes the files listed as best checkpoints in the message hub, in any folder. Here, these
      entries are redirected to the files with the same names in this run's own folder; if such a file does not exist,
      the entry and its score are removed.
    - A checkpoint to resume must have the types that mmengine writes, and match the run's optimizer and schedulers.
    """

    # Before all other hooks, so that none of them uses the content first.
    priority = 0

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Change ``checkpoint``, the content of the file, in place.

        Raises:
            CheckpointError: The run resumes from this checkpoint, but it is not a training checkpoint.
        """
        meta, hub = checkpoint.get("meta"), checkpoint.get("message_hub")
        if isinstance(meta, dict):
            for name in ("config", "cfg"):
                meta.pop(name, None)
        if isinstance(hub, dict) and isinstance(hub.get("runtime_info"), dict):
            hub["runtime_info"].pop("cfg", None)
        if runner._resume:
            check_training_checkpoint(checkpoint)
            _check_progress(runner.train_loop, meta)
            check_resumed_state(checkpoint, runner.optim_wrapper, runner.param_schedulers)
            _settle_paths(runner, hub["runtime_info"])
            scalars = hub["log_scalars"]
            for name in [name for name, history in scalars.items() if not len(history.data[0])]:
                del scalars[name]  # mmengine reads the latest value of each


def check_training_checkpoint(checkpoint: Mapping[str, Any]) -> None:
    """Check that a checkpoint has all entries that resuming needs, in the types that mmengine writes.

    Raises:
        CheckpointError: An entry is missing or has another type.
    """
    meta, hub = checkpoint.get("meta"), checkpoint.get("message_hub")
    if not isinstance(meta, dict) or not isinstance(hub, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise CheckpointError(
            "not a training checkpoint, cannot be resumed: expected state_dict, meta and message_hub, found "
            f"{', '.join(list(checkpoint)[:8]) or 'nothing'}; to start from its weights, set load_from"
        )
    wrong = [f"meta[{name!r}]" for name in ("epoch", "iter") if not _is_count(meta.get(name))]
    if meta.get("seed") is not None and not (_is_count(meta["seed"]) and meta["seed"] < 2**32):  # NumPy's limit
        wrong.append("meta['seed']")
    kinds = {"log_scalars": HistoryBuffer, "runtime_info": object, "resumed_keys": bool}
    for name, kind in kinds.items():
        part = hub.get(name)
        if not isinstance(part, dict) or not all(
            isinstance(key, str) and isinstance(value, kind) for key, value in part.items()
        ):
            wrong.append(f"message_hub[{name!r}]")
    wrong += _misfits(checkpoint)
    if wrong:
        raise CheckpointError(
            f"the checkpoint cannot be resumed: invalid {', '.join(wrong)}; mmengine writes other types"
        )


def _check_progress(loop: Any, meta: Mapping[str, Any]) -> None:
    """Check that a checkpoint is not from after the end of the run: mmengine would skip data until then."""
    by_iter = isinstance(loop, IterBasedTrainLoop)
    done, planned = (meta["iter"], loop.max_iters) if by_iter else (meta["epoch"], loop.max_epochs)
    if done > planned:
        unit = "iter" if by_iter else "epoch"
        raise CheckpointError(
            f"the checkpoint cannot be resumed: it is from {unit} {done}, but the run ends at {unit} {planned}; "
            f"increase train_cfg.max_{unit}s"
        )


def _misfits(checkpoint: Mapping[str, Any]) -> list[str]:
    """Parts of a checkpoint that mmengine could not load."""
    wrong = [] if isinstance(checkpoint.get("optimizer", {}), Mapping) else ["optimizer"]
    if not isinstance(checkpoint.get("param_schedulers", []), (Mapping, list)):
        wrong.append("param_schedulers")
    if "ema_state_dict" in checkpoint:
        # EMAHook swaps the weights with the same names.
        weights, averaged = checkpoint["state_dict"], checkpoint["ema_state_dict"]
        named = isinstance(averaged, Mapping) and len(averaged) and all(isinstance(name, str) for name in averaged)
        if not named or not all(name[7:] in weights for name in averaged if name.startswith("module.")):
            wrong.append("ema_state_dict")
    return wrong


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _settle_paths(runner: Runner, info: dict[str, Any]) -> None:
    """Restrict the files listed in a message hub to the folder where this run writes its checkpoints."""
    info.pop("last_ckpt", None)  # set again with the next checkpoint
    ids = info.get("keep_ckpt_ids")
    if ids is not None:
        info["keep_ckpt_ids"] = [step for step in ids if _is_count(step)] if isinstance(ids, list) else []
    if not _is_count(info.get("validated_step")):
        info.pop("validated_step", None)
    for key in [key for key in info if key == "best_score" or key.startswith("best_score_")]:
        if not isinstance(info[key], Real) or not abs(info[key]) <= sys.float_info.max:
            del info[key]
            info.pop(key.replace("best_score", "best_ckpt", 1), None)
    folder = checkpoint_folder(runner)
    for key in [key for key in info if key == "best_ckpt" or key.startswith("best_ckpt_")]:
        name = Path(str(info[key]).replace("\\", "/")).name
        own = folder / name
        if name.startswith("best_") and name.endswith(".pth") and os.path.isfile(own):  # isfile accepts any string
            info[key] = str(own)
            continue
        del info[key]
        score = info.pop(key.replace("best_ckpt", "best_score", 1), None)
        print_log(
            f"The best checkpoint so far, {name!r} (score {score}), is not in {folder} and is ignored.",
            "current",
        )


def checkpoint_folder(runner: Runner) -> Path:
    """The folder to which CheckpointHook will write; the hook itself sets it only after the checkpoint is loaded.

    If it writes to a storage service, this folder does not exist locally.
    """
    work_dir = Path(runner.work_dir)
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.out_dir is not None and Path(hook.out_dir) != work_dir:
            return Path(hook.out_dir) / work_dir.name
    return work_dir
