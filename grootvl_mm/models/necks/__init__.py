"""Necks that belong to GrootV."""

from grootvl_mm.models.necks.grootv_neck import GrootVNeck

__all__ = ["GrootVNeck"]
