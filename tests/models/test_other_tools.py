"""Third-party tools on the backbone: Grad-CAM, hooks, graphs of torch.fx."""

import copy
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.utils import get_installed_path
from mmengine.utils.dl_utils import is_norm
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from grootvl_mm.models import GrootV, TreeSSM
from tests.helpers.config_cases import ROOT
from tests.helpers.tool_runs import load_script

MICRO = {"channels": 8, "depths": [1, 2, 1]}


def make(**options) -> GrootV:
    return GrootV(**{"arch": MICRO, "out_indices": (2,)} | options).eval()


def grad_cam(activation: Tensor, gradient: Tensor) -> Tensor:
    """As every implementation has it, for (B, C, H, W)."""
    return (gradient.mean((2, 3), keepdim=True) * activation).sum(1).relu()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"out_indices": (0, 1)},
        {"out_indices": 0},
        {"arch": "pico", "out_indices": (3,)},
        {"arch": {"channels": 8, "depths": [2]}, "out_indices": (0,), "scan": "cross", "layer_scale": 0.1},
        {"tree_sharing": "stage", "with_cp": True},
        {"ignore_padding": True},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_default_target_layer_of_grad_cam(device: torch.device, options: dict) -> None:
    """The last norm layer, as mmpretrain's vis_cam.py finds it, gives the heatmap of the returned map."""
    backbone = make(**options).to(device)
    kept = []
    norms = [module for module in backbone.modules() if is_norm(module)]

    def keep(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    norms[-1].register_forward_hook(keep)
    feature = backbone(torch.randn(2, 3, 64, 48, device=device))[-1]
    feature.retain_grad()
    head = nn.Linear(feature.shape[1], 10).to(device)
    head(feature.mean((2, 3)))[:, 3].sum().backward()
    (activation,) = kept
    assert activation.shape == feature.shape
    torch.testing.assert_close(activation, feature)
    torch.testing.assert_close(activation.grad, feature.grad)
    expected = grad_cam(feature, feature.grad)
    torch.testing.assert_close(grad_cam(activation, activation.grad), expected)


@pytest.fixture(scope="module")
def vis_cam() -> ModuleType:
    """mmpretrain's tool as it is installed."""
    pytest.importorskip("pytorch_grad_cam")
    pytest.importorskip("mmpretrain")
    pytest.importorskip("pkg_resources")
    folder = Path(get_installed_path("mmpretrain"), ".mim", "tools", "visualization")
    return load_script(str(folder / "vis_cam.py"))


@pytest.mark.parametrize("arguments", [[], ["--vit-like"], ["--target-layers", "backbone.stages.3.norm"]])
def test_vis_cam_of_mmpretrain(
    vis_cam: ModuleType, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command, on a picture that is not square, gives the heatmap of the returned map."""
    import cv2
    from mmpretrain import get_model

    picture, config = tmp_path / "picture.png", ROOT / "configs" / "demo" / "grootv-pico_demo-cls.py"
    cv2.imwrite(str(picture), np.random.default_rng(0).integers(0, 255, (96, 160, 3), dtype=np.uint8))
    model = get_model(str(config)).eval()
    checkpoint = tmp_path / "model.pth"
    torch.save({"state_dict": model.state_dict()}, checkpoint)

    shown = []
    monkeypatch.setattr(vis_cam, "show_cam_grad", lambda heatmap, image, *args, **kwargs: shown.append(heatmap))
    size = ["--cfg-options", "test_dataloader.dataset.pipeline.1.scale=(160,96)"]
    monkeypatch.setattr(sys, "argv", ["vis_cam.py", *map(str, (picture, config, checkpoint)), *arguments, *size])
    with DefaultScope.overwrite_default_scope("mmpretrain"):  # as in a separate process
        vis_cam.main()
    (heatmap,) = shown
    assert heatmap.shape == (1, 96, 160)

    image = cv2.resize(cv2.imread(str(picture)), (160, 96))
    inputs = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    inputs = model.data_preprocessor({"inputs": inputs}, False)["inputs"]
    (feature,) = model.backbone(inputs)
    feature.retain_grad()
    scores = model.head(model.neck((feature,)))
    scores[0, scores.argmax()].backward()
    expected = grad_cam(feature, feature.grad)[0].detach().numpy()
    expected = cv2.resize(expected / max(expected.max(), 1e-7), (160, 96))
    assert np.abs(heatmap[0] - expected / max(expected.max(), 1e-7)).max() < 0.05


def test_hooks_see_maps_and_tokens() -> None:
    """Shapes that docs/tools.md names."""
    backbone = make(out_indices=(0, 1, 2))
    seen: dict[str, tuple] = {}

    def look(name: str, output: Tensor | tuple) -> None:
        seen[name] = tuple(output.shape) if isinstance(output, Tensor) else type(output)

    for name, module in backbone.named_modules():
        module.register_forward_hook(lambda module, inputs, output, name=name: look(name, output))
    backbone(torch.randn(2, 3, 64, 48))
    assert seen["stem"] == (2, 16, 12, 8)
    assert seen["stages.1.blocks.0"] is tuple
    assert seen["stages.1.blocks.0.norm1"] == (2, 8, 6, 16)
    assert seen["stages.1.blocks.0.mixer.in_proj"] == (2, 8, 6, 64)
    assert seen["stages.1.blocks.0.mixer.conv2d"] == (2, 32, 8, 6)
    assert seen["stages.1.blocks.0.mlp"] == (2, 8, 6, 16)
    assert seen["stages.1.norm"] == (2, 16, 8, 6)
    # Also those for which one operator stands as long as nobody looks.
    assert set(seen) == {name for name, module in backbone.named_modules() if not isinstance(module, nn.ModuleList)}


@pytest.mark.parametrize("options", [{}, {"ignore_padding": True}, {"with_cp": True}], ids=str)
def test_feature_extraction_by_torchvision(options: dict) -> None:
    """It makes a graph of everything but the layers that it is told to leave alone."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    backbone = make(**options, out_indices=(0, 1, 2))
    nodes = {f"stages.{index}.norm": f"map {index}" for index in range(3)}
    extractor = extraction.create_feature_extractor(backbone, nodes, tracer_kwargs={"leaf_modules": [TreeSSM]})
    for shape in ((1, 3, 64, 48), (2, 3, 33, 70)):
        image = torch.randn(shape)
        for actual, expected in zip(extractor(image).values(), backbone(image), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_feature_extraction_needs_the_leaf() -> None:
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    with pytest.raises(TypeError, match=r"feature must be a tensor .* got Proxy"):
        extraction.create_feature_extractor(make(), ["stages.0.norm"])


def test_counters_of_others() -> None:
    """One is right, one is wrong; if this fails, update docs/tools.md."""
    ptflops, torchinfo = pytest.importorskip("ptflops"), pytest.importorskip("torchinfo")
    backbone, image = GrootV("pico").eval(), torch.randn(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(image)
    right = counter.get_total_flops() / 2

    def count(backend: str) -> int:
        options = {"as_strings": False, "print_per_layer_stat": False, "verbose": False, "backend": backend}
        return ptflops.get_model_complexity_info(copy.deepcopy(backbone), (3, 64, 64), **options)[0]

    assert count("aten") == pytest.approx(right, rel=0.1)
    assert count("pytorch") == pytest.approx(right, rel=0.1)
    assert torchinfo.summary(backbone, input_data=image, verbose=0).total_mult_adds < 0.5 * right


def test_torch_jit_script_is_refused() -> None:
    """The operators are called with named tuples and keyword arguments of Python."""
    with pytest.raises((RuntimeError, torch.jit.frontend.FrontendError)):
        torch.jit.script(make())


def rows() -> list[str]:
    page = (ROOT / "docs" / "tools.md").read_text()
    return [line for line in page.splitlines() if line.startswith("| ")]


def test_each_row_of_the_page_names_its_test() -> None:
    named = [line.rsplit("|", 2)[1].strip() for line in rows()[1:]]
    assert len(named) > 10
    for test in named:
        path, _, name = test.strip("`").partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(), test
