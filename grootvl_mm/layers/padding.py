"""Pictures that are smaller than their batch: where they are, and what keeps their padding out of them.

A batch of pictures of different sizes is filled up with zeros to the right and below. A constant region is the cheapest
of all for a minimum spanning tree, which joins it first and then runs through it, so that what a picture yields depends
on its batch mates. It does not if

- what a convolution reads at padding is zero, as at the border of a picture without padding;
- edges that touch padding weigh more than any other, so that the tree inside a picture is that of the picture alone;
- what is scanned is zero at padding, which hangs on that tree as a branch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grootvl_mm.ops._compat import is_eager

# Weights of edges inside of pictures, of those at padding, and of those that must not be taken. float32 ends at 3.4e38.
LARGEST_WEIGHT, PADDING_WEIGHT, BORDER_WEIGHT = 1e38, 2e38, 3e38


class Padding(NamedTuple):
    """The padding of a batch of maps.

    Attributes:
        valid: (B, H, W, 1) float32, 1 where the picture is and 0 at its padding.
        edge_weight: (B, E) float32, what the edges of the grid weigh at least: -inf inside of the picture.
    """

    valid: Tensor
    edge_weight: Tensor

    def clear(self, x: Tensor) -> Tensor:
        """(B, H, W, *) with zeros at the padding, by a product, which takes a seventh of the time of a choice."""
        return torch.mul(x, self.valid.to(x.dtype))

    def cut(self, edge_weight: Tensor) -> Tensor:
        """(B, E) weights with which minimum spanning trees join all padding last, at the last vertex of the picture.

        Wherever the root is, the tree of a picture is that of the picture alone: if the root is the last vertex of the
        map, which may be at padding, the way there begins at the last vertex of the picture.
        """
        return torch.maximum(edge_weight.clamp(max=LARGEST_WEIGHT), self.edge_weight)


def find_valid_sizes(image: Tensor) -> Tensor:
    """Heights and widths of pictures without their zero margins to the right and below.

    Args:
        image: (B, C, H, W).

    Returns:
        (B, 2) int64 on the image's device, which is not waited for. A picture of nothing but zeros has the size 0.
    """
    largest = image.abs().amax(dim=1)
    return torch.stack([_length(largest.amax(dim=2)), _length(largest.amax(dim=1))], dim=1)


def check_valid_sizes(valid_sizes: Tensor | Sequence[Sequence[int]], image: Tensor) -> Tensor:
    """The sizes of pictures as a tensor.

    Args:
        valid_sizes: height and width of each picture, without padding.
        image: (B, C, H, W), the batch.

    Returns:
        (B, 2) int64 on the image's device.

    Raises:
        TypeError: the sizes are no integers.
        ValueError: not two numbers for each picture, or a size outside of 1..H and 1..W (not looked at on a GPU, which
            would have to be waited for).
    """
    sizes = torch.as_tensor(valid_sizes)
    if sizes.is_floating_point() or sizes.is_complex() or sizes.dtype == torch.bool:
        raise TypeError(f"valid_sizes must be integers, got {sizes.dtype}")
    batch, _, height, width = image.shape
    if sizes.shape != (batch, 2):
        raise ValueError(
            f"valid_sizes must have the shape {(batch, 2)}, height and width of each picture, got {tuple(sizes.shape)}"
        )
    if sizes.device.type == "cpu" and is_eager(sizes):
        inside = (sizes >= 1) & (sizes <= torch.tensor([height, width]))
        if not inside.all():
            raise ValueError(
                f"valid_sizes must be within 1..{height} and 1..{width} for images of {height}x{width}, "
                f"got {sizes.tolist()}"
            )
    return sizes.to(image.device, torch.int64, non_blocking=True)


def crop(image: Tensor, valid_sizes: Tensor) -> Tensor:
    """(B, C, H, W) with zeros outside of the sizes (B, 2), whatever was there."""
    valid = _region(valid_sizes, *image.shape[2:])
    return torch.where(valid.unsqueeze(1), image, 0)


def pyramid(valid_sizes: Tensor, image: Tensor, levels: int) -> list[Padding]:
    """The padding of maps of half the images' size, of a quarter and so on, as convolutions of stride 2 make them.

    Args:
        valid_sizes: (B, 2), heights and widths of the pictures.
        image: (B, C, H, W), the batch; its shape is all that counts.
        levels: number of maps. The first is that of the stem, along which no tree runs: its edges have no weights.
    """
    paddings = []
    height, width = image.shape[2:]
    for level in range(levels):
        # In the form that symbolic shapes of convolutions have.
        valid_sizes, height, width = ((size - 1) // 2 + 1 for size in (valid_sizes, height, width))
        valid = _region(valid_sizes, height, width)
        edge_weight = _edge_weight(valid, valid_sizes, height, width) if level else valid.new_empty(0)
        paddings.append(Padding(valid.unsqueeze(3).float(), edge_weight))
    return paddings


def _edge_weight(valid: Tensor, sizes: Tensor, height: int, width: int) -> Tensor:
    """The least weights (B, E) of the edges of maps of pictures of the sizes (B, 2), which are where ``valid`` says.

    Of the edges between picture and padding, only those at the last vertex of the picture may be taken.
    """
    above = torch.arange((height - 1) * width, device=sizes.device)
    left = torch.arange(height * (width - 1), device=sizes.device)
    left = left + left // max(width - 1, 1)
    first, second = torch.cat([above, left]), torch.cat([above + width, left + 1])
    last = (sizes[:, :1] - 1) * width + sizes[:, 1:] - 1
    valid = valid.flatten(1)
    outside = torch.where(valid.index_select(1, first) & (first != last), BORDER_WEIGHT, PADDING_WEIGHT)
    return torch.where(valid.index_select(1, second), -torch.inf, outside)


def _region(sizes: Tensor, height: int, width: int) -> Tensor:
    """(B, H, W), whether a vertex is within the sizes (B, 2)."""
    rows, columns = (torch.arange(length, device=sizes.device) for length in (height, width))
    heights, widths = sizes.unsqueeze(2).unbind(1)
    return (rows < heights).unsqueeze(2) & (columns < widths).unsqueeze(1)


def _length(largest: Tensor) -> Tensor:
    """One more than the last index of what is not 0 in each row of (B, N); 0 without any."""
    return ((largest != 0) * torch.arange(1, largest.shape[1] + 1, device=largest.device)).amax(dim=1)
