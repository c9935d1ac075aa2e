"""Transforms for the data pipelines of the hosts."""

from grootvl_mm.datasets.transforms import ToBGR

__all__ = ["ToBGR"]
