"""Measure the effect of padding on detectors trained and evaluated on demo scenes of mixed sizes and orientations.

Each backbone is trained with each seed in batches of eight scenes, which are padded to the largest of them, and
evaluated with batch size 1 (no padding), batch size 8, and batch size 1 with padding to 256x256.

To resume an interrupted study, repeat the command: finished parts are not run again. The table is written to
WORK_DIR/README.md, all numbers to WORK_DIR/results.json.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.logging import MMLogger
from studies import markdown_table, read_results, resized, scheduled, summary, write_results
from train_on_digits import ROOT, moved_paths, newest_evaluation, run, without_validation

from grootvl_mm.apis.resume import find_resumable_checkpoint

SIZES = ("96x160", "128x128", "160x96", "96x96", "160x160")
LONGEST = 160
EVALUATED = {
    "batch size 1": ("test_dataloader.batch_size=1",),
    "batch size 8": ("test_dataloader.batch_size=8",),
    "padded to 256": ("test_dataloader.batch_size=1", "model.data_preprocessor.pad_size_divisor=256"),
}
METRICS = {"box AP": "coco/bbox_mAP", "mask AP": "coco/segm_mAP"}
LAST = 20  # iterations over which the final loss is averaged


class Backbone(NamedTuple):
    """One backbone of the study."""

    title: str
    config: str
    options: tuple[str, ...] = ()


BACKBONES = {
    "grootv": Backbone("GrootV-pico", "mask-rcnn_grootv-pico_fpn_demo.py", ("model.backbone.ignore_padding=False",)),
    "grootv-ignoring": Backbone("GrootV-pico, `ignore_padding=True`", "mask-rcnn_grootv-pico_fpn_demo.py"),
    "convnext": Backbone("ConvNeXt-pico", "mask-rcnn_convnext-pico_fpn_demo.py"),
    "swin": Backbone("Swin-pico", "mask-rcnn_swin-pico_fpn_demo.py"),
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/padding-study"), help="default: %(default)s")
    parser.add_argument(
        "--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES), metavar="NAME",
        help=f"some of {', '.join(BACKBONES)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--iters", type=int, default=600, help="length of a training (default: %(default)s)")
    parser.add_argument("--train", type=int, default=1500, help="training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=400, help="validation scenes (default: %(default)s)")
    parser.add_argument(
        "--keep-checkpoints", action="store_true",
        help="keep the checkpoint of every 100 iterations, not only of the last 300",
    )  # fmt: skip
    args = parser.parse_args()
    if min(args.iters, args.train, args.val) < 1:
        parser.error("--iters, --train and --val must be at least 1")
    return args


def data_options(cfg: Config, data: Path) -> Iterator[str]:
    """Yield the overrides of a demo config for the scenes in ``data``, which are not resized."""
    yield from moved_paths(cfg.to_dict(), data)
    yield from resized(cfg, LONGEST)


def train_and_test(
    backbone: Backbone, seed: int, folder: Path, data: Path, iters: int, result: dict[str, Any], keep: bool = False
) -> Iterator[dict[str, Any]]:
    """Train one detector and run the evaluations that are missing in ``result``.

    Args:
        backbone: Backbone to train.
        seed: Seed of the training.
        folder: Work dir of the training.
        data: Folder of the demo scenes.
        iters: Number of iterations.
        result: Results of earlier calls.
        keep: Keep all checkpoints.

    Yields:
        The results after each step: ``loss``, averaged over the last iterations, and the metrics of each evaluation.
    """
    config = ROOT / "configs" / "demo" / backbone.config
    options = [*data_options(Config.fromfile(config), data), *backbone.options]
    final = folder / f"iter_{iters}.pth"
    if find_resumable_checkpoint(folder) != final:
        kept = ["default_hooks.checkpoint.max_keep_ckpts=-1"] if keep else []
        run("train.py", config, "--work-dir", folder, "--resume", "auto", "--cfg-options",
            *scheduled(iters, seed), "default_hooks.logger.interval=1", *kept,
            *without_validation(options))  # fmt: skip
    result = {"loss": last_loss(folder)} | result
    for name, evaluated in EVALUATED.items():
        if name not in result:
            tested = folder / f"test, {name}"
            run("test.py", config, final, "--work-dir", tested, "--cfg-options", *options, *evaluated)
            values = newest_evaluation(tested)
            result = result | {name: {metric: values[key] for metric, key in METRICS.items()}}
        yield result


def last_loss(folder: Path) -> float:
    """The loss of a training, averaged over its last iterations; the training may have been resumed."""
    losses = {}
    for path in sorted(folder.glob("*/vis_data/scalars.json")):
        lines = map(json.loads, path.read_text().splitlines())
        losses |= {line["iter"]: line["loss"] for line in lines if "loss" in line}
    return statistics.mean(losses[iteration] for iteration in sorted(losses)[-LAST:])


def make_table(results: dict[str, dict[str, Any]], names: Sequence[str]) -> str:
    """Means over the seeds with standard deviations, as Markdown."""
    columns = [(evaluated, metric) for metric in METRICS for evaluated in EVALUATED]
    titles = ["backbone", "seeds", "training loss"]
    titles += [f"{metric}, {evaluated}" for evaluated, metric in columns]
    rows = []
    for name in names:
        runs = list(results.get(name, {}).values())
        if runs:
            cells = [summary([run["loss"] for run in runs])]
            cells += [summary([run[evaluated][metric] for run in runs]) for evaluated, metric in columns]
            rows.append([BACKBONES[name].title, str(len(runs)), *cells])
    return markdown_table(titles, rows)


def main() -> None:
    """Run the command."""
    args = parse_args()
    logger = MMLogger.get_instance("padding_study")
    data = args.work_dir / "data"
    counts = ("--train", args.train, "--val", args.val)
    run("dataset_converters/make_demo_data.py", "--out", data, "--sizes", *SIZES, *counts)
    path = args.work_dir / "results.json"
    results = read_results(path, {})
    for seed in args.seeds:
        for name in args.backbones:
            key = f"seed {seed}, {args.iters} iterations"
            folder = args.work_dir / f"{name}-{args.iters}-{seed}"
            found = results.setdefault(name, {}).get(key, {})
            if not found.keys() >= EVALUATED.keys():
                for result in train_and_test(
                    BACKBONES[name], seed, folder, data, args.iters, found, args.keep_checkpoints
                ):
                    results[name][key] = result
                    write_results(path, results)
            logger.info("%s, %s: %s", BACKBONES[name].title, key, results[name][key])
    chosen = {
        name: {key: run for key, run in runs.items() if key.endswith(f" {args.iters} iterations")}
        for name, runs in results.items()
    }
    table = make_table(chosen, args.backbones)
    (args.work_dir / "README.md").write_text(table)
    logger.info("\n%s", table)


if __name__ == "__main__":
    main()
