"""The operators of GrootV: edge weights, spanning trees, tree scans, layer norm and convolution. Needs torch only."""

from grootvl_mm.ops._library import extension_error
from grootvl_mm.ops.conv import depthwise_conv_silu
from grootvl_mm.ops.graph import graph_tree
from grootvl_mm.ops.norm import layer_norm, residual_layer_norm
from grootvl_mm.ops.scan import tree_scan, tree_selective_scan
from grootvl_mm.ops.sequence import sequence_edge_weight, sequence_edges
from grootvl_mm.ops.tree import Tree, grid_edge_weight, grid_tree

__all__ = [
    "Tree",
    "depthwise_conv_silu",
    "extension_error",
    "graph_tree",
    "grid_edge_weight",
    "grid_tree",
    "layer_norm",
    "residual_layer_norm",
    "sequence_edge_weight",
    "sequence_edges",
    "tree_scan",
    "tree_selective_scan",
]
