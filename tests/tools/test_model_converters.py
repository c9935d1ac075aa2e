"""The tools of tools/model_converters, on small models and on what their users may give them by mistake."""

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from grootvl_mm import __version__
from grootvl_mm.apis.checkpoint_files import read_checkpoint
from grootvl_mm.models import GrootV, GrootVNeck
from grootvl_mm.models.published_checkpoints import convert_published
from tests.helpers.config_cases import load_config
from tests.helpers.faults import TRAINING
from tests.helpers.published import publish
from tests.helpers.small_runs import run
from tests.helpers.tool_runs import ROOT, call_script, load_script

pytest.importorskip("mmpretrain")

CONVERT = "tools/model_converters/grootv_to_mmpretrain.py"
PUBLISH = "tools/model_converters/publish_model.py"
CLASSES = 5


def published_weights(arch: str | dict, seed: int = 0) -> dict[str, Tensor]:
    """The weights of a random classifier with five classes in the published names."""
    torch.manual_seed(seed)
    backbone = GrootV(arch)
    return publish(backbone, GrootVNeck(8 * backbone.channels, 12 * backbone.channels))


@pytest.fixture(scope="module")
def pico() -> dict[str, Tensor]:
    return published_weights("pico")


@pytest.fixture(scope="module")
def averaged() -> dict[str, Tensor]:
    return published_weights("pico", seed=1)


