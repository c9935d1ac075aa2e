"""The operators in plain PyTorch: oracle for tests and fallback without the extension.

A function with the name of an operator ``torch.ops.grootvl.<name>`` has the same arguments and results; its type hints
are the schema of the operator. The functions are written for clarity and process trees level by level, so they are
slow. Shapes: ``B`` batch, ``C`` or ``D`` channels, ``L = height * width`` vertices in row-major order, ``E`` edges.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grootvl_mm.ops._compat import enable_autograd, is_transformed


def grid_edges(height: int, width: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Both ends of every edge of the 4-connected grid, in the order of edge indices, which break ties.

    First all vertical edges ``(v, v + width)`` row by row, then all horizontal edges ``(v, v + 1)`` row by row.

    Returns:
        Two int64 tensors (E,): the lower and the higher vertex index of each edge.
    """
    vertex = torch.arange(height * width, device=device).view(height, width)
    lower = torch.cat([vertex[:-1].flatten(), vertex[:, :-1].flatten()])
    higher = torch.cat([vertex[1:].flatten(), vertex[:, 1:].flatten()])
    return lower, higher


def grid_edge_weight(feature: Tensor, metric: str, log: bool) -> Tensor:
    """Dissimilarity of neighbouring positions: (B, C, H, W) to (B, E) float32.

    Sums are accumulated in float64, so that equal features get equal weights at any position. Overflow and NaN are
    replaced by the largest float32.
    """
    return edge_weight(feature.to(torch.float64), metric, log)


def edge_weight(feature: Tensor, metric: str, log: bool) -> Tensor:
    """Like :func:`grid_edge_weight`, but accumulated in the dtype of the feature."""
    channels_last = feature.permute(0, 2, 3, 1)
    pairs = (
        (channels_last[:, :-1], channels_last[:, 1:]),
        (channels_last[:, :, :-1], channels_last[:, :, 1:]),
    )
    exponents = [_METRICS[metric](lower, higher).flatten(1) for lower, higher in pairs]
    exponent = torch.cat(exponents, dim=1)
    weight = (exponent if log else exponent.exp()).to(torch.float32)
    largest = torch.finfo(torch.float32).max
    return torch.where(weight.isfinite(), weight, largest)


_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # Not torch.cosine_similarity, which works in place and cannot be decomposed.
    "cosine": lambda a, b: -(F.normalize(a, dim=-1, eps=1e-8) * F.normalize(b, dim=-1, eps=1e-8)).sum(-1),
    "euclidean": lambda a, b: (a - b).square().sum(-1),
    "manhattan": lambda a, b: (a - b).abs().sum(-1),
}


def grid_tree(edge_weight: Tensor, height: int, width: int, root: int) -> tuple[Tensor, Tensor]:
    """Minimum spanning tree of the grid, rooted: (B, E) to ``parent`` and ``order``, both (B, L) int32.

    Boruvka's algorithm on all images at once; ties go to the lower edge index.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    if not edge_weight.isfinite().all():
        bad = int((~edge_weight.isfinite()).sum())
        raise ValueError(f"edge_weight must be finite, got {bad} NaN or infinite of {edge_weight.numel()} values")
    in_tree = spanning_tree(edge_weight, *grid_edges(height, width, edge_weight.device), height * width)
    return _with_order(root_tree(in_tree, height, width, root))


def _with_order(parent: Tensor) -> tuple[Tensor, Tensor]:
    """``parent`` and ``order`` of the trees with these parents, both (B, L) int32."""
    return parent.to(torch.int32), vertex_depth(parent).argsort(dim=1, stable=True).to(torch.int32)


def num_doublings(reach: int) -> int:
    """The number of doublings after which 1 is at least ``reach``."""
    return (int(reach) - 1).bit_length()


def vertices_like(like: Tensor) -> Tensor:
    """The index of each vertex, (B, L) int64."""
    return torch.arange(like.shape[1], device=like.device).repeat(like.shape[0], 1)


def graph_tree(edge_index: Tensor, edge_weight: Tensor, num_vertices: int, root: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum spanning trees of a graph, rooted: (2, E) int64, (B, E) and (B,) int64 to two (B, L) int32.

    Raises:
        ValueError: a weight is NaN, a vertex does not exist, or the graph is not connected.
    """
    for name, vertices in (("edge_index", edge_index), ("root", root)):
        outside = vertices[(vertices < 0) | (vertices >= num_vertices)]
        if len(outside):
            raise ValueError(f"{name} must name vertices of 0..{num_vertices - 1}, got {int(outside[0])}")
    if edge_weight.isnan().any():
        bad = int(edge_weight.isnan().sum())
        raise ValueError(f"edge_weight must not be NaN, got {bad} NaN of {edge_weight.numel()} values")
    in_tree = spanning_tree(accumulated(edge_weight), *edge_index, num_vertices)
    parent = root_graph(in_tree, *edge_index, num_vertices, root)
    unreached = (parent < 0).nonzero()
    if len(unreached):
        image, vertex = unreached[0].tolist()
        raise ValueError(
            f"the graph must be connected, got {num_vertices - int(in_tree[image].sum())} components of "
            f"{num_vertices} vertices; no path leads from vertex {int(root[image])} to vertex {vertex}"
        )
    return _with_order(parent)


