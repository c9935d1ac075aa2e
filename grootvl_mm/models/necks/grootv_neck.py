"""What stands between the backbone and the linear classifier in the published classification model."""

from typing import Any

from torch import Tensor, nn

from grootvl_mm.layers.initialization import InitializedModule
from grootvl_mm.models.published_checkpoints import rename_published_neck
from grootvl_mm.registry import MODELS


@MODELS.register_module()
class GrootVNeck(InitializedModule):
    """Convolution 1x1, batch norm, GELU and global average pooling.

    Args:
        in_channels: channels of the last stage, 8 times the backbone's ``channels``.
        out_channels: channels for the classifier, 12 times the backbone's ``channels`` as published.
        init_cfg: mmengine's; ``dict(type='Pretrained', checkpoint=...)`` also reads published checkpoints.
    """

    _version = 2

    def __init__(self, in_channels: int, out_channels: int, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = nn.GELU()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor]:
        """The last of the feature maps, (B, in_channels, H, W), to one (B, out_channels)."""
        feature = inputs if isinstance(inputs, Tensor) else inputs[-1]
        return (self.pool(self.act(self.norm(self.conv(feature)))).flatten(1),)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        rename_published_neck(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
