"""Initial values, and who may change them."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from mmengine.model import BaseModule
from torch import nn

from grootvl_mm.models import GrootV, GrootVNeck, TreeSSM

BY_TYPE = [
    {"type": "TruncNormal", "layer": "Linear", "std": 0.02, "bias": 0.0},
    {"type": "Constant", "layer": "LayerNorm", "val": 1.0, "bias": 0.0},
    {"type": "Kaiming", "layer": ["Conv2d", "Linear"]},
]


class Network(BaseModule):
    """A model that initialises all its layers of some types, as the hosts' recipes do."""

    def __init__(self, init_cfg: list[dict]) -> None:
        super().__init__(init_cfg)
        self.backbone = GrootV("pico", layer_scale=0.1)
        self.neck = GrootVNeck(192, 288)


def state_space(model: nn.Module) -> list[torch.Tensor]:
    """What the state space models start from."""
    names = ("dt_proj.weight", "dt_proj.bias", "A_log", "Ds")
    return [value.detach().clone() for name, value in model.named_parameters() if name.endswith(names)]


def steps(model: nn.Module) -> torch.Tensor:
    return torch.cat(
        [nn.functional.softplus(m.dt_proj.bias.detach()) for m in model.modules() if isinstance(m, TreeSSM)]
    )


def test_steps_start_log_uniformly() -> None:
    dt = steps(GrootV("pico"))
    assert 0.001 <= dt.min() < 0.0015
    assert 0.07 < dt.max() <= 0.1
    assert dt.log().mean().exp().item() == pytest.approx(0.01, rel=0.1)


def test_the_state_space_survives_the_recipes_of_a_larger_model() -> None:
    network = Network(BY_TYPE)
    before = state_space(network)
    in_proj = network.backbone.stages[0].blocks[0].mixer.in_proj.weight.detach().clone()
    network.init_weights()
    torch.testing.assert_close(state_space(network), before, rtol=0, atol=0)
    assert not torch.equal(network.backbone.stages[0].blocks[0].mixer.in_proj.weight, in_proj)


OF_ALL_LAYERS = [
    {"type": "Constant", "val": 0.3, "bias": 0.2},
    {"type": "Normal", "std": 0.3, "bias": 0.2},
    {"type": "TruncNormal", "std": 0.3, "bias": 0.2},
    {"type": "Uniform", "a": 0.1, "b": 0.3, "bias": 0.2},
]


@pytest.mark.parametrize("recipe", OF_ALL_LAYERS, ids=lambda recipe: recipe["type"])
def test_the_state_space_survives_recipes_without_a_type(recipe: dict) -> None:
    """One for a part by its name reaches all layers of it."""

    class Around(BaseModule):
        def __init__(self) -> None:
            super().__init__({"type": "Constant", "val": 0, "layer": "Conv1d", "override": {"name": "mixer", **recipe}})
            self.mixer = TreeSSM(8)

    network = Around()
    before = state_space(network)
    in_proj = network.mixer.in_proj.weight.detach().clone()
    network.init_weights()
    torch.testing.assert_close(state_space(network), before, rtol=0, atol=0)
    assert not torch.equal(network.mixer.in_proj.weight, in_proj)


def test_other_functions_reach_the_state_space() -> None:
    seen = []
    GrootV("pico").apply(lambda module: seen.append(type(module).__name__))
    assert seen.count("StepProjection") == 5


def test_a_file_of_a_larger_model_survives(tmp_path) -> None:
    source = Network([])
    nn.init.constant_(source.backbone.stages[0].blocks[0].mixer.dt_proj.bias, -3.0)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "model.pth")
    network = Network([*BY_TYPE, {"type": "Pretrained", "checkpoint": str(tmp_path / "model.pth")}])
    network.init_weights()
    torch.testing.assert_close(dict(network.named_parameters()), dict(source.named_parameters()))


def init_whole(network: Network) -> None:
    network.init_weights()


def init_parts(network: Network) -> None:
    for part in (network.backbone, network.neck):
        part.init_weights()


def reset_all(network: Network) -> None:
    for module in network.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


def reset_all_copied(network: Network) -> None:
    """Of a copy, whose functions must not be those of the original."""
    copied = pickle.loads(pickle.dumps(copy.deepcopy(network)))
    reset_all(copied)
    network.load_state_dict(copied.state_dict())


@pytest.mark.parametrize("start", [init_whole, init_parts, reset_all, reset_all_copied])
def test_a_model_from_meta_starts_as_a_fresh_one(start: Callable[[Network], None]) -> None:
    with torch.device("meta"):
        network = Network([])
    network = network.to_empty(device="cpu")
    for value in network.state_dict().values():
        value.fill_(77)
    start(network)
    fresh = Network([]).state_dict()
    for name, value in network.state_dict().items():
        expected = fresh[name].float()
        if expected.unique().numel() == 1:
            assert torch.equal(value, fresh[name]), name
        else:
            assert value.abs().max() < 1.5 * expected.abs().max() + 0.05, name
            assert value.std() > 0.5 * expected.std(), name
    assert 0.001 <= steps(network).min() <= steps(network).max() <= 0.1


def test_loaded_values_are_not_drawn_anew() -> None:
    source = Network([]).state_dict()
    with torch.device("meta"):
        moved, assigned = Network([]), Network([])
    moved.to_empty(device="cpu").load_state_dict(source)
    assigned.load_state_dict(source, assign=True)
    for network in (moved, assigned, Network([])):
        network.load_state_dict(source)
        network.init_weights()
        torch.testing.assert_close(network.state_dict(), source, rtol=0, atol=0)
