"""Bytes that Python writes and the page reads: nothing of a tree is lost, and decays of all sizes are kept."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from grootvl_mm.layers.padding import BORDER_WEIGHT, LARGEST_WEIGHT, PADDING_WEIGHT
from grootvl_mm.ops import grid_tree
from grootvl_mm.visualization import join_ranks, parent_edges
from grootvl_mm.visualization.explorer import ExplorerBlock, ExplorerImage, ExplorerTree, explorer_page

DECODED = """() => {
    const { block, state } = explorer;
    return [block.tree(state.metric).parent, block.sequence(state.metric), block.weights(state.metric),
        block.cost(0)].map((values) => Array.from(values));
}"""


def make_block(height: int, width: int, weight: torch.Tensor, decay: np.ndarray, root: int = 0) -> ExplorerBlock:
    tree = grid_tree(weight, height, width, root)
    edge = parent_edges(tree, height, width).clamp(min=0)
    own = weight.gather(1, edge)[0] if weight.shape[1] else torch.zeros(1)
    rank = join_ranks(tree, weight, height, width)[0].numpy()
    trees = (ExplorerTree("cosine", tree.parent[0].numpy(), rank, own.numpy()),)
    return ExplorerBlock(0, 0, height, width, (height, width), root, "tree", "all", trees, {"all": decay})


SIZES = [(7, 5), (1, 9), (9, 1), (2, 2), (1, 2), (1, 1)]


@pytest.mark.parametrize(
    ("height", "width", "kind"),
    [*((*size, kind) for size in SIZES[:3] for kind in ("random", "ties", "padding")),
     *((*size, "ties") for size in SIZES[3:]), (256, 260, "ties")],
)  # fmt: skip
def test_page_reads_what_python_wrote(height: int, width: int, kind: str, visit: Callable, tmp_path: Path) -> None:
    size, edges = height * width, (height - 1) * width + height * (width - 1)
    weight = torch.rand(1, edges)
    if kind == "ties":
        weight = (3 * weight).round()
    elif kind == "padding":
        weight = torch.where(weight < 0.3, PADDING_WEIGHT, torch.where(weight > 0.9, BORDER_WEIGHT, weight))
    decay = np.exp(-(10 ** np.random.default_rng(0).uniform(-9, 2, size))).astype(np.float32)
    decay[:2] = [0, 1][:size]
    block = make_block(height, width, weight, decay, root=size - 1)
    picture = np.zeros((4 * height, 4 * width, 3), np.uint8)
    path = tmp_path / "page.html"
    path.write_text(explorer_page("encoded", [ExplorerImage("a", picture, picture.shape[:2], [block], [])]))

    page = visit(path)
    parent, sequence, weights, cost = map(np.array, page.evaluate(DECODED))
    (tree,) = block.trees
    np.testing.assert_array_equal(parent, tree.parent)
    np.testing.assert_array_equal(sequence, np.argsort(tree.rank)[1:])
    if size > 1:
        expected = tree.edge_weight[np.argsort(tree.rank)[1:]]
        if kind == "padding" and 1 in (height, width):  # a path needs all of its edges
            assert np.float32(PADDING_WEIGHT) in expected
        highest = expected[expected <= LARGEST_WEIGHT].max(initial=0)
        np.testing.assert_allclose(weights, expected.clip(max=highest), atol=1e-4)
    np.testing.assert_allclose(np.exp(-cost), decay, atol=1e-4)
    # The error of a product over a path is that of the sum, and x exp(-x) is at most 1 / e.
    with np.errstate(divide="ignore"):
        exact = -np.log(decay.astype(np.float64))
    seen = (exact > 1e-7) & (exact < 30)
    np.testing.assert_allclose(cost[seen], exact[seen], rtol=4e-4)


def test_no_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        explorer_page("empty", [])
