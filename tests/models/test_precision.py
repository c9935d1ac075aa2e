"""How far from float32 a model under autocast may be: feature maps, gradients and trees."""

import pytest
import torch
from torch import Tensor, nn

from grootvl_mm.models import GrootV, TreeSSM
from grootvl_mm.ops import Tree
from tests.helpers.marks import needs_float16_on_the_cpu

# Relative errors, in the Euclidean norm, of each map and of all gradients together; the share of a tree's edges.
BOUNDS = {torch.bfloat16: (0.02, 0.03, 0.05), torch.float16: (0.0025, 0.005, 0.02)}


def train(model: nn.Module) -> None:
    """Spread the weights as training does, which starts with all steps, states and norms alike."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if leaf == "A_log":
            nn.init.normal_(parameter, 0.0, 0.3, generator=generator)
        elif leaf == "Ds" or ("norm" in name and leaf == "weight"):
            nn.init.normal_(parameter, 1.0, 0.3, generator=generator)
        elif "norm" in name:
            nn.init.normal_(parameter, 0.0, 0.2, generator=generator)
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


def different_edges(tree: Tree, other: Tree) -> float:
    """The largest share of an image's edges that the other tree has not."""
    shares = []
    for parents in zip(tree.parent.cpu(), other.parent.cpu(), strict=True):
        edges = [{frozenset(edge) for edge in enumerate(parent.tolist()) if edge[0] != edge[1]} for parent in parents]
        shares.append(len(edges[0] - edges[1]) / len(edges[0]))
    return max(shares)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=needs_float16_on_the_cpu)])
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
    assert max(map(different_edges, trees, exact_trees)) < edge_bound
