"""The forward operators as straight lines of PyTorch's own operators, for runtimes that have no others (ONNX).

Trees are usually built and scanned by loops whose length depends on the data. Here every loop has a fixed number of
rounds, which grows with the logarithm of the number of vertices, so that it can be unrolled into a graph:

- the tree edges by Boruvka's algorithm: in each round every component is joined to its nearest neighbour;
- the parents by a walk around the tree that takes each edge once in either direction, ranked by pointer doubling: the
  direction that comes first leads away from the root;
- the scans by pointer doubling: after k rounds each vertex has the sum over its 2^k nearest ancestors (down), or over
  the descendants that are so near (up).

Arguments and results are those of the operators of the same name, except for the order of a tree: these scans need
none, and what stands in its place is none. Weights are taken to be finite, and trees to be trees. The number of
vertices is fixed when the graph is made; the batch size need not be.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from grootvl_mm.ops import reference


def decomposition_table() -> dict[torch._ops.OpOverload, Callable]:
    """The operators and what they decompose into, for ``torch.export.ExportedProgram.run_decompositions``."""
    functions = (grid_edge_weight, grid_tree, tree_scan, tree_selective_scan)
    functions += (reference.layer_norm, reference.residual_layer_norm, reference.depthwise_conv_silu)
    return {getattr(torch.ops.grootvl, function.__name__).default: function for function in functions}


def grid_edge_weight(feature: Tensor, metric: str, log: bool) -> Tensor:
    """(B, C, H, W) to (B, E) float32."""
    return reference.edge_weight(_float32(feature), metric, log)


def grid_tree(edge_weight: Tensor, height: int, width: int, root: int) -> tuple[Tensor, Tensor]:
    """(B, E) to ``parent`` (B, L) int32, and the vertices as they are numbered in the place of the order."""
    parent = _root_tree(_spanning_tree(edge_weight, height, width), height, width, root).to(torch.int32)
    return parent, _vertices(parent).to(torch.int32)


def tree_scan(x: Tensor, decay: Tensor, parent: Tensor, order: Tensor, propagation: str) -> Tensor:
    """(B, L, D) to (B, L, D)."""
    ancestor = parent.long()
    is_root = (ancestor == _vertices(ancestor)).unsqueeze(-1)
    decay = _float32(decay).masked_fill(is_root, 0.0)
    jumps = []  # for k = 0, 1, ...: the ancestor 2^k further up, and the product of the decays on the way
    weight = decay
    for _ in range(_num_doublings(parent.shape[1])):
        index = ancestor.unsqueeze(-1).expand_as(x)
        jumps.append((index, weight))
        weight = weight * weight.gather(1, index)
        ancestor = ancestor.gather(1, ancestor)
    h = _float32(x)
    if propagation != "down":
        for index, weight in jumps:
            h = h.scatter_add(1, index, weight * h)
    if propagation == "all":
        h = h - decay * (decay * h)
    if propagation != "up":
        for index, weight in jumps:
            h = h + weight * h.gather(1, index)
    return h.to(x.dtype)


def tree_selective_scan(x: Tensor, *args: Tensor | float | str) -> Tensor:
    """(B, L, D) to (B, L, D)."""
    *values, parent, order, eps, propagation = args

    def scan(value: Tensor, decay: Tensor) -> Tensor:
        return tree_scan(value, decay, parent, order, propagation)

    return reference.selective_scan(scan, *(_float32(value) for value in (x, *values)), eps).to(x.dtype)


def _float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _num_doublings(reach: int) -> int:
    """How often 1 has to be doubled to become ``reach`` or more."""
    return (int(reach) - 1).bit_length()


def _vertices(like: Tensor) -> Tensor:
    """The numbers of the vertices, (B, L) int64."""
    return torch.arange(like.shape[1], device=like.device).repeat(like.shape[0], 1)


def _spanning_tree(edge_weight: Tensor, height: int, width: int) -> Tensor:
    """Marks the tree edges: (B, E) bool. Among equal weights the lower edge index wins."""
    num_edges = edge_weight.shape[1]
    lower, higher = reference.grid_edges(height, width, edge_weight.device)
    edge = torch.arange(num_edges, device=edge_weight.device)
    itself = torch.arange(height * width, device=edge_weight.device).repeat(edge_weight.shape[0], 1)
    component = itself
    in_tree = torch.zeros_like(edge_weight, dtype=torch.bool)
    for done in range(_num_doublings(height * width)):
        ends = component.index_select(1, lower), component.index_select(1, higher)
        crossing = ends[0] != ends[1]
        # The least weight of each component, then the least edge of that weight.
        least = torch.full_like(itself, torch.inf, dtype=edge_weight.dtype)
        for end in ends:
            least = least.scatter_reduce(1, end, torch.where(crossing, edge_weight, torch.inf), "amin")
        chosen = torch.full_like(itself, num_edges)
        for end in ends:
            candidate = crossing & (edge_weight == least.gather(1, end))
            chosen = chosen.scatter_reduce(1, end, torch.where(candidate, edge, num_edges), "amin")
        for end in ends:
            in_tree = in_tree | (chosen.gather(1, end) == edge)
        index = chosen.clamp(max=num_edges - 1)
        neighbour = ends[0].gather(1, index) + ends[1].gather(1, index) - itself
        neighbour = torch.where(chosen < num_edges, neighbour, itself)
        # Two components that choose each other: the lower one leads.
        mutual = (neighbour.gather(1, neighbour) == itself) & (itself < neighbour)
        leader = torch.where(mutual, itself, neighbour)
        for _ in range(_num_doublings(height * width >> done)):
            leader = leader.gather(1, leader)
        component = leader.gather(1, component)
    return in_tree


def _root_tree(in_tree: Tensor, height: int, width: int, root: int) -> Tensor:
    """The parents (B, L) int64 of the trees with the marked edges."""
    batch, vertices, num_vertical = in_tree.shape[0], height * width, (height - 1) * width
    vertical = in_tree[:, :num_vertical].view(batch, height - 1, width)
    horizontal = in_tree[:, num_vertical:].view(batch, height, width - 1)
    no_row, no_column = in_tree.new_zeros(batch, 1, width), in_tree.new_zeros(batch, height, 1)
    # Whether the edge to the south, west, north, east of each vertex is in the tree: clockwise, the opposite direction
    # is two further. (4, B, L)
    linked = [
        torch.cat([vertical, no_row], 1).flatten(1),
        torch.cat([no_column, horizontal], 2).flatten(1),
        torch.cat([no_row, vertical], 1).flatten(1),
        torch.cat([horizontal, no_column], 2).flatten(1),
    ]
    steps = (width, -1, -width, 1)
    vertex = torch.arange(vertices, device=in_tree.device)
    across = [(vertex + step).clamp(0, vertices - 1) for step in steps]

    # The walk around the tree as the next arc of each arc. Arc ``direction * L + vertex`` leaves the vertex; it is
    # followed by the next one, clockwise, that leaves where it leads to.
    def leaving(first: int) -> Tensor:
        """The first arc that leaves each vertex, looking around clockwise from a direction."""
        arc = vertex + vertices * ((first + 3) % 4)
        for turn in (2, 1, 0):
            direction = (first + turn) % 4
            arc = torch.where(linked[direction], vertex + vertices * direction, arc)
        return arc

    arcs = torch.arange(4 * vertices, device=in_tree.device)
    following = torch.cat([leaving(d + 3).index_select(1, across[d]) for d in range(4)], 1)
    is_last = following == leaving(0)[:, root : root + 1]
    following = torch.where(torch.cat(linked, 1) & ~is_last, following, arcs)
    remaining = (following != arcs).long()
    for _ in range(_num_doublings(2 * vertices)):
        remaining = remaining + remaining.gather(1, following)
        following = following.gather(1, following)

    remaining = remaining.split(vertices, 1)
    parent = vertex.expand(batch, -1)
    for d, step in enumerate(steps):
        is_second = remaining[d] < remaining[(d + 2) % 4].index_select(1, across[d])
        parent = parent + step * (linked[d] & is_second)
    return parent
