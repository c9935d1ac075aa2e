"""The kernels of trees and their cuts on the emulator: every card takes their launches, and counts of what they do.

The counts stand in for times where there is no GPU: how many blocks have work, and how long the longest chain of steps
is that wait for each other (launches, and barriers within).
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from grootvl_mm.ops import grid_tree
from tests.cuda_emulation import latency_model
from tests.cuda_emulation.build import ROOT, operator_library
from tests.cuda_emulation.run import CARDS, environment
from tests.helpers.trees import random_weight

# Vertices whose cut takes 48 KiB of dynamic shared memory, which a kernel with static shared memory may not have
# without asking: stride 16 of a 512 x 1024 image. Then more and fewer, up to what no card holds in one block.
SIZES = [(32, 64), (1, 2043), (1, 1), (64, 64), (32, 64), (96, 100), (64, 128), (101, 102)]
DETECTION = (2, 200, 334)


class Launch(NamedTuple):
    """One line of the emulator's log.

    Attributes:
        parameters: Template parameters of the kernel.
        blocks: Number of blocks.
        threads: Threads per block.
        steps: The most steps of a block, which barriers separate.
        shared_bytes: Dynamic shared memory of a block.
        copies: The most asynchronous copies that a thread had in flight when it waited for them.
        copied_bytes: The bytes of all asynchronous copies.
    """

    parameters: str
    blocks: int
    threads: int
    steps: int
    shared_bytes: int
    copies: int
    copied_bytes: int


def run_kernels(code: str, folder: Path, library: Path, card: int = CARDS[-1]) -> list[Launch]:
    """Runs Python in a fresh process with the kernels in ``library``; what was launched."""
    log = folder / "launches.jsonl"
    variables = {
        "GROOTVL_LIBRARY": str(library),
        "GROOTVL_EMULATION_SEED": "1",
        "GROOTVL_EMULATION_SHARED_BYTES": str(card),
        "GROOTVL_EMULATION_LOG": str(log),
        "PYTHONPATH": str(ROOT),
    }
    code = "import torch\nfrom grootvl_mm.ops import Tree, grid_tree, tree_scan\nops = torch.ops.grootvl\n" + code
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | variables,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [Launch(re.search(r"Parameters = \{(.*?)\}; Arguments", line.pop("signature"))[1], **line) for line in lines]


@pytest.fixture(scope="module")
def tree_kernels() -> Path:
    """Trees and cuts only, which compile in a fraction of the time of all."""
    return operator_library(only=("tree", "pieces"))


@pytest.mark.parametrize("card", CARDS)
def test_every_size_is_launched_on_every_card(tree_kernels: Path, tmp_path: Path, card: int) -> None:
    """The first launch of a process has no permission left over from a larger one; later ones take none away."""
    weights = [random_weight(1, height, width, seed=0) for height, width in SIZES]
    torch.save(weights, tmp_path / "weights.pt")
    run_kernels(
        f"sizes = {SIZES}\n"
        "weights = torch.load('weights.pt')\n"
        "trees = [ops.grid_tree(w, h, v, 0) for w, (h, v) in zip(weights, sizes)]\n"
        "cuts = [ops.tree_cut(*tree) for tree in trees]\n"
        "for w, (h, v), tree, cut in zip(weights, sizes, trees, cuts):\n"
        "    assert all(map(torch.equal, ops.grid_tree_and_cut(w, h, v, 0), (*tree, cut)))\n"
        "torch.save([parent for parent, _ in trees], 'parents.pt')\n",
        tmp_path,
        tree_kernels,
        card,
    )
    parents = torch.load(tmp_path / "parents.pt")
    for weight, size, parent in zip(weights, SIZES, parents, strict=True):
        assert torch.equal(parent, grid_tree(weight, *size).parent)


@pytest.mark.parametrize("card", [CARDS[0], CARDS[-1]])
def test_threads_with_trees_of_different_sizes(tree_kernels: Path, tmp_path: Path, card: int) -> None:
    run_kernels(
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def work(size):\n"
        "    height, width = size\n"
        "    weight = torch.rand(1, 2 * height * width - height - width)\n"
        "    for _ in range(4):\n"
        "        ops.tree_cut(*ops.grid_tree(weight, height, width, 0))\n"
        "with ThreadPoolExecutor(2) as pool:\n"
        "    list(pool.map(work, [(32, 64), (40, 80)]))\n",
        tmp_path,
        tree_kernels,
        card,
    )


class Counts(NamedTuple):
    """What the trees of a detector's first stage take."""

    tree: list[Launch]
    cut: list[Launch]
    weight: torch.Tensor
    parent: torch.Tensor


