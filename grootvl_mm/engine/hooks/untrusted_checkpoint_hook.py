"""Takes out of a checkpoint, before mmengine's Runner sees it, what would act outside of the run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import Runner

from grootvl_mm.registry import HOOKS
from grootvl_mm.utils.safe_checkpoints import CheckpointError


@HOOKS.register_module()
class UntrustedCheckpointHook(Hook):
    """Let a run load and resume checkpoints that are not trusted, or that come from another folder.

    - mmengine executes the text ``meta["config"]`` as a config, and inferencers execute ``meta["cfg"]`` and the message
      hub's ``cfg``, which would get into this run's own checkpoints: they are dropped.
    - ``CheckpointHook`` deletes the files that the message hub names as the best checkpoints, wherever they are. Here
      they become the files of these names in this run's own folder; where there is none, the file's best score is
      forgotten, too.
    - What is to be resumed must be of the types that mmengine writes.
    """

    # The first of all: nothing may act on the content before.
    priority = 0

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Change ``checkpoint``, the content of the file, in place.

        Raises:
            CheckpointError: it is to be resumed, but is no training checkpoint.
        """
        meta, hub = checkpoint.get("meta"), checkpoint.get("message_hub")
        if isinstance(meta, dict):
            for name in ("config", "cfg"):
                meta.pop(name, None)
        if isinstance(hub, dict) and isinstance(hub.get("runtime_info"), dict):
            hub["runtime_info"].pop("cfg", None)
        if runner._resume:
            check_training_checkpoint(checkpoint)
            _settle_paths(runner, hub["runtime_info"])


def check_training_checkpoint(checkpoint: Mapping[str, Any]) -> None:
    """Check that a checkpoint has what resuming reads, in the types that mmengine writes.

    Raises:
        CheckpointError: it has not.
    """
    meta, hub = checkpoint.get("meta"), checkpoint.get("message_hub")
    if not isinstance(meta, dict) or not isinstance(hub, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise CheckpointError(
            "no checkpoint of a training that could be resumed: expected state_dict, meta and message_hub, found "
            f"{', '.join(list(checkpoint)[:8]) or 'nothing'}; to start from its weights, set load_from"
        )
    wrong = [f"meta[{name!r}]" for name in ("epoch", "iter") if not _is_count(meta.get(name))]
    if meta.get("seed") is not None and not _is_count(meta["seed"]):
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
        raise CheckpointError(f"the checkpoint cannot be resumed: {', '.join(wrong)} is not what mmengine writes")


def _misfits(checkpoint: Mapping[str, Any]) -> list[str]:
    """Parts of a checkpoint in which mmengine would run into an error of its own."""
    weights, averaged = checkpoint["state_dict"], checkpoint.get("ema_state_dict")
    wrong = [] if isinstance(checkpoint.get("optimizer", {}), Mapping) else ["optimizer"]
    if not isinstance(checkpoint.get("param_schedulers", []), (Mapping, list)):
        wrong.append("param_schedulers")
    if averaged is not None:
        # EMAHook exchanges what has the same names.
        names = [name for name in averaged if isinstance(name, str)] if isinstance(averaged, Mapping) else []
        known = all(name[7:] in weights for name in names if name.startswith("module."))
        if not names or not known:
            wrong.append("ema_state_dict")
    return wrong


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _settle_paths(runner: Runner, info: dict[str, Any]) -> None:
    """Keep, of the files that a message hub names, those in the folder where this run writes its checkpoints."""
    info.pop("last_ckpt", None)  # set again with the next checkpoint
    ids = info.get("keep_ckpt_ids")
    if ids is not None:
        info["keep_ckpt_ids"] = [step for step in ids if _is_count(step)] if isinstance(ids, list) else []
    folder = checkpoint_folder(runner)
    for key in [key for key in info if key == "best_ckpt" or key.startswith("best_ckpt_")]:
        name = Path(str(info[key]).replace("\\", "/")).name
        own = folder / name
        if name.startswith("best_") and name.endswith(".pth") and own.is_file():
            info[key] = str(own)
            continue
        del info[key]
        score = info.pop(key.replace("best_ckpt", "best_score", 1), None)
        print_log(
            f"The best checkpoint so far, {name!r} (score {score}), is not in {folder} and will not be touched.",
            "current",
        )


def checkpoint_folder(runner: Runner) -> Path:
    """The folder of CheckpointHook, which settles it only after the checkpoint is loaded.

    Where it writes to a storage service, no file on this machine is its own; the name of the folder is then none.
    """
    work_dir = Path(runner.work_dir)
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.out_dir is not None and Path(hook.out_dir) != work_dir:
            return Path(hook.out_dir) / work_dir.name
    return work_dir
