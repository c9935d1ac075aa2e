"""Trainings that are repeated, or interrupted and resumed, end with the same weights, bit by bit."""

from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import worker_init_fn

from grootvl_mm.apis.checkpoint_files import read_checkpoint
from grootvl_mm.engine.hooks.step_seed_hook import StepSeedHook, make_repeatable
from tests.helpers.training_runs import task_config, train

EMA = {"type": "EMAHook", "momentum": 0.25}


def random_everywhere(scope: str) -> Config:
    """A config that draws random numbers wherever its task can, beside its batches."""
    cfg = task_config(scope)
    cfg.model.backbone.drop_path_rate = 0.5
    if scope == "mmpretrain":
        cfg.model.train_cfg = {"augments": [{"type": "Mixup", "alpha": 0.8}, {"type": "CutMix", "alpha": 1.0}]}
    elif scope == "mmseg":
        cfg.model.decode_head.dropout_ratio = 0.5
    return cfg


def final_state(work_dir: Path, name: str) -> dict[str, dict]:
    content = read_checkpoint(work_dir / name)
    return {key: content[key] for key in ("state_dict", "ema_state_dict", "optimizer")}


def assert_same(got: object, expected: object) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("scope", "num_workers"),
    [("mmpretrain", 0), ("mmpretrain", 2), pytest.param("mmdet", 2, marks=pytest.mark.slow), ("mmseg", 0)],
)
def test_resumed_by_iterations(scope: str, num_workers: int, tmp_path: Path) -> None:
    cfg = random_everywhere(scope)
    options = {"augment": True, "num_workers": num_workers, "interval": 2}

    def hooks() -> list[dict]:
        return [{"type": "grootvl_mm.StepSeedHook"}, dict(EMA)]

    train(cfg, tmp_path / "whole", steps=4, hooks=hooks(), **options)
    train(cfg, tmp_path / "parts", steps=2, hooks=hooks(), **options)
    half = tmp_path / "parts" / "iter_2.pth"
    assert_same(final_state(tmp_path / "parts", "iter_2.pth"), final_state(tmp_path / "whole", "iter_2.pth"))
    train(cfg, tmp_path / "parts", steps=4, hooks=hooks(), checkpoint=half, resume=True, **options)
    assert_same(final_state(tmp_path / "parts", "iter_4.pth"), final_state(tmp_path / "whole", "iter_4.pth"))


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resumed_by_epochs(num_workers: int, tmp_path: Path) -> None:
    cfg = random_everywhere("mmpretrain")
    options = {"augment": True, "num_workers": num_workers, "interval": 1, "images": 4}

    def hooks() -> list[dict]:
        return [{"type": "grootvl_mm.StepSeedHook"}, dict(EMA)]

    train(cfg, tmp_path / "whole", epochs=3, hooks=hooks(), **options)
    train(cfg, tmp_path / "parts", epochs=1, hooks=hooks(), **options)
    first = tmp_path / "parts" / "epoch_1.pth"
    train(cfg, tmp_path / "parts", epochs=3, hooks=hooks(), checkpoint=first, resume=True, **options)
    assert_same(final_state(tmp_path / "parts", "epoch_3.pth"), final_state(tmp_path / "whole", "epoch_3.pth"))


def test_workers_of_each_epoch_and_run_have_their_own_seeds() -> None:
    """mmengine gives the workers of all epochs the same."""

    def seed_of(run: int, epoch: int) -> int:
        loader = SimpleNamespace(worker_init_fn=partial(worker_init_fn, num_workers=2, rank=0, seed=run))
        runner = SimpleNamespace(train_loop=None, train_dataloader=loader, seed=run, rank=0, epoch=epoch)
        StepSeedHook().before_train_epoch(runner)
        return loader.worker_init_fn.keywords["seed"]

    assert seed_of(0, 0) == seed_of(0, 0)
    seeds = {seed_of(run, epoch) for run in range(10) for epoch in range(10)}
    assert len(seeds) == 100
    assert 0 <= min(seeds) < max(seeds) < 2**31  # NumPy's limit is 2**32


@pytest.mark.parametrize(
    ("loop", "persistent"),
    [
        ({"by_epoch": True, "max_epochs": 2}, False),
        ({"type": "EpochBasedTrainLoop", "max_epochs": 2}, False),
        ({"by_epoch": False, "max_iters": 2}, True),
        ({"type": "IterBasedTrainLoop", "max_iters": 2}, True),
    ],
)
def test_configs_are_made_repeatable(loop: dict, persistent: bool) -> None:
    cfg = Config({"train_cfg": loop, "train_dataloader": {"persistent_workers": True}})
    make_repeatable(cfg)
    assert cfg.custom_hooks == [{"type": "grootvl_mm.StepSeedHook"}]
    assert cfg.train_dataloader.persistent_workers == persistent
    once = deepcopy(cfg)
    make_repeatable(cfg)
    assert cfg.to_dict() == once.to_dict()


def test_hook_of_the_config_is_kept() -> None:
    hooks = [{"type": "EMAHook"}, {"type": "grootvl_mm.StepSeedHook"}]
    cfg = Config({"train_cfg": {"by_epoch": False}, "train_dataloader": {}, "custom_hooks": hooks})
    make_repeatable(cfg)
    assert cfg.custom_hooks == hooks
