"""Published checkpoints: their names, and a model computed with the authors' semantics."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from grootvl_mm.models import GrootV, GrootVNeck
from grootvl_mm.models.published_checkpoints import convert_published
from tests.helpers.published import REFERENCE, publish

MICRO = {"channels": 8, "depths": [1, 1, 2, 1]}
MISFIT = r"\d+ of \d+ (parameters match|weights of the model do not fit the checkpoint)"


@pytest.fixture
def models() -> tuple[GrootV, GrootVNeck]:
    backbone, neck = GrootV(MICRO), GrootVNeck(64, 96)
    for module in (backbone, neck):
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.05)
    return backbone, neck


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_published_names_of_some_parameters(models: tuple) -> None:
    names = set(publish(*models))
    assert {
        "patch_embed.conv1.weight",
        "patch_embed.norm2.1.bias",
        "levels.0.blocks.0.norm1.0.weight",
        "levels.2.blocks.1.TreeSSM.x_proj_weight",
        "levels.0.blocks.0.TreeSSM.dt_projs_bias",
        "levels.0.blocks.0.TreeSSM.A_logs",
        "levels.3.norm.0.weight",
        "levels.1.downsample.norm.1.bias",
        "conv_head.0.weight",
        "conv_head.1.0.running_mean",
        "head.weight",
    } <= names


@pytest.mark.parametrize("key", ["model", "model_ema", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
def test_a_published_file_loads_as_pretrained(models: tuple, tmp_path: Path, key: str | None, prefix: str) -> None:
    weights = {prefix + name: value for name, value in publish(*models).items()}
    file = tmp_path / "published.pth"
    torch.save({key: weights, "epoch": 300} if key else weights, file)
    init_cfg = {"type": "Pretrained", "checkpoint": str(file)}
    backbone = GrootV(MICRO, init_cfg=init_cfg)
    neck = GrootVNeck(64, 96, init_cfg=init_cfg)
    backbone.init_weights()
    neck.init_weights()
    assert_same(backbone, models[0])
    assert_same(neck, models[1])


def test_a_published_file_loads_with_plain_pytorch(models: tuple, tmp_path: Path) -> None:
    torch.save({"model": publish(*models), "model_ema": {}, "optimizer": {}, "epoch": 300}, tmp_path / "published.pth")
    backbone = GrootV(MICRO)
    backbone.load_state_dict(torch.load(tmp_path / "published.pth", weights_only=True), strict=True)
    assert_same(backbone, models[0])


def test_of_both_the_weights_under_model_are_taken(models: tuple) -> None:
    backbone = GrootV(MICRO)
    backbone.load_state_dict({"model_ema": publish(GrootV(MICRO)), "model": publish(*models)})
    assert_same(backbone, models[0])


def test_nothing_of_a_published_file_is_left_over(models: tuple) -> None:
    backbone, neck = models
    weights = publish(backbone, neck)
    converted = convert_published({"model": weights})
    expected = [f"backbone.{name}" for name in backbone.state_dict()]
    expected += [f"neck.{name}" for name in neck.state_dict()]
    assert sorted(converted) == sorted([*expected, "head.fc.weight", "head.fc.bias"])
    assert len(converted) == len(weights)


def test_published_weights_load_inside_a_larger_model(models: tuple) -> None:
    detector = nn.Module()
    detector.backbone = GrootV(MICRO)
    detector.load_state_dict({f"backbone.{key}": value for key, value in publish(models[0]).items()})
    assert_same(detector.backbone, models[0])


def test_a_backbone_with_fewer_outputs_loads_the_whole(models: tuple) -> None:
    backbone = GrootV(MICRO, out_indices=(0, 1))
    result = backbone.load_state_dict(publish(models[0]), strict=False)
    assert result.missing_keys == []


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)},
        publish(GrootV({"channels": 16, "depths": [1, 1, 2, 1]})),
    ],
    ids=["empty", "another model", "another size"],
)
def test_a_file_that_does_not_fit_is_an_error(weights: dict, tmp_path: Path) -> None:
    file = tmp_path / "wrong.pth"
    torch.save({"state_dict": weights}, file)
    backbone = GrootV(MICRO, init_cfg={"type": "Pretrained", "checkpoint": str(file)})
    with pytest.raises(ValueError, match=MISFIT):
        backbone.init_weights()


class Network(nn.Module):
    """A backbone and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = GrootV(MICRO)
        self.fc = nn.Linear(64, 3)


