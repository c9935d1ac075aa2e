"""demo/train_on_digits.py: all of its steps, and its message when the result is poor."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.tool_runs import Command, load_script

DEMO = "demo/train_on_digits.py"
# Of the scripts that the demo starts, those that no other test starts in a fresh process.
FRESH = {"visualization/draw_trees.py", "visualization/explore_trees.py"}
SAID = ("1/5 Data", "2/5 Training", "3/5 Evaluation", "4/5 Pictures", "5/5 Explorer")
SAID += ("top-1: ", "Time: ", "Picture: ", "Trees: ")


@pytest.fixture
def arguments(demo_data: Path, tmp_path: Path) -> tuple:
    return ("--task", "cls", "--data", demo_data, "--work-dir", tmp_path)


def check_short_run(work_dir: Path, output: str) -> None:
    for said in SAID:
        assert said in output
    assert (work_dir / "predictions.png").stat().st_size > 10_000
    assert (work_dir / "trees.png").stat().st_size > 10_000
    assert (work_dir / "explorer.html").stat().st_size > 50_000


@pytest.mark.slow
def test_command(arguments: tuple, command: Command, tmp_path: Path) -> None:
    check_short_run(tmp_path, command(f"../{DEMO}", *arguments, "--iters", 2))


@pytest.fixture
def started() -> list[str]:
    """The scripts that the demo has started."""
    return []


@pytest.fixture
def call(
    arguments: tuple, started: list[str], command: Command, monkeypatch: pytest.MonkeyPatch
) -> Callable[[object], None]:
    """Run the demo in this process, and what other tests start in fresh processes in copies of one."""
    demo = load_script(DEMO)
    run = demo.run

    def start(script: str, *arguments: object) -> None:
        first = script not in started
        started.append(script)
        (run if first and script in FRESH else command.forked)(script, *arguments)

    def call(*more: object) -> None:
        monkeypatch.setattr("sys.argv", [DEMO, *map(str, (*arguments, *more))])
        demo.main()

    monkeypatch.setattr(demo, "run", start)
    monkeypatch.setattr(demo, "MMLogger", SimpleNamespace(get_instance=logging.getLogger))
    return call


def test_demo_runs_once_and_holds_its_floors(
    call: Callable[[object], None], started: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        call("--iters", 2)
    check_short_run(tmp_path, caplog.text)
    assert started[:2] == ["train.py", "test.py"]
    (tmp_path / "predictions.png").unlink()

    # A full run that finds its last checkpoint only has to evaluate it; this one knows next to nothing.
    (tmp_path / "iter_2.pth").rename(tmp_path / "iter_600.pth")
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(SystemExit, match=r"^error: the demo did not reach the minimum: top"),
    ):
        call()
    assert f"2/5 Training: {tmp_path / 'iter_600.pth'} already exists." in caplog.text
    assert started.count("train.py") == 1
    assert (tmp_path / "predictions.png").is_file()
