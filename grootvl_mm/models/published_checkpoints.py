"""Converts the parameter names of published checkpoints to ours.

Published files have the weights under ``model`` and EMA weights under ``model_ema``, with the names of the authors'
classification code: ``patch_embed``, ``levels``, ``conv_head`` and ``head``.
"""

import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from mmengine.logging import print_log
from torch import Tensor

from grootvl_mm.utils.safe_checkpoints import CheckpointError

# Keys of the weights in a published file, in order of preference.
WEIGHTS = ("model", "model_ema")
# Prefixes that data-parallel training and enclosing models add to names.
PREFIXES = ("module.", "backbone.")

_BACKBONE_RENAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^patch_embed\.norm([12])\.1\.", r"stem.norm\1."),
        (r"^patch_embed\.", "stem."),
        (r"^levels\.", "stages."),
        (r"\.norm([12])\.0\.", r".norm\1."),
        (r"^(stages\.\d+)\.norm\.0\.", r"\1.norm."),
        (r"\.downsample\.norm\.1\.", ".downsample.norm."),
        (r"\.TreeSSM\.x_proj_weight$", ".mixer.x_proj.weight"),
        (r"\.TreeSSM\.dt_projs_weight$", ".mixer.dt_proj.weight"),
        (r"\.TreeSSM\.dt_projs_bias$", ".mixer.dt_proj.bias"),
        (r"\.TreeSSM\.A_logs$", ".mixer.A_log"),
        (r"\.TreeSSM\.", ".mixer."),
    )
)
_NECK_RENAMES = (
    (re.compile(r"^conv_head\.0\."), "conv."),
    (re.compile(r"^conv_head\.1\.0\."), "norm."),
)
# Published with an extra axis of length 1: a leading one for the scan direction or a trailing one for the state.
_EXTRA_AXIS = {".x_proj_weight": 0, ".dt_projs_weight": 0, ".dt_projs_bias": 0, ".A_logs": 1}


def is_published(names: Iterable[str]) -> bool:
    """Whether these are parameter names of the authors' code."""
    return any(name.startswith(("patch_embed.", "levels.")) for name in names)


def strip_prefixes(weights: Mapping[str, Any], prefixes: Sequence[str] = PREFIXES) -> dict[str, Any]:
    """Strip prefixes, by default ``module.`` and then ``backbone.``, from the names.

    Raises:
        CheckpointError: two names become the same.
    """
    stripped = {}
    for key, value in weights.items():
        name = _strip(key, prefixes)
        if name in stripped:
            raise CheckpointError(f"the weights contain {name!r} twice, with and without a prefix")
        stripped[name] = value
    return stripped


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a published file, those under ``model`` or otherwise ``model_ema``, with their published names.

    Args:
        checkpoint: content of the file, or a bare state dict. Weights of other models are returned unchanged, but taken
            out of ``model`` and without the prefix ``module.``.
    """
    found = [name for name in WEIGHTS if isinstance(checkpoint.get(name), Mapping)]
    weights = dict(checkpoint[found[0]] if found else checkpoint)
    if not all(isinstance(name, str) for name in weights):
        raise CheckpointError("the weights are not a dictionary of names to tensors")
    if len(found) > 1:
        print_log(
            f"The checkpoint also contains EMA weights ({found[1]!r}); loading the weights under {found[0]!r}. To use "
            "the EMA weights, convert the file with tools/model_converters/grootv_to_mmpretrain.py.",
            "current",
        )
    published = is_published(_strip(key, PREFIXES) for key in weights)
    return strip_prefixes(weights, PREFIXES if published else PREFIXES[:1])


def convert_published(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Convert published weights to those of mmpretrain's ``ImageClassifier`` with our backbone and neck.

    Args:
        state_dict: published names to tensors, with or without the prefixes ``module.`` and ``backbone.``; may be the
            content of a whole file with the weights under ``model``.

    Returns:
        New names (``backbone.*``, ``neck.*``, ``head.fc.*``) to tensors. Unknown names are unchanged.
    """
    converted = {}
    for key, value in unwrap(state_dict).items():
        if key.startswith(("patch_embed.", "levels.")):
            name, value = _rename_backbone(key, value)
            converted[f"backbone.{name}"] = value
        elif key.startswith("conv_head."):
            converted[f"neck.{_substitute(key, _NECK_RENAMES)}"] = value
        elif key.startswith("head."):
            converted[key.replace("head.", "head.fc.", 1)] = value
        else:
            converted[key] = value
    return converted


def rename_published_classifier(state_dict: MutableMapping[str, Any], prefix: str) -> bool:
    """Convert, in place, a published classifier under ``prefix`` to mmpretrain's with our backbone and neck.

    Other weights are unchanged, but taken out of ``model``.

    Returns:
        Whether the weights were published ones.
    """
    weights = unwrap(_below(state_dict, prefix))
    published = is_published(weights)
    _replace(state_dict, prefix, convert_published(weights) if published else weights)
    return published


def rename_published_backbone(state_dict: MutableMapping[str, Any], prefix: str) -> bool:
    """Rename, in place, the weights of a published backbone under ``prefix``, and drop those of its neck and head.

    Other weights are unchanged, but taken out of ``model``.

    Returns:
        Whether the weights were published ones.
    """
    weights = unwrap(_below(state_dict, prefix))
    published = is_published(weights)
    if published:
        own = "backbone."
        converted = convert_published(weights).items()
        weights = {key.removeprefix(own): value for key, value in converted if not key.startswith(("neck.", "head."))}
    _replace(state_dict, prefix, weights)
    return published


def rename_published_neck(state_dict: MutableMapping[str, Any], prefix: str) -> None:
    """Rename, in place, a published ``conv_head`` under ``prefix``, and drop the other weights of a published file.

    Other weights are unchanged, but taken out of ``model``.
    """
    weights = unwrap(_below(state_dict, prefix))
    if any(key.startswith("conv_head.") for key in weights):
        own = "neck."
        converted = convert_published(weights).items()
        weights = {key.removeprefix(own): value for key, value in converted if key.startswith(own)}
    _replace(state_dict, prefix, weights)


def _strip(name: str, prefixes: Sequence[str]) -> str:
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name


def _below(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}


def _replace(state_dict: MutableMapping[str, Any], prefix: str, weights: Mapping[str, Any]) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        del state_dict[key]
    state_dict.update({prefix + name: value for name, value in weights.items()})


def _rename_backbone(key: str, value: Tensor) -> tuple[str, Tensor]:
    for suffix, axis in _EXTRA_AXIS.items():
        if key.endswith(suffix):
            if not isinstance(value, Tensor):
                raise CheckpointError(f"{key!r} is a {type(value).__name__}, expected a tensor")
            if value.ndim <= axis:
                raise CheckpointError(f"{key!r} must have at least {axis + 1} axes, got shape {tuple(value.shape)}")
            value = value.squeeze(axis)
    return _substitute(key, _BACKBONE_RENAMES), value


def _substitute(key: str, renames: tuple[tuple[re.Pattern, str], ...]) -> str:
    for pattern, replacement in renames:
        key = pattern.sub(replacement, key)
    return key
