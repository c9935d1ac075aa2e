"""Hooks of mmengine's Runner."""

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner

from grootvl_mm.models.published import WEIGHTS, unwrap
from grootvl_mm.registry import HOOKS


@HOOKS.register_module()
class GlobalLossHook(Hook):
    """Report the losses of the whole batch in distributed training.

    mmengine logs what the first process computed on its share of the batch. This hook replaces
    it by the mean over the processes, so that the curve of a run does not depend on how many
    processes shared the batch. Gradients are not touched.
    """

    # Before RuntimeInfoHook (VERY_HIGH), which copies the values into the log.
    priority = "HIGHEST"

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: dict | tuple | list | None = None,
        outputs: dict | None = None,
    ) -> None:
        """Average ``outputs``, name to scalar tensor, over the processes, in place."""
        if not outputs or get_world_size() == 1:
            return
        names = sorted(outputs)
        values = torch.stack([outputs[name].detach().float() for name in names])
        all_reduce(values, op="mean")
        outputs.update(zip(names, values, strict=True))


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
