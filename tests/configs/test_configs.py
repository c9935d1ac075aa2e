"""Every shipped config loads, builds, trains a step and predicts; its optimizer decays what its recipe says."""

import re
from collections import Counter

import pytest
import torch
from mmengine.config import DictAction
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from torch import nn

from tests.helpers.config_cases import (
    CONFIG_FILES,
    IMAGE_SIZE,
    ROOT,
    build_model,
    build_optimizer,
    has_masks,
    load_config,
    num_classes,
    random_batch,
)

for host in ("mmdet", "mmseg", "mmpretrain"):
    pytest.importorskip(host)

# Exact sizes where the published checkpoints tell them (backbones, classifiers), else as the paper rounds them.
# Large is ours; what its head has depends on the classes.
BACKBONE_PARAMETERS = {"tiny": 28_381_280, "small": 49_291_584, "base": 87_484_160, "large": 196_512_384}
CLASSIFIER_PARAMETERS = {"tiny": 29_958_600, "small": 51_331_624, "base": 90_597_096}
MILLIONS = {
    ("MaskRCNN", "tiny"): 49,
    ("MaskRCNN", "small"): 70,
    ("EncoderDecoder", "tiny"): 60,
    ("EncoderDecoder", "small"): 82,
}
DROP_PATH = {
    "mmpretrain": {"tiny": 0.1, "small": 0.3, "base": 0.5, "large": 0.2},
    "mmdet": {"tiny": 0.2, "small": 0.3, "base": 0.5},
    "mmseg": {"tiny": 0.2, "small": 0.3, "base": 0.5},
}

PAPER_CONFIGS = [path for path in CONFIG_FILES if path.parent.name != "demo"]


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.fixture(scope="module", params=CONFIG_FILES, ids=lambda path: path.stem)
def cfg(request):
    return load_config(request.param)


@pytest.fixture(scope="module")
def model(cfg):
    torch.manual_seed(0)
    return build_model(cfg)


def test_there_are_configs():
    assert len(CONFIG_FILES) >= 32


def test_basenames_are_unique():
    """``mim train grootvl_mm NAME`` looks a config up by its basename, among the base files too."""
    names = Counter(path.name for path in (ROOT / "configs").rglob("*.py"))
    assert [name for name, times in names.items() if times > 1] == []


def test_no_base_that_only_one_stack_finds():
    """onedl-mmengine looks for the package mmsegmentation, which is onedl-mmsegmentation there."""
    assert [path.name for path in (ROOT / "configs").rglob("*.py") if "mmseg::" in path.read_text()] == []


def test_names_its_scope_and_our_package(cfg):
    assert cfg.default_scope in ("mmdet", "mmseg", "mmpretrain")
    assert "grootvl_mm" in cfg.custom_imports["imports"]
    assert not cfg.custom_imports["allow_failed_imports"]
    assert cfg.model.backbone.type in ("grootvl_mm.GrootV", "mmpretrain.ConvNeXt", "SwinTransformer")


@pytest.mark.parametrize("cfg", PAPER_CONFIGS, ids=lambda path: path.stem, indirect=True)
def test_sizes_are_the_published_ones(cfg, model):
    arch = cfg.model.backbone.arch
    assert count(model.backbone) == BACKBONE_PARAMETERS[arch]
    if cfg.default_scope == "mmpretrain":
        assert count(model) == CLASSIFIER_PARAMETERS.get(arch, count(model))
    elif (cfg.model.type, arch) in MILLIONS:
        assert round(count(model) / 1e6) == MILLIONS[cfg.model.type, arch]
    assert cfg.model.backbone.drop_path_rate == DROP_PATH[cfg.default_scope][arch]


@pytest.mark.parametrize("cfg", PAPER_CONFIGS, ids=lambda path: path.stem, indirect=True)
def test_learning_rate_is_scaled_from_the_batch_of_the_recipe(cfg):
    """Devices times images, as the config's name says; 8 devices where it says nothing."""
    stated = re.search(r"_(\d+)xb(\d+)", cfg.filename)
    devices, images = map(int, stated.groups()) if stated else (8, cfg.train_dataloader.batch_size)
    assert cfg.train_dataloader.batch_size == images
    assert cfg.auto_scale_lr.base_batch_size == devices * images
    assert not cfg.auto_scale_lr.get("enable", False)


