"""``ignore_padding``: what an image yields does not depend on its batch."""

from itertools import cycle, product

import pytest
import torch
from torch import Tensor, nn

from grootvl_mm.layers.padding import pyramid
from grootvl_mm.models import GrootV, TreeSSM, grootv
from grootvl_mm.models.tree_ssm import SCANS, raster_path
from tests.helpers.marks import HALVES, needs_compiler, needs_free_batches
from tests.helpers.memory import kept_tensors

NANO = {"channels": 8, "depths": [1, 2]}
SIZES = [(23, 37), (40, 17), (40, 44), (3, 44)]
HEIGHT, WIDTH = 40, 48
REST = cycle(
    [
        {"tree_metric": "cosine", "tree_sharing": "stage"},
        {"tree_metric": "euclidean", "with_cp": True},
        {"tree_metric": "manhattan", "layer_scale": 0.5},
        {"tree_metric": "manhattan", "tree_sharing": "stage", "with_cp": True},
        {"tree_metric": "euclidean", "tree_sharing": "stage"},
    ]
)
OPTIONS = [
    {"scan": scan, "tree_root": root, "propagation": propagation, **next(REST)}
    for scan, root, propagation in product(SCANS, ("first", "last"), ("all", "up", "down"))
]


def make(**options) -> GrootV:
    return GrootV(**{"arch": NANO, "out_indices": (0, 1), "ignore_padding": True} | options)


