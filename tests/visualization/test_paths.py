"""Quantities derived from trees, against slow and obvious implementations."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grootvl_mm.models import TreeSSM
from grootvl_mm.models.tree_ssm import raster_path
from grootvl_mm.ops import Tree, grid_tree, tree_scan
from grootvl_mm.ops.reference import grid_edges
from grootvl_mm.ops.scan import PROPAGATIONS
from grootvl_mm.visualization import (
    affinity,
    compared_scans,
    cut_segments,
    join_ranks,
    mean_decay,
    parent_edges,
    path_between,
    record_trees,
)
from tests.helpers.trees import SEEDS, SIZES, path_to_root, random_scan, random_weight, similarity

SMALL = settings(max_examples=15, deadline=None)


def sorted_edges(tree: Tree, weight: Tensor, height: int, width: int) -> list[int]:
    """Indices of the grid's edges that are in the tree of one image, lightest first, lower index first."""
    ends = list(zip(*(end.tolist() for end in grid_edges(height, width)), strict=True))
    inside = {tuple(edge) for edge in tree.edges()[0].tolist()}
    indices = [index for index, edge in enumerate(ends) if edge in inside]
    return sorted(indices, key=weight[0].tolist().__getitem__)


def grow(edges: list[tuple[int, int]], vertices: int) -> list[int]:
    """The lowest vertex that each vertex is joined with."""
    first = list(range(vertices))
    for lower, higher in edges:
        new, old = sorted((first[lower], first[higher]))
        first = [new if value == old else value for value in first]
    return first


@SMALL
@given(SIZES, SEEDS, st.sampled_from([0, 3]), st.data())
def test_edges_ranks_and_segments(size: tuple[int, int], seed: int, levels: int, data: st.DataObject) -> None:
    height, width = size
    vertices = height * width
    weight = random_weight(2, height, width, seed, levels)
    tree = grid_tree(weight, height, width, root=data.draw(st.integers(0, vertices - 1)))
    ends = list(zip(*(end.tolist() for end in grid_edges(height, width)), strict=True))
    cuts = data.draw(st.integers(0, vertices - 1))
    edges, ranks = parent_edges(tree, height, width), join_ranks(tree, weight, height, width)
    segments = cut_segments(tree, weight, height, width, cuts)
    for image in range(2):
        one = Tree(*(value[image : image + 1] for value in tree))
        expected = sorted_edges(one, weight[image : image + 1], height, width)
        for vertex, parent in enumerate(one.parent[0].tolist()):
            edge, rank = int(edges[image, vertex]), int(ranks[image, vertex])
            if vertex == parent:
                assert (edge, rank) == (-1, 0)
            else:
                assert ends[edge] == (min(vertex, parent), max(vertex, parent))
                assert expected[rank - 1] == edge
        first = grow([ends[edge] for edge in expected[: vertices - 1 - cuts]], vertices)
        numbers = {vertex: number for number, vertex in enumerate(sorted(set(first)))}
        assert segments[image].tolist() == [numbers[vertex] for vertex in first]
        assert len(numbers) == cuts + 1


def test_a_path_has_edges_that_are_not_of_the_grid() -> None:
    """They join last, and are cut first."""
    path = raster_path(1, 3, 4, "first", False, torch.device("cpu"))
    weight = torch.arange(17.0).unsqueeze(0)
    assert parent_edges(path, 3, 4).tolist() == [[-1, 8, 9, 10, -1, 11, 12, 13, -1, 14, 15, 16]]
    assert join_ranks(path, weight, 3, 4).tolist() == [[0, 1, 2, 3, 10, 4, 5, 6, 11, 7, 8, 9]]
    assert cut_segments(path, weight, 3, 4, 2).tolist() == [[0] * 4 + [1] * 4 + [2] * 4]


@pytest.mark.parametrize("cuts", [-1, 12])
def test_no_more_cuts_than_edges(cuts: int) -> None:
    weight = random_weight(1, 3, 4, seed=0)
    with pytest.raises(ValueError, match=f"cuts must be 0 to 11, the edges of a 3x4 tree, got {cuts}"):
        cut_segments(grid_tree(weight, 3, 4), weight, 3, 4, cuts)


