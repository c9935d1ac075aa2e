"""A short cut of the fault campaign; .dev_scripts/fault_campaign.py runs the whole of it."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.marks import needs_safe_globals
from tests.helpers.tool_runs import load_script


@needs_safe_globals
@pytest.mark.parametrize(
    ("part", "count"),
    [
        ("checkpoints", 25),
        pytest.param("checkpoints", 300, marks=pytest.mark.slow),
        pytest.param("pickles", 1, marks=pytest.mark.slow),
        ("operators", 300),
        pytest.param("kills", 4, marks=pytest.mark.slow),
        pytest.param("ranks", 2, marks=pytest.mark.slow),
        pytest.param("disks", 1, marks=pytest.mark.slow),
    ],
)
def test_nothing_is_lost_executed_or_left(part: str, count: int) -> None:
    campaign = load_script(".dev_scripts/fault_campaign.py")
    result = campaign.PARTS[part][0](count, random.Random(0))
    assert result.faults == []


def leave_file(path: Path) -> None:
    (path.parent / "left").touch()


@needs_safe_globals
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
def test_the_campaign_sees_faults(load: Callable, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    campaign = load_script(".dev_scripts/fault_campaign.py")
    both = {"bad": campaign.Way(load, complete=True)}
    monkeypatch.setattr(campaign, "ways", lambda folder: {"training": both, "backbone": both})
    faults = campaign.checkpoints(8, random.Random(0)).faults
    assert re.search(message, "\n".join(faults))
