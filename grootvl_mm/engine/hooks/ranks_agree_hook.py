"""Stops a distributed training whose ranks were started with different settings."""

import hashlib
import itertools
from typing import Any

from mmengine.dist import all_gather_object, get_world_size, is_distributed
from mmengine.hooks import Hook
from mmengine.runner import Runner

from grootvl_mm.registry import HOOKS


class RanksDifferError(ValueError):
    """The ranks of a distributed training have different settings; the message is one line for the user."""


@HOOKS.register_module()
class RanksAgreeHook(Hook):
    """Check before the first iteration that all ranks have the same seed, schedule, data, optimizer and model.

    With different seeds, the samplers draw some images twice and others never; with different learning rates or models,
    the ranks diverge. Neither PyTorch nor mmengine reports it.
    """

    # After loading checkpoints and after every hook that changes learning rates.
    priority = "LOWEST"

    def before_train(self, runner: Runner) -> None:
        """Compare the settings of all ranks.

        Raises:
            RanksDifferError: Some differ. Raised on all ranks, with the settings and their values.
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
            raise RanksDifferError(
                f"the ranks differ in: {values}; start all of them with the same code, config and options"
            )


def describe(runner: Runner) -> dict[str, Any]:
    """The settings that must be the same on all ranks."""
    groups = runner.optim_wrapper.param_groups
    groups = [groups] if isinstance(groups, list) else groups.values()  # several optimizers
    keys = ("lr", "weight_decay", "momentum", "betas")
    options = [[group.get(key) for key in keys] for group in itertools.chain(*groups)]
    shapes = [(name, tuple(value.shape), str(value.dtype)) for name, value in runner.model.named_parameters()]
    loop, loader = runner.train_loop, runner.train_dataloader
    return {
        "seed": runner.seed,
        "start (epoch, iteration)": (runner.epoch, runner.iter),
        "end (epoch, iteration)": (loop.max_epochs, loop.max_iters),
        "batch size per rank": getattr(loader, "batch_size", None),
        "dataset size": len(loader.dataset),
        "optimizer options (digest)": _digest(options),
        "first learning rate": options[0][0] if options else None,
        "model parameters (digest)": _digest(shapes),
        "number of parameters": len(shapes),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:8]
