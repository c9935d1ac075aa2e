"""The layer's backward pass, which computes again what lies between its projections."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from grootvl_mm.models import TreeSSM, tree_ssm
from grootvl_mm.models.grootv import Block
from tests.helpers.marks import needs_compiler, needs_float16_on_the_cpu


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Calls a function with PyTorch's own automatic differentiation of the layer."""

    def run(call: Callable, *args: object) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(tree_ssm, "can_recompute", lambda *values: False)
            return call(*args)

    return run


def make(dtype: torch.dtype = torch.float32, **options: str) -> TreeSSM:
    layer = TreeSSM(6, **options).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def gradients(layer: TreeSSM, x: Tensor) -> tuple[Tensor, ...]:
    """The result, its gradients and theirs."""
    y, _ = layer(x)
    leaves = (x, *layer.parameters())
    first = torch.autograd.grad((y * y.detach()).sum(), leaves, create_graph=True)
    return y, *first, *torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)


@pytest.mark.parametrize(
    "options", [{}, {"propagation": "up", "tree_root": "last"}, {"propagation": "down"}, {"scan": "raster"}]
)
def test_gradients_are_those_of_automatic_differentiation(device: torch.device, plain: Callable, options: dict) -> None:
    layer = make(torch.float64, **options).to(device)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    torch.testing.assert_close(gradients(layer, x), plain(gradients, layer, x))


def test_gradients_by_finite_differences(device: torch.device) -> None:
    layer = make(torch.float64).to(device)
    x = torch.randn(1, 2, 2, 6, dtype=torch.float64, device=device, requires_grad=True)
    _, tree = layer(x)
    leaves = (x, layer.conv2d.weight, layer.x_proj.weight, layer.A_log)

    def call(x: Tensor, *_: Tensor) -> Tensor:
        return layer(x, tree)[0]

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_trees_have_no_gradient_and_are_handed_on(device: torch.device) -> None:
    layer = make().to(device)
    x = torch.randn(2, 4, 5, 6, device=device)
    y, tree = layer(x)
    again, same = layer(x, tree)
    assert torch.equal(y, again)
    assert not any(vertices.requires_grad for vertices in (*tree, *same))
    assert all(torch.equal(a, b) for a, b in zip(tree, same, strict=True))


def test_a_block_keeps_twelve_maps() -> None:
    """In maps of C channels: the inputs of both norms 1 each, in-projection 4, scan 2, MLP 4; the trees are C / 2."""
    block = Block(4, 0.0, None, with_cp=False)
    x = torch.randn(2, 8, 8, 4, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.setdefault(v.data_ptr(), v), lambda v: v):
        block(x, None)
    parameters = {parameter.data_ptr() for parameter in block.parameters()}
    values = sum(value.untyped_storage().nbytes() // 4 for at, value in kept.items() if at not in parameters)
    assert values == 12 * x.numel() + 2 * x[..., 0].numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=needs_float16_on_the_cpu)])
def test_autocast_gives_the_gradients_of_its_own_rules(
    device: torch.device, plain: Callable, dtype: torch.dtype
) -> None:
    layer = make().to(device)
    x = torch.randn(2, 4, 5, 6, device=device)

    def grads() -> tuple[Tensor, ...]:
        with torch.autocast(device.type, dtype=dtype):
            y, _ = layer(x)
        return torch.autograd.grad(y.float().square().sum(), layer.parameters())

    torch.testing.assert_close(grads(), plain(grads))


@needs_compiler
def test_compiles_as_one_graph_with_gradients(device: torch.device) -> None:
    layer = make().to(device)
    x = torch.randn(2, 4, 5, 6, device=device, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for call in (layer, compiled):
        y, _ = call(x)
        grads = torch.autograd.grad(y.square().sum(), (x, *layer.parameters()))
        if call is layer:
            expected = (y, grads)
    torch.testing.assert_close((y, grads), expected, rtol=1e-4, atol=1e-4)


def test_shapes_alone_will_do() -> None:
    layer = make().to("meta")
    y, tree = layer(torch.empty(2, 4, 5, 6, device="meta"))
    assert y.shape == (2, 4, 5, 6)
    assert tree.parent.shape == (2, 20)
