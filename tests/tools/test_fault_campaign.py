"""A short version of the fault campaign; .dev_scripts/fault_campaign runs all of it."""

import importlib
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests.helpers.tool_runs import ROOT


@pytest.fixture(scope="module")
def campaign() -> Callable[[str], ModuleType]:
    """Modules of the campaign, by their names."""
    sys.path.insert(0, str(ROOT / ".dev_scripts"))
    try:
        yield lambda name: importlib.import_module(f"fault_campaign.{name}")
    finally:
        sys.path.remove(str(ROOT / ".dev_scripts"))


@pytest.mark.parametrize(
    ("module", "part", "count"),
    [
        ("files", "checkpoints", 25),
        pytest.param("files", "checkpoints", 300, marks=pytest.mark.slow),
        pytest.param("files", "pickles", 1, marks=pytest.mark.slow),
        ("operators", "operators", 300),
        ("datasets", "datasets", 40),
        pytest.param("trainings", "ranks", 2, marks=pytest.mark.slow),
        pytest.param("trainings", "disks", 1, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_lost_executed_or_left(module: str, part: str, count: int, campaign: Callable) -> None:
    assert getattr(campaign(module), part)(count, random.Random(0)).faults == []


def run_campaign(*arguments: object) -> str:
    command = [sys.executable, str(ROOT / ".dev_scripts" / "fault_campaign"), *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.slow
def test_interruptions_and_how_a_campaign_goes_on(tmp_path: Path) -> None:
    """In a process of their own, which forks."""
    pytest.importorskip("mmpretrain")
    run_campaign("kills", "stops", "--count", 2, "--state", tmp_path, "--jobs", 2)
    begun = (tmp_path / "kills.jsonl").read_text()
    assert begun.count("\n") == 2
    said = run_campaign("kills", "converters", "--count", 3, "--state", tmp_path)
    assert re.search(r"kills: 3 trainings, .*; 0 faults", said)
    assert (tmp_path / "kills.jsonl").read_text().startswith(begun)


def leave_file(path: Path) -> None:
    (path.parent / "left").touch()


@pytest.mark.parametrize(
    ("load", "message"),
    [
        (lambda path: None, "loaded in silence"),
        (lambda path: 1 / 0, "ZeroDivisionError"),
        (lambda path: path.write_bytes(b""), "left|loaded|Error"),
        (leave_file, "left"),
    ],
    ids=["blind", "traceback", "changes the file", "leaves a file"],
)
def test_the_campaign_sees_faults(
    load: Callable, message: str, campaign: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = campaign("files")
    both = {"bad": files.Way(load, complete=True)}
    monkeypatch.setattr(files, "ways", lambda folder: {"training": both, "backbone": both})
    faults = files.checkpoints(8, random.Random(0)).faults
    assert re.search(message, "\n".join(faults))


@pytest.mark.parametrize("blind", [lambda cfg: {"train": []}, lambda cfg: {"train": [1 / 0]}], ids=["blind", "broken"])
def test_the_campaign_sees_unseen_annotations(
    blind: Callable, campaign: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = campaign("datasets")
    tool = ModuleType("tool")
    calls = []

    def check_config(cfg: object) -> dict:
        calls.append(cfg)
        return {"train": []} if len(calls) == 1 else blind(cfg)

    tool.check_config = check_config
    monkeypatch.setattr(datasets, "load_script", lambda path: tool)
    assert datasets.datasets(8, random.Random(0)).faults