@pytest.mark.parametrize("part", ["", "fc.", "backbone.stem.", "backbone.stages.1."])
def test_parts_of_a_state_dict_load(part: str) -> None:
    """Heads, adapters or some stages, where loading is not strict."""
    weights = {
        name: torch.full_like(value, 7.0)
        for name, value in Network().state_dict().items()
        if part and name.startswith(part)
    }
    network = Network()
    result = network.load_state_dict(weights, strict=False)
    assert result.unexpected_keys == []
    assert len(result.missing_keys) + len(weights) == len(network.state_dict())
    assert all((network.state_dict()[name] == 7).all() for name in weights)


@pytest.mark.parametrize(
    "weights",
    [
        {"conv1.weight": torch.zeros(64, 3, 7, 7)},
        {"backbone.conv1.weight": torch.zeros(64, 3, 7, 7)},
        {
            f"backbone.{name}": value
            for name, value in GrootV({"channels": 16, "depths": [1, 1]}, out_indices=1).state_dict().items()
        },
        {f"backbone.{name}": value for name, value in publish(GrootV(MICRO)).items() if "levels" not in name},
    ],
    ids=["another model", "another backbone", "another size", "a published file cut off"],
)
def test_a_wrong_state_dict_is_an_error_however_it_is_loaded(weights: dict) -> None:
    with pytest.raises(ValueError, match=MISFIT):
        Network().load_state_dict(weights, strict=False)


def test_reproduces_a_model_with_the_published_semantics() -> None:
    """Features, logits and gradients of a model that was computed apart from this code (tests/models/data)."""
    case = torch.load(REFERENCE / "grootv_micro.pt")
    channels = case["config"]["channels"]
    backbone = GrootV({"channels": channels, "depths": case["config"]["depths"]})
    neck = GrootVNeck(8 * channels, 12 * channels)
    backbone.load_state_dict(dict(case["state_dict"]))
    neck.load_state_dict(dict(case["state_dict"]))
    head = nn.Linear(12 * channels, case["config"]["num_classes"])
    head.load_state_dict({name: case["state_dict"][f"head.{name}"] for name in ("weight", "bias")})
    model = nn.ModuleList([backbone, neck, head]).eval()

    features = backbone(case["input"])
    logits = head(neck(features)[0])
    torch.testing.assert_close(list(features), case["features"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, case["logits"], rtol=1e-4, atol=1e-5)

    (logits.flatten() * torch.linspace(-1, 1, logits.numel())).sum().backward()
    torch.testing.assert_close(backbone.stem.conv1.weight.grad, case["patch_embed_conv1_grad"], rtol=1e-4, atol=1e-5)
    names = convert_published({key: case["state_dict"][key] for key in case["grad_norms"]})
    parameters = {f"backbone.{name}": p for name, p in backbone.named_parameters()}
    parameters |= {f"neck.{name}": p for name, p in neck.named_parameters()}
    parameters |= {f"head.fc.{name}": p for name, p in head.named_parameters()}
    assert set(names) == set(parameters)
    for name, norm in zip(names, case["grad_norms"].values(), strict=True):
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-4), name
    assert not model.training


@pytest.mark.parametrize(("letter", "arch"), [("t", "tiny"), ("s", "small"), ("b", "base")])
def test_every_name_and_shape_of_the_published_sizes(letter: str, arch: str) -> None:
    shapes = json.loads((REFERENCE / f"grootv_{letter}_checkpoint_keys.json").read_text())
    with torch.device("meta"):
        converted = convert_published({name: torch.empty(shape) for name, shape in shapes.items()})
        backbone = GrootV(arch)
        neck = GrootVNeck(8 * backbone.channels, 12 * backbone.channels)
    expected = {f"backbone.{name}": value.shape for name, value in backbone.state_dict().items()}
    expected |= {f"neck.{name}": value.shape for name, value in neck.state_dict().items()}
    expected |= {"head.fc.weight": (1000, 12 * backbone.channels), "head.fc.bias": (1000,)}
    assert {name: value.shape for name, value in converted.items()} == expected
