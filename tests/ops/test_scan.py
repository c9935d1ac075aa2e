"""tree_scan, its gradients and its checks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grootvl_mm.ops import Tree, grid_tree, reference, tree_scan
from tests.helpers.precision import assert_rounded_once
from tests.helpers.threads import assert_same_with_any_number_of_threads
from tests.helpers.trees import SEEDS, SIZES, brute_force_scan, random_scan, random_weight

PROPAGATIONS = ("all", "up", "down")
SCAN_BACKWARD = torch.ops.grootvl.tree_scan_backward


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    bound = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    return {"rtol": bound, "atol": 5 * bound}


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 5), st.integers(1, 5)), SEEDS, st.sampled_from(PROPAGATIONS))
def test_scan_is_the_sum_over_all_paths(size: tuple, seed: int, propagation: str) -> None:
    x, decay, tree = random_scan(2, *size, 3, seed, torch.float64)
    expected = brute_force_scan(x, decay, tree, propagation)
    torch.testing.assert_close(tree_scan(x, decay, tree, propagation), expected)
    torch.testing.assert_close(reference.tree_scan(x, decay, *tree, propagation), expected)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 70), SEEDS, st.sampled_from(PROPAGATIONS))
def test_scan_and_gradients_equal_the_reference(size: tuple, channels: int, seed: int, propagation: str) -> None:
    x, decay, tree = random_scan(2, *size, channels, seed, torch.float64)
    grad_h = torch.randn_like(x)
    torch.testing.assert_close(
        tree_scan(x, decay, tree, propagation), reference.tree_scan(x, decay, *tree, propagation)
    )
    actual = SCAN_BACKWARD(grad_h, x, decay, *tree, propagation)
    expected = reference.tree_scan_backward(grad_h, x, decay, *tree, propagation)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 16, 48, 64, 100])
def test_all_dtypes_and_block_widths(device: torch.device, propagation: str, dtype: torch.dtype, channels: int) -> None:
    x, decay, tree = random_scan(2, 9, 8, channels, seed=channels, dtype=dtype)
    grad_h = torch.randn_like(x)
    placed = [tensor.to(device) for tensor in (grad_h, x, decay)]
    h = tree_scan(*placed[1:], tree.to(device), propagation)
    assert h.dtype == dtype
    assert h.is_contiguous()
    exact = [tensor.double() for tensor in (grad_h, x, decay)]
    torch.testing.assert_close(
        h.cpu().double(), reference.tree_scan(*exact[1:], *tree, propagation), **tolerance(dtype)
    )
    actual = SCAN_BACKWARD(*placed, *tree.to(device), propagation)
    expected = reference.tree_scan_backward(*exact, *tree, propagation)
    for value, exact_value in zip(actual, expected, strict=True):
        assert value.dtype == dtype
        torch.testing.assert_close(value.cpu().double(), exact_value, **tolerance(dtype))


def relabelled_tree(kind: str, vertices: int, seed: int) -> Tree:
    """One tree that no grid has, under shuffled names of its vertices."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(vertices)
    above = {
        "chain": index - 1,
        "star": torch.zeros_like(index),
        "comb": torch.where(index % 2 == 0, index - 2, index - 1),
        "binary": (index - 1) // 2,
        "random": (torch.rand(vertices, generator=generator) * index).long(),
    }[kind].clamp(min=0)
    name = torch.randperm(vertices, generator=generator)
    parent = torch.empty_like(index)
    parent[name] = name[above]
    return Tree(parent.int().unsqueeze(0), name.int().unsqueeze(0))


