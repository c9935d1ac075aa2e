"""Evaluate a detector, segmenter or classifier, depending on the config's default_scope."""

import argparse
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from grootvl_mm.apis import cli

# For each default_scope: visualizer, visualization hook, and the metric that dumps predictions for --out.
VISUALIZERS = {
    "mmdet": "DetLocalVisualizer",
    "mmseg": "SegLocalVisualizer",
    "mmpretrain": "UniversalVisualizer",
}
HOOKS = {
    "mmdet": {"type": "DetVisualizationHook", "draw": True},
    "mmseg": {"type": "SegVisualizationHook", "draw": True, "interval": 1},
    "mmpretrain": {"type": "VisualizationHook", "enable": True, "interval": 1},
}
DUMPERS = {"mmdet": "DumpDetResults", "mmseg": "DumpResults", "mmpretrain": "DumpResults"}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    cli.add_config_arguments(parser)
    parser.add_argument("checkpoint", help="path or URL of the checkpoint")
    cli.add_runner_arguments(parser)
    parser.add_argument(
        "--out", metavar="FILE.pkl", help="also dump the predictions to this pickle file (default: none)"
    )
    parser.add_argument("--show", action="store_true", help="show the predictions in a window (default: off)")
    parser.add_argument("--show-dir", help="folder to which images with predictions are written (default: none)")
    parser.add_argument(
        "--wait-time", type=float, default=2, help="seconds for which --show shows each image (default: %(default)s)"
    )
    parser.add_argument(
        "--allow-mismatch",
        action="store_true",
        help="only warn if weights of the model are missing in the checkpoint, or have another shape or precision "
        "(default: error)",
    )
    parser.add_argument(
        "--tta", action="store_true", help="use test-time augmentation as defined in the config (default: off)"
    )
    args = parser.parse_args()
    if args.out and not args.out.endswith((".pkl", ".pickle")):
        parser.error(f"--out must end in .pkl or .pickle, got {args.out!r}")
    return args


def set_visualization(cfg: Config, args: argparse.Namespace) -> None:
    """Let the visualization hook draw every prediction."""
    scope = cfg.default_scope
    visualizer = cfg.get("visualizer") or {"type": VISUALIZERS[scope], "name": "visualizer"}
    hook = {**cfg.get("default_hooks", {}).get("visualization", {}), **HOOKS[scope]}
    hook |= {"show": args.show, "wait_time": args.wait_time}
    if args.show_dir:
        show_dir = str(Path(args.show_dir).absolute())
        if scope == "mmdet":
            hook["test_out_dir"] = show_dir
        elif scope == "mmpretrain":
            hook["out_dir"] = show_dir
        else:
            # mmseg's hook has no output folder; the visualizer's is used.
            visualizer = {**visualizer, "save_dir": show_dir, "vis_backends": [{"type": "LocalVisBackend"}]}
    cfg.visualizer = visualizer
    cfg.default_hooks = {**cfg.get("default_hooks", {}), "visualization": hook}


def set_tta(cfg: Config) -> None:
    """Wrap the model and replace the test pipeline for test-time augmentation."""
    missing = [name for name in ("tta_model", "tta_pipeline") if name not in cfg]
    if missing:
        cli.fail(
            f"--tta needs tta_model and tta_pipeline, but {cfg.filename} has no "
            f"{' and no '.join(missing)}; drop --tta or add them to the config"
        )
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset = cfg.test_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline


def main() -> None:
    """Run the command."""
    args = parse_args()
    cfg = cli.prepare_runner_config(args)
    cli.check_file(args.checkpoint, "checkpoint", "give the path of a .pth file, e.g. from work_dirs/")
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        set_visualization(cfg, args)
    if args.tta:
        set_tta(cfg)
    if args.out:
        evaluators = cfg.test_evaluator
        cfg.test_evaluator = [
            *(evaluators if isinstance(evaluators, list) else [evaluators]),
            {"type": DUMPERS[cfg.default_scope], "out_file_path": args.out},
        ]
    cli.finish_runner_config(cfg, allow_mismatch=args.allow_mismatch)
    with cli.checkpoint_errors(args.checkpoint):
        Runner.from_cfg(cfg).test()
    cli.close_process_group()


if __name__ == "__main__":
    main()
