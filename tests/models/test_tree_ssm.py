"""The layer as a block calls it: its fused scan, its derivatives and its trees."""

import pytest
import torch
from torch import Tensor, nn

from grootvl_mm.layers.recompute import lean
from grootvl_mm.models import TreeSSM


def make(dtype: torch.dtype = torch.float32, **options: str) -> TreeSSM:
    layer = TreeSSM(6, **options).to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def call(layer: TreeSSM, x: Tensor, fused: bool) -> Tensor:
    """By the fused scan and the block's policy, or by the modules as PyTorch runs them."""
    if fused:
        with lean(x):
            return layer(x)[0]
    handle = layer.h_norm.register_forward_hook(lambda *args: None)
    y, _ = layer(x)
    handle.remove()
    return y


def gradients(layer: TreeSSM, x: Tensor, fused: bool) -> tuple[Tensor, ...]:
    """The result, its gradients and theirs."""
    y = call(layer, x, fused)
    leaves = (x, *layer.parameters())
    first = torch.autograd.grad((y * y.detach()).sum(), leaves, create_graph=True)
    return y, *first, *torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)


@pytest.mark.parametrize(
    "options", [{}, {"propagation": "up", "tree_root": "last"}, {"propagation": "down"}, {"scan": "cross"}]
)
def test_the_fused_scan_is_what_the_modules_compute(device: torch.device, options: dict) -> None:
    layer = make(torch.float64, **options).to(device)
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, device=device, requires_grad=True)
    torch.testing.assert_close(gradients(layer, x, True), gradients(layer, x, False))


def test_norms_over_all_tokens() -> None:
    """A norm in the place of another may have another shape."""
    layer, x = make(), torch.randn(2, 4, 5, 6)
    layer.h_norm = nn.LayerNorm((20, 12))
    torch.testing.assert_close(call(layer, x, True), call(layer, x, False), rtol=1e-4, atol=1e-4)


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


def test_shapes_alone_will_do() -> None:
    layer = make().to("meta")
    y, tree = layer(torch.empty(2, 4, 5, 6, device="meta"))
    assert y.shape == (2, 4, 5, 6)
    assert tree.parent.shape == (2, 20)