def root_graph(in_tree: Tensor, lower: Tensor, higher: Tensor, num_vertices: int, root: Tensor) -> Tensor:
    """The parents (B, L) int64 in the trees of the marked edges, -1 for vertices not connected to the root."""
    parent = torch.full((len(in_tree), num_vertices), -1, device=in_tree.device)
    parent.scatter_(1, root.unsqueeze(1), root.unsqueeze(1))
    while True:
        reached = parent >= 0
        is_above = reached.index_select(1, lower)
        image, edge = (in_tree & (is_above != reached.index_select(1, higher))).nonzero(as_tuple=True)
        if not len(image):
            return parent
        is_above = is_above[image, edge]
        parent[image, torch.where(is_above, higher[edge], lower[edge])] = torch.where(
            is_above, lower[edge], higher[edge]
        )


def spanning_tree(edge_weight: Tensor, lower: Tensor, higher: Tensor, num_vertices: int) -> Tensor:
    """Mark the edges of the minimum spanning trees, (B, E) bool; ties go to the lower edge index."""
    num_edges = edge_weight.shape[1]
    edge = torch.arange(num_edges, device=edge_weight.device)
    itself = torch.arange(num_vertices, device=edge_weight.device).repeat(edge_weight.shape[0], 1)
    component = itself
    in_tree = torch.zeros_like(edge_weight, dtype=torch.bool)
    for done in range(num_doublings(num_vertices) if num_edges else 0):
        ends = component.index_select(1, lower), component.index_select(1, higher)
        crossing = ends[0] != ends[1]
        # The least weight at each component, then the lowest edge index of that weight.
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
        # If two components chose each other, the lower one becomes the leader.
        mutual = (neighbour.gather(1, neighbour) == itself) & (itself < neighbour)
        leader = torch.where(mutual, itself, neighbour)
        for _ in range(num_doublings(num_vertices >> done)):
            leader = leader.gather(1, leader)
        component = leader.gather(1, component)
    return in_tree


