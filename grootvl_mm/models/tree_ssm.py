"""The tree state space layer, GrootV's token mixer (section 3.2 and figure 2 of the paper)."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from grootvl_mm.layers.calls import call_module, call_own
from grootvl_mm.layers.conv import conv_silu
from grootvl_mm.layers.initialization import InitializedModule, StepProjection, linear_layer
from grootvl_mm.layers.linear import linear_in_chunks
from grootvl_mm.layers.padding import Padding
from grootvl_mm.layers.tracing import with_known_size
from grootvl_mm.layers.untouched import called_directly, untouched
from grootvl_mm.ops import Tree, grid_edge_weight, grid_tree, tree_scan, tree_selective_scan
from grootvl_mm.ops._compat import is_autocast_enabled
from grootvl_mm.ops.scan import PROPAGATIONS, selective_scan
from grootvl_mm.ops.tree import METRICS

ROOTS = ("first", "last")
SCANS = ("tree", "raster", "cross", "random", "maximum")


def raster_path(
    batch: int,
    height: int,
    width: int,
    root: str,
    by_columns: bool,
    device: torch.device,
    padding: Padding | None = None,
) -> Tree:
    """The raster-order path through all positions, as a tree.

    Args:
        batch: number of images.
        height: number of rows.
        width: number of columns.
        root: the end of the path that is the root, the ``first`` or ``last`` vertex.
        by_columns: column by column instead of row by row.
        device: device of the tree.
        padding: padded positions come last, farthest from the root.

    Returns:
        The trees, one per image; identical unless there is padding.
    """
    order = torch.arange(height * width, dtype=torch.int32, device=device)
    if by_columns:
        order = order.view(height, width).T.flatten()
    if root == "last":
        order = order.flip(0)
    order = order.repeat(batch, 1)
    if padding is not None:
        outside = padding.valid.flatten(1).gather(1, order.long()) == 0
        order = order.gather(1, outside.byte().argsort(dim=1, stable=True))
    parent = torch.empty_like(order).scatter_(1, order.long(), torch.cat([order[:, :1], order[:, :-1]], dim=1))
    return Tree(parent, order)


def scattered_weight(height: int, width: int, seed: int, device: torch.device) -> Tensor:
    """Deterministic pseudorandom edge weights.

    A weight depends only on the seed and the position of its edge, not on the size of the map, so that padding does not
    change the tree.

    Args:
        height: number of rows.
        width: number of columns.
        seed: an integer, at least 0.
        device: device of the weights.

    Returns:
        (E,) float32, in the order of :func:`grootvl_mm.ops.grid_edge_weight`.
    """
    row, column = torch.arange(height, device=device).unsqueeze(1), torch.arange(width, device=device)
    key = 1 + seed
    for number in (row, column):
        # The fifth power is a permutation of the numbers below this prime.
        key = (key * _SCATTER + number + 1) % _PRIME
        square = key * key % _PRIME
        key = square * square % _PRIME * key % _PRIME
    vertical = key[: height - 1].flatten()
    horizontal = (key * _SCATTER % _PRIME)[:, : width - 1].flatten()
    return torch.cat([vertical, horizontal]).float()


_PRIME, _SCATTER = 2**31 - 1, 1_103_515_245


@called_directly
class TreeSSM(InitializedModule):
    """Tree state space layer: a selective state space model (state size 1) along a spanning tree of the feature map.

    Args:
        channels: C, channels of input and output. The inner dimension is D = 2 * C.
        tree_metric: dissimilarity that defines the tree, ``cosine``, ``euclidean`` or ``manhattan``.
        tree_root: the root of the tree, the ``first`` or ``last`` vertex.
        propagation: ``all``, ``up`` or ``down``, see :func:`grootvl_mm.ops.tree_scan`.
        scan: ``tree``, the minimum spanning tree, or a baseline. ``raster``: a path row by row. ``cross``: the mean of
            the outputs of the paths row by row and column by column. ``random``: the spanning tree of random weights,
            drawn for each image and call in training, fixed in evaluation. ``maximum``: the maximum spanning tree. With
            ``propagation='all'``, paths are scanned in both directions. ``tree_metric`` is used by ``tree`` and
            ``maximum`` only.
        scan_seed: seed of the ``random`` trees in evaluation; :class:`GrootV` uses the index of the block.
        init_cfg: initialization config of mmengine.

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
        scan_seed: int = 0,
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
        self.scan_seed = scan_seed

        inner = 2 * channels
        self.dt_rank = math.ceil(channels / 16)
        self.in_proj = linear_layer(channels, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, kernel_size=3, padding=1, groups=inner, bias=False)
        self.x_proj = linear_layer(inner, self.dt_rank + 2, bias=False)
        self.dt_proj = StepProjection(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner))
        self.Ds = nn.Parameter(torch.empty(inner))
        self.h_norm = nn.LayerNorm(inner)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = linear_layer(inner, channels, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights; the state matrix starts as -1 and the skip connection as 1."""
        for projection in (self.in_proj, self.x_proj, self.out_proj, self.dt_proj):
            projection.reset_parameters()
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.Ds)

    def forward(self, x: Tensor, tree: Tree | None = None, padding: Padding | None = None) -> tuple[Tensor, Tree]:
        """Mix the tokens of a feature map.

        Args:
            x: (B, H, W, C).
            tree: trees to scan along; by default built from this layer's features.
            padding: padding to ignore; results at padded positions are undefined.

        Returns:
            (B, H, W, C), and the trees of the scan (for ``cross``, the paths row by row).
        """
        # The convolution must read zeros at padding. A projection without bias keeps the zeros of its narrower input.
        keeps_zeros = padding is None or untouched(self.in_proj, kinds=(nn.Linear,), bias=False)
        if padding is not None and keeps_zeros:
            x = padding.clear(x)
        x, gate = linear_in_chunks(self.in_proj, x, 2)
        if not keeps_zeros:
            x = padding.clear(x)
        x = conv_silu(self.conv2d, x)
        if tree is None:
            tree = self.build_tree(x.permute(0, 3, 1, 2), padding)
        dt, b, c = call_module(self.x_proj, x).split([self.dt_rank, 1, 1], dim=-1)
        if padding is not None:
            b = padding.clear(b)  # clears the scan's input, delta * b * x
        y = self.selective_scan(x, dt, b, c, gate, tree, padding)
        return call_module(self.out_proj, y), tree

    def build_tree(self, feature: Tensor, padding: Padding | None = None) -> Tree:
        """Build the trees of (B, D, H, W) features."""
        feature, height, width = with_known_size(feature)
        if self.scan in ("raster", "cross"):
            batch = feature.shape[0]
            return raster_path(batch, height, width, self.tree_root, False, feature.device, padding)
        weight = self.edge_weight(feature.detach())
        if padding is not None:
            weight = padding.cut(weight)
        return grid_tree(weight, height, width, root=0 if self.tree_root == "first" else height * width - 1)

    def edge_weight(self, feature: Tensor) -> Tensor:
        """The edge weights (B, E) of (B, D, H, W) features, see :func:`grootvl_mm.ops.grid_edge_weight`."""
        if self.scan == "random":
            return self._random_weight(feature)
        # Distances use their exponents, since exp would overflow; that of the cosine cannot.
        weight = grid_edge_weight(feature, self.tree_metric, log=self.tree_metric != "cosine")
        return -weight if self.scan == "maximum" else weight

    def _random_weight(self, feature: Tensor) -> Tensor:
        batch, _, height, width = feature.shape
        if self.training:  # activation checkpointing restores the RNG state, so recomputed trees are the same
            edges = (height - 1) * width + height * (width - 1)
            return torch.rand(batch, edges, dtype=torch.float32, device=feature.device)
        return scattered_weight(height, width, self.scan_seed, feature.device).repeat(batch, 1)

    def selective_scan(
        self,
        x: Tensor,
        dt: Tensor,
        b: Tensor,
        c: Tensor,
        gate: Tensor,
        tree: Tree,
        padding: Padding | None = None,
    ) -> Tensor:
        """Selective scan of ``(B, H, W, *)`` values; for ``cross``, the mean of the scans by rows and by columns."""
        batch, height, width, _ = x.shape
        values = [value.flatten(1, 2) for value in (x, dt, b, c, gate)]
        y = self._selective_scan(*values, tree)
        if self.scan == "cross":
            columns = raster_path(batch, height, width, self.tree_root, True, x.device, padding)
            y = (y + self._selective_scan(*values, columns)) / 2
        return y.unflatten(1, (height, width))

    def _selective_scan(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, gate: Tensor, tree: Tree) -> Tensor:
        """Selective scan of ``(B, L, *)`` values along trees, by one fused operator if the modules are untouched.

        ``delta = softplus(dt_proj(dt))``, ``h = tree_scan(delta b x, exp(-exp(A_log) delta))`` and
        ``y = out_norm(h_norm(h) c + Ds x) SiLU(gate)``.
        """
        if (
            untouched(self.dt_proj, kinds=(StepProjection, nn.Linear))
            and untouched(self.h_norm, self.out_norm, kinds=(nn.LayerNorm,))
            and self.h_norm.eps == self.out_norm.eps
            and self.h_norm.normalized_shape == self.out_norm.normalized_shape == x.shape[-1:]
        ):
            return call_own(
                tree_selective_scan,
                *(x, dt, b, c, gate),
                dt_weight=self.dt_proj.weight,
                dt_bias=self.dt_proj.bias,
                A_log=self.A_log,
                Ds=self.Ds,
                h_norm_weight=self.h_norm.weight,
                h_norm_bias=self.h_norm.bias,
                out_norm_weight=self.out_norm.weight,
                out_norm_bias=self.out_norm.bias,
                tree=tree,
                eps=self.h_norm.eps,
                propagation=self.propagation,
            )
        A_log, Ds = self.A_log, self.Ds
        if not is_autocast_enabled(x.device.type):  # a model of 16 bits may keep them in float32
            A_log, Ds = A_log.to(x.dtype), Ds.to(x.dtype)
        return selective_scan(
            partial(self._tree_scan, tree=tree),
            *(self.dt_proj, self.h_norm, self.out_norm),
            *(x, dt, b, c, gate, A_log, Ds),
        )

    def _tree_scan(self, x: Tensor, decay: Tensor, tree: Tree) -> Tensor:
        return tree_scan(x, decay, tree, self.propagation)
