"""The tree state space layer, GrootV's token mixer (section 3.2 and figure 2 of the paper)."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from grootvl_mm.layers.conv import conv_silu
from grootvl_mm.layers.initialization import InitializedModule, StepProjection, linear_layer
from grootvl_mm.layers.padding import Padding
from grootvl_mm.layers.tracing import with_known_size
from grootvl_mm.layers.untouched import untouched
from grootvl_mm.ops import Tree, grid_edge_weight, grid_tree, tree_scan, tree_selective_scan
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
    """The path through all positions in reading order as a tree.

    Args:
        batch: number of images.
        height: number of rows.
        width: number of columns.
        root: ``first`` or ``last`` vertex: the end of the path that is the root.
        by_columns: column by column instead of row by row.
        device: device of the tree.
        padding: to be left for the end that is not the root.

    Returns:
        The same tree for each image, apart from padding.
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
    """Edge weights of a pseudorandom spanning tree, which is always the same.

    A weight depends on the seed and on where its edge lies, not on the map's size, so that padding changes nothing.

    Args:
        height: number of rows.
        width: number of columns.
        seed: any number from 0.
        device: device of the weights.

    Returns:
        (E,) float32, in the order of :func:`grootvl_mm.ops.grid_edge_weight`.
    """
    row, column = torch.arange(height, device=device).unsqueeze(1), torch.arange(width, device=device)
    key = 1 + seed
    for number in (row, column):
        # The fifth power permutes the numbers below this prime, and scatters them.
        key = (key * _SCATTER + number + 1) % _PRIME
        square = key * key % _PRIME
        key = square * square % _PRIME * key % _PRIME
    vertical = key[: height - 1].flatten()
    horizontal = (key * _SCATTER % _PRIME)[:, : width - 1].flatten()
    return torch.cat([vertical, horizontal]).float()


_PRIME, _SCATTER = 2**31 - 1, 1_103_515_245


class TreeSSM(InitializedModule):
    """Selective state space model along a minimum spanning tree of the feature map; state size 1.

    Args:
        channels: C, channels of input and output. Inside there are D = 2 * C.
        tree_metric: dissimilarity that the tree minimises, ``cosine``, ``euclidean`` or ``manhattan``.
        tree_root: ``first`` or ``last`` vertex.
        propagation: ``all``, ``up`` or ``down``, see :func:`grootvl_mm.ops.tree_scan`.
        scan: ``tree``, or what it is compared with. ``raster``: the path row by row takes the place of the tree.
            ``cross``: the mean of the outputs for the path row by row and the path column by column. With
            ``propagation='all'`` a path is scanned in both directions. ``random``: the spanning tree of random
            weights, in training a new one for each image and call, in evaluation always the same. ``maximum``: the
            maximum spanning tree, which joins what differs most. The metric matters for ``tree`` and ``maximum``.
        scan_seed: number that the trees of ``random`` in evaluation come from; :class:`GrootV` numbers its blocks.
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
        """Draw the weights anew: the state matrix starts as -1, the skip connection as 1."""
        for projection in (self.in_proj, self.x_proj, self.out_proj, self.dt_proj):
            projection.reset_parameters()
        nn.init.zeros_(self.A_log)
        nn.init.ones_(self.Ds)

    def forward(self, x: Tensor, tree: Tree | None = None, padding: Padding | None = None) -> tuple[Tensor, Tree]:
        """Mix the positions of a feature map.

        Args:
            x: (B, H, W, C).
            tree: trees to scan along; by default those of this layer's own features.
            padding: what no position inside of a picture may depend on; the result there means nothing.

        Returns:
            (B, H, W, C), and the trees that were used (for ``cross`` those row by row).
        """
        if padding is not None:
            x = padding.clear(x)  # and so what the convolution reads: the projection has no bias
        x, gate = self.in_proj(x).chunk(2, dim=-1)
        x = conv_silu(self.conv2d, x)
        if tree is None:
            tree = self.build_tree(x.permute(0, 3, 1, 2), padding)
        dt, b, c = self.x_proj(x).split([self.dt_rank, 1, 1], dim=-1)
        if padding is not None:
            b = padding.clear(b)  # and so what is scanned
        y = self.selective_scan(x, dt, b, c, gate, tree, padding)
        return self.out_proj(y), tree

    def build_tree(self, feature: Tensor, padding: Padding | None = None) -> Tree:
        """The trees of (B, D, H, W) features."""
        feature, height, width = with_known_size(feature)
        if self.scan in ("raster", "cross"):
            batch = feature.shape[0]
            return raster_path(batch, height, width, self.tree_root, False, feature.device, padding)
        weight = self.edge_weight(feature.detach())
        if padding is not None:
            weight = padding.cut(weight)
        return grid_tree(weight, height, width, root=0 if self.tree_root == "first" else height * width - 1)

    def edge_weight(self, feature: Tensor) -> Tensor:
        """What the trees of (B, D, H, W) features minimise: (B, E), see :func:`grootvl_mm.ops.grid_edge_weight`."""
        if self.scan == "random":
            return self._random_weight(feature)
        # exp cannot overflow for the cosine; for the distances it does, so their exponents are compared.
        weight = grid_edge_weight(feature, self.tree_metric, log=self.tree_metric != "cosine")
        return -weight if self.scan == "maximum" else weight

    def _random_weight(self, feature: Tensor) -> Tensor:
        batch, _, height, width = feature.shape
        if self.training:  # activation checkpointing restores the state of the generator, and so the trees
            return torch.rand(batch, (height - 1) * width + height * (width - 1), device=feature.device)
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
        """The scan of ``(B, H, W, *)`` values along trees; for ``cross``, the mean of the scans by rows and columns."""
        batch, height, width, _ = x.shape
        values = [value.flatten(1, 2) for value in (x, dt, b, c, gate)]
        y = self._selective_scan(*values, tree)
        if self.scan == "cross":
            columns = raster_path(batch, height, width, self.tree_root, True, x.device, padding)
            y = (y + self._selective_scan(*values, columns)) / 2
        return y.unflatten(1, (height, width))

    def _selective_scan(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, gate: Tensor, tree: Tree) -> Tensor:
        """``delta = softplus(dt_proj(dt))``, ``h = tree_scan(delta b x, exp(-exp(A_log) delta))`` and
        ``out_norm(h_norm(h) c + Ds x) SiLU(gate)``, by one operator where that does all that the modules do.
        """
        if (
            untouched(self.dt_proj, kinds=(StepProjection, nn.Linear))
            and untouched(self.h_norm, self.out_norm, kinds=(nn.LayerNorm,))
            and self.h_norm.eps == self.out_norm.eps
        ):
            return tree_selective_scan(
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
        return selective_scan(
            partial(self._tree_scan, tree=tree),
            *(self.dt_proj, self.h_norm, self.out_norm),
            *(x, dt, b, c, gate),
            A_log=self.A_log,
            Ds=self.Ds,
        )

    def _tree_scan(self, x: Tensor, decay: Tensor, tree: Tree) -> Tensor:
        return tree_scan(x, decay, tree, self.propagation)
