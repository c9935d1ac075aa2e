"""Layer-wise learning rate decay on models of all three tasks."""

from collections import OrderedDict
from copy import deepcopy

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import DefaultOptimWrapperConstructor, build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from grootvl_mm.engine.optimizers.layer_decay_constructor import LayerDecayOptimWrapperConstructor
from grootvl_mm.models import GrootV
from tests.helpers.layer_decay import LAYERS, NUM_LAYERS, RATE, groups_of
from tests.helpers.training_runs import CONFIGS, ROOT


def build(constructor: str, model: nn.Module, scope: str = "mmengine", **paramwise: object) -> dict[str, dict]:
    cfg = {
        "type": "OptimWrapper",
        "optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.05},
        "constructor": constructor,
        "paramwise_cfg": paramwise,
    }
    with DefaultScope.overwrite_default_scope(scope):
        return groups_of(model, build_optim_wrapper(model, cfg))


@pytest.fixture(scope="module", params=CONFIGS)
def task(request: pytest.FixtureRequest) -> tuple[str, Config, nn.Module]:
    """Scope, config and model of one of the three tasks."""
    pytest.importorskip(request.param)
    cfg = Config.fromfile(ROOT / "configs" / "demo" / CONFIGS[request.param])
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return cfg.default_scope, cfg, MODELS.build(cfg.model)


@pytest.mark.parametrize(
    "constructor", ["grootvl_mm.LayerDecayOptimWrapperConstructor", "LayerDecayOptimWrapperConstructor"]
)
def test_rates_and_decay_of_every_parameter(task: tuple, constructor: str) -> None:
    scope, cfg, model = task
    optim_wrapper_cfg = deepcopy(cfg.optim_wrapper)
    optim_wrapper_cfg.constructor = constructor
    optim_wrapper_cfg.paramwise_cfg.layer_decay_rate = RATE
    with DefaultScope.overwrite_default_scope(scope):
        optim_wrapper = build_optim_wrapper(model, optim_wrapper_cfg)
    base = cfg.optim_wrapper.optimizer.lr
    groups = groups_of(model, optim_wrapper)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    for name, layer in LAYERS.items():
        assert groups[name]["lr"] == pytest.approx(base * RATE ** (NUM_LAYERS - 1 - layer)), name
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            assert groups[name]["lr"] == base, name
        spared = parameter.ndim == 1 or name.endswith("bias")
        assert groups[name]["weight_decay"] == (0.0 if spared else cfg.optim_wrapper.optimizer.weight_decay), name


@pytest.mark.parametrize("task", ["mmpretrain"], indirect=True)  # whose constructor works for its own models only
def test_agrees_with_mmpretrains_own_on_a_classifier(task: tuple) -> None:
    scope, _, model = task
    from mmpretrain.engine.optimizers import LearningRateDecayOptimWrapperConstructor

    decay = {"norm_decay_mult": 0.0, "bias_decay_mult": 0.0, "flat_decay_mult": 0.0}
    theirs = build(LearningRateDecayOptimWrapperConstructor.__name__, model, scope, layer_decay_rate=RATE, **decay)
    ours = build("grootvl_mm.LayerDecayOptimWrapperConstructor", model, scope, layer_decay_rate=RATE, **decay)
    for name, group in theirs.items():
        for key in ("lr", "weight_decay", "lr_scale"):
            assert ours[name][key] == pytest.approx(group[key]), name


def test_everything_but_the_rate_is_the_default_constructors() -> None:
    model = nn.ModuleDict({"backbone": GrootV("pico"), "head": nn.Linear(2, 2)})
    options = {
        "custom_keys": {"head": {"lr_mult": 10.0}, "stages.0": {"lr_mult": 0.5, "decay_mult": 0.1}},
        "norm_decay_mult": 0.0,
        "dwconv_decay_mult": 0.2,
        "bias_lr_mult": 2.0,
    }
    default = build(DefaultOptimWrapperConstructor.__name__, model, **options)
    decayed = build("grootvl_mm.LayerDecayOptimWrapperConstructor", model, layer_decay_rate=RATE, **options)
    full = build("grootvl_mm.LayerDecayOptimWrapperConstructor", model, layer_decay_rate=1, **options)
    for name, group in default.items():
        assert full[name]["lr"] == group["lr"], name
        assert decayed[name]["lr"] == pytest.approx(group["lr"] * decayed[name]["lr_scale"]), name
        assert decayed[name]["weight_decay"] == full[name]["weight_decay"] == group["weight_decay"], name
    assert decayed["head.weight"]["lr"] == pytest.approx(1e-2)
    assert decayed["backbone.stages.0.norm.weight"]["lr"] == pytest.approx(1e-3 * 0.5 * RATE**5)


def test_a_backbone_alone_and_frozen_parts() -> None:
    model = GrootV("pico", frozen_stages=1)
    groups = build("grootvl_mm.LayerDecayOptimWrapperConstructor", model, layer_decay_rate=RATE)
    assert set(groups) == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert groups["stages.1.norm.weight"]["lr"] == pytest.approx(1e-3 * RATE**4)


def test_a_training_step_moves_early_layers_less() -> None:
    model = GrootV("pico")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    cfg = {"optimizer": {"type": "AdamW", "lr": 1e-2, "weight_decay": 0.0}}
    wrapper = LayerDecayOptimWrapperConstructor(cfg, {"layer_decay_rate": 0.1})(model)
    wrapper.update_params(sum(feature.square().mean() for feature in model(torch.randn(1, 3, 32, 32))))
    moved = {name: (parameter - before[name]).abs().max().item() for name, parameter in model.named_parameters()}
    # A first step of Adam is as long as the learning rate.
    assert moved["stages.3.norm.bias"] == pytest.approx(1e-3, rel=0.01)
    assert moved["stages.0.norm.bias"] == pytest.approx(1e-7, rel=0.01)


@pytest.mark.parametrize(
    ("paramwise", "message"),
    [
        (None, "layer_decay_rate must be above 0 and at most 1, got None"),
        ({"norm_decay_mult": 0.0}, "layer_decay_rate must be above 0 and at most 1, got None"),
        ({"layer_decay_rate": 0}, "layer_decay_rate must be above 0 and at most 1, got 0"),
        ({"layer_decay_rate": "0.8"}, "layer_decay_rate must be above 0 and at most 1, got '0.8'"),
    ],
)
def test_bad_rates(paramwise: dict | None, message: str) -> None:
    cfg = {"optimizer": {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.05}}
    with pytest.raises(ValueError, match=message):
        LayerDecayOptimWrapperConstructor(cfg, paramwise)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"needs optimizer\.lr, which is missing"):
        LayerDecayOptimWrapperConstructor({"optimizer": {"type": "AdamW"}}, {"layer_decay_rate": 0.5})
    constructor = LayerDecayOptimWrapperConstructor(
        {"optimizer": {"type": "AdamW", "lr": 1e-3}}, {"layer_decay_rate": 0.5}
    )
    with pytest.raises(ValueError, match="needs a backbone with get_layer_depth, which Linear does not have"):
        constructor(nn.Sequential(OrderedDict(backbone=nn.Linear(2, 2))))
