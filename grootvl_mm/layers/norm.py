"""Norm layers."""

from torch import Tensor, nn


class LayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of a map, (B, C, H, W) to the same, of which channels-last is the fast kind."""

    def forward(self, x: Tensor) -> Tensor:
        """Any memory format; the result is a view in channels-last order."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