def root_tree(in_tree: Tensor, height: int, width: int, root: int) -> Tensor:
    """The parents (B, L) int64 in the trees of the marked edges, by an Euler tour."""
    batch, vertices, num_vertical = in_tree.shape[0], height * width, (height - 1) * width
    vertical = in_tree[:, :num_vertical].view(batch, height - 1, width)
    horizontal = in_tree[:, num_vertical:].view(batch, height, width - 1)
    no_row, no_column = in_tree.new_zeros(batch, 1, width), in_tree.new_zeros(batch, height, 1)
    # Whether the edge to the south, west, north, east of each vertex is in the tree, (4, B, L). The directions are
    # clockwise, so that d and d + 2 are opposite.
    linked = [
        torch.cat([vertical, no_row], 1).flatten(1),
        torch.cat([no_column, horizontal], 2).flatten(1),
        torch.cat([no_row, vertical], 1).flatten(1),
        torch.cat([horizontal, no_column], 2).flatten(1),
    ]
    steps = (width, -1, -width, 1)
    vertex = torch.arange(vertices, device=in_tree.device)
    across = [(vertex + step).clamp(0, vertices - 1) for step in steps]

    # The Euler tour as the next arc of each arc. Arc ``direction * L + vertex`` leaves the vertex; the next one leaves
    # the vertex at its other end in the next direction clockwise that has an edge.
    def leaving(first: int) -> Tensor:
        """The first arc that leaves each vertex, clockwise from a direction."""
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
    for _ in range(num_doublings(2 * vertices)):
        remaining = remaining + remaining.gather(1, following)
        following = following.gather(1, following)

    remaining = remaining.split(vertices, 1)
    parent = vertex.expand(batch, -1)
    for d, step in enumerate(steps):
        is_second = remaining[d] < remaining[(d + 2) % 4].index_select(1, across[d])
        parent = parent + step * (linked[d] & is_second)
    return parent


def vertex_depth(parent: Tensor) -> Tensor:
    """The number of edges from each vertex to the root, by pointer doubling: (B, L) integers to (B, L) int64."""
    ancestor = parent.long()
    depth = (ancestor != torch.arange(ancestor.shape[1], device=ancestor.device)).long()
    while True:
        further = depth.gather(1, ancestor)
        if not further.any():
            return depth
        depth = depth + further
        ancestor = ancestor.gather(1, ancestor)


class _Levels:
    """Up and down passes over the tree, one level at a time, on flattened (B * L, D) rows."""

    def __init__(self, parent: Tensor, decay: Tensor) -> None:
        batch, vertices = parent.shape
        offset = torch.arange(batch, device=parent.device).unsqueeze(1) * vertices
        depth = vertex_depth(parent).flatten()
        sizes = torch.bincount(depth).tolist() if depth.numel() else []
        self.parent = (parent.long() + offset).flatten()
        self.below_root = depth.argsort(stable=True).split(sizes)[1:] if sizes else ()
        self.decay = decay.flatten(0, 1)

    def up(self, x: Tensor) -> Tensor:
        """``u_v = x_v + sum over children c of a_c u_c``."""
        u = x.clone()
        for level in reversed(self.below_root):
            u.index_add_(0, self.parent[level], self.decay[level] * u[level])
        return u

    def down(self, x: Tensor) -> Tensor:
        """``h_v = x_v + a_v h_parent(v)``."""
        h = x.clone()
        for level in self.below_root:
            h[level] += self.decay[level] * h[self.parent[level]]
        return h

    def down_after_up(self, u: Tensor) -> Tensor:
        """``h_v = u_v + a_v (h_parent(v) - a_v u_v)``: sums over all vertices, not only over descendants."""
        h = u.clone()
        for level in self.below_root:
            decay = self.decay[level]
            h[level] += decay * (h[self.parent[level]] - decay * u[level])
        return h


def tree_scan(
    x: Tensor, decay: Tensor, parent: Tensor, order: Tensor, propagation: str, cut: Tensor | None = None
) -> Tensor:
    """``h_i = sum_j S(i, j) x_j``, with S(i, j) the product of the decays on the path: (B, L, D) to (B, L, D).

    16-bit inputs are accumulated in float32 and rounded once at the end. ``cut`` is ignored.
    """
    levels = _Levels(parent, accumulated(decay))
    rows = accumulated(x).flatten(0, 1)
    if propagation == "down":
        h = levels.down(rows)
    else:
        h = levels.up(rows)
        if propagation == "all":
            h = levels.down_after_up(h)
    return h.view(x.shape).to(x.dtype)


