"""Trainings with TreeVisualizationHook: when it draws, what, and that they stay the same."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.model import BaseModel, ImgDataPreprocessor
from mmengine.registry import DATASETS, MODELS, VISBACKENDS
from mmengine.visualization import BaseVisBackend
from torch import nn
from torch.utils.data import Dataset

from grootvl_mm.engine.hooks import TreeVisualizationHook
from grootvl_mm.models import GrootV
from tests.helpers.small_runs import run
from tests.helpers.training_runs import CONFIGS, make_runner, task_config

DRAWN: list[tuple] = []


@MODELS.register_module()
class SmallTrees(BaseModel):
    def __init__(self) -> None:
        super().__init__(ImgDataPreprocessor(mean=[120] * 3, std=[60] * 3, pad_size_divisor=16))
        self.backbone = GrootV({"channels": 4, "depths": [1, 1]}, out_indices=(0, 1), drop_path_rate=0.5)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, inputs: torch.Tensor, data_samples: list | None = None, mode: str = "tensor") -> dict | list:
        feature = self.norm(self.backbone(inputs)[-1])
        return {"loss": feature.square().mean()} if mode == "loss" else [0] * len(feature)


@DATASETS.register_module()
class SmallImages(Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return {"inputs": torch.randint(255, (3, 24, 40), generator=generator, dtype=torch.uint8)}


@VISBACKENDS.register_module()
class Noted(BaseVisBackend):
    """Notes what is shown."""

    @property
    def experiment(self) -> "Noted":
        return self

    def add_image(self, name, image, step=0, **kwargs) -> None:
        DRAWN.append((name, image.shape, step))

    def _init_env(self) -> None: ...
    def add_config(self, config, **kwargs) -> None: ...
    def add_graph(self, model, data_batch, **kwargs) -> None: ...
    def add_scalar(self, name, value, step=0, **kwargs) -> None: ...
    def add_scalars(self, scalars, step=0, file_path=None, **kwargs) -> None: ...


def train(work_dir: Path, steps: int = 4, hook: dict | None = None, backend: str = "Noted", **settings):
    DRAWN.clear()
    torch.manual_seed(0)
    loader = {
        "dataset": {"type": "SmallImages"},
        "batch_size": 2,
        "sampler": {"type": "DefaultSampler", "shuffle": False},
        "collate_fn": {"type": "pseudo_collate"},
    }
    hooks = [] if hook is None else [{"type": "grootvl_mm.TreeVisualizationHook", "dpi": 30, **hook}]
    settings = {
        "model": {"type": "SmallTrees"},
        "train_dataloader": loader,
        "val_dataloader": loader,
        "custom_hooks": hooks,
        "visualizer": {"type": "Visualizer", "vis_backends": [{"type": backend}], "name": str(work_dir)},
        "randomness": {"seed": 0},
        "train_cfg": {"by_epoch": False, "max_iters": steps, "val_interval": 3},
        **settings,
    }
    return run(work_dir, steps, **settings)


def test_draws_at_the_start_at_intervals_and_after_validations(tmp_path: Path) -> None:
    train(tmp_path / "a", 5, {"interval": 2, "stages": [1]})
    assert [(name, step) for name, _, step in DRAWN] == [("trees", step) for step in (0, 2, 3, 4, 5)]
    one_stage = DRAWN[0][1]
    train(tmp_path / "b", 1, {"interval": 100, "color": "depth"})
    assert [step for _, _, step in DRAWN] == [0, 1]
    assert DRAWN[0][1][0] > one_stage[0]


def test_averaged_weights_have_their_own_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With EMAHook, the figures after validations show the validated weights, the others those that are trained."""
    weights: dict[str, list[torch.Tensor]] = {"drawn": [], "validated": []}
    original = SmallTrees.val_step

    def val_step(model: SmallTrees, data: dict) -> list:
        kind = "drawn" if len(data["inputs"]) == 1 else "validated"
        weights[kind].append(model.backbone.stages[0].blocks[0].mixer.out_proj.weight.detach().clone())
        return original(model, data)

    monkeypatch.setattr(SmallTrees, "val_step", val_step)
    hook = {"type": "grootvl_mm.TreeVisualizationHook", "dpi": 30, "interval": 3, "stages": [1]}
    train(tmp_path, 3, custom_hooks=[{"type": "EMAHook", "momentum": 0.5}, hook])
    assert [(name, step) for name, _, step in DRAWN] == [("trees", 0), ("trees", 3), ("trees_ema", 3)]
    _, trained, averaged = weights["drawn"]
    assert torch.equal(averaged, weights["validated"][-1])
    assert not torch.equal(averaged, trained)


def test_the_training_stays_the_same(tmp_path: Path) -> None:
    """Also the statistics of batch norm, and the random numbers of drop path."""
    plain = train(tmp_path / "plain", 3).model.state_dict()
    hooked = train(tmp_path / "hooked", 3, {"interval": 1, "stages": [1]}).model.state_dict()
    assert len(DRAWN) == 4
    assert all(torch.equal(value, plain[name]) for name, value in hooked.items())


def test_local_files(tmp_path: Path) -> None:
    train(tmp_path, 1, {"interval": 1, "stages": [1]}, "LocalVisBackend")
    files = sorted(tmp_path.glob("*/vis_data/vis_image/*.png"))
    assert [path.name for path in files] == ["trees_0.png", "trees_1.png"]
    assert cv2.imread(str(files[0])).std() > 10


def test_tensorboard(tmp_path: Path) -> None:
    """The images in the event file are those of the local files."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path / "files", 1, {"interval": 1, "stages": [1]}, "LocalVisBackend")
    train(tmp_path / "events", 1, {"interval": 1, "stages": [1]}, "TensorboardVisBackend")
    (folder,) = tmp_path.glob("events/*/vis_data")
    shown = accumulator.EventAccumulator(str(folder), size_guidance={"images": 0}).Reload().Images("trees")
    assert [event.step for event in shown] == [0, 1]
    for event in shown:
        (file,) = tmp_path.glob(f"files/*/vis_data/vis_image/trees_{event.step}.png")
        image = cv2.imdecode(np.frombuffer(event.encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(image, cv2.imread(str(file)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"color": "red"}, "color must be one of order, weight, depth, got 'red'"),
        ({"cut_share": -1}, r"cut_share must be between 0 and 1, got -1"),
    ],
)
def test_wrong_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeVisualizationHook(**options)


def test_runs_without_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="set val_dataloader in the config"):
        train(tmp_path / "a", hook={}, val_cfg=None, val_dataloader=None, val_evaluator=None)
    with pytest.raises(ValueError, match="none of the stages"):
        train(tmp_path / "b", hook={"stages": [2]})
    with pytest.raises(ValueError, match="has no TreeSSM"):
        run(tmp_path / "c", 1, custom_hooks=[{"type": "grootvl_mm.TreeVisualizationHook"}])


@pytest.mark.parametrize("scope", CONFIGS)
def test_tasks(scope: str, tmp_path: Path) -> None:
    """The models of the hosts, whose first validation image may be larger than what their backbone sees first."""
    cfg = task_config(scope)
    if scope == "mmseg":
        cfg.model.test_cfg = {"mode": "slide", "crop_size": (48, 48), "stride": (32, 32)}
    runner = make_runner(cfg, tmp_path, steps=1, hooks=[TreeVisualizationHook(stages=[0], dpi=30)])
    runner.train()
    files = sorted(tmp_path.glob("*/vis_data/vis_image/*.png"))
    assert [path.name for path in files] == ["trees_0.png", "trees_1.png"]
