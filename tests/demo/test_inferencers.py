"""The inferencers of the hosts take our configs, by the path that the zoo tells for a name."""

import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import init_default_scope

from grootvl_mm.apis.zoo import config_file
from grootvl_mm.models import GrootV
from tests.demo.conftest import NAMES
from tests.helpers.doc_pages import blocks

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def test_detection(checkpoints: dict, image: np.ndarray) -> None:
    apis = pytest.importorskip("mmdet.apis")
    inferencer = apis.DetInferencer(config_file(NAMES["det"]), checkpoints["det"], device="cpu", show_progress=False)
    assert list(inferencer.visualizer.dataset_meta["classes"]) == DIGITS
    (found,) = inferencer([image])["predictions"]
    count = len(found["scores"])
    assert count > 0
    assert np.shape(found["bboxes"]) == (count, 4)
    assert [mask["size"] for mask in found["masks"]] == [[48, 64]] * count


def test_segmentation(checkpoints: dict, image: np.ndarray) -> None:
    apis = pytest.importorskip("mmseg.apis")
    inferencer = apis.MMSegInferencer(config_file(NAMES["seg"]), checkpoints["seg"], device="cpu")
    result = inferencer([image, image[:, :50]], return_vis=True)
    assert [labels.shape for labels in result["predictions"]] == [(48, 64), (48, 50)]
    assert max(labels.max() for labels in result["predictions"]) <= 10
    assert [drawn.shape for drawn in result["visualization"]] == [(48, 64, 3), (48, 50, 3)]


def test_classification(checkpoints: dict, image: np.ndarray) -> None:
    mmpretrain = pytest.importorskip("mmpretrain")
    inferencer = mmpretrain.ImageClassificationInferencer(config_file(NAMES["cls"]), checkpoints["cls"], device="cpu")
    (found,) = inferencer(image)
    assert found["pred_class"] == sorted(DIGITS)[found["pred_label"]]
    assert found["pred_scores"].sum() == pytest.approx(1.0, abs=1e-5)


@pytest.fixture
def grey(image: np.ndarray) -> np.ndarray:
    return image.mean(axis=2).astype(np.uint8)


@pytest.mark.parametrize("form", ["(H, W)", "(H, W, 1)"])
def test_greyscale_arrays(checkpoints: dict, grey: np.ndarray, form: str) -> None:
    """They give what the same image in colour gives."""
    for host in ("mmdet", "mmseg", "mmpretrain"):
        pytest.importorskip(host)
    from mmdet.apis import DetInferencer
    from mmpretrain import ImageClassificationInferencer
    from mmseg.apis import MMSegInferencer

    colour, array = np.stack([grey] * 3, axis=-1), grey if form == "(H, W)" else grey[..., None]
    detector = DetInferencer(config_file(NAMES["det"]), checkpoints["det"], device="cpu", show_progress=False)
    expected, found = (detector([image])["predictions"][0] for image in (colour, array))
    assert len(found["scores"]) > 0
    np.testing.assert_allclose(found["scores"], expected["scores"], rtol=1e-4)
    segmenter = MMSegInferencer(config_file(NAMES["seg"]), checkpoints["seg"], device="cpu")
    np.testing.assert_array_equal(*(segmenter([image])["predictions"] for image in (colour, array)))
    init_default_scope("mmpretrain")
    classifier = ImageClassificationInferencer(config_file(NAMES["cls"]), checkpoints["cls"], device="cpu")
    expected, found = (classifier(image)[0]["pred_scores"] for image in (colour, array))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_other_channels_are_an_error_before_the_model(checkpoints: dict, image: np.ndarray) -> None:
    apis = pytest.importorskip("mmdet.apis")
    inferencer = apis.DetInferencer(config_file(NAMES["det"]), checkpoints["det"], device="cpu", show_progress=False)
    with pytest.raises(ValueError, match=r"an image must be a non-empty array .* got shape \(\d+, \d+, 4\)"):
        inferencer([np.concatenate([image, image[..., :1]], axis=2)])


@pytest.mark.parametrize(
    ("host", "inferencer", "name", "classes"),
    [
        ("mmdet", "DetInferencer", "mask-rcnn_grootv-tiny_fpn_1x_coco", 80),
        ("mmseg", "MMSegInferencer", "grootv-tiny_upernet_8xb2-160k_ade20k-512x512", 19),
    ],
)
def test_the_recipes_build(host: str, inferencer: str, name: str, classes: int) -> None:
    """Without their data sets and without weights; mmseg falls back to Cityscapes' classes then."""
    apis = pytest.importorskip(f"{host}.apis")
    built = getattr(apis, inferencer)(config_file(name), device="cpu")
    assert built.model.backbone.num_features == [80, 160, 320, 640]
    assert len(built.model.dataset_meta["classes"]) == classes


@pytest.mark.parametrize("code", blocks("docs/inference.md", "python"))
def test_the_page_runs(
    code: str, checkpoints: dict, image: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With untrained models in the files that the page names."""
    monkeypatch.chdir(tmp_path)
    for file, task in re.findall(r'"(work_dirs/demo-(\w+)/\w+\.pth)"', code):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(checkpoints[task], file)
    for file in re.findall(r'"([\w/]+\.(?:png|jpg))"', code):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(file, image)
    if "grootv_tiny.pth" in code:
        torch.save(GrootV("tiny").state_dict(), "grootv_tiny.pth")
    exec(compile(code, "docs/inference.md", "exec"), {})
