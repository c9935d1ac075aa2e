"""The tree state space layer, GrootV's token mixer (section 3.2 and figure 2 of the paper)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from grootvl_mm.layers.linear import Linear, can_recompute, linear, linear_backward
from grootvl_mm.ops import Tree, grid_edge_weight, grid_tree, tree_selective_scan
from grootvl_mm.ops.scan import PROPAGATIONS
from grootvl_mm.ops.tree import METRICS

ROOTS = ("first", "last")
SCANS = ("tree", "raster", "cross")
SCAN_WEIGHTS = ("dt_weight", "dt_bias", "A_log", "Ds", "h_norm_weight", "h_norm_bias", "out_norm_weight")
SCAN_WEIGHTS += ("out_norm_bias",)


def raster_path(batch: int, height: int, width: int, root: str, by_columns: bool, device: torch.device) -> Tree:
    """The path through all positions in reading order as a tree.

    Args:
        batch: number of images.
        height: number of rows.
        width: number of columns.
        root: ``first`` or ``last`` vertex: the end of the path that is the root.
        by_columns: column by column instead of row by row.
        device: where the tree shall be.

    Returns:
        The same tree for each image.
    """
    order = torch.arange(height * width, dtype=torch.int32, device=device)
    if by_columns:
        order = order.view(height, width).T.flatten()
    if root == "last":
        order = order.flip(0)
    parent = torch.empty_like(order).scatter_(0, order.long(), torch.cat([order[:1], order[:-1]]))
    return Tree(parent.repeat(batch, 1), order.repeat(batch, 1))


class TreeSSM(BaseModule):
    """Selective state space model along a minimum spanning tree of the feature map; state size 1.

    Args:
        channels: C, channels of input and output. Inside there are D = 2 * C.
        tree_metric: dissimilarity that the tree minimises, ``cosine``, ``euclidean`` or ``manhattan``.
        tree_root: ``first`` or ``last`` vertex.
        propagation: ``all``, ``up`` or ``down``, see :func:`grootvl_mm.ops.tree_scan`.
        scan: ``tree``, or what the paper compares it with, for which the metric means nothing. ``raster``: the path
            row by row takes the place of the tree. ``cross``: the mean of the outputs for the path row by row and the
            path column by column. With ``propagation='all'`` a path is scanned in both directions.
        init_cfg: mmengine's.

    Raises:
        ValueError: an unknown metric, root, propagation or scan.
    """

    def __init__(
        self,
        channels: int,
        tree_metric: str = "cosine",
        tree_root: str = "first",
        propagation: str = "all",
        scan: str = "tree",
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        for name, value, choices in (
            ("tree_metric", tree_metric, METRICS),
            ("tree_root", tree_root, ROOTS),
            ("propagation", propagation, PROPAGATIONS),
            ("scan", scan, SCANS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        self.tree_metric = tree_metric
        self.tree_root = tree_root
        self.propagation = propagation
        self.scan = scan

        inner = 2 * channels
        self.dt_rank = math.ceil(channels / 16)
        self.in_proj = Linear(channels, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, kernel_size=3, padding=1, groups=inner, bias=False)
        self.x_proj = Linear(inner, self.dt_rank + 2, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.zeros(inner))
        self.Ds = nn.Parameter(torch.ones(inner))
        self.h_norm = nn.LayerNorm(inner)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = Linear(inner, channels, bias=False)
        self._init_dt_proj()

    def _init_dt_proj(self, dt_min: float = 0.001, dt_max: float = 0.1, floor: float = 1e-4) -> None:
        """Start delta = softplus(bias) log-uniformly between dt_min and dt_max."""
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        uniform = torch.rand(self.dt_proj.out_features)
        dt = torch.exp(uniform * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(min=floor)
        inverse_softplus = dt + torch.log(-torch.expm1(-dt))
        with torch.no_grad():
            self.dt_proj.bias.copy_(inverse_softplus)

    def forward(
        self, inputs: Tensor, tree: Tree | None = None, norm: nn.LayerNorm | None = None
    ) -> tuple[Tensor, Tree]:
        """Mix the positions of a feature map.

        Args:
            inputs: (B, H, W, C).
            tree: trees to scan along; by default those of this layer's own features.
            norm: a layer norm that the inputs have to go through first.

        Returns:
            (B, H, W, C), and the trees that were used (for ``cross`` those row by row).
        """
        projected = self.in_proj(inputs) if norm is None else self.in_proj(inputs, norm)
        weights = (
            *(self.conv2d.weight, self.x_proj.weight, self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.Ds),
            *(self.h_norm.weight, self.h_norm.bias, self.out_norm.weight, self.out_norm.bias),
        )
        if self.scan != "cross" and can_recompute(projected, *weights):
            y, *tree = _LeanSSM.apply(projected, tree, self.build_tree, self.h_norm.eps, self.propagation, *weights)
            return self.out_proj(y), Tree(*tree)
        x, gate = projected.chunk(2, dim=-1)
        feature = F.silu(_convolve(x, self.conv2d.weight))
        if tree is None:
            tree = self.build_tree(feature)
        values = _scan_inputs(feature, gate, self.x_proj.weight)
        y = _scan(values, weights[2:], tree, self.h_norm.eps, self.propagation)
        if self.scan == "cross":
            columns = raster_path(*gate.shape[:3], self.tree_root, by_columns=True, device=gate.device)
            y = (y + _scan(values, weights[2:], columns, self.h_norm.eps, self.propagation)) / 2
        return self.out_proj(y.unflatten(1, gate.shape[1:3])), tree

    def build_tree(self, feature: Tensor) -> Tree:
        """The trees of (B, D, H, W) features."""
        height, width = feature.shape[2:]
        if self.scan != "tree":
            return raster_path(feature.shape[0], height, width, self.tree_root, by_columns=False, device=feature.device)
        # exp cannot overflow for the cosine; for the distances it does, so their exponents are compared.
        weight = grid_edge_weight(feature.detach(), self.tree_metric, log=self.tree_metric != "cosine")
        return grid_tree(weight, height, width, root=0 if self.tree_root == "first" else height * width - 1)


def _convolve(x: Tensor, weight: Tensor) -> Tensor:
    """The depth-wise convolution, (B, H, W, D) to (B, D, H, W)."""
    return F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1, groups=weight.shape[0])


def _scan_inputs(feature: Tensor, gate: Tensor, x_weight: Tensor) -> tuple[Tensor, ...]:
    """x, dt, b, c and gate, as :func:`tree_selective_scan` names them, of (B, D, H, W) and (B, H, W, D)."""
    x = feature.permute(0, 2, 3, 1).flatten(1, 2)
    dt, b, c = linear(x, x_weight).split([x_weight.shape[0] - 2, 1, 1], dim=-1)
    return x, dt, b, c, gate.flatten(1, 2)


def _scan(values: tuple[Tensor, ...], weights: tuple[Tensor, ...], tree: Tree, eps: float, propagation: str) -> Tensor:
    """:func:`tree_selective_scan` with its parameters by position."""
    return tree_selective_scan(
        *values, **dict(zip(SCAN_WEIGHTS, weights, strict=True)), tree=tree, eps=eps, propagation=propagation
    )


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, x)
    # PyTorch's operator is not differentiable itself.
    sigmoid = x.sigmoid()
    return grad * sigmoid * (1 + x * (1 - sigmoid))


class _LeanSSM(torch.autograd.Function):
    """All between the projections. It keeps the in-projection's result and the trees, and computes the feature map, a
    small part of the work, again in the backward pass; the scan does so by itself.
    """

    @staticmethod
    def forward(
        projected: Tensor,
        tree: Tree | None,
        build_tree: Callable[[Tensor], Tree],
        eps: float,
        propagation: str,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, gate = projected.chunk(2, dim=-1)
        feature = F.silu(_convolve(x, weights[0]), inplace=True)
        tree = build_tree(feature) if tree is None else tree
        y = _scan(_scan_inputs(feature, gate, weights[1]), weights[2:], tree, eps, propagation)
        return y.unflatten(1, projected.shape[1:3]), *tree

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
        projected, _, _, ctx.eps, ctx.propagation, *weights = inputs
        _, *tree = output
        ctx.mark_non_differentiable(*tree)
        ctx.save_for_backward(projected, *tree, *weights)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_y: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        projected, parent, order, conv_weight, x_weight, *weights = ctx.saved_tensors
        x, gate = projected.chunk(2, dim=-1)
        before = _convolve(x, conv_weight)
        values = _scan_inputs(F.silu(before), gate, x_weight)
        grad, grad_dt, grad_b, grad_c, grad_gate, *grads = torch.ops.grootvl.tree_selective_scan_backward(
            grad_y.flatten(1, 2), *values, *weights, parent, order, ctx.eps, ctx.propagation
        )
        grad_steps = torch.cat([grad_dt, grad_b, grad_c], dim=-1).flatten(0, 1)
        _, grad_x_weight, _ = linear_backward(grad_steps, values[0], x_weight, (False, True, False))
        # In place, and each large tensor freed once it has served: fresh memory costs more than the arithmetic.
        del values
        grad.flatten(0, 1).addmm_(grad_steps, x_weight)
        grad = _silu_backward(grad.view(grad_y.shape).permute(0, 3, 1, 2), before)
        del before
        grad, grad_conv_weight, _ = torch.ops.aten.convolution_backward(
            *(grad, x.permute(0, 3, 1, 2), conv_weight, None),
            *([1, 1], [1, 1], [1, 1], False, [0, 0], conv_weight.shape[0], [True, True, False]),
        )
        grad_projected = torch.cat([grad.permute(0, 2, 3, 1), grad_gate.view(gate.shape)], dim=-1)
        return grad_projected, *[None] * 4, grad_conv_weight, grad_x_weight, *grads
