"""sequence_edges and sequence_edge_weight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grootvl_mm.ops import graph_tree, sequence_edge_weight, sequence_edges
from tests.helpers.marks import needs_compiler
from tests.helpers.trees import SEEDS, kruskal

LENGTHS, REACHES = st.integers(1, 9), st.integers(1, 5)


def listed_edges(length: int, reach: int) -> list[tuple[int, int]]:
    return [(t, t - gap) for t in range(length - 1, 0, -1) for gap in range(1, reach + 1) if gap <= t]


def outer_product(u: Tensor, b: Tensor) -> Tensor:
    return (u.unsqueeze(-1) * b.unsqueeze(-2)).flatten(2)


def cosine_weight(feature: Tensor, reach: int) -> Tensor:
    """By PyTorch's cosine, edge by edge."""
    edges = listed_edges(feature.shape[1], reach)
    weights = [torch.exp(-torch.cosine_similarity(feature[:, t], feature[:, s], dim=-1)) for t, s in edges]
    return torch.stack([feature.new_empty(len(feature)), *weights], 1)[:, 1:]


@settings(max_examples=30, deadline=None)
@given(LENGTHS, REACHES)
def test_edges_in_the_order_that_breaks_ties(length: int, reach: int) -> None:
    edges = sequence_edges(length, reach)
    assert edges.dtype == torch.int64
    assert [tuple(edge) for edge in edges.t().tolist()] == listed_edges(length, reach)


def test_edges_on_any_device(device: torch.device) -> None:
    edges = sequence_edges(5, device=device)
    assert edges.device.type == device.type
    assert edges.tolist() == [[4, 4, 4, 3, 3, 3, 2, 2, 1], [3, 2, 1, 2, 1, 0, 1, 0, 0]]
    assert torch.equal(sequence_edges(5), edges.cpu())


@settings(max_examples=30, deadline=None)
@given(LENGTHS, REACHES, SEEDS)
def test_weight_is_that_of_the_outer_product(length: int, reach: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, b, c = (torch.randn(2, length, n, generator=generator, dtype=torch.float64) for n in (7, 4, 2))
    torch.testing.assert_close(sequence_edge_weight(u, reach), cosine_weight(u, reach))
    torch.testing.assert_close(sequence_edge_weight((u, b), reach), cosine_weight(outer_product(u, b), reach))
    both = outer_product(outer_product(u, b), c)
    torch.testing.assert_close(sequence_edge_weight([u, b, c], reach), cosine_weight(both, reach))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_sums_are_wide(device: torch.device, dtype: torch.dtype) -> None:
    u, b = torch.randn(2, 20, 300).to(dtype), torch.randn(2, 20, 16).to(dtype)
    weight = sequence_edge_weight((u.to(device), b.to(device)))
    assert weight.dtype == torch.promote_types(dtype, torch.float32)
    expected = sequence_edge_weight((u.double(), b.double()))
    torch.testing.assert_close(weight.cpu().double(), expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-5, 1e-3])
def test_small_norms_are_those_of_the_outer_product(scale: float) -> None:
    u, b = scale * torch.randn(1, 6, 3, dtype=torch.float64), scale * torch.randn(1, 6, 2, dtype=torch.float64)
    torch.testing.assert_close(sequence_edge_weight((u, b)), cosine_weight(outer_product(u, b), 3))


@settings(max_examples=30, deadline=None)
@given(LENGTHS, REACHES, st.data())
def test_outside_of_its_span_a_sequence_is_a_chain(length: int, reach: int, data: st.DataObject) -> None:
    start = torch.tensor([data.draw(st.integers(0, length - 1)) for _ in range(3)])
    count = torch.tensor([data.draw(st.integers(0, length + 2)) for _ in range(3)])
    feature = torch.randn(3, length, 5)
    everywhere = sequence_edge_weight(feature, reach)
    for first, number in ((start, count), (start.int(), count.int()), (start, None), (None, count)):
        weight = sequence_edge_weight(feature, reach, first, number)
        for k in range(3):
            begin = 0 if first is None else int(first[k])
            end = length if number is None else begin + int(number[k])
            for edge, (t, s) in enumerate(listed_edges(length, reach)):
                expected = everywhere[k, edge] if t - s == 1 or begin <= s < t < end else torch.inf
                assert weight[k, edge] == expected


def test_sequences_of_a_batch_do_not_depend_on_each_other(device: torch.device) -> None:
    """The tree of a sequence is that of its span alone, wherever that lies, with chains before and behind."""
    length, start, count = 12, torch.tensor([0, 3, 5]), torch.tensor([6, 9, 2])
    u, b = torch.randn(3, length, 40, device=device), torch.randn(3, length, 4, device=device)
    weight = sequence_edge_weight((u, b), 3, start.to(device), count.to(device))
    root = torch.full((3,), length - 1, device=device)
    edges = graph_tree(sequence_edges(length, device=device), weight, length, root).edges().tolist()
    for k, (begin, number) in enumerate(zip(start.tolist(), count.tolist(), strict=True)):
        span = slice(begin, begin + number)
        alone = sequence_edge_weight((u[k : k + 1, span], b[k : k + 1, span]))
        inside = kruskal(alone[0].cpu(), sequence_edges(number), number)
        inside = {(begin + low, begin + high) for low, high in inside}
        chain = {(t, t + 1) for t in range(length - 1) if not begin <= t < begin + number - 1}
        assert set(map(tuple, edges[k])) == inside | chain


