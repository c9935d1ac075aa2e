"""Compare trees, paths and backbones without a scan, with the same training budget.

Every arm is trained on every task with every seed and evaluated at the end. An arm is GrootV with one option changed,
or a ConvNeXt or Swin Transformer of the same depths and widths. Tasks: instance segmentation (det) and semantic
segmentation (seg) of the demo scenes; and curves, which need long-range connections: segmenting the marked curve
(curves, curves-long, curves-dashed), and classifying whether two marks are joined (curves-cls).

Each task is finished before the next one starts. To resume an interrupted study, or to repeat failed trainings, repeat
the command: finished parts are not run again. The tables are written to WORK_DIR/README.md, all numbers to
WORK_DIR/results.json, and with --jobs the output of each training to WORK_DIR/TASK-ARM-ITERS-TRAIN-VAL-SEED/output.txt,
where TRAIN and VAL are the numbers of scenes. Studies with other options can share WORK_DIR.
"""

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.logging import MMLogger
from scipy.stats import ttest_ind
from studies import (
    Training,
    markdown_table,
    read_results,
    resized,
    run_trainings,
    scheduled,
    summary,
    write_results,
)
from train_on_digits import CONFIG_DATA, ROOT, command_of, moved_paths, run

from grootvl_mm.apis import cli
from grootvl_mm.apis.resume import find_resumable_checkpoint

CURVES_DATA = "data/curves/"  # data_root of the configs for curves
CONFIDENCE = 0.95


class Arm(NamedTuple):
    """One backbone of the study: options of GrootV, or the name of another backbone."""

    title: str
    options: dict[str, Any] = {}
    peer: str | None = None


class Task(NamedTuple):
    """One task of the study."""

    title: str
    config: str
    iters: int
    metrics: dict[str, tuple[str, float]]  # title to key in the log, and the maximum of the value there
    data: tuple[object, ...]  # arguments of the tool that generates the data
    scale: int | None = None  # side to which images of curves are resized


