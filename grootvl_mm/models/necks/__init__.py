"""Necks for GrootV."""

from grootvl_mm.models.necks.grootv_neck import GrootVNeck

__all__ = ["GrootVNeck"]
