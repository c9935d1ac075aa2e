"""demo/scan_study.py: its tables and configs, and a complete run on tiny data."""

import json
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from tests.helpers.config_cases import build_model, load_config
from tests.helpers.tool_runs import Command, load_script

for host in ("mmdet", "mmpretrain", "mmseg"):
    pytest.importorskip(host)


@pytest.fixture(scope="module")
def study():
    return load_script("demo/scan_study.py")


def test_table_tells_what_can_be_told_apart(study) -> None:
    title = "accuracy on the pixels of curves"
    results = {
        "tree": {seed: {title: value} for seed, value in enumerate((0.80, 0.82, 0.84))},
        "raster": {seed: {title: value} for seed, value in enumerate((0.70, 0.72, 0.745))},
        "cross": {seed: {title: value} for seed, value in enumerate((0.70, 0.90, 0.84))},
        "swin": {1: {title: 0.5}},
    }
    header, _, tree, raster, cross, swin = study.make_table("curves", results).splitlines()
    assert header == f"| backbone | seeds | {title} | difference to tree | significant |"
    assert tree == "| tree (cosine, per block) | 3 | 0.820 ± 0.020 | - | - |"
    assert raster == "| raster | 3 | 0.722 ± 0.023 | -0.098 ± 0.007 | yes |"
    assert cross.endswith("| no |")
    assert swin == "| Swin Transformer | 1 | 0.500 | - | - |"


def test_difference_is_students(study) -> None:
    mean, half = study.difference({0: 1.0, 1: 2.0, 2: 3.0, 5: 9.0}, {0: 0.0, 1: 0.0, 2: 0.0})
    assert mean == 2
    assert half == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert study.difference({0: 1.0}, {0: 2.0}) is None


@pytest.mark.parametrize(
    ("task", "arm"),
    [
        *(("curves", arm) for arm in ("raster", "random", "maximum", "stage-tree", "convnext", "swin")),
        *(("curves-cls", "swin"), ("det", "swin"), ("seg", "convnext"), ("seg", "swin")),
    ],
)
def test_configs(study, task: str, arm: str, tmp_path: Path) -> None:
    """They build, accept an image, and have the channels of the GrootV that they replace."""
    cfg = load_config(study.write_config(arm, task, tmp_path))
    base = load_config(study.ROOT / "configs" / "demo" / study.TASKS[task].config)
    cfg.merge_from_dict({"randomness": {"seed": 1}})
    image = torch.randn(1, 3, 64, 64)
    models = build_model(cfg).eval(), build_model(base).eval()
    shapes = [[tuple(feature.shape) for feature in model.backbone(image)] for model in models]
    assert shapes[0] == shapes[1]
    for option, value in study.ARMS[arm].options.items():
        assert cfg.model.backbone[option] == value
    parsed = dict(option.split("=", 1) for option in study.overrides(cfg, task, Path("/there")))
    assert parsed["data_root"] == ("/there/classification/" if task == "curves-cls" else "/there/")
    assert ("model.data_preprocessor.size" in parsed) == (task == "curves")


@pytest.mark.parametrize("name", ["minutes", "short"])
def test_presets(study, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scan_study.py", "--preset", name, "--seeds", "7"])
    args = study.parse_args()
    assert args.seeds == [7]
    assert set(args.arms) <= set(study.ARMS)
    assert args.tasks == ["curves"]
    assert args.iters == study.PRESETS[name]["iters"]


@pytest.mark.slow
def test_study_runs_and_does_not_repeat_itself(study, tmp_path: Path) -> None:
    command = Command(tmp_path)
    arguments = ["../demo/scan_study.py", "--work-dir", tmp_path / "study", "--seeds", 3, "--iters", 2]
    arguments += ["--tasks", "curves", "curves-cls", "seg", "--arms", "tree", "swin", "--train", 64, "--val", 8]
    output = command(*arguments)
    assert "Iter(train)" in output
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert set(results) == {f"{task}/{arm}/2/3" for task in ("curves", "curves-cls", "seg") for arm in ("tree", "swin")}
    assert all(0 <= value <= 1 for values in results.values() for key, value in values.items() if key != "seconds")
    page = (tmp_path / "study" / "README.md").read_text()
    assert page.count("| Swin Transformer | 1 |") == 3
    again = command(*arguments)
    assert "Iter(train)" not in again
    assert (tmp_path / "study" / "README.md").read_text() == page
    assert isinstance(Config.fromfile(tmp_path / "study" / "configs" / "seg_swin.py"), Config)
