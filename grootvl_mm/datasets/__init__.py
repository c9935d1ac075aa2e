"""Transforms for the data pipelines of mmdet, mmseg and mmpretrain."""

from grootvl_mm.datasets.transforms import ToBGR

__all__ = ["ToBGR"]
