"""demo/studies.py: trainings that run side by side."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tool_runs import load_script

WAIT = """
import pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.touch()
while not other.exists():
    time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def studies():
    return load_script("demo/studies.py")


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", code, *map(str, arguments)]


def test_trainings_run_at_the_same_time(studies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two waits for the other; the third starts when one of them has ended."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)))
    marks = [tmp_path / "first", tmp_path / "second"]
    trainings = [
        studies.Training("first", tmp_path / "1", python(WAIT, *marks)),
        studies.Training("second", tmp_path / "2", python(WAIT, *reversed(marks))),
        studies.Training("third", tmp_path / "3", python("import os; print(os.environ['OMP_NUM_THREADS']); exit(7)")),
    ]
    ended = list(studies.run_trainings(trainings, 2))
    assert {one.training.name: one.status for one in ended} == {"first": 0, "second": 0, "third": 7}
    assert ended[-1].training.name == "third"
    assert ended[-1].output.read_text() == "3\n"
    assert all(one.seconds > 0 for one in ended)


def test_one_training_at_a_time_prints_to_the_terminal(studies, tmp_path: Path, capfd) -> None:
    code = (
        "import pathlib, sys; print(len(list(pathlib.Path(sys.argv[1]).iterdir()))); pathlib.Path(sys.argv[2]).touch()"
    )
    trainings = [
        studies.Training(name, tmp_path / name, python(code, tmp_path, tmp_path / f"{name}.txt")) for name in "ab"
    ]
    ended = list(studies.run_trainings(trainings, 1))
    assert [(one.training.name, one.status, one.output) for one in ended] == [("a", 0, None), ("b", 0, None)]
    assert capfd.readouterr().out == "0\n1\n"


def test_closing_stops_the_running_trainings(studies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes = []

    class Popen(subprocess.Popen):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)
            processes.append(self)

    monkeypatch.setattr(studies.subprocess, "Popen", Popen)
    trainings = [studies.Training("short", tmp_path / "short", python("")),
                 studies.Training("long", tmp_path / "long", python("import time; time.sleep(600)")),
                 studies.Training("never", tmp_path / "never", python(""))]  # fmt: skip
    generator = studies.run_trainings(trainings, 2)
    assert next(generator).training.name == "short"
    generator.close()
    assert [process.returncode for process in processes] == [0, -signal.SIGTERM]
    assert not (tmp_path / "never").exists()
