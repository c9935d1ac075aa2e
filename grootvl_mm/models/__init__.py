"""GrootV for OpenMMLab. Needs torch and mmengine, but not mmcv."""

from grootvl_mm.models.grootv import GrootV
from grootvl_mm.models.necks import GrootVNeck
from grootvl_mm.models.tree_ssm import TreeSSM

__all__ = ["GrootV", "GrootVNeck", "TreeSSM"]
