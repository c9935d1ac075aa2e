"""What only a GPU can show: no synchronisation, CUDA graphs, streams, other devices, more than 2^31 elements.

The values, gradients and errors of the CUDA operators are tested where those of the CPU are.
"""

import pytest
import torch
from torch import Tensor

from grootvl_mm.ops import (
    depthwise_conv_silu,
    grid_edge_weight,
    grid_tree,
    layer_norm,
    residual_layer_norm,
    tree_scan,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def layer(feature: Tensor, decay: Tensor) -> Tensor:
    """Trees, a scan and its neighbours, one after the other."""
    height, width = feature.shape[2:]
    tree = grid_tree(grid_edge_weight(feature), height, width)
    ones = torch.ones(feature.shape[1], device=feature.device)
    x = layer_norm(feature.permute(0, 2, 3, 1), ones, ones)
    x = depthwise_conv_silu(x, ones.view(-1, 1, 1, 1).expand(-1, 1, 3, 3)).flatten(1, 2)
    total, normed = residual_layer_norm(x, tree_scan(x, decay, tree), ones, ones)
    return total + normed


@pytest.mark.usefixtures("sync_debug_mode")
def test_nothing_waits_for_the_gpu() -> None:
    feature = torch.randn(2, 16, 20, 30, device="cuda", requires_grad=True)
    decay = torch.rand(2, 600, 16, device="cuda", requires_grad=True)
    grad = torch.ones(2, 600, 16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    layer(feature, decay).backward(grad)


def test_replay_of_a_cuda_graph_equals_eager() -> None:
    feature = torch.randn(2, 16, 20, 30, device="cuda")
    decay = torch.rand(2, 600, 16, device="cuda")
    layer(feature, decay)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(feature, decay)
    feature.copy_(torch.randn_like(feature))
    graph.replay()
    assert torch.equal(captured, layer(feature, decay))


def test_runs_on_the_current_stream() -> None:
    stream = torch.cuda.Stream()
    feature = torch.randn(2, 16, 20, 30, device="cuda")
    decay = torch.rand(2, 600, 16, device="cuda")
    expected = layer(feature, decay)
    changed = torch.empty_like(feature)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        changed.copy_(feature)
        actual = layer(changed, decay)
    stream.synchronize()
    assert torch.equal(actual, expected)


def test_a_replay_that_changes_the_tree_changes_later_scans() -> None:
    weight = torch.rand(1, 2 * 600 - 50, device="cuda")
    x = torch.randn(1, 600, 16, device="cuda")
    decay = torch.rand_like(x)
    tree_scan(x, decay, grid_tree(weight, 20, 30))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tree = grid_tree(weight, 20, 30)
    graph.replay()
    assert torch.equal(tree_scan(x, decay, tree), tree_scan(x, decay, grid_tree(weight, 20, 30)))
    weight.copy_(1 - weight)
    graph.replay()
    assert torch.equal(tree_scan(x, decay, tree), tree_scan(x, decay, grid_tree(weight, 20, 30)))


def test_a_replay_that_changes_an_eager_tree_changes_later_scans() -> None:
    x = torch.randn(1, 600, 16, device="cuda")
    decay = torch.rand_like(x)
    tree, *others = (grid_tree(torch.rand(1, 2 * 600 - 50, device="cuda"), 20, 30) for _ in range(4))
    source = [part.clone() for part in others[0]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for part, value in zip(tree, source, strict=True):
            part.copy_(value)
    for other in others:
        for part, value in zip(source, other, strict=True):
            part.copy_(value)
        graph.replay()
        assert torch.equal(tree_scan(x, decay, tree), tree_scan(x, decay, other))


def test_a_replayed_scan_follows_its_tree() -> None:
    x = torch.randn(1, 600, 16, device="cuda")
    decay = torch.rand_like(x)
    tree, other = (grid_tree(torch.rand(1, 2 * 600 - 50, device="cuda"), 20, 30) for _ in range(2))
    tree_scan(x, decay, tree)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tree_scan(x, decay, tree)
    for part, value in zip(tree, other, strict=True):
        part.copy_(value)
    graph.replay()
    assert torch.equal(captured, tree_scan(x, decay, other))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_a_device_that_is_not_the_current_one() -> None:
    feature = torch.randn(2, 16, 20, 30)
    decay = torch.rand(2, 600, 16)
    with torch.cuda.device(0):
        assert torch.equal(
            layer(feature.to("cuda:1"), decay.to("cuda:1")).cpu(), layer(feature.cuda(), decay.cuda()).cpu()
        )


def test_more_than_2_to_the_31_elements() -> None:
    vertices, channels = 1_000_000, 2560
    needed = 5 * vertices * channels * 4
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    tree = grid_tree(torch.rand(1, 2 * vertices - 2000, device="cuda"), 1000, 1000)
    x = torch.ones(1, vertices, channels, device="cuda")
    h = tree_scan(x, torch.zeros_like(x), tree)
    assert torch.equal(h, x)
    h = tree_scan(x, torch.full_like(x, 0.5), tree)
    few = tree_scan(x[..., -3:], torch.full_like(x[..., -3:], 0.5), tree)
    assert torch.equal(h[..., -3:], few)
