"""What tools/visualization/draw_predictions.py draws."""

from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from mmengine.structures import BaseDataElement
from PIL import ExifTags, Image

from grootvl_mm.visualization.explorer import Box, Overlay
from tests.helpers.config_cases import ROOT
from tests.helpers.tool_runs import call_script, load_script


def test_test_sets_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mmdet")
    monkeypatch.chdir(tmp_path)
    config = ROOT / "configs" / "demo" / "mask-rcnn_grootv-pico_fpn_demo.py"
    options = ("--cfg-options", "model.backbone.init_cfg=None")
    error = call_script("tools/visualization/draw_predictions.py", config, "none", "a.png", *options)
    assert error.startswith("error: cannot read the config's test set: ")
    error = call_script("tools/visualization/draw_predictions.py", config, "none", "a.png", "--cfg-options",
                        "test_dataloader=None")  # fmt: skip
    assert "needs a test_dataloader whose dataset has a pipeline" in error
    assert not list(tmp_path.iterdir())


def test_images_are_upright(tmp_path: Path) -> None:
    """As the pipelines of the hosts read them, whose boxes and masks are drawn."""
    path = tmp_path / "phone.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turned by 90 degrees
    Image.new("RGB", (64, 48), (250, 20, 20)).save(path, exif=exif)
    sample = BaseDataElement(metainfo={"img_path": str(path)})
    sample.gt_label = sample.pred_label = torch.tensor([0])
    tool = load_script("tools/visualization/draw_predictions.py")
    figure = tool.draw_grid([sample], {"classes": ("red",)}, 0.5)
    pixels = figure.axes[0].images[0].get_array()
    assert pixels.shape == (64, 48, 3)
    assert pixels[0, 0, 0] > 200 > 100 > pixels[0, 0, 2]


def test_boxes_and_texts() -> None:
    """A text without a box, as in class maps, is centred on its place."""
    axes = Figure().subplots()
    boxes = (Box(1, 2, 4, 5, "cat 0.90", (255, 255, 0)), Box(3, 4, 0, 0, "dog", (0, 0, 90)))
    load_script("tools/visualization/draw_predictions.py").draw_overlay(axes, Overlay("prediction", boxes, None, "two"))
    assert [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axes.patches] == [(1, 2, 4, 5)]
    texts = [(*text.get_position(), text.get_text(), text.get_ha(), text.get_color()) for text in axes.texts]
    assert texts == [(1, 2, "cat 0.90", "left", "black"), (3, 4, "dog", "center", "white")]
    assert axes.get_xlabel() == "two"
    assert not axes.images
