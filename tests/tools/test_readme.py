"""Every command and every piece of code in README.md is run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from grootvl_mm.registry import MODELS
from tests.tools.tool_runs import ROOT, Mim

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines()]
SHORT = (
    "train_cfg.max_iters=2 train_cfg.val_interval=10 default_hooks.checkpoint.interval=2 train_dataloader.batch_size=2"
)
# What to append, so that a command takes seconds, not minutes. The last model is iter_2.pth then.
SHORTENED = {
    "mim train": f"--cfg-options {SHORT}",
    "mim test": "",
    "mim search": "",
    "python tools/analysis_tools/get_flops.py": "",
    "python tools/analysis_tools/benchmark": "--quick",
    "python tools/model_converters/": "",
    "python tools/train.py": f"--cfg-options {SHORT}",
    "python tools/test.py": "",
    "tools/dist_train.sh": f"--cfg-options {SHORT}",
    "tools/dist_test.sh": "",
}
# Those that set up an environment are run by other tests, or are what runs the tests.
ELSEWHERE = {
    "make demo": "tests/tools/test_run_demo.py",
    "make demo TASK=seg": "tests/tools/test_run_demo.py",
    "make demo TASK=cls": "tests/tools/test_run_demo.py",
    "make test": ".ci/run",
    "pip install --no-build-isolation .": "tests/tools/test_mim.py",
}


def test_every_command_is_known() -> None:
    assert COMMANDS
    for command in COMMANDS:
        runs_here = command.startswith(tuple(SHORTENED))
        assert runs_here or command in ELSEWHERE, f"no test runs the README's command {command!r}"
    for path in ELSEWHERE.values():
        assert (ROOT / path).is_file()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make")])
def test_make_targets_exist(command: str) -> None:
    dry_run = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "setup_env.sh" in dry_run.stdout


@pytest.mark.slow
def test_commands_run_one_after_the_other(mim: Mim, demo_data: Path, tmp_path: Path) -> None:
    """In a checkout with demo data, through the environment where grootvl_mm is installed with pip."""
    for name in ("configs", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(demo_data)
    environment = os.environ | {
        "PATH": f"{mim.python.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    for command in COMMANDS:
        for start, options in SHORTENED.items():
            if command.startswith(start):
                line = re.sub(r"iter_\d+", "iter_2", f"{command} {options}")
                line = re.sub(r"^mim ", f"{mim.python} -m mim ", line)
                line = re.sub(r"^python ", f"{mim.python} ", line)
                done = subprocess.run(
                    line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
                )
                assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert list((tmp_path / "shown").rglob("*.png"))


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.strip().splitlines()[0])
def test_code_runs(code: str, tmp_path: Path) -> None:
    if not code.startswith(("_base_", "optim_wrapper")):
        exec(compile(code, "README.md", "exec"), {})
        return
    config = tmp_path / "config.py"
    config.write_text(code)
    cfg = Config.fromfile(config)
    backbone = MODELS.build(cfg.get("model", {"backbone": {"type": "GrootV", "arch": "pico"}})["backbone"])
    assert backbone.out_indices == (0, 1, 2, 3)
    if "constructor" in cfg.optim_wrapper:
        rates = {group["lr"] for group in build_optim_wrapper(backbone, cfg.optim_wrapper).optimizer.param_groups}
        assert len(rates) == backbone.get_layer_depth("stem")[1] - 1
