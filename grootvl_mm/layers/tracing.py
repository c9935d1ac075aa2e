"""Support for ``torch.jit.trace``."""

import torch
from torch import Tensor


def with_known_size(feature: Tensor) -> tuple[Tensor, int, int]:
    """Return a feature map (B, C, H, W), its height and its width.

    ``torch.jit.trace`` records the sizes that trees depend on as constants. The returned map is split such that the
    traced program raises an error for maps of any other size.
    """
    height, width = feature.shape[2:]
    if torch.jit.is_tracing():
        height, width = int(height), int(width)
        feature = feature.split([height], dim=2)[0].split([width], dim=3)[0]
    return feature, height, width
