"""What .dev_scripts/setup_env.sh decides and says, with interpreters that only answer its questions."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.helpers.tool_runs import ROOT

# Makes no environment, but says that it was asked to.
INTERPRETER = """\
#!/bin/sh
case "$*" in
  *version_info*) echo {version} ;;
  *ensurepip*) exit {without_venv} ;;
  *INCLUDEPY*) exit {without_headers} ;;
  --version) echo "Python {version}" ;;
  *) echo "error: asked for $*"; exit 1 ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / ".dev_scripts", tmp_path / ".dev_scripts")
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    (tmp_path / "bin").mkdir()
    return tmp_path


def make_python(checkout: Path, version: str, without_venv: bool = False, without_headers: bool = False) -> None:
    path = checkout / "bin" / f"python{version}"
    text = INTERPRETER.format(version=version, without_venv=int(without_venv), without_headers=int(without_headers))
    path.write_text(text)
    path.chmod(0o755)


def setup(checkout: Path, **environment: str) -> str:
    """The output of a set-up, which fails at the latest where it makes an environment."""
    only = {"PYTHON": " ".join(sorted(path.name for path in (checkout / "bin").iterdir())) or "python3.13"}
    environment = os.environ | {"PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", "STACK": ""} | only | environment
    done = subprocess.run(
        [checkout / ".dev_scripts" / "setup_env.sh"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    return done.stdout


@pytest.mark.parametrize(
    ("versions", "stack", "folder"),
    [
        (["3.10"], "", ".venv"),
        (["3.11", "3.13"], "", ".venv"),
        (["3.12"], "", ".venv-onedl"),
        (["3.9", "3.13"], "", ".venv-onedl"),
        (["3.11"], "onedl", ".venv-onedl"),
        (["3.14"], "ops", ".venv-ops"),
        (["3.10", "3.11"], "language", ".venv-language"),
    ],
)
def test_stack_that_can_be_installed_is_chosen(checkout: Path, versions: list[str], stack: str, folder: str) -> None:
    for version in versions:
        make_python(checkout, version)
    output = setup(checkout, STACK=stack)
    assert f"preparing {folder} with Python" in output
    assert f"error: asked for -m venv {checkout / folder}" in output
    assert f"the complete output is in {checkout / folder}/setup.log" in output
    chosen_by_itself = folder == ".venv-onedl" and not stack
    assert ("using the maintained onedl packages" in output) == chosen_by_itself
    assert (checkout / ".venv").is_symlink() == chosen_by_itself


@pytest.mark.parametrize(
    ("python", "stack", "message"),
    [
        ({"version": "3.9"}, "", "python3.9: 3.9, expected 3.10 to 3.14"),
        ({"version": "3.14"}, "", "python3.14: 3.14, for which pandas 2.2.3, required by onedl-mim, has no wheel"),
        ({"version": "3.13"}, "openmmlab", "python3.13: 3.13, and OpenMMLab's packages need 3.10 or 3.11"),
        ({"version": "3.13", "without_venv": True}, "", "3.13 without venv (Debian, Ubuntu: python3-venv)"),
        ({"version": "3.13", "without_headers": True}, "", "3.13 without headers (Debian, Ubuntu: python3-dev)"),
        ({"version": "3.10"}, "language", "3.10, and transformers 5 is tested with 3.11 to 3.13"),
        ({"version": "3.11"}, "mmcv", "STACK must be one of language,onedl,openmmlab,ops, got 'mmcv'"),
    ],
)
def test_what_is_missing_is_said_in_one_line(checkout: Path, python: dict, stack: str, message: str) -> None:
    make_python(checkout, **python)
    (line,) = setup(checkout, STACK=stack).splitlines()
    assert line.startswith("[setup] error: ")
    assert message in line


def test_a_missing_interpreter_and_compiler_are_said(checkout: Path) -> None:
    assert "python3.99: not found" in setup(checkout, PYTHON="python3.99")
    make_python(checkout, "3.11")
    assert "no C++ compiler (no-such-compiler)" in setup(checkout, CXX="no-such-compiler")


@pytest.mark.parametrize(("header", "standard"), [("201703L", "-std=c++17"), ("202002L", "-std=c++20")])
def test_mmcv_is_compiled_with_the_standard_that_torch_needs(checkout: Path, header: str, standard: str) -> None:
    """Calls ``build_mmcv`` with a pip that compiles as mmcv's setup.py does, and a compiler that repeats its flags."""
    include = checkout / "site" / "torch" / "include" / "ATen"
    include.mkdir(parents=True)
    (include / "ATen.h").write_text(f"#if !defined(_MSC_VER) && __cplusplus < {header}\n")
    python = checkout / "bin" / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
  *purelib*) echo {checkout / "site"} ;;
  *"pip wheel"*) $CXX -std=c++17; echo "nvcc$NVCC_APPEND_FLAGS"; touch "${{CXX%/*}}/mmcv.whl" ;;
esac
"""
    )
    python.chmod(0o755)
    script = (checkout / ".dev_scripts" / "setup_env.sh").read_text()
    start = script.index("build_mmcv() (")
    function = script[start : script.index("\n)\n", start) + 3]
    environment = {"VENV": str(checkout), "MMCV": "mmcv==2.1.0", "CACHE": str(checkout), "CXX": "echo"}
    output = subprocess.check_output(
        ["bash", "-euc", f"{function}\nbuild_mmcv {checkout}/wheels/made 1"], env=os.environ | environment, text=True
    )
    assert output.splitlines() == [f"-std=c++17 -g0 {standard}", f"nvcc {standard}"]
    assert [path.name for path in (checkout / "wheels").rglob("*") if path.is_file()] == ["mmcv.whl"]
