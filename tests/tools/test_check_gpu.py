"""``.dev_scripts/check_gpu.sh`` without a GPU: the commands it would run, and how it resumes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.tool_runs import ROOT, load_script


class Script:
    """The script with stand-ins for Python and nvidia-smi that keep their arguments."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._calls = folder / "calls.txt"
        self.fails_at = "nothing"
        for name in ("python", "nvidia-smi"):
            (folder / name).write_text(
                f'#!/bin/sh\necho "$*" >>{self._calls}\ncase "$*" in *"$FAILS_AT"*) exit 1 ;; esac\n'
            )
            (folder / name).chmod(0o755)

    def run(self, **variables: str) -> tuple[int, str, list[str]]:
        """The exit status, what the script said, and the calls but for its two checks."""
        self._calls.write_text("")
        environment = {"PATH": f"{self._folder}:{os.environ['PATH']}", "PYTHON": str(self._folder / "python")}
        result = subprocess.run(
            [".dev_scripts/check_gpu.sh", str(self._folder / "out")],
            env=os.environ | environment | {"FAILS_AT": self.fails_at} | variables,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        calls = [line for line in self._calls.read_text().splitlines() if line.startswith(("-m", "tools/", "-q"))]
        return result.returncode, result.stdout, calls


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path)


def test_tests_come_before_benchmarks_that_their_tools_understand(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, said, calls = script.run()
    assert status == 0, said
    assert calls[0].startswith("-q")
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
    assert (status, calls) == (0, [])
    assert "left for another call: gpu tests ops_float32" in said
