"""tools/train.py, tools/test.py and draw_predictions.py on tiny data, for all three tasks."""

import math
import pickle
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from grootvl_mm.apis.checkpoint_files import read_checkpoint
from grootvl_mm.apis.resume import find_resumable_checkpoint, read_seed
from tests.helpers.sharing import made_once
from tests.helpers.tool_runs import Command, read_metrics, read_scalars

METRICS = {"det": "coco/bbox_mAP", "seg": "mIoU", "cls": "accuracy/top1"}


class Trained(NamedTuple):
    """A training of a task, as its command leaves it."""

    task: str
    config: Path
    work_dir: Path
    checkpoint: Path
    output: str


@pytest.fixture(scope="module", params=["det", "seg", "cls"])
def trained(request, command: Command, make_config, tmp_path_factory) -> Trained:
    def train(work_dir: Path) -> Trained:
        config = make_config(request.param)
        output = command("train.py", config, "--work-dir", work_dir)
        return Trained(request.param, config, work_dir, work_dir / "iter_4.pth", output)

    return made_once(tmp_path_factory, f"trained-{request.param}", train)


def assert_images(folder: Path, count: int) -> None:
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
    arguments = (trained.config, trained.checkpoint, "--work-dir", tmp_path, "--show-dir", shown, "--out", dumped)
    command.forked("test.py", *arguments)
    crops = len(list((demo_data / "classification" / "val").rglob("*.png")))
    count = crops if trained.task == "cls" else 4
    assert_images(shown, count)
    assert len(pickle.loads(dumped.read_bytes())) == count
    assert math.isfinite(read_metrics(tmp_path)[METRICS[trained.task]])


def test_amp_and_resume_go_on_from_the_last_checkpoint(trained: Trained, command: Command, tmp_path: Path):
    work_dir = shutil.copytree(trained.work_dir, tmp_path / "run")
    output = command.forked(
        "train.py",
        trained.config,
        *("--work-dir", work_dir, "--amp", "--resume", "--cfg-options", "train_cfg.max_iters=5"),
        CUDA_VISIBLE_DEVICES="",
    )
    assert "AMP on the CPU: autocast to bfloat16" in output
    scalars = read_scalars(work_dir)
    assert sorted(scalars) == [5]
    assert math.isfinite(scalars[5]["loss"])


def test_draw_predictions(trained: Trained, command: Command, tmp_path: Path):
    # A threshold of 0, so that a detector after four iterations has something to draw.
    image = tmp_path / "new" / "predictions.png"
    output = command.forked(
        "visualization/draw_predictions.py",
        *(trained.config, trained.checkpoint, image, "--num", 3, "--score-thr", 0),
    )
    assert str(image) in output.splitlines()[-1]
    assert_images(tmp_path, 1)
    assert list(image.parent.iterdir()) == [image]


def test_tta(trained: Trained, command: Command, tmp_path: Path):
    arguments = (trained.config, trained.checkpoint, "--tta", "--work-dir", tmp_path)
    if trained.task == "seg":
        command.forked("test.py", *arguments)
        assert math.isfinite(read_metrics(tmp_path)["mIoU"])
    else:
        output = command.forked("test.py", *arguments, status=1)
        assert "error: --tta needs tta_model and tta_pipeline" in output
        assert "Traceback" not in output


def test_killed_training_ends_as_one_that_was_not_killed(command: Command, make_config, tmp_path: Path):
    """Bit by bit: weights, averaged weights, optimizer; with random numbers in model, batches and data worker."""
    config = make_config("cls")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    options = (
        *("--auto-scale-lr", "--exact-resume"),
        *("--cfg-options", "auto_scale_lr.base_batch_size=8", "default_hooks.ema.type=EMAHook"),
        *("default_hooks.ema.momentum=0.1", "default_hooks.checkpoint.max_keep_ckpts=-1"),
        "model.backbone.drop_path_rate=0.5",
        *("model.train_cfg.augments.type=Mixup", "model.train_cfg.augments.alpha=0.8"),
        *("train_dataloader.num_workers=1", "train_dataloader.dataset.pipeline.1.type=RandomResizedCrop"),
        *("val_cfg=None", "val_dataloader=None", "val_evaluator=None"),
    )
    any_seed = "randomness.seed=None"
    process = command.popen(
        "train.py", config, "--work-dir", killed, "--resume", *options, any_seed, "train_cfg.max_iters=100000"
    )
    try:
        deadline = time.monotonic() + 120
        while not (killed / "iter_6.pth").exists():
            assert process.poll() is None, process.communicate()[0][-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
    process.communicate()
    done = max(read_scalars(killed))
    last = find_resumable_checkpoint(killed)
    # Checkpoints are written every 2 iterations; the one during which the process died may be lost.
    assert done - 2 <= int(last.stem.removeprefix("iter_")) <= done

    steps = f"train_cfg.max_iters={done + 3}"
    command.forked("train.py", config, "--work-dir", killed, "--resume", *options, any_seed, steps)
    assert max(read_scalars(killed)) == done + 3
    assert min(read_scalars(killed)) == int(last.stem.removeprefix("iter_")) + 1
    command.forked("train.py", config, "--work-dir", whole, *options, f"randomness.seed={read_seed(last)}", steps)
    assert read_scalars(whole)[1]["lr"] == pytest.approx(0.01 * 1.5e-3 * 2 / 8)
    for name in (last.name, f"iter_{done + 3}.pth"):
        expected, got = (read_checkpoint(folder / name) for folder in (whole, killed))
        for part in ("state_dict", "ema_state_dict", "optimizer"):
            torch.testing.assert_close(got[part], expected[part], rtol=0, atol=0)


def test_checkpoints_of_strangers(trained: Trained, command: Command, tmp_path: Path):
    """Resumed, nothing of them runs; tested, they are complete or an error."""
    content = read_checkpoint(trained.checkpoint)
    canary, crafted = tmp_path / "canary", tmp_path / "iter_4.pth"
    code = f"open({str(canary)!r}, 'w').close()"
    content["meta"].update(config=code, cfg=code)
    content["message_hub"]["runtime_info"]["cfg"] = code
    torch.save(content, crafted)
    options = ("--resume", crafted, "--cfg-options", "train_cfg.max_iters=5")
    command.forked("train.py", trained.config, "--work-dir", tmp_path / "run", *options)
    assert sorted(read_scalars(tmp_path / "run")) == [5]
    assert not canary.exists()

    name = next(name for name in reversed(content["state_dict"]) if name.endswith("weight"))
    content["state_dict"][name] = torch.zeros(7, 7)
    torch.save(content, crafted)
    arguments = ("test.py", trained.config, crafted, "--work-dir", tmp_path / "test")
    output = command.forked(*arguments, status=1)
    assert f"error: {crafted}: 1 of " in output
    assert f"{name!r} is (7, 7), expected" in output
    assert "Traceback" not in output
    assert "1 of " in command.forked(*arguments, "--allow-mismatch")
    assert METRICS[trained.task] in read_metrics(tmp_path / "test")
