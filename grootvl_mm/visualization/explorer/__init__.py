"""An interactive page of a model's trees: a single HTML file that needs no server and no network."""

from grootvl_mm.visualization.explorer.blocks import ExplorerBlock, ExplorerTree, TreeFeatures, explorer_blocks
from grootvl_mm.visualization.explorer.overlays import Box, Overlay, make_overlays
from grootvl_mm.visualization.explorer.page import ExplorerImage, explorer_page

__all__ = [
    "Box",
    "ExplorerBlock",
    "ExplorerImage",
    "ExplorerTree",
    "Overlay",
    "TreeFeatures",
    "explorer_blocks",
    "explorer_page",
    "make_overlays",
]
