"""Trains the models of the demo configs in this process, on random images."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import Dataset

from tests.helpers.config_cases import IMAGE_SIZE, ROOT, load_config, random_batch

CONFIGS = {
    "mmpretrain": "grootv-pico_demo-cls.py",
    "mmdet": "mask-rcnn_grootv-pico_fpn_demo.py",
    "mmseg": "grootv-pico_upernet_demo-seg.py",
}
NAMES = (f"run-{number}" for number in count())  # mmengine caches loggers and histories by the name of the run


class RandomImages(Dataset):
    """Random images with ground truth for a config: the same in each epoch, or randomly shifted as augmentation."""

    def __init__(self, cfg: Config, length: int, augment: bool) -> None:
        batch = random_batch(cfg)
        self.items = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        self.length = length
        self.augment = augment

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        item = deepcopy(self.items[index % len(self.items)])
        shift = 5 * index + (np.random.randint(IMAGE_SIZE) if self.augment else 0)
        item["inputs"] = item["inputs"].roll(int(shift), dims=-1)
        return item


class CountImages(BaseMetric):
    """Replaces the tasks' metrics, which need the ground truth of real images."""

    def process(self, data_batch: dict, data_samples: Sequence) -> None:
        self.results.extend(data_samples)

    def compute_metrics(self, results: list) -> dict[str, int]:
        return {"images": len(results)}


class Losses(Hook):
    """Records the loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.values.append(float(outputs["loss"]))


def task_config(scope: str) -> Config:
    """The demo config of a task, with small images."""
    pytest.importorskip(scope)
    cfg = load_config(ROOT / "configs" / "demo" / CONFIGS[scope])
    if scope == "mmseg":
        cfg.model.data_preprocessor.size = (IMAGE_SIZE, IMAGE_SIZE)
    return cfg


def without_batch_norm(cfg: Config) -> Config:
    """A classifier whose loss is the mean over the images."""
    cfg.model.neck = {"type": "GlobalAveragePooling"}
    cfg.model.head.in_channels = 192
    return cfg


def make_runner(
    cfg: Config,
    work_dir: Path,
    *,
    steps: int = 2,
    epochs: int | None = None,
    batch_size: int = 2,
    images: int = 8,
    augment: bool = False,
    num_workers: int = 0,
    interval: int = -1,
    hooks: Sequence = (),
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Runner:
    """A runner for a task's config on random images.

    Args:
        cfg: Config from :func:`task_config`; its model, optimizer and schedulers are used.
        work_dir: Folder for logs and checkpoints.
        steps: Number of iterations, if ``epochs`` is None.
        epochs: Number of epochs; makes the training epoch-based.
        batch_size: Batch size in training.
        images: Number of training images.
        augment: Shift the images at random.
        num_workers: Number of workers of the training data loader.
        interval: Checkpoint interval, in iterations or epochs; -1 for no checkpoints.
        hooks: Custom hooks.
        checkpoint: File to load.
        resume: Whether to resume from the checkpoint, instead of only loading its weights.
    """
    loader = {"num_workers": num_workers, "collate_fn": {"type": "pseudo_collate"}}
    train = RandomImages(cfg, images, augment)
    test = {
        **loader,
        "num_workers": 0,
        "dataset": RandomImages(cfg, 2, augment=False),
        "sampler": {"type": "DefaultSampler", "shuffle": False},
    }
    model = deepcopy(cfg.model)
    if "data_preprocessor" in cfg:
        model.setdefault("data_preprocessor", cfg.data_preprocessor)
    sampler = "InfiniteSampler" if epochs is None else "DefaultSampler"
    return Runner(
        model=model,
        work_dir=str(work_dir),
        train_dataloader={
            **loader,
            "batch_size": batch_size,
            "dataset": train,
            "sampler": {"type": sampler, "shuffle": True},
        },
        val_dataloader=test,
        test_dataloader=deepcopy(test),
        train_cfg={"by_epoch": False, "max_iters": steps, "val_interval": steps}
        if epochs is None
        else {"by_epoch": True, "max_epochs": epochs, "val_interval": epochs},
        val_cfg={},
        test_cfg={},
        val_evaluator=[CountImages(prefix="count")],
        test_evaluator=[CountImages(prefix="count")],
        optim_wrapper=deepcopy(cfg.optim_wrapper),
        param_scheduler=deepcopy(cfg.param_scheduler),
        default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": interval, "by_epoch": epochs is not None}},
        custom_hooks=list(hooks),
        load_from=checkpoint and str(checkpoint),
        resume=resume,
        default_scope=cfg.default_scope,
        randomness={"seed": 0},
        log_level="ERROR",
        experiment_name=next(NAMES),
        cfg=Config({"gpu_ids": None}),
    )


def train(cfg: Config, work_dir: Path, **options: object) -> Runner:
    """Train with the arguments of :func:`make_runner` and return the runner."""
    runner = make_runner(cfg, work_dir, **options)
    runner.train()
    return runner


def weights(runner: Runner) -> dict[str, torch.Tensor]:
    """The parameters of a runner's model."""
    return {name: parameter.detach().clone() for name, parameter in runner.model.named_parameters()}
