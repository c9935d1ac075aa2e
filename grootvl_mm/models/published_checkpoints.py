"""Parameter names of the published checkpoints, turned into ours.

The published files hold the weights under ``model`` (and averaged ones under ``model_ema``), in the names of the
authors' classification code: ``patch_embed``, ``levels``, ``conv_head`` and ``head``.
"""

import re
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from typing import Any

from mmengine.logging import print_log
from torch import Tensor

# What a published file holds; of both, the first is taken.
WEIGHTS = ("model", "model_ema")
# What data-parallel training and larger models put in front of the names.
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
# Published with a leading axis for the scan direction or a trailing one for the state, both of length 1.
_EXTRA_AXIS = {".x_proj_weight": 0, ".dt_projs_weight": 0, ".dt_projs_bias": 0, ".A_logs": 1}


class CheckpointError(ValueError):
    """A checkpoint file that cannot be read, used or written; the message is one line for the user."""


def is_published(names: Iterable[str]) -> bool:
    """Whether these are names of the authors' code."""
    return any(name.startswith(("patch_embed.", "levels.")) for name in names)


def strip_prefixes(weights: Mapping[str, Any], prefixes: Sequence[str] = PREFIXES) -> dict[str, Any]:
    """Take ``module.`` and ``backbone.``, in this order, off the names.

    Raises:
        CheckpointError: Two names become the same.
    """
    stripped = {}
    for key, value in weights.items():
        name = _strip(key, prefixes)
        if name in stripped:
            raise CheckpointError(f"the weights hold {name!r} twice, with and without a prefix")
        stripped[name] = value
    return stripped


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a published file: what lies under ``model``, or else ``model_ema``, under the published names.

    Args:
        checkpoint: content of the file, or a bare state dict. What is not of the authors is given back as it is, but
            for ``model`` around it and ``module.`` of data-parallel training.
    """
    found = [name for name in WEIGHTS if isinstance(checkpoint.get(name), Mapping)]
    weights = dict(checkpoint[found[0]] if found else checkpoint)
    if len(found) > 1:
        print_log(
            f"The checkpoint also holds averaged weights ({found[1]!r}); those under {found[0]!r} are taken. For the "
            "others, convert it with tools/model_converters/grootv_to_mmpretrain.py.",
            "current",
        )
    published = is_published(_strip(key, PREFIXES) for key in weights)
    return strip_prefixes(weights, PREFIXES if published else PREFIXES[:1])


def convert_published(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Published weights as those of mmpretrain's ``ImageClassifier`` with our backbone and neck.

    Args:
        state_dict: published names to tensors, with or without ``module.`` and ``backbone.`` in front; may be the whole
            file with the weights under ``model``.

    Returns:
        New names (``backbone.*``, ``neck.*``, ``head.fc.*``) to tensors. Names that are not known stay as they are.
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
    """Turn, in place, a published classifier below ``prefix`` into mmpretrain's with our backbone and neck.

    Any other state dict stays as it is, but for ``model`` around it.

    Returns:
        Whether it is a published one.
    """
    weights = unwrap(_below(state_dict, prefix))
    published = is_published(weights)
    _replace(state_dict, prefix, convert_published(weights) if published else weights)
    return published


def rename_published_backbone(state_dict: MutableMapping[str, Any], prefix: str) -> bool:
    """Rename, in place, the published backbone's entries below ``prefix``; the published head's are dropped.

    Any other state dict stays as it is, but for ``model`` around it.

    Returns:
        Whether they were published ones.
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
    """Rename, in place, the published ``conv_head`` below ``prefix``; the rest of a published file is dropped.

    Any other state dict stays as it is, but for ``model`` around it.
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
            if value.ndim <= axis:
                raise CheckpointError(f"some weights have too few axes: {key!r} has the shape {tuple(value.shape)}")
            value = value.squeeze(axis)
    return _substitute(key, _BACKBONE_RENAMES), value


def _substitute(key: str, renames: tuple[tuple[re.Pattern, str], ...]) -> str:
    for pattern, replacement in renames:
        key = pattern.sub(replacement, key)
    return key
