"""The GrootV backbone (section 3.3 of the paper)."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from mmengine.model import BaseModule
from torch import Tensor, nn

from grootvl_mm.layers.linear import MLP
from grootvl_mm.models.pretrained import complete_pretraining
from grootvl_mm.models.published_checkpoints import (
    CheckpointError,
    rename_published_backbone,
    rename_published_classifier,
)
from grootvl_mm.models.tree_ssm import TreeSSM
from grootvl_mm.ops import Tree
from grootvl_mm.registry import MODELS

TREE_SHARINGS = ("block", "stage")


class LayerNorm(nn.LayerNorm):
    """Layer norm of the backbone's own layers, over the last axis."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)


class DropPath(nn.Module):
    """Stochastic depth: drops a residual branch of a whole sample and scales what is left."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Any shape (B, ...)."""
        if not self.training or self.drop_prob == 0.0:
            return x
        keep_prob = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep_prob)
        return x * mask.div_(keep_prob)

    def extra_repr(self) -> str:
        """The drop rate."""
        return f"drop_prob={self.drop_prob:.3f}"


class Stem(nn.Module):
    """Two convolutions of stride 2: (B, in_channels, H, W) to (B, H/4, W/4, channels), rounded up."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = LayerNorm(channels // 2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(channels // 2, channels, kernel_size=3, stride=2, padding=1)
        self.norm2 = LayerNorm(channels)

    def forward(self, image: Tensor) -> Tensor:
        """Images NCHW to tokens NHWC."""
        x = self.conv1(image.contiguous(memory_format=torch.channels_last))
        x = self.act(self.norm1(x.permute(0, 2, 3, 1)))
        x = self.conv2(x.permute(0, 3, 1, 2))
        return self.norm2(x.permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """Convolution of stride 2 that doubles the channels: (B, H, W, C) to (B, H/2, W/2, 2 C), rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = LayerNorm(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens NHWC to tokens NHWC."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class Block(nn.Module):
    """``x + DropPath(TreeSSM(LN x))``, then ``x + DropPath(MLP(LN x))``, each branch with an optional layer scale."""

    def __init__(self, channels: int, drop_path: float, layer_scale: float | None, with_cp: bool, **tree: str) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.norm1 = LayerNorm(channels)
        self.mixer = TreeSSM(channels, **tree)
        self.norm2 = LayerNorm(channels)
        self.mlp = MLP(channels)
        self.drop_path = DropPath(drop_path)
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((channels,), float(layer_scale)))
            self.gamma2 = nn.Parameter(torch.full((channels,), float(layer_scale)))

    def forward(self, x: Tensor, tree: Tree | None) -> tuple[Tensor, Tree]:
        """(B, H, W, C) and the trees to scan along, or None; returns both."""
        if self.with_cp and x.requires_grad:
            return torch.utils.checkpoint.checkpoint(self._forward, x, tree, use_reentrant=False)
        return self._forward(x, tree)

    def _forward(self, x: Tensor, tree: Tree | None) -> tuple[Tensor, Tree]:
        mixed, tree = self.mixer(x, tree, self.norm1)
        x = x + self.drop_path(self._scale(mixed, self.gamma1))
        x = x + self.drop_path(self._scale(self.mlp(x, self.norm2), self.gamma2))
        return x, tree

    @staticmethod
    def _scale(branch: Tensor, gamma: Tensor | None) -> Tensor:
        return branch if gamma is None else branch * gamma


class Stage(nn.Module):
    """Blocks at one resolution and a norm, whose output is the stage's feature map, then the way to the next stage."""

    def __init__(
        self,
        channels: int,
        drop_paths: Sequence[float],
        downsample: bool,
        tree_sharing: str,
        **block: Any,
    ) -> None:
        super().__init__()
        self.share_tree = tree_sharing == "stage"
        self.blocks = nn.ModuleList(Block(channels, rate, **block) for rate in drop_paths)
        self.norm = LayerNorm(channels)
        self.downsample = Downsample(channels) if downsample else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) to the feature map of the same shape and the next stage's input."""
        tree = None
        for block in self.blocks:
            x, used_tree = block(x, tree)
            tree = used_tree if self.share_tree else None
        feature = self.norm(x)
        return feature, feature if self.downsample is None else self.downsample(feature)


