"""The operators of GrootV: edge weights, spanning trees and scans along them. Needs nothing but torch."""

from grootvl_mm.ops._library import extension_error
from grootvl_mm.ops.scan import tree_scan, tree_selective_scan
from grootvl_mm.ops.tree import Tree, grid_edge_weight, grid_tree

__all__ = ["Tree", "extension_error", "grid_edge_weight", "grid_tree", "tree_scan", "tree_selective_scan"]
