"""The command demo/image_demo.py, for each task and kind of input, and its errors for invalid ones."""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.demo.conftest import NAMES
from tests.helpers.config_cases import ROOT
from tests.helpers.faults import WRONG_VALUES, with_wrong_weight
from tests.helpers.tool_runs import call_script

for host in ("mmdet", "mmseg", "mmpretrain"):
    pytest.importorskip(host)

SCRIPT = ROOT / "demo" / "image_demo.py"
CLASSIFIER = ROOT / "configs" / "demo" / "grootv-pico_demo-cls.py"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str | None]:
    """Run the command in an own folder; return its error, or None."""
    monkeypatch.chdir(tmp_path)
    return partial(call_script, "demo/image_demo.py")


def changed_pixels(before: np.ndarray, after: np.ndarray) -> float:
    """Share of the pixels that something was drawn on."""
    assert before.shape == after.shape
    return float((cv2.absdiff(before, after).max(axis=2) > 40).mean())


@pytest.mark.parametrize("task", NAMES)
def test_draws_on_an_image(
    task: str, call: Callable, checkpoints: dict, images: Path, image: np.ndarray, tmp_path: Path
) -> None:
    source = images / "b.png"
    options = ("--out-dir", "out", "--score-thr", 0.12, "--device", "cpu")
    assert call(source, NAMES[task], checkpoints[task], *options) is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.png"]
    drawn = cv2.imread(str(tmp_path / "out" / "b.png"))
    assert changed_pixels(image, drawn) > 0.05
    if task != "seg":  # which paints over everything
        # Blue stays blue where nothing is drawn.
        assert changed_pixels(image, drawn) < 0.95


def test_draws_as_the_inferencer_does(call: Callable, checkpoints: dict, images: Path, tmp_path: Path) -> None:
    """Colours included: the inferencer reads a file, the command hands it an array."""
    from mmdet.apis import DetInferencer

    config = str(ROOT / "configs" / "demo" / f"{NAMES['det']}.py")
    inferencer = DetInferencer(config, checkpoints["det"], device="cpu", show_progress=False)
    inferencer(str(images / "b.png"), out_dir=str(tmp_path / "host"), pred_score_thr=0.1)
    assert call(images / "b.png", config, checkpoints["det"], "--score-thr", 0.1, "--device", "cpu") is None
    expected = cv2.imread(str(tmp_path / "host" / "vis" / "b.png"))
    # Asked for an array, the visualizer renders its image once more: some pixels change a little.
    assert cv2.absdiff(cv2.imread(str(tmp_path / "outputs" / "b.png")), expected).max() < 32


def test_real_command_on_a_folder(checkpoints: dict, images: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(images), str(CLASSIFIER), checkpoints["cls"], "--out-dir", "a/b"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["a.jpg", "b.png"]
    assert "2/2" in done.stderr  # the progress bar
    assert cv2.imread(str(tmp_path / "a" / "b" / "a.jpg")).shape == (48, 50, 3)


def test_video(call: Callable, checkpoints: dict, video: Path, image: np.ndarray, tmp_path: Path) -> None:
    assert call(video, CLASSIFIER, checkpoints["cls"], "--device", "cpu", "--frames") is None
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["clip", "clip.mp4"]
    drawn = cv2.VideoCapture(str(tmp_path / "outputs" / "clip.mp4"))
    assert (drawn.get(cv2.CAP_PROP_FRAME_COUNT), drawn.get(cv2.CAP_PROP_FPS)) == (5, 10)
    frame = drawn.read()[1]
    assert frame.shape == (48, 64, 3)
    assert np.abs(frame[-1, -1].astype(int) - image[-1, -1]).max() < 40  # blue stayed blue
    frames = sorted((tmp_path / "outputs" / "clip").iterdir())
    assert [path.name for path in frames] == [f"{index:06d}.png" for index in range(5)]
    assert not np.array_equal(cv2.imread(str(frames[0])), cv2.imread(str(frames[4])))


def test_formats_that_opencv_reads_but_does_not_write(
    call: Callable, checkpoints: dict, image: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "photo").write_bytes(cv2.imencode(".png", image)[1])
    assert call(tmp_path / "images" / "photo", CLASSIFIER, checkpoints["cls"], "--device", "cpu") is None
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["photo.png"]


def test_colours_in_a_format_of_grey_images(
    call: Callable, checkpoints: dict, image: np.ndarray, tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / "grey.pgm"), cv2.cvtColor(image, cv2.COLOR_BGR2GRAY))
    assert call(tmp_path / "grey.pgm", CLASSIFIER, checkpoints["cls"], "--device", "cpu") is None
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["grey.pgm.png"]


def test_checkpoint_from_the_config(call: Callable, checkpoints: dict, images: Path, tmp_path: Path) -> None:
    options = ("--device", "cpu", "--cfg-options", f"load_from={checkpoints['cls']}")
    assert call(images, CLASSIFIER, *options) is None
    assert len(list((tmp_path / "outputs").iterdir())) == 2


