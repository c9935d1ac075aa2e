import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from grootvl_mm.utils.safe_checkpoints import allow_mmengine_checkpoints
from tests.helpers.marks import needs_safe_globals


class SafetyModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, inputs, mode="tensor"):
        return {"loss": self.linear(inputs).pow(2).mean()} if mode == "loss" else [0]


class SafetyData(Dataset):
    metainfo = {"classes": ("a", "b"), "palette": [(1, 2, 3), (4, 5, 6)]}

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {"inputs": torch.ones(3) * index}


class SafetyMetric(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        # Everything that hosts' metrics give: Python and NumPy scalars of several types, arrays.
        return {"a": np.float64(0.5), "b": np.float32(0.25), "c": np.int64(3), "d": 0.5, "per_class": np.ones(2)}


def make_runner(work_dir: Path, max_iters: int, **settings) -> Runner:
    loader = {
        "dataset": {"type": "SafetyData"},
        "batch_size": 2,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "collate_fn": {"type": "default_collate"},
    }
    cfg = Config(
        {
            "model": {"type": "SafetyModel"},
            "work_dir": str(work_dir),
            "train_cfg": {"by_epoch": False, "max_iters": max_iters, "val_interval": 2},
            "val_cfg": {},
            "val_evaluator": {"type": "SafetyMetric"},
            "optim_wrapper": {"optimizer": {"type": "AdamW", "lr": 0.1}, "clip_grad": {"max_norm": 1.0}},
            "param_scheduler": [{"type": "LinearLR", "by_epoch": False, "end": 3}],
            "default_hooks": {
                "checkpoint": {
                    "type": "CheckpointHook",
                    "interval": 2,
                    "by_epoch": False,
                    "save_best": "a",
                    "rule": "greater",
                }
            },
            "custom_hooks": [{"type": "EMAHook"}],
            "experiment_name": work_dir.name + str(max_iters),
            "train_dataloader": loader,
            "val_dataloader": loader,
            **settings,
        }
    )
    return Runner.from_cfg(cfg)


@pytest.fixture(autouse=True)
def registered():
    parts = ((MODELS, SafetyModel), (DATASETS, SafetyData), (METRICS, SafetyMetric))
    for registry, part in parts:
        registry.register_module(module=part)
    yield
    for registry, part in parts:
        del registry.module_dict[part.__name__]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    make_runner(tmp_path, 2).train()
    return tmp_path / "iter_2.pth"


def load_in_fresh_process(checkpoint: Path, imports: str) -> subprocess.CompletedProcess:
    code = (
        f"{imports}\nimport torch\n"
        f"content = torch.load({str(checkpoint)!r}, weights_only=True)\n"
        "loss = content['message_hub']['log_scalars']['train/loss']\n"
        "assert loss.statistics('mean', 2) == loss.mean(2) > 0\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@needs_safe_globals
def test_runner_checkpoint_loads_safely_once_the_package_is_imported(checkpoint: Path):
    without = load_in_fresh_process(checkpoint, "import mmengine")
    assert "Unsupported global" in without.stderr
    loaded = load_in_fresh_process(checkpoint, "import grootvl_mm")
    assert loaded.returncode == 0, loaded.stderr


def test_resume_works(checkpoint: Path):
    runner = make_runner(checkpoint.parent, 4, resume=True, load_from=str(checkpoint))
    runner.train()
    assert runner.iter == 4
    assert len(runner.message_hub.get_scalar("train/loss").data[0]) == 4


@needs_safe_globals
def test_every_numeric_type_loads(tmp_path: Path):
    content = [np.ones(2, dtype=code) for code in "?bhilBHILefd"] + [np.float32(1), np.int16(2), np.bool_(True)]
    torch.save(content, tmp_path / "arrays.pth")
    allow_mmengine_checkpoints()
    loaded = torch.load(tmp_path / "arrays.pth", weights_only=True)
    assert [item.dtype for item in loaded] == [item.dtype for item in content]


class Command:
    def __reduce__(self):
        return (print, ("executed",))


class ReachForGlobals:
    def __reduce__(self):
        return (getattr, (HistoryBuffer, "__init__"))


@pytest.mark.parametrize(
    "content", [Command(), ReachForGlobals(), np.array([Command()], dtype=object)], ids=["call", "attribute", "objects"]
)
def test_other_content_is_still_refused(content, tmp_path: Path):
    allow_mmengine_checkpoints()
    torch.save({"state_dict": content}, tmp_path / "crafted.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "crafted.pth", weights_only=True)
