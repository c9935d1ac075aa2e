"""The scans with other spanning trees: random ones and the maximum."""

import pytest
import torch
from torch import Tensor

from grootvl_mm.models import GrootV, TreeSSM
from grootvl_mm.models.tree_ssm import scattered_weight
from grootvl_mm.ops import Tree, grid_edge_weight, grid_tree
from grootvl_mm.ops.reference import grid_edges
from tests.helpers.trees import kruskal

MICRO = {"channels": 8, "depths": [2, 1]}


def make(**options) -> GrootV:
    return GrootV(**{"arch": MICRO, "out_indices": (0, 1)} | options)


def trees_of(model: GrootV, image: Tensor) -> list[Tree]:
    """The trees of all blocks."""
    found = []
    blocks = [block for stage in model.stages for block in stage.blocks]
    handles = [block.mixer.register_forward_hook(lambda *args: found.append(args[-1][1])) for block in blocks]
    model(image)
    for handle in handles:
        handle.remove()
    return found


def as_sets(tree: Tree) -> list[set[tuple[int, int]]]:
    return [set(map(tuple, edges)) for edges in tree.edges().tolist()]


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "manhattan"])
def test_maximum_tree_is_the_heaviest(device: torch.device, metric: str) -> None:
    layer = TreeSSM(6, scan="maximum", tree_metric=metric).to(device)
    feature = torch.randn(2, 12, 5, 7, device=device)
    weight = grid_edge_weight(feature, metric, log=metric != "cosine").cpu()
    edge_index = torch.stack(grid_edges(5, 7))
    assert as_sets(layer.build_tree(feature)) == [set(kruskal(-values, edge_index, 35)) for values in weight]


def test_maximum_tree_of_features_that_are_not_numbers(device: torch.device) -> None:
    feature = torch.randn(1, 12, 4, 4, device=device)
    feature[0, 0, 1, 1] = float("nan")
    assert TreeSSM(6, scan="maximum").to(device).build_tree(feature).edges().shape == (1, 15, 2)


def test_random_trees_are_new_ones_in_training(device: torch.device) -> None:
    layer = TreeSSM(6, scan="random").to(device)
    feature = torch.randn(2, 12, 8, 8, device=device)
    torch.manual_seed(0)
    first, second = layer.build_tree(feature), layer.build_tree(feature)
    torch.manual_seed(0)
    again = layer.build_tree(feature)
    one, other = as_sets(first)
    assert one != other
    assert as_sets(first) != as_sets(second)
    assert torch.equal(first.parent, again.parent)


def test_random_trees_under_another_default_dtype(device: torch.device) -> None:
    layer, feature = TreeSSM(6, scan="random").to(device), torch.randn(2, 5, 7, 6, device=device)
    torch.set_default_dtype(torch.float64)
    try:
        assert layer(feature)[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_random_trees_are_fixed_in_evaluation(device: torch.device) -> None:
    """Whatever the image, the generator and the batch; blocks have different ones."""
    model = make(scan="random").to(device).eval()
    first = trees_of(model, torch.randn(2, 3, 32, 40, device=device))
    torch.manual_seed(1)
    second = trees_of(make(scan="random").to(device).eval(), torch.randn(1, 3, 32, 40, device=device))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.parent, other.parent.expand_as(one.parent))
    assert as_sets(first[0]) != as_sets(first[1])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (40, 60)])
def test_scattered_weights(device: torch.device, height: int, width: int) -> None:
    weight = scattered_weight(height, width, 3, device)
    assert weight.shape == ((height - 1) * width + height * (width - 1),)
    assert grid_tree(weight[None], height, width).edges().shape == (1, height * width - 1, 2)


def test_scattered_weights_look_random() -> None:
    """They are spread evenly and know nothing of each other, of rows, columns, directions and seeds."""
    height, width = 64, 96
    count = (height - 1) * width
    weight, other = (scattered_weight(height, width, seed, torch.device("cpu")) / 2**31 for seed in (0, 1))
    assert len(weight.unique()) > 0.99 * len(weight)
    for share, value in enumerate(weight.quantile(torch.linspace(0.1, 0.9, 9)), start=1):
        assert abs(value - share / 10) < 0.02
    vertical, horizontal = weight[:count].view(height - 1, width), weight[count:].view(height, width - 1)
    pairs = [
        (weight, other),
        (vertical[1:], vertical[:-1]),
        (vertical[:, 1:], vertical[:, :-1]),
        (horizontal[1:], horizontal[:-1]),
        (vertical[:, 1:], horizontal[1:]),
        (vertical[:, 1:], horizontal[:-1]),
    ]
    for one, another in pairs:
        assert abs(torch.corrcoef(torch.stack([one.flatten(), another.flatten()]))[0, 1]) < 0.05
    small = scattered_weight(8, 9, 0, torch.device("cpu")) / 2**31
    assert torch.equal(small[: 7 * 9].view(7, 9), vertical[:7, :9])


def test_random_tree_crosses_as_many_borders_as_any_edge() -> None:
    """Half of the edges of a checkerboard of columns are horizontal, and so is about half of a random tree."""
    tree = grid_tree(scattered_weight(50, 50, 0, torch.device("cpu"))[None], 50, 50)
    low, high = tree.edges()[0].unbind(1)
    assert abs(float((high - low == 1).float().mean()) - 0.5) < 0.03


@pytest.mark.parametrize("sharing", ["block", "stage"])
def test_checkpointing_scans_the_same_random_trees_again(device: torch.device, sharing: str) -> None:
    model = make(scan="random", tree_sharing=sharing).to(device)
    checkpointed = make(scan="random", tree_sharing=sharing, with_cp=True).to(device)
    checkpointed.load_state_dict(model.state_dict())
    image = torch.randn(2, 3, 40, 40, device=device)
    gradients = []
    for network in (model, checkpointed):
        torch.manual_seed(5)
        loss = sum(feature.square().mean() for feature in network(image))
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))
    torch.testing.assert_close(*gradients)


def test_shared_random_tree() -> None:
    trees = trees_of(make(scan="random", tree_sharing="stage"), torch.randn(1, 3, 32, 32))
    assert trees[0].parent is trees[1].parent
