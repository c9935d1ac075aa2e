"""Prepare a training checkpoint for publication: keep the weights and metadata, drop optimizer, schedulers and logs.

For a run with EMAHook, the EMA weights are kept, which mmengine evaluates; --no-ema keeps the current weights instead.
The output file gets the first eight digits of its SHA-256 in its name: model.pth becomes model-01234567.pth.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from mmengine.logging import MMLogger
from torch import Tensor

from grootvl_mm import __version__
from grootvl_mm.apis import cli
from grootvl_mm.apis.checkpoint_files import CheckpointError, rewrite_checkpoint
from grootvl_mm.utils.loaded_weights import check_weights


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", metavar="SRC", help="checkpoint of a training run")
    parser.add_argument("dst", metavar="DST", help="output file NAME.pth; its hash is appended to the name")
    parser.add_argument(
        "--no-ema",
        action="store_true",
        help="keep the weights of the last iteration (default: the EMA weights, if there are any)",
    )
    return parser.parse_args()


def publish(content: Mapping[str, Any], ema: bool = True) -> dict[str, Any]:
    """Reduce a training checkpoint to weights and metadata.

    Args:
        content: A checkpoint of mmengine's Runner.
        ema: Keep the EMA weights of a run with EMAHook; otherwise those of the last iteration.

    Returns:
        ``meta`` (the run's: config, versions, epoch, iteration, dataset_meta; and ``grootvl_mm_version``) and
        ``state_dict``.

    Raises:
        CheckpointError: The weights are missing, are not tensors, or have NaN.
    """
    weights = content.get("state_dict")
    if not isinstance(weights, Mapping) or not weights:
        raise CheckpointError(
            "no weights under 'state_dict'; expected a checkpoint of mmengine's Runner (for the authors' published "
            "files, use grootv_to_mmpretrain.py)"
        )
    check_weights(content)
    meta = content.get("meta")
    meta = {**(meta if isinstance(meta, Mapping) else {}), "grootvl_mm_version": __version__}
    if "ema_state_dict" in content:
        meta["weights"] = "averaged" if ema else "last iteration"
    if not ema:
        weights = _weights_of_last_iteration(weights, content.get("ema_state_dict"))
        check_weights({"state_dict": weights})
    return {"meta": meta, "state_dict": dict(weights)}


def _weights_of_last_iteration(averaged: Mapping[str, Tensor], swapped: Mapping[str, Tensor] | None) -> dict:
    """Undo EMAHook's swap on saving: ``state_dict`` holds the EMA weights, ``ema_state_dict`` the current ones."""
    if not isinstance(swapped, Mapping):
        raise CheckpointError("there are no EMA weights (the run had no EMAHook); drop --no-ema")
    prefix = "module."
    last = {name.removeprefix(prefix): value for name, value in swapped.items() if name.startswith(prefix)}
    if last.keys() != averaged.keys():
        raise CheckpointError("'ema_state_dict' and 'state_dict' have different names")
    return last


def main() -> None:
    """Run the command."""
    args = parse_args()
    try:
        _, written = rewrite_checkpoint(args.src, args.dst, lambda content: publish(content, ema=not args.no_ema))
    except CheckpointError as error:
        cli.fail(str(error))
    MMLogger.get_instance("publish_model").info("Wrote %s", written)


if __name__ == "__main__":
    main()
