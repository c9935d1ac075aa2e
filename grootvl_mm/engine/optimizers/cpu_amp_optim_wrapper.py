"""Automatic mixed precision (AMP) on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from torch import nn

from grootvl_mm.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Mixed precision on the CPU: bfloat16 autocast without loss scaling.

    mmengine's ``AmpOptimWrapper`` requires an accelerator. In a detector, only the backbone and the neck run in
    bfloat16: mmcv's RoIAlign and NMS have no bfloat16 kernels on the CPU, and its 8-bit significand is too coarse for
    pixel coordinates.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run the forward pass of ``model`` in mixed precision."""
        inner = model.module if is_model_wrapper(model) else model
        is_detector = hasattr(inner, "with_bbox")
        with super().optim_context(model), _autocast_features(inner) if is_detector else _autocast():
            yield


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@contextmanager
def _autocast_features(detector: nn.Module) -> Iterator[None]:
    """Within the block, ``detector.extract_feat`` computes under autocast and returns float32."""
    extract_feat = detector.extract_feat

    def in_bfloat16(batch_inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with _autocast():
            return tuple(feature.float() for feature in extract_feat(batch_inputs))

    detector.extract_feat = in_bfloat16
    try:
        yield
    finally:
        del detector.extract_feat