@pytest.fixture(scope="module")
def detection(tree_kernels: Path, tmp_path_factory: pytest.TempPathFactory) -> Counts:
    folder = tmp_path_factory.mktemp("detection")
    batch, height, width = DETECTION
    weight = random_weight(batch, height, width, seed=0)
    torch.save(weight, folder / "weight.pt")
    launches = run_kernels(
        f"tree = ops.grid_tree(torch.load('weight.pt'), {height}, {width}, 0)\n"
        "torch.save(tree[0], 'parent.pt')\n"
        "ops.tree_cut(*tree)\n",
        folder,
        tree_kernels,
    )
    first_cut = next(i for i, launch in enumerate(launches) if "Cuts" in launch.parameters)
    return Counts(launches[:first_cut], launches[first_cut:], weight, torch.load(folder / "parent.pt"))


def test_trees_of_a_detector_are_those_of_the_cpu(detection: Counts) -> None:
    assert torch.equal(detection.parent, grid_tree(detection.weight, *DETECTION[1:]).parent)


def test_trees_of_a_detector_give_many_multiprocessors_work(detection: Counts) -> None:
    assert min(launch.blocks for launch in detection.tree) >= 64


def test_chain_of_steps_of_a_tree_is_short(detection: Counts) -> None:
    assert sum(launch.steps for launch in detection.tree) <= 300


def test_cut_of_a_detector_leaves_one_kernel_to_few_blocks(detection: Counts) -> None:
    """Which numbers the pieces, some thousand of them."""
    few = [launch for launch in detection.cut if launch.blocks < 64]
    assert [launch.blocks for launch in few] == [DETECTION[0]]
    assert sum(launch.steps for launch in detection.cut) <= 300


def test_pieces_are_those_of_the_model(tree_kernels: Path, tmp_path: Path) -> None:
    height, width = 28, 40
    tree = latency_model.make_tree(latency_model.Shape("small", 1, height, width, 1))
    torch.save(tree, tmp_path / "tree.pt")
    run_kernels(
        "tree = torch.load('tree.pt', weights_only=False)\ntorch.save(ops.tree_cut(*tree), 'cut.pt')\n",
        tmp_path,
        tree_kernels,
    )
    cut, vertices, expected = torch.load(tmp_path / "cut.pt")[0], height * width, latency_model.cut(tree)
    first = cut[2 * vertices : 2 * vertices + len(expected.members) + 1]
    assert first.diff().tolist() == expected.members
    most_criticals = 2 * -(-vertices // (expected.most - 1))
    counts = cut[6 * vertices + 2 * most_criticals :]
    assert counts[:2].tolist() == [len(expected.members), expected.criticals]


@pytest.mark.parametrize("shape", latency_model.SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("streams", [1, 2])
def test_pieces_of_a_tile_are_of_like_length(shape: latency_model.Shape, streams: int) -> None:
    """The mean length over the longest; with equal tiles, it was 0.77 in the first shape."""
    pieces = latency_model.cut(latency_model.make_tree(shape))
    assert latency_model.useful_share(latency_model.make_tiles(pieces, latency_model.AFTER, streams)) >= 0.85


def test_a_tree_is_cut_once(tmp_path: Path) -> None:
    """For all scans along it, forward and backward."""
    launches = run_kernels(
        "weight = torch.rand(2, 2 * 30 - 11)\n"
        "tree = grid_tree(weight, 5, 6)\n"
        "x = torch.rand(2, 30, 4, requires_grad=True)\n"
        "for _ in range(2):\n"
        "    tree_scan(x, x.sigmoid(), tree).sum().backward()\n"
        "other = Tree(tree.parent.clone(), tree.order.clone())\n"
        "h = tree_scan(x, x.sigmoid(), other)\n"
        "h.sum().backward()\n"
        "expected = tree_scan(x, x.sigmoid(), tree)\n"
        "assert torch.equal(h, expected)\n"
        "fresh = grid_tree(1 - weight, 5, 6)\n"
        "for part, new in zip(tree, fresh):\n"
        "    part.copy_(new)\n"
        "changed = tree_scan(x, x.sigmoid(), tree)\n"
        "assert torch.equal(changed, tree_scan(x, x.sigmoid(), Tree(*fresh)))\n"
        "assert not torch.equal(changed, expected)\n"
        "again = grid_tree(weight, 5, 6)\n"
        "for part, new in zip(tree, again):\n"
        "    part.data.copy_(new)\n"  # the version stays, as in replays of a captured modification
        "assert torch.equal(tree_scan(x, x.sigmoid(), tree), expected)\n"
        "with torch.inference_mode():\n"
        "    tree = grid_tree(weight, 5, 6)\n"
        "    assert torch.equal(tree_scan(x, x.sigmoid(), tree), expected)\n"
        "    for part, new in zip(tree, fresh):\n"
        "        part.copy_(new)\n"
        "    assert torch.equal(tree_scan(x, x.sigmoid(), tree), changed)\n",
        tmp_path,
        Path(environment(0)["GROOTVL_LIBRARY"]),
    )
    # The copy without a history, the tree with new vertices twice, and both scans in inference mode; the trees
    # themselves were cut as they were built.
    assert sum("Cuts" in launch.parameters and "Grid" not in launch.parameters for launch in launches) == 5
