"""The commands of openmim, or of onedl-mim, after ``pip install .``, in a separate environment."""

import json
from pathlib import Path

import pytest

from tests.helpers.config_cases import CONFIG_FILES
from tests.helpers.tool_runs import ROOT, Mim, mim_name


@pytest.mark.slow
@pytest.mark.parametrize(("host", "task"), [("mmdet", "det"), ("mmseg", "seg"), ("mmpretrain", "cls")])
def test_train_and_test_through_the_host(host: str, task: str, mim: Mim, make_config, tmp_path: Path):
    config = make_config(task)
    options = ("--work-dir", tmp_path, "--cfg-options")
    mim("train", mim_name(host), config, *options, "train_cfg.max_iters=2", "train_cfg.val_interval=10")
    # Needs safe loading to accept mmengine's checkpoint, which only the config's custom_imports brings about.
    output = mim("test", mim_name(host), config, "--checkpoint", tmp_path / "iter_2.pth", "--work-dir", tmp_path)
    assert "Iter(test)" in output
    assert "Testing finished successfully" in output


def test_train_by_config_name_and_run_a_tool(mim: Mim, demo_data: Path, tmp_path: Path):
    # The shipped config looks for data/demo in the current folder.
    (mim.cwd / "data").mkdir(exist_ok=True)
    (mim.cwd / "data" / "demo").symlink_to(demo_data)
    short = ("train_cfg.max_iters=2", "train_dataloader.batch_size=2", "default_hooks.checkpoint.interval=2")
    name = "grootv-pico_demo-cls.py"
    output = mim("train", "grootvl_mm", name, "--work-dir", tmp_path, "--cfg-options", *short)
    assert f".mim/configs/demo/{name}" in output
    assert "Training finished successfully" in output

    image = tmp_path / "predictions.png"
    config = mim.package / ".mim" / "configs" / "demo" / name
    output = mim("run", "grootvl_mm", "draw_predictions", config, tmp_path / "iter_2.pth", image, "--num", 2)
    assert ".mim/tools/visualization" in output
    assert image.is_file()


def test_search(mim: Mim, tmp_path: Path):
    mim("search", "grootvl_mm", "--json", tmp_path / "models.json")
    found = set(json.loads((tmp_path / "models.json").read_text())["config"].values())
    shipped = {str(path.relative_to(ROOT)) for path in CONFIG_FILES}
    recipes = {path for path in shipped if not path.startswith("configs/demo/")}
    assert recipes <= found <= shipped


def test_unknown_config_name(mim: Mim):
    output = mim("train", "grootvl_mm", "no-such-config.py", status=1)
    assert "can not find the config file in codebase grootvl_mm" in output
