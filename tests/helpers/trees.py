"""Shared by operator tests: random trees, and slow, obvious implementations."""

import itertools

import torch
from hypothesis import strategies as st
from torch import Tensor

from grootvl_mm.ops import Tree, grid_tree

SIZES = st.tuples(st.integers(1, 9), st.integers(1, 9))
SEEDS = st.integers(0, 2**31 - 1)


def random_weight(batch: int, height: int, width: int, seed: int, levels: int = 0) -> Tensor:
    """(B, E) weights; with ``levels`` only so many different ones, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, (height - 1) * width + height * (width - 1))
    if levels:
        return torch.randint(levels, shape, generator=generator).float() - levels // 2
    return torch.randn(shape, generator=generator)


def random_scan(batch: int, height: int, width: int, channels: int, seed: int, dtype: torch.dtype) -> tuple:
    """x, decay and trees."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, height * width, channels)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    decay = torch.rand(shape, generator=generator, dtype=torch.float64)
    tree = grid_tree(random_weight(batch, height, width, seed), height, width)
    return x.to(dtype), decay.to(dtype), tree


def random_selective_scan(
    batch: int, height: int, width: int, channels: int, rank: int, seed: int, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], Tree]:
    """Inputs as in a layer after some training, and trees."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    vertices = height * width
    inputs = {
        "x": normal(batch, vertices, channels),
        "dt": normal(batch, vertices, rank),
        "b": normal(batch, vertices, 1),
        "c": normal(batch, vertices, 1),
        "gate": normal(batch, vertices, channels, scale=2.0),
        "dt_weight": normal(channels, rank, scale=0.5),
        "dt_bias": normal(channels, scale=2.0, mean=-2.0),
        "A_log": normal(channels, scale=0.3),
        "Ds": normal(channels),
    }
    for norm in ("h_norm", "out_norm"):
        inputs[f"{norm}_weight"] = normal(channels, scale=0.2, mean=1.0)
        inputs[f"{norm}_bias"] = normal(channels, scale=0.2)
    return inputs, grid_tree(random_weight(batch, height, width, seed), height, width)


def random_graph(vertices: int, more_edges: int, seed: int) -> Tensor:
    """(2, E) edges of a connected graph, in any order and direction: a random tree, and others anywhere."""
    generator = torch.Generator().manual_seed(seed)
    child = torch.arange(1, vertices)
    above = (torch.rand(len(child), generator=generator) * child).long()
    others = torch.randint(vertices, (2, more_edges), generator=generator)
    edges = torch.cat([torch.stack([above, child]), others], 1)
    edges = torch.randperm(vertices, generator=generator)[edges]
    return edges[:, torch.randperm(edges.shape[1], generator=generator)]


def kruskal(weight: Tensor, edge_index: Tensor, vertices: int) -> list[tuple[int, int]]:
    """Tree edges of one graph by Kruskal's algorithm with a stable sort: sorted, the lower vertex first."""
    ends = edge_index.t().tolist()
    leader = list(range(vertices))

    def find(v: int) -> int:
        while leader[v] != v:
            v = leader[v]
        return v

    edges = []
    for edge in sorted(range(len(ends)), key=weight.tolist().__getitem__):
        u, v = (find(end) for end in ends[edge])
        if u != v:
            leader[u] = v
            edges.append((min(ends[edge]), max(ends[edge])))
    return sorted(edges)


def path_to_root(parent: list[int], vertex: int) -> list[int]:
    """The vertices from ``vertex`` to the root, both included."""
    path = [vertex]
    while parent[path[-1]] != path[-1]:
        path.append(parent[path[-1]])
    return path


def similarity(decay: Tensor, parent: Tensor) -> Tensor:
    """S (L, L, D) of one image: the product of the decays along the path between each two vertices."""
    parents = parent.tolist()
    paths = [path_to_root(parents, v) for v in range(len(parents))]
    result = torch.ones(len(parents), len(parents), decay.shape[-1], dtype=decay.dtype)
    for i, j in itertools.product(range(len(parents)), repeat=2):
        for v in set(paths[i]) ^ set(paths[j]):
            result[i, j] *= decay[v]
    return result


def brute_force_scan(x: Tensor, decay: Tensor, tree: Tree, propagation: str) -> Tensor:
    """``h_i = sum_j S(i, j) x_j`` over all pairs, or over those below (up) or above (down) only."""
    outputs = []
    for image in range(x.shape[0]):
        weights = similarity(decay[image], tree.parent[image])
        if propagation != "all":
            parents = tree.parent[image].tolist()
            below = torch.zeros(len(parents), len(parents), dtype=torch.bool)
            for j in range(len(parents)):
                below[path_to_root(parents, j), j] = True
            weights = weights * (below if propagation == "up" else below.T).unsqueeze(-1)
        outputs.append(torch.einsum("ijd,jd->id", weights, x[image]))
    return torch.stack(outputs)


def assert_rooted(tree: Tree, root: int) -> None:
    """``parent`` reaches the root from everywhere, and ``order`` has every parent before its children."""
    for parent, order in zip(tree.parent.tolist(), tree.order.tolist(), strict=True):
        assert sorted(order) == list(range(len(parent)))
        assert order[0] == root
        position = {v: i for i, v in enumerate(order)}
        assert all((parent[v] == v) if v == root else position[parent[v]] < position[v] for v in order)
