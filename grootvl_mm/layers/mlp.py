"""The MLP of a block."""

from torch import Tensor, nn

from grootvl_mm.layers.initialization import init_linear


class MLP(nn.Module):
    """Two linear layers with the exact GELU between, over the last axis.

    Args:
        channels: C, channels of input and output.
        ratio: how many times as many the hidden layer has.
    """

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, ratio * channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(ratio * channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        init_linear(self.fc1)
        init_linear(self.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return self.fc2(self.act(self.fc1(x)))
