"""Weights as the authors publish them."""

import re

import torch
from torch import Tensor

from grootvl_mm.models import GrootV, GrootVNeck
from tests.helpers.tool_runs import ROOT

REFERENCE = ROOT / "tests" / "models" / "data"
# The inverse of the conversion, written down a second time: ours to published, for the parts that are renamed.
RENAMES = (
    (r"^stem\.norm(\d)\.", r"patch_embed.norm\1.1."),
    (r"^stem\.", "patch_embed."),
    (r"^stages\.(\d)\.norm\.", r"levels.\1.norm.0."),
    (r"^stages\.(\d)\.downsample\.norm\.", r"levels.\1.downsample.norm.1."),
    (r"^stages\.", "levels."),
    (r"\.(norm[12])\.(weight|bias)$", r".\1.0.\2"),
    (r"\.mixer\.x_proj\.weight", ".TreeSSM.x_proj_weight"),
    (r"\.mixer\.dt_proj\.", ".TreeSSM.dt_projs_"),
    (r"\.mixer\.A_log$", ".TreeSSM.A_logs"),
    (r"\.mixer\.", ".TreeSSM."),
)


def publish(backbone: GrootV, neck: GrootVNeck | None = None) -> dict[str, Tensor]:
    """The weights under the published names and in the published shapes."""
    published = {}
    for name, value in backbone.state_dict().items():
        key = name
        if not name.startswith("stem.norm"):
            for pattern, replacement in RENAMES[1:]:
                key = re.sub(pattern, replacement, key)
        else:
            key = re.sub(*RENAMES[0], key)
        if "x_proj_weight" in key or "dt_projs" in key:
            value = value[None]
        published[key] = value[:, None] if "A_logs" in key else value
    if neck is not None:
        for name, value in neck.state_dict().items():
            published[name.replace("conv.", "conv_head.0.").replace("norm.", "conv_head.1.0.")] = value
        published["head.weight"] = torch.randn(5, neck.conv.out_channels)
        published["head.bias"] = torch.randn(5)
    return published