@MODELS.register_module()
class GrootV(BaseModule):
    """GrootV: a hierarchical backbone whose token mixer scans each image along its minimum spanning trees.

    Only what the outputs need is built: the stages up to the last of ``out_indices``, so that every parameter gets a
    gradient. Published checkpoints load by ``init_cfg=dict(type='Pretrained', checkpoint=FILE)``.

    Args:
        arch: ``pico`` (ours, for demos and tests), ``tiny``, ``small``, ``base``, ``large`` (the authors' name but our
            size, which they do not state), or a dict with ``channels`` of the first stage and ``depths``, the
            numbers of blocks of the stages. Stage i has ``channels * 2**i`` channels.
        in_channels: channels of the images.
        out_indices: stages whose feature maps are returned, ascending; stage i has stride ``4 * 2**i``.
        frozen_stages: the stem and the first so many stages get no gradient and stay in evaluation mode; -1 freezes
            nothing, 0 the stem only.
        norm_eval: keep the norm layers in evaluation mode while training. It matters once batch norm takes the place
            of the layer norm; the backbone itself has layer norms only, which behave the same in both modes.
        with_cp: gradient checkpointing: recompute each block in the backward pass to save memory.
        drop_path_rate: stochastic depth, rising linearly over the blocks from 0 to this.
        layer_scale: initial value of the scale of each residual branch; None for no scale, as published.
        tree_metric: ``cosine``, ``euclidean`` or ``manhattan``.
        tree_root: ``first`` or ``last`` vertex.
        propagation: ``all``, ``up`` or ``down``, see :func:`grootvl_mm.ops.tree_scan`.
        tree_sharing: ``block``: each block has trees of its own. ``stage``: the blocks of a stage share the trees that
            its first block builds from its own SSM input (after in-projection, depth-wise convolution and SiLU). The
            paper does not say which feature builds the shared tree.
        scan: ``tree``, or ``raster`` or ``cross``, with which the paper compares it, see :class:`TreeSSM`.
        init_cfg: mmengine's.

    Raises:
        ValueError, TypeError: an argument that is not one of the above.
    """

    arch_settings = {
        "pico": {"channels": 24, "depths": (1, 1, 2, 1)},
        "tiny": {"channels": 80, "depths": (2, 2, 9, 2)},
        "small": {"channels": 96, "depths": (2, 2, 13, 2)},
        "base": {"channels": 128, "depths": (2, 2, 13, 2)},
        "large": {"channels": 192, "depths": (2, 2, 13, 2)},
    }
    # 1 (and none) are the published names; see models/published_checkpoints.py.
    _version = 2

    def __init__(
        self,
        arch: str | dict = "tiny",
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        drop_path_rate: float = 0.0,
        layer_scale: float | None = None,
        tree_metric: str = "cosine",
        tree_root: str = "first",
        propagation: str = "all",
        tree_sharing: str = "block",
        scan: str = "tree",
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        channels, depths = self._parse_arch(arch)
        self.out_indices = self._parse_out_indices(out_indices, len(depths))
        if not -1 <= frozen_stages <= len(depths):
            raise ValueError(f"frozen_stages must be in -1..{len(depths)}, got {frozen_stages}")
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")
        if tree_sharing not in TREE_SHARINGS:
            raise ValueError(f"tree_sharing must be one of {', '.join(TREE_SHARINGS)}, got {tree_sharing!r}")
        self.channels = channels
        self.depths = depths
        self.num_features = [channels * 2**i for i in range(len(depths))]
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

        self.stem = Stem(in_channels, channels)
        num_blocks = sum(depths)
        drop_paths = [drop_path_rate * block / max(num_blocks - 1, 1) for block in range(num_blocks)]
        last = self.out_indices[-1]
        self.stages = nn.ModuleList(
            Stage(
                self.num_features[i],
                drop_paths[sum(depths[:i]) : sum(depths[: i + 1])],
                downsample=i < last,
                layer_scale=layer_scale,
                with_cp=with_cp,
                tree_metric=tree_metric,
                tree_root=tree_root,
                propagation=propagation,
                tree_sharing=tree_sharing,
                scan=scan,
            )
            for i in range(last + 1)
        )
        self._freeze_stages()

    @classmethod
    def _parse_arch(cls, arch: str | dict) -> tuple[int, tuple[int, ...]]:
        if isinstance(arch, str):
            if arch not in cls.arch_settings:
                raise ValueError(f"arch must be one of {', '.join(cls.arch_settings)} or a dict, got {arch!r}")
            arch = cls.arch_settings[arch]
        if not isinstance(arch, dict) or set(arch) != {"channels", "depths"}:
            raise ValueError(f"arch must be a name or a dict with the keys channels and depths, got {arch!r}")
        channels, depths = arch["channels"], tuple(arch["depths"])
        if channels < 2 or channels % 2 or not depths or min(depths) < 1:
            raise ValueError(f"arch must have an even number of channels and at least one block a stage, got {arch!r}")
        return channels, depths

    @staticmethod
    def _parse_out_indices(out_indices: Sequence[int], num_stages: int) -> tuple[int, ...]:
        indices = (out_indices,) if isinstance(out_indices, int) else tuple(out_indices)
        indices = tuple(index + num_stages if index < 0 else index for index in indices)
        valid = indices and indices == tuple(sorted(set(indices)))
        if not valid or not 0 <= indices[0] <= indices[-1] < num_stages:
            raise ValueError(
                f"out_indices must be ascending stages of 0..{num_stages - 1}, got {tuple(out_indices)}"
                if isinstance(out_indices, Sequence)
                else f"out_indices must be a stage of 0..{num_stages - 1}, got {out_indices}"
            )
        return indices

    def init_weights(self) -> None:
        """Initialize as ``init_cfg`` says; pretrained weights must be complete."""
        with complete_pretraining(self):
            super().init_weights()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of images of any size.

        Args:
            image: (B, in_channels, H, W).

        Returns:
            For each of ``out_indices`` a map (B, channels * 2**i, h, w), h = ceil(H / (4 * 2**i)), contiguous.
        """
        x = self.stem(image)
        outputs = []
        for index, stage in enumerate(self.stages):
            feature, x = stage(x)
            if index in self.out_indices:
                # In plain NCHW memory: mmcv's RoIAlign on the CPU reads any other as if it were that.
                outputs.append(feature.permute(0, 3, 1, 2).contiguous())
        return tuple(outputs)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.stem, *self.stages[: self.frozen_stages]]

    def _freeze_stages(self) -> None:
        for module in self._frozen_modules():
            module.eval()
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> "GrootV":
        """Training mode for all but the frozen parts (and the norms with ``norm_eval``)."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.LayerNorm | nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Layer of a parameter, for layer-wise learning rate decay.

        Layer 0 is the stem, each block one more; a stage's norm and downsampling count to its last block. What is not
        part of the backbone is the last layer.

        Args:
            param_name: name of the parameter.
            prefix: what stands in front of the backbone's own names, for example ``backbone.``.

        Returns:
            The layer and the number of layers.
        """
        num_layers = sum(self.depths) + 2
        if not param_name.startswith(prefix):
            return num_layers - 1, num_layers
        parts = param_name[len(prefix) :].split(".")
        if parts[0] == "stem":
            return 0, num_layers
        if parts[0] != "stages":
            return num_layers - 1, num_layers
        stage = int(parts[1])
        block = int(parts[3]) if parts[2] == "blocks" else self.depths[stage] - 1
        return sum(self.depths[:stage]) + block + 1, num_layers

    @staticmethod
    def _checkpoint_filter(state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Let mmpretrain's ``ImageClassifier``, which calls this before it loads weights, read published files."""
        rename_published_classifier(state_dict, prefix)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        rename_published_backbone(state_dict, prefix)
        self._check_matching_keys(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _check_matching_keys(self, state_dict: dict[str, Any], prefix: str) -> None:
        """A file of another model must not pass for a success just because loading is not strict."""
        own = {prefix + name: tuple(value.shape) for name, value in self.state_dict().items()}
        found = {name: tuple(getattr(value, "shape", ())) for name, value in state_dict.items()}
        matching = sum(found.get(name) == shape for name, shape in own.items())
        if 2 * matching < len(own):
            example = next(name for name, shape in own.items() if found.get(name) != shape)
            near = [example] if example in found else list(found)  # torch gives what begins with the prefix only
            nothing = f"nothing below {prefix!r}" if prefix else "nothing"
            raise CheckpointError(
                f"this checkpoint does not fit {type(self).__name__}: {matching} of {len(own)} parameters match in "
                f"name and shape. Expected for example {example!r} {own[example]}, found "
                f"{', '.join(f'{name!r} {found[name]}' for name in near[:3]) or nothing}. Check the file, the arch "
                "and, when the backbone is part of a larger model, init_cfg's prefix."
            )
