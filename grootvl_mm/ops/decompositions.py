"""Decompositions of the forward operators into standard PyTorch operators, for runtimes without custom ones (ONNX).

The number of rounds of every loop is independent of the data and grows with the logarithm of the number of vertices, so
that loops can be unrolled into a graph:

- Tree edges: Boruvka's algorithm, which joins every component to its nearest neighbour in each round.
- Parents: an Euler tour of the tree, ranked by pointer doubling. Of the two arcs of an edge, the first one leads away
  from the root.
- Scans: pointer doubling. After k rounds, each vertex has the sum over its 2^k nearest ancestors (down), or over its
  descendants within that distance (up).

Arguments and results are those of the operators of the same name, except that the ``order`` of a tree is a placeholder,
which these scans do not use. Inputs are not validated. The number of vertices is fixed at export; the batch size may be
dynamic.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from grootvl_mm.ops import reference, reference_neighbours


def decomposition_table() -> dict[torch._ops.OpOverload, Callable]:
    """The decomposition of each operator, for ``torch.export.ExportedProgram.run_decompositions``."""
    functions = (grid_edge_weight, grid_tree, tree_scan, tree_selective_scan)
    functions += (
        reference_neighbours.layer_norm,
        reference_neighbours.residual_layer_norm,
        reference_neighbours.depthwise_conv_silu,
    )
    return {getattr(torch.ops.grootvl, function.__name__).default: function for function in functions}


def grid_edge_weight(feature: Tensor, metric: str, log: bool) -> Tensor:
    """(B, C, H, W) to (B, E) float32."""
    return reference.edge_weight(_float32(feature), metric, log)


def grid_tree(edge_weight: Tensor, height: int, width: int, root: int) -> tuple[Tensor, Tensor]:
    """(B, E) to ``parent`` (B, L) int32, and a placeholder for ``order``."""
    edges = reference.grid_edges(height, width, edge_weight.device)
    in_tree = reference.spanning_tree(edge_weight, *edges, height * width)
    parent = reference.root_tree(in_tree, height, width, root).to(torch.int32)
    return parent, reference.vertices_like(parent).to(torch.int32)


def tree_scan(
    x: Tensor, decay: Tensor, parent: Tensor, order: Tensor, propagation: str, cut: Tensor | None = None
) -> Tensor:
    """(B, L, D) to (B, L, D)."""
    ancestor = parent.long()
    is_root = (ancestor == reference.vertices_like(ancestor)).unsqueeze(-1)
    decay = _float32(decay).masked_fill(is_root, 0.0)
    jumps = []  # for k = 0, 1, ...: the ancestor 2^k edges up, and the product of the decays on the path to it
    weight = decay
    for _ in range(reference.num_doublings(parent.shape[1])):
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
    *values, parent, order, eps, propagation, _ = reference.with_cut(args)

    def scan(value: Tensor, decay: Tensor) -> Tensor:
        return tree_scan(value, decay, parent, order, propagation)

    inputs = reference.SelectiveScanInputs(*(_float32(value) for value in (x, *values)))
    return reference.plain_selective_scan(scan, inputs, eps).to(x.dtype)


def _float32(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
