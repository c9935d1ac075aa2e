"""graph_tree, and scans along its trees."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grootvl_mm.ops import Tree, _library, graph_tree, grid_tree, reference, sequence_edges, tree_scan
from tests.helpers.marks import needs_compiler
from tests.helpers.threads import assert_same_with_any_number_of_threads
from tests.helpers.trees import SEEDS, SIZES, assert_rooted, kruskal, random_graph, random_weight

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
GRAPHS = st.tuples(st.integers(1, 12), st.integers(0, 25))
TRIANGLE = torch.tensor([[0, 1, 2], [1, 2, 0]])


def edges_of(tree: Tree) -> list[list[tuple[int, int]]]:
    """The edges of each tree, as Kruskal's algorithm lists them."""
    return [list(map(tuple, edges)) for edges in tree.edges().tolist()]


def neighbours(shape: tuple[int, ...], steps: list[tuple[int, ...]]) -> Tensor:
    """(2, E) edges of an image or a volume, which join positions some steps apart."""
    vertex = torch.arange(torch.Size(shape).numel()).view(shape)
    edges = []
    for step in steps:
        here = tuple(slice(max(-by, 0), size - max(by, 0)) for by, size in zip(step, shape, strict=True))
        there = tuple(slice(max(by, 0), size - max(-by, 0)) for by, size in zip(step, shape, strict=True))
        edges.append(torch.stack([vertex[here], vertex[there]]).flatten(1))
    return torch.cat(edges, 1)


@settings(max_examples=60, deadline=None)
@given(GRAPHS, SEEDS, st.sampled_from([0, 1, 2, 5]), st.data())
def test_tree_equals_kruskal_with_stable_sort(size: tuple, seed: int, levels: int, data: st.DataObject) -> None:
    edge_index = random_graph(*size, seed)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, edge_index.shape[1], generator=generator)
    if levels:
        weight = (weight * levels).round()
    root = torch.tensor(data.draw(st.lists(st.integers(0, size[0] - 1), min_size=2, max_size=2)))
    tree = graph_tree(edge_index, weight, size[0], root)
    assert edges_of(tree) == [kruskal(of_tree, edge_index, size[0]) for of_tree in weight]
    parent, order = reference.graph_tree(edge_index, weight, size[0], root)
    assert torch.equal(tree.parent, parent)
    for k in range(2):
        assert_rooted(Tree(*(part[k : k + 1] for part in tree)), int(root[k]))
        assert_rooted(Tree(parent[k : k + 1], order[k : k + 1]), int(root[k]))


@settings(max_examples=30, deadline=None)
@given(GRAPHS, SEEDS)
def test_tree_equals_that_of_scipy(size: tuple, seed: int) -> None:
    csgraph = pytest.importorskip("scipy.sparse.csgraph")
    vertices = size[0]
    edge_index = random_graph(*size, seed)
    # All different, since scipy breaks ties in its own way, and none of them 0, which is no edge to scipy.
    weight = 1.0 + torch.randperm(edge_index.shape[1], generator=torch.Generator().manual_seed(seed))
    matrix = torch.full((vertices, vertices), torch.inf)
    for (u, v), of_edge in zip(edge_index.t().tolist(), weight, strict=True):
        matrix[u, v] = matrix[v, u] = torch.minimum(matrix[u, v], of_edge)
    matrix = matrix.masked_fill(matrix.isinf(), 0.0).fill_diagonal_(0.0)
    expected = csgraph.minimum_spanning_tree(matrix.numpy()).nonzero()
    expected = sorted((min(edge), max(edge)) for edge in zip(*(ends.tolist() for ends in expected), strict=True))
    assert edges_of(graph_tree(edge_index, weight[None], vertices)) == [expected]


