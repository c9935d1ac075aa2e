"""Recording and analysis of the trees of a model, and of the reach of its scans."""

from grootvl_mm.visualization.paths import (
    affinity,
    compared_scans,
    cut_segments,
    join_ranks,
    mean_decay,
    parent_edges,
    path_between,
)
from grootvl_mm.visualization.recorder import TreeRecord, find_backbone, record_trees

__all__ = [
    "TreeRecord",
    "affinity",
    "compared_scans",
    "cut_segments",
    "find_backbone",
    "join_ranks",
    "mean_decay",
    "parent_edges",
    "path_between",
    "record_trees",
]