def test_weight_decay_spares_flat_parameters(cfg, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decay = 1e-8 if "-ft_" in cfg.filename else 0.05
    seen = set()
    for group in build_optimizer(cfg, model).optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            flat = parameter.ndim == 1 or name.endswith("bias")
            assert group["weight_decay"] == (0.0 if flat else decay), name
            assert group["lr"] == cfg.optim_wrapper.optimizer.lr, name
            seen.add(name)
    assert seen == set(names.values())
    if "grootvl_mm" in cfg.model.backbone.type:
        assert any(name.endswith("A_log") for name in seen)


def test_one_training_step_reaches_the_whole_backbone(cfg, model):
    """Uses the model's real ``train_step``: preprocessing, batch augmentation, losses, optimizer."""
    reached = set()
    handles = [
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: reached.add(name) if p.grad.isfinite().all() and p.grad.any() else None
        )
        for name, parameter in model.backbone.named_parameters()
    ]
    losses = model.train().train_step(random_batch(cfg), build_optimizer(cfg, model))
    for handle in handles:
        handle.remove()
    assert losses["loss"].isfinite()
    assert sorted({name for name, _ in model.backbone.named_parameters()} - reached) == []


@pytest.mark.parametrize(
    "cfg", [path for path in CONFIG_FILES if "mask-rcnn_grootv" in path.stem], ids=lambda path: path.stem, indirect=True
)
def test_detector_features_are_contiguous(cfg, model):
    """mmcv's RoIAlign assumes NCHW memory: with channels-last maps it silently returns wrong numbers."""
    with torch.no_grad():
        maps = model.extract_feat(torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert all(feature.is_contiguous() for feature in maps)


def test_predicts(cfg, model):
    samples = model.eval().test_step(random_batch(cfg))
    assert len(samples) == 2
    for sample in samples:
        if cfg.default_scope == "mmdet":
            found = sample.pred_instances
            assert 0 < len(found) <= cfg.model.test_cfg.get("rcnn", cfg.model.test_cfg).max_per_img
            assert not has_masks(cfg) or found.masks.shape == (len(found), IMAGE_SIZE, IMAGE_SIZE)
            assert found.bboxes.isfinite().all()
            assert found.labels.max() < num_classes(cfg)
        elif cfg.default_scope == "mmseg":
            assert sample.pred_sem_seg.data.shape == (1, IMAGE_SIZE, IMAGE_SIZE)
            assert sample.seg_logits.data.shape == (num_classes(cfg), IMAGE_SIZE, IMAGE_SIZE)
            assert sample.seg_logits.data.isfinite().all()
        else:
            assert sample.pred_score.shape == (num_classes(cfg),)
            assert sample.pred_score.sum().item() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", ["mask-rcnn_grootv-pico_fpn_demo", "grootv-pico_upernet_demo-seg"])
def test_pretrained_backbone_comes_by_cfg_options(name, tmp_path):
    """As the recipes describe: from the checkpoint of a classifier, by ``--cfg-options``."""
    configs = {path.stem: path for path in CONFIG_FILES}
    torch.manual_seed(1)
    classifier = build_model(load_config(configs["grootv-pico_demo-cls"]))
    checkpoint = tmp_path / "classifier.pth"
    torch.save({"state_dict": classifier.state_dict()}, checkpoint)

    cfg = load_config(configs[name])
    options = {"type": "Pretrained", "checkpoint": str(checkpoint), "prefix": "backbone."}
    cfg.merge_from_dict(
        {f"model.backbone.init_cfg.{key}": DictAction._parse_iterable(value) for key, value in options.items()}
    )
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        backbone = MODELS.build(cfg.model).backbone
    backbone.init_weights()
    expected = classifier.backbone.state_dict()
    loaded = backbone.state_dict()
    # The classifier norms its last stage only; the other stages' output norms stay as initialised.
    assert len(expected.keys() & loaded.keys()) > 0.9 * len(loaded)
    for key in expected.keys() & loaded.keys():
        torch.testing.assert_close(loaded[key], expected[key], msg=key)


def test_fine_tuning_starts_from_a_model_with_other_classes(tmp_path):
    """``load_from`` of a model of ImageNet-22K: all of it but the last layer."""
    cfg = load_config(next(path for path in CONFIG_FILES if path.stem == "grootv-pico_demo-cls"))
    source = build_model(cfg)
    cfg.model.head.num_classes += 1
    target = build_model(cfg)
    checkpoint = tmp_path / "pretrained.pth"
    torch.save({"state_dict": source.state_dict()}, checkpoint)
    load_checkpoint(target, str(checkpoint), map_location="cpu")
    for (name, expected), value in zip(source.state_dict().items(), target.state_dict().values(), strict=True):
        assert name.startswith("head.fc.") or torch.equal(value, expected), name
