"""Ground truth and predictions as overlays of an image."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
from mmengine.structures import BaseDataElement

GOLDEN_ANGLE = 137.508  # degrees between successive hues, which keeps any number of them distinct
FILL, OUTLINE = 70, 255  # opacities
LEAST_SHARE = 1 / 400  # minimum share of the image for a segment to be labelled


class Box(NamedTuple):
    """A rectangle in pixels with a text, or only a text if width and height are 0."""

    x: float
    y: float
    width: float
    height: float
    text: str
    color: tuple[int, int, int]  # RGB

    @property
    def ink(self) -> str:
        """Black or white, whichever is legible on the colour."""
        return "black" if np.dot(self.color, [0.299, 0.587, 0.114]) > 140 else "white"


class Overlay(NamedTuple):
    """An overlay of an image.

    Attributes:
        name: ``ground truth`` or ``prediction``.
        boxes: Boxes and texts.
        picture: (h, w, 4) uint8, RGBA, with the size of the image without padding; None if there is none.
        caption: A text for the whole image.
    """

    name: str
    boxes: tuple[Box, ...] = ()
    picture: np.ndarray | None = None
    caption: str = ""


def make_overlays(
    sample: BaseDataElement, meta: dict[str, Any], size: tuple[int, int], score_thr: float = 0.5
) -> list[Overlay]:
    """Create the overlays of a data sample of mmdet, mmseg or mmpretrain.

    Args:
        sample: A data sample with predictions or ground truth, both in coordinates of the image file (``ori_shape``).
        meta: ``classes`` and ``palette`` of the dataset, if known.
        size: Height and width of the preprocessed image, without padding.
        score_thr: Minimum score of a detection.

    Returns:
        Ground truth and prediction, if they are not empty.
    """
    found = []
    for name, prefix in (("ground truth", "gt"), ("prediction", "pred")):
        if "labels" in sample.get(f"{prefix}_instances", ()):  # empty without ground truth
            overlay = _instances(name, sample, prefix, meta, size, score_thr)
        elif f"{prefix}_sem_seg" in sample:
            overlay = _class_map(name, sample.get(f"{prefix}_sem_seg").data, meta, size)
        elif f"{prefix}_label" in sample:
            overlay = _label(name, sample, prefix, meta)
        else:
            continue
        if overlay.boxes or overlay.picture is not None or overlay.caption:
            found.append(overlay)
    return found


def _instances(
    name: str, sample: BaseDataElement, prefix: str, meta: dict[str, Any], size: tuple[int, int], score_thr: float
) -> Overlay:
    instances = sample.get(f"{prefix}_instances").cpu()
    if "scores" in instances:
        instances = instances[instances.scores >= score_thr]
    labels = instances.labels.tolist()
    scores = [f" {score:.2f}" for score in instances.scores.tolist()] if "scores" in instances else [""] * len(labels)
    scale_y, scale_x = (new / old for new, old in zip(size, sample.ori_shape[:2], strict=True))
    corners = getattr(instances.bboxes, "tensor", instances.bboxes).numpy() * [scale_x, scale_y, scale_x, scale_y]
    boxes = tuple(
        Box(x1, y1, x2 - x1, y2 - y1, f"{_class_name(meta, label)}{score}", _color(meta, label))
        for (x1, y1, x2, y2), label, score in zip(corners.tolist(), labels, scores, strict=True)
    )
    if "masks" not in instances or not labels:
        return Overlay(name, boxes)
    masks = np.asarray(getattr(instances.masks, "masks", instances.masks), dtype=np.uint8)
    picture = np.zeros((*size, 4), np.uint8)
    for mask, label in zip(masks, labels, strict=True):
        _paint(picture, _resize(mask, size) > 0, _color(meta, label))
    return Overlay(name, boxes, picture)


def _class_map(name: str, data: Any, meta: dict[str, Any], size: tuple[int, int]) -> Overlay:
    labels = _resize(data.squeeze(0).cpu().numpy().astype(np.uint8), size)
    picture = np.zeros((*size, 4), np.uint8)
    texts = []
    for label in np.unique(labels).tolist():
        if _class_name(meta, label) == "background" or label == 255:  # 255 marks pixels to ignore
            continue
        region = labels == label
        _paint(picture, region, _color(meta, label))
        if region.sum() >= region.size * LEAST_SHARE:
            y, x = (float(np.median(index)) for index in np.nonzero(region))
            texts.append(Box(x, y, 0, 0, str(_class_name(meta, label)), _color(meta, label)))
    return Overlay(name, tuple(texts), picture)


def _label(name: str, sample: BaseDataElement, prefix: str, meta: dict[str, Any]) -> Overlay:
    text = ", ".join(str(_class_name(meta, label)) for label in sample.get(f"{prefix}_label").tolist())
    if f"{prefix}_score" in sample and prefix == "pred":
        text += f", score {sample.pred_score.max():.2f}"
    return Overlay(name, caption=f"{name[0].upper()}{name[1:]}: {text}")


def _paint(picture: np.ndarray, region: np.ndarray, color: Sequence[int]) -> None:
    """Fill a region with low opacity and draw its outline."""
    picture[region] = (*color, FILL)
    contours, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, contours, -1, (*map(int, color), OUTLINE), 1)


def _resize(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return cv2.resize(labels, size[::-1], interpolation=cv2.INTER_NEAREST)


def _class_name(meta: dict[str, Any], label: int) -> str:
    classes = meta.get("classes") or ()
    return classes[label] if label < len(classes) else f"class {label}"


def _color(meta: dict[str, Any], label: int) -> tuple[int, int, int]:
    palette = meta.get("palette")
    if isinstance(palette, Sequence) and not isinstance(palette, str) and label < len(palette):
        return tuple(int(part) for part in palette[label])
    hue = (label * GOLDEN_ANGLE) % 360 / 2  # OpenCV's hues end at 180
    return tuple(int(part) for part in cv2.cvtColor(np.array([[[hue, 190, 230]]], np.uint8), cv2.COLOR_HSV2RGB)[0, 0])
