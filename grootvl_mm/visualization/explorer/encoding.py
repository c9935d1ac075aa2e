"""The binary format of the blocks of an image in the explorer's page; ``data.js`` is the decoder.

For each block: the tree of each metric, then the decays of each channel, with L positions in row-major order:

=================  =================  ==========================================================================
tree of a metric   (L + 3) // 4       direction of each position's parent, two bits each, lowest bits first:
                                      0 up, 1 down, 2 left, 3 right; the root's is undefined
                   2 L, or 3 L        exact rank of the edge to the parent among the L - 1 edges of the tree; L - 1 for
                   beyond 65536       the root; the lowest bytes of all ranks first
                   2 (L - 1)          weights in ascending order, 0 to 65535 for the lowest to the highest, as
                                      differences between successive ones; the lower bytes first. Ignored padding
                                      weighs as much as the heaviest edge of the image
decays of a        2 L                ln(-ln(decay)) in 65535 steps, as differences modulo 65536; the lower bytes first
channel
=================  =================  ==========================================================================

Neighbours are similar, so the differences and especially their higher bytes are small, and deflate compresses them
well. A step of the decays is a factor of at most 1.0003 in -ln(decay), so the error of a product over any path is below
1e-4.
"""

from typing import Any

import numpy as np

from grootvl_mm.layers.padding import LARGEST_WEIGHT
from grootvl_mm.visualization.explorer.blocks import ExplorerBlock, ExplorerTree

LEVELS = 65535
# Range of -ln(decay); beyond it, a product is practically 1 or 0.
LEAST_COST, LARGEST_COST = 1e-7, 30.0


def encode_block(block: ExplorerBlock) -> tuple[dict[str, Any], bytes]:
    """The metadata of a block, without its offset, and its bytes."""
    trees = [encode_tree(tree, block.width, block.root) for tree in block.trees]
    channels = [encode_decay(decay) for decay in block.decays.values()]
    info = {
        "stage": block.stage,
        "block": block.block,
        "rows": block.height,
        "columns": block.width,
        "stride": block.stride,
        "valid": block.valid_size,
        "root": block.root,
        "scan": block.scan,
        "propagation": block.propagation,
        "trees": [{"metric": tree.metric, **limits} for tree, (limits, _) in zip(block.trees, trees, strict=True)],
        "channels": [{"title": title, **limits} for title, (limits, _) in zip(block.decays, channels, strict=True)],
    }
    return info, b"".join(content for _, content in trees + channels)


def encode_tree(tree: ExplorerTree, width: int, root: int) -> tuple[dict[str, float], bytes]:
    """The range of a tree's weights, and its bytes."""
    parent = tree.parent.astype(np.int64)
    size = len(parent)
    vertex = np.arange(size)
    step = parent - vertex
    direction = np.select([step == -width, step == width, step == -1], [0, 1, 2], 3)
    direction[root] = 0

    order = np.argsort(tree.rank)[1:]  # the root is the first
    ordered = tree.edge_weight[order].astype(np.float64)
    inside = ordered[ordered <= LARGEST_WEIGHT]
    low, high = (float(inside[0]), float(inside[-1])) if len(inside) else (0.0, 0.0)
    levels = np.rint((ordered.clip(max=high) - low) / max(high - low, np.finfo(np.float32).tiny) * LEVELS)
    content = _two_bits(direction) + _planes((tree.rank - 1) % size, 3 if size > 1 << 16 else 2) + _differences(levels)
    return {"low": low, "high": high}, content


def encode_decay(decay: np.ndarray) -> tuple[dict[str, float], bytes]:
    """The scale and the bytes of decays (L,) in [0, 1]."""
    with np.errstate(divide="ignore"):
        cost = np.clip(-np.log(decay.astype(np.float64)), LEAST_COST, LARGEST_COST)
    logarithm = np.log(cost)
    low = float(logarithm.min())
    step = max(float(logarithm.max()) - low, 1e-9) / LEVELS
    return {"low": low, "step": step}, _differences(np.rint((logarithm - low) / step))


def _two_bits(values: np.ndarray) -> bytes:
    padded = np.zeros(-(-len(values) // 4) * 4, np.uint8)
    padded[: len(values)] = values
    return (padded.reshape(-1, 4) << np.array([0, 2, 4, 6], np.uint8)).sum(axis=1, dtype=np.uint8).tobytes()


def _planes(values: np.ndarray, count: int) -> bytes:
    return b"".join(((values >> (8 * plane)) & 0xFF).astype(np.uint8).tobytes() for plane in range(count))


def _differences(levels: np.ndarray) -> bytes:
    return _planes(np.diff(levels.astype(np.int64), prepend=0) & 0xFFFF, 2)
