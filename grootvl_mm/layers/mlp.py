"""The MLP of a block."""

from torch import Tensor, nn

from grootvl_mm.layers.calls import call_module
from grootvl_mm.layers.initialization import linear_layer
from grootvl_mm.layers.mlp_in_pieces import mlp_in_pieces
from grootvl_mm.layers.untouched import called_directly


@called_directly
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
        if y is not None:
            return y
        return call_module(self.fc2, call_module(self.act, call_module(self.fc1, x)))
