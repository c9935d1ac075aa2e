"""Logs the losses of the whole batch in distributed training."""

import torch
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import Runner

from grootvl_mm.registry import HOOKS


@HOOKS.register_module()
class GlobalLossHook(Hook):
    """Average the logged losses over all ranks.

    mmengine logs the losses of rank 0 on its share of the batch. With this hook, the loss curve does not depend on the
    number of ranks. Gradients are unaffected.
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
        """Average ``outputs``, name to scalar tensor, over the ranks, in place."""
        if not outputs or get_world_size() == 1:
            return
        names = sorted(outputs)
        values = torch.stack([outputs[name].detach().float() for name in names])
        all_reduce(values, op="mean")
        outputs.update(zip(names, values, strict=True))
