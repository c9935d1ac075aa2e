"""What the config tests share: the shipped configs, their models and random batches that fit them."""

import warnings
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData

ROOT = Path(__file__).resolve().parents[2]
# tests/language has those of language models.
CONFIG_FILES = sorted(path for path in (ROOT / "configs").glob("[!_]*/*.py") if path.parent.name != "language")
IMAGE_SIZE = 64  # the last stage still has a tree of four vertices


def load_config(path: Path) -> Config:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations inside the hosts
        return Config.fromfile(path)


def build_model(cfg: Config, init: bool = True) -> torch.nn.Module:
    """The config's model for the CPU and small images.

    Without drop path, with which a parameter may miss its gradient in a single step.
    """
    model_cfg = deepcopy(cfg.model)
    if "drop_path_rate" in model_cfg.backbone:
        model_cfg.backbone.drop_path_rate = 0.0
    if cfg.default_scope == "mmdet":
        box_cfg = model_cfg.test_cfg.get("rcnn", model_cfg.test_cfg)
        box_cfg.score_thr = 0.0  # an untrained model has no confident detections
        if "roi_head" in model_cfg:
            model_cfg.test_cfg.rpn.max_per_img = 20
            stages = model_cfg.train_cfg.rcnn
            for stage in stages if isinstance(stages, list) else [stages]:
                stage.sampler.num = 32
    if "data_preprocessor" in cfg:
        model_cfg.setdefault("data_preprocessor", cfg.data_preprocessor)
    if cfg.default_scope == "mmseg":
        model_cfg.data_preprocessor.size = (IMAGE_SIZE, IMAGE_SIZE)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(model_cfg))
        if init:
            model.init_weights()
    return model


def build_optimizer(cfg: Config, model: torch.nn.Module) -> OptimWrapper:
    """The config's optimizer; mixed precision, which mmengine has on a GPU only, becomes single precision."""
    wrapper_cfg = cfg.optim_wrapper.copy()
    if wrapper_cfg.type == "AmpOptimWrapper" and not torch.cuda.is_available():
        wrapper_cfg.pop("loss_scale")
        wrapper_cfg.type = "OptimWrapper"
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return build_optim_wrapper(model, wrapper_cfg)


def num_classes(cfg: Config) -> int:
    if cfg.default_scope == "mmdet":
        head = cfg.model.get("roi_head", cfg.model).bbox_head
        return (head[0] if isinstance(head, list) else head).num_classes
    return cfg.model["decode_head" if cfg.default_scope == "mmseg" else "head"].num_classes


def has_masks(cfg: Config) -> bool:
    """Whether a detector finds masks, too."""
    return "mask_head" in cfg.model.get("roi_head", {})


def random_batch(cfg: Config) -> dict:
    """Two random images with random ground truth, as the config's data loader would give them."""
    classes = num_classes(cfg)
    if cfg.default_scope == "mmdet":
        return detection_batch(classes, IMAGE_SIZE, with_mask=has_masks(cfg))
    return {"mmseg": segmentation_batch, "mmpretrain": _classification_batch}[cfg.default_scope](classes, IMAGE_SIZE)


def random_images(count: int, size: int) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.integers(0, 256, (3, size, size), dtype=np.uint8)) for _ in range(count)]


def detection_batch(classes: int, size: int, **options: object) -> dict:
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(2, (3, size, size), num_items=[3, 2], num_classes=classes, **options)


def segmentation_batch(classes: int, size: int) -> dict:
    from mmseg.structures import SegDataSample

    shape = (size, size)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for _ in range(2):
        sample = SegDataSample(metainfo={"img_shape": shape, "ori_shape": shape, "pad_shape": shape})
        sample.gt_sem_seg = PixelData(data=torch.randint(classes, (1, *shape), generator=generator))
        samples.append(sample)
    return {"inputs": random_images(2, size), "data_samples": samples}


def _classification_batch(classes: int, size: int) -> dict:
    from mmpretrain.structures import DataSample

    samples = [DataSample().set_gt_label(label) for label in (0, classes - 1)]
    return {"inputs": random_images(2, size), "data_samples": samples}
