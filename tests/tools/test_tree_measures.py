"""tools/analysis_tools/tree_measures.py: measures of trees against slow, obvious implementations."""

from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from grootvl_mm.ops import Tree, grid_tree
from grootvl_mm.ops.reference import grid_edges
from tests.helpers.tool_runs import load_script
from tests.helpers.trees import SEEDS, random_weight

SMALL = st.tuples(st.integers(2, 6), st.integers(2, 6))


@pytest.fixture(scope="module")
def measures() -> ModuleType:
    return load_script("tools/analysis_tools/tree_measures.py")


def random_tree(height: int, width: int, seed: int) -> Tree:
    return grid_tree(random_weight(1, height, width, seed), height, width)


def edges_of(tree: Tree) -> set[tuple[int, int]]:
    return set(map(tuple, tree.edges()[0].tolist()))


@settings(max_examples=20)
@given(SMALL, SEEDS)
def test_agreement_and_crossing(measures, size, seed) -> None:
    height, width = size
    first, second = random_tree(*size, seed), random_tree(*size, seed + 1)
    labels = torch.randint(-1, 3, (height * width,), generator=torch.Generator().manual_seed(seed))
    count = height * width - 1
    assert measures.agreement(first, first) == 1
    assert measures.agreement(first, second) == pytest.approx(len(edges_of(first) & edges_of(second)) / count)
    inside = [(a, b) for a, b in edges_of(first) if labels[a] >= 0 and labels[b] >= 0]
    expected = sum(int(labels[a] != labels[b]) for a, b in inside) / max(len(inside), 1)
    assert measures.crossing_share(first, labels) == pytest.approx(expected)


@settings(max_examples=20)
@given(st.tuples(st.integers(1, 6), st.integers(1, 6)), SEEDS)
def test_edge_mask_is_that_of_the_grid(measures, size, seed) -> None:
    height, width = size
    tree = random_tree(height, width, seed)
    low, high = grid_edges(height, width)
    chosen = measures.edge_mask(tree, width)[0]
    assert set(zip(low[chosen].tolist(), high[chosen].tolist(), strict=True)) == edges_of(tree)


@settings(max_examples=10)
@given(SMALL, SEEDS, st.booleans())
def test_tree_of_a_mirrored_image_is_the_mirrored_tree(measures, size, seed, horizontal) -> None:
    height, width = size
    weight = random_weight(1, height, width, seed)
    vertical = weight[:, : (height - 1) * width].view(1, height - 1, width)
    across = weight[:, (height - 1) * width :].view(1, height, width - 1)
    axis = 2 if horizontal else 1
    mirrored = torch.cat([vertical.flip(axis).flatten(1), across.flip(axis).flatten(1)], dim=1)
    trees = (grid_tree(weight, height, width), grid_tree(mirrored, height, width))
    assert measures.flip_agreement(*trees, width, horizontal=horizontal) == 1
    # Unless the mirror image is the same: without the mirror, not all edges agree with those of a lopsided tree.
    if height > 3 and width > 3:
        assert measures.flip_agreement(trees[0], trees[0], width, horizontal=horizontal) < 1


def test_coarse_agreement(measures) -> None:
    """Rows joined at the left, in both sizes; then at the right in the smaller one."""

    def comb(height: int, width: int, column: int) -> Tree:
        vertical = torch.ones(1, height - 1, width)
        vertical[:, :, column] = 0
        weight = torch.cat([vertical.flatten(1), torch.zeros(1, height * (width - 1))], dim=1)
        return grid_tree(weight, height, width)

    sizes = ((4, 6), (2, 3))
    assert measures.coarse_agreement(comb(4, 6, 0), comb(2, 3, 0), sizes) == 1
    assert measures.coarse_agreement(comb(4, 6, 0), comb(2, 3, 2), sizes) == pytest.approx(4 / 5)


def test_least_crossing_share(measures) -> None:
    labels = np.array([[0, 0, 1], [0, 2, 1], [0, 0, -1]])  # three regions, eight positions
    assert measures.least_crossing_share(labels) == pytest.approx(2 / 7)
    assert measures.least_crossing_share(np.zeros((3, 3), int)) == 0


@settings(max_examples=20)
@given(SMALL, SEEDS)
def test_auc(measures, size, seed) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, size)
    labels[0, :2], labels[1, 0] = 0, 1
    low, high = grid_edges(*size)
    weight = torch.from_numpy(rng.integers(0, 4, len(low))).float()
    border = labels.ravel()[low] != labels.ravel()[high]
    pairs = [(b, i) for b in weight[border].tolist() for i in weight[~border].tolist()]
    expected = np.mean([(b > i) + 0.5 * (b == i) for b, i in pairs])
    assert measures.border_auc(weight, labels) == pytest.approx(expected)


def test_rank_correlation_is_scipys(measures) -> None:
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 5, (3, 12, 2))
    expected = [spearmanr(*sample.T).statistic for sample in pairs]
    np.testing.assert_allclose(measures.rank_correlation(pairs.astype(float)), expected)


def test_interval_covers_the_mean(measures) -> None:
    """In about 95 of 100 cases."""
    rng = np.random.default_rng(0)
    found = [measures.interval(rng.normal(1, 1, 60)) for _ in range(100)]
    assert 88 <= sum(one["low"] <= 1 <= one["high"] for one in found) <= 100
    assert all(one["low"] <= one["value"] <= one["high"] and one["count"] == 60 for one in found)


def test_other_trees_span_the_grid(measures) -> None:
    feature = torch.randn(1, 6, 5, 4)
    trees = measures.other_trees(feature, "cosine", torch.Generator().manual_seed(0), 3)
    assert {name: len(tree.parent) for name, tree in trees.items()} == {
        **{"maximum": 1, "random": 3, "raster": 1},
        "8-connected": 1,
    }
    weight = measures.metric_weight(feature, "cosine")
    minimum = grid_tree(weight, 5, 4)
    total = {name: float(weight[measures.edge_mask(tree, 4)[:1]].sum()) for name, tree in
             {"minimum": minimum, **trees}.items() if name not in ("raster", "8-connected")}  # fmt: skip
    assert total["minimum"] < total["random"] < total["maximum"]


@settings(max_examples=10)
@given(SMALL, SEEDS)
def test_eight_neighbours(measures, size, seed) -> None:
    height, width = size
    edges = measures.eight_neighbours(height, width)
    pairs = set(map(tuple, edges.T.tolist()))
    expected = {
        (a, b)
        for a in range(height * width)
        for b in range(a + 1, height * width)
        if max(abs(a // width - b // width), abs(a % width - b % width)) == 1
    }
    assert len(pairs) == edges.shape[1]
    assert {tuple(sorted(pair)) for pair in pairs} == expected
    feature = torch.randn(1, 6, height, width, generator=torch.Generator().manual_seed(seed))
    tree = measures.eight_connected_tree(feature)
    weight = torch.nn.functional.normalize(feature, dim=1).flatten(2)[0]
    total = [-sum(float(weight[:, a] @ weight[:, b]) for a, b in edges_of(one)) for one in
             (tree, grid_tree(measures.metric_weight(feature, "cosine"), height, width))]  # fmt: skip
    assert total[0] <= total[1] + 1e-4
