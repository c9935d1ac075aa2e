"""Runs the tools of tools/analysis_tools in this process and reads their output files."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.tool_runs import load_script

# Replacements of functions that start a process for a measurement.
STAND_INS = {
    "run_fresh": lambda function, *args, **_: function(*args),
    "peak_memory": lambda step, device: step() or 2**20,
}


def run_here(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object, **stand_ins: Callable) -> None:
    """Run a tool, with all of its measurements, in this process."""
    module = load_script(f"tools/analysis_tools/{script}")
    for name, stand_in in (STAND_INS | stand_ins).items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, stand_in)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    module.main()


def read_results(folder: Path, name: str, *others: str) -> tuple[dict, str]:
    """Read the JSON file and the text, and check that the image can be opened and is not blank."""
    assert {path.name for path in folder.iterdir()} == {f"{name}.json", f"{name}.txt", f"{name}.png", *others}
    with Image.open(folder / f"{name}.png") as image:
        extrema = image.convert("L").getextrema()
        assert min(image.size) > 100
    assert extrema[0] < 100 < extrema[1]
    return json.loads((folder / f"{name}.json").read_text()), (folder / f"{name}.txt").read_text()
