"""Ground truth and results of single images, with which the study compares the quality of their trees."""

import contextlib
import io
import itertools
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.dataset import pseudo_collate
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from tree_measures import OUTSIDE

from grootvl_mm.apis import cli
from grootvl_mm.apis.images import find_images, metainfo_of, single_dataset, type_name, without_annotations

NO_CLASS = 255  # in class maps
MAX_NAMES = 200  # characters of class names in an error
CONFIDENT = 0.3  # score from which a detection counts for the IoU


class Instances:
    """Ground truth of a JSON file of COCO instances."""

    def __init__(self, path: Path) -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco = COCO(str(path))
            has_sizes = all({"height", "width"} <= image.keys() for image in self.coco.imgs.values())
        except (AssertionError, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
            cli.fail(f"cannot read '{path}' as a JSON file of COCO instances: {cli.one_line(error)}")
        if not has_sizes:
            cli.fail(f"'{path}': each image needs its height and width")

    def images(self, number: int) -> list[dict[str, Any]]:
        """The first images that have instances: ``id`` and ``file_name`` at least."""
        images = self.coco.loadImgs(sorted(self.coco.getImgIds()))
        return [image for image in images if self.coco.getAnnIds(image["id"])][:number]

    def labels(self, image: dict[str, Any]) -> np.ndarray:
        """(H, W) int64, 0 for the background, then the number of the smallest instance at a pixel."""
        labels = np.zeros((image["height"], image["width"]), np.int64)
        instances = self.coco.loadAnns(self.coco.getAnnIds(image["id"], iscrowd=False))
        for number, instance in enumerate(sorted(instances, key=lambda item: -item["area"]), start=1):
            labels[self.coco.annToMask(instance) > 0] = number
        return labels


class ClassMaps:
    """Ground truth of a folder of class maps.

    Args:
        folder: PNG files.
        images: folder of the images of the same names.
    """

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder = folder
        found = {path.stem: path for path in folder.glob("*.png")}
        self.files = [path for path in find_images([images]) if path.stem in found]
        if not self.files:
            cli.fail(f"the folder '{folder}' has no class maps (NAME.png) for the images in '{images}'")

    def images(self, number: int) -> list[dict[str, Any]]:
        """The first images that have a border: ``id`` and ``file_name``."""
        images = ({"id": path.stem, "file_name": path.name} for path in self.files)
        with_border = (image for image in images if len(np.unique(self.labels(image))) > 1)
        return list(itertools.islice(with_border, number))

    def labels(self, image: dict[str, Any]) -> np.ndarray:
        """(H, W) int64, the class of each pixel, ``OUTSIDE`` where there is none."""
        values = mmcv.imread(str(self.folder / f"{image['id']}.png"), "unchanged", backend="pillow").astype(np.int64)
        if values.ndim != 2:
            cli.fail(f"'{self.folder / image['id']}.png' has {values.shape[2]} channels; class maps have one")
        return np.where(values == NO_CLASS, OUTSIDE, values)


class Detections:
    """Mask AP and IoU of single pictures, for models of mmdet that predict masks."""

    metrics = ("mask AP", "mask IoU")

    def __init__(self, model: nn.Module, coco: COCO) -> None:
        from mmcv.transforms import Compose

        self.model, self.coco = model, coco
        first, *others = without_annotations(model.cfg)
        self.pipeline = Compose([{**first, "type": "mmdet.LoadImageFromNDArray"}, *others])
        ids = {category["name"]: category["id"] for category in coco.loadCats(coco.getCatIds())}
        names = metainfo_of(model.cfg)["classes"]
        self.categories = [ids.get(name) for name in names]  # None: the ground truth does not have this class
        if not any(name in ids for name in names):
            cli.fail(f"no class of the model is in the annotations, whose classes are {', '.join(ids)[:MAX_NAMES]}")

    def measure(self, picture: np.ndarray, image: dict[str, Any]) -> dict[str, float]:
        """AP as COCO defines it on the picture alone, and the mean over its instances of the best mask IoU."""
        from mmdet.apis import inference_detector

        found = inference_detector(self.model, picture, test_pipeline=self.pipeline).pred_instances
        masks = [coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in found.masks]
        results = [
            {"image_id": image["id"], "category_id": self.categories[label], "score": score, "segmentation": mask}
            for label, score, mask in zip(found.labels.tolist(), found.scores.tolist(), masks, strict=True)
            if self.categories[label] is not None
        ]
        best = []
        for instance in self.coco.loadAnns(self.coco.getAnnIds(image["id"], iscrowd=False)):
            same = [result["segmentation"] for result in results
                    if result["category_id"] == instance["category_id"] and result["score"] >= CONFIDENT]  # fmt: skip
            overlaps = coco_mask.iou(same, [self.coco.annToRLE(instance)], [0]) if same else np.zeros(1)
            best.append(float(overlaps.max()))
        return {"mask AP": self._average_precision(results, image["id"]), "mask IoU": float(np.mean(best))}

    def _average_precision(self, results: list[dict[str, Any]], image: int) -> float:
        if not results:
            return 0.0
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(self.coco, self.coco.loadRes(results), "segm")
            evaluation.params.imgIds = [image]
            evaluation.evaluate()
            evaluation.accumulate()
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        return float(precision[precision > -1].mean())


class Segmentations:
    """The mIoU of single pictures, for models of mmseg: the mean over the classes that the picture has.

    Pixels that the config's evaluation ignores do not count.
    """

    metrics = ("mIoU",)

    def __init__(self, model: nn.Module, truth: ClassMaps) -> None:
        from mmcv.transforms import Compose

        self.model, self.truth = model, truth
        self.pipeline = Compose([{"type": "mmseg.LoadImageFromNDArray"}, *without_annotations(model.cfg)[1:]])
        steps = single_dataset(model.cfg).pipeline
        loads = [step for step in steps if type_name(step) == "LoadAnnotations"]
        self.first_is_ignored = any(step.get("reduce_zero_label") for step in loads)
        self.ignored = model.cfg.test_evaluator.get("ignore_index", NO_CLASS)

    def measure(self, picture: np.ndarray, image: dict[str, Any]) -> dict[str, float]:
        """Of a picture (H, W, 3) uint8, BGR."""
        with torch.no_grad():
            (found,) = self.model.test_step(pseudo_collate([self.pipeline({"img": picture})]))
        predicted = found.pred_sem_seg.data[0].numpy(force=True)
        labels = self.truth.labels(image)
        counted = (labels != OUTSIDE) & (labels != self.ignored)
        if self.first_is_ignored:  # class 0 is none, and the model's class 0 is 1
            labels, counted = labels - 1, counted & (labels != 0)
        return {"mIoU": mean_iou(predicted[counted], labels[counted])}


def mean_iou(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The mean IoU over the classes in the labels (N,)."""
    pairs = [(predicted == label, labels == label) for label in np.unique(labels)]
    return float(np.mean([(found & true).sum() / (found | true).sum() for found, true in pairs]))


RESULTS = (*Detections.metrics, *Segmentations.metrics)


def choose_results(model: nn.Module, truth: Instances | ClassMaps) -> Detections | Segmentations | None:
    """What measures the results of a model, if the ground truth suits its task."""
    if "mask_head" in model.cfg.model.get("roi_head", {}) and isinstance(truth, Instances):
        return Detections(model, truth.coco)
    if "decode_head" in model.cfg.model and isinstance(truth, ClassMaps):
        return Segmentations(model, truth)
    return None
