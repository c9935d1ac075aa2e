"""tools/analysis_tools/get_flops.py against the published figures, and against a forward pass with values."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers.config_cases import CONFIG_FILES, load_config
from tests.helpers.tool_runs import call_script, load_script

for host in ("mmdet", "mmseg", "mmpretrain"):
    pytest.importorskip(host)

TOOL = "tools/analysis_tools/get_flops.py"
CONFIGS = {path.stem: path for path in CONFIG_FILES}
# Billions, of the paper's tables: 224x224, 1280x800 and 512x2048.
PUBLISHED = {
    "grootv-tiny_8xb128_in1k": 4.8,
    "grootv-small_8xb128_in1k": 8.5,
    "grootv-base_8xb128_in1k": 15.1,
    "mask-rcnn_grootv-tiny_fpn_1x_coco": 265,
    "mask-rcnn_grootv-small_fpn_1x_coco": 341,
    "grootv-tiny_upernet_8xb2-160k_ade20k-512x512": 941,
    "grootv-small_upernet_8xb2-160k_ade20k-512x512": 1019,
}
PARTS = {
    "mmpretrain": {"backbone", "neck", "head"},
    "mmdet": {"backbone", "neck", "rpn_head", "roi_head.bbox_head", "roi_head.mask_head"},
    "mmseg": {"backbone", "decode_head", "auxiliary_head"},
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script(TOOL)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_flops(name: str, tool: ModuleType) -> None:
    counted = tool.count(load_config(CONFIGS[name]))["total"]["flops"]
    assert counted / 1e9 == pytest.approx(PUBLISHED[name], rel=0.02)


@pytest.mark.parametrize("name", sorted(name for name in CONFIGS if "demo" in name))
def test_parts_and_operators_add_up(name: str, tool: ModuleType) -> None:
    cfg = load_config(CONFIGS[name])
    result = tool.count(cfg, (128, 160))
    assert result["parts"].keys() == {part for part in PARTS[cfg.default_scope] if cfg.model.get(part.split(".")[0])}
    for key in ("parameters", "flops"):
        assert sum(part[key] for part in result["parts"].values()) == result["total"][key] > 0
    assert sum(result["operators"].values()) == result["total"]["flops"]
    grootv = "grootvl" in cfg.model.backbone.type
    assert ("grootvl.tree_selective_scan" in result["operators"]) == grootv
    for part, figures in result["parts"].items():
        assert figures["parameters"] > 0
        assert (figures["flops"] > 0) == (part != "auxiliary_head")


@pytest.mark.parametrize("name", sorted(name for name in CONFIGS if "demo" in name))
def test_shapes_alone_give_the_flops_of_a_real_forward_pass(name: str, tool: ModuleType) -> None:
    cfg = load_config(CONFIGS[name])
    expected = tool.count(cfg, (128, 160))["total"]["flops"]
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model).eval()
    arguments = []
    if cfg.default_scope == "mmdet":
        from mmdet.structures import DetDataSample

        # No suppression, so that as many boxes as may be come out of it.
        model.rpn_head.test_cfg.nms.iou_threshold = 1.0
        shape = (128, 160)
        arguments = [[DetDataSample(metainfo={"img_shape": shape, "ori_shape": shape, "scale_factor": (1.0, 1.0)})]]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 3, 128, 160), *arguments, mode="tensor")
    assert counter.get_total_flops() // 2 == expected


def test_tree_scans_are_counted_by_the_stated_formulas(tool: ModuleType) -> None:
    """Written down from the tool's help for one block at 28x28 of the pico demo's first stage."""
    cfg = load_config(CONFIGS["grootv-pico_demo-cls"])
    cfg.model.backbone.arch = {"channels": 32, "depths": [1]}
    cfg.model.backbone.out_indices = [0]
    cfg.model.neck.update(in_channels=32, out_channels=32)
    cfg.model.head.in_channels = 32
    operators = tool.count(cfg, (112, 112))["operators"]
    elements, rank = 28 * 28 * 64, 2
    assert operators["grootvl.grid_edge_weight"] == 6 * elements // 2
    assert operators["grootvl.grid_tree"] == 0
    assert operators["grootvl.tree_selective_scan"] == (33 + 2 * rank) * elements // 2


def test_shows_a_table_and_writes_json(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "flops.json"
    config = CONFIGS["grootv-pico_demo-cls"]
    call_script(TOOL, config, "--shape", 64, 96, "--json", path, "--cfg-options", "model.head.num_classes=7")
    output = capsys.readouterr().out
    result = json.loads(path.read_text())
    assert result["config"] == config.name
    assert result["shape"] == [64, 96]
    assert result["parts"]["head"]["parameters"] == 288 * 7 + 7
    assert "one image of 64x96" in output
    for text in (*result["parts"], *result["operators"], "total", "FLOPs are multiply-adds"):
        assert text in output


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("nowhere.py",), 1, "error: config 'nowhere.py' does not exist"),
        ((CONFIGS["grootv-pico_demo-cls"], "--shape", 0, 5), 2, "--shape must be two positive numbers, got 0 5"),
        ((CONFIGS["grootv-pico_demo-cls"], "--json", "/dev/null/a.json"), 1, "cannot write /dev/null/a.json: "),
        (
            (CONFIGS["grootv-pico_demo-cls"], "--cfg-options", "model.neck.in_channels=5"),
            1,
            "does not run on the meta device, or not with this --shape: ",
        ),
    ],
    ids=["config", "shape", "json", "model"],
)
def test_one_clear_error(arguments: tuple, status: int, message: str, capsys: pytest.CaptureFixture) -> None:
    error = call_script(TOOL, *arguments)
    if status == 2:
        assert error == status
        error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert "\n" not in error


def test_a_detector_with_one_stage_and_another_backbone(tool: ModuleType, tmp_path: Path) -> None:
    """239 G in mmdetection's model zoo."""
    config = tmp_path / "config.py"
    config.write_text("_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'")
    result = tool.count(load_config(config))
    assert result["total"]["flops"] / 1e9 == pytest.approx(239, rel=0.02)
    assert result["parts"].keys() == {"backbone", "neck", "bbox_head"}
