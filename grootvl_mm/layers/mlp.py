"""The MLP of a block."""

from torch import Tensor, nn

from grootvl_mm.layers.initialization import linear_layer
from grootvl_mm.layers.mlp_in_pieces import mlp_in_pieces


class MLP(nn.Module):
    """Two linear layers over the last axis, with the exact GELU between them.

    Args:
        channels: C, channels of input and output.
        ratio: ratio of the hidden layer's channels to C.
    """

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = linear_layer(channels, ratio * channels)
        self.act = nn.GELU()
        self.fc2 = linear_layer(ratio * channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the weights."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        y = mlp_in_pieces(x, self.fc1, self.act, self.fc2)
        return self.fc2(self.act(self.fc1(x))) if y is None else y
