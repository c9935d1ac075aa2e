"""The interpreter that the launch scripts take, with fakes that write what they are called with."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.tool_runs import ROOT

FAKE = """\
#!/bin/sh
if [ "$1" = -c ]; then exit {missing}; fi
echo "$0"
printf '%s\\n' "$@"
"""
DIST_ARGUMENTS = {"dist_train.sh": ("c.py", "2"), "dist_test.sh": ("c.py", "c.pth", "2")}
SLURM_ARGUMENTS = {"slurm_train.sh": ("part", "job", "c.py"), "slurm_test.sh": ("part", "job", "c.py", "c.pth")}
ARGUMENTS = DIST_ARGUMENTS | SLURM_ARGUMENTS


def make_python(path: Path, has_package: bool) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(FAKE.format(missing=int(not has_package)))
    path.chmod(0o755)
    return path


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the launch scripts, and a Python without the package on the PATH."""
    root = tmp_path / "a checkout"
    (root / "tools").mkdir(parents=True)
    for script in (ROOT / "tools").glob("*.sh"):
        shutil.copy(script, root / "tools")
    make_python(tmp_path / "bin" / "python", has_package=False)
    srun = tmp_path / "bin" / "srun"
    srun.write_text('#!/bin/sh\nwhile [ "$2" != -u ]; do shift; done\nexec "$@"\n')
    srun.chmod(0o755)
    return root


def run(checkout: Path, script: str, folder: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    path = f"{checkout.parent / 'bin'}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", str((folder or checkout / "tools") / script), *ARGUMENTS[script]],
        cwd=checkout,
        env={"PATH": path, **env},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", ARGUMENTS)
def test_environment_of_the_checkout(script: str, checkout: Path) -> None:
    python = make_python(checkout / ".venv-onedl" / "bin" / "python", has_package=True)
    done = run(checkout, script)
    assert done.returncode == 0, done.stderr
    interpreter, *arguments = done.stdout.splitlines()
    assert Path(interpreter).samefile(python)
    start = ["-m", "torch.distributed.run"] if script in DIST_ARGUMENTS else ["-u"]
    assert arguments[: len(start)] == start
    name = "train.py" if "train" in script else "test.py"
    assert str(checkout / "tools" / name) in arguments


def test_activated_environment_comes_first(checkout: Path) -> None:
    make_python(checkout / ".venv" / "bin" / "python", has_package=True)
    python = make_python(checkout.parent / "bin" / "python3", has_package=True)
    assert run(checkout, "dist_train.sh").stdout.splitlines()[0] == str(python)


def test_environment_where_the_scripts_are_installed(checkout: Path) -> None:
    """As pip installs them: lib/python3.11/site-packages/grootvl_mm/.mim/tools."""
    env = checkout / "env"
    python = make_python(env / "bin" / "python", has_package=True)
    tools = env / "lib" / "python3.11" / "site-packages" / "grootvl_mm" / ".mim" / "tools"
    shutil.copytree(checkout / "tools", tools)
    assert Path(run(checkout, "dist_test.sh", tools).stdout.splitlines()[0]).samefile(python)


@pytest.mark.parametrize("script", ARGUMENTS)
def test_python_that_is_given(script: str, checkout: Path) -> None:
    """It is not asked: on a slurm cluster it may exist on the nodes only."""
    make_python(checkout / ".venv" / "bin" / "python", has_package=True)
    python = make_python(checkout / "my python", has_package=False)
    assert run(checkout, script, PYTHON=str(python)).stdout.splitlines()[0] == str(python)


@pytest.mark.parametrize("script", ARGUMENTS)
def test_no_python(script: str, checkout: Path) -> None:
    make_python(checkout.parent / "bin" / "python3", has_package=False)
    done = run(checkout, script)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error: no Python with grootvl_mm and torch found (tried: " in done.stderr
    assert str(checkout.parent / "bin" / "python") in done.stderr
    assert "set PYTHON=/path/to/python" in done.stderr


def test_real_interpreter_in_a_foreign_folder(tmp_path: Path) -> None:
    """Without anything activated, this checkout's own environment serves; the current folder counts for nothing."""
    if not list(ROOT.glob(".venv*")):
        pytest.skip("this checkout has no environment of its own")
    (tmp_path / "grootvl_mm").mkdir()
    done = subprocess.run(
        ["bash", "-c", f'source "{ROOT}/tools/find_python.sh" && find_python'],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", **{k: v for k, v in os.environ.items() if k == "PYTHONPATH"}},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).parent.parent.name.startswith(".venv")