@settings(max_examples=40, deadline=None)
@given(SIZES, SEEDS, st.sampled_from([0, 1, 2, 5]), st.data())
def test_tree_of_the_grid_is_that_of_grid_tree(size: tuple, seed: int, levels: int, data: st.DataObject) -> None:
    height, width = size
    weight = random_weight(2, height, width, seed, levels)
    root = data.draw(st.integers(0, height * width - 1))
    tree = graph_tree(torch.stack(reference.grid_edges(height, width)), weight, height * width, root)
    assert torch.equal(tree.parent, grid_tree(weight, height, width, root).parent)
    assert_rooted(tree, root)


@pytest.mark.parametrize("size", [(33, 47), (100, 103)])
@pytest.mark.parametrize("levels", [0, 1, 1000])
def test_tree_of_a_large_grid_is_that_of_grid_tree(device: torch.device, size: tuple[int, int], levels: int) -> None:
    weight = random_weight(3, *size, seed=0, levels=levels).to(device)
    edge_index = torch.stack(reference.grid_edges(*size, device))
    tree = graph_tree(edge_index, weight, size[0] * size[1], 7)
    assert tree.parent.dtype == tree.order.dtype == torch.int32
    assert tree.parent.device == tree.order.device == weight.device
    assert torch.equal(tree.parent, grid_tree(weight, *size, 7).parent)
    assert_rooted(tree, 7)


@pytest.mark.parametrize("levels", [0, 3])
def test_tree_of_a_large_graph_equals_the_reference(device: torch.device, levels: int) -> None:
    edge_index = random_graph(1500, 4000, seed=levels)
    weight = torch.randint(levels, (3, edge_index.shape[1])).float() if levels else torch.randn(3, edge_index.shape[1])
    root = torch.tensor([0, 1499, 700])
    tree = graph_tree(edge_index.to(device), weight.to(device), 1500, root.to(device)).to("cpu")
    assert torch.equal(tree.parent, reference.graph_tree(edge_index, weight, 1500, root)[0])
    assert edges_of(tree) == [kruskal(of_tree, edge_index, 1500) for of_tree in weight]


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_of_any_dtype(device: torch.device, dtype: torch.dtype) -> None:
    edge_index = random_graph(40, 200, seed=0)
    weight = torch.randn(2, edge_index.shape[1]).to(dtype)
    expected = [kruskal(of_tree.double(), edge_index, 40) for of_tree in weight]
    assert edges_of(graph_tree(edge_index.to(device), weight.to(device), 40)) == expected


