"""Fine-tune a GrootL or Mamba model on instruction data, with LoRA or all parameters.

The config sets the model, the data and the arguments of Hugging Face's Trainer, see configs/language. Checkpoints, the
final model or adapter, and its tokenizer are written to the work dir. Use --resume to continue an interrupted run.
"""

import argparse
from pathlib import Path

from mmengine.logging import print_log

from grootvl_mm.apis import cli


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_config_arguments(parser)
    parser.add_argument("--work-dir", help="folder for checkpoints and results (default: work_dirs/CONFIG_NAME)")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="resume from this checkpoint-N folder; without a value (or with 'auto') from the newest complete one in "
        "the work dir, or start from scratch if there is none (default: do not resume)",
    )
    return parser.parse_args()


def find_checkpoint(work_dir: str, resume: str | None) -> str | None:
    """The checkpoint to resume from, or None."""
    from grootvl_mm.language.training import find_resumable_checkpoint, is_complete

    if resume is None:
        return None
    if resume == "auto":
        found = find_resumable_checkpoint(work_dir)
        print_log(
            f"Resuming from {found}."
            if found
            else f"No checkpoint to resume from in {work_dir}: starting from scratch."
        )
        return str(found) if found else None
    if not is_complete(resume):
        cli.fail(
            f"{resume!r} is not a complete checkpoint; give a checkpoint-N folder, or --resume without a value for the "
            "newest one"
        )
    return resume


def main() -> None:
    """Run the command."""
    args = parse_args()
    cfg = cli.read_config(args.config, args.cfg_options)
    work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs", Path(args.config).stem))
    with cli.language_errors():
        from grootvl_mm.language.training import build_trainer

        checkpoint = find_checkpoint(work_dir, args.resume)
        trainer = build_trainer(cfg, work_dir)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        trainer.save_state()
    print_log(f"Wrote the trained {'adapter' if cfg.get('lora') else 'model'} to {work_dir}")


if __name__ == "__main__":
    main()
