"""The backbone as a program of ``torch.export``."""

from collections import Counter

import pytest
import torch
import torch.export
from torch import Tensor

from grootvl_mm.models import GrootV
from tests.helpers.marks import needs_compiler

pytestmark = needs_compiler

NANO = {"channels": 8, "depths": [1]}
OPERATORS = ("grid_edge_weight", "grid_tree", "tree_selective_scan")


def make(**options) -> GrootV:
    return GrootV(**{"arch": NANO, "out_indices": (0,)} | options).eval()


def count_operators(program: torch.export.ExportedProgram) -> dict[str, int]:
    """How often each of our operators is in the graph."""
    targets = Counter(str(node.target) for node in program.graph.nodes)
    assert not any("mkldnn" in target for target in targets)
    return {name: targets[f"grootvl.{name}.default"] for name in OPERATORS}


def assert_equal_maps(program: torch.export.ExportedProgram, model: GrootV, image: Tensor) -> None:
    torch.testing.assert_close(program.module()(image), model(image), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arch", GrootV.arch_settings)
def test_every_size(arch: str) -> None:
    """On the meta device, where the largest model costs no memory."""
    with torch.device("meta"):
        model, image = GrootV(arch).eval(), torch.empty(1, 3, 64, 64)
    program = torch.export.export(model, (image,))
    blocks = sum(GrootV.arch_settings[arch]["depths"])
    assert count_operators(program) == dict.fromkeys(OPERATORS, blocks)
    maps = [value.meta["val"] for value in program.graph.output_node().args[0]]
    assert [tuple(feature.shape) for feature in maps] == [
        (1, model.channels * 2**stage, 16 // 2**stage, 16 // 2**stage) for stage in range(4)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"tree_metric": "manhattan", "tree_root": "last", "propagation": "up"},
        {"tree_metric": "euclidean", "propagation": "down", "layer_scale": 0.5},
        {"scan": "raster", "tree_root": "last"},
        {"scan": "cross"},
        {"scan": "random"},
        {"scan": "maximum"},
        {"arch": {"channels": 8, "depths": [2, 1]}, "out_indices": (0, 1), "tree_sharing": "stage"},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("strict", [False, True])
def test_options(strict: bool, options: dict) -> None:
    model, image = make(**options), torch.randn(2, 3, 18, 21)
    program = torch.export.export(model, (image,), strict=strict)
    assert_equal_maps(program, model, torch.randn(2, 3, 18, 21))
    scan = options.get("scan", "tree")
    trees = 0 if scan in ("raster", "cross") else len(options.get("arch", NANO)["depths"])
    weights = 0 if scan == "random" else trees
    scans = {"cross": 2}.get(scan, sum(options.get("arch", NANO)["depths"]))
    assert count_operators(program) == dict(zip(OPERATORS, (weights, trees, scans), strict=True))


def test_any_number_of_images_of_any_size() -> None:
    """From a size on with which no dimension shrinks to 1."""
    model = make(out_indices=(0, 1), arch={"channels": 8, "depths": [1, 1]})
    free = {
        0: torch.export.Dim("batch", min=1),
        2: torch.export.Dim("height", min=9),
        3: torch.export.Dim("width", min=9),
    }
    program = torch.export.export(model, (torch.randn(2, 3, 18, 21),), dynamic_shapes=(free,))
    for shape in ((1, 3, 18, 21), (3, 3, 9, 64), (2, 3, 33, 33)):
        assert_equal_maps(program, model, torch.randn(shape))