WRONG = {
    "missing input": (("nowhere.png", CLASSIFIER, "CHECKPOINT"), "input 'nowhere.png' does not exist; give an image"),
    "empty folder": (("empty", CLASSIFIER, "CHECKPOINT"), "the folder 'empty' has no images (.bmp, .gif, "),
    "text": (("text.png", CLASSIFIER, "CHECKPOINT"), "OpenCV cannot read 'text.png' as an image"),
    "text without suffix": (
        ("text", CLASSIFIER, "CHECKPOINT"),
        "cannot read 'text', neither as an image nor as a video",
    ),
    "empty file": (("empty.png", CLASSIFIER, "CHECKPOINT"), "OpenCV cannot read 'empty.png' as an image"),
    "cut off": (("cut.jpg", CLASSIFIER, "CHECKPOINT"), "OpenCV cannot read 'cut.jpg' as an image"),
    "broken image": (("broken", CLASSIFIER, "CHECKPOINT"), "OpenCV cannot read 'broken/a.png' as an image"),
    "unknown model": (("images", "mask-rcnn_grootv-tiny", "CHECKPOINT"), "has no model 'mask-rcnn_grootv-tiny'; sim"),
    "missing config": (("images", "nothing.py", "CHECKPOINT"), "config 'nothing.py' does not exist"),
    "no checkpoint": (("images", CLASSIFIER), "no checkpoint; give its path after the config"),
    "missing checkpoint": (("images", CLASSIFIER, "no.pth"), "checkpoint 'no.pth' does not exist"),
    "damaged checkpoint": (
        ("images", CLASSIFIER, "text.png"),
        "text.png is not a checkpoint, or is damaged",
    ),
    "other checkpoint": (("images", CLASSIFIER, "other.pth"), "other.pth: this checkpoint does not fit GrootV: 0 of"),
    "unknown device": (("images", CLASSIFIER, "CHECKPOINT", "--device", "gpu"), "cannot use the device 'gpu': "),
    "folder is a file": (("images", CLASSIFIER, "CHECKPOINT", "--out-dir", "text.png"), "cannot create the folder"),
    "own folder": (("images", CLASSIFIER, "CHECKPOINT", "--out-dir", "images"), "is the folder of the input"),
    "folder of the file": (
        ("links/b.png", CLASSIFIER, "CHECKPOINT", "--out-dir", "links"),
        "is the folder of the input",
    ),
    "links": (("links", CLASSIFIER, "CHECKPOINT", "--out-dir", "images"), "whose files would be overwritten"),
}


@pytest.mark.parametrize("case", WRONG)
def test_one_clear_error(case: str, call: Callable, checkpoints: dict, images: Path, tmp_path: Path) -> None:
    arguments, message = WRONG[case]
    for folder in ("empty", "broken"):
        (tmp_path / folder).mkdir()
    for name in ("text.png", "text", "broken/a.png"):
        (tmp_path / name).write_text("hello")
    (tmp_path / "cut.jpg").write_bytes((images / "a.jpg").read_bytes()[:400])
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "b.png").symlink_to(images / "b.png")
    (tmp_path / "empty.png").touch()
    torch.save({"state_dict": {"conv1.weight": torch.ones(1)}}, tmp_path / "other.pth")
    error = call(*(checkpoints["cls"] if argument == "CHECKPOINT" else argument for argument in arguments))
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert not list((tmp_path / "outputs").glob("*"))
    assert sorted(path.name for path in images.iterdir()) == ["a.jpg", "b.png", "notes.txt"]


@pytest.mark.parametrize("kind", ["dropped", *WRONG_VALUES])
def test_weights_that_would_stay_random(
    kind: str, call: Callable, checkpoints: dict, images: Path, tmp_path: Path
) -> None:
    content = torch.load(checkpoints["cls"])
    torch.save(with_wrong_weight(content, "head.fc.weight", kind), tmp_path / "wrong.pth")
    error = call(images, CLASSIFIER, "wrong.pth", "--device", "cpu")
    if kind in ("sparse", "meta"):  # refused while the file is read, before its weights have names
        assert re.match(rf"error: wrong.pth: the checkpoint holds a {kind}.* tensor", error)
    else:
        assert error.startswith("error: wrong.pth: 1 of ")
        assert "'head.fc.weight' is " in error
    assert "\n" not in error
    assert not list((tmp_path / "outputs").glob("*"))


@pytest.mark.parametrize("task", ["det", "seg"])
def test_a_missing_head_of_other_tasks(
    task: str, call: Callable, checkpoints: dict, images: Path, tmp_path: Path
) -> None:
    content = torch.load(checkpoints[task])
    weights = {name: value for name, value in content["state_dict"].items() if name.startswith("backbone.")}
    torch.save({**content, "state_dict": weights}, tmp_path / "wrong.pth")
    error = call(images, NAMES[task], "wrong.pth", "--device", "cpu")
    assert error.startswith("error: wrong.pth: ")
    assert "would stay random" in error
    assert "\n" not in error
