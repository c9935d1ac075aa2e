"""Published checkpoints in a run with an exponential moving average (EMA) of the weights."""

from collections.abc import Mapping
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from grootvl_mm.models.published_checkpoints import WEIGHTS, unwrap
from grootvl_mm.registry import HOOKS


@HOOKS.register_module()
class PublishedCheckpointHook(Hook):
    """Let a run with averaged weights (EMAHook) start from a published file, and so evaluate its averaged weights.

    The model reads published files by itself, but EMAHook looks for the names that only mmengine's own checkpoints
    have: the averaged weights under ``state_dict``, the others under ``ema_state_dict``. This hook puts them there.
    """

    # Before EMAHook, whose own priority is NORMAL and ABOVE_NORMAL in the hosts' recipes.
    priority = "HIGH"

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Complete ``checkpoint``, the content of the file, in place."""
        if "state_dict" in checkpoint:
            return
        last, averaged = (checkpoint.get(name) for name in WEIGHTS)
        if isinstance(last, Mapping) and isinstance(averaged, Mapping):
            checkpoint["ema_state_dict"] = {f"module.{name}": value for name, value in unwrap(last).items()}
            checkpoint["state_dict"] = unwrap(averaged)
        else:
            checkpoint["state_dict"] = unwrap(checkpoint)
