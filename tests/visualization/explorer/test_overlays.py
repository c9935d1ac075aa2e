"""Ground truth and predictions of the hosts as overlays."""

import numpy as np
import pytest
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from grootvl_mm.visualization.explorer import make_overlays

META = {"classes": ("background", "dog"), "palette": [(255, 0, 0), (0, 255, 0)]}
FILE, SIZE = (20, 40), (10, 30)  # the model sees half of the height and three quarters of the width


def sample(**content: object) -> BaseDataElement:
    found = BaseDataElement(metainfo={"ori_shape": FILE})
    for name, value in content.items():
        setattr(found, name, value)
    return found


@pytest.mark.parametrize("with_masks", [True, False])
def test_detections(with_masks: bool) -> None:
    BitmapMasks = pytest.importorskip("mmdet.structures.mask").BitmapMasks
    boxes, labels = torch.tensor([[4.0, 2.0, 20.0, 6.0], [0.0, 0.0, 8.0, 8.0]]), torch.tensor([1, 0])
    truth = InstanceData(bboxes=boxes[:1], labels=labels[:1])
    found = InstanceData(bboxes=boxes, labels=labels, scores=torch.tensor([0.91, 0.2]))
    if with_masks:
        mask = np.zeros((2, *FILE), np.uint8)
        mask[:, 2:6, 4:20] = 1
        truth.masks = BitmapMasks(mask[:1], *FILE)
        found.masks = torch.from_numpy(mask).bool()
    overlays = make_overlays(sample(gt_instances=truth, pred_instances=found), META, SIZE)
    assert [overlay.name for overlay in overlays] == ["ground truth", "prediction"]
    for overlay, text in zip(overlays, ("dog", "dog 0.91"), strict=True):
        (box,) = overlay.boxes
        assert box == (3, 1, 12, 2, text, (0, 255, 0))
        if with_masks:
            assert overlay.picture.shape == (*SIZE, 4)
            rows, columns = np.nonzero(overlay.picture[..., 3])
            assert (rows.min(), rows.max(), columns.min(), columns.max()) == (1, 2, 3, 14)
            assert (overlay.picture[1, 3, :3] == (0, 255, 0)).all()
        else:
            assert overlay.picture is None


def test_class_maps() -> None:
    labels = torch.zeros(1, *FILE, dtype=torch.int64)
    labels[:, :, 20:] = 1
    ignoring = labels.clone()
    ignoring[:, :, :20] = 255
    overlays = make_overlays(
        sample(gt_sem_seg=PixelData(data=ignoring), pred_sem_seg=PixelData(data=labels)), META, SIZE
    )
    for overlay in overlays:
        assert (overlay.picture[:, :15, 3] == 0).all()  # neither the background nor what is to be ignored
        assert (overlay.picture[:, 15:, 3] > 0).all()
        assert [box.text for box in overlay.boxes] == ["dog"]


def test_labels() -> None:
    found = sample(gt_label=torch.tensor([1]), pred_label=torch.tensor([0]), pred_score=torch.tensor([0.75, 0.25]))
    overlays = make_overlays(found, META, SIZE)
    assert [overlay.caption for overlay in overlays] == ["Ground truth: dog", "Prediction: background, score 0.75"]


def test_nothing_known() -> None:
    """Without annotations hosts leave empty instances behind; classes without names and colours get some."""
    empty = sample(gt_instances=InstanceData(), pred_instances=InstanceData(
        bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), scores=torch.zeros(0)))  # fmt: skip
    assert make_overlays(empty, META, SIZE) == []
    boxes = InstanceData(bboxes=torch.ones(3, 4), labels=torch.tensor([0, 1, 2]), scores=torch.ones(3))
    (overlay,) = make_overlays(sample(pred_instances=boxes), {}, SIZE)
    assert [box.text for box in overlay.boxes] == ["class 0 1.00", "class 1 1.00", "class 2 1.00"]
    assert len({box.color for box in overlay.boxes}) == 3
