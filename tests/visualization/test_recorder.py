"""record_trees: what is recorded, that recording changes nothing, and that it leaves nothing behind."""

import copy
import itertools
import pickle
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grootvl_mm.models import GrootV, TreeSSM
from grootvl_mm.models.tree_ssm import SCANS, raster_path
from grootvl_mm.ops import grid_edge_weight, grid_tree, tree_scan
from grootvl_mm.visualization import TreeRecord, record_trees
from tests.helpers.marks import needs_compiler

NANO = {"channels": 8, "depths": [1, 2]}


def make(**options) -> GrootV:
    return GrootV(**{"arch": NANO, "out_indices": (0, 1)} | options)


def images(device: torch.device | str = "cpu", size: tuple[int, int] = (20, 28)) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)).to(device)


def record(model: nn.Module, *args) -> list[TreeRecord]:
    with record_trees(model) as trees:
        model(*args)
    return trees


def state(model: nn.Module) -> list[dict]:
    """All that a module has beside its parameters, by identity."""
    return [
        {name: id(value) for name, value in module.__dict__.items()}
        | {name: list(value) for name, value in module.__dict__.items() if "hooks" in name}
        for module in model.modules()
    ]


def mixer_inputs(model: nn.Module, *args) -> list[tuple]:
    """What each layer is called with."""
    found = []
    handles = [
        module.register_forward_pre_hook(lambda module, inputs: found.append(inputs))
        for module in model.modules()
        if isinstance(module, TreeSSM)
    ]
    model(*args)
    for handle in handles:
        handle.remove()
    return found


def test_names_sizes_and_order(device: torch.device) -> None:
    model = nn.Sequential(make().to(device), nn.Identity())
    records = record(model, images(device))
    assert [(r.name, r.stage, r.block, r.height, r.width, r.stride) for r in records] == [
        ("0.stages.0.blocks.0.mixer", 0, 0, 5, 7, 4),
        ("0.stages.1.blocks.0.mixer", 1, 0, 3, 4, 8),
        ("0.stages.1.blocks.1.mixer", 1, 1, 3, 4, 8),
    ]
    for r in records:
        vertices, edges, inner = r.height * r.width, 2 * r.height * r.width - r.height - r.width, 16 * (1 + r.stage)
        assert [len(r.trees), r.tree.parent.shape, r.tree.order.shape] == [1, (2, vertices), (2, vertices)]
        assert (r.edge_weight.shape, r.decay.shape) == ((2, edges), (2, vertices, inner))
        assert (r.edge_weight.dtype, r.decay.dtype) == (torch.float32, torch.float32)
        assert r.tree.parent.device.type == r.decay.device.type == r.edge_weight.device.type == device.type
        assert 0 < r.decay.min() <= r.decay.max() <= 1
        assert r.valid_sizes is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("metric", ["cosine", "euclidean", "manhattan"])
def test_values(metric: str, dtype: torch.dtype) -> None:
    """Against the layer's equations, written out."""
    model = make(tree_metric=metric, tree_root="last").eval().to(dtype)
    inputs = mixer_inputs(model, images().to(dtype))
    mixers = [module for module in model.modules() if isinstance(module, TreeSSM)]
    for r, mixer, (x, *_) in zip(record(model, images().to(dtype)), mixers, inputs, strict=True):
        feature = F.silu(mixer.conv2d(mixer.in_proj(x).chunk(2, -1)[0].permute(0, 3, 1, 2)))
        weight = grid_edge_weight(feature, metric, log=metric != "cosine")
        tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(r.edge_weight, weight, **tolerance)
        rebuilt = grid_tree(r.edge_weight, r.height, r.width, root=r.height * r.width - 1)
        assert torch.equal(rebuilt.parent, r.tree.parent)
        delta = F.softplus(mixer.dt_proj(mixer.x_proj(feature.permute(0, 2, 3, 1))[..., : mixer.dt_rank]))
        decay = torch.exp(-torch.exp(mixer.A_log) * delta).flatten(1, 2)
        torch.testing.assert_close(r.decay, decay.float(), **tolerance)
        assert (r.metric, r.root, r.propagation, r.scan) == (metric, "last", "all", "tree")


