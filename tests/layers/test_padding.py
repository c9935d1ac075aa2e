"""Where images end in a padded batch, and how trees treat the padding."""

import numpy as np
import pytest
import torch
from torch import Tensor

from grootvl_mm.layers.padding import Padding, check_valid_sizes, crop, find_valid_sizes, pyramid
from grootvl_mm.ops import grid_tree

SIZES = [(5, 7), (6, 3), (2, 7), (6, 7), (1, 1), (0, 0)]


def batch(device: torch.device, sizes: list[tuple[int, int]] = SIZES) -> Tensor:
    """Random images without a zero, in 6 x 7."""
    image = torch.zeros(len(sizes), 3, 6, 7, device=device)
    for single, (height, width) in zip(image, sizes, strict=True):
        single[:, :height, :width] = torch.rand(3, height, width, device=device) + 0.1
    return image


def test_sizes_from_zero_margins(device: torch.device) -> None:
    assert find_valid_sizes(batch(device)).tolist() == [list(size) for size in SIZES]


def test_zeros_inside_are_no_margin(device: torch.device) -> None:
    image = batch(device, [(6, 7)] * 4)
    image[0, :, :, :3] = 0  # a margin to the left
    image[1] = 0
    image[1, 2, 4, 5] = -1e-30  # one channel of one pixel is enough
    image[2, :2] = 0
    image[3, :, :, 2] = 0
    image[3, 0, 0, 0] = torch.nan
    assert find_valid_sizes(image).tolist() == [[6, 7], [5, 6], [6, 7], [6, 7]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_sizes_in_other_types(device: torch.device, dtype: torch.dtype) -> None:
    assert find_valid_sizes(batch(device).to(dtype)).tolist() == [list(size) for size in SIZES]


@pytest.mark.parametrize("sizes", [[[5, 7]], torch.tensor([[5, 7]])], ids=["rows", "tensor"])
def test_sizes_are_not_put_on_the_default_device(sizes: object) -> None:
    with torch.device("meta"):
        assert check_valid_sizes(sizes, batch(torch.device("cpu"))[:1]).tolist() == [[5, 7]]


def test_empty_batch(device: torch.device) -> None:
    image = batch(device)[:0]
    assert find_valid_sizes(image).shape == (0, 2)
    padding = pyramid(find_valid_sizes(image), image, 2)[1]
    assert padding.valid.shape == (0, 2, 2, 1)
    assert padding.edge_weight.shape == (0, 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("sync_debug_mode")
def test_the_gpu_is_not_waited_for() -> None:
    image = batch(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    pyramid(find_valid_sizes(image), image, 4)


def test_given_sizes(device: torch.device) -> None:
    image = batch(device)
    given = [[max(1, height), max(1, width)] for height, width in SIZES]
    for sizes in (
        *(given, torch.tensor(given, dtype=torch.int32), torch.tensor(given, device=device)),
        *(list(map(torch.tensor, given)), list(map(torch.Size, given)), np.array(given)),
    ):
        checked = check_valid_sizes(sizes, image)
        assert checked.device == image.device
        assert checked.dtype == torch.int64
        assert checked.tolist() == given


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ([[1, 1]], ValueError, r"must have the shape \(2, 2\), .* got \(1, 2\)"),
        ([3, 4], ValueError, r"must have the shape \(2, 2\), .* got \(2,\)"),
        ([[1.0, 2.0], [1.0, 2.0]], TypeError, "must be integers, got torch.float32"),
        ([[6, 7], [7, 7]], ValueError, r"within 1\.\.6 and 1\.\.7 for images of 6x7, got \[\[6, 7\], \[7, 7\]\]"),
        ([[0, 7], [1, 7]], ValueError, r"within 1\.\.6"),
        ([None, None], TypeError, r"height and width of each image, .*, got \[None, None\]"),
        ("67", TypeError, "height and width of each image, .*, got '67'"),
    ],
)
def test_wrong_sizes(sizes: list, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        check_valid_sizes(sizes, torch.zeros(2, 3, 6, 7))


def test_crop_removes_anything(device: torch.device) -> None:
    image = batch(device)
    filled = image.masked_fill(image == 0, torch.nan)
    assert torch.equal(crop(filled, find_valid_sizes(image)), image)


def test_maps_of_convolutions_of_stride_2(device: torch.device) -> None:
    """What a convolution of stride 2 makes of an image alone has the size that the pyramid tells."""
    for level, padding in enumerate(pyramid(torch.tensor(SIZES, device=device), torch.empty(6, 3, 6, 7), 3), start=1):
        for valid, (height, width) in zip(padding.valid[..., 0], SIZES, strict=True):
            expected = torch.zeros_like(valid)
            expected[: -(-height // 2**level), : -(-width // 2**level)] = 1
            assert torch.equal(valid, expected)


def grid_padding(sizes: list[tuple[int, int]], height: int, width: int, device: torch.device) -> Padding:
    larger = torch.tensor(sizes, device=device) * 4
    return pyramid(larger, torch.empty(len(sizes), 3, 4 * height, 4 * width), 2)[1]


@pytest.mark.parametrize("root", ["first", "last"])
@pytest.mark.parametrize("weights", ["random", "equal", "huge"])
def test_tree_inside_is_that_of_the_picture_alone(device: torch.device, root: str, weights: str) -> None:
    """Same edges, same directions; and all of the padding hangs at the last vertex of the image."""
    height, width = 6, 7
    sizes = [size for size in SIZES if min(size) > 0]
    edges = (height - 1) * width + height * (width - 1)
    weight = {
        "random": torch.rand(len(sizes), edges),
        "equal": torch.ones(len(sizes), edges),
        "huge": torch.full((len(sizes), edges), torch.finfo(torch.float32).max),
    }[weights].to(device)
    padding = grid_padding(sizes, height, width, device)
    last = height * width - 1
    tree = grid_tree(padding.cut(weight), height, width, root=0 if root == "first" else last)
    vertical = weight[:, : (height - 1) * width].view(-1, height - 1, width)
    horizontal = weight[:, (height - 1) * width :].view(-1, height, width - 1)
    vertices = torch.arange(height * width, device=device).view(height, width)
    for index, (h, w) in enumerate(sizes):
        alone = torch.cat([vertical[index, : h - 1, :w].flatten(), horizontal[index, :h, : w - 1].flatten()])
        expected = grid_tree(alone[None], h, w, root=0 if root == "first" else h * w - 1).parent[0]
        inside = vertices[:h, :w].flatten()
        own_root = inside[0 if root == "first" else -1]
        parents = tree.parent[index][inside]
        below_root = inside != own_root
        assert torch.equal(parents[below_root].long(), inside[expected.long()][below_root])
        is_inside = torch.zeros(height * width, dtype=torch.bool, device=device)
        is_inside[inside] = True
        crossing = is_inside != is_inside[tree.parent[index].long()]
        ends = torch.stack([vertices.flatten(), tree.parent[index].long()])[:, crossing]
        assert (ends == inside[-1]).any(0).all()
        assert crossing.any() == (len(inside) < height * width)


def test_cut_changes_nothing_without_padding(device: torch.device) -> None:
    weight = torch.rand(1, 71, device=device) * 100
    assert torch.equal(grid_padding([(6, 7)], 6, 7, device).cut(weight), weight)


def test_clear(device: torch.device) -> None:
    padding = grid_padding(SIZES, 6, 7, device)
    for dtype in (torch.float32, torch.float16):
        x = torch.ones(len(SIZES), 6, 7, 2, device=device, dtype=dtype, requires_grad=True)
        cleared = padding.clear(x)
        assert cleared.dtype == dtype
        assert cleared.sum((1, 2, 3)).tolist() == [2 * height * width for height, width in SIZES]
        (grad,) = torch.autograd.grad(cleared.sum(), x)
        assert torch.equal(grad, cleared)
