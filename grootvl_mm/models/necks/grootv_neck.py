"""The neck of the published classification models, between the backbone and the linear head."""

from typing import Any

from torch import Tensor, nn

from grootvl_mm.layers.initialization import InitializedModule
from grootvl_mm.models.pretrained import complete_pretraining
from grootvl_mm.models.published_checkpoints import rename_published_neck
from grootvl_mm.registry import MODELS


@MODELS.register_module()
class GrootVNeck(InitializedModule):
    """1x1 convolution, batch norm, GELU and global average pooling.

    Args:
        in_channels: channels of the last stage, 8 times the ``channels`` of the backbone.
        out_channels: input channels of the head; 12 times the ``channels`` of the backbone in the published models.
        init_cfg: initialization config of mmengine; ``dict(type='Pretrained', checkpoint=...)`` also loads published
            checkpoints.
    """

    _version = 2

    def __init__(self, in_channels: int, out_channels: int, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = nn.GELU()
        self.pool = nn.AdaptiveAvgPool2d(1)

    def init_weights(self) -> None:
        """Initialize the weights by ``init_cfg``; pretrained weights must be complete."""
        with complete_pretraining(self):
            super().init_weights()

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor]:
        """The last feature map (B, in_channels, H, W) to a tuple of one tensor (B, out_channels)."""
        feature = inputs if isinstance(inputs, Tensor) else inputs[-1]
        return (self.pool(self.act(self.norm(self.conv(feature)))).flatten(1),)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        rename_published_neck(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