def test_the_decays_are_those_that_are_scanned_with() -> None:
    """Recorded decays put into the plain scan give what the fused operator gives."""
    mixer = TreeSSM(8).eval()
    x = torch.randn(2, 5, 6, 8)
    with record_trees(mixer) as records:
        y, tree = mixer(x)
    (r,) = records
    assert (r.name, r.stage, r.block, r.stride) == ("", None, None, None)
    assert r.tree.parent is tree.parent
    inner, gate = mixer.in_proj(x).chunk(2, dim=-1)
    inner = F.silu(mixer.conv2d(inner.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
    dt, b, c = (part.flatten(1, 2) for part in mixer.x_proj(inner).split([mixer.dt_rank, 1, 1], dim=-1))
    inner, gate = inner.flatten(1, 2), gate.flatten(1, 2)
    h = tree_scan(F.softplus(mixer.dt_proj(dt)) * b * inner, r.decay, r.tree)
    expected = mixer.out_proj(mixer.out_norm(mixer.h_norm(h) * c + mixer.Ds * inner) * F.silu(gate))
    torch.testing.assert_close(y.flatten(1, 2), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("root", ["first", "last"])
def test_scans(scan: str, root: str) -> None:
    for r in record(make(scan=scan, tree_root=root).eval(), images()):
        assert r.scan == scan
        own = grid_tree(r.edge_weight, r.height, r.width, 0 if root == "first" else r.height * r.width - 1)
        paths = [raster_path(2, r.height, r.width, root, columns, torch.device("cpu")) for columns in (False, True)]
        expected = {"raster": paths[:1], "cross": paths}.get(scan, [own])
        for tree, other in zip(r.trees, expected, strict=True):
            assert torch.equal(tree.parent, other.parent)
            assert torch.equal(tree.order.sort().values, other.order.sort().values)


@pytest.mark.parametrize("scan", SCANS)
def test_shared_trees_appear_for_each_block_with_the_weights_that_made_them(scan: str) -> None:
    model = make(tree_sharing="stage", scan=scan).eval()
    for size in ((20, 28), (12, 8), (12, 8)):  # nothing of the call before is taken over
        first, second, third = record(model, images(size=size))
        assert [r.tree_sharing for r in (first, second, third)] == ["stage"] * 3
        assert torch.equal(second.tree.parent, third.tree.parent)
        assert torch.equal(second.edge_weight, third.edge_weight)
        assert not torch.equal(second.decay, third.decay)
        own = record(make(scan=scan).eval(), images(size=size))
        assert [r.tree_sharing for r in own] == ["block"] * 3
        assert not torch.equal(own[1].edge_weight, own[2].edge_weight)
    with record_trees(model) as trees:
        model(images())
        model(images() + torch.randn(2, 3, 20, 28))
    assert len(trees) == 6
    assert torch.equal(trees[1].edge_weight, trees[4].edge_weight) == (scan == "random")


def test_padding_that_is_ignored() -> None:
    model = make(ignore_padding=True).eval()
    sizes = torch.tensor([[20, 12], [8, 28]])
    for r in record(model, images(), sizes):
        expected = -(-sizes // r.stride)
        assert torch.equal(r.valid_sizes, expected)
        assert torch.equal(grid_tree(r.edge_weight, r.height, r.width).parent, r.tree.parent)
        assert ((r.edge_weight >= 2e38).sum(dim=1) > 0).all()


OPTIONS = [
    {},
    {"with_cp": True},
    {"tree_sharing": "stage", "with_cp": True, "ignore_padding": True},
    {"scan": "cross", "drop_path_rate": 0.5},
    {"tree_metric": "manhattan", "propagation": "up", "layer_scale": 0.1},
]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training_is_the_same_to_the_bit(options: dict, autocast: bool, device: torch.device) -> None:
    model = make(**options).to(device).train()

    def step(recorded: bool) -> tuple[list[Tensor], list[TreeRecord]]:
        torch.manual_seed(1)
        model.zero_grad()
        image = images(device).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            if recorded:
                with record_trees(model) as trees:
                    loss = sum(feature.float().square().mean() for feature in model(image))
                    if options.get("tree_sharing") != "stage":  # checkpointing computes again here, or below
                        loss.backward()
            else:
                trees, loss = [], sum(feature.float().square().mean() for feature in model(image))
        if image.grad is None:
            loss.backward()
        return [loss.detach(), image.grad, *(p.grad.clone() for p in model.parameters())], trees

    plain, _ = step(recorded=False)
    recorded, trees = step(recorded=True)
    assert all(torch.equal(value, other) for value, other in zip(plain, recorded, strict=True))
    assert len(trees) == 3
    assert not any(value.requires_grad for r in trees for value in (r.edge_weight, r.decay))


class Adapted(nn.Module):
    """A layer in the way of LoRA, with dropout: computing it a second time would give something else."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Linear(layer.in_features, 2), nn.Linear(2, layer.out_features)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.up(self.down(self.dropout(x)))


@pytest.mark.parametrize("adapted", ["dt_proj", "in_proj", "x_proj", "out_norm"])
def test_adapters(adapted: str) -> None:
    model = make().train()
    decays = []
    for module in list(model.modules()):
        if not isinstance(module, TreeSSM):
            continue
        if adapted == "out_norm":
            module.out_norm.register_forward_hook(lambda module, inputs, output: output * 2)
        else:
            setattr(module, adapted, Adapted(getattr(module, adapted)))
        if adapted == "dt_proj":
            module.dt_proj.register_forward_hook(
                lambda _, inputs, output, mixer=module: decays.append(
                    torch.exp(-torch.exp(mixer.A_log) * F.softplus(output))
                )
            )
    torch.manual_seed(1)
    plain = model(images())
    decays.clear()
    torch.manual_seed(1)
    with record_trees(model) as trees:
        recorded = model(images())
    assert all(map(torch.equal, plain, recorded))
    assert len(trees) == 3
    for r, decay in zip(trees, decays, strict=adapted == "dt_proj"):
        assert torch.equal(r.decay, decay)


def test_nothing_is_left_behind() -> None:
    model = make()
    before = state(model)
    with record_trees(model), record_trees(model):
        model(images())
        assert state(model) != before
    assert state(model) == before

    with pytest.raises(ZeroDivisionError), record_trees(model) as trees:
        trees.append(len(record(model, images())) / 0)
    assert state(model) == before
    assert len(trees) == 3

    handle = model.stages[1].blocks[0].mixer.out_proj.register_forward_hook(lambda *_: 1 / 0)
    with record_trees(model) as trees:
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                model(images())
        handle.remove()
        model(images())
    assert [r.stage for r in trees] == [0, 1, 0, 1, 0, 1, 1]
    assert [r.name for r in trees[4:]] == [r.name for r in record(model, images())]
    handle.remove()
    assert state(model) == before


@pytest.mark.parametrize("ends", list(itertools.permutations(range(3))))
def test_recordings_may_overlap(ends: tuple[int, ...]) -> None:
    model = make()
    before = state(model)
    recordings = [record_trees(model) for _ in range(3)]
    lists = [recording.__enter__() for recording in recordings]
    for count, end in enumerate(ends, 1):
        model(images())
        recordings[end].__exit__(None, None, None)
        assert len(lists[end]) == 3 * count
    assert state(model) == before
    model(images())
    assert sorted(map(len, lists)) == [3, 6, 9]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_made_meanwhile_are_models_of_their_own(duplicate: Callable) -> None:
    """As mmengine's EMA makes them."""
    model = make()
    expected = model(images())
    with record_trees(model) as trees:
        other = duplicate(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        actual = other(images())
    assert all(map(torch.equal, actual, expected))
    assert trees == []
    assert len(record(other, images())) == 3


def test_what_has_a_model() -> None:
    model = make()
    inferencer = SimpleNamespace(model=nn.ModuleDict({"backbone": model}))
    with record_trees(inferencer) as trees:
        model(images())
    assert trees[0].name == "backbone.stages.0.blocks.0.mixer"


@needs_compiler
@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="needs torch 2.6")
@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_models(inplace: bool) -> None:
    model = make(arch={"channels": 8, "depths": [1]}, out_indices=(0,)).eval()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    compiled = model
    if inplace:
        model.compile(backend=backend)
    else:
        compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        compiled(images())
        assert len(graphs) == 1
        assert [r.stage for r in record(compiled, images())] == [0]
        compiled(images())
    assert len(graphs) == 1  # not compiled again
    torch.compiler.reset()


def test_what_cannot_be_recorded() -> None:
    with (
        pytest.raises(TypeError, match=r"must be a torch.nn.Module or have one as attribute model, got int"),
        record_trees(3),
    ):
        pass
    with pytest.raises(ValueError, match="Linear has no TreeSSM"), record_trees(nn.Linear(2, 2)):
        pass
    parallel = nn.DataParallel(GrootV("pico"))
    parallel.device_ids = [0, 1]
    with pytest.raises(TypeError, match="DataParallel calls copies"), record_trees(nn.ModuleList([parallel])):
        pass
