"""Published classifiers load into mmpretrain's ImageClassifier unchanged, in every way of loading."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner, load_checkpoint
from torch import Tensor, nn

from grootvl_mm.models import GrootV, GrootVNeck
from grootvl_mm.models.published_checkpoints import CheckpointError
from tests.helpers.config_cases import ROOT, load_config
from tests.helpers.published import REFERENCE, publish

mmpretrain = pytest.importorskip("mmpretrain")

DEMO = ROOT / "configs" / "demo" / "grootv-pico_demo-cls.py"
CLASSES = 5


def build(cfg: Config) -> nn.Module:
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        return MODELS.build(cfg.model).eval()


def pico_config() -> Config:
    cfg = load_config(DEMO)
    cfg.model.head.num_classes = CLASSES
    return cfg


def pico_weights(seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return publish(GrootV("pico"), GrootVNeck(192, 288))


@pytest.fixture(autouse=True)
def _scope() -> Iterator[None]:
    """Other tests may have left another default scope, and Runner changes it for good."""
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        yield


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return pico_weights(1)


@pytest.fixture(scope="module")
def averaged() -> dict[str, Tensor]:
    return pico_weights(2)


@pytest.fixture
def save(tmp_path: Path) -> Callable[[object], str]:
    def write(content: object) -> str:
        torch.save(content, tmp_path / "published.pth")
        return str(tmp_path / "published.pth")

    return write


def assert_holds(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """One weight of each part, and so all of them: loading is all or nothing there."""
    for name, key in (
        ("backbone.stages.3.blocks.0.mixer.in_proj.weight", "levels.3.blocks.0.TreeSSM.in_proj.weight"),
        ("neck.conv.weight", "conv_head.0.weight"),
        ("head.fc.weight", "head.weight"),
    ):
        assert torch.equal(model.get_parameter(name), weights[key]), name


def test_logits_are_those_of_the_published_model(save: Callable) -> None:
    case = torch.load(REFERENCE / "grootv_micro.pt")
    channels, depths, classes = (case["config"][key] for key in ("channels", "depths", "num_classes"))
    cfg = load_config(DEMO)
    cfg.model.backbone.arch = {"channels": channels, "depths": depths}
    cfg.model.neck.update(in_channels=8 * channels, out_channels=12 * channels)
    cfg.model.head.update(in_channels=12 * channels, num_classes=classes)
    model = build(cfg)
    load_checkpoint(model, save({"model": case["state_dict"], "epoch": 300}), map_location="cpu", strict=True)
    with torch.no_grad():
        torch.testing.assert_close(model(case["input"], mode="tensor"), case["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("letter", "name"), [("t", "tiny"), ("s", "small"), ("b", "base")])
def test_every_published_size_fits_its_config(letter: str, name: str) -> None:
    shapes = json.loads((REFERENCE / f"grootv_{letter}_checkpoint_keys.json").read_text())
    with torch.device("meta"):
        model = build(load_config(ROOT / f"configs/grootv/grootv-{name}_8xb128_in1k.py"))
        weights = {key: torch.empty(shape) for key, shape in shapes.items()}
    model.load_state_dict({"model": weights, "optimizer": {}}, strict=True, assign=True)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone.", "module.backbone."])
@pytest.mark.parametrize("key", ["model", "model_ema", "state_dict", None])
def test_wrappings_and_prefixes(prefix: str, key: str | None, published: dict, save: Callable) -> None:
    weights = {prefix + name: value for name, value in published.items()}
    model = build(pico_config())
    load_checkpoint(model, save({key: weights, "epoch": 300} if key else weights), map_location="cpu", strict=True)
    assert_holds(model, published)


def test_prefix_of_the_backbone_alone(published: dict, save: Callable) -> None:
    """As a larger model holds it: the backbone's names begin with ``backbone.``, the others with nothing."""
    weights = {("" if "head" in name else "backbone.") + name: value for name, value in published.items()}
    model = build(pico_config())
    load_checkpoint(model, save({"model": weights}), map_location="cpu", strict=True)
    assert_holds(model, published)