def test_float64_is_not_rounded(device: torch.device) -> None:
    weight = torch.tensor([[1 + 2e-16, 1 + 4e-16, 1]], dtype=torch.float64, device=device)
    assert weight.unique().numel() == 3
    assert edges_of(graph_tree(TRIANGLE.to(device), weight, 3)) == [[(0, 1), (0, 2)]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_weights_are_larger_or_smaller_than_any_other(device: torch.device, dtype: torch.dtype) -> None:
    edge_index = random_graph(30, 80, seed=1).to(device)
    weight = torch.randn(1, edge_index.shape[1]).to(dtype)
    last, first = weight.clone(), weight.clone()
    last[0, ::3], first[0, ::3] = torch.finfo(dtype).max, torch.finfo(dtype).min
    for finite in (last, first):
        infinite = finite.clone()
        infinite[0, ::3] *= 2
        assert infinite[0, ::3].isinf().all()
        trees = [graph_tree(edge_index, value.to(device), 30) for value in (finite, infinite)]
        assert torch.equal(*(tree.parent for tree in trees))


def test_a_bridge_is_taken_whatever_it_weighs(device: torch.device) -> None:
    edge_index = torch.tensor([[0, 1, 0, 2, 3], [1, 2, 2, 3, 4]], device=device)
    weight = torch.tensor([[1.0, torch.inf, 2.0, torch.inf, 0.0]], device=device)
    assert edges_of(graph_tree(edge_index, weight, 5)) == [[(0, 1), (0, 2), (2, 3), (3, 4)]]


def test_negative_zero_ties_with_zero(device: torch.device) -> None:
    for dtype in DTYPES:
        weight = torch.tensor([[0.0, 0.0, -0.0]], dtype=dtype, device=device)
        assert edges_of(graph_tree(TRIANGLE.to(device), weight, 3)) == [[(0, 1), (1, 2)]]


def test_self_loops_and_parallel_edges_are_harmless(device: torch.device) -> None:
    edge_index = torch.tensor([[2, 0, 1, 1, 0, 2], [2, 1, 0, 1, 1, 1]], device=device)
    weight = torch.tensor([[-9.0, 3.0, 2.0, -8.0, 4.0, 5.0]], device=device)
    assert edges_of(graph_tree(edge_index, weight, 3)) == [[(0, 1), (1, 2)]]
    loop = graph_tree(torch.zeros(2, 1, dtype=torch.int64, device=device), weight[:, :1], 1)
    assert loop.parent.tolist() == loop.order.tolist() == [[0]]


def test_directions_of_edges_do_not_matter(device: torch.device) -> None:
    edge_index = random_graph(30, 80, seed=2).to(device)
    weight = torch.randn(2, edge_index.shape[1], device=device)
    expected = graph_tree(edge_index, weight, 30, 4)
    assert torch.equal(graph_tree(edge_index.flip(0), weight, 30, 4).parent, expected.parent)


def test_roots_and_vertices_of_either_integer_dtype(device: torch.device) -> None:
    edge_index = random_graph(20, 30, seed=3).to(device)
    weight = torch.randn(2, edge_index.shape[1], device=device)
    expected = torch.cat([graph_tree(edge_index, weight[k : k + 1], 20, root).parent for k, root in enumerate((3, 17))])
    for dtype in (torch.int64, torch.int32):
        tree = graph_tree(edge_index.to(dtype), weight, 20, torch.tensor([3, 17], dtype=dtype, device=device))
        assert torch.equal(tree.parent, expected)


def test_smallest_graphs_and_empty_batches(device: torch.device) -> None:
    nothing = torch.empty(2, 0, dtype=torch.int64, device=device)
    single = graph_tree(nothing, torch.empty(3, 0, device=device), 1)
    assert single.parent.tolist() == single.order.tolist() == [[0]] * 3
    pair = graph_tree(torch.tensor([[1], [0]], device=device), torch.ones(1, 1, device=device), 2, 1)
    assert (pair.parent.tolist(), pair.order.tolist()) == ([[1, 1]], [[1, 0]])
    for edge_index, vertices in ((TRIANGLE.to(device), 3), (nothing, 4)):
        empty = graph_tree(edge_index, torch.empty(0, edge_index.shape[1], device=device), vertices)
        assert empty.parent.shape == empty.order.shape == (0, vertices)


def test_non_contiguous_inputs(device: torch.device) -> None:
    edge_index = random_graph(20, 30, seed=4).to(device)
    weight = torch.randn(2, edge_index.shape[1], device=device)
    root = torch.tensor([5, 6], device=device)
    expected = graph_tree(edge_index, weight, 20, root)
    strided = [edge_index.t().contiguous().t(), weight.t().contiguous().t(), torch.stack([root, root], 1)[:, 0]]
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert torch.equal(graph_tree(*strided[:2], 20, strided[2]).parent, expected.parent)
    shared = weight[:1].expand(3, -1)
    assert torch.equal(graph_tree(edge_index, shared, 20, 5).parent, expected.parent[:1].expand(3, -1))


def test_inputs_are_not_written_and_get_no_gradient(device: torch.device) -> None:
    edge_index = random_graph(20, 30, seed=5).to(device)
    weight = torch.randn(2, edge_index.shape[1], device=device, requires_grad=True)
    before = edge_index.clone(), weight.detach().clone()
    tree = graph_tree(edge_index, weight, 20)
    assert not tree.parent.requires_grad
    assert not tree.order.requires_grad
    assert torch.equal(edge_index, before[0])
    assert torch.equal(weight, before[1])


@pytest.mark.cpu_kernels
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    edge_index = random_graph(300, 900, seed=6)
    weight = torch.randn(5, edge_index.shape[1])
    assert_same_with_any_number_of_threads(lambda: graph_tree(edge_index, weight, 300))


@pytest.mark.cpu_kernels
def test_what_has_no_kernel_elsewhere_goes_through_the_host() -> None:
    edge_index = random_graph(20, 30, seed=7)
    weight, root = torch.randn(2, edge_index.shape[1]), torch.tensor([1, 2])
    assert set(_library.REFERENCES) >= _library.THROUGH_HOST
    for name in _library.THROUGH_HOST:
        actual = _library._through_host(name)(edge_index, weight, 20, root)
        assert all(torch.equal(a, b) for a, b in zip(actual, graph_tree(edge_index, weight, 20, root), strict=True))


WEIGHT = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: graph_tree([[0], [1]], WEIGHT, 3), TypeError, r"edge_index must be a tensor \(2, E\), got list"),
        (lambda: graph_tree(TRIANGLE.float(), WEIGHT, 3), TypeError, "int64, int32, got torch.float32"),
        (lambda: graph_tree(TRIANGLE, WEIGHT.long(), 3), TypeError, "edge_weight .* got torch.int64"),
        (lambda: graph_tree(TRIANGLE.t(), WEIGHT, 3), ValueError, r"edge_index must have shape \(2, E\), got \(3, 2\)"),
        (lambda: graph_tree(TRIANGLE[0], WEIGHT, 3), ValueError, r"shape \(2, E\), got \(3,\)"),
        (lambda: graph_tree(TRIANGLE, WEIGHT[0], 3), ValueError, r"edge_weight must have shape \(B, E\), got \(3,\)"),
        (lambda: graph_tree(TRIANGLE, WEIGHT[:, :2], 3), ValueError, r"each of the 3 edges .* got shape \(2, 2\)"),
        (lambda: graph_tree(TRIANGLE, WEIGHT, 0), ValueError, "num_vertices must be at least 1, got 0"),
        (lambda: graph_tree(TRIANGLE, WEIGHT, 3, 3), ValueError, "root must be a vertex of 0..2, got 3"),
        (lambda: graph_tree(TRIANGLE, WEIGHT, 3, -1), ValueError, "root must be a vertex of 0..2, got -1"),
        (lambda: graph_tree(TRIANGLE, WEIGHT, 3, torch.zeros(2)), TypeError, "root .* int64, int32, got torch.float32"),
        (
            lambda: graph_tree(TRIANGLE, WEIGHT, 3, torch.tensor(0)),
            ValueError,
            r"root must have shape \(B,\), got \(\)",
        ),
        (lambda: graph_tree(TRIANGLE, WEIGHT, 3, torch.tensor([0])), ValueError, r"each of the 2 trees, got .*\(1,\)"),
        (lambda: graph_tree(TRIANGLE.to("meta"), WEIGHT, 3), ValueError, "one device, got edge_index on meta"),
    ],
)
def test_bad_input_is_explained(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("edge_index", "vertices", "root", "message"),
    [
        (TRIANGLE + 1, 3, 0, r"edge_index must name vertices of 0\.\.2, got 3"),
        (TRIANGLE - 1, 3, 0, r"edge_index must name vertices of 0\.\.2, got -1"),
        (TRIANGLE, 3, 3, r"root must name vertices of 0\.\.2, got 3"),
        (TRIANGLE, 3, -1, r"root must name vertices of 0\.\.2, got -1"),
        (TRIANGLE, 5, 0, "connected, got 3 components of 5 vertices; no path leads from vertex 0 to vertex 3"),
        (torch.tensor([[0, 1, 2], [0, 2, 1]]), 3, 0, "got 2 components of 3 vertices; .* vertex 0 to vertex 1"),
        (torch.empty(2, 0, dtype=torch.int64), 2, 0, "got 2 components of 2 vertices; .* vertex 0 to vertex 1"),
    ],
)
def test_wrong_vertices_are_named(
    device: torch.device, edge_index: Tensor, vertices: int, root: int, message: str
) -> None:
    weight = torch.ones(2, edge_index.shape[1])
    roots = torch.tensor([0, root])
    with pytest.raises(ValueError, match=message):
        graph_tree(edge_index.to(device), weight.to(device), vertices, roots.to(device))
    with pytest.raises(ValueError, match=message):
        reference.graph_tree(edge_index, weight, vertices, roots)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_must_be_numbers(device: torch.device, dtype: torch.dtype) -> None:
    weight = torch.ones(2, 3, dtype=dtype)
    weight[1, 2] = torch.nan
    with pytest.raises(ValueError, match="edge_weight must not be NaN"):
        graph_tree(TRIANGLE.to(device), weight.to(device), 3)
    with pytest.raises(ValueError, match="edge_weight must not be NaN"):
        reference.graph_tree(TRIANGLE, weight, 3, torch.tensor([0, 0]))


