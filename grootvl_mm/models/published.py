"""Parameter names of the published checkpoints, turned into ours.

The published files hold the weights under ``model`` (and averaged ones under ``model_ema``), without a prefix, in the
names of the authors' classification code: ``patch_embed``, ``levels``, ``conv_head`` and ``head``.
"""

import re
from collections.abc import Mapping, MutableMapping
from typing import Any

from torch import Tensor

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


def is_published(state_dict: Mapping[str, Any], prefix: str = "") -> bool:
    """Whether the names below ``prefix`` are those of the authors' code."""
    return any(key.startswith((f"{prefix}patch_embed.", f"{prefix}levels.")) for key in state_dict)


def convert_published(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published weights as those of mmpretrain's ``ImageClassifier`` with our backbone and neck.

    Args:
        state_dict: published names to tensors, with or without ``module.`` in front; may be the whole file with the
            weights under ``model``.

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


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a published file: what lies under ``model``, without ``module.`` of data-parallel training."""
    weights = checkpoint.get("model", checkpoint)
    return {key.removeprefix("module."): value for key, value in weights.items()}


def rename_published_backbone(state_dict: MutableMapping[str, Any], prefix: str) -> None:
    """Rename, in place, the published backbone's entries below ``prefix``; the published head's are dropped.

    Any other state dict stays as it is.
    """
    _unwrap_in_place(state_dict, prefix)
    if not is_published(state_dict, prefix):
        return
    for key in [key for key in state_dict if key.startswith(prefix)]:
        value = state_dict.pop(key)
        if not key.startswith((f"{prefix}conv_head.", f"{prefix}head.")):
            name, value = _rename_backbone(key[len(prefix) :], value)
            state_dict[prefix + name] = value


def rename_published_neck(state_dict: MutableMapping[str, Any], prefix: str) -> None:
    """Rename, in place, the published ``conv_head`` below ``prefix``; the rest of a published file is dropped.

    Any other state dict stays as it is.
    """
    _unwrap_in_place(state_dict, prefix)
    if not any(key.startswith(f"{prefix}conv_head.") for key in state_dict):
        return
    for key in [key for key in state_dict if key.startswith(prefix)]:
        value = state_dict.pop(key)
        if key.startswith(f"{prefix}conv_head."):
            state_dict[prefix + _substitute(key[len(prefix) :], _NECK_RENAMES)] = value


def _unwrap_in_place(state_dict: MutableMapping[str, Any], prefix: str) -> None:
    if not prefix and isinstance(state_dict.get("model"), Mapping):
        weights = unwrap(state_dict)
        state_dict.clear()
        state_dict.update(weights)


def _rename_backbone(key: str, value: Tensor) -> tuple[str, Tensor]:
    for suffix, axis in _EXTRA_AXIS.items():
        if key.endswith(suffix):
            value = value.squeeze(axis)
    return _substitute(key, _BACKBONE_RENAMES), value


def _substitute(key: str, renames: tuple[tuple[re.Pattern, str], ...]) -> str:
    for pattern, replacement in renames:
        key = pattern.sub(replacement, key)
    return key
