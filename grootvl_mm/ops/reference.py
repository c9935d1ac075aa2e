"""The operators in plain PyTorch: the oracle of the tests, and what runs where the extension was not compiled.

Every function here has the name, the arguments and the result of the dispatcher operator ``torch.ops.grootvl.<name>``;
the type hints are its schema. They are written for clarity and run vertex levels one after the other, so they are slow.
Shapes: ``B`` batch, ``C`` or ``D`` channels, ``L = height * width`` vertices in row-major order, ``E`` edges.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def grid_edges(height: int, width: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Both ends of every edge of the 4-connected grid, in the order that breaks ties.

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

    Sums run in float64, so that equal features get equal weights wherever they lie. What is not finite (overflow of the
    exponential, features that are not numbers) becomes the largest finite float32.
    """
    return edge_weight(feature.to(torch.float64), metric, log)


def edge_weight(feature: Tensor, metric: str, log: bool) -> Tensor:
    """As :func:`grid_edge_weight`, but summed in the precision of the feature."""
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


def _negative_cosine(lower: Tensor, higher: Tensor) -> Tensor:
    # Not torch.cosine_similarity, which writes in place and so does not decompose.
    return -(F.normalize(lower, dim=-1, eps=1e-8) * F.normalize(higher, dim=-1, eps=1e-8)).sum(-1)


def _squared_distance(lower: Tensor, higher: Tensor) -> Tensor:
    return (lower - higher).square().sum(-1)


def _absolute_distance(lower: Tensor, higher: Tensor) -> Tensor:
    return (lower - higher).abs().sum(-1)


_METRICS = {
    "cosine": _negative_cosine,
    "euclidean": _squared_distance,
    "manhattan": _absolute_distance,
}


def grid_tree(edge_weight: Tensor, height: int, width: int, root: int) -> tuple[Tensor, Tensor]:
    """Minimum spanning tree of the grid, rooted: (B, E) to ``parent`` and ``order``, both (B, L) int32.

    Boruvka's algorithm over all images at once; among equal weights the lower edge index wins.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    if not edge_weight.isfinite().all():
        bad = int((~edge_weight.isfinite()).sum())
        raise ValueError(f"edge_weight must be finite, got {bad} NaN or infinite of {edge_weight.numel()} values")
    in_tree = _minimum_spanning_tree(edge_weight, height, width)
    return _root_tree(in_tree, height, width, root)


def _minimum_spanning_tree(edge_weight: Tensor, height: int, width: int) -> Tensor:
    """Marks the tree edges: (B, E) bool. Components merge along their least edge until one is left."""
    batch, num_edges = edge_weight.shape
    lower, higher = grid_edges(height, width, edge_weight.device)
    sorted_edges = edge_weight.argsort(dim=1, stable=True)
    rank = sorted_edges.argsort(dim=1)
    component = torch.arange(height * width, device=edge_weight.device).repeat(batch, 1)
    in_tree = torch.zeros_like(rank, dtype=torch.bool)
    while True:
        of_lower, of_higher = component[:, lower], component[:, higher]
        crossing = of_lower != of_higher
        if not crossing.any():
            return in_tree
        candidate = torch.where(crossing, rank, num_edges)
        best = torch.full_like(component, num_edges)
        best.scatter_reduce_(1, of_lower, candidate, "amin")
        best.scatter_reduce_(1, of_higher, candidate, "amin")
        has_edge = best < num_edges
        edge = sorted_edges.gather(1, best.clamp(max=num_edges - 1))
        in_tree |= torch.zeros_like(rank).scatter_add_(1, edge, has_edge.long()).bool()
        itself = torch.arange(height * width, device=edge_weight.device).expand_as(component)
        neighbour = of_lower.gather(1, edge) + of_higher.gather(1, edge) - itself
        neighbour = torch.where(has_edge, neighbour, itself)
        mutual = (neighbour.gather(1, neighbour) == itself) & (itself < neighbour)
        leader = torch.where(mutual, itself, neighbour)
        component = _follow(leader).gather(1, component)


def _follow(pointer: Tensor) -> Tensor:
    """The fixed point that each entry's chain of pointers ends in, by pointer doubling."""
    while True:
        doubled = pointer.gather(1, pointer)
        if torch.equal(doubled, pointer):
            return pointer
        pointer = doubled


