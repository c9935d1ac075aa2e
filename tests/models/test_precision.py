"""How far from float32 a model under autocast may be: feature maps, gradients and trees."""

import pytest
import torch
from torch import Tensor, nn

from grootvl_mm.models import GrootV, TreeSSM
from grootvl_mm.ops import Tree
from tests.helpers.marks import HALVES

# Relative errors, in the Euclidean norm, of each map and of all gradients together; the share of the trees' edges.
BOUNDS = {torch.bfloat16: (0.02, 0.03, 0.05), torch.float16: (0.0025, 0.005, 0.02)}


def train(model: nn.Module) -> None:
    """Spread the weights as training does, which starts with all steps, states and norms alike."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf == "A_log":
            parameter.data.normal_(0.0, 0.3, generator=generator)
        elif leaf == "Ds" or ("norm" in name and leaf == "weight"):
            parameter.data.normal_(1.0, 0.3, generator=generator)
        elif "norm" in name:
            parameter.data.normal_(0.0, 0.2, generator=generator)
        elif "proj.weight" in name or "fc" in name:
            parameter.data.mul_(2.0)


def run(model: GrootV, image: Tensor, dtype: torch.dtype | None) -> tuple[list[Tensor], Tensor, list[Tree]]:
    """The maps, all gradients in one vector, and the trees of all blocks."""
    trees = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: trees.append(output[1]))
        for module in model.modules()
        if isinstance(module, TreeSSM)
    ]
    with torch.autocast(image.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        maps = model(image)
    for hook in hooks:
        hook.remove()
    generator = torch.Generator().manual_seed(1)
    slopes = [torch.randn(feature.shape, generator=generator).to(image.device) for feature in maps]
    loss = sum((feature.float() * slope).sum() for feature, slope in zip(maps, slopes, strict=True))
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return [feature.detach() for feature in maps], torch.cat([grad.flatten() for grad in grads]), trees


def different_edges(trees: list[Tree], others: list[Tree]) -> float:
    """The share of the edges of all images and blocks that the other trees do not have; the smallest have 3 edges."""
    lost = total = 0
    for tree, other in zip(trees, others, strict=True):
        for parents in zip(tree.parent.cpu(), other.parent.cpu(), strict=True):
            own, expected = (
                {frozenset(edge) for edge in enumerate(parent.tolist()) if edge[0] != edge[1]} for parent in parents
            )
            lost += len(own - expected)
            total += len(own)
    return lost / total


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("trained", [False, True])
def test_autocast_stays_near_float32(device: torch.device, trained: bool, dtype: torch.dtype) -> None:
    model = GrootV("pico")
    if trained:
        train(model)
    model = model.to(device)
    image = torch.randn(2, 3, 64, 64).cumsum(2).cumsum(3)  # as smooth as photographs
    image = ((image - image.mean()) / image.std()).to(device)
    map_bound, grad_bound, edge_bound = BOUNDS[dtype]
    maps, grads, trees = run(model, image, dtype)
    exact_maps, exact_grads, exact_trees = run(model, image, None)
    for feature, expected in zip(maps, exact_maps, strict=True):
        assert relative(feature.float(), expected) < map_bound
    assert relative(grads, exact_grads) < grad_bound
    assert different_edges(trees, exact_trees) < edge_bound
