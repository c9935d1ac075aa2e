"""Pictures that are smaller than their batch: where they are, and what keeps padding out of them.

A batch of pictures of different sizes is filled up to the right and below. A constant region is the cheapest of all for a
minimum spanning tree, which joins it first and then runs through it. What a picture yields depends on its batch mates
then, unless

- what a convolution reads at padding is zero, as at the border of a picture without padding;
- edges that touch padding weigh more than any other, so that the tree inside a picture is that of the picture alone;
- what is scanned is zero at padding, which hangs on that tree as a branch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Weights of edges; float32 ends at 3.4e38.
INSIDE_MAX, PADDING_WEIGHT, BORDER_WEIGHT = 1e38, 2e38, 3e38


class Padding(NamedTuple):
    """The padding of a batch of maps of one size.

    Attributes:
        valid: (B, H, W, 1), 1 where the picture is and 0 at its padding.
        edge_weight: (B, E) float32, what the edges of the grid weigh at least: -inf inside of the picture.
    """

    valid: Tensor
    edge_weight: Tensor

    def clear(self, x: Tensor) -> Tensor:
        """(B, H, W, *) with zeros at the padding."""
        return torch.mul(x, self.valid.to(x.dtype))

    def cut(self, edge_weight: Tensor) -> Tensor:
        """(B, E) weights whose minimum spanning trees join padding last, at the last vertex of the picture.

        It hangs there whatever the root: where the root is at padding, paths inside the picture lead to its own last
        vertex.
        """
        return torch.maximum(edge_weight.clamp(max=INSIDE_MAX), self.edge_weight)


def find_valid_sizes(image: Tensor) -> Tensor:
    """Heights and widths of pictures without their zero margins to the right and below.

    Args:
        image: (B, C, H, W).

    Returns:
        (B, 2) int64 on the image's device, which is not waited for. A picture of nothing but zeros has the size 0.
    """
    filled = (image != 0).any(dim=1)
    return torch.stack([_length(filled.any(dim=2)), _length(filled.any(dim=1))], dim=1)


def check_valid_sizes(valid_sizes: Tensor | Sequence[Sequence[int]], image: Tensor) -> Tensor:
    """The sizes of pictures as a tensor.

    Args:
        valid_sizes: height and width of each picture, without padding.
        image: (B, C, H, W), the batch.

    Returns:
        (B, 2) int64 on the image's device.

    Raises:
        TypeError: the sizes are no integers.
        ValueError: not two numbers for each picture, or a size outside of 1..H and 1..W (not looked at on a GPU, where
            that would stall).
    """
    sizes = torch.as_tensor(valid_sizes)
    if sizes.is_floating_point() or sizes.is_complex() or sizes.dtype == torch.bool:
        raise TypeError(f"valid_sizes must be integers, got {sizes.dtype}")
    batch, _, height, width = image.shape
    if sizes.shape != (batch, 2):
        raise ValueError(
            f"valid_sizes must have the shape {(batch, 2)}, height and width of each picture, got {tuple(sizes.shape)}"
        )
    if sizes.device.type == "cpu" and not torch.compiler.is_compiling():
        largest = torch.tensor([height, width])
        if not bool(((sizes >= 1) & (sizes <= largest)).all()):
            raise ValueError(
                f"valid_sizes must be in 1..{height} and 1..{width} for images of {height}x{width}, "
                f"got {sizes.tolist()}"
            )
    return sizes.to(image.device, torch.int64, non_blocking=True)


def halve(valid_sizes: Tensor) -> Tensor:
    """Sizes after a convolution of stride 2, rounded up."""
    return (valid_sizes + 1) // 2


def padding_of(valid_sizes: Tensor, height: int, width: int) -> Padding:
    """The padding of maps of ``height`` x ``width`` whose pictures have the sizes (B, 2)."""
    rows, columns = (torch.arange(length, device=valid_sizes.device) for length in (height, width))
    last_row, last_column = (size.unsqueeze(1) - 1 for size in valid_sizes.unbind(1))
    valid = (rows <= last_row).unsqueeze(2) & (columns <= last_column).unsqueeze(1)
    corner = (rows == last_row).unsqueeze(2) & (columns == last_column).unsqueeze(1)
    weights = []
    for first, second in ((valid[:, :-1], valid[:, 1:]), (valid[:, :, :-1], valid[:, :, 1:])):
        at_corner = corner[:, : first.shape[1], : first.shape[2]]
        border = torch.where(at_corner, PADDING_WEIGHT, BORDER_WEIGHT)
        outside = torch.where(first, border, PADDING_WEIGHT)
        weights.append(torch.where(second, -torch.inf, outside).flatten(1))
    return Padding(valid.unsqueeze(3).float(), torch.cat(weights, dim=1))


def _length(filled: Tensor) -> Tensor:
    """One more than the last index of True in each row of (B, N); 0 without any."""
    return (filled * torch.arange(1, filled.shape[1] + 1, device=filled.device)).amax(dim=1)
