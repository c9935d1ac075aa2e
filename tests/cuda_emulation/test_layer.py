"""A whole layer of GrootV on the emulator: the kernels that it launches, and the tiles of its scans."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.cuda_emulation import latency_model
from tests.cuda_emulation.run import environment
from tests.cuda_emulation.test_kernels import Launch, run_kernels
from tests.ops.kernel_counts import SHARED_BYTES

# The layer of float32 inference as it runs on a GPU, where norms and residual connections use our operators and the
# projections are single products; checked against the block.
LAYER = """
import json
from torch.profiler import ProfilerActivity, profile
from grootvl_mm.models.grootv import Block
from grootvl_mm.ops import depthwise_conv_silu, layer_norm, residual_layer_norm

# PyTorch's operators that launch no kernel on a GPU, or only by calling others.
WITHOUT_KERNEL = '''
_reshape_alias _to_copy _unsafe_view as_strided chunk clone contiguous detach empty empty_like empty_strided expand
flatten narrow permute promote_types reshape result_type slice split split_with_sizes t to transpose unflatten
unsqueeze view
'''.split()

def run(block, x):
    mixer, mlp = block.mixer, block.mlp
    normed = layer_norm(x, block.norm1.weight, block.norm1.bias, block.norm1.eps)
    inner, gate = mixer.in_proj(normed).chunk(2, -1)
    inner = depthwise_conv_silu(inner, mixer.conv2d.weight)
    tree = mixer.build_tree(inner.permute(0, 3, 1, 2))
    dt, b, c = mixer.x_proj(inner).split([mixer.dt_rank, 1, 1], -1)
    mixed = mixer.out_proj(mixer.selective_scan(inner, dt, b, c, gate, tree))
    x, normed = residual_layer_norm(x, mixed, block.norm2.weight, block.norm2.bias, block.norm2.eps)
    return x + mlp.fc2(mlp.act(mlp.fc1(normed)))

def launching(event):
    name = event.name.removeprefix("aten::")
    if name != event.name and name not in WITHOUT_KERNEL:
        return [name]
    return [found for child in event.cpu_children for found in launching(child)]

torch.manual_seed(0)
block, x = Block(CHANNELS).eval(), torch.randn(1, 56, 56, CHANNELS)
with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as watched:
    y = run(block, x)
found = [name for event in watched.events() if event.cpu_parent is None for name in launching(event)]
with open("operators.json", "w") as file:
    json.dump(found, file)
log = open("launches.jsonl").read()
with torch.no_grad():
    torch.testing.assert_close(y, block(x)[0])
with open("launches.jsonl", "w") as file:
    file.write(log)
"""
CHANNELS = 16


class Layer(NamedTuple):
    """The launches of our kernels, and PyTorch's operators with kernels."""

    own: list[Launch]
    of_torch: list[str]


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> Layer:
    folder = tmp_path_factory.mktemp("layer")
    code = f"CHANNELS = {CHANNELS}\n{LAYER}"
    launches = run_kernels(code, folder, Path(environment(0)["GROOTVL_LIBRARY"]))
    return Layer(launches, json.loads((folder / "operators.json").read_text()))


def test_launches_of_a_layer(layer: Layer) -> None:
    """Edge weights, tree and cut, the scan's four, two norms, convolution; four projections, MLP and sum."""
    assert sorted(layer.of_torch) == sorted(["linear"] * 5 + ["gelu", "add"])
    assert len(layer.own) + len(layer.of_torch) <= 16


# Forward and backward passes along a tree of 56 x 56, for whose images the model is made.
SCANS = """
from grootvl_mm.ops import tree_selective_scan
from tests.cuda_emulation import latency_model
from tests.ops.test_selective_scan import sample

tree = latency_model.make_tree(latency_model.SHAPES[0])
inputs, _ = sample(1, 56, 56, CHANNELS, 5, seed=0, dtype=DTYPE)
inputs = {name: value.requires_grad_() for name, value in inputs.items()}
tree_selective_scan(**inputs, tree=tree).sum().backward()
x, decay = (torch.rand(1, 56 * 56, CHANNELS, dtype=DTYPE, requires_grad=True) for _ in range(2))
tree_scan(x, decay, tree).sum().backward()
"""
# Of the kernels that copy rows to shared memory, in this order: the maps that they copy, and their streams. Selective:
# forward, the same again in the backward pass, then its two; plain: forward, backward.
COPIED = ((1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (2, 2), (2, 1), (2, 1), (3, 2), (3, 2))
ROW_CHANNELS = 16  # of a tile


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def scans(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[Launch]]:
    """The bytes of a number, and the launches of the kernels that copy rows."""
    folder = tmp_path_factory.mktemp("scans")
    code = f"CHANNELS, DTYPE = {2 * CHANNELS}, torch.{request.param}\n{SCANS}"
    launches = run_kernels(code, folder, Path(environment(0)["GROOTVL_LIBRARY"]))
    return getattr(torch, request.param).itemsize, [launch for launch in launches if launch.copied_bytes]


def test_maps_that_scans_read(scans: tuple[int, list[Launch]]) -> None:
    """Each kernel reads each of its maps once, in the dtype in which it is stored."""
    size, launches = scans
    copied = [launch.copied_bytes / (56 * 56 * 2 * CHANNELS * size) for launch in launches]
    assert copied == [maps for maps, _ in COPIED]


def test_rows_of_a_tile_are_read_at_once(scans: tuple[int, list[Launch]]) -> None:
    """At least 24 rows of each map and warp, over all tiles, and none of them is waited for before the last one."""
    size, launches = scans
    for launch, (maps, _) in zip(launches, COPIED, strict=True):
        warps = launch.threads // 32
        rows = launch.copied_bytes / (maps * ROW_CHANNELS * size) / (launch.blocks * warps)
        lanes = ROW_CHANNELS // 4
        assert rows >= 24
        assert launch.copies * 32 / lanes >= maps * rows


def test_blocks_of_scans_share_a_multiprocessor(scans: tuple[int, list[Launch]]) -> None:
    """Their shared memory leaves room for as many warps as their registers, see test_cuda_build.py."""
    for launch, (_, streams) in zip(scans[1], COPIED, strict=True):
        blocks = SHARED_BYTES // (launch.shared_bytes + latency_model.RESERVED_BYTES)
        assert blocks * launch.threads // 32 >= (32 if streams == 1 else 24)
        assert blocks == latency_model.AFTER.blocks[streams]


def test_scans_have_the_tiles_of_the_model(scans: tuple[int, list[Launch]]) -> None:
    pieces = latency_model.cut(latency_model.make_tree(latency_model.SHAPES[0]))
    tiles = {streams: len(latency_model.make_tiles(pieces, latency_model.AFTER, streams)) for streams in (1, 2)}
    columns = 2 * CHANNELS // ROW_CHANNELS
    assert [launch.blocks for launch in scans[1]] == [tiles[streams] * columns for _, streams in COPIED]
