"""Runs the command-line tools, in new processes or in this one, and reads their output files."""

import functools
import importlib.util
import json
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILT = ("build", "dist", "data", "work_dirs", "*.egg-info", "*.so", "__pycache__", ".*")


# The slow imports of the scripts. Not grootvl_mm, which every script must import itself.
PRELOADED = (
    *("mmcv.ops", "mmengine.runner", "mmengine.visualization", "pycocotools.coco", "torch._dynamo", "torchvision"),
    *(f"{host}.{part}" for host in ("mmdet", "mmpretrain", "mmseg") for part in ("datasets", "evaluation", "models")),
)
TIMEOUT = 300


class Command:
    """Runs scripts of this repository in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # One thread each, so that parallel test processes do not slow each other down.
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def popen(self, script: str, *arguments: object, **env: str) -> subprocess.Popen:
        """Start a script, given by its path relative to ``tools``."""
        path = ROOT / "tools" / script
        start = ["bash"] if path.suffix == ".sh" else [sys.executable]
        return subprocess.Popen(
            [*start, str(path), *map(str, arguments)],
            cwd=self.folder,
            env={**self.env, **env},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def __call__(self, script: str, *arguments: object, status: int = 0, **env: str) -> str:
        """Run a script in a new process, check its exit status and return its output."""
        process = self.popen(script, *arguments, **env)
        try:
            output = process.communicate(timeout=TIMEOUT)[0]
        finally:
            process.kill()  # after a timeout; otherwise it has already ended
        assert process.returncode == status, output[-4000:]
        return output

    def forked(self, script: str, *arguments: object, status: int = 0, **env: str) -> str:
        """Run a Python script in a fork of a process that has already imported the hosts, which saves seconds.

        Each script also needs at least one test in a new process, where it imports everything itself.
        """
        if torch.cuda.is_available():  # forks of a process that has initialized CUDA cannot use it
            return self(script, *arguments, status=status, **env)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            written = Path(folder, "output.txt")
            command = [str(ROOT / "tools" / script), *map(str, arguments)]
            process = context.Process(target=_become, args=(command, self.folder, {**self.env, **env}, written))
            patch.setenv("OMP_NUM_THREADS", "1")  # for the fork server, if it has not been started yet
            process.start()
            process.join(TIMEOUT)
            process.kill()
            output = written.read_text()
        assert process.exitcode == status, output[-4000:]
        return output


def _become(command: list[str], folder: Path, environment: dict[str, str], written: Path) -> None:
    """Run a script as Python does in a new process, with its output redirected to a file."""
    sys.stdout.flush()  # what the fork server's imports printed, of which each fork has a copy
    with written.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    # Without the root of the checkout, which pytest adds, unless PYTHONPATH contains it.
    kept = [path for path in sys.path if path != str(ROOT)]
    given = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    sys.path[:] = [str(Path(command[0]).parent), *given, *kept]
    runpy.run_path(command[0], run_name="__main__")


@functools.cache
def load_script(path: str) -> ModuleType:
    """Import a script of this repository as a module, with the same import path as when it is run."""
    script = ROOT / path
    sys.path.insert(0, str(script.parent))  # as Python does for a script
    try:
        spec = importlib.util.spec_from_file_location(f"script_{script.stem}", script)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look up their module
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(script.parent))
    return module


def call_script(path: str, *arguments: object) -> str | int | None:
    """Run a script of this repository in this process (a new one takes seconds to start).

    Returns:
        Its error or exit status, or None.
    """
    module = load_script(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [path, *map(str, arguments)])
        try:
            module.main()
        except SystemExit as stopped:
            return stopped.code
    return None


class Mim:
    """The ``mim`` of an environment with a regular, not an editable, installation of this checkout."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "env", with_pip=False)
        self.python = folder / "env" / "bin" / "python"
        self.cwd = folder / "cwd"
        self.cwd.mkdir()
        site = Path(self.ask("import sysconfig; print(sysconfig.get_path('purelib'))"))
        # torch, mmcv and the hosts come from the environment that runs the tests. A path from a .pth file comes after
        # the environment's own packages, and .pth files of editable installations under it are ignored. mmengine needs
        # setuptools' copy of distutils from Python 3.12 on.
        parent = Path(sysconfig.get_path("purelib"))
        site.joinpath("_parent.pth").write_text(str(parent))
        for hook in parent.glob("distutils-precedence.pth"):
            shutil.copy2(hook, site)
        source = folder / "source"  # building writes into the tree
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*BUILT))
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--quiet"]
        install = [*pip, "--no-build-isolation", "--no-deps", "--ignore-installed", str(source)]
        # The operators have already been compiled for the environment that runs the tests.
        subprocess.run(install, env={**os.environ, "GROOTVL_NO_EXTENSION": "1"}, check=True)
        for library in (ROOT / "grootvl_mm").glob("_C*.so"):
            shutil.copy2(library, site / "grootvl_mm")
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


def mim_name(host: str) -> str:
    """The name of a host in the installed mim: the module for openmim (mmdet), the package for onedl-mim."""
    (package,) = packages_distributions()[host]
    return package if package.startswith("onedl-") else host


def read_scalars(work_dir: Path) -> dict[int, dict]:
    """The training log of the latest run in a work dir, a dictionary from iterations to values."""
    newest = max(work_dir.glob("*/vis_data/scalars.json"), key=lambda path: path.stat().st_mtime)
    lines = map(json.loads, newest.read_text().splitlines())
    return {line["iter"]: line for line in lines if "loss" in line}


def read_metrics(work_dir: Path) -> dict[str, float]:
    """The metrics of the latest evaluation in a work dir."""
    return json.loads(max(work_dir.glob("*/*.json"), key=lambda path: path.stat().st_mtime).read_text())
