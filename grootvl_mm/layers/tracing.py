"""What ``torch.jit.trace`` cannot record."""

import torch
from torch import Tensor


def with_known_size(feature: Tensor) -> tuple[Tensor, int, int]:
    """A map (B, C, H, W), its height and its width.

    ``torch.jit.trace`` turns sizes that trees depend on into constants. The map that is returned is cut in a way that
    fails, in the recorded program, for maps of any other size.
    """
    height, width = feature.shape[2:]
    if torch.jit.is_tracing():
        height, width = int(height), int(width)
        feature = feature.split([height], dim=2)[0].split([width], dim=3)[0]
    return feature, height, width
