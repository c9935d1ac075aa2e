"""Evaluate a GrootL or Mamba model with lm-evaluation-harness; all options after MODEL are those of `lm-eval run`.

Trees are built over the context of each request, its prompt. Running text, as in perplexity tasks, has no prompt, so
that no token sees a later one. `lm-eval run --help` lists the options, `lm-eval ls tasks` the tasks.
"""

import argparse
import sys
from typing import Any

from grootvl_mm.apis import cli


def parse_args() -> argparse.Namespace:
    """Read the command line; the harness parses its own options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s MODEL --tasks TASK [TASK ...] [options of lm-eval run]",
    )
    parser.add_argument("model", help="folder or hub name of a model, or folder of an adapter")
    args, options = parser.parse_known_args()
    with cli.language_errors():
        from lm_eval._cli import HarnessCLI
    sys.argv = [sys.argv[0], "run", *options]
    harness = HarnessCLI()
    parsed = harness.parse_args()
    if not parsed.tasks and not parsed.config:
        parser.error("the following arguments are required: --tasks")
    parsed.model = args.model
    return parsed


def model_arguments(path: str, given: dict[str, Any] | None) -> dict[str, Any]:
    """The arguments of the model ``grootl``: the weights to load, and those in ``--model_args``."""
    from grootvl_mm.language.loading import base_of, is_adapter

    found = {"pretrained": base_of(path), "peft": path, "tokenizer": path} if is_adapter(path) else {"pretrained": path}
    return {**found, **(given or {})}


def main() -> None:
    """Run the command."""
    args = parse_args()
    with cli.language_errors():
        import torch
        from lm_eval.utils import setup_logging

        import grootvl_mm.language.evaluation  # noqa: F401  registers the model

        args.model_args = model_arguments(args.model, args.model_args)
        args.model = "grootl"
        args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        setup_logging()
        args.func(args)


if __name__ == "__main__":
    main()