def with_large_weights(model: GrootV) -> GrootV:
    """As after a training, in which trees and scans matter."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def random_images(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(1, 3, *size, dtype=dtype).to(device) for size in SIZES]


def pad(images: list[Tensor], value: float = 0.0) -> Tensor:
    padded = [
        nn.functional.pad(image, (0, WIDTH - image.shape[3], 0, HEIGHT - image.shape[2]), value=value)
        for image in images
    ]
    return torch.cat(padded)


def inside(maps: tuple[Tensor, ...], index: int) -> list[Tensor]:
    """The part of an image."""
    height, width = SIZES[index]
    return [
        feature[index : index + 1, :, : -(-height // stride), : -(-width // stride)]
        for feature, stride in zip(maps, (4, 8), strict=True)
    ]


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-12))


def compare(model: GrootV, images: list[Tensor], tolerance: float) -> None:
    """Maps, gradients of the images and gradients of the parameters, in one batch and one by one."""
    images = [image.requires_grad_() for image in images]
    parameters = list(model.parameters())
    maps = model(pad(images))
    generator = torch.Generator().manual_seed(0)
    together, alone = 0.0, 0.0
    for index, image in enumerate(images):
        for actual, expected in zip(inside(maps, index), model(image), strict=True):
            assert relative(actual, expected) < tolerance
            weight = torch.randn(expected.shape, generator=generator, dtype=torch.float64).to(expected)
            together = together + (weight * actual).sum()
            alone = alone + (weight * expected).sum()
    gradients = zip(*(torch.autograd.grad(loss, [*images, *parameters]) for loss in (together, alone)), strict=True)
    for actual, expected in gradients:
        assert relative(actual, expected) < tolerance


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_as_without_padding(device: torch.device, options: dict) -> None:
    """In float64, where nothing but padding can make a difference."""
    # In training, random trees are new ones at each call.
    model = with_large_weights(make(**options)).to(device, torch.float64).train(options["scan"] != "random")
    compare(model, random_images(device, torch.float64), tolerance=1e-9)


def test_with_layers_that_do_not_map_zero_to_zero(device: torch.device) -> None:
    """Adapters with a bias, hooks and other convolutions put values where padding was."""
    model = with_large_weights(make()).to(device, torch.float64)
    first, *others = [block.mixer for stage in model.stages for block in stage.blocks]
    for mixer in others:
        mixer.in_proj = nn.Linear(mixer.in_proj.in_features, mixer.in_proj.out_features)
        channels = mixer.conv2d.in_channels
        mixer.conv2d = nn.Conv2d(channels, channels, 5, padding=2, groups=channels)
        mixer.x_proj = nn.Linear(channels, mixer.x_proj.out_features)
    first.in_proj.register_forward_hook(lambda module, args, output: output + 0.5)
    compare(model.to(device, torch.float64), random_images(device, torch.float64), tolerance=1e-9)


def test_as_without_padding_in_single_precision(device: torch.device) -> None:
    compare(make(arch="pico", out_indices=(0, 1)).to(device), random_images(device), tolerance=1e-5)


def test_padding_matters_by_default(device: torch.device) -> None:
    """Or the tests here would show nothing."""
    model = with_large_weights(make(ignore_padding=False)).to(device)
    images = random_images(device)
    with torch.no_grad():
        maps = model(pad(images))
        assert max(relative(inside(maps, 0)[level], model(images[0])[level]) for level in (0, 1)) > 0.05


def test_without_padding_nothing_changes(device: torch.device) -> None:
    model = make().to(device)
    image = torch.randn(2, 3, 33, 40, device=device)
    with torch.no_grad():
        expected = model(image)
        model.ignore_padding = False
        torch.testing.assert_close(model(image), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bits(device: torch.device, dtype: torch.dtype, autocast: bool) -> None:
    """A path row by row, whose order no rounding can change."""
    model = make(scan="raster").to(device)
    images = random_images(device)
    if not autocast:
        model, images = model.to(dtype), [image.to(dtype) for image in images]
    with torch.autocast(device.type, dtype, enabled=autocast):
        maps = model(pad(images))
        for index, image in enumerate(images):
            for actual, expected in zip(inside(maps, index), model(image), strict=True):
                assert actual.dtype == expected.dtype
                assert relative(actual.float(), expected.float()) < 0.01
    sum(feature.float().square().mean() for feature in maps).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", HALVES)
def test_tree_in_16_bits(device: torch.device, dtype: torch.dtype) -> None:
    model = make().to(device)
    images = random_images(device)
    with torch.autocast(device.type, dtype):
        maps = model(pad(images))
    for index, (height, width) in enumerate(SIZES):
        # Rounding may exchange edges that weigh the same, but padding has no say.
        with torch.autocast(device.type, dtype):
            alone = model(images[index])
        for actual, expected in zip(inside(maps, index), alone, strict=True):
            assert relative(actual, expected) < 0.1, (height, width)


def test_a_batch_without_padding_is_left_alone(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where looking takes no synchronisation."""
    made = []
    monkeypatch.setattr(grootv, "pyramid", lambda *args, **kwargs: made.append(pyramid(*args, **kwargs)) or made[-1])
    model, image = make().to(device), torch.randn(2, 3, 32, 40, device=device)
    model(image)
    model(image, valid_sizes=[(32, 40)] * 2)
    assert len(made) == (0 if device.type == "cpu" else 2)
    model(image, valid_sizes=[(32, 40), (32, 39)])
    assert len(made) == (1 if device.type == "cpu" else 3)


