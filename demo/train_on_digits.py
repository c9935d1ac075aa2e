"""Generate the demo data, train a GrootV-pico model on it, evaluate it, and draw its predictions and trees.

To resume an interrupted run from its last checkpoint, repeat the command.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import MMLogger

from grootvl_mm.apis import cli
from grootvl_mm.apis.resume import find_resumable_checkpoint

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
CONFIG_DATA = "data/demo/"  # data_root of the demo configs
EXPLORED = 4  # number of images in the explorer


class Metric(NamedTuple):
    """A metric and the minimum that a full run must reach."""

    name: str
    key: str  # in the JSON file of the evaluation
    scale: float  # maximum of the value there, 1 or 100
    floor: float  # 0 to 1


class Task(NamedTuple):
    """One of the three demos."""

    title: str
    config: str
    scenes: str  # folder of held-out images in the data
    metrics: tuple[Metric, ...]


TASKS = {
    "det": Task(
        "Mask R-CNN",
        "mask-rcnn_grootv-pico_fpn_demo.py",
        "images/val",
        (Metric("box AP50", "coco/bbox_mAP_50", 1, 0.75), Metric("mask AP50", "coco/segm_mAP_50", 1, 0.65)),
    ),
    "seg": Task("UperNet", "grootv-pico_upernet_demo-seg.py", "images/val", (Metric("mIoU", "mIoU", 100, 0.50),)),
    "cls": Task(
        "classification",
        "grootv-pico_demo-cls.py",
        "classification/val",
        (Metric("top-1", "accuracy/top1", 100, 0.85),),
    ),
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="det",
        help="detection and instance segmentation, semantic segmentation, or classification (default: %(default)s)",
    )
    parser.add_argument("--work-dir", type=Path, help="folder for all results (default: work_dirs/demo-TASK)")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(CONFIG_DATA),
        help="folder of the demo data, generated if missing (default: %(default)s)",
    )
    parser.add_argument(
        "--iters",
        type=int,
        metavar="N",
        help="number of iterations, for a short trial whose metrics are not checked (default: as in the config)",
    )
    args = parser.parse_args()
    if args.iters is not None and args.iters < 1:
        parser.error(f"--iters must be at least 1, got {args.iters}")
    args.work_dir = args.work_dir or Path("work_dirs", f"demo-{args.task}")
    return args


def command_of(script: str, *arguments: object) -> list[str]:
    """The command line of a script in ``tools/``."""
    return [sys.executable, str(TOOLS / script), *map(str, arguments)]


def run(script: str, *arguments: object) -> None:
    """Run a script in ``tools/`` and exit with an error if it fails."""
    command = command_of(script, *arguments)
    status = subprocess.run(command, check=False).returncode
    if status:
        cli.fail(f"{script} exited with status {status} (command: {' '.join(command)})")


def moved_paths(node: object, data: Path, key: str = "", root: str = CONFIG_DATA) -> Iterator[str]:
    """Yield the overrides that move the config's paths from ``root`` to ``data``."""
    if isinstance(node, dict):
        for name, child in node.items():
            yield from moved_paths(child, data, f"{key}.{name}" if key else name, root)
    elif isinstance(node, str) and node.startswith(root):
        yield f"{key}={data}/{node.removeprefix(root)}"


def without_validation(overrides: Iterable[str]) -> list[str]:
    """The overrides of a config for training without validation."""
    kept = [override for override in overrides if not override.startswith("val_")]
    return ["val_cfg=None", "val_dataloader=None", "val_evaluator=None", *kept]


def newest_evaluation(folder: Path) -> dict[str, float]:
    """The newest metrics in the work dir of ``tools/test.py``."""
    newest = max(folder.glob("*/*.json"), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text())


def main() -> None:
    """Run the command."""
    args = parse_args()
    logger = MMLogger.get_instance("demo")
    task = TASKS[args.task]
    start = time.monotonic()

    if (args.data / "meta.json").is_file():
        logger.info("1/5 Data: %s already exists.", args.data)
    else:
        logger.info("1/5 Data: generating scenes in %s.", args.data)
        run("dataset_converters/make_demo_data.py", "--out", args.data)

    config = ROOT / "configs" / "demo" / task.config
    cfg = Config.fromfile(config)
    iters = args.iters or cfg.train_cfg.max_iters
    overrides = list(moved_paths(cfg.to_dict(), args.data)) if args.data != Path(CONFIG_DATA) else []
    options = ["--cfg-options", *overrides] if overrides else []

    final = args.work_dir / f"iter_{iters}.pth"
    found = find_resumable_checkpoint(args.work_dir)
    if found == final:
        logger.info("2/5 Training: %s already exists.", final)
    else:
        progress = f"resuming from {found}" if found else "from scratch"
        logger.info("2/5 Training: %s, %d iterations on %s, %s.", task.title, iters, get_device(), progress)
        # Without validation, because step 3 evaluates.
        shortened = [f"train_cfg.max_iters={iters}", *without_validation(overrides)]
        run("train.py", config, "--work-dir", args.work_dir, "--resume", "auto", "--cfg-options", *shortened)
    trained = time.monotonic()

    logger.info("3/5 Evaluation on the held-out scenes.")
    run("test.py", config, final, "--work-dir", args.work_dir / "test", *options)
    evaluation = newest_evaluation(args.work_dir / "test")
    values = {metric.name: evaluation[metric.key] / metric.scale for metric in task.metrics}

    scenes = sorted((args.data / task.scenes).rglob("*.png"))[:EXPLORED]
    picture, trees = args.work_dir / "predictions.png", args.work_dir / "trees.png"
    logger.info("4/5 Pictures: ground truth and predictions side by side, and the trees of a held-out scene.")
    run("visualization/draw_predictions.py", config, final, picture, *options)
    run("visualization/draw_trees.py", config, final, scenes[0], "-o", trees, *options)

    explorer = args.work_dir / "explorer.html"
    logger.info("5/5 Explorer: an interactive page of the trees of held-out scenes.")
    run("visualization/explore_trees.py", config, final, *scenes, "--out", explorer, *options)

    for metric in task.metrics:
        floor = "" if args.iters else f" (minimum {metric.floor:.2f})"
        logger.info("%s: %.3f%s", metric.name, values[metric.name], floor)
    minutes = (time.monotonic() - start) / 60
    logger.info("Time: %.1f minutes, %.1f of them up to the end of training", minutes, (trained - start) / 60)
    logger.info("Picture: %s", picture)
    logger.info("Trees: %s", trees)
    logger.info("Explorer: %s", explorer)
    # Not "<", so that NaN is reported, too.
    missed = [metric.name for metric in task.metrics if not values[metric.name] >= metric.floor]
    if missed and not args.iters:
        cli.fail(f"the demo did not reach the minimum: {', '.join(missed)}")


if __name__ == "__main__":
    main()
