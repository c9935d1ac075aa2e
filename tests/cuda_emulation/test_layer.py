"""A whole layer of GrootV on the emulator: the kernels that it launches, and the tiles of its scans."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cuda_emulation import latency_model
from tests.cuda_emulation.run import environment
from tests.cuda_emulation.test_kernels import Launch, run_kernels

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


@pytest.mark.slow
def test_launches_of_a_layer(layer: Layer) -> None:
    """Edge weights, tree and cut, the scan's four, two norms, convolution; four projections, MLP and sum."""
    assert sorted(layer.of_torch) == sorted(["linear"] * 5 + ["gelu", "add"])
    assert len(layer.own) + len(layer.of_torch) <= 16


@pytest.mark.slow
def test_scans_have_the_tiles_of_the_model(layer: Layer) -> None:
    shape = latency_model.Shape("one", 1, 56, 56, 2 * CHANNELS)
    tiles = latency_model.make_tiles(latency_model.cut(latency_model.make_tree(shape)), latency_model.AFTER, 1)
    blocks = [launch.blocks for launch in layer.own if "SelectiveInput" in launch.parameters]
    assert blocks == [len(tiles) * 2 * CHANNELS // 16] * 2
