"""Train a detector, segmenter or classifier, depending on the config's default_scope."""

import argparse

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import RUNNERS

from grootvl_mm.apis import cli
from grootvl_mm.apis.resume import check_resumable, find_resumable_checkpoint, read_seed
from grootvl_mm.engine.hooks.step_seed_hook import make_repeatable


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    cli.add_config_arguments(parser)
    cli.add_runner_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="resume from this checkpoint; without a value (or with 'auto') from the newest complete checkpoint "
        "in the work dir, or start from scratch if there is none (default: do not resume)",
    )
    parser.add_argument(
        "--exact-resume",
        action="store_true",
        help="seed every iteration, so that a resumed run equals an uninterrupted one exactly; both runs need this "
        "option. Turns persistent workers off in epoch-based training (default: off)",
    )
    parser.add_argument(
        "--amp",
        action="store_true",
        help="train with automatic mixed precision: float16 on GPUs, bfloat16 on the CPU (default: as in the config)",
    )
    parser.add_argument(
        "--auto-scale-lr",
        action="store_true",
        help="multiply the learning rate by (actual batch size / auto_scale_lr.base_batch_size) (default: off)",
    )
    return parser.parse_args()


def set_resume(cfg: Config, resume: str) -> None:
    """Set the checkpoint to resume from."""
    if resume == "auto":
        checkpoint = find_resumable_checkpoint(cfg.work_dir)
        if checkpoint is None:
            print_log(f"No checkpoint to resume from in {cfg.work_dir}: starting from scratch.")
            return
        resume = str(checkpoint)
    else:
        cli.check_file(resume, "checkpoint", "give its path, or --resume without a value for the newest one")
    cfg.resume = True
    cfg.load_from = resume
    if "://" in resume:
        return
    with cli.checkpoint_errors():
        check_resumable(resume)
        if cfg.get("randomness", {}).get("seed") is None:
            # mmengine also restores the seed, but only after it has shuffled the data.
            cfg.merge_from_dict({"randomness.seed": read_seed(resume)})


def set_amp(cfg: Config) -> None:
    """Turn on automatic mixed precision."""
    wrapper = cfg.optim_wrapper.get("type", "OptimWrapper")
    if wrapper not in ("OptimWrapper", "AmpOptimWrapper"):
        cli.fail(f"--amp needs an optim_wrapper of type OptimWrapper or AmpOptimWrapper, got {wrapper}; drop --amp")
    cfg.optim_wrapper.type = "AmpOptimWrapper"
    cfg.optim_wrapper.setdefault("loss_scale", "dynamic")


def set_auto_scale_lr(cfg: Config) -> None:
    """Turn on automatic scaling of the learning rate."""
    if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
        cli.fail(
            "--auto-scale-lr needs the batch size for which the config's learning rate is set; add "
            "auto_scale_lr=dict(base_batch_size=...) to the config"
        )
    cfg.auto_scale_lr.enable = True


def main() -> None:
    """Run the command."""
    args = parse_args()
    cfg = cli.prepare_runner_config(args)
    if args.amp:
        set_amp(cfg)
    if args.auto_scale_lr:
        set_auto_scale_lr(cfg)
    if args.resume is not None:
        set_resume(cfg, args.resume)
    if args.exact_resume:
        make_repeatable(cfg)
    cli.finish_runner_config(cfg)
    with cli.checkpoint_errors():
        RUNNERS.build(cfg).train()
    cli.close_process_group()


if __name__ == "__main__":
    main()
