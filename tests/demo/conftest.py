"""Untrained pico models of the three tasks, as checkpoints, and small images to show them."""

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope

from tests.helpers.config_cases import ROOT, load_config
from tests.helpers.tool_fixtures import command, demo_data

__all__ = ["command", "demo_data"]

NAMES = {
    "det": "mask-rcnn_grootv-pico_fpn_demo",
    "seg": "grootv-pico_upernet_demo-seg",
    "cls": "grootv-pico_demo-cls",
}


@pytest.fixture(autouse=True)
def _scope() -> Iterator[None]:
    """The inferencers of mmdet and mmseg change the default scope for good, that of mmpretrain relies on it."""
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoint of each task, with classes and colours as mmengine's Runner notes them."""
    folder = tmp_path_factory.mktemp("checkpoints")
    files = {}
    for task, name in NAMES.items():
        cfg = load_config(ROOT / "configs" / "demo" / f"{name}.py")
        if "data_preprocessor" in cfg:
            cfg.model.data_preprocessor = cfg.data_preprocessor
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            model = MODELS.build(cfg.model)
            model.init_weights()
        files[task] = str(folder / f"{task}.pth")
        meta = {"dataset_meta": dict(cfg.test_dataloader.dataset.metainfo)}
        torch.save({"state_dict": model.state_dict(), "meta": meta}, files[task])
    return files


@pytest.fixture(scope="session")
def image() -> np.ndarray:
    """A blue image (BGR) of 48 x 64 pixels with a bright square."""
    image = np.full((48, 64, 3), (200, 40, 20), dtype=np.uint8)
    image[10:30, 20:40] = 230
    return image


@pytest.fixture
def images(image: np.ndarray, tmp_path: Path) -> Path:
    """A folder of two images, of different sizes and formats, and a text."""
    folder = tmp_path / "images"
    folder.mkdir()
    cv2.imwrite(str(folder / "b.png"), image)
    cv2.imwrite(str(folder / "a.jpg"), image[:, :50])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def video(image: np.ndarray, tmp_path: Path) -> Path:
    """Five frames at 10 frames per second."""
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10.0, (64, 48))
    for index in range(5):
        writer.write(np.roll(image, 4 * index, axis=1))
    writer.release()
    return path
