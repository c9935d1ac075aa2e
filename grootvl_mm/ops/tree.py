"""The input-dependent spanning tree of an image (section 3.2 of the paper)."""

from typing import NamedTuple

import torch
from torch import Tensor

from grootvl_mm.ops import _library  # noqa: F401  defines torch.ops.grootvl
from grootvl_mm.ops._checks import check_choice, check_tensor
from grootvl_mm.ops._cuts import may_share, share_cut
from grootvl_mm.ops.reference import vertex_depth

METRICS = ("cosine", "euclidean", "manhattan")


class Tree(NamedTuple):
    """Rooted spanning trees of a batch, each with L vertices; for images, L = height * width in row-major order.

    Attributes:
        parent: (B, L) int32, the parent of each vertex; the root is its own parent.
        order: (B, L) int32, all vertices in topological order: each parent before its children.
    """

    parent: Tensor
    order: Tensor

    def edges(self) -> Tensor:
        """The tree edges, (B, L - 1, 2) int32, sorted; each has its lower vertex first."""
        batch, vertices = self.parent.shape
        vertex = torch.arange(vertices, dtype=torch.int32, device=self.parent.device)
        vertex = vertex.expand_as(self.parent)
        below_root = self.parent != vertex
        ends = torch.stack([torch.minimum(vertex, self.parent), torch.maximum(vertex, self.parent)], -1)
        ends = ends[below_root].view(batch, max(vertices - 1, 0), 2)
        key = ends[..., 0].long() * vertices + ends[..., 1]
        return ends.gather(1, key.argsort(dim=1).unsqueeze(-1).expand_as(ends))

    def depth(self) -> Tensor:
        """The number of edges from each vertex to the root, (B, L) int32."""
        return vertex_depth(self.parent).to(torch.int32)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Tree":
        """Copy the trees to a device."""
        return Tree(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


def grid_edge_weight(feature: Tensor, metric: str = "cosine", log: bool = False) -> Tensor:
    """Dissimilarity of neighbouring positions of a feature map (equation 2 of the paper).

    ``cosine`` is ``exp(-cos(f_u, f_v))`` with norms clamped to at least 1e-8, ``euclidean`` is
    ``exp(sum (f_u - f_v)^2)`` and ``manhattan`` is ``exp(sum |f_u - f_v|)``. Sums are accumulated in float32 (float64
    for float64 features). The result has no gradient and is always finite: overflow and NaN or infinite features give
    the largest float32.

    Args:
        feature: (B, C, H, W) float32, float64, float16 or bfloat16, any memory format; fastest in channels-last.
        metric: ``cosine``, ``euclidean`` or ``manhattan``.
        log: return the exponents, which order the edges like the weights and avoid the overflow of ``exp``.

    Returns:
        (B, E) float32, E = (H - 1) * W + H * (W - 1): first the vertical edges ``(v, v + W)``, then the horizontal
        edges ``(v, v + 1)``, each row by row.

    Raises:
        TypeError: ``feature`` is not a tensor or has an unsupported dtype.
        ValueError: ``feature`` is not 4-D, H or W is 0, or ``metric`` is unknown.
    """
    check_tensor("feature", feature, "(B, C, H, W)", 4)
    check_choice("metric", metric, METRICS)
    if feature.shape[2] < 1 or feature.shape[3] < 1:
        raise ValueError(f"feature must have H >= 1 and W >= 1, got shape {tuple(feature.shape)}")
    return torch.ops.grootvl.grid_edge_weight(feature, metric, log)


def grid_tree(edge_weight: Tensor, height: int, width: int, root: int = 0) -> Tree:
    """Minimum spanning trees of the 4-connected grid, rooted at one vertex (section 3.2 of the paper).

    Among equal weights, the edge with the lower index wins, as in Kruskal's algorithm with a stable sort. The tree is
    therefore unique and the same on every device.

    Args:
        edge_weight: (B, E) float32 in the order of :func:`grid_edge_weight`; any finite values.
        height: number of rows, at least 1.
        width: number of columns, at least 1.
        root: vertex index of the root, 0 <= root < height * width.

    Returns:
        The trees. ``parent`` is the same on every device; ``order`` may differ.

    Raises:
        TypeError: ``edge_weight`` is not a tensor or has an unsupported dtype.
        ValueError: ``edge_weight`` does not have shape (B, E), or the root is outside the grid.
        ValueError, RuntimeError: a weight is NaN or infinite (not checked on CUDA, which would need a synchronization).
    """
    check_tensor("edge_weight", edge_weight, "(B, E)", 2, (torch.float32,))
    if height < 1 or width < 1:
        raise ValueError(f"height and width must be at least 1, got {height} and {width}")
    num_edges = (height - 1) * width + height * (width - 1)
    if edge_weight.shape[1] != num_edges:
        raise ValueError(
            f"edge_weight must have {num_edges} columns for a {height} x {width} grid "
            f"((H - 1) * W + H * (W - 1)), got shape {tuple(edge_weight.shape)}"
        )
    if not 0 <= root < height * width:
        raise ValueError(f"root must be a vertex of 0..{height * width - 1}, got {root}")
    cut = None
    if may_share(edge_weight):
        parent, order, cut = torch.ops.grootvl.grid_tree_and_cut(edge_weight, height, width, root)
    else:
        parent, order = torch.ops.grootvl.grid_tree(edge_weight, height, width, root)
    tree = Tree(parent, order)
    share_cut(tree, cut)
    return tree