@pytest.mark.parametrize("propagation", PROPAGATIONS)
@pytest.mark.parametrize("kind", ["chain", "star", "comb", "binary", "random"])
def test_trees_of_any_shape(device: torch.device, kind: str, propagation: str) -> None:
    for vertices in (2, 3, 17, 300):
        tree = relabelled_tree(kind, vertices, seed=vertices)
        grad_h, x, decay = torch.rand(3, 1, vertices, 5, dtype=torch.float64)
        placed = [tensor.to(device) for tensor in (grad_h, x, decay, *tree)]
        h = torch.ops.grootvl.tree_scan(*placed[1:], propagation)
        torch.testing.assert_close(h.cpu(), reference.tree_scan(x, decay, *tree, propagation))
        actual = [grad.cpu() for grad in SCAN_BACKWARD(*placed, propagation)]
        expected = list(reference.tree_scan_backward(grad_h, x, decay, *tree, propagation))
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("height", "width"), [(60, 70), (100, 103), (250, 260)])
def test_large_trees(device: torch.device, height: int, width: int) -> None:
    x, decay, tree = random_scan(1, height, width, 2, seed=0, dtype=torch.float64)
    grad_h = torch.randn_like(x)
    placed = [tensor.to(device) for tensor in (grad_h, x, decay, *tree)]
    h = torch.ops.grootvl.tree_scan(*placed[1:], "all")
    torch.testing.assert_close(h.cpu(), reference.tree_scan(x, decay, *tree, "all"))
    actual = [grad.cpu() for grad in SCAN_BACKWARD(*placed, "all")]
    torch.testing.assert_close(actual, list(reference.tree_scan_backward(grad_h, x, decay, *tree, "all")))


