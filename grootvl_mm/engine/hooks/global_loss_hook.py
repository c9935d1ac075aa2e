"""Losses of the whole batch in the log of a distributed training."""

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner

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
