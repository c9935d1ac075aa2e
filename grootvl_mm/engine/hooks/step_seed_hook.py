"""Makes training exactly reproducible, also across interruption and resume.

mmengine seeds the random number generators once, at process start, and does not save their states in checkpoints. After
``--resume``, drop path, dropout, mixup, box sampling and augmentation would draw other numbers than in an uninterrupted
run. This hook seeds every iteration from the run's seed and the iteration number, so no state has to be saved.
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

# Independent random streams, one for each use.
STEP, BATCH, EPOCH, WORKERS = range(4)


def make_repeatable(cfg: Config) -> None:
    """Change a training config in place so that a resumed run equals an uninterrupted one.

    Adds :class:`StepSeedHook`. In epoch-based training it also turns persistent workers off.

    Args:
        cfg: A config for mmengine's Runner with a ``train_dataloader``.
    """
    hooks = cfg.get("custom_hooks") or []
    name = f"grootvl_mm.{StepSeedHook.__name__}"
    if not any(hook["type"] == name for hook in hooks):
        cfg.custom_hooks = [*hooks, {"type": name}]
    loop, loader = cfg.train_cfg, cfg.train_dataloader
    by_epoch = loop.type == EpochBasedTrainLoop.__name__ if "type" in loop else loop.by_epoch
    if by_epoch and loader.get("persistent_workers"):
        loader.persistent_workers = False
        print_log("Set persistent_workers=False: every epoch seeds its own data loader workers.", "current")


@HOOKS.register_module()
class StepSeedHook(Hook):
    """Seed the generators of Python, NumPy and torch in each training iteration, derived from the run's seed.

    The ranks of a distributed training draw different numbers. The random state of the data loader workers is restored
    as follows:

    - In iteration-based training, resuming loads and discards the batches of finished iterations.
    - In epoch-based training, every epoch starts its workers with a different seed; mmengine would use the same one in
      each epoch. This needs ``persistent_workers=False``.
    """

    # Before any hook that draws random numbers.
    priority = "HIGHEST"

    def before_train(self, runner: Runner) -> None:
        """Seed the batches of an iteration-based training; warn about persistent workers, which cannot be seeded."""
        loop, loader = runner.train_loop, runner.train_dataloader
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = _SeededBatches(loop.dataloader_iterator, runner)
        elif loader.persistent_workers:
            print_log(
                "This training cannot be resumed exactly, because of its persistent workers. Set "
                "train_dataloader.persistent_workers=False.",
                "current",
                logging.WARNING,
            )

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed the start of an epoch and its data loader workers."""
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            return
        _seed_generators(runner, EPOCH, runner.epoch)
        loader = runner.train_dataloader
        init = loader.worker_init_fn
        if isinstance(init, partial) and init.func is worker_init_fn:
            # mmengine adds the worker's number, counted over all ranks.
            seed = np.random.SeedSequence((runner.seed, WORKERS, runner.epoch)).generate_state(1).item() // 2
            loader.worker_init_fn = partial(init, seed=seed)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed the iteration."""
        _seed_generators(runner, STEP, runner.iter)


class _SeededBatches:
    """Seeds this process before it loads each batch, because with ``num_workers=0`` it also runs the augmentation."""

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
        """Load and discard the batches of finished iterations; onedl-mmengine would skip them without loading."""
        for _ in range(num_iters):
            next(self)


def _seed_generators(runner: Runner, stream: int, number: int) -> None:
    sequence = np.random.SeedSequence((runner.seed, runner.rank, stream, number))
    for_python, for_numpy, for_torch = sequence.generate_state(3, np.uint64).tolist()
    random.seed(for_python)
    np.random.seed(for_numpy >> 32)
    torch.manual_seed(for_torch)