@pytest.fixture(scope="module")
def converter() -> ModuleType:
    return load_script(CONVERT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder for what the tools write."""
    path = tmp_path / "out"
    path.mkdir()
    return path


def written(folder: Path, stem: str) -> dict:
    (path,) = folder.iterdir()
    assert path.match(f"{stem}-????????.pth")
    return read_checkpoint(path)


def build_classifier() -> nn.Module:
    cfg = load_config(ROOT / "configs" / "demo" / "grootv-pico_demo-cls.py")
    cfg.model.head.num_classes = CLASSES
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return MODELS.build(cfg.model).eval()


def test_converted_classifier_computes_what_the_published_one_does(pico: dict, tmp_path: Path, folder: Path) -> None:
    torch.save({"model": pico, "epoch": 300}, tmp_path / "published.pth")
    assert call_script(CONVERT, tmp_path / "published.pth", folder / "grootv_pico.pth") is None
    model = build_classifier()
    (path,) = folder.iterdir()
    load_checkpoint(model, str(path), map_location="cpu", strict=True)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        backbone, neck = GrootV("pico").eval(), GrootVNeck(192, 288).eval()
        backbone.load_state_dict(dict(pico))
        neck.load_state_dict(dict(pico))
        expected = nn.functional.linear(neck(backbone(image))[0], pico["head.weight"], pico["head.bias"])
        torch.testing.assert_close(model(image, mode="tensor"), expected)
    assert read_checkpoint(path)["meta"] == {
        "source": "published.pth",
        "weights": "model",
        "arch": "pico",
        "num_classes": CLASSES,
        "epoch": 300,
        "grootvl_mm_version": __version__,
    }


@pytest.mark.parametrize(
    ("options", "expected"),
    [((), "model_ema"), (("--weights", "model"), "model"), (("--weights", "model_ema"), "model_ema")],
)
def test_averaged_weights_are_the_default(
    options: tuple, expected: str, pico: dict, averaged: dict, tmp_path: Path, folder: Path
) -> None:
    content = {"model": pico, "model_ema": averaged}
    torch.save(content, tmp_path / "published.pth")
    assert call_script(CONVERT, tmp_path / "published.pth", folder / "a.pth", *options) is None
    checkpoint = written(folder, "a")
    assert checkpoint["meta"]["weights"] == expected
    assert torch.equal(checkpoint["state_dict"]["head.fc.weight"], content[expected]["head.weight"])


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("wrapped", [False, True])
def test_prefixes_and_bare_state_dicts(prefix: str, wrapped: bool, pico: dict, tmp_path: Path, folder: Path) -> None:
    weights = {prefix + name: value for name, value in pico.items()}
    torch.save({"model": weights} if wrapped else weights, tmp_path / "published.pth")
    assert call_script(CONVERT, tmp_path / "published.pth", folder / "a.pth") is None
    checkpoint = written(folder, "a")
    assert checkpoint["meta"]["weights"] == ("model" if wrapped else "state dict")
    expected = convert_published(pico)
    assert checkpoint["state_dict"].keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in checkpoint["state_dict"].items())


@pytest.mark.parametrize("arch", ["tiny", "small", "base", {"channels": 16, "depths": (1, 3, 2, 1)}])
def test_every_size_is_found_and_fits(arch: str | dict, converter: ModuleType) -> None:
    with torch.device("meta"):
        weights = published_weights(arch)
    content = {"model": {name: torch.zeros(weight.shape) for name, weight in weights.items()}}
    meta = converter.convert(content, "published.pth")["meta"]
    assert (meta["arch"], meta["num_classes"]) == (arch, CLASSES)


def without(weights: dict, part: str) -> dict:
    return {name: value for name, value in weights.items() if part not in name}


WRONG = {
    "another model": (lambda w: {"model": {"layer1.0.conv1.weight": torch.ones(2)}}, "not the weights of a published"),
    "own names": (
        lambda w: {"state_dict": convert_published(w)},
        "expected a state dict under 'model'; found 'state_dict'",
    ),
    "no weights": (lambda w: {"model": {}}, "expected a state dict under 'model'$"),
    "numbers": (lambda w: {"model": dict.fromkeys(w, 1)}, "expected a state dict under 'model'$"),
    "missing layers": (lambda w: {"model": without(w, "x_proj")}, "do not fit the classifier: 5 missing: 'backbone"),
    "missing stage": (
        lambda w: {"model": without(w, "levels.3")},
        "stem or blocks of some of the four stages are missing",
    ),
    "missing stem": (lambda w: {"model": without(w, "patch_embed")}, "stem or blocks of some of the four stages"),
    "missing block": (lambda w: {"model": without(w, "levels.2.blocks.0")}, "do not fit the classifier: 20 missing"),
    "no head": (lambda w: {"model": without(w, "head")}, "do not fit the classifier: 8 missing"),
    "surplus": (lambda w: {"model": {**w, "extra.weight": torch.ones(1)}}, "1 unexpected: 'extra.weight'"),
    "shape": (lambda w: {"model": {**w, "head.weight": torch.ones(5, 3)}}, "1 of another shape: 'head.fc.weight'"),
    "axes": (
        lambda w: {"model": {**w, "levels.0.blocks.0.TreeSSM.A_logs": torch.ones(48)}},
        "must have at least 2 axes, got shape",
    ),
    "odd stem": (lambda w: {"model": {**w, "patch_embed.conv2.weight": torch.ones(3)}}, "the stem or blocks of some"),
    "NaN": (lambda w: {"model": {**w, "head.bias": w["head.bias"] * torch.nan}}, "'head.fc.bias' is NaN"),
    "half precision": (lambda w: {"model": {k: v.half() for k, v in w.items()}}, "is float16, expected float32"),
    "sparse": (lambda w: {"model": {**w, "head.weight": w["head.weight"].to_sparse()}}, "sparse or nested"),
    "meta": (lambda w: {"model": {**w, "head.weight": w["head.weight"].to("meta")}}, "a meta tensor"),
    "twice": (lambda w: {"model": {**w, "module.head.bias": torch.ones(5)}}, "contain 'head.bias' twice"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_end_in_one_error_and_write_nothing(case: str, pico: dict, tmp_path: Path, folder: Path) -> None:
    make, message = WRONG[case]
    source = tmp_path / "wrong.pth"
    torch.save(make(pico), source)
    error = call_script(CONVERT, source, folder / "a.pth")
    assert error.startswith(f"error: {source}: ")
    assert "\n" not in error
    assert re.search(message, error)
    assert list(folder.iterdir()) == []


def test_weights_that_are_not_there(pico: dict, tmp_path: Path, folder: Path) -> None:
    source = tmp_path / "published.pth"
    torch.save({"model": pico}, source)
    error = call_script(CONVERT, source, folder / "a.pth", "--weights", "model_ema")
    assert error == f"error: {source}: the file has no 'model_ema'; found 'model'"


@pytest.mark.parametrize("script", [CONVERT, PUBLISH])
@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ("nothing.pth", "out/a.pth", "nothing.pth does not exist; give a checkpoint file"),
        ("text.pth", "out/a.pth", "text.pth is not a checkpoint, or is damaged"),
        ("text.pth", "nowhere/a.pth", "nowhere/a.pth does not exist; create it first"),
        ("text.pth", "out/a.bin", "must be the path of a .pth file"),
    ],
)
def test_bad_paths(script: str, source: str, target: str, message: str, tmp_path: Path, folder: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    error = call_script(script, tmp_path / source, tmp_path / target)
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert list(folder.iterdir()) == []
    assert not (tmp_path / "nowhere").exists()


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, dict]:
    """The checkpoint of a real run with EMAHook, and the weights of its last iteration."""
    runner = run(tmp_path / "run", 4, scores=(1.0, 2.0, 3.0, 4.0), **TRAINING)
    return tmp_path / "run" / "iter_4.pth", runner.model.state_dict()


def test_published_model_holds_weights_and_meta_only(trained: tuple, folder: Path) -> None:
    path, last = trained
    assert call_script(PUBLISH, path, folder / "model.pth") is None
    source, checkpoint = read_checkpoint(path), written(folder, "model")
    assert sorted(checkpoint) == ["meta", "state_dict"]
    assert {"optimizer", "message_hub", "param_schedulers", "ema_state_dict"} <= set(source)
    for name, value in checkpoint["state_dict"].items():
        assert torch.equal(value, source["state_dict"][name])
        assert not torch.equal(value, last[name])  # averaged, not the last
    assert checkpoint["meta"] == {**source["meta"], "weights": "averaged", "grootvl_mm_version": __version__}
    assert {"cfg", "dataset_meta", "mmengine_version", "iter"} <= set(checkpoint["meta"])


def test_weights_of_the_last_iteration(trained: tuple, folder: Path) -> None:
    path, last = trained
    assert call_script(PUBLISH, path, folder / "model.pth", "--no-ema") is None
    checkpoint = written(folder, "model")
    assert checkpoint["meta"]["weights"] == "last iteration"
    assert checkpoint["state_dict"].keys() == last.keys()
    assert all(torch.equal(value, last[name]) for name, value in checkpoint["state_dict"].items())


def test_published_model_loads_into_its_config(tmp_path: Path, folder: Path) -> None:
    model = build_classifier()
    torch.save({"state_dict": model.state_dict(), "optimizer": {"state": {}}}, tmp_path / "trained.pth")
    assert call_script(PUBLISH, tmp_path / "trained.pth", folder / "model.pth") is None
    (path,) = folder.iterdir()
    other = build_classifier()
    load_checkpoint(other, str(path), map_location="cpu", strict=True)
    assert torch.equal(other.head.fc.weight, model.head.fc.weight)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"model": {"a": torch.ones(1)}}, (), "no weights under 'state_dict'; expected a checkpoint of mmengine's"),
        ({"state_dict": {}}, (), "no weights under 'state_dict'"),
        ({"state_dict": {"a": torch.ones(1)}}, ("--no-ema",), "no EMA weights (the run had no EMAHook)"),
        (
            {"state_dict": {"a": torch.ones(1)}, "ema_state_dict": {"module.b": torch.ones(1)}},
            ("--no-ema",),
            "have different names",
        ),
    ],
    ids=["published", "empty", "no ema", "other ema"],
)
def test_what_cannot_be_published(content: dict, options: tuple, message: str, tmp_path: Path, folder: Path) -> None:
    torch.save(content, tmp_path / "file.pth")
    error = call_script(PUBLISH, tmp_path / "file.pth", folder / "model.pth", *options)
    assert error.startswith(f"error: {tmp_path / 'file.pth'}: ")
    assert message in error
    assert list(folder.iterdir()) == []