FEW = st.tuples(st.integers(1, 4), st.integers(1, 5))


@SMALL
@given(FEW, SEEDS, st.sampled_from(PROPAGATIONS), st.data())
def test_affinity(size: tuple[int, int], seed: int, propagation: str, data: st.DataObject) -> None:
    height, width = size
    _, decay, tree = random_scan(2, height, width, 3, seed, torch.float64)
    vertices = data.draw(st.lists(st.integers(0, height * width - 1), min_size=1, max_size=3))
    actual = affinity(tree, decay, vertices, propagation)
    assert actual.shape == (2, len(vertices), height * width)
    for image in range(2):
        parents = tree.parent[image].tolist()
        matrix = similarity(decay[image], tree.parent[image]).mean(2)
        for number, vertex in enumerate(vertices):
            ways = [path_to_root(parents, other) for other in range(height * width)]
            kept = {
                "all": torch.ones(height * width),
                "up": torch.tensor([vertex in way for way in ways]),
                "down": torch.tensor([other in ways[vertex] for other in range(height * width)]),
            }[propagation]
            torch.testing.assert_close(actual[image, number], matrix[vertex] * kept)


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_affinity_is_the_derivative_of_the_scan(propagation: str) -> None:
    x, decay, tree = random_scan(1, 4, 5, 3, 0, torch.float32)
    columns = raster_path(1, 4, 5, "first", True, torch.device("cpu"))
    expected = []
    for path in (tree, columns):
        x.requires_grad_()
        output = tree_scan(x, decay, path, propagation)[0, 7].sum()
        expected.append(torch.autograd.grad(output, x)[0].mean(2).unsqueeze(1))
        torch.testing.assert_close(affinity(path, decay, [7], propagation), expected[-1])
    torch.testing.assert_close(affinity((tree, columns), decay, [7], propagation), sum(expected) / 2)


def test_affinity_of_a_position_outside() -> None:
    _, decay, tree = random_scan(1, 4, 5, 3, 0, torch.float32)
    with pytest.raises(IndexError, match=r"between 0 and 19, got 20"):
        affinity(tree, decay, [20])


def test_mean_decay() -> None:
    _, decay, tree = random_scan(1, 4, 5, 6, 0, torch.float64)
    mean = mean_decay(decay)
    assert mean.shape == (1, 20, 1)
    torch.testing.assert_close(mean[0, 3, 0], decay[0, 3].prod() ** (1 / 6))
    expected = similarity(decay[0], tree.parent[0]).log().mean(2).exp()
    torch.testing.assert_close(affinity(tree, mean, [3])[0, 0], expected[3])
    assert mean_decay(torch.zeros(1, 2, 3)).eq(0).all()


@SMALL
@given(SIZES, SEEDS, st.data())
def test_path_between(size: tuple[int, int], seed: int, data: st.DataObject) -> None:
    height, width = size
    tree = grid_tree(random_weight(2, height, width, seed), height, width)
    start, end = (data.draw(st.integers(0, height * width - 1)) for _ in range(2))
    way = path_between(tree, start, end, image=1)
    parents = tree.parent[1].tolist()
    assert (way[0], way[-1]) == (start, end)
    assert len(set(way)) == len(way)
    assert all(one == parents[other] or other == parents[one] for one, other in itertools.pairwise(way))


@pytest.mark.parametrize("scan", ["tree", "raster", "cross"])
@pytest.mark.parametrize("root", ["first", "last"])
def test_compared_scans_hold_what_the_layer_scans_along(scan: str, root: str) -> None:
    mixer = TreeSSM(8, tree_root=root, scan=scan)
    with record_trees(mixer) as records:
        mixer(torch.randn(2, 4, 5, 8))
    scans = compared_scans(records[0])
    assert list(scans) == ["tree", "raster", "cross"]
    for tree, other in zip(records[0].trees, scans[scan], strict=True):
        assert torch.equal(tree.parent, other.parent)
