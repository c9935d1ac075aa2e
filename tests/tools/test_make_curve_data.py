"""tools/dataset_converters/make_curve_data.py: curves that do not touch, and marks that tell nothing by themselves."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from scipy.stats import ks_2samp

from tests.helpers.tool_runs import load_script

FOLDERS = {"classification", "images", "semantic", "meta.json"}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_script("tools/dataset_converters/make_curve_data.py")


def options(tool: ModuleType, **changes: object) -> tuple:
    return tool.Options(size=32, length=18, distractors=0, gap=5.0, dash=0, seed=0)._replace(**changes)


@pytest.fixture(scope="module")
def made(tool: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("curves") / "curves"
    assert tool.make_curve_data(out, {"train": 6, "val": 4}, options(tool))
    return out


def read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_files(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == FOLDERS
    for split, count in (("train", 6), ("val", 4)):
        names = [f"{index:06d}.png" for index in range(count)]
        assert [path.name for path in sorted((made / "images" / split).iterdir())] == names
        classes = {path.parent.name: path for path in (made / "classification" / split).glob("*/*")}
        assert set(classes) == {"apart", "joined"}
        for name in names:
            image, labels = read(made / "images" / split / name), read(made / "semantic" / split / name)
            assert image.shape == (32, 32, 3)
            assert set(np.unique(labels)) == {0, 1, 2}
            # The mark of the picture is at an end of the curve of class 1.
            red = (image[..., 0] > 200) & (image[..., 1] < 100)
            assert ndimage.label(red)[1] == 1
            assert labels[ndimage.binary_dilation(red, iterations=2)].max() >= 1
            assert (labels[red] != 2).all()
    assert json.loads((made / "meta.json").read_text())["counts"] == {"train": 6, "val": 4}


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("changes", [{}, {"size": 48, "length": 30, "distractors": 2, "dash": 3}])
def test_scenes(tool: ModuleType, joined: bool, changes: dict) -> None:
    chosen = options(tool, **changes)
    scene = tool.compose_scene(np.random.default_rng(0), chosen, joined)
    assert len(scene.curves) == 2 + chosen.distractors
    ends = [curve[[0, -1]] for curve in scene.curves[:2]]
    owners = [next(i for i, pair in enumerate(ends) if (pair == mark).all(1).any()) for mark in scene.marks]
    assert (owners[0] == owners[1]) == joined
    for index, curve in enumerate(scene.curves):
        assert curve.min() >= tool.MARGIN
        assert curve.max() <= chosen.size - 1 - tool.MARGIN
        steps = np.linalg.norm(np.diff(curve, axis=0), axis=1)
        np.testing.assert_allclose(steps, tool.STEP)
        for other in scene.curves[:index]:
            assert tool.squared_distance(curve, other).min() >= chosen.gap**2
    labels = tool.class_map(chosen, scene, scene.marks[0])
    structure = np.ones((3, 3))
    assert ndimage.label(labels == 1, structure)[1] == 1
    assert ndimage.label(labels == 2, structure)[1] == 1 + chosen.distractors


def test_distance_of_the_marks_tells_nothing(tool: ModuleType) -> None:
    distances = {}
    for joined in (False, True):
        scenes = [tool.compose_scene(np.random.default_rng([index]), options(tool), joined) for index in range(150)]
        distances[joined] = [np.linalg.norm(scene.marks[0] - scene.marks[1]) for scene in scenes]
    assert ks_2samp(distances[False], distances[True]).pvalue > 0.01


def test_dashes_leave_both_ends(tool: ModuleType) -> None:
    curve = np.stack([np.arange(0, 20, tool.STEP), np.zeros(40)], axis=1)
    drawn = tool.dashes(options(tool, dash=3), curve)
    assert 0.4 < len(drawn) / len(curve) < 0.7
    assert np.array_equal(drawn[[0, -1]], curve[[0, -1]])
    assert tool.dashes(options(tool), curve) is curve


def test_the_same_again_and_nothing_else(tool: ModuleType, made: Path, tmp_path: Path) -> None:
    counts = {"train": 6, "val": 4}
    assert not tool.make_curve_data(made, counts, options(tool))
    with pytest.raises(FileExistsError, match=r"holds curve data made with length 18 \(requested: 20\)"):
        tool.make_curve_data(made, counts, options(tool, length=20))
    other = tmp_path / "other"
    tool.make_curve_data(other, counts, options(tool), workers=2)
    for path in (path for path in made.rglob("*") if path.is_file()):
        assert path.read_bytes() == (other / path.relative_to(made)).read_bytes()


def test_curves_that_do_not_fit(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "SCENES", 2)
    monkeypatch.setattr(
        sys, "argv", ["make_curve_data.py", "--out", str(tmp_path / "out"), "--length", "90", "--workers", "1"]
    )
    with pytest.raises(SystemExit, match="error: no room for two curves of 90 pixels and 0 more in 32x32"):
        tool.main()
    assert list(tmp_path.iterdir()) == []
