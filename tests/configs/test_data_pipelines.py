"""The data parts of the shipped configs, on data sets of two random images in the layouts that they expect."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, EVALUATOR, TRANSFORMS, DefaultScope
from PIL import Image

from tests.helpers.config_cases import CONFIG_FILES, ROOT, has_masks, load_config, num_classes
from tests.helpers.sharing import made_once

HEIGHT, WIDTH = 60, 90


def write_image(path, name):
    path.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path / name)


def write_coco(root):
    x, y, width, height = box = [10, 15, 40, 35]
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    for split in ("train2017", "val2017"):
        write_image(root / split, "1.png")
        annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "area": width * height, "iscrowd": 0}
        content = {
            "images": [{"id": 1, "file_name": "1.png", "height": HEIGHT, "width": WIDTH}],
            "annotations": [annotation | {"segmentation": [polygon]}],
            "categories": [{"id": 1, "name": "person"}],
        }
        target = root / "annotations" / f"instances_{split}.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(content))


def write_ade20k(root):
    for split in ("training", "validation"):
        write_image(root / "images" / split, "1.jpg")
        labels = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 151  # 0: unlabelled
        (root / "annotations" / split).mkdir(parents=True)
        Image.fromarray(labels.astype(np.uint8)).save(root / "annotations" / split / "1.png")


def write_imagenet(root):
    (root / "meta").mkdir()
    for split in ("train", "val"):
        write_image(root / split, "1.jpg")
        (root / "meta" / f"{split}.txt").write_text("1.jpg 999\n")


def write_imagenet21k(root):
    (root / "meta").mkdir()
    write_image(root / "train", "1.jpg")
    (root / "meta" / "train.txt").write_text("1.jpg 21840\n")


def write_made(root, tool):
    path = ROOT / "tools" / "dataset_converters" / tool
    command = [sys.executable, path, "--out", root, "--train", "4", "--val", "2", "--workers", "1", "--force"]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def data_roots(tmp_path_factory):
    return made_once(tmp_path_factory, "data-roots", write_all)


def write_all(base):
    roots = {}
    for folder, write in (
        ("data/coco", write_coco),
        ("data/ade/ADEChallengeData2016", write_ade20k),
        ("data/imagenet", write_imagenet),
        ("data/imagenet21k", write_imagenet21k),
        ("data/demo", partial(write_made, tool="make_demo_data.py")),
        ("data/curves", partial(write_made, tool="make_curve_data.py")),
    ):
        roots[folder] = base / folder
        roots[folder].mkdir(parents=True)
        write(roots[folder])
    return roots


def relocate(node, data_roots):
    """The config with every path under a known data root moved to the generated one."""
    if isinstance(node, dict):
        for key, value in node.items():
            node[key] = relocate(value, data_roots)
    elif isinstance(node, list | tuple):
        return type(node)(relocate(value, data_roots) for value in node)
    elif isinstance(node, str):
        for folder, root in data_roots.items():
            if node == folder or node.startswith(folder + "/"):
                return str(root) + node[len(folder) :]
    return node


@pytest.fixture(scope="module", params=CONFIG_FILES, ids=lambda path: path.stem)
def cfg(request, data_roots):
    cfg = load_config(request.param)
    relocate(cfg._cfg_dict, data_roots)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        yield cfg


def skip_without_validation(cfg):
    loaders = [cfg.val_dataloader, cfg.test_dataloader, cfg.val_cfg, cfg.test_cfg, cfg.val_evaluator]
    if loaders == [None] * len(loaders):
        assert cfg.train_dataloader.dataset.type == "ImageNet21k"
        pytest.skip("ImageNet-22K has no validation part")


def classifier_size(cfg):
    return 64 if "demo" in cfg.filename else 384 if "384px" in cfg.filename else 224


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_dataset_yields_what_the_model_takes(cfg, split):
    if split != "train":
        skip_without_validation(cfg)
    dataset = DATASETS.build(cfg[f"{split}_dataloader"].dataset)
    assert len(dataset) > 0
    item = dataset[0]
    assert item["inputs"].shape[0] == 3
    sample = item["data_samples"]
    if cfg.default_scope == "mmdet":
        instances = sample.gt_instances
        assert len(instances) > 0
        # What predictions are scaled back by.
        assert len(sample.scale_factor) == 2
        assert ("masks" in instances) == has_masks(cfg)
        if split != "train" and has_masks(cfg):
            assert instances.masks.masks.shape[1:] == sample.ori_shape
    elif cfg.default_scope == "mmseg":
        labels = sample.gt_sem_seg.data
        assert int(labels[labels != 255].max()) < num_classes(cfg)
        if split != "train":
            assert labels.shape[1:] == sample.ori_shape
    else:
        assert 0 <= int(sample.gt_label) < num_classes(cfg)
        assert item["inputs"].shape[1:] == (classifier_size(cfg),) * 2


@pytest.mark.parametrize(
    "cfg", [path for path in CONFIG_FILES if path.parent.name != "demo"], ids=lambda path: path.stem, indirect=True
)
def test_sizes_of_the_recipes(cfg):
    """Short side and limit of the long side, as the paper's tables are measured."""
    skip_without_validation(cfg)
    dataset = DATASETS.build(cfg.val_dataloader.dataset)
    height, width = dataset[0]["inputs"].shape[1:]
    square = (classifier_size(cfg),) * 2
    assert (height, width) == {"mmdet": (800, 1200), "mmseg": (512, 768), "mmpretrain": square}[cfg.default_scope]


def test_evaluators_build(cfg):
    skip_without_validation(cfg)
    metainfo = DATASETS.build(cfg.val_dataloader.dataset).metainfo
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        metric = EVALUATOR.build({"type": "Evaluator", "metrics": evaluator})
        metric.dataset_meta = metainfo
        assert len(metric.metrics) == 1


@pytest.mark.parametrize(
    "cfg", [path for path in CONFIG_FILES if "upernet" in path.stem], ids=lambda path: path.stem, indirect=True
)
def test_multi_scale_pipeline(cfg):
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    result = Compose([TRANSFORMS.build(step) for step in cfg.tta_pipeline])(dataset.get_data_info(0))
    heights = sorted(image.shape[1] for image in result["inputs"])
    if "demo" in cfg.filename:
        assert heights == [96, 128, 160]
    else:
        assert heights == sorted(2 * [256, 384, 512, 640, 768, 896])