def test_equal_tokens_have_equal_weights_everywhere(device: torch.device) -> None:
    for channels in (5, 37, 1536):
        token, state = torch.randn(channels, device=device), torch.randn(16, device=device)
        for batch, length in ((1, 3), (1, 50), (3, 41)):
            features = token.expand(batch, length, -1), state.expand(batch, length, -1).contiguous()
            weight = sequence_edge_weight(features)
            assert weight.unique().numel() == 1
            # As a convolution along the tokens leaves them.
            strided = [feature.transpose(1, 2).contiguous().transpose(1, 2) for feature in features]
            assert torch.equal(sequence_edge_weight(strided), weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_any_feature_has_a_tree(device: torch.device, value: float) -> None:
    feature = torch.randn(2, 8, 4, device=device)
    feature[0, 3] = value
    feature[1] = value
    weight = sequence_edge_weight((feature, feature))
    assert weight.isfinite().all()
    graph_tree(sequence_edges(8, device=device), weight, 8)


def test_strided_features_empty_batches_and_gradients(device: torch.device) -> None:
    feature = torch.randn(2, 6, 9, device=device, requires_grad=True)
    before = feature.detach().clone()
    expected = sequence_edge_weight(feature)
    assert not expected.requires_grad
    assert torch.equal(feature, before)
    strided = feature.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(sequence_edge_weight(strided), expected)
    assert sequence_edge_weight(feature[:0]).shape == (0, 12)
    assert sequence_edge_weight(feature[:, :1]).shape == (2, 0)


FEATURE = torch.ones(2, 5, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sequence_edges(0), ValueError, "at least 1, got 0 and 3"),
        (lambda: sequence_edges(5, 0), ValueError, "at least 1, got 5 and 0"),
        (lambda: sequence_edge_weight(()), ValueError, "at least one tensor .* got none"),
        (lambda: sequence_edge_weight([[1.0]]), TypeError, r"features\[0\] must be a tensor \(B, L, C\), got list"),
        (lambda: sequence_edge_weight(FEATURE[0]), ValueError, r"shape \(B, L, C\), got \(5, 3\)"),
        (lambda: sequence_edge_weight(FEATURE.long()), TypeError, "got torch.int64"),
        (lambda: sequence_edge_weight(FEATURE[:, :0]), ValueError, r"at least one token, got shape \(2, 0, 3\)"),
        (lambda: sequence_edge_weight(FEATURE, 0), ValueError, "reach must be at least 1, got 0"),
        (lambda: sequence_edge_weight((FEATURE, FEATURE[:, :4])), ValueError, r"\(2, 5, 3\).* and \(2, 4, 3\)"),
        (lambda: sequence_edge_weight((FEATURE, FEATURE.half())), ValueError, "float32 and .* torch.float16"),
        (lambda: sequence_edge_weight((FEATURE, FEATURE.to("meta"))), ValueError, r"features\[1\] on meta"),
        (lambda: sequence_edge_weight(FEATURE, 3, FEATURE[:, 0, 0]), TypeError, "span_start .* got torch.float32"),
        (lambda: sequence_edge_weight(FEATURE, 3, None, torch.tensor(4)), ValueError, r"span_length .* got \(\)"),
        (
            lambda: sequence_edge_weight(FEATURE, 3, torch.tensor([0, 0, 0])),
            ValueError,
            r"span_start must have a value for each of the 2 sequences, got shape \(3,\)",
        ),
    ],
)
def test_bad_input_is_explained(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@needs_compiler
@pytest.mark.parametrize("lengths", [[9], pytest.param([9, 12, 30], marks=pytest.mark.slow)])
def test_compiles_as_one_graph(device: torch.device, lengths: list[int]) -> None:
    def tree(u: Tensor, b: Tensor, start: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        edges = sequence_edges(u.shape[1], device=u.device)
        weight = sequence_edge_weight((u, b), 3, start, count)
        return weight, graph_tree(edges, weight, u.shape[1], start + count - 1).parent

    compiled = torch.compile(tree, fullgraph=True, backend="aot_eager", dynamic=len(lengths) > 1)
    spans = torch.tensor([0, 2], device=device), torch.tensor([4, 3], device=device)
    for length in lengths:
        u, b = torch.randn(2, length, 8, device=device), torch.randn(2, length, 4, device=device)
        torch.testing.assert_close(compiled(u, b, *spans), tree(u, b, *spans))
