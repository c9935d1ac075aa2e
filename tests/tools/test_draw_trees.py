"""tools/visualization/draw_trees.py."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.config_cases import ROOT, build_model, load_config
from tests.helpers.tool_runs import load_script

pytest.importorskip("mmpretrain")

CONFIG = ROOT / "configs" / "demo" / "grootv-pico_demo-cls.py"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    """A checkpoint, a picture, and where to draw."""
    checkpoint, picture = tmp_path / "model.pth", tmp_path / "picture.png"
    torch.save({"state_dict": build_model(load_config(CONFIG)).state_dict()}, checkpoint)
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    return checkpoint, picture, tmp_path / "new" / "trees.png"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    """Run the command in this process; return its error, or None."""
    tool = load_script("tools/visualization/draw_trees.py")

    def run(*arguments: object) -> str | None:
        monkeypatch.setattr(sys, "argv", ["draw_trees.py", *map(str, arguments)])
        try:
            tool.main()
        except SystemExit as stopped:
            return stopped.code
        return None

    return run


def test_draws_three_panels(files: tuple, call: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_script("tools/visualization/draw_trees.py")
    drawn = []
    draw = tool.draw_tree

    def spy(axes, image, size, tree, columns, stride) -> None:
        edges = tree.edges()[0].numpy()
        inside = ((edges % columns) * stride < size[1]) & ((edges // columns) * stride < size[0])
        drawn.append((len(edges), int((inside.sum(1) == 1).sum())))
        draw(axes, image, size, tree, columns, stride)

    monkeypatch.setattr(tool, "draw_tree", spy)
    checkpoint, picture, output = files
    assert call(CONFIG, checkpoint, picture, output, "--pad-to", 64, 96) is None
    assert np.asarray(Image.open(output)).std() > 10
    assert list(output.parent.iterdir()) == [output]
    alone, padded, ignoring = drawn
    assert alone == (6 * 8 - 1, 0)
    assert padded[0] == ignoring[0] == 8 * 12 - 1
    assert ignoring[1] <= 2  # edges at the last vertex of the picture


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: "no.pth"}, "checkpoint 'no.pth' does not exist"),
        ({1: "no.png"}, "picture 'no.png' does not exist"),
        ({3: ("--stage", 4)}, "has stages of 1, 1, 2, 1 blocks, not block 0 of stage 4"),
        ({3: ("--pad-to", 16, 16)}, "--pad-to 16 16 is smaller than the picture, 48 64"),
    ],
)
def test_one_clear_error(change: dict, message: str, files: tuple, call: Callable) -> None:
    arguments = [change.get(index, value) for index, value in enumerate(files)]
    error = call(CONFIG, *arguments, *change.get(3, ()))
    assert error.startswith("error: ")
    assert message in error
    assert not files[2].exists()
