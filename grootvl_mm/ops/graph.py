"""Spanning trees of any connected graph: 8-connected images, volumes, sequences."""

import torch
from torch import Tensor

from grootvl_mm.ops import _library  # noqa: F401  defines torch.ops.grootvl
from grootvl_mm.ops._checks import check_same_device, check_tensor, unwatched
from grootvl_mm.ops._cuts import share_cut
from grootvl_mm.ops.tree import Tree

_INTEGERS = (torch.int64, torch.int32)


def graph_tree(edge_index: Tensor, edge_weight: Tensor, num_vertices: int, root: int | Tensor = 0) -> Tree:
    """Minimum spanning trees of a connected graph with shared edges and one set of edge weights per batch item.

    Among equal weights, the edge with the lower index wins, as in Kruskal's algorithm with a stable sort. The trees are
    therefore unique and the same on every device; for the edges of a grid they equal those of :func:`grid_tree`. An
    infinite weight is larger than any other: such edges join only what edges of finite weight do not connect.
    Self-loops are never in the tree, nor is more than one of several parallel edges. The trees are always computed on
    the CPU: CUDA tensors are copied to the host and back, which synchronizes.

    Args:
        edge_index: (2, E) int64 or int32, both ends of each undirected edge, in either order.
        edge_weight: (B, E) float32, float64, float16 or bfloat16, on the same device; infinite is allowed, NaN is not.
        num_vertices: number of vertices L, at least 1.
        root: root of all trees, 0 <= root < L, or one root per tree, (B,) int64 or int32.

    Returns:
        The trees, with L vertices each. ``parent`` is the same on every device; ``order`` may differ.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: shapes or devices do not match, a vertex is outside 0..L-1, a weight is NaN, or the graph is not
            connected (not checked for an empty batch).
    """
    roots = _check_graph(edge_index, edge_weight, num_vertices, root)
    tree = Tree(*torch.ops.grootvl.graph_tree(edge_index.long(), edge_weight, num_vertices, roots))
    share_cut(tree)
    return tree


@unwatched
def _check_graph(edge_index: Tensor, edge_weight: Tensor, num_vertices: int, root: int | Tensor) -> Tensor:
    """Check the arguments; return the root of each tree, (B,) int64."""
    check_tensor("edge_index", edge_index, "(2, E)", 2, _INTEGERS)
    check_tensor("edge_weight", edge_weight, "(B, E)", 2)
    if edge_index.shape[0] != 2:
        raise ValueError(f"edge_index must have shape (2, E), got {tuple(edge_index.shape)}")
    if edge_weight.shape[1] != edge_index.shape[1]:
        raise ValueError(
            f"edge_weight must have a column for each of the {edge_index.shape[1]} edges of edge_index, "
            f"got shape {tuple(edge_weight.shape)}"
        )
    if num_vertices < 1:
        raise ValueError(f"num_vertices must be at least 1, got {num_vertices}")
    batch = edge_weight.shape[0]
    if not isinstance(root, Tensor):
        if not 0 <= root < num_vertices:
            raise ValueError(f"root must be a vertex of 0..{num_vertices - 1}, got {root}")
        root = torch.full((batch,), root, device=edge_weight.device)
    check_tensor("root", root, "(B,)", 1, _INTEGERS)
    if root.shape[0] != batch:
        raise ValueError(f"root must have a vertex for each of the {batch} trees, got shape {tuple(root.shape)}")
    check_same_device(edge_index=edge_index, edge_weight=edge_weight, root=root)
    return root.long()
