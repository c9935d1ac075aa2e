"""A model whose weights were not loaded is never silently evaluated."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from grootvl_mm.models import GrootV, GrootVNeck
from grootvl_mm.utils.loaded_weights import all_weights_loaded, check_weights
from grootvl_mm.utils.safe_checkpoints import CheckpointError

PICO = {"channels": 8, "depths": [1, 1]}
WEIGHT = "stages.0.blocks.0.mixer.in_proj.weight"


def changed(change: Callable[[Tensor], object]) -> Callable[[dict], dict]:
    return lambda weights: {**weights, WEIGHT: change(weights[WEIGHT])}


# What is wrong with a file, and what is said.
WRONG: dict[str, tuple[Callable[[dict], dict], str]] = {
    "NumPy arrays": (lambda weights: {name: value.numpy() for name, value in weights.items()}, "a ndarray, expected"),
    "one NumPy array": (changed(lambda value: value.numpy()), "a ndarray, expected a tensor"),
    "lists": (changed(lambda value: value.tolist()), "a list, expected a tensor"),
    "sparse": (changed(lambda value: value.to_sparse()), "sparse"),
    "compressed": (changed(lambda value: value.to_sparse_csr()), "sparse"),
    "meta": (changed(lambda value: value.to("meta")), "meta tensor"),
    "quantized": (changed(lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)), "quantized"),
    "NaN": (changed(lambda value: value.clone().fill_(torch.nan)), "NaN"),
    "one NaN": (changed(lambda value: torch.where(torch.arange(value.shape[1]) == 3, torch.nan, value)), "NaN"),
}
UNFIT: dict[str, tuple[Callable[[dict], dict], str]] = {
    **WRONG,
    "half of it": (lambda weights: dict(list(weights.items())[: len(weights) // 2 + 2]), "is missing"),
    "one missing": (lambda weights: {name: value for name, value in weights.items() if name != WEIGHT}, "is missing"),
    "renamed": (lambda weights: {name.replace("in_proj", "proj"): value for name, value in weights.items()}, "missing"),
    "reshaped": (changed(lambda value: value.T.contiguous()), r"\(8, 32\), expected \(32, 8\)"),
    "half precision": (lambda weights: {name: value.half() for name, value in weights.items()}, "is float16, expected"),
    "bfloat16": (changed(lambda value: value.bfloat16()), "is bfloat16, expected float32"),
    "integers": (changed(lambda value: value.int()), "is int32, expected float32"),
}


@pytest.fixture
def backbone() -> GrootV:
    return GrootV(PICO, out_indices=(0, 1))


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:torch.quantize")
@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_loaded_is_found_in_the_file(name: str, backbone: GrootV) -> None:
    make, message = WRONG[name]
    weights = make(backbone.state_dict())
    for content in ({"state_dict": weights, "meta": {}}, weights):
        if name == "lists" and content is weights:
            continue  # beside weights, a file may hold lists
        with pytest.raises(CheckpointError, match=message) as raised:
            check_weights(content)
        assert "\n" not in str(raised.value)
    check_weights({"state_dict": {**backbone.state_dict(), "head._extra_state": [1]}})


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:torch.quantize")
@pytest.mark.parametrize("name", UNFIT)
def test_pretrained_weights_are_complete_or_an_error(name: str, backbone: GrootV, tmp_path: Path) -> None:
    make, message = UNFIT[name]
    weights = make(backbone.state_dict())
    file = tmp_path / "file.pth"
    torch.save({"state_dict": {f"backbone.{key}": value for key, value in weights.items()}}, file)
    init_cfg = {"type": "Pretrained", "checkpoint": str(file), "prefix": "backbone."}
    with pytest.raises(CheckpointError, match=message) as raised:
        GrootV(PICO, out_indices=(0, 1), init_cfg=init_cfg).init_weights()
    assert "\n" not in str(raised.value)


def test_whole_pretrained_weights_of_higher_precision(backbone: GrootV, tmp_path: Path) -> None:
    file = tmp_path / "file.pth"
    torch.save({key: value.double() for key, value in backbone.state_dict().items()}, file)
    loaded = GrootV(PICO, out_indices=(0, 1), init_cfg=[{"type": "Pretrained", "checkpoint": str(file)}])
    loaded.init_weights()
    for name, value in backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_damaged_and_unfit_files_of_backbone_and_neck(backbone: GrootV, tmp_path: Path) -> None:
    file = tmp_path / "file.pth"
    torch.save(backbone.state_dict(), file)
    content = bytearray(file.read_bytes())
    content[content.find(backbone.stem.conv1.weight.detach().numpy().tobytes())] ^= 1
    file.write_bytes(content)
    init_cfg = {"type": "Pretrained", "checkpoint": str(file)}
    for module in (GrootV(PICO, out_indices=(0, 1), init_cfg=init_cfg), GrootVNeck(16, 24, init_cfg=init_cfg)):
        with pytest.raises(CheckpointError, match="the checksum of"):
            module.init_weights()
    torch.save({"state_dict": {"head.weight": torch.ones(1)}}, file)
    with pytest.raises(CheckpointError, match="check init_cfg's prefix"):
        GrootV(PICO, out_indices=(0, 1), init_cfg={**init_cfg, "prefix": "backbone."}).init_weights()


def test_everything_of_a_model_is_watched(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 4))
    file = tmp_path / "file.pth"
    weights = model.state_dict()
    del weights["1.num_batches_tracked"]
    torch.save({"state_dict": weights}, file)
    with all_weights_loaded(model):
        load_checkpoint(model, str(file))
    torch.save({"state_dict": {"0.weight": weights["0.weight"], "2.bias": torch.ones(5)}}, file)
    message = r"^7 of 8 weights .* '0.bias' is missing; '1.weight' is missing; '1.bias' is missing; and 4 more$"
    with pytest.raises(CheckpointError, match=message), all_weights_loaded(model):
        load_checkpoint(model, str(file))
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())
    with pytest.raises(ZeroDivisionError), all_weights_loaded(model):
        raise ZeroDivisionError
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())


def test_arrays_are_named_as_such() -> None:
    with pytest.raises(CheckpointError, match="'state_dict' must map names to tensors, got a list"):
        check_weights({"state_dict": [np.ones(1)]})
