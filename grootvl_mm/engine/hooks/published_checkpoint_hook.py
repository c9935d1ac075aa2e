"""Loads the authors' published checkpoints in runs with an exponential moving average (EMA) of the weights."""

from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from grootvl_mm.models.published_checkpoints import WEIGHTS, unwrap
from grootvl_mm.registry import HOOKS


@HOOKS.register_module()
class PublishedCheckpointHook(Hook):
    """Load both the EMA and the current weights of a published checkpoint into a run with EMAHook.

    The model reads published checkpoints itself, but EMAHook expects mmengine's format: the EMA weights under
    ``state_dict``, the current ones under ``ema_state_dict``. This hook converts the checkpoint to it.
    """

    # Before EMAHook, whose priority is NORMAL, or ABOVE_NORMAL in the recipes of mmdet, mmseg and mmpretrain.
    priority = "HIGH"

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Convert ``checkpoint``, the content of the file, in place."""
        if "state_dict" in checkpoint:
            return
        last, averaged = (checkpoint.get(name) for name in WEIGHTS)
        if isinstance(last, Mapping) and isinstance(averaged, Mapping):
            checkpoint["ema_state_dict"] = {f"module.{name}": value for name, value in unwrap(last).items()}
            checkpoint["state_dict"] = unwrap(averaged)
        else:
            checkpoint["state_dict"] = unwrap(checkpoint)
