"""tools/test.py and tools/train.py on published files, and on files that do not fit."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope

from grootvl_mm.models import GrootV, GrootVNeck
from tests.helpers.published import publish
from tests.helpers.tool_runs import Command, call_script, read_metrics

pytest.importorskip("mmpretrain")


def test_a_published_classifier_is_evaluated_as_it_is(command: Command, make_config: Callable, tmp_path: Path) -> None:
    weights = publish(GrootV("pico"), GrootVNeck(192, 288))
    weights |= {"head.weight": torch.randn(10, 288), "head.bias": torch.zeros(10)}
    torch.save({"model": weights, "model_ema": weights, "epoch": 300}, tmp_path / "published.pth")
    output = command("test.py", make_config("cls"), tmp_path / "published.pth", "--work-dir", tmp_path / "run")
    assert "also contains EMA weights ('model_ema'); loading the weights under 'model'" in output
    assert "do not match exactly" not in output  # mmengine's words for what is missing or left over
    assert math.isfinite(read_metrics(tmp_path / "run")["accuracy/top1"])


@pytest.mark.parametrize("script", ["test.py", "train.py"])
def test_a_file_that_does_not_fit_is_one_clear_error(script: str, make_config: Callable, tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save({"model": publish(GrootV({"channels": 16, "depths": (1, 1, 2, 1)}))}, file)
    arguments = {"test.py": [file], "train.py": ["--cfg-options", f"load_from={file}"]}[script]
    with DefaultScope.overwrite_default_scope("mmengine"):  # Runner would change it for good
        error = call_script(f"tools/{script}", make_config("cls"), "--work-dir", tmp_path / "run", *arguments)
    assert error.startswith(f"error: {file}: this" if script == "test.py" else "error: this")
    assert "checkpoint does not fit GrootV: " in error
    assert "Expected for example 'backbone.stem.conv1.weight' (12, 3, 3, 3), found" in error
    assert "\n" not in error
