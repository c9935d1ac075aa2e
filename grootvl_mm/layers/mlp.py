"""The MLP of a block."""

from torch import Tensor, nn

from grootvl_mm.layers.initialization import linear_layer


class MLP(nn.Module):
    """Two linear layers with the exact GELU between, over the last axis.

    Args:
        channels: C, channels of input and output.
        ratio: how many times as many the hidden layer has.
    """

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = linear_layer(channels, ratio * channels)
        self.act = nn.GELU()
        self.fc2 = linear_layer(ratio * channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        self.fc1.reset_parameters()
        self.fc2.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return self.fc2(self.act(self.fc1(x)))
