"""The plugin that writes failures when they happen."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.config_cases import ROOT

TESTS = """
import os, pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.fixture
def broken(): raise OSError("no fixture")
def test_error(broken): pass
def test_killed(): os._exit(9)
"""


def test_a_killed_run_has_told_its_failures(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    failures = tmp_path / "failures.txt"
    command = [sys.executable, "-m", "pytest", "-p", "tests.helpers.failures_at_once", "-p", "no:xdist", "test_some.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "GROOTVL_FAILURES": str(failures)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert done.returncode == 9
    lines = failures.read_text().splitlines()
    assert [line for line in lines if line.startswith("FAILED")] == [
        "FAILED test_some.py::test_bad (call)",
        "FAILED test_some.py::test_error (setup)",
    ]
    assert any("assert 1 == 2" in line for line in lines)
    assert any("no fixture" in line for line in lines)
