"""The operators as straight lines of PyTorch's own operators."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grootvl_mm.ops import (
    decompositions,
    depthwise_conv_silu,
    grid_edge_weight,
    grid_tree,
    layer_norm,
    residual_layer_norm,
    tree_scan,
    tree_selective_scan,
)
from grootvl_mm.ops.scan import PROPAGATIONS
from grootvl_mm.ops.tree import METRICS
from tests.helpers.marks import needs_compiler
from tests.helpers.trees import SEEDS, SIZES, random_scan, random_selective_scan, random_weight


@settings(max_examples=60, deadline=None)
@given(SIZES, SEEDS, st.integers(0, 4), st.data())
def test_the_same_parents(size: tuple, seed: int, levels: int, data: st.DataObject) -> None:
    root = data.draw(st.integers(0, size[0] * size[1] - 1))
    weight = random_weight(2, *size, seed, levels)
    parent, _ = decompositions.grid_tree(weight, *size, root)
    assert torch.equal(parent, grid_tree(weight, *size, root).parent)
    assert parent.dtype == torch.int32


def test_the_same_parents_in_a_large_grid() -> None:
    weight = random_weight(3, 56, 40, seed=0)
    assert torch.equal(decompositions.grid_tree(weight, 56, 40, 7)[0], grid_tree(weight, 56, 40, 7).parent)


@pytest.mark.parametrize("weight", [torch.zeros(1, 299), torch.arange(299.0)[None]], ids=["equal", "rising"])
def test_the_longest_path(weight: torch.Tensor) -> None:
    """One row of 300 vertices, with decays that forget little."""
    parent, order = decompositions.grid_tree(weight, 1, 300, 0)
    assert parent.tolist() == [[0, *range(299)]]
    x, decay = torch.randn(1, 300, 3), torch.full((1, 300, 3), 0.999)
    h = decompositions.tree_scan(x, decay, parent, order, "all")
    torch.testing.assert_close(h, tree_scan(x, decay, grid_tree(weight, 1, 300)), rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(SIZES, SEEDS, st.sampled_from(PROPAGATIONS))
def test_the_same_scan(size: tuple, seed: int, propagation: str) -> None:
    x, decay, tree = random_scan(2, *size, 5, seed, torch.float64)
    h = decompositions.tree_scan(x, decay, *tree, propagation)
    torch.testing.assert_close(h, tree_scan(x, decay, tree, propagation))


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_the_same_selective_scan(propagation: str) -> None:
    inputs, tree = random_selective_scan(2, 5, 6, 8, 2, seed=0)
    y = decompositions.tree_selective_scan(*inputs.values(), *tree, 1e-5, propagation)
    torch.testing.assert_close(y, tree_selective_scan(**inputs, tree=tree, propagation=propagation))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_the_same_edge_weights(metric: str, log: bool) -> None:
    feature = torch.randn(2, 7, 5, 6)
    weight = decompositions.grid_edge_weight(feature, metric, log)
    torch.testing.assert_close(weight, grid_edge_weight(feature, metric, log), rtol=1e-4, atol=1e-5)
    feature[0, 0, 0, 0] = torch.nan
    assert decompositions.grid_edge_weight(feature, metric, log).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_values_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    x, decay, tree = random_scan(1, 8, 9, 4, seed=0, dtype=dtype)
    h = decompositions.tree_scan(x, decay, *tree, "all")
    assert h.dtype == dtype
    torch.testing.assert_close(h, tree_scan(x, decay, tree))


class Layer(torch.nn.Module):
    """All operators."""

    def forward(self, feature: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, H * W, C)."""
        tree = grid_tree(grid_edge_weight(feature), *feature.shape[2:])
        x = feature.flatten(2).transpose(1, 2)
        vectors = ("dt_bias", "A_log", "Ds", "h_norm_weight", "h_norm_bias", "out_norm_weight", "out_norm_bias")
        y = tree_selective_scan(
            *(x, x[..., :2], x[..., :1], x[..., 1:2], x),
            dt_weight=torch.ones(x.shape[2], 2),
            **dict.fromkeys(vectors, torch.ones(x.shape[2])),
            tree=tree,
        )
        ones = torch.ones(x.shape[2])
        maps = depthwise_conv_silu(feature.permute(0, 2, 3, 1), torch.ones(x.shape[2], 1, 3, 3)).flatten(1, 2)
        total, normed = residual_layer_norm(y, maps, ones, ones)
        return tree_scan(total, layer_norm(normed, ones, ones).sigmoid(), tree)


@needs_compiler
def test_a_program_without_operators_of_our_own() -> None:
    """Nothing in it depends on the data: it serves other images, and more of them."""
    feature = torch.randn(2, 4, 3, 4)
    program = torch.export.export(Layer(), (feature,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    decomposed = program.run_decompositions(decompositions.decomposition_table())
    targets = {str(node.target) for node in decomposed.graph.nodes if node.op == "call_function"}
    assert any(target.startswith("aten.scatter_reduce") for target in targets)
    assert not any(target.startswith("grootvl") for target in targets)
    other = torch.randn(3, 4, 3, 4)
    torch.testing.assert_close(decomposed.module()(other), Layer()(other), rtol=1e-4, atol=1e-4)
