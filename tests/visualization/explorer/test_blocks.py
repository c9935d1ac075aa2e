"""The data that the explorer extracts from a model."""

import pytest
import torch

from grootvl_mm.layers.padding import PADDING_WEIGHT
from grootvl_mm.models import GrootV, TreeSSM
from grootvl_mm.ops import grid_edge_weight, grid_tree
from grootvl_mm.ops.tree import METRICS
from grootvl_mm.visualization import record_trees
from grootvl_mm.visualization.explorer import TreeFeatures, explorer_blocks

IMAGE = torch.randn(2, 3, 40, 56)


def look(model: torch.nn.Module, image: torch.Tensor = IMAGE, index: int = 1) -> tuple:
    with torch.no_grad(), record_trees(model) as records, TreeFeatures(model) as features:
        model(image)
    return records, features, explorer_blocks(records, features, index)


@pytest.mark.parametrize("metric", METRICS)
def test_trees_of_all_metrics_are_of_the_same_features(metric: str) -> None:
    records, features, blocks = look(GrootV("pico", tree_metric=metric, tree_root="last").eval())
    assert [(block.stage, block.block) for block in blocks] == [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0)]
    for record, block in zip(records, blocks, strict=True):
        assert block.trees[0].metric == metric
        assert {tree.metric for tree in block.trees} == set(METRICS)
        assert torch.equal(torch.from_numpy(block.trees[0].parent), record.tree.parent[1])
        feature = features.found[record.name][1:].permute(0, 3, 1, 2)
        for tree in block.trees:
            weight = grid_edge_weight(feature, tree.metric, log=tree.metric != "cosine")
            expected = grid_tree(weight, block.height, block.width, block.root)
            assert torch.equal(torch.from_numpy(tree.parent), expected.parent[0])


def test_a_shared_tree_is_shown_in_all_blocks() -> None:
    _, _, blocks = look(GrootV("pico", tree_sharing="stage").eval())
    assert blocks[2].trees is blocks[3].trees
    assert blocks[1].trees is not blocks[2].trees


@pytest.mark.parametrize("scan", ["raster", "cross"])
def test_scans_without_a_tree(scan: str) -> None:
    """The trees are those that the features would make."""
    records, _, blocks = look(GrootV("pico", scan=scan).eval())
    for record, block in zip(records, blocks, strict=True):
        assert [tree.metric for tree in block.trees] == list(METRICS)
        expected = grid_tree(record.edge_weight[1:], block.height, block.width, block.root)
        assert torch.equal(torch.from_numpy(block.trees[0].parent), expected.parent[0])


def test_ignored_padding_stays_at_the_end_of_every_tree() -> None:
    padded = torch.zeros(2, 3, 64, 96)
    padded[:, :, :40, :56] = IMAGE
    _, _, blocks = look(GrootV("pico", ignore_padding=True).eval(), padded)
    alone = look(GrootV("pico").eval())[2]
    for block, single in zip(blocks, alone, strict=True):
        assert block.valid_size == (single.height, single.width)
        for tree in block.trees:
            inside = torch.zeros(block.height, block.width, dtype=torch.bool)
            inside[: single.height, : single.width] = True
            joined = torch.from_numpy(tree.rank)[inside.flatten()]
            assert joined.max() == joined.numel() - 1
            assert (tree.edge_weight[~inside.flatten().numpy()] >= PADDING_WEIGHT).all()


def test_channels_are_telling() -> None:
    records, _, blocks = look(GrootV("pico").eval())
    for record, block in zip(records, blocks, strict=True):
        (mean_title, mean), *single = block.decays.items()
        decay = record.decay[1]
        assert mean_title == "all channels (geometric mean)"
        torch.testing.assert_close(torch.from_numpy(mean), decay.log().mean(1).exp())
        numbers = {title.partition(", ")[2]: int(title.split(",")[0].split()[1]) for title, _ in reversed(single)}
        reach = decay.log().mean(0)
        assert numbers["reaches farthest"] == reach.argmax()
        assert numbers["reaches least"] == reach.argmin()
        for title, values in single:
            assert torch.equal(torch.from_numpy(values), decay[:, int(title.split(",")[0].split()[1])])


def test_the_last_call_counts() -> None:
    model = GrootV("pico").eval()
    with torch.no_grad(), record_trees(model) as records, TreeFeatures(model) as features:
        model(IMAGE)
        model(IMAGE[:, :, :32])
    assert explorer_blocks(records, features)[0].height == 8
    model(IMAGE)
    assert features.found["stages.0.blocks.0.mixer"].shape[1] == 8  # nothing is kept after the block


def test_layers_without_a_backbone_are_an_error() -> None:
    layer = TreeSSM(8)
    with record_trees(layer) as records, TreeFeatures(layer) as features:
        layer(torch.randn(1, 4, 4, 8))
    with pytest.raises(ValueError, match="none of the 1 recorded layers is part of a GrootV backbone"):
        explorer_blocks(records, features)
