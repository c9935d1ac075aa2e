"""Convert one of the authors' GrootV classifiers to a checkpoint for mmpretrain's classifier.

The file may have weights under "model" and EMA weights under "model_ema", or be a bare state dict. By default the EMA
weights are converted, which the training recipe evaluates. The output file gets the first eight digits of its SHA-256
in its name: grootv_tiny.pth becomes grootv_tiny-01234567.pth.

Loading needs no conversion: GrootV and the classifiers of configs/grootv read published files and load the weights
under "model". Convert to use the EMA weights, to share the file, or for other programs.
"""

import argparse
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from grootvl_mm import __version__
from grootvl_mm.apis import cli
from grootvl_mm.apis.checkpoint_files import CheckpointError, is_state_dict, rewrite_checkpoint
from grootvl_mm.models import GrootV
from grootvl_mm.models.published_checkpoints import WEIGHTS, convert_published, is_published, strip_prefixes
from grootvl_mm.utils.loaded_weights import all_weights_loaded

CLASSIFIER = Path(__file__).resolve().parents[2] / "configs" / "_base_" / "models" / "grootv_classifier.py"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", metavar="SRC", help="the authors' checkpoint")
    parser.add_argument("dst", metavar="DST", help="output file NAME.pth; its hash is appended to the name")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="weights to convert (default: model_ema, the EMA weights, if the file has them, else model)",
    )
    return parser.parse_args()


def select_weights(content: Mapping[str, Any], wanted: str | None) -> tuple[str, dict[str, Tensor]]:
    """Find the weights in the content of a published file.

    Args:
        content: Content of the file.
        wanted: One of :data:`WEIGHTS`, or None for the default.

    Returns:
        The key of the weights in the file ("state dict" for a bare one), and the weights under their published names.

    Raises:
        CheckpointError: The weights are missing, or are not GrootV's.
    """
    found = [name for name in WEIGHTS if name in content]
    if wanted is None:
        wanted = found[-1] if found else None
    elif wanted not in found:
        raise CheckpointError(f"the file has no {wanted!r}; found {_some(content)}")
    weights = content if wanted is None else content[wanted]
    if not is_state_dict(weights):
        where = f"under 'model'; found {_some(content)}" if wanted is None else f"under {wanted!r}"
        raise CheckpointError(f"expected a state dict {where}")
    published = strip_prefixes(weights)
    if not is_published(published):
        raise CheckpointError(f"these are not the weights of a published GrootV classifier; found {_some(weights)}")
    return wanted or "state dict", published


def find_arch(weights: Mapping[str, Tensor]) -> str | dict:
    """Derive the architecture from converted weights.

    Returns:
        A name in ``GrootV.arch_settings``, or a dict with ``channels`` and ``depths`` for any other architecture.

    Raises:
        CheckpointError: The stem or the blocks of a stage are missing.
    """
    stem = weights.get("backbone.stem.conv2.weight")
    blocks = {
        tuple(map(int, match)) for match in re.findall(r"backbone\.stages\.(\d+)\.blocks\.(\d+)", " ".join(weights))
    }
    stages = sorted({stage for stage, _ in blocks})
    if stem is None or stem.ndim != 4 or len(stem) % 2 or stages != list(range(4)):
        raise CheckpointError(f"the stem or blocks of some of the four stages are missing; found {_some(weights)}")
    depths = tuple(1 + max(block for stage, block in blocks if stage == index) for index in stages)
    for name, arch in GrootV.arch_settings.items():
        if (arch["channels"], arch["depths"]) == (len(stem), depths):
            return name
    return {"channels": len(stem), "depths": depths}


def build_classifier(arch: str | dict, num_classes: int) -> torch.nn.Module:
    """Build the classifier of ``configs/grootv`` with any architecture, on the meta device."""
    model = Config.fromfile(CLASSIFIER).model
    channels = (GrootV.arch_settings[arch] if isinstance(arch, str) else arch)["channels"]
    model.backbone.arch = arch
    model.neck.update(in_channels=8 * channels, out_channels=12 * channels)
    model.head.update(in_channels=12 * channels, num_classes=num_classes)
    model.pop("train_cfg")
    with DefaultScope.overwrite_default_scope("mmpretrain"), torch.device("meta"):
        return MODELS.build(model)


def check_fit(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the weights strictly into the model.

    Raises:
        CheckpointError: Names are missing or unexpected, shapes or dtypes differ, or weights are NaN or not dense.
    """
    expected = model.state_dict()
    common = [name for name in expected if name in weights]
    problems = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "of another shape": [name for name in common if weights[name].shape != expected[name].shape],
    }
    if any(problems.values()):
        raise CheckpointError(
            "the weights do not fit the classifier: "
            + "; ".join(f"{len(names)} {what}: {_some(names)}" for what, names in problems.items() if names)
        )
    with all_weights_loaded(model):
        model.load_state_dict(dict(weights), strict=True, assign=True)


def convert(content: Mapping[str, Any], source: str, wanted: str | None = None) -> dict[str, Any]:
    """Convert the content of a published file to that of a checkpoint for mmpretrain.

    Args:
        content: Content of the published file.
        source: Name of the file, for the metadata.
        wanted: ``model``, ``model_ema``, or None for the EMA weights if there are any.

    Returns:
        ``meta`` (``source``, ``weights``, ``arch``, ``num_classes``, ``grootvl_mm_version``, and ``epoch`` if known)
        and ``state_dict``.

    Raises:
        CheckpointError: The content is not a GrootV classifier, or is incomplete.
    """
    name, published = select_weights(content, wanted)
    weights = convert_published(published)
    arch = find_arch(weights)
    bias = weights.get("head.fc.bias")
    num_classes = 1000 if bias is None else bias.numel()
    check_fit(build_classifier(arch, num_classes), weights)
    meta = {
        "source": source,
        "weights": name,
        "arch": arch,
        "num_classes": num_classes,
        "grootvl_mm_version": __version__,
    }
    if isinstance(content.get("epoch"), int):
        meta["epoch"] = content["epoch"]
    return {"meta": meta, "state_dict": weights}


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def main() -> None:
    """Run the command."""
    args = parse_args()
    if find_spec("mmpretrain") is None:
        cli.fail(
            "the conversion needs mmpretrain, to check the weights against its classifier; run: mim install mmpretrain"
        )
    try:
        # Only the file name, because the folder may be private.
        checkpoint, written = rewrite_checkpoint(
            args.src, args.dst, lambda content: convert(content, Path(args.src).name, args.weights)
        )
    except CheckpointError as error:
        cli.fail(str(error))
    meta = checkpoint["meta"]
    MMLogger.get_instance("grootv_to_mmpretrain").info(
        "Wrote GrootV %s with %d classes, weights from %r: %s",
        *(meta["arch"], meta["num_classes"], meta["weights"], written),
    )


if __name__ == "__main__":
    main()
