"""Makes a training repeat itself exactly: run twice, or interrupted and resumed.

mmengine seeds the generators of random numbers once, when the process starts, and its checkpoints do not hold their
state. After ``--resume``, drop path, dropout, mixup, the sampling of boxes and the augmentation would go on with other
numbers than in a run that was never interrupted. Here every step gets a seed of its own, which follows from the run's
seed and the number of the step; nothing has to be saved.
"""

import logging
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import worker_init_fn
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from grootvl_mm.registry import HOOKS

# What the random numbers are for: each use has a stream of its own.
STEP, BATCH, EPOCH, WORKERS = range(4)


def make_repeatable(cfg: Config) -> None:
    """Change, in place, a training config so that resuming repeats what an interruption destroyed.

    It adds :class:`StepSeedHook`, and in epoch-based training each epoch starts its data workers anew.

    Args:
        cfg: A config of mmengine's Runner with a ``train_dataloader``.
    """
    hooks = cfg.get("custom_hooks") or []
    name = f"grootvl_mm.{StepSeedHook.__name__}"
    if not any(hook["type"] == name for hook in hooks):
        cfg.custom_hooks = [*hooks, {"type": name}]
    loop, loader = cfg.train_cfg, cfg.train_dataloader
    by_epoch = loop.type == EpochBasedTrainLoop.__name__ if "type" in loop else loop.by_epoch
    if by_epoch and loader.get("persistent_workers"):
        loader.persistent_workers = False
        print_log("Each epoch starts its data workers anew (persistent_workers=False), with its own seed.", "current")


@HOOKS.register_module()
class StepSeedHook(Hook):
    """Seed Python's, NumPy's and torch's generators for each training step, from the run's seed.

    The processes of a distributed training draw different numbers. What the workers of a data loader draw:

    - In iteration-based training, mmengine skips the batches of the steps that were done by loading them again, which
      brings the workers to where they were.
    - In epoch-based training, the workers that start with an epoch get its seed; mmengine gives them the same one in
      every epoch. This needs ``persistent_workers=False``.
    """

    # Before any hook that draws random numbers.
    priority = "HIGHEST"

    def before_train(self, runner: Runner) -> None:
        """Give the batches of an iteration-based training their seeds; warn of workers that cannot get theirs."""
        loop, loader = runner.train_loop, runner.train_dataloader
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = _SeededBatches(loop.dataloader_iterator, runner)
        elif loader.persistent_workers:
            print_log(
                "This training cannot be resumed exactly: its data workers outlive the epochs. Set "
                "train_dataloader.persistent_workers=False.",
                "current",
                logging.WARNING,
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed what comes before an epoch's first step, and the epoch's workers."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            return
        _seed_generators(runner, EPOCH, runner.epoch)
        loader = runner.train_dataloader
        init = loader.worker_init_fn
        if isinstance(init, partial) and init.func is worker_init_fn:
            # mmengine adds the number of the worker, counted over all processes.
            seed = np.random.SeedSequence((runner.seed, WORKERS, runner.epoch)).generate_state(1).item() // 2
            loader.worker_init_fn = partial(init, seed=seed)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed the step."""
        _seed_generators(runner, STEP, runner.iter)


class _SeededBatches:
    """Seeds before each batch: with ``num_workers=0`` it is this process that augments it."""

    def __init__(self, batches: Iterator, runner: Runner) -> None:
        self.batches = batches
        self.runner = runner
        self.loaded = 0

    def __iter__(self) -> Iterator:
        return self

    def __next__(self) -> Any:
        _seed_generators(self.runner, BATCH, self.loaded)
        self.loaded += 1
        return next(self.batches)

    def skip_iter(self, num_iters: int) -> None:
        """Load the batches of steps that were done. onedl-mmengine's own only skips them, whatever a worker draws."""
        for _ in range(num_iters):
            next(self)


def _seed_generators(runner: Runner, stream: int, number: int) -> None:
    sequence = np.random.SeedSequence((runner.seed, runner.rank, stream, number))
    for_python, for_numpy, for_torch = sequence.generate_state(3, np.uint64).tolist()
    random.seed(for_python)
    np.random.seed(for_numpy >> 32)
    torch.manual_seed(for_torch)