ARMS = {
    "tree": Arm("tree (cosine, per block)"),
    "raster": Arm("raster", {"scan": "raster"}),
    "cross": Arm("cross", {"scan": "cross"}),
    "random": Arm("random spanning tree", {"scan": "random"}),
    "maximum": Arm("maximum spanning tree", {"scan": "maximum"}),
    "stage-tree": Arm("tree per stage", {"tree_sharing": "stage"}),
    "euclidean": Arm("tree, Euclidean", {"tree_metric": "euclidean"}),
    "manhattan": Arm("tree, Manhattan", {"tree_metric": "manhattan"}),
    "last-root": Arm("tree, last vertex is the root", {"tree_root": "last"}),
    "up": Arm("tree, to the first vertex only", {"propagation": "up"}),
    "down": Arm("tree, from the first vertex only", {"propagation": "down"}),
    "convnext": Arm("ConvNeXt", peer="convnext"),
    "swin": Arm("Swin Transformer", peer="swin"),
}
AP = {"box AP": ("coco/bbox_mAP", 1), "mask AP": ("coco/segm_mAP", 1)}
ON_CURVES = {"accuracy on the pixels of curves": ("aAcc", 100)}
CURVES = "grootv-flat_demo-curves-seg.py"
TASKS = {
    "det": Task("Mask R-CNN on the demo scenes", "mask-rcnn_grootv-pico_fpn_demo.py", 600, AP, ()),
    "seg": Task("UperNet on the demo scenes", "grootv-pico_upernet_demo-seg.py", 1500, {"mIoU": ("mIoU", 100)}, ()),
    "curves": Task("the marked one of two curves of 18 pixels in 32x32", CURVES, 250, ON_CURVES, (), 64),
    "curves-long": Task(
        "the marked one of two curves of 40 pixels in 48x48",
        CURVES, 600, ON_CURVES, ("--size", 48, "--length", 40), 96,
    ),
    "curves-dashed": Task(
        "the marked one of two dashed curves of 36 pixels, among two more, in 48x48",
        CURVES, 600, ON_CURVES, ("--size", 48, "--length", 36, "--distractors", 2, "--dash", 3), 96,
    ),
    "curves-cls": Task(
        "whether two marks are joined, curves of 18 pixels in 32x32",
        "grootv-flat_demo-curves-cls.py", 1500, {"accuracy": ("accuracy/top1", 100)}, (), 64,
    ),
}  # fmt: skip
# The most informative settings for a given time on one core.
PRESETS = {
    "minutes": {"tasks": ["curves"], "arms": ["tree", "raster"], "seeds": [0], "iters": 100, "train": 1000, "val": 200},
    "short": {
        "tasks": ["curves"],
        "arms": ["tree", "raster", "cross", "random", "maximum", "convnext", "swin", "stage-tree"],
        "seeds": [0, 1, 2, 3],
        "iters": 250,
        "train": 4000,
        "val": 512,
    },
}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--work-dir", type=Path, default=Path("work_dirs/scan-study"),
        help="folder for checkpoints and results (default: %(default)s)")  # fmt: skip
    add("--preset", choices=PRESETS, help="defaults for the other options by duration on one idle core; minutes: a few "
        "minutes, as a trial; short: about half an hour (default: none, the defaults below)")  # fmt: skip
    add("--arms", nargs="+", choices=ARMS, metavar="NAME", help=f"arms to compare, of {', '.join(ARMS)} (default: all)")
    add("--tasks", nargs="+", choices=TASKS, metavar="NAME", help=f"tasks, of {', '.join(TASKS)} (default: all)")
    add("--seeds", nargs="+", type=int, metavar="N", help="seeds (default: 0 1 2)")
    add("--iters", type=int, metavar="N", help="iterations of each training (default: depends on the task)")
    add("--train", type=int, metavar="N", help="number of training scenes (default: 1500 digits, 4000 curves)")
    add("--val", type=int, metavar="N", help="number of validation scenes (default: 400 digits, 1000 curves)")
    add("--jobs", type=int, default=1, metavar="N", help="number of trainings at a time, which share the cores and the "
        "GPU, if there is one (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    preset = PRESETS.get(args.preset, {"arms": list(ARMS), "tasks": list(TASKS), "seeds": [0, 1, 2]})
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if min(value for value in (args.iters, args.train, args.val, 2) if value is not None) < 2:
        parser.error("--iters, --train and --val must be at least 2")
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    return args


def is_curves(task: str) -> bool:
    """Whether a task uses the curve dataset."""
    return task.startswith("curves")


def counts_of(task: str, args: argparse.Namespace) -> tuple[int, int]:
    """The numbers of scenes for training and for validation."""
    train, val = (4000, 1000) if is_curves(task) else (1500, 400)
    return args.train or train, args.val or val


def settings_of(task: str, args: argparse.Namespace) -> list[str]:
    """What else distinguishes trainings of an arm, besides their seeds: iterations and numbers of scenes."""
    return [str(args.iters or TASKS[task].iters), "{}-{}".format(*counts_of(task, args))]


def data_folder(task: str, args: argparse.Namespace) -> Path:
    """The folder of a task's data; curves-cls shares that of curves."""
    name = task.removesuffix("-cls") if is_curves(task) else "digits"
    return args.work_dir / "data" / "{}-{}-{}".format(name, *counts_of(task, args))


def make_data(task: str, args: argparse.Namespace) -> None:
    """Generate the data of a task if they do not exist."""
    script = "make_curve_data.py" if is_curves(task) else "make_demo_data.py"
    train, val = counts_of(task, args)
    options = ("--out", data_folder(task, args), "--train", train, "--val", val, *TASKS[task].data)
    run(f"dataset_converters/{script}", *options)


def peer_backbone(peer: str, channels: int, depths: Sequence[int], out_indices: Sequence[int]) -> dict[str, Any]:
    """The config of another backbone with the depths and widths of GrootV."""
    widths = [channels * 2**stage for stage in range(len(depths))]
    if peer == "convnext":
        return {
            "type": "mmpretrain.ConvNeXt",
            "arch": {"depths": list(depths), "channels": widths},
            "out_indices": list(out_indices),
            "gap_before_final_norm": False,
            # As in GrootV, whose residual branches start at full strength.
            "layer_scale_init_value": 1.0,
        }
    return {
        "type": "mmseg.SwinTransformer",
        "embed_dims": channels,
        "depths": list(depths),
        "strides": [4, 2, 2, 2][: len(depths)],
        "num_heads": [max(width // 24, 1) for width in widths],
        "window_size": 7,
        "drop_path_rate": 0.0,
        "out_indices": list(out_indices),
    }


def write_config(arm: str, task: str, folder: Path) -> Path:
    """Write the config of an arm: the task's config with another backbone."""
    base = ROOT / "configs" / "demo" / TASKS[task].config
    cfg = Config.fromfile(base)
    backbone = dict(ARMS[arm].options)
    imports = list(cfg.custom_imports.imports)
    if peer := ARMS[arm].peer:
        arch = cfg.model.backbone.arch
        arch = {"channels": 24, "depths": (1, 1, 2, 1)} if arch == "pico" else arch
        out_indices = cfg.model.backbone.get("out_indices", range(len(arch["depths"])))
        backbone = {"_delete_": True, **peer_backbone(peer, arch["channels"], arch["depths"], out_indices)}
        imports.append("mmpretrain.models" if peer == "convnext" else "mmseg.models")
    text = f"_base_ = {str(base)!r}\nmodel = dict(backbone={backbone!r})\n"
    text += f"custom_imports = dict(imports={imports!r}, allow_failed_imports=False)\n"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{task}_{arm}.py"
    path.write_text(text)
    return path


def overrides(cfg: Config, task: str, data: Path) -> Iterator[str]:
    """Yield the overrides of a config for the data of a task."""
    yield from moved_paths(cfg.to_dict(), data, root=CURVES_DATA if is_curves(task) else CONFIG_DATA)
    scale = TASKS[task].scale
    if scale is None:
        return
    yield from resized(cfg, scale)
    if "size" in cfg.model.get("data_preprocessor", {}):
        yield f"model.data_preprocessor.size=({scale},{scale})"


def plan(arm: str, task: str, seed: int, args: argparse.Namespace) -> Training:
    """Prepare the training and evaluation of one arm."""
    iters, scenes = settings_of(task, args)
    name = f"{task}/{arm}/{iters}/{scenes}/{seed}"
    config = write_config(arm, task, args.work_dir / "configs")
    folder = args.work_dir / name.replace("/", "-")
    options = [f"train_cfg.val_interval={iters}", "default_hooks.checkpoint.max_keep_ckpts=1"]
    options += [*scheduled(int(iters), seed), *overrides(Config.fromfile(config), task, data_folder(task, args))]
    command = command_of("train.py", config, "--work-dir", folder, "--resume", "auto", "--cfg-options", *options)
    return Training(name, folder, command)


def read_metrics(training: Training) -> dict[str, float] | None:
    """The metrics at the end of a training, 0 to 1, or None if it was not finished and evaluated."""
    task, _, iters, *_ = training.name.split("/")
    if find_resumable_checkpoint(training.folder) != training.folder / f"iter_{iters}.pth":
        return None
    for path in sorted(training.folder.glob("*/vis_data/scalars.json"), reverse=True):
        for line in reversed(path.read_text().splitlines()):
            values = json.loads(line)
            found = {title: values.get(key) for title, (key, _) in TASKS[task].metrics.items()}
            if None not in found.values():
                return {title: found[title] / scale for title, (_, scale) in TASKS[task].metrics.items()}
    return None


def difference(values: Sequence[float], reference: Sequence[float]) -> tuple[float, float] | None:
    """The difference of the means of two arms, and half of its confidence interval (Welch's t).

    Seeds are not paired: the same seed draws other weights for another arm.
    """
    if min(len(values), len(reference)) < 2:
        return None
    low, high = ttest_ind(values, reference, equal_var=False).confidence_interval(CONFIDENCE)
    return float(low + high) / 2, float(high - low) / 2


def make_table(task: str, results: dict[str, dict[int, dict[str, float]]]) -> str:
    """The arms of one task as Markdown: means, standard deviations, and significant differences to the tree.

    Args:
        task: Name of the task.
        results: Metrics by arm and seed.
    """
    header = ["backbone", "seeds"]
    for title in TASKS[task].metrics:
        header += [title, "difference to tree", "significant"]
    rows = []
    for arm in (name for name in ARMS if results.get(name)):
        cells = [ARMS[arm].title, str(len(results[arm]))]
        for title in TASKS[task].metrics:
            values, trees = ([found[title] for found in results.get(name, {}).values()] for name in (arm, "tree"))
            gap = None if arm == "tree" else difference(values, trees)
            significant = "-" if gap is None else "yes" if abs(gap[0]) > gap[1] else "no"
            cells += [summary(values), f"{gap[0]:+.3f} ± {gap[1]:.3f}" if gap else "-", significant]
        rows.append(cells)
    return markdown_table(header, rows)


def make_page(results: dict[str, dict[str, float]], args: argparse.Namespace) -> str:
    """The tables of all tasks."""
    page = []
    for task in args.tasks:
        settings = settings_of(task, args)
        chosen: dict[str, dict[int, dict[str, float]]] = {}
        for key, values in results.items():
            name, arm, *found, seed = key.split("/")
            if (name, found) == (task, settings):
                chosen.setdefault(arm, {})[int(seed)] = values
        if chosen:
            heading = "{}: {}, {} iterations, {} scenes and {} to test".format(
                task, TASKS[task].title, settings[0], *counts_of(task, args)
            )
            page.append(f"## {heading}\n\n{make_table(task, chosen)}")
    note = (
        "Mean ± standard deviation over the seeds; differences of means, ± half of their 95 % interval (Welch's t).\n"
    )
    return "\n".join([*page, note])


def run_missing(results: dict[str, dict[str, float]], args: argparse.Namespace) -> dict[str, str]:
    """Run the trainings without results and add theirs, each as soon as it is known.

    Args:
        results: Metrics, and the duration of the training in seconds, by name; modified in place.
        args: The command line.

    Returns:
        What went wrong, by the names of the trainings without results.
    """
    logger = MMLogger.get_instance("scan_study")
    missing: list[Training] = []
    failures: dict[str, str] = {}
    for task in args.tasks:
        trainings = [plan(arm, task, seed, args) for seed in args.seeds for arm in args.arms]
        for training in trainings:
            # Not in the results if the study was interrupted right after the training.
            if training.name not in results and (metrics := read_metrics(training)):
                results[training.name] = {**metrics, "seconds": 0}
        trainings = [training for training in trainings if training.name not in results]
        if trainings:
            make_data(task, args)
        missing += trainings
    logger.info("Missing trainings: %d, to be run %d at a time.", len(missing), args.jobs)
    with closing(run_trainings(missing, args.jobs)) as ended:
        for number, (training, status, seconds, output) in enumerate(ended, 1):
            metrics = None if status else read_metrics(training)
            if metrics:
                results[training.name] = {**metrics, "seconds": round(seconds)}
                write_results(args.work_dir / "results.json", results)
                write_page(results, args)
                outcome = ", ".join(f"{title} {value:.3f}" for title, value in metrics.items())
            else:
                outcome = f"exit status {status}" if status else "no metrics"
                failures[training.name] = f"{outcome} (output: {output or 'above'})"
            logger.info("%d of %d: %s: %s, %.0f s", number, len(missing), training.name, outcome, seconds)
    return failures


def write_page(results: dict[str, dict[str, float]], args: argparse.Namespace) -> str:
    """Write the tables of all tasks, and return them."""
    page = make_page(results, args)
    with cli.output_file(args.work_dir / "README.md") as partial:
        partial.write_text(page)
    return page


def main() -> None:
    """Run the command."""
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that trainings are stopped, too
    logger = MMLogger.get_instance("scan_study")
    args.work_dir = args.work_dir.resolve()
    path = args.work_dir / "results.json"
    results = read_results(path, {})
    failures = run_missing(results, args)
    write_results(path, results)
    logger.info("\n%s", write_page(results, args))
    if failures:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
        cli.fail(f"{len(failures)} trainings failed; repeat the command to try again:\n{listed}")


if __name__ == "__main__":
    main()
