"""grid_edge_weight, grid_tree and Tree."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grootvl_mm.ops import Tree, decompositions, grid_edge_weight, grid_tree, reference
from tests.helpers.threads import assert_same_with_any_number_of_threads
from tests.helpers.trees import SEEDS, SIZES, assert_rooted, kruskal, random_weight

METRICS = ("cosine", "euclidean", "manhattan")


def expected_weight(feature: torch.Tensor, metric: str) -> torch.Tensor:
    """The definition, edge by edge."""
    rows = feature.double().flatten(2)
    lower, higher = reference.grid_edges(*feature.shape[2:])
    first, second = rows[:, :, lower], rows[:, :, higher]
    if metric == "cosine":
        norms = first.norm(dim=1).clamp(min=1e-8) * second.norm(dim=1).clamp(min=1e-8)
        return torch.exp(-(first * second).sum(1) / norms)
    difference = first - second
    return torch.exp(difference.square().sum(1) if metric == "euclidean" else difference.abs().sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_edge_weight_is_as_defined(device: torch.device, metric: str, dtype: torch.dtype) -> None:
    for shape in [(2, 5, 4, 7), (1, 16, 3, 3), (1, 37, 6, 2), (2, 3, 1, 1), (1, 3, 1, 6), (1, 3, 6, 1), (0, 3, 4, 4)]:
        feature = (0.3 * torch.randn(shape)).to(dtype)
        expected = expected_weight(feature, metric)
        weight = grid_edge_weight(feature.to(device), metric)
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight.cpu().double(), expected, rtol=2e-6, atol=1e-6)
        logarithm = grid_edge_weight(feature.to(device), metric, log=True)
        torch.testing.assert_close(logarithm.cpu().double(), expected.log(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_edge_weight_of_many_channels(device: torch.device, metric: str, dtype: torch.dtype) -> None:
    """Channels that fill the lanes of a warp once or twice, leave some idle, or fit in no pack; alone as in a batch."""
    for channels, height, width in [(128, 9, 5), (256, 8, 2), (160, 17, 6), (66, 3, 4), (129, 2, 3)]:
        feature = (0.3 * torch.randn(2, channels, height, width)).to(dtype)
        weight = grid_edge_weight(feature.to(device), metric, log=True)
        expected = expected_weight(feature, metric).log()
        torch.testing.assert_close(weight.cpu().double(), expected, rtol=2e-5, atol=1e-6)
        assert torch.equal(grid_edge_weight(feature[1:].to(device), metric, log=True), weight[1:])


@pytest.mark.parametrize("metric", METRICS)
def test_edge_weight_of_any_memory_format(device: torch.device, metric: str) -> None:
    feature = torch.randn(2, 9, 5, 6, device=device)
    expected = grid_edge_weight(feature, metric)
    for strided in (
        feature.contiguous(memory_format=torch.channels_last),
        feature.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat([feature, feature], dim=1)[:, :9],
    ):
        assert torch.equal(grid_edge_weight(strided, metric), expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [0.0, 0.37, -3.0])
def test_equal_features_have_equal_weights_everywhere(device: torch.device, metric: str, value: float) -> None:
    feature = torch.full((2, 19, 8, 11), value, device=device)
    weight = grid_edge_weight(feature, metric)
    assert weight.unique().numel() == 1


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_any_feature_has_finite_weights_and_a_tree(device: torch.device, metric: str, value: float) -> None:
    feature = torch.randn(2, 3, 5, 4, device=device)
    feature[0, :, 2, 1] = value
    feature[1] = value
    for log in (False, True):
        weight = grid_edge_weight(feature, metric, log)
        assert weight.isfinite().all()
        assert_rooted(grid_tree(weight, 5, 4), 0)


def test_exponents_do_not_lose_order_by_overflow(device: torch.device) -> None:
    feature = 20 * torch.randn(1, 64, 6, 6, device=device)
    assert grid_edge_weight(feature, "euclidean").unique().numel() == 1
    assert grid_edge_weight(feature, "euclidean", log=True).unique().numel() > 50


@settings(max_examples=60, deadline=None)
@given(SIZES, SEEDS, st.sampled_from([0, 1, 2, 5]), st.data())
def test_tree_equals_kruskal_with_stable_sort(size: tuple, seed: int, levels: int, data: st.DataObject) -> None:
    height, width = size
    weight = random_weight(2, height, width, seed, levels)
    root = data.draw(st.integers(0, height * width - 1))
    tree = grid_tree(weight, height, width, root)
    edge_index = torch.stack(reference.grid_edges(height, width))
    for of_image, edges in zip(weight, tree.edges().tolist(), strict=True):
        assert list(map(tuple, edges)) == kruskal(of_image, edge_index, height * width)
    assert_rooted(tree, root)
    parent, order = reference.grid_tree(weight, height, width, root)
    assert torch.equal(tree.parent, parent)
    assert_rooted(Tree(parent, order), root)


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 17), (17, 1), (2, 2), (33, 47), (64, 64), (7, 200), (100, 103)]
)
@pytest.mark.parametrize("levels", [0, 1, 3, 1000])
def test_tree_equals_reference(device: torch.device, height: int, width: int, levels: int) -> None:
    weight = random_weight(3, height, width, seed=height + width, levels=levels)
    root = height * width - 1
    tree = grid_tree(weight.to(device), height, width, root).to("cpu")
    assert tree.parent.dtype == tree.order.dtype == torch.int32
    assert torch.equal(tree.parent, reference.grid_tree(weight, height, width, root)[0])
    assert_rooted(tree, root)


def test_a_thousand_trees_with_ties_equal_the_reference(device: torch.device) -> None:
    height, width = 9, 11
    weight = torch.cat([random_weight(250, height, width, seed, levels) for seed, levels in enumerate((0, 2, 5, 40))])
    tree = grid_tree(weight.to(device), height, width)
    assert torch.equal(tree.parent.cpu(), reference.grid_tree(weight, height, width, 0)[0])


def test_a_million_vertices(device: torch.device) -> None:
    weight = random_weight(1, 1000, 1000, seed=0, levels=4096)
    expected, _ = decompositions.grid_tree(weight, 1000, 1000, 0)
    tree = grid_tree(weight.to(device), 1000, 1000)
    assert torch.equal(tree.parent.cpu(), expected)
    assert torch.equal(tree.order.cpu().sort().values, torch.arange(1_000_000, dtype=torch.int32)[None])


def test_negative_zero_ties_with_zero(device: torch.device) -> None:
    weight = torch.zeros(1, 12, device=device)
    expected = grid_tree(weight, 3, 3).parent
    weight[0, ::2] = -0.0
    assert torch.equal(grid_tree(weight, 3, 3).parent, expected)


def test_extreme_weights(device: torch.device) -> None:
    weight = torch.full((1, 12), torch.finfo(torch.float32).max, device=device)
    weight[0, 3:7] = torch.finfo(torch.float32).min
    weight[0, 7] = torch.finfo(torch.float32).smallest_normal / 2
    expected = reference.grid_tree(weight.cpu(), 3, 3, 0)[0]
    assert torch.equal(grid_tree(weight, 3, 3).parent.cpu(), expected)


def test_empty_batch_and_strided_weights(device: torch.device) -> None:
    tree = grid_tree(torch.empty(0, 12, device=device), 3, 3)
    assert tree.parent.shape == tree.order.shape == (0, 9)
    weight = torch.randn(12, 4, device=device).t()
    assert not weight.is_contiguous()
    assert torch.equal(grid_tree(weight, 3, 3).parent, grid_tree(weight.contiguous(), 3, 3).parent)


def test_tree_methods() -> None:
    tree = Tree(torch.tensor([[1, 1, 3, 1]], dtype=torch.int32), torch.tensor([[1, 0, 3, 2]], dtype=torch.int32))
    assert tree.edges().tolist() == [[[0, 1], [1, 3], [2, 3]]]
    assert tree.depth().tolist() == [[1, 0, 2, 1]]
    assert tree.to("cpu").parent is tree.parent
    single = grid_tree(torch.empty(2, 0), 1, 1)
    assert single.edges().shape == (2, 0, 2)
    assert single.depth().tolist() == [[0], [0]]


@pytest.mark.cpu_kernels
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    feature = torch.randn(3, 40, 30, 31)

    def run() -> tuple:
        weight = grid_edge_weight(feature)
        return weight, *grid_tree(weight, 30, 31)

    assert_same_with_any_number_of_threads(run)


def test_inputs_are_not_written_and_get_no_gradient(device: torch.device) -> None:
    feature = torch.randn(2, 6, 5, 5, device=device, requires_grad=True)
    before = feature.detach().clone()
    weight = grid_edge_weight(feature)
    assert not weight.requires_grad
    weight_before = weight.clone()
    tree = grid_tree(weight, 5, 5)
    assert not tree.parent.requires_grad
    assert torch.equal(feature, before)
    assert torch.equal(weight, weight_before)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: grid_edge_weight([1.0]), TypeError, r"feature must be a tensor \(B, C, H, W\), got list"),
        (lambda: grid_edge_weight(torch.ones(2, 3, 4)), ValueError, r"shape \(B, C, H, W\), got \(2, 3, 4\)"),
        (lambda: grid_edge_weight(torch.ones(1, 2, 3, 3, dtype=torch.int32)), TypeError, "got torch.int32"),
        (lambda: grid_edge_weight(torch.ones(1, 2, 0, 3)), ValueError, r"H >= 1.*\(1, 2, 0, 3\)"),
        (lambda: grid_edge_weight(torch.ones(1, 2, 3, 3), "l2"), ValueError, "cosine, euclidean, manhattan, got 'l2'"),
        (lambda: grid_tree(torch.ones(12), 3, 3), ValueError, r"\(B, E\), got \(12,\)"),
        (lambda: grid_tree(torch.ones(1, 12, dtype=torch.float64), 3, 3), TypeError, "float32, got torch.float64"),
        (lambda: grid_tree(torch.ones(1, 12), 3, 4), ValueError, r"17 columns for a 3 x 4 grid.*\(1, 12\)"),
        (lambda: grid_tree(torch.ones(1, 12), 0, 4), ValueError, "at least 1, got 0 and 4"),
        (lambda: grid_tree(torch.ones(1, 12), 3, 3, root=9), ValueError, "0..8, got 9"),
        (lambda: grid_tree(torch.ones(1, 12), 3, 3, root=-1), ValueError, "0..8, got -1"),
    ],
)
def test_bad_input_is_explained(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_must_be_finite(value: float) -> None:
    weight = torch.ones(2, 12)
    weight[1, 5] = value
    with pytest.raises(ValueError, match="edge_weight must be finite"):
        grid_tree(weight, 3, 3)
    with pytest.raises(ValueError, match="edge_weight must be finite"):
        reference.grid_tree(weight, 3, 3, 0)