def tree_scan_backward(
    grad_h: Tensor,
    x: Tensor,
    decay: Tensor,
    parent: Tensor,
    order: Tensor,
    propagation: str,
    cut: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``decay``, each (B, L, D); the gradient of the root's decay is 0."""

    def scan(value: Tensor, direction: str) -> Tensor:
        return tree_scan(value, accumulated(decay), parent, order, direction)

    grads = scan_backward(scan, accumulated(grad_h), accumulated(x), accumulated(decay), parent, propagation)
    return grads[0].to(x.dtype), grads[1].to(decay.dtype)


def scan_backward(
    scan: Callable[[Tensor, str], Tensor], grad_h: Tensor, x: Tensor, decay: Tensor, parent: Tensor, propagation: str
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``decay`` by means of ``scan(value, propagation)``; differentiable if ``scan`` is."""
    index = parent.long().unsqueeze(-1).expand_as(x)
    below_root = (parent != vertices_like(parent)).unsqueeze(-1)
    if propagation == "up":
        grad_x = scan(grad_h, "down")
        grad_decay = scan(x, "up") * grad_x.gather(1, index)
    elif propagation == "down":
        grad_x = scan(grad_h, "up")
        grad_decay = grad_x * scan(x, "down").gather(1, index)
    else:
        u, e = scan(x, "up"), scan(grad_h, "up")
        h, grad_x = scan(x, "all"), scan(grad_h, "all")
        grad_decay = e * (h.gather(1, index) - decay * u) + u * (grad_x.gather(1, index) - decay * e)
    return grad_x, grad_decay * below_root


class SelectiveScanInputs(NamedTuple):
    """The floating inputs of the selective scan, in the order of the operator's arguments."""

    x: Tensor
    dt: Tensor
    b: Tensor
    c: Tensor
    gate: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A_log: Tensor
    Ds: Tensor
    h_norm_weight: Tensor
    h_norm_bias: Tensor
    out_norm_weight: Tensor
    out_norm_bias: Tensor

    def activations(self) -> tuple[Tensor, ...]:
        """The inputs that depend on the image."""
        return tuple(self)[:5]

    def parameters(self) -> tuple[Tensor, ...]:
        """The learned inputs."""
        return tuple(self)[5:]


def selective_scan(
    scan: Callable[[Tensor, Tensor], Tensor],
    dt_proj: Callable[[Tensor], Tensor],
    h_norm: Callable[[Tensor], Tensor],
    out_norm: Callable[[Tensor], Tensor],
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    gate: Tensor,
    A_log: Tensor,
    Ds: Tensor,
) -> Tensor:
    """The selective scan by means of ``scan(input, decay)``, a step projection and norms, which may be modules."""
    delta, decay = steps_and_decays(dt_proj, dt, A_log)
    h = scan(delta * b * x, decay)
    return out_norm(h_norm(h) * c + Ds * x) * F.silu(gate)


def steps_and_decays(dt_proj: Callable[[Tensor], Tensor], dt: Tensor, A_log: Tensor) -> tuple[Tensor, Tensor]:
    """``delta = softplus(dt_proj(dt))`` and ``decay = exp(-exp(A_log) delta)``, both (B, L, D)."""
    delta = F.softplus(dt_proj(dt))
    return delta, torch.exp(-torch.exp(A_log) * delta)


def plain_selective_scan(
    scan: Callable[[Tensor, Tensor], Tensor],
    inputs: SelectiveScanInputs,
    eps: float,
    layer_norm: Callable[..., Tensor] = F.layer_norm,
) -> Tensor:
    """:func:`selective_scan` of the operator's inputs."""
    x, dt, b, c, gate, dt_weight, dt_bias, A_log, Ds, *norms = inputs
    channels = x.shape[-1:]
    return selective_scan(
        scan,
        lambda value: F.linear(value, dt_weight, dt_bias),
        lambda value: layer_norm(value, channels, *norms[:2], eps),
        lambda value: layer_norm(value, channels, *norms[2:], eps),
        *(x, dt, b, c, gate, A_log, Ds),
    )


def smooth_layer_norm(x: Tensor, channels: Sequence[int], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``F.layer_norm`` over the last axis with correct derivatives of any order; PyTorch's are wrong from the third on.

    (As of 2.14, its second derivative treats the saved mean and standard deviation as constants.)
    """
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt() * weight + bias


def vjp(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    grads: Tensor | tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of a function's inputs from those of its outputs, differentiable again where grad mode is on."""
    if is_transformed():

        def weighted(*values: Tensor) -> Tensor:
            outputs = function(*values)
            pairs = zip(outputs, grads, strict=True) if isinstance(outputs, tuple) else ((outputs, grads),)
            return sum((output * grad).sum() for output, grad in pairs if grad is not None)

        return torch.func.grad(weighted, argnums=tuple(range(len(inputs))))(*inputs)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [
            value.view_as(value) if again and value.requires_grad else value.detach().requires_grad_()
            for value in inputs
        ]
        return torch.autograd.grad(function(*leaves), leaves, grads, create_graph=again, allow_unused=True)


def with_cut(args: Sequence[Tensor | float | str | None]) -> tuple[Tensor | float | str | None, ...]:
    """The arguments of a scan, completed by the cut, which the dispatcher omits if it is None."""
    return (*args, None) if isinstance(args[-1], str) else tuple(args)


def _spelled(leading: Sequence[str] = ()) -> Callable[[Callable], Callable]:
    """Decorator: gives a function of ``*args`` the signature from which the operator's schema is inferred."""

    def spell(function: Callable) -> Callable:
        types = dict.fromkeys((*leading, *SelectiveScanInputs._fields, "parent", "order"), Tensor)
        types |= {"eps": float, "propagation": str}
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in types.items()]
        parameters.append(inspect.Parameter("cut", kind, annotation=Tensor | None, default=None))
        result = inspect.signature(function).return_annotation
        function.__signature__ = inspect.Signature(parameters, return_annotation=result)
        return function

    return spell


def backward_kernel(function: Callable) -> Callable:
    """Decorator for kernels of backward operators that use autograd internally: their results have no graph.

    ``__wrapped__`` is the undecorated function, which is differentiable if grad mode is on.
    """

    @functools.wraps(function)
    def kernel(*args: Tensor | float | str | torch.dtype | None) -> tuple[Tensor, ...]:
        with torch.no_grad(), enable_autograd():
            return function(*args)

    return kernel


@_spelled()
def tree_selective_scan(*args: Tensor | float | str) -> Tensor:
    """See :func:`grootvl_mm.ops.tree_selective_scan`."""
    *inputs, parent, order, eps, propagation, _ = with_cut(args)

    def scan(value: Tensor, decay: Tensor) -> Tensor:
        return tree_scan(value, decay, parent, order, propagation)

    values = SelectiveScanInputs(*map(accumulated, inputs))
    return plain_selective_scan(scan, values, eps).to(inputs[0].dtype)


@backward_kernel
@_spelled(leading=("grad_y",))
def tree_selective_scan_backward(
    *args: Tensor | float | str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the 13 floating inputs of :func:`tree_selective_scan`, in their order and dtypes."""
    *tensors, parent, order, eps, propagation, _ = with_cut(args)
    grad_y, *inputs = map(accumulated, tensors)
    grads = selective_scan_backward(grad_y, inputs, parent, order, eps, propagation)
    return tuple(grad.to(value.dtype) for grad, value in zip(grads, tensors[1:], strict=True))


def selective_scan_backward(
    grad_y: Tensor,
    inputs: Sequence[Tensor],
    parent: Tensor,
    order: Tensor,
    eps: float,
    propagation: str,
    cut: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The same gradients by means of the operator ``tree_scan``, differentiable if grad mode is on."""

    def scan(value: Tensor, decay: Tensor) -> Tensor:
        return torch.ops.grootvl.tree_scan(value, decay, parent, order, propagation, cut)

    def forward(*values: Tensor) -> Tensor:
        return plain_selective_scan(scan, SelectiveScanInputs(*values), eps, smooth_layer_norm)

    return vjp(forward, inputs, grad_y)


def accumulated(value: Tensor) -> Tensor:
    """Cast to the accumulation dtype, which is at least float32, and make contiguous."""
    return value.to(torch.promote_types(value.dtype, torch.float32)).contiguous()
