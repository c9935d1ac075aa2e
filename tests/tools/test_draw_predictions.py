"""What tools/visualization/draw_predictions.py draws of a sample."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData

from tests.helpers.tool_runs import load_script

META = {"classes": ("cat", "dog"), "palette": [(255, 0, 0), (0, 255, 0)]}


@pytest.mark.parametrize("with_masks", [True, False])
def test_detections_with_and_without_masks(with_masks: bool) -> None:
    module = load_script("tools/visualization/draw_predictions.py")
    boxes = torch.tensor([[1.0, 2.0, 5.0, 6.0], [0.0, 0.0, 3.0, 3.0]])
    truth = InstanceData(bboxes=boxes, labels=torch.tensor([0, 1]))
    found = InstanceData(bboxes=boxes, labels=torch.tensor([1, 0]), scores=torch.tensor([0.9, 0.2]))
    if with_masks:
        truth.masks = BitmapMasks(np.ones((2, 8, 8), np.uint8), 8, 8)
        found.masks = torch.ones(2, 8, 8, dtype=torch.bool)
    pair = Figure().subplots(1, 2)
    module.draw_detection(pair, SimpleNamespace(gt_instances=truth, pred_instances=found), META, 0.5)
    assert [len(axes.patches) for axes in pair] == [2, 1]
    assert [len(axes.images) for axes in pair] == ([2, 1] if with_masks else [0, 0])
    assert [text.get_text() for axes in pair for text in axes.texts] == ["cat", "dog", "dog 0.90"]
