"""Trains a model of one layer in this process, in milliseconds."""

from itertools import count
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS, RUNNERS
from torch import nn
from torch.utils.data import Dataset

NAMES = (f"small-{number}" for number in count())  # mmengine keeps loggers and histories by the run's name


@MODELS.register_module()
class Line(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, inputs: torch.Tensor, mode: str = "tensor") -> dict | list:
        return {"loss": self.linear(inputs).pow(2).mean()} if mode == "loss" else [0]


@DATASETS.register_module()
class Numbers(Dataset):
    metainfo = {"classes": ("a", "b"), "palette": [(1, 2, 3), (4, 5, 6)]}

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        return {"inputs": torch.ones(3) * index}


@METRICS.register_module()
class Score(BaseMetric):
    """Gives the scores of a list, one for each validation, in all types that the hosts' metrics have."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = iter(scores)

    def process(self, data_batch: dict, data_samples: list) -> None:
        self.results.append(0)

    def compute_metrics(self, results: list) -> dict[str, object]:
        score = next(self.scores)
        numpy = {"single": np.float32(score), "count": np.int64(3), "per_class": np.ones(2)}
        return {"a": np.float64(score), "b/c": score, **numpy}


def run(
    work_dir: Path, steps: int, resume: Path | None = None, scores: tuple = (1.0, 2.0, 3.0), **settings: object
) -> object:
    """Train for some steps; each is followed by a checkpoint and a validation."""
    loader = {
        "dataset": {"type": "Numbers"},
        "batch_size": 2,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "collate_fn": {"type": "default_collate"},
    }
    save = {"type": "CheckpointHook", "interval": 1, "by_epoch": False, "save_best": "a", "rule": "greater"}
    runner_type = settings.pop("runner_type", "Runner")
    checkpoint = {**save, **settings.pop("checkpoint", {})}
    cfg = Config(
        {
            "runner_type": runner_type,
            "model": {"type": "Line"},
            "work_dir": str(work_dir),
            "train_cfg": {"by_epoch": False, "max_iters": steps, "val_interval": 1},
            "val_cfg": {},
            "val_evaluator": {"type": "Score", "scores": list(scores)},
            "optim_wrapper": {"optimizer": {"type": "SGD", "lr": 0.1}},
            "default_hooks": {"checkpoint": checkpoint},
            "custom_hooks": [{"type": "grootvl_mm.UntrustedCheckpointHook"}],
            "experiment_name": next(NAMES),
            "train_dataloader": loader,
            "val_dataloader": loader,
            "load_from": resume and str(resume),
            "resume": resume is not None,
            "env_cfg": {},
            "log_level": "ERROR",
            **settings,
        }
    )
    runner = RUNNERS.build(cfg)
    runner.train()
    return runner


def best(folder: Path) -> list[str]:
    """The names of the best checkpoints."""
    return sorted(path.name for path in folder.glob("best_*"))
