"""What follows from trees: which edges join last, what remains when they are cut, and how far values travel."""

from collections.abc import Sequence

import torch
from torch import Tensor

from grootvl_mm.layers.padding import Padding, map_padding
from grootvl_mm.models.tree_ssm import raster_path
from grootvl_mm.ops import Tree, grid_tree, tree_scan
from grootvl_mm.ops.reference import num_doublings, vertices_like
from grootvl_mm.visualization.recorder import TreeRecord

# A contribution is a row of the scan's matrix, which is a column of that of the opposite direction.
_OPPOSITE = {"all": "all", "up": "down", "down": "up"}


def parent_edges(tree: Tree, height: int, width: int) -> Tensor:
    """The edge of the grid between each vertex and its parent.

    Args:
        tree: of maps with L = height * width vertices.
        height: rows of the map.
        width: columns of the map.

    Returns:
        (B, L) int64 indices into edge weights (B, E), see :func:`grootvl_mm.ops.grid_edge_weight`; -1 for the root, and
        where the parent is no neighbour, as between the end of a row and the next in a path by rows.
    """
    vertex, parent = vertices_like(tree.parent), tree.parent.long()
    lower, higher = torch.minimum(vertex, parent), torch.maximum(vertex, parent)
    horizontal = (height - 1) * width + lower // width * (width - 1) + lower % width
    is_horizontal = (higher - lower == 1) & (higher % width != 0)
    return torch.where(higher - lower == width, lower, torch.where(is_horizontal, horizontal, -1))


def join_ranks(tree: Tree, edge_weight: Tensor, height: int, width: int) -> Tensor:
    """When the edge between each vertex and its parent joins the tree, if edges join in the order of their weights.

    Among equal weights the lower edge is first, as in the tree itself. Edges that are not of the grid come last.

    Args:
        tree: of maps with L = height * width vertices.
        edge_weight: (B, E) float32.
        height: rows of the map.
        width: columns of the map.

    Returns:
        (B, L) int64: from 1 for the edge that joins first to L - 1 for that which joins last; 0 for the root.
    """
    edge = parent_edges(tree, height, width)
    is_root = tree.parent == vertices_like(tree.parent)
    key = edge_weight.gather(1, edge.clamp(min=0)) if edge_weight.shape[1] else edge.float()
    key = key.masked_fill(edge < 0, torch.inf).masked_fill(is_root, -torch.inf)
    by_edge = edge.argsort(dim=1, stable=True)
    order = by_edge.gather(1, key.gather(1, by_edge).argsort(dim=1, stable=True))
    return torch.empty_like(order).scatter_(1, order, vertices_like(order))


def cut_segments(tree: Tree, edge_weight: Tensor, height: int, width: int, cuts: int) -> Tensor:
    """The parts of a tree without its heaviest edges, those that :func:`join_ranks` joins last.

    Args:
        tree: of maps with L = height * width vertices.
        edge_weight: (B, E) float32.
        height: rows of the map.
        width: columns of the map.
        cuts: number of edges to cut, 0 to L - 1.

    Returns:
        (B, L) int64, the segment of each vertex, 0 to ``cuts``, numbered by their first vertices.

    Raises:
        ValueError: the tree has not that many edges.
    """
    vertices = height * width
    if not 0 <= cuts < vertices:
        raise ValueError(f"cuts must be 0 to {vertices - 1}, the edges of a tree of {height}x{width}, got {cuts}")
    ranks, vertex = join_ranks(tree, edge_weight, height, width), vertices_like(tree.parent)
    leader = torch.where(ranks >= vertices - cuts, vertex, tree.parent.long())
    for _ in range(num_doublings(vertices)):
        leader = leader.gather(1, leader)
    first = torch.full_like(leader, vertices).scatter_reduce(1, leader, vertex, "amin").gather(1, leader)
    number = (first == vertex).cumsum(dim=1) - 1
    return number.gather(1, first)


def affinity(trees: Tree | Sequence[Tree], decay: Tensor, vertices: Sequence[int], propagation: str = "all") -> Tensor:
    """How much each position contributes to some: the product of the decays on the path, mean over the channels.

    Exact, by one scan for each position: ``h_i = sum_j S(i, j) x_j``, and this is ``S(i, j)``.

    Args:
        trees: one, or several whose scans are averaged, as those of ``scan='cross'``.
        decay: (B, L, D) as in :class:`TreeRecord`; (B, L, 1) of :func:`mean_decay` for the approximation by it.
        vertices: N positions i, each 0 to L - 1.
        propagation: ``all``; with ``up`` only what is below a position contributes, with ``down`` only what is above.

    Returns:
        (B, N, L), of the dtype of the decays, in [0, 1] where they are; the position itself has 1.

    Raises:
        IndexError: a position outside of the map.
    """
    trees = (trees,) if isinstance(trees, Tree) else tuple(trees)
    batch, length, _ = decay.shape
    result = decay.new_zeros(batch, len(vertices), length)
    for number, vertex in enumerate(vertices):
        if not 0 <= vertex < length:
            raise IndexError(f"vertices must be within 0..{length - 1}, got {vertex}")
        one_hot = torch.zeros_like(decay)
        one_hot[:, vertex] = 1
        for tree in trees:
            result[:, number] += tree_scan(one_hot, decay, tree, _OPPOSITE[propagation]).mean(dim=2) / len(trees)
    return result


def mean_decay(decay: Tensor) -> Tensor:
    """The geometric mean over the channels: (B, L, D) decays to (B, L, 1).

    Products of these along a path are the geometric mean of the channels' products, not above their mean.
    """
    return decay.log().mean(dim=2, keepdim=True).exp()


def path_between(tree: Tree, start: int, end: int, image: int = 0) -> list[int]:
    """The vertices on the way from ``start`` to ``end``, both included, in the tree of one image of the batch."""
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
    """What the three scans of the paper would go along in the place of what a layer goes along, by their names.

    ``tree`` is the minimum spanning tree of the record's edge weights, ``raster`` the path by rows, ``cross`` the paths
    by rows and by columns. What padding is ignored for comes last in each of them.
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