@pytest.mark.parametrize("propagation", PROPAGATIONS)
def test_gradients_by_finite_differences(device: torch.device, propagation: str) -> None:
    x, decay, tree = random_scan(2, 3, 4, 3, seed=1, dtype=torch.float64)
    inputs = [tensor.to(device).requires_grad_() for tensor in (x, decay)]
    placed = tree.to(device)

    def scan(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        return tree_scan(x, decay, placed, propagation)

    assert torch.autograd.gradcheck(scan, inputs)
    assert torch.autograd.gradgradcheck(scan, inputs)

    def second(x: torch.Tensor, decay: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(scan(x, decay).pow(3).sum(), (x, decay), create_graph=True)
        return torch.autograd.grad(sum(grad.square().sum() for grad in first), (x, decay), create_graph=True)

    assert torch.autograd.gradcheck(second, inputs)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_tangents_are_refused(requires_grad: bool) -> None:
    """The dispatcher would drop them in silence."""
    x, decay, tree = random_scan(1, 3, 3, 2, seed=0, dtype=torch.float64)
    x.requires_grad_(requires_grad)
    for tangents in ((x, decay * 0), (x * 0, decay)):
        with pytest.raises(NotImplementedError, match=r"no forward-mode derivative.*use reverse mode"):
            torch.func.jvp(lambda x, decay: tree_scan(x, decay, tree), (x, decay), tangents)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="use reverse mode"):
        tree_scan(torch.autograd.forward_ad.make_dual(x, x.detach()), decay, tree)


def test_gradient_of_one_input_only() -> None:
    x, decay, tree = random_scan(1, 3, 3, 2, seed=0, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda value: tree_scan(value, decay, tree), (x.requires_grad_(),))
    assert torch.autograd.gradcheck(lambda value: tree_scan(x.detach(), value, tree), (decay.requires_grad_(),))


@settings(max_examples=20, deadline=None)
@given(SIZES, SEEDS)
def test_scan_does_not_depend_on_the_root(size: tuple, seed: int) -> None:
    """Once a decay is bound to its edge, any vertex may be the root."""
    height, width = size
    x, decay, tree = random_scan(1, height, width, 4, seed, torch.float64)
    by_edge = {}
    for v, p in enumerate(tree.parent[0].tolist()):
        by_edge[frozenset((v, p))] = decay[0, v]
    other = grid_tree(random_weight(1, height, width, seed), height, width, root=height * width - 1)
    moved = torch.stack([by_edge.get(frozenset((v, p)), decay[0, v]) for v, p in enumerate(other.parent[0].tolist())])
    torch.testing.assert_close(tree_scan(x, moved.unsqueeze(0), other), tree_scan(x, decay, tree))


def test_any_topological_order_will_do(device: torch.device) -> None:
    x, decay, tree = random_scan(2, 6, 7, 5, seed=3, dtype=torch.float64)
    by_level = tree.depth().argsort(dim=1).to(torch.int32)
    by_level_backwards = (tree.depth().flip(1).argsort(dim=1, stable=True)).to(torch.int32)
    by_level_backwards = x.shape[1] - 1 - by_level_backwards
    expected = tree_scan(x, decay, tree)
    for order in (by_level, by_level_backwards):
        placed = Tree(tree.parent, order).to(device)
        actual = tree_scan(x.to(device), decay.to(device), placed)
        torch.testing.assert_close(actual.cpu(), expected)


def test_decay_one_sums_everything_and_zero_nothing(device: torch.device) -> None:
    x, decay, tree = random_scan(2, 5, 5, 3, seed=0, dtype=torch.float64)
    x, decay, tree = x.to(device), decay.to(device), tree.to(device)
    torch.testing.assert_close(tree_scan(x, torch.ones_like(x), tree), x.sum(1, keepdim=True).expand_as(x))
    assert torch.equal(tree_scan(x, torch.zeros_like(x), tree), x)


@pytest.mark.parametrize("shape", [(0, 9, 4), (2, 9, 0), (2, 1, 5)])
def test_empty_and_single_vertex(device: torch.device, shape: tuple) -> None:
    batch, vertices, _ = shape
    side = int(vertices**0.5)
    tree = grid_tree(torch.zeros(batch, 2 * side * (side - 1), device=device), side, side)
    x = torch.randn(shape, device=device, requires_grad=True)
    decay = torch.rand(shape, device=device, requires_grad=True)
    h = tree_scan(x, decay, tree)
    h.sum().backward()
    assert h.shape == shape
    if vertices == 1:
        assert torch.equal(h, x)
        assert not decay.grad.any()


def test_non_contiguous_inputs_are_not_written(device: torch.device) -> None:
    x, decay, tree = random_scan(2, 5, 6, 7, seed=5, dtype=torch.float32)
    expected = tree_scan(x, decay, tree)
    strided = [tensor.to(device).transpose(1, 2).contiguous().transpose(1, 2) for tensor in (x, decay)]
    trees = Tree(*(torch.stack([t, t], -1).to(device)[..., 0] for t in tree))
    assert not any(tensor.is_contiguous() for tensor in (*strided, *trees))
    torch.testing.assert_close(tree_scan(*strided, trees).cpu(), expected)
    for strided_tensor, tensor in zip((*strided, *trees), (x, decay, *tree), strict=True):
        assert torch.equal(strided_tensor.cpu(), tensor)


@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_strides_of_a_single_vertex(channels: int, dtype: torch.dtype, device: torch.device) -> None:
    """A dimension of size 1 may have any stride, also in a tensor that is contiguous, and in gradients."""
    generator = torch.Generator().manual_seed(0)
    x, decay, grad = (torch.rand(3, 1, channels, generator=generator).to(device, dtype) for _ in range(3))
    tree = Tree(*(torch.zeros(3, 1, dtype=torch.int32, device=device) for _ in range(2)))
    for strides in ((channels, 1, 1), (channels, 3 * channels, 1), (channels, 7, 1)):
        strided = [value.as_strided(value.shape, strides).detach().requires_grad_() for value in (x, decay)]
        h = tree_scan(*strided, tree)
        assert torch.equal(h, x)
        h.backward(grad.as_strided(grad.shape, strides))
        assert torch.equal(strided[0].grad, grad)


@pytest.mark.cpu_kernels
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, decay, tree = random_scan(3, 20, 20, 96, seed=0, dtype=torch.float32)
    assert_same_with_any_number_of_threads(
        lambda: (tree_scan(x, decay, tree), *SCAN_BACKWARD(x, x, decay, *tree, "all"))
    )


def test_autocast_casts_to_the_wider_dtype_only(device: torch.device) -> None:
    x, decay, tree = random_scan(1, 4, 4, 8, seed=0, dtype=torch.float32)
    x, decay, tree = x.to(device), decay.to(device), tree.to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        h = tree_scan(x.bfloat16(), decay, tree)
        narrow = tree_scan(x.half(), decay.half(), tree)
    assert h.dtype == torch.float32
    torch.testing.assert_close(h, tree_scan(x.bfloat16().float(), decay, tree))
    assert torch.equal(narrow, tree_scan(x.half(), decay.half(), tree))


@pytest.mark.cpu_kernels
@settings(max_examples=20, deadline=None)
@given(
    SIZES, st.integers(1, 70), SEEDS, st.sampled_from(PROPAGATIONS), st.sampled_from([torch.float16, torch.bfloat16])
)
def test_16_bits_are_rounded_once(size: tuple, channels: int, seed: int, propagation: str, dtype: torch.dtype) -> None:
    """Results and gradients are those of float32, whatever is summed on the way."""
    x, decay, tree = random_scan(2, *size, channels, seed, dtype)
    grad_h = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert_rounded_once(tree_scan(x, decay, tree, propagation), tree_scan(x.float(), decay.float(), tree, propagation))
    grads = SCAN_BACKWARD(grad_h, x, decay, *tree, propagation)
    exact = SCAN_BACKWARD(grad_h.float(), x.float(), decay.float(), *tree, propagation)
    for grad, expected in zip(grads, exact, strict=True):
        assert_rounded_once(grad, expected)


def test_not_finite_values_stay_where_they_can_reach(device: torch.device) -> None:
    x, decay, tree = random_scan(2, 4, 4, 3, seed=0, dtype=torch.float32)
    x[0, 5] = float("nan")
    h = tree_scan(x.to(device), decay.to(device), tree.to(device))
    assert h[0].isnan().all()
    assert h[1].isfinite().all()


X, DECAY, TREE = random_scan(2, 3, 3, 4, seed=0, dtype=torch.float32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: tree_scan(X[0], DECAY, TREE), ValueError, r"x must have shape \(B, L, D\), got \(9, 4\)"),
        (lambda: tree_scan(X, DECAY[:, :8], TREE), ValueError, r"shape of x \(2, 9, 4\), got \(2, 8, 4\)"),
        (lambda: tree_scan(X, DECAY.double(), TREE), TypeError, "dtype of x torch.float32, got torch.float64"),
        (lambda: tree_scan(X.long(), DECAY, TREE), TypeError, "x must be of dtype float32.*got torch.int64"),
        (lambda: tree_scan(X, DECAY, tuple(TREE)), TypeError, "must be a grootvl_mm.ops.Tree, got tuple"),
        (lambda: tree_scan(X, DECAY, Tree(TREE.parent.long(), TREE.order)), TypeError, "tree.parent.*got torch.int64"),
        (lambda: tree_scan(X[:, :8], DECAY[:, :8], TREE), ValueError, r"must have shape \(2, 8\).*got \(2, 9\)"),
        (lambda: tree_scan(X, DECAY, TREE, "both"), ValueError, "all, up, down, got 'both'"),
        (lambda: tree_scan(X.to("meta"), DECAY, TREE), ValueError, "on one device, got x on meta, decay on cpu"),
    ],
)
def test_bad_input_is_explained(call, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.cpu_kernels
@pytest.mark.parametrize(
    "tree",
    [
        Tree(TREE.parent, TREE.order.flip(1)),
        Tree(TREE.parent + 9, TREE.order),
        Tree(TREE.parent, TREE.order * 0),
        Tree(TREE.parent, TREE.order - 1),
    ],
)
def test_what_is_no_tree_is_explained(tree: Tree) -> None:
    with pytest.raises(ValueError, match="every parent before"):
        tree_scan(X, DECAY, tree)
