"""openmim's commands after ``pip install .``, in an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from tool_runs import ROOT

pytest.importorskip("mim")
pytestmark = pytest.mark.slow

BUILT = ("build", "dist", "data", "work_dirs", "*.egg-info", "*.so", "__pycache__", ".*")


class Mim:
    """The ``mim`` of an environment where this checkout was installed, not linked."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "env", with_pip=False)
        self.python = folder / "env" / "bin" / "python"
        self.cwd = folder / "cwd"
        self.cwd.mkdir()
        site = Path(self.ask("import sysconfig; print(sysconfig.get_path('purelib'))"))
        # torch, mmcv and the hosts come from the environment that runs the tests; a path in a .pth file goes behind
        # the own packages, and the links of an editable install in there stay unread.
        site.joinpath("parent.pth").write_text(sysconfig.get_path("purelib"))
        source = folder / "source"  # building writes into the tree
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*BUILT))
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet"]
        subprocess.run([*pip, "--no-build-isolation", "--no-deps", "--ignore-installed", str(source)], check=True)
        self.package = Path(self.ask("import grootvl_mm; print(grootvl_mm.__path__[0])"))
        assert self.package.parent == site

    def ask(self, code: str) -> str:
        return subprocess.check_output([str(self.python), "-c", code], cwd=self.cwd, text=True).strip()

    def __call__(self, *arguments: object, status: int = 0) -> str:
        command = [str(self.python), "-m", "mim", *map(str, arguments)]
        done = subprocess.run(
            command,
            cwd=self.cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=300,
        )
        assert done.returncode == status, done.stdout[-4000:]
        return done.stdout


@pytest.fixture(scope="module")
def mim(tmp_path_factory: pytest.TempPathFactory) -> Mim:
    return Mim(tmp_path_factory.mktemp("mim"))


@pytest.mark.parametrize(("host", "task"), [("mmdet", "det"), ("mmseg", "seg"), ("mmpretrain", "cls")])
def test_train_and_test_through_the_host(host: str, task: str, mim: Mim, make_config, tmp_path: Path):
    config = make_config(task)
    options = ("--work-dir", tmp_path, "--cfg-options")
    mim("train", host, config, *options, "train_cfg.max_iters=2", "train_cfg.val_interval=10")
    # Needs safe loading to accept mmengine's checkpoint, which only the config's custom_imports brings about.
    output = mim("test", host, config, "--checkpoint", tmp_path / "iter_2.pth", "--work-dir", tmp_path)
    assert "Iter(test)" in output
    assert "Testing finished successfully" in output


def test_train_by_config_name_and_run_a_tool(mim: Mim, demo_data: Path, tmp_path: Path):
    # The shipped config looks for data/demo in the current folder.
    (mim.cwd / "data").mkdir(exist_ok=True)
    (mim.cwd / "data" / "demo").symlink_to(demo_data)
    short = ("train_cfg.max_iters=2", "train_dataloader.batch_size=2", "default_hooks.checkpoint.interval=2")
    name = "grootv-pico_demo-cls.py"
    output = mim("train", "grootvl_mm", name, "--work-dir", tmp_path, "--cfg-options", *short)
    config = mim.package / ".mim" / "configs" / "demo" / name
    assert str(config) in output
    assert "Training finished successfully" in output

    picture = tmp_path / "predictions.png"
    output = mim("run", "grootvl_mm", "draw_predictions", config, tmp_path / "iter_2.pth", picture, "--num", 2)
    assert str(mim.package / ".mim" / "tools" / "visualization") in output
    assert picture.is_file()


def test_search(mim: Mim, tmp_path: Path):
    mim("search", "grootvl_mm", "--json", tmp_path / "models.json")
    found = set(json.loads((tmp_path / "models.json").read_text())["config"].values())
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").glob("[!_]*/*.py")}
    recipes = {path for path in shipped if not path.startswith("configs/demo/")}
    assert recipes <= found <= shipped


def test_unknown_config_name(mim: Mim):
    output = mim("train", "grootvl_mm", "no-such-config.py", status=1)
    assert "can not find the config file in codebase grootvl_mm" in output