# ---- scans along such trees ----


def recursive_scan(x: Tensor, decay: Tensor, parent: list[int], propagation: str) -> Tensor:
    """The definition for one tree (L, D), vertex by vertex."""
    children = [[c for c, above in enumerate(parent) if above == v != c] for v in range(len(parent))]

    def sum_below(v: int) -> Tensor:
        return x[v] + sum(decay[c] * sum_below(c) for c in children[v])

    def sum_above(v: int) -> Tensor:
        return x[v] if parent[v] == v else x[v] + decay[v] * sum_above(parent[v])

    def sum_around(v: int, came_from: int) -> Tensor:
        near = [(c, decay[c]) for c in children[v]] + ([] if parent[v] == v else [(parent[v], decay[v])])
        return x[v] + sum(along * sum_around(u, v) for u, along in near if u != came_from)

    sums = {"up": sum_below, "down": sum_above, "all": lambda v: sum_around(v, -1)}
    return torch.stack([sums[propagation](v) for v in range(len(parent))])


@pytest.mark.parametrize("propagation", ["all", "up", "down"])
@pytest.mark.parametrize("kind", ["random", "star", "two stars", "band"])
def test_scan_and_gradients_equal_the_recursion(device: torch.device, kind: str, propagation: str) -> None:
    vertices, batch = 20, 2
    vertex = torch.arange(vertices)
    edge_index = {
        "random": random_graph(vertices, 20, seed=8),
        "star": torch.stack([torch.full((vertices - 1,), 6), vertex[vertex != 6]]),
        "two stars": torch.cat([torch.stack([vertex % 2, vertex]), torch.tensor([[0], [1]])], 1),
        "band": sequence_edges(vertices),
    }[kind]
    weight = torch.randn(batch, edge_index.shape[1])
    tree = graph_tree(edge_index.to(device), weight.to(device), vertices, torch.tensor([3, 19], device=device))
    x, decay, grad = torch.rand(3, batch, vertices, 5, dtype=torch.float64).unbind()
    x, decay = x.requires_grad_(), decay.requires_grad_()
    parents = tree.parent.tolist()
    expected = torch.stack([recursive_scan(x[k], decay[k], parents[k], propagation) for k in range(batch)])
    actual = tree_scan(x.to(device), decay.to(device), tree, propagation)
    torch.testing.assert_close(actual.cpu(), expected)
    expected_grads = torch.autograd.grad(expected, (x, decay), grad, materialize_grads=True)
    grads = torch.autograd.grad(actual, (x, decay), grad.to(device))
    torch.testing.assert_close(grads, expected_grads)
    torch.testing.assert_close(reference.tree_scan(x, decay, *tree.to("cpu"), propagation), expected)


