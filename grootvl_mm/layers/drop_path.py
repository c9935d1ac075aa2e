"""Stochastic depth."""

from torch import Tensor, nn

from grootvl_mm.layers.untouched import called_directly


@called_directly
class DropPath(nn.Module):
    """Stochastic depth: in training, drops the residual branch of random samples and rescales the others.

    Args:
        drop_prob: probability of dropping a sample's branch, in [0, 1).
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) to the same shape."""
        if not self.training or self.drop_prob == 0.0:
            return x
        keep_prob = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep_prob)
        return x * mask.div_(keep_prob)

    def extra_repr(self) -> str:
        """The drop probability, for ``repr``."""
        return f"drop_prob={self.drop_prob:.3f}"
