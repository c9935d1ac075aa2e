"""What the trees of a model are and how far its scans reach, for tools that draw or measure them."""

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