def test_scan_along_a_chain_is_the_recurrence_of_mamba(device: torch.device) -> None:
    batch, length, channels = 2, 30, 6
    x = torch.randn(batch, length, channels, dtype=torch.float64)
    decay = torch.rand_like(x)
    state, states = torch.zeros(batch, channels, dtype=torch.float64), []
    for t in range(length):
        state = decay[:, t] * state + x[:, t]
        states.append(state)
    edge_index = sequence_edges(length, reach=1, device=device)
    tree = graph_tree(edge_index, torch.rand(batch, length - 1, device=device), length, root=length - 1)
    # On the way up a vertex brings its own decay; in the recurrence the next token does.
    actual = tree_scan(x.to(device), decay.roll(-1, 1).to(device), tree, "up")
    torch.testing.assert_close(actual.cpu(), torch.stack(states, 1))


def test_images_with_diagonals(device: torch.device) -> None:
    height, width = 7, 9
    edge_index = neighbours((height, width), [(1, 0), (0, 1), (1, 1), (1, -1)])
    straight = (height - 1) * width + height * (width - 1)
    assert edge_index.shape[1] == straight + 2 * (height - 1) * (width - 1)
    weight = torch.rand(2, edge_index.shape[1])
    tree = graph_tree(edge_index.to(device), weight.to(device), height * width)
    assert edges_of(tree) == [kruskal(of_image, edge_index, height * width) for of_image in weight]
    assert (tree.edges().diff(dim=-1).abs() == width + 1).any()
    weight[:, straight:] = torch.inf
    without = graph_tree(edge_index.to(device), weight.to(device), height * width)
    assert torch.equal(without.parent.cpu(), grid_tree(weight[:, :straight], height, width).parent.cpu())


