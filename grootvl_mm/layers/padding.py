"""Padded batches: keep padding from influencing the features of an image.

Images of different sizes are batched by zero padding on the right and at the bottom. Edges inside such a constant
region have the lowest weights, so the minimum spanning tree joins the padding first and then runs through it: the
features of an image depend on the sizes of the other images in its batch. They do not if

- convolutions read zeros at padded positions, like outside the border of an unpadded image;
- edges to padded positions weigh more than all others, so that the tree inside the image is that of the image alone;
- the scan's input is zero at padded positions, which form a separate branch of the tree.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grootvl_mm.layers.calls import call_own
from grootvl_mm.ops._compat import is_eager

# Largest weight inside an image, weight of padding edges, weight of forbidden edges (float32 ends at 3.4e38).
LARGEST_WEIGHT, PADDING_WEIGHT, BORDER_WEIGHT = 1e38, 2e38, 3e38


class Padding(NamedTuple):
    """The padding of a batch of feature maps.

    Attributes:
        valid: (B, H, W, 1) float32, 1 inside the image and 0 at padded positions.
        edge_weight: (B, E) float32, lower bounds of the edge weights: -inf inside the image.
    """

    valid: Tensor
    edge_weight: Tensor

    def clear(self, x: Tensor) -> Tensor:
        """Zero the padded positions of (B, H, W, *); a product is seven times faster than ``torch.where``."""
        return call_own(masked, x, self.valid.to(x.dtype))

    def cut(self, edge_weight: Tensor) -> Tensor:
        """Adjust edge weights (B, E): the minimum spanning tree joins the padding last, at the image's last vertex.

        The tree inside the image is then that of the image alone, for either root: if the root is the last vertex of
        the map and that is padded, the path to it starts at the last vertex of the image.
        """
        return torch.maximum(edge_weight.clamp(max=LARGEST_WEIGHT), self.edge_weight)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x * mask``; a block recomputes the result for the backward pass."""
    return x * mask


def find_valid_sizes(image: Tensor) -> Tensor:
    """Sizes of images without their zero margins on the right and at the bottom.

    Args:
        image: (B, C, H, W).

    Returns:
        (B, 2) int64, heights and widths, computed without synchronization; 0 for a blank image.
    """
    largest = image.abs().amax(dim=1)
    return torch.stack([_length(largest.amax(dim=2)), _length(largest.amax(dim=1))], dim=1)


def check_valid_sizes(valid_sizes: Tensor | Sequence[Sequence[int]], image: Tensor) -> Tensor:
    """Check the sizes of images and convert them to a tensor.

    Args:
        valid_sizes: height and width of each image without padding.
        image: (B, C, H, W), the batch.

    Returns:
        (B, 2) int64 on the image's device.

    Raises:
        TypeError: the sizes are not rows of integers.
        ValueError: not two numbers per image, or a size outside 1..H or 1..W (not checked on a GPU, which would need a
            synchronization).
    """
    sizes = _as_tensor(valid_sizes)
    if sizes.is_floating_point() or sizes.is_complex() or sizes.dtype == torch.bool:
        raise TypeError(f"valid_sizes must be integers, got {sizes.dtype}")
    batch, _, height, width = image.shape
    if sizes.shape != (batch, 2):
        raise ValueError(
            f"valid_sizes must have the shape {(batch, 2)}, height and width of each image, got {tuple(sizes.shape)}"
        )
    if sizes.device.type == "cpu" and is_eager(sizes):
        inside = (sizes >= 1) & (sizes <= torch.tensor([height, width], device="cpu"))
        if not inside.all():
            raise ValueError(
                f"valid_sizes must be within 1..{height} and 1..{width} for images of {height}x{width}, "
                f"got {sizes.tolist()}"
            )
    return sizes.to(image.device, torch.int64, non_blocking=True)


