"""The backbone: what it computes, what its options do, what it refuses."""

import copy
from itertools import product

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from grootvl_mm.models import GrootV, TreeSSM
from grootvl_mm.models.grootv import Block
from tests.helpers.marks import needs_compiler, needs_float16_on_the_cpu
from tests.helpers.memory import kept_tensors

MICRO = {"channels": 8, "depths": [1, 2, 1]}


def make(**options) -> GrootV:
    return GrootV(**{"arch": MICRO, "out_indices": (0, 1, 2)} | options)


def same_weights(source: nn.Module, **options) -> GrootV:
    model = make(**options)
    model.load_state_dict(source.state_dict())
    return model


@pytest.mark.parametrize(
    ("arch", "millions"), [("pico", 1.07), ("tiny", 28.38), ("small", 49.29), ("base", 87.48), ("large", 196.51)]
)
def test_parameter_counts(arch: str, millions: float) -> None:
    """Those of the paper, and of pico and large, which are ours."""
    with torch.device("meta"):
        model = GrootV(arch)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("size", [(32, 32), (67, 50), (1, 1), (5, 129)])
def test_any_image_size(device: torch.device, size: tuple[int, int]) -> None:
    model = make().to(device).eval()
    for batch in (2, 1, 0):
        maps = model(torch.randn(batch, 3, *size, device=device))
        for index, feature in enumerate(maps):
            stride = 4 * 2**index
            expected = (batch, 8 * 2**index, -(-size[0] // stride), -(-size[1] // stride))
            assert feature.shape == expected
            assert feature.isfinite().all()


def test_images_of_a_batch_do_not_mix(device: torch.device) -> None:
    model = make().to(device).eval()
    images = torch.randn(3, 3, 40, 36, device=device)
    together = model(images)
    for index, image in enumerate(images):
        for alone, batched in zip(model(image[None]), together, strict=True):
            torch.testing.assert_close(alone[0], batched[index], rtol=1e-4, atol=1e-5)


def test_memory_format_of_the_image_does_not_matter(device: torch.device) -> None:
    model = make().to(device).eval()
    image = torch.randn(2, 3, 32, 40, device=device)
    for a, b in zip(model(image), model(image.contiguous(memory_format=torch.channels_last)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("out_indices", [(0,), (1,), (0, 2), (0, 1, 2), 1, (-1,)])
def test_every_parameter_gets_a_gradient(device: torch.device, out_indices) -> None:
    model = make(out_indices=out_indices).to(device).train()
    maps = model(torch.randn(2, 3, 48, 40, device=device))
    sum(feature.square().mean() for feature in maps).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_only_the_stages_that_are_needed_exist() -> None:
    model = make(out_indices=(0,))
    assert len(model.stages) == 1
    assert model.stages[0].downsample is None


def test_checkpointing_gives_the_same_gradients(device: torch.device) -> None:
    plain = make().to(device)
    checkpointed = same_weights(plain, with_cp=True).to(device)
    image = torch.randn(2, 3, 32, 32, device=device)
    for model in (plain, checkpointed):
        sum(feature.square().mean() for feature in model(image)).backward()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that operators made and that are still there, and their peak.

    Views of the model's parameters are not counted.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata in self.parameters:
                    continue
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


def test_checkpointing_keeps_one_map_for_each_block() -> None:
    kept, peak = {}, {}
    for with_cp, depth in product((False, True), (4, 8)):
        model = make(arch={"channels": 8, "depths": [depth]}, out_indices=(0,), with_cp=with_cp)
        memory = LiveMemory(model)
        with memory:
            (feature,) = model(torch.randn(1, 3, 64, 64))
            kept[with_cp, depth] = memory.now()
            feature.mean().backward()
        peak[with_cp, depth] = memory.peak
    one_map = 8 * 16 * 16 * 4
    # A block keeps its input, instead of all that it computes.
    assert kept[True, 8] - kept[True, 4] == 4 * one_map
    assert kept[False, 8] - kept[False, 4] > 4 * 12 * one_map
    assert peak[True, 8] < 0.5 * peak[False, 8]


@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 3])
def test_frozen_stages(frozen_stages: int) -> None:
    model = make(frozen_stages=frozen_stages, drop_path_rate=0.5)
    model.train()
    frozen = ["stem.", *(f"stages.{i}." for i in range(frozen_stages))] if frozen_stages >= 0 else []
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad != name.startswith(tuple(frozen) or "-"), name
    assert model.stem.training == (frozen_stages < 0)
    assert [stage.training for stage in model.stages] == [i >= frozen_stages for i in range(3)]
    maps = model(torch.randn(1, 3, 32, 32))
    if frozen_stages < 3:
        maps[-1].sum().backward()
        assert all((p.grad is None) != p.requires_grad for p in model.parameters())


def test_drop_path_rises_linearly_and_only_acts_in_training() -> None:
    model = make(drop_path_rate=0.3)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    image = torch.randn(4, 3, 32, 32)
    model.eval()
    assert torch.equal(model(image)[-1], model(image)[-1])
    model.train()
    assert not torch.equal(model(image)[-1], model(image)[-1])


def test_layer_scale() -> None:
    model = make(layer_scale=0.0)
    x = torch.randn(1, 4, 4, 8)
    assert torch.equal(model.stages[0].blocks[0](x, None)[0], x)
    assert model.stages[0].blocks[0].gamma1.requires_grad


@pytest.mark.parametrize(
    "option",
    [
        {"tree_metric": "euclidean"},
        {"tree_metric": "manhattan"},
        {"tree_root": "last", "propagation": "up"},
        {"propagation": "up"},
        {"propagation": "down"},
        {"tree_sharing": "stage"},
        {"scan": "raster"},
        {"scan": "cross"},
        {"scan": "random"},
        {"scan": "maximum"},
    ],
)
def test_options_change_the_result(option: dict) -> None:
    plain = make().eval()
    for parameter in plain.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    other = same_weights(plain, **option).eval()
    image = torch.randn(1, 3, 64, 64)
    assert not torch.allclose(plain(image)[-1], other(image)[-1], rtol=1e-3, atol=1e-5)


def test_root_changes_nothing_but_whose_decay_an_edge_has() -> None:
    layer = TreeSSM(8)
    other = TreeSSM(8, tree_root="last")
    feature = torch.randn(1, 8, 6, 6)
    first, last = layer.build_tree(feature), other.build_tree(feature)
    assert torch.equal(first.edges(), last.edges())
    assert first.order[0, 0] == 0
    assert last.order[0, 0] == 35


def recurrence(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """``h_v = x_v + a_v h_(v-1)`` over the second axis, the textbook state space model."""
    states = []
    for value, factor in zip(x.unbind(1), decay.unbind(1), strict=True):
        states.append(value + factor * states[-1] if states else value)
    return torch.stack(states, dim=1)


def scan_of_rows(x: torch.Tensor, decay: torch.Tensor, root: str, propagation: str) -> torch.Tensor:
    if root == "last":
        return scan_of_rows(x.flip(1), decay.flip(1), "first", propagation).flip(1)
    to_next = decay.roll(-1, 1)  # the edge between v and v + 1 has the decay of v + 1
    down, up = recurrence(x, decay), recurrence(x.flip(1), to_next.flip(1)).flip(1)
    return {"down": down, "up": up, "all": down + up - x}[propagation]


@pytest.mark.parametrize("root", ["first", "last"])
@pytest.mark.parametrize("propagation", ["all", "up", "down"])
def test_raster_scan_is_the_recurrence_row_by_row(device: torch.device, root: str, propagation: str) -> None:
    layer = TreeSSM(8, scan="raster", tree_root=root, propagation=propagation).to(device)
    inputs = torch.randn(2, 4, 5, 8, device=device)
    x, gate = layer.in_proj(inputs).chunk(2, dim=-1)
    x = nn.functional.silu(layer.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1).flatten(1, 2)
    dt, b, c = layer.x_proj(x).split([layer.dt_rank, 1, 1], dim=-1)
    delta = nn.functional.softplus(layer.dt_proj(dt))
    h = scan_of_rows(delta * b * x, torch.exp(-layer.A_log.exp() * delta), root, propagation)
    y = layer.out_norm(layer.h_norm(h) * c + layer.Ds * x) * nn.functional.silu(gate.flatten(1, 2))
    expected = layer.out_proj(y).view(inputs.shape)
    torch.testing.assert_close(layer(inputs)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("root", ["first", "last"])
def test_cross_scan_is_the_mean_of_rows_and_columns(device: torch.device, root: str) -> None:
    cross, rows, columns = (TreeSSM(8, scan=scan, tree_root=root).to(device) for scan in ("cross", "raster", "raster"))
    rows.load_state_dict(cross.state_dict())
    columns.load_state_dict(cross.state_dict())
    # The same layer on the transposed image.
    columns.conv2d.weight.data = columns.conv2d.weight.data.transpose(2, 3).contiguous()
    inputs = torch.randn(2, 4, 5, 8, device=device)
    expected = (rows(inputs)[0] + columns(inputs.transpose(1, 2))[0].transpose(1, 2)) / 2
    torch.testing.assert_close(cross(inputs)[0], expected, rtol=1e-4, atol=1e-5)


def test_shared_tree_is_that_of_the_first_block() -> None:
    model = make(tree_sharing="stage").eval()
    used = []
    for block in model.stages[1].blocks:
        block.mixer.register_forward_hook(lambda module, inputs, output: used.append(output[1]))
    model(torch.randn(1, 3, 32, 32))
    assert len(used) == 2
    assert used[0].parent is used[1].parent


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, None),
        (torch.bfloat16, None),
        (torch.float32, torch.bfloat16),
        pytest.param(torch.float32, torch.float16, marks=needs_float16_on_the_cpu),
    ],
)
def test_a_block_keeps_12_maps(device: torch.device, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    """Input and sum of the residual stream, the projection (4), what is scanned (2), and the hidden layer (4)."""
    block = Block(channels=32).to(device, dtype)
    x = torch.randn(2, 16, 17, 32, device=device, dtype=dtype, requires_grad=True)
    precision = torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None)
    with kept_tensors() as kept, precision:
        y, _ = block(x)
    assert y.requires_grad
    sizes = [value.untyped_storage().nbytes() // value.element_size() for value in kept.values()]
    # The others are weights, which autocast copies, trees, and the few channels of the scan's inputs.
    assert sum(size for size in sizes if size >= x.numel()) <= 12 * x.numel()


def test_features_that_are_not_numbers_neither_hang_nor_crash(device: torch.device) -> None:
    model = make().to(device).eval()
    image = torch.randn(2, 3, 32, 32, device=device)
    image[0, 0, 3, 3] = float("nan")
    maps = model(image)
    assert maps[-1][0].isnan().any()
    assert maps[-1][1].isfinite().all()


def test_copies() -> None:
    model = make()
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(copy.deepcopy(model)(image)[-1], model(image)[-1])


@pytest.mark.parametrize("scope", ["mmengine", "mmdet", "mmseg", "mmpretrain"])
@pytest.mark.parametrize("name", ["GrootV", "grootvl_mm.GrootV"])
def test_builds_in_every_scope(scope: str, name: str) -> None:
    with DefaultScope.overwrite_default_scope(scope):
        assert isinstance(MODELS.build({"type": name, "arch": "pico"}), GrootV)


def test_layer_depth() -> None:
    model = make()
    expected = {
        "stem.conv1.weight": 0,
        "stages.0.blocks.0.mixer.A_log": 1,
        "stages.0.norm.weight": 1,
        "stages.0.downsample.conv.weight": 1,
        "stages.1.blocks.0.norm1.weight": 2,
        "stages.1.blocks.1.mlp.fc1.bias": 3,
        "stages.2.norm.bias": 4,
        "head.fc.weight": 5,
    }
    assert {name: model.get_layer_depth(name) for name in expected} == {k: (v, 6) for k, v in expected.items()}
    assert model.get_layer_depth("backbone.stages.1.blocks.0.norm1.weight", "backbone.") == (2, 6)
    assert model.get_layer_depth("neck.conv.weight", "backbone.") == (5, 6)
    depths = {model.get_layer_depth(name)[0] for name, _ in model.named_parameters()}
    assert depths == set(range(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "huge"}, "pico, tiny, small, base, large or a dict, got 'huge'"),
        ({"arch": {"channels": 8}}, "keys channels and depths"),
        ({"arch": {"channels": 7, "depths": [1]}, "out_indices": (0,)}, "even number of channels"),
        ({"arch": {"channels": 8, "depths": [1, 0]}, "out_indices": (0,)}, "at least one block"),
        ({"out_indices": (0, 3)}, r"0..2, got \(0, 3\)"),
        ({"out_indices": (1, 0)}, "ascending"),
        ({"out_indices": ()}, "ascending"),
        ({"frozen_stages": 4}, "-1..3, got 4"),
        ({"drop_path_rate": 1.0}, r"\[0, 1\), got 1.0"),
        ({"tree_metric": "l2"}, "tree_metric must be one of cosine, euclidean, manhattan, got 'l2'"),
        ({"tree_root": "centre"}, "tree_root must be one of first, last, got 'centre'"),
        ({"propagation": "both"}, "propagation must be one of all, up, down, got 'both'"),
        ({"tree_sharing": "model"}, "tree_sharing must be one of block, stage, got 'model'"),
        ({"scan": "spiral"}, "scan must be one of tree, raster, cross, random, maximum, got 'spiral'"),
    ],
)
def test_bad_options_are_explained(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)