def test_volumes(device: torch.device) -> None:
    shape = (4, 5, 6)
    edge_index = neighbours(shape, [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
    weight = torch.rand(2, edge_index.shape[1])
    tree = graph_tree(edge_index.to(device), weight.to(device), 120)
    assert edges_of(tree) == [kruskal(of_volume, edge_index, 120) for of_volume in weight]
    # The largest number of neighbours in a grid is 4.
    assert tree.edges()[0].flatten().bincount().max() > 4
    x, decay = torch.rand(2, 2, 120, 5, dtype=torch.float64)
    actual = tree_scan(x.to(device), decay.to(device), tree)
    torch.testing.assert_close(actual.cpu(), reference.tree_scan(x, decay, *tree.to("cpu"), "all"))


# ---- compilers ----


def layer(edge_index: Tensor, weight: Tensor, x: Tensor, root: Tensor) -> Tensor:
    tree = graph_tree(edge_index, weight, x.shape[1], root)
    return tree_scan(x, x.sigmoid(), tree, "up")


def layer_inputs(length: int, device: torch.device) -> tuple[Tensor, ...]:
    edge_index = sequence_edges(length, device=device)
    x = torch.randn(2, length, 4, device=device, requires_grad=True)
    return edge_index, torch.rand(2, edge_index.shape[1], device=device), x, torch.tensor([length - 1, 2]).to(device)


@needs_compiler
def test_compiles_as_one_graph_for_all_sizes(device: torch.device) -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (9, 14, 5):
        inputs = layer_inputs(length, device)
        expected, actual = layer(*inputs), compiled(*inputs)
        torch.testing.assert_close(actual, expected)
        grads = [torch.autograd.grad(value.square().sum(), inputs[2]) for value in (actual, expected)]
        torch.testing.assert_close(*grads)


@needs_compiler
def test_exports_as_a_node() -> None:
    class Layer(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> Tensor:
            return layer(*inputs)

    inputs = tuple(value.detach() for value in layer_inputs(8, torch.device("cpu")))
    program = torch.export.export(Layer(), inputs)
    targets = [str(node.target) for node in program.graph.nodes]
    assert [target for target in targets if target.startswith("grootvl")] == [
        "grootvl.graph_tree.default",
        "grootvl.tree_scan.default",
    ]
    torch.testing.assert_close(program.module()(*inputs), layer(*inputs))