def _as_tensor(valid_sizes: Tensor | Sequence[Sequence[int]]) -> Tensor:
    try:
        if isinstance(valid_sizes, Sequence) and valid_sizes and all(isinstance(size, Tensor) for size in valid_sizes):
            return torch.stack(list(valid_sizes))
        # Not on the default device: values on a GPU are not checked.
        return valid_sizes if isinstance(valid_sizes, Tensor) else torch.as_tensor(valid_sizes, device="cpu")
    except (RuntimeError, TypeError, ValueError) as error:
        came = repr(valid_sizes)
        raise TypeError(
            "valid_sizes must be height and width of each image, as a tensor or rows of integers, got "
            f"{came if len(came) < 200 else type(valid_sizes).__name__}"
        ) from error


def is_unpadded(valid_sizes: Tensor, image: Tensor) -> bool:
    """Whether no image is padded; checked only on the CPU, where this needs no synchronization."""
    if image.device.type != "cpu" or not is_eager(image):
        return False
    height, width = image.shape[2:]
    return all(size == [height, width] for size in valid_sizes.tolist())


def crop(image: Tensor, valid_sizes: Tensor) -> Tensor:
    """Zero images (B, C, H, W) outside the given sizes (B, 2)."""
    valid = _region(valid_sizes, *image.shape[2:])
    return image.masked_fill(~valid.unsqueeze(1), 0)


def pyramid(valid_sizes: Tensor, image: Tensor, levels: int) -> list[Padding]:
    """The padding of the feature maps at strides 2, 4, 8, ..., as convolutions of stride 2 produce them.

    Args:
        valid_sizes: (B, 2), heights and widths of the images.
        image: (B, C, H, W), the batch; only its shape is used.
        levels: number of maps. The first map is inside the stem, which builds no tree, and gets no edge weights.
    """
    paddings = []
    height, width = image.shape[2:]
    for level in range(levels):
        # The same formula as in convolutions, so that symbolic shapes are equal.
        valid_sizes, height, width = ((size - 1) // 2 + 1 for size in (valid_sizes, height, width))
        paddings.append(map_padding(valid_sizes, height, width, has_tree=level > 0))
    return paddings


def map_padding(sizes: Tensor, height: int, width: int, has_tree: bool = True) -> Padding:
    """The padding of one feature map.

    Of the edges between image and padding, only those at the image's last vertex may be in the tree.

    Args:
        sizes: (B, 2), heights and widths of the images on this map.
        height: height of the map.
        width: width of the map.
        has_tree: whether trees are built on the map; if not, ``edge_weight`` is empty.
    """
    valid = _region(sizes, height, width)
    padding = Padding(valid.unsqueeze(3).float(), valid.new_empty(0))
    if not has_tree:
        return padding
    above = torch.arange((height - 1) * width, device=sizes.device)
    left = torch.arange(height * (width - 1), device=sizes.device)
    left = left + left // max(width - 1, 1)
    first, second = torch.cat([above, left]), torch.cat([above + width, left + 1])
    last = (sizes[:, :1] - 1) * width + sizes[:, 1:] - 1
    valid = valid.flatten(1)
    border = valid.index_select(1, first) & (first != last)
    # Not torch.where, which copies the numbers to the device and synchronizes.
    weight = torch.full_like(border, PADDING_WEIGHT, dtype=torch.float32).masked_fill(border, BORDER_WEIGHT)
    return Padding(padding.valid, weight.masked_fill(valid.index_select(1, second), -torch.inf))


def _region(sizes: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W) bool, whether a vertex is inside the sizes (B, 2)."""
    rows, columns = (torch.arange(length, device=sizes.device) for length in (height, width))
    heights, widths = sizes.unsqueeze(2).unbind(1)
    return (rows < heights).unsqueeze(2) & (columns < widths).unsqueeze(1)


def _length(largest: Tensor) -> Tensor:
    """One plus the index of the last nonzero value in each row of (B, N); 0 if there is none."""
    return ((largest != 0) * torch.arange(1, largest.shape[1] + 1, device=largest.device)).amax(dim=1)