def test_maps_are_zero_at_padding(device: torch.device) -> None:
    for index, feature in enumerate(make().to(device)(pad(random_images(device)))):
        stride = 4 * 2**index
        for single, (height, width) in zip(feature, SIZES, strict=True):
            assert not single[:, -(-height // stride) :].any()
            assert not single[:, :, -(-width // stride) :].any()
            assert single[:, : -(-height // stride), : -(-width // stride)].any()


def test_given_sizes(device: torch.device) -> None:
    """They count whatever is at the padding, and whether padding is ignored by default or not."""
    model = make(ignore_padding=False).to(device).eval()
    images = random_images(device)
    with torch.no_grad():
        for value in (7.0, torch.nan):
            maps = model(pad(images, value), valid_sizes=SIZES)
            for index, image in enumerate(images):
                torch.testing.assert_close(inside(maps, index), list(model(image)), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match=r"valid_sizes must have the shape \(4, 2\)"):
            model(pad(images), valid_sizes=SIZES[:2])


def test_margin_that_belongs_to_the_picture(device: torch.device) -> None:
    """An image that ends in black, where black is zero, needs its size."""
    model = make().to(device).eval()
    image = torch.randn(1, 3, 32, 32, device=device)
    image[:, :, 20:] = 0
    with torch.no_grad():
        found, given = model(image)[0], model(image, valid_sizes=[(32, 32)])[0]
    assert not found[:, :, 5:].any()
    assert given[:, :, 5:].any()


def test_picture_of_nothing_but_zeros(device: torch.device) -> None:
    images = torch.zeros(2, 3, 32, 40, device=device)
    images[1] = 1
    maps = make().to(device)(images)
    sum(feature.square().mean() for feature in maps).backward()
    assert all(feature.isfinite().all() for feature in maps)
    assert not maps[0][0].any()


@pytest.mark.parametrize("root", ["first", "last"])
@pytest.mark.parametrize("by_columns", [False, True])
def test_paths_leave_padding_for_the_end(device: torch.device, root: str, by_columns: bool) -> None:
    sizes = [(2, 3), (3, 2), (3, 4), (1, 1)]
    (padding,) = pyramid(torch.tensor(sizes, device=device) * 2, torch.empty(4, 3, 6, 8), 1)
    path = raster_path(4, 3, 4, root, by_columns, device, padding)
    vertices = torch.arange(12, device=device).view(3, 4)
    for index, (height, width) in enumerate(sizes):
        own = vertices[:height, :width]
        own = own.T.flatten() if by_columns else own.flatten()
        own = own.flip(0) if root == "last" else own
        assert torch.equal(path.order[index, : len(own)].long(), own)
        assert torch.equal(path.order[index].long().sort()[0], vertices.flatten())
        assert torch.equal(path.parent[index][path.order[index, 1:].long()], path.order[index, :-1])
        assert path.parent[index, own[0]] == own[0]


def test_layer_alone(device: torch.device) -> None:
    """:class:`TreeSSM` ignores the padding that it is told of."""
    layer = TreeSSM(8).to(device)
    x = torch.randn(1, 5, 6, 8, device=device)
    padding = pyramid(torch.tensor([[12, 16]], device=device), torch.empty(1, 3, 20, 24), 2)[1]
    torch.testing.assert_close(layer(x, padding=padding)[0][:, :3, :4], layer(x[:, :3, :4])[0], rtol=1e-4, atol=1e-6)


def test_a_block_keeps_no_map_more() -> None:
    """What padding is taken out of is computed again, as the norm before it is."""
    kept = {}
    for ignored in (False, True):
        model = make(arch={"channels": 8, "depths": [4]}, out_indices=(0,), ignore_padding=ignored)
        with kept_tensors() as tensors:
            feature = model(nn.functional.pad(torch.randn(1, 3, 64, 56), (0, 8)))[0]
        kept[ignored] = sum(value.untyped_storage().nbytes() for value in tensors.values())
        assert feature.requires_grad
    one_map = 8 * 16 * 16 * 4
    assert kept[True] - kept[False] < 4 * one_map  # of four blocks


@needs_compiler
@pytest.mark.parametrize("options", [{"tree_root": "last", "with_cp": True}, {"scan": "cross"}])
def test_compiles_as_one_graph(device: torch.device, options: dict) -> None:
    torch._dynamo.reset()
    model = make(**options).to(device).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    image = pad(random_images(device))
    results = []
    for network in (model, compiled):
        maps = network(image)
        grads = torch.autograd.grad(sum(feature.square().mean() for feature in maps), list(model.parameters()))
        results.append((*maps, *grads))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


@needs_compiler
@needs_free_batches
@pytest.mark.parametrize("options", [{}, {"scan": "raster", "tree_root": "last"}])
def test_export_for_any_number_of_pictures_of_any_size(options: dict) -> None:
    model = make(**options).eval()
    free = {0: torch.export.Dim("batch", min=1), 2: torch.export.Dim("height", min=9)}
    free[3] = torch.export.Dim("width", min=9)
    program = torch.export.export(model, (pad(random_images(torch.device("cpu"))),), dynamic_shapes=(free,))
    image = torch.randn(2, 3, 30, 50)
    image[0, :, 17:], image[1, :, :, 20:] = 0, 0
    torch.testing.assert_close(program.module()(image), model(image), rtol=1e-4, atol=1e-6)
