"""Properties of trees: the order in which edges join, segments after cutting edges, affinities and paths."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grootvl_mm.layers.padding import Padding, map_padding
from grootvl_mm.models.tree_ssm import raster_path
from grootvl_mm.ops import Tree, grid_tree, tree_scan
from grootvl_mm.ops.reference import num_doublings, vertices_like
from grootvl_mm.visualization.recorder import TreeRecord

# Contributions are a row of the scan's matrix, which is a column of the matrix of the opposite direction.
_OPPOSITE = {"all": "all", "up": "down", "down": "up"}


def parent_edges(tree: Tree, height: int, width: int) -> Tensor:
    """The edge of the grid between each vertex and its parent.

    Args:
        tree: Trees of maps with L = height * width vertices.
        height: Rows of the map.
        width: Columns of the map.

    Returns:
        (B, L) int64 indices into edge weights (B, E), see :func:`grootvl_mm.ops.grid_edge_weight`; -1 for the root, and
        if the parent is not a neighbour, as between rows in a raster path.
    """
    vertex, parent = vertices_like(tree.parent), tree.parent.long()
    lower, higher = torch.minimum(vertex, parent), torch.maximum(vertex, parent)
    horizontal = (height - 1) * width + lower // width * (width - 1) + lower % width
    is_horizontal = (higher - lower == 1) & (higher % width != 0)
    return torch.where(higher - lower == width, lower, torch.where(is_horizontal, horizontal, -1))


def join_ranks(tree: Tree, edge_weight: Tensor, height: int, width: int) -> Tensor:
    """Rank the edge between each vertex and its parent by weight, the order in which Kruskal's algorithm adds them.

    Ties are broken by the index of the edge, as when building the tree. Edges outside the grid come last.

    Args:
        tree: Trees of maps with L = height * width vertices.
        edge_weight: (B, E) float32.
        height: Rows of the map.
        width: Columns of the map.

    Returns:
        (B, L) int64: 1 for the lightest edge to L - 1 for the heaviest; 0 for the root.
    """
    edge = parent_edges(tree, height, width)
    is_root = tree.parent == vertices_like(tree.parent)
    key = edge_weight.gather(1, edge.clamp(min=0)) if edge_weight.shape[1] else edge.float()
    key = key.masked_fill(edge < 0, torch.inf).masked_fill(is_root, -torch.inf)
    by_edge = edge.argsort(dim=1, stable=True)
    order = by_edge.gather(1, key.gather(1, by_edge).argsort(dim=1, stable=True))
    return torch.empty_like(order).scatter_(1, order, vertices_like(order))


def cut_segments(tree: Tree, edge_weight: Tensor, height: int, width: int, cuts: int) -> Tensor:
    """Split a tree into segments by cutting its heaviest edges, those that :func:`join_ranks` ranks highest.

    Args:
        tree: Trees of maps with L = height * width vertices.
        edge_weight: (B, E) float32.
        height: Rows of the map.
        width: Columns of the map.
        cuts: Number of edges to cut, 0 to L - 1.

    Returns:
        (B, L) int64, the segment of each vertex, 0 to ``cuts``, numbered in the order of their first vertices.

    Raises:
        ValueError: The tree has fewer edges.
    """
    vertices = height * width
    if not 0 <= cuts < vertices:
        raise ValueError(f"cuts must be 0 to {vertices - 1}, the edges of a {height}x{width} tree, got {cuts}")
    ranks, vertex = join_ranks(tree, edge_weight, height, width), vertices_like(tree.parent)
    leader = torch.where(ranks >= vertices - cuts, vertex, tree.parent.long())
    for _ in range(num_doublings(vertices)):
        leader = leader.gather(1, leader)
    first = torch.full_like(leader, vertices).scatter_reduce(1, leader, vertex, "amin").gather(1, leader)
    number = (first == vertex).cumsum(dim=1) - 1
    return number.gather(1, first)


def affinity(trees: Tree | Sequence[Tree], decay: Tensor, vertices: Sequence[int], propagation: str = "all") -> Tensor:
    """How much all positions contribute to given ones: the product of the decays on the path, averaged over channels.

    The scan is ``h_i = sum_j S(i, j) x_j``; this returns ``S(i, j)``, computed exactly with one scan per position i.

    Args:
        trees: One tree, or several whose scans are averaged, as for ``scan='cross'``.
        decay: (B, L, D) as in :class:`TreeRecord`, or its approximation (B, L, 1) by :func:`mean_decay`.
        vertices: N positions i, each 0 to L - 1.
        propagation: ``all``; ``up``: only positions below i in the tree contribute; ``down``: only those above.

    Returns:
        (B, N, L), with the dtype of the decays, in [0, 1] if the decays are; 1 for the position itself.

    Raises:
        IndexError: A position is outside the map.
    """
    trees = (trees,) if isinstance(trees, Tree) else tuple(trees)
    batch, length, _ = decay.shape
    result = decay.new_zeros(batch, len(vertices), length)
    for number, vertex in enumerate(vertices):
        if not 0 <= vertex < length:
            raise IndexError(f"vertices must be between 0 and {length - 1}, got {vertex}")
        one_hot = torch.zeros_like(decay)
        one_hot[:, vertex] = 1
        for tree in trees:
            result[:, number] += tree_scan(one_hot, decay, tree, _OPPOSITE[propagation]).mean(dim=2) / len(trees)
    return result


def mean_decay(decay: Tensor) -> Tensor:
    """The geometric mean of the decays over the channels, (B, L, D) to (B, L, 1).

    Its product along a path is the geometric mean of the channels' products, a lower bound of their mean.
    """
    return decay.log().mean(dim=2, keepdim=True).exp()


def path_between(tree: Tree, start: int, end: int, image: int = 0) -> list[int]:
    """The vertices on the path from ``start`` to ``end``, inclusive, in the tree of one image of the batch."""
    parent = tree.parent[image].tolist()
    ways = []
    for vertex in (start, end):
        way = [vertex]
        while parent[way[-1]] != way[-1]:
            way.append(parent[way[-1]])
        ways.append(way)
    up, down = ways
    while len(up) > 1 and len(down) > 1 and up[-2] == down[-2]:
        up.pop()
        down.pop()
    return up + down[-2::-1]


def compared_scans(record: TreeRecord) -> dict[str, tuple[Tree, ...]]:
    """The trees and paths of the paper's three scans on the map of a record, by name.

    ``tree`` is the minimum spanning tree of the record's edge weights, ``raster`` the path by rows, ``cross`` the paths
    by rows and by columns. If padding is ignored, it comes last in each of them.
    """
    height, width, device = record.height, record.width, record.decay.device
    batch = record.decay.shape[0]
    padding: Padding | None = None
    if record.valid_sizes is not None:
        padding = map_padding(record.valid_sizes, height, width)
    rows, columns = (
        raster_path(batch, height, width, record.root, by_columns, device, padding) for by_columns in (False, True)
    )
    root = 0 if record.root == "first" else height * width - 1
    return {
        "tree": (grid_tree(record.edge_weight, height, width, root),),
        "raster": (rows,),
        "cross": (rows, columns),
    }
