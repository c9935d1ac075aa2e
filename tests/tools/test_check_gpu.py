"""``.dev_scripts/check_gpu.sh`` without a GPU: the commands it would run, and how it resumes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.tool_runs import ROOT, load_script


class Script:
    """The script with stand-ins for Python and NVIDIA's tools that keep their arguments."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._calls = folder / "calls.txt"
        self.fails_at = "nothing"
        for name in ("python", "nvidia-smi", "compute-sanitizer"):
            (folder / name).write_text(
                f'#!/bin/sh\necho "$*" >>{self._calls}\ncase "$*" in *"$FAILS_AT"*) exit 1 ;; esac\n'
            )
            (folder / name).chmod(0o755)

    def run(self, *options: str, **variables: str) -> tuple[int, str, list[str]]:
        """The exit status, what the script said, and the calls but for its own checks."""
        self._calls.write_text("")
        environment = {"PATH": f"{self._folder}:{os.environ['PATH']}", "PYTHON": str(self._folder / "python")}
        result = subprocess.run(
            [".dev_scripts/check_gpu.sh", *options, str(self._folder / "out")],
            env=os.environ | environment | {"FAILS_AT": self.fails_at} | variables,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        starts = ("-m", "tools/", "--query", "--tool")
        calls = [line for line in self._calls.read_text().splitlines() if line.startswith(starts)]
        return result.returncode, result.stdout, calls


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_tests_come_before_benchmarks_that_their_tools_understand(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, said, calls = script.run()
    assert status == 0, said
    assert calls[0].startswith("--query-gpu=name")
    assert calls[1].startswith("-m pytest tests/ops")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for call in calls[2:]:
        tool, *arguments = call.split()
        monkeypatch.setattr(sys, "argv", [tool, *arguments])
        assert load_script(tool).parse_args().device == "cuda"
    assert {call.split()[0].rpartition("_")[2] for call in calls[2:]} == {"ops.py", "model.py"}


def test_goes_on_with_what_has_not_passed(script: Script) -> None:
    script.fails_at = "--graphs"
    status, said, calls = script.run()
    failed = [call for call in calls if "--graphs" in call]
    assert status == 1
    assert "failed: graphs_bfloat16_128x224x224 " in said
    script.fails_at = "nothing"
    assert script.run()[2] == failed
    assert script.run()[2] == []


def test_stops_in_time_and_says_what_is_left(script: Script) -> None:
    status, said, calls = script.run(LIMIT="0")
    assert (status, calls) == (2, [])
    assert "left for another call: gpu tests ops_float32" in said
    script.fails_at = "--graphs"
    assert script.run()[0] == 1


def test_another_gpu_is_tested_from_the_start(script: Script, tmp_path: Path) -> None:
    before = script.run()[2]
    assert before
    assert script.run()[2] == []
    (tmp_path / "python").write_text((tmp_path / "python").read_text() + "echo another GPU\n")
    assert script.run()[2] == before


def test_what_is_missing(script: Script) -> None:
    for part, message in (
        ("is_available", "torch finds no GPU"),
        ("capability", "the kernels need compute capability 8.0"),
        ("import matplotlib", "a package is missing"),
        ("load_library", r"build them: FORCE_CUDA=1 "),
    ):
        script.fails_at = part
        status, said, calls = script.run()
        assert (status, calls) == (1, [])
        assert said.startswith("error: ")
        assert message in said
        assert len(said.splitlines()) == 1
    script.fails_at = "import xdist"
    assert " -n " not in script.run()[2][1]


def test_all_tools_of_compute_sanitizer(script: Script) -> None:
    """Over tests that there are, of every kernel; one that reports something does not stop the others."""
    script.fails_at = "racecheck"
    status, said, calls = script.run("--sanitize")
    assert (status, [call.split()[1] for call in calls]) == (1, ["memcheck", "racecheck", "synccheck", "initcheck"])
    assert "failed: racecheck" in said
    files = [word for word in calls[0].split() if word.startswith("tests/")]
    assert {Path(file).stem for file in files} >= {"test_tree", "test_scan", "test_selective_scan", "test_norm"}
    assert all((ROOT / file).is_file() for file in files)
