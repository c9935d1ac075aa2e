"""tools/train.py, tools/test.py and draw_predictions.py on tiny data, for all three tasks."""

import math
import pickle
import signal
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.tools.tool_runs import Command, read_metrics, read_scalars

pytestmark = pytest.mark.slow

METRICS = {"det": "coco/bbox_mAP", "seg": "mIoU", "cls": "accuracy/top1"}


class Trained(NamedTuple):
    task: str
    config: Path
    work_dir: Path
    checkpoint: Path
    output: str


@pytest.fixture(scope="module", params=["det", "seg", "cls"])
def trained(request, command: Command, make_config, tmp_path_factory) -> Trained:
    config = make_config(request.param)
    work_dir = tmp_path_factory.mktemp(request.param)
    output = command("train.py", config, "--work-dir", work_dir)
    return Trained(request.param, config, work_dir, work_dir / "iter_4.pth", output)


def assert_pictures(folder: Path, count: int) -> None:
    paths = sorted(folder.rglob("*.png"))
    assert len(paths) == count
    for path in paths:
        assert np.asarray(Image.open(path)).std() > 1, f"{path} is empty"


def test_train_logs_saves_and_evaluates(trained: Trained):
    scalars = read_scalars(trained.work_dir)
    assert sorted(scalars) == [1, 2, 3, 4]
    assert all(math.isfinite(line["loss"]) for line in scalars.values())
    assert {path.name for path in trained.work_dir.glob("*.pth")} == {"iter_2.pth", "iter_4.pth"}
    assert "Iter(val)" in trained.output
    assert METRICS[trained.task] in trained.output


def test_test_evaluates_draws_and_dumps(trained: Trained, command: Command, demo_data: Path, tmp_path: Path):
    shown, dumped = tmp_path / "shown", tmp_path / "predictions.pkl"
    command("test.py", trained.config, trained.checkpoint, "--work-dir", tmp_path, "--show-dir", shown, "--out", dumped)
    crops = len(list((demo_data / "classification" / "val").rglob("*.png")))
    count = crops if trained.task == "cls" else 4
    assert_pictures(shown, count)
    assert len(pickle.loads(dumped.read_bytes())) == count
    assert math.isfinite(read_metrics(tmp_path)[METRICS[trained.task]])


def test_amp_and_resume_go_on_from_the_last_checkpoint(trained: Trained, command: Command):
    output = command(
        "train.py",
        trained.config,
        *("--work-dir", trained.work_dir, "--amp", "--resume", "--cfg-options", "train_cfg.max_iters=5"),
        CUDA_VISIBLE_DEVICES="",
    )
    assert "AMP on the CPU: autocast to bfloat16" in output
    scalars = read_scalars(trained.work_dir)
    assert sorted(scalars) == [5]
    assert math.isfinite(scalars[5]["loss"])


def test_draw_predictions(trained: Trained, command: Command, tmp_path: Path):
    # A threshold of 0, so that a detector after four iterations has something to draw.
    picture = tmp_path / "new" / "predictions.png"
    output = command(
        "visualization/draw_predictions.py",
        *(trained.config, trained.checkpoint, picture, "--num", 3, "--score-thr", 0),
    )
    assert str(picture) in output.splitlines()[-1]
    assert_pictures(tmp_path, 1)
    assert list(picture.parent.iterdir()) == [picture]


def test_tta(trained: Trained, command: Command, tmp_path: Path):
    arguments = (trained.config, trained.checkpoint, "--tta", "--work-dir", tmp_path)
    if trained.task == "seg":
        command("test.py", *arguments)
        assert math.isfinite(read_metrics(tmp_path)["mIoU"])
    else:
        output = command("test.py", *arguments, status=1)
        assert "error: --tta needs tta_model and tta_pipeline" in output
        assert "Traceback" not in output


def test_killed_training_resumes_from_its_last_checkpoint(command: Command, make_config, tmp_path: Path):
    config = make_config("cls")
    arguments = (config, "--work-dir", tmp_path, "--resume", "--cfg-options")
    process = command.popen("train.py", *arguments, "train_cfg.max_iters=100000")
    deadline = time.monotonic() + 120
    while not (tmp_path / "iter_6.pth").exists():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = max(read_scalars(tmp_path))

    target = done + 3
    unevaluated = ("val_cfg=None", "val_dataloader=None", "val_evaluator=None")
    command("train.py", *arguments, f"train_cfg.max_iters={target}", *unevaluated)
    scalars = read_scalars(tmp_path)
    # Checkpoints are written every 2 iterations; the one during which the process died may be lost.
    assert max(5, done - 2) <= min(scalars) <= done + 1
    assert max(scalars) == target
