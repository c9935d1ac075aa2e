"""Stops a distributed training whose processes were not started alike."""

import hashlib
import itertools
from typing import Any

from mmengine.dist import all_gather_object, get_world_size, is_distributed
from mmengine.hooks import Hook
from mmengine.runner import Runner

from grootvl_mm.registry import HOOKS


class RanksDifferError(ValueError):
    """The processes of a distributed training would not train the same; the message is one line for the user."""


@HOOKS.register_module()
class RanksAgreeHook(Hook):
    """Compare what all processes of a training must have in common, before the first step.

    Different seeds make the samplers give some images twice and others never; different rates or models drift apart.
    Neither PyTorch nor mmengine says so.
    """

    # After what is loaded, and whatever changes rates.
    priority = "LOWEST"

    def before_train(self, runner: Runner) -> None:
        """Compare.

        Raises:
            RanksDifferError: on all processes, naming what differs.
        """
        if not is_distributed() or get_world_size() == 1:
            return
        described = all_gather_object(describe(runner))
        differing = [name for name in described[0] if len({repr(rank[name]) for rank in described}) > 1]
        if differing:
            values = "; ".join(
                f"{name}: " + ", ".join(f"{rank[name]} on rank {number}" for number, rank in enumerate(described[:4]))
                for name in differing
            )
            raise RanksDifferError(f"the processes do not train the same: {values}; start all of them alike")


def describe(runner: Runner) -> dict[str, Any]:
    """What must be the same on all processes."""
    groups = runner.optim_wrapper.param_groups
    groups = [groups] if isinstance(groups, list) else groups.values()  # several optimizers
    keys = ("lr", "weight_decay", "momentum", "betas")
    options = [[group.get(key) for key in keys] for group in itertools.chain(*groups)]
    shapes = [(name, tuple(value.shape), str(value.dtype)) for name, value in runner.model.named_parameters()]
    loop, loader = runner.train_loop, runner.train_dataloader
    return {
        "seed": runner.seed,
        "first step": (runner.epoch, runner.iter),
        "last step": (loop.max_epochs, loop.max_iters),
        "images of a rank's batch": getattr(loader, "batch_size", None),
        "size of the data set": len(loader.dataset),
        "learning rates and other options of the optimizer (digest)": _digest(options),
        "first learning rate": options[0][0] if options else None,
        "parameters of the model (digest)": _digest(shapes),
        "number of parameters": len(shapes),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]
