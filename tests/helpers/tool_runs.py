"""Runs the real commands as subprocesses and reads what they leave."""

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.metadata import packages_distributions
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
BUILT = ("build", "dist", "data", "work_dirs", "*.egg-info", "*.so", "__pycache__", ".*")


class Command:
    """Runs scripts of this repository in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Two test processes of one thread each do not slow each other down.
        self.env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def popen(self, script: str, *arguments: object, **env: str) -> subprocess.Popen:
        """Start a script, given by its path from ``tools``."""
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
        """Run a script, check its exit status and return what it wrote."""
        process = self.popen(script, *arguments, **env)
        output = process.communicate(timeout=300)[0]
        assert process.returncode == status, output[-4000:]
        return output


@functools.cache
def load_script(path: str) -> ModuleType:
    """A script of this repository as a module, with the imports that it has when it is run."""
    script = ROOT / path
    sys.path.insert(0, str(script.parent))  # as Python does for a script
    try:
        spec = importlib.util.spec_from_file_location(f"script_{script.stem}", script)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # data classes look their module up
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(script.parent))
    return module


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
        install = [*pip, "--no-build-isolation", "--no-deps", "--ignore-installed", str(source)]
        # The operators have been compiled already, for the environment that runs the tests.
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
    """What the installed mim calls a host: openmim the module (mmdet), onedl-mim the package (onedl-mmdetection)."""
    (package,) = packages_distributions()[host]
    return package if package.startswith("onedl-") else host


def read_scalars(work_dir: Path) -> dict[int, dict]:
    """The training log of the newest run in a work dir: iteration to its values."""
    newest = max(work_dir.glob("*/vis_data/scalars.json"), key=lambda path: path.stat().st_mtime)
    lines = map(json.loads, newest.read_text().splitlines())
    return {line["iter"]: line for line in lines if "loss" in line}


def read_metrics(work_dir: Path) -> dict[str, float]:
    """The newest evaluation in a work dir."""
    return json.loads(max(work_dir.glob("*/*.json"), key=lambda path: path.stat().st_mtime).read_text())
