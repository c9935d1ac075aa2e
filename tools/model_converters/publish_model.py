"""Make a checkpoint of a training run fit to be shared: weights and what is known about them, nothing else.

Optimizer, schedulers and logs are left out. Of a run with EMAHook the averaged weights are kept, as mmengine evaluates
them; --no-ema keeps the others. The result is written next to DST, with a part of its hash in the name: model.pth
becomes model-01234567.pth.
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
    parser.add_argument("dst", metavar="DST", help="file to write, NAME.pth; a part of the hash is added to the name")
    parser.add_argument(
        "--no-ema", action="store_true", help="take the weights of the last iteration, not the averaged ones"
    )
    return parser.parse_args()


def publish(content: Mapping[str, Any], ema: bool = True) -> dict[str, Any]:
    """Keep what others need of a training checkpoint.

    Args:
        content: What mmengine's Runner wrote.
        ema: Keep the averaged weights of a run with EMAHook, else those of the last iteration.

    Returns:
        ``meta`` (all of the run's: config, versions, epoch, iteration, dataset_meta; and ``grootvl_mm_version``) and
        ``state_dict``.

    Raises:
        CheckpointError: There are no such weights, or they are no tensors, or hold NaN.
    """
    weights = content.get("state_dict")
    if not isinstance(weights, Mapping) or not weights:
        raise CheckpointError(
            "no weights under 'state_dict'; expected a checkpoint of mmengine's Runner (published GrootV files are the "
            "business of grootv_to_mmpretrain.py)"
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
    """Undo the exchange that EMAHook makes before saving: ``state_dict`` holds what was averaged."""
    if not isinstance(swapped, Mapping):
        raise CheckpointError("there are no averaged weights (the run had no EMAHook); leave --no-ema out")
    prefix = "module."
    last = {name.removeprefix(prefix): value for name, value in swapped.items() if name.startswith(prefix)}
    if last.keys() != averaged.keys():
        raise CheckpointError("'ema_state_dict' and 'state_dict' do not hold the same weights")
    return last


def main() -> None:
    """Run the command."""
    args = parse_args()
    try:
        _, written = rewrite_checkpoint(args.src, args.dst, lambda content: publish(content, ema=not args.no_ema))
    except CheckpointError as error:
        cli.fail(str(error))
    MMLogger.get_instance("publish_model").info("%s", written)


if __name__ == "__main__":
    main()