def test_own_checkpoints_load_unchanged(save: Callable) -> None:
    model, other = build(pico_config()), build(pico_config())
    load_checkpoint(other, save({"state_dict": model.state_dict()}), map_location="cpu", strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_a_copy_of_the_model_reads_published_files_too(published: dict) -> None:
    """Averaged models are copies, one level deeper."""
    averaged = nn.Module()
    averaged.module = deepcopy(build(pico_config()))
    averaged.load_state_dict({f"module.{name}": value for name, value in published.items()}, strict=True)
    assert_holds(averaged.module, published)


def test_pretrained_init_cfg(published: dict, save: Callable) -> None:
    cfg = pico_config()
    cfg.model.init_cfg = {"type": "Pretrained", "checkpoint": save({"model": published})}
    model = build(cfg)
    model.init_weights()
    assert_holds(model, published)


def test_apis_of_mmpretrain(published: dict, save: Callable) -> None:
    from mmpretrain import FeatureExtractor, ImageClassificationInferencer, get_model
    from mmpretrain.apis import init_model

    file, picture = save({"model": published}), torch.randint(256, (64, 64, 3), dtype=torch.uint8).numpy()
    assert_holds(get_model(pico_config(), pretrained=file), published)
    assert_holds(init_model(pico_config(), file, device="cpu"), published)
    (result,) = ImageClassificationInferencer(pico_config(), pretrained=file)(picture)
    assert len(result["pred_scores"]) == CLASSES
    (maps,) = FeatureExtractor(pico_config(), pretrained=file, backbone={"out_indices": (0, 1, 2, 3)})(
        picture, stage="backbone"
    )
    assert [tuple(feature.shape) for feature in maps] == [(24, 16, 16), (48, 8, 8), (96, 4, 4), (192, 2, 2)]


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("ema", [None, "EMAHook", "mmengine.EMAHook"])
def test_a_run_starts_from_a_published_file(
    ema: str | None, both: bool, published: dict, averaged: dict, save: Callable, tmp_path: Path
) -> None:
    """What ``load_from``, and so tools/train.py and tools/test.py do; in the recipe with averaged weights, too."""
    content = {"model": published, "epoch": 300} | ({"model_ema": averaged} if both else {})
    recipe = load_config(ROOT / "configs" / "grootv" / "grootv-tiny_8xb128_in1k.py")
    hooks = [{**hook, "type": ema} if hook.type == "EMAHook" else hook for hook in recipe.custom_hooks]
    assert len(hooks) == 2
    cfg = pico_config()
    runner = Runner(
        build(cfg),
        str(tmp_path),
        custom_hooks=hooks if ema else None,
        load_from=save(content),
        default_scope="mmpretrain",
        experiment_name=f"published-{ema}-{both}",
        log_level="WARNING",
    )
    runner.call_hook("before_run")
    runner.load_or_resume()
    if not ema:
        assert_holds(runner.model, published)
        return
    runner.call_hook("before_test_epoch")  # which exchanges the weights
    assert_holds(runner.model, averaged if both else published)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda w: {"model": {"layer1.0.conv1.weight": torch.ones(2)}}, "found nothing with the prefix 'backbone.'"),
        (lambda w: {"model": {k: v for k, v in w.items() if "levels" not in k}}, r"8 of \d+ parameters match"),
        (
            lambda w: {"model": publish(GrootV({"channels": 16, "depths": [1, 1, 2, 1]}))},
            r"Expected for example 'backbone.stem.conv1.weight' \(12, 3, 3, 3\), found "
            r"'backbone.stem.conv1.weight' \(8, 3, 3, 3\)\. Check",
        ),
        (lambda w: {"model": {**w, "module.head.bias": torch.ones(5)}}, "contain 'head.bias' twice"),
        (
            lambda w: {"model": {**w, "levels.0.blocks.0.TreeSSM.A_logs": torch.ones(48)}},
            "'levels.0.blocks.0.TreeSSM.A_logs' must have at least 2 axes, got shape",
        ),
        (
            lambda w: {"model": {**w, "levels.0.blocks.0.TreeSSM.A_logs": "text"}},
            "'levels.0.blocks.0.TreeSSM.A_logs' is a str, expected a tensor",
        ),
        (lambda w: {"model": {**w, 5: torch.ones(1)}}, "not a dictionary of names to tensors"),
    ],
    ids=["another model", "missing layers", "another size", "twice", "axes", "text", "number as a name"],
)
def test_a_file_that_does_not_fit_is_an_error(make: Callable, message: str, published: dict, save: Callable) -> None:
    model = build(pico_config())
    before = model.head.fc.weight.clone()
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(model, save(make(published)), map_location="cpu")
    assert torch.equal(model.head.fc.weight, before)