def _root_tree(in_tree: Tensor, height: int, width: int, root: int) -> tuple[Tensor, Tensor]:
    """Walks the tree from the root, level by level."""
    batch = in_tree.shape[0]
    vertices, num_vertical = height * width, (height - 1) * width
    down = in_tree.new_zeros(batch, height, width)
    right = in_tree.new_zeros(batch, height, width)
    down[:, :-1] = in_tree[:, :num_vertical].view(batch, height - 1, width)
    right[:, :, :-1] = in_tree[:, num_vertical:].view(batch, height, width - 1)
    down, right = down.flatten(1), right.flatten(1)

    # Slot d holds whether vertex v has the tree edge to v + step[d].
    steps = (width, -width, 1, -1)
    linked = torch.stack([down, down.roll(width, 1), right, right.roll(1, 1)])
    parent = torch.full((batch, vertices), -1, dtype=torch.int64, device=in_tree.device)
    level = torch.zeros_like(parent)
    parent[:, root] = root
    image = torch.arange(batch, device=in_tree.device)
    vertex = torch.full_like(image, root)
    depth = 0
    while image.numel():
        depth += 1
        next_image, next_vertex = [], []
        for slot, step in enumerate(steps):
            open_edge = linked[slot, image, vertex]
            images, sources = image[open_edge], vertex[open_edge]
            targets = sources + step
            unseen = parent[images, targets] < 0
            images, sources, targets = images[unseen], sources[unseen], targets[unseen]
            parent[images, targets] = sources
            level[images, targets] = depth
            next_image.append(images)
            next_vertex.append(targets)
        image, vertex = torch.cat(next_image), torch.cat(next_vertex)
    order = level.argsort(dim=1, stable=True)
    return parent.to(torch.int32), order.to(torch.int32)


def vertex_depth(parent: Tensor) -> Tensor:
    """Number of edges from each vertex to the root: (B, L) int32 to (B, L) int64, by pointer doubling."""
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

    def is_root(self) -> Tensor:
        """(B * L, 1) bool."""
        return (self.parent == torch.arange(self.parent.numel(), device=self.parent.device)).unsqueeze(1)


def tree_scan(x: Tensor, decay: Tensor, parent: Tensor, order: Tensor, propagation: str) -> Tensor:
    """``h_i = sum_j S(i, j) x_j``, with S(i, j) the product of the decays on the path: (B, L, D) to (B, L, D).

    16-bit inputs are accumulated in float32 and rounded once at the end.
    """
    levels = _Levels(parent, _accumulated(decay))
    rows = _accumulated(x).flatten(0, 1)
    if propagation == "down":
        h = levels.down(rows)
    else:
        h = levels.up(rows)
        if propagation == "all":
            h = levels.down_after_up(h)
    return h.view(x.shape).to(x.dtype)


def tree_scan_backward(
    grad_h: Tensor, x: Tensor, decay: Tensor, parent: Tensor, order: Tensor, propagation: str
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``decay``, each (B, L, D); that of the root's decay is 0."""
    levels = _Levels(parent, _accumulated(decay))
    a, rows, grads = levels.decay, _accumulated(x).flatten(0, 1), _accumulated(grad_h).flatten(0, 1)
    to_parent = levels.parent
    if propagation == "up":
        grad_x = levels.down(grads)
        grad_decay = levels.up(rows) * grad_x[to_parent]
    elif propagation == "down":
        grad_x = levels.up(grads)
        grad_decay = grad_x * levels.down(rows)[to_parent]
    else:
        u, e = levels.up(rows), levels.up(grads)
        h, grad_x = levels.down_after_up(u), levels.down_after_up(e)
        grad_decay = e * (h[to_parent] - a * u) + u * (grad_x[to_parent] - a * e)
    grad_decay = grad_decay.masked_fill(levels.is_root(), 0)
    return grad_x.view(x.shape).to(x.dtype), grad_decay.view(x.shape).to(decay.dtype)


def selective_scan(
    scan: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    gate: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    Ds: Tensor,
    h_norm_weight: Tensor,
    h_norm_bias: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """The selective scan around any ``scan(input, decay)``, differentiable where that is."""
    delta = F.softplus(F.linear(dt, dt_weight, dt_bias))
    h = scan(delta * b * x, torch.exp(-torch.exp(A_log) * delta))
    mixed = F.layer_norm(h, h.shape[-1:], h_norm_weight, h_norm_bias, eps) * c + Ds * x
    return F.layer_norm(mixed, h.shape[-1:], out_norm_weight, out_norm_bias, eps) * F.silu(gate)


def tree_selective_scan(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    gate: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    Ds: Tensor,
    h_norm_weight: Tensor,
    h_norm_bias: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    parent: Tensor,
    order: Tensor,
    eps: float,
    propagation: str,
) -> Tensor:
    """Everything between the projections of the layer, see :func:`grootvl_mm.ops.tree_selective_scan`: (B, L, D)."""
    inputs = (x, dt, b, c, gate, dt_weight, dt_bias, A_log, Ds)
    norms = (h_norm_weight, h_norm_bias, out_norm_weight, out_norm_bias)

    def scan(value: Tensor, decay: Tensor) -> Tensor:
        return tree_scan(value, decay, parent, order, propagation)

    y = selective_scan(scan, *(_accumulated(value) for value in (*inputs, *norms)), eps)
    return y.to(x.dtype)


def tree_selective_scan_backward(
    grad_y: Tensor,
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    gate: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    Ds: Tensor,
    h_norm_weight: Tensor,
    h_norm_bias: Tensor,
    out_norm_weight: Tensor,
    out_norm_bias: Tensor,
    parent: Tensor,
    order: Tensor,
    eps: float,
    propagation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the 13 floating inputs of :func:`tree_selective_scan`, in their order and dtype."""
    dtype = x.dtype
    grad_y, x, dt, b, c, gate, dt_weight, dt_bias, A_log, Ds, h_norm_weight, h_norm_bias = (
        _accumulated(value)
        for value in (grad_y, x, dt, b, c, gate, dt_weight, dt_bias, A_log, Ds, h_norm_weight, h_norm_bias)
    )
    out_norm_weight, out_norm_bias = _accumulated(out_norm_weight), _accumulated(out_norm_bias)
    pre = F.linear(dt, dt_weight, dt_bias)
    delta, rate = F.softplus(pre), -torch.exp(A_log)
    decay = torch.exp(rate * delta)
    h = tree_scan(delta * b * x, decay, parent, order, propagation)
    h_normed = F.layer_norm(h, h.shape[-1:], h_norm_weight, h_norm_bias, eps)
    mixed = h_normed * c + Ds * x
    normed = F.layer_norm(mixed, h.shape[-1:], out_norm_weight, out_norm_bias, eps)

    sigmoid = torch.sigmoid(gate)
    grad_gate = grad_y * normed * sigmoid * (1 + gate * (1 - sigmoid))
    grad_mixed, *grad_out_norm = _layer_norm_backward(grad_y * gate * sigmoid, mixed, out_norm_weight, eps)
    grad_c = (grad_mixed * h_normed).sum(-1, keepdim=True)
    grad_Ds = (grad_mixed * x).sum((0, 1))
    grad_h, *grad_h_norm = _layer_norm_backward(grad_mixed * c, h, h_norm_weight, eps)
    grad_input, grad_decay = tree_scan_backward(grad_h, delta * b * x, decay, parent, order, propagation)
    grad_x = grad_mixed * Ds + grad_input * delta * b
    grad_b = (grad_input * delta * x).sum(-1, keepdim=True)
    grad_pre = (grad_input * b * x + grad_decay * decay * rate) * torch.sigmoid(pre)
    grad_dt = grad_pre @ dt_weight
    grad_dt_weight = grad_pre.flatten(0, 1).T @ dt.flatten(0, 1)
    grad_A_log = (grad_decay * decay * delta).sum((0, 1)) * rate
    inputs = (grad_x, grad_dt, grad_b, grad_c, grad_gate)
    parameters = (grad_dt_weight, grad_pre.sum((0, 1)), grad_A_log, grad_Ds, *grad_h_norm, *grad_out_norm)
    return tuple(grad.to(dtype) for grad in (*inputs, *parameters))


def _layer_norm_backward(grad: Tensor, value: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the value (..., D), of weight and of bias (D)."""
    scale = torch.rsqrt(value.var(-1, keepdim=True, correction=0) + eps)
    normal = (value - value.mean(-1, keepdim=True)) * scale
    inner = grad * weight
    through = inner - inner.mean(-1, keepdim=True) - normal * (inner * normal).mean(-1, keepdim=True)
    return scale * through, (grad * normal).flatten(0, -2).sum(0), grad.flatten(0, -2).sum(0)


def _accumulated(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32)).contiguous()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None) -> Tensor:
    """Layer norm over the last axis, see :func:`grootvl_mm.ops.layer_norm`: (..., C) to (..., C)."""
    value, weight, bias = (_accumulated(tensor) for tensor in (x, weight, bias))
    return F.layer_norm(value, x.shape[-1:], weight, bias, eps).to(dtype or x.dtype)


def residual_layer_norm(
    x: Tensor,
    branch: Tensor,
    factor: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """``x + factor * branch`` and its layer norm, see :func:`grootvl_mm.ops.residual_layer_norm`: two (B, ..., C)."""
    total = (_accumulated(x) + _scaled(_accumulated(branch), factor)).to(x.dtype)
    return total, layer_norm(total, weight, bias, eps, dtype)


def layer_norm_backward(
    grad_sum: Tensor | None,
    grad_normed: Tensor,
    value: Tensor,
    factor: Tensor | None,
    weight: Tensor,
    eps: float,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of what was added up and normed (..., C), of the branch, of weight and of bias (C).

    Without a ``branch_dtype`` the second has no elements.
    """
    through, grad_weight, grad_bias = _layer_norm_backward(
        *(_accumulated(tensor) for tensor in (grad_normed, value, weight)), eps
    )
    grad_x = through if grad_sum is None else through + grad_sum
    grad_branch = value.new_empty(0) if branch_dtype is None else _scaled(grad_x, factor).to(branch_dtype, copy=True)
    return grad_x.to(value.dtype), grad_branch, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _scaled(value: Tensor, factor: Tensor | None) -> Tensor:
    """(B, ..., C) times a factor for each sample (B)."""
    if factor is None:
        return value
    return value * factor.to(value.dtype).view(-1, *[1] * (value.dim() - 1))


def depthwise_conv_silu(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU of a depth-wise 3x3 convolution, see :func:`grootvl_mm.ops.depthwise_conv_silu`: (B, H, W, D), the same."""
    return F.silu(_depthwise_conv(_accumulated(x), _accumulated(weight))).to(x.dtype).contiguous()


def depthwise_conv_silu_backward(grad_y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` (B, H, W, D) and ``weight`` (D, 1, 3, 3)."""
    taps, rows = _accumulated(weight), _accumulated(x)
    z = _depthwise_conv(rows, taps)
    sigmoid = torch.sigmoid(z)
    grad = _accumulated(grad_y) * sigmoid * (1 + z * (1 - sigmoid))
    grad_x = _depthwise_conv(grad, taps.flip(-2, -1))
    padded = F.pad(rows, (0, 0, 1, 1, 1, 1))
    height, width = x.shape[1:3]
    of_taps = [(grad * padded[:, i : i + height, j : j + width]).sum((0, 1, 2)) for i in range(3) for j in range(3)]
    grad_weight = torch.stack(of_taps, 1).view(weight.shape)
    return grad_x.to(x.dtype).contiguous(), grad_weight.to(weight.dtype)


def _depthwise_conv(x: Tensor, weight: Tensor) -> Tensor:
    """(B, H, W, D) to (B, H, W, D)."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1, groups=weight.shape[0]).permute(0, 2, 3, 1)
