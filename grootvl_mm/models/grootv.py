"""The GrootV backbone (section 3.3 of the paper)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from grootvl_mm.layers.calls import call_module
from grootvl_mm.layers.drop_path import DropPath
from grootvl_mm.layers.initialization import InitializedModule
from grootvl_mm.layers.mlp import MLP
from grootvl_mm.layers.norm import LayerNorm2d, add_norm
from grootvl_mm.layers.padding import Padding, check_valid_sizes, crop, find_valid_sizes, is_unpadded, pyramid
from grootvl_mm.layers.recompute import fast, lean, narrow
from grootvl_mm.models.pretrained import complete_pretraining
from grootvl_mm.models.published_checkpoints import (
    CheckpointError,
    rename_published_backbone,
    rename_published_classifier,
)
from grootvl_mm.models.tree_ssm import TreeSSM
from grootvl_mm.ops import Tree
from grootvl_mm.ops._compat import is_transformed
from grootvl_mm.registry import MODELS

TREE_SHARINGS = ("block", "stage")
# Leaf functions for torch.fx tracing, such as in torchvision's create_feature_extractor.
torch.fx.wrap("find_valid_sizes")
torch.fx.wrap("pyramid")


layer_norm = partial(nn.LayerNorm, eps=1e-6)


class Stem(nn.Module):
    """Two convolutions of stride 2: (B, in_channels, H, W) to (B, H/4, W/4, channels), sizes rounded up."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = layer_norm(channels // 2)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(channels // 2, channels, kernel_size=3, stride=2, padding=1)
        self.norm2 = layer_norm(channels)

    def forward(self, image: Tensor, padding: Padding | None = None) -> Tensor:
        """Images NCHW to tokens NHWC; the padding to ignore is that of the map between the convolutions."""
        if not is_transformed():  # vmap does not support memory formats
            image = image.contiguous(memory_format=torch.channels_last)
        x = self.conv1(image)
        with narrow(x):
            x = self.act(self.norm1(x.permute(0, 2, 3, 1)))
        if padding is not None:
            x = padding.clear(x)
        x = self.conv2(x.permute(0, 3, 1, 2))
        return self.norm2(x.permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """Convolution of stride 2 that doubles the channels: (B, C, H, W) to (B, H/2, W/2, 2 C), sizes rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, kernel_size=3, stride=2, padding=1, bias=False)
        self.norm = layer_norm(2 * channels)

    def forward(self, x: Tensor) -> Tensor:
        """NCHW feature map to NHWC tokens."""
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class Block(nn.Module):
    """``x + DropPath(TreeSSM(LN x))``, then ``x + DropPath(MLP(LN x))``, each branch with an optional layer scale.

    The options are those of :class:`GrootV` and :class:`TreeSSM`.
    """

    def __init__(
        self,
        channels: int,
        drop_path: float = 0.0,
        layer_scale: float | None = None,
        with_cp: bool = False,
        tree_metric: str = "cosine",
        tree_root: str = "first",
        propagation: str = "all",
        scan: str = "tree",
        scan_seed: int = 0,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.layer_scale = layer_scale
        self.norm1 = layer_norm(channels)
        self.mixer = TreeSSM(channels, tree_metric, tree_root, propagation, scan, scan_seed)
        self.norm2 = layer_norm(channels)
        self.mlp = MLP(channels)
        self.drop_path = DropPath(drop_path)
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.empty(channels))
            self.gamma2 = nn.Parameter(torch.empty(channels))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize the layer scale."""
        for gamma in (self.gamma1, self.gamma2):
            if gamma is not None:
                nn.init.constant_(gamma, self.layer_scale)

    def forward(self, x: Tensor, tree: Tree | None = None, padding: Padding | None = None) -> tuple[Tensor, Tree]:
        """(B, H, W, C), the trees to scan along, or None, and the padding to ignore; returns tokens and trees."""
        # A symbolic trace has no tensors.
        if self.with_cp and isinstance(x, Tensor) and x.requires_grad:
            return torch.utils.checkpoint.checkpoint(self._forward, x, tree, padding, use_reentrant=False)
        return self._forward(x, tree, padding)

    def _forward(self, x: Tensor, tree: Tree | None, padding: Padding | None) -> tuple[Tensor, Tree]:
        with lean(x, self):
            # By name: tools that hook modules expect nothing but tensors among the positional arguments.
            mixed, tree = self.mixer(call_module(self.norm1, x), tree=tree, padding=padding)
            x, normed = add_norm(x, self.drop_path(_scale(mixed, self.gamma1)), self.norm2)
            x = x + self.drop_path(_scale(self.mlp(normed), self.gamma2))
        return x, tree


def _scale(branch: Tensor, gamma: Tensor | None) -> Tensor:
    return branch if gamma is None else branch * gamma


class Stage(nn.Module):
    """Blocks at one resolution, a norm, whose output is the feature map of the stage, and the downsampling."""

    def __init__(self, blocks: Sequence[Block], channels: int, downsample: bool, share_tree: bool) -> None:
        super().__init__()
        self.share_tree = share_tree
        self.blocks = nn.ModuleList(blocks)
        # Grad-CAM tools hook the last norm layer and expect a map (B, C, H, W) there.
        self.norm = LayerNorm2d(channels, eps=1e-6)
        self.downsample = Downsample(channels) if downsample else None

    def forward(self, x: Tensor, padding: Padding | None = None) -> tuple[Tensor, Tensor]:
        """(B, H, W, C) to the feature map (B, C, H, W), zero at ignored padding, and the input of the next stage."""
        tree = None
        for block in self.blocks:
            x, used_tree = block(x, tree, padding)
            tree = used_tree if self.share_tree else None
        with fast(x):
            feature = self.norm(x.permute(0, 3, 1, 2))
            if padding is not None:
                feature = padding.clear(feature.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
            return feature, feature if self.downsample is None else self.downsample(feature)


@MODELS.register_module()
class GrootV(InitializedModule):
    """GrootV: hierarchical backbone with selective scans along minimum spanning trees of its feature maps.

    Stages after the last of ``out_indices`` are not built, so that every parameter gets a gradient. Load published
    checkpoints with ``init_cfg=dict(type='Pretrained', checkpoint=FILE)``.

    Args:
        arch: ``pico`` (ours, for demos and tests), ``tiny``, ``small``, ``base``, ``large`` (named by the authors, who
            do not state its size; the size is ours), or a dict with ``channels``, those of the first stage, and
            ``depths``, the number of blocks in each stage. Stage i has ``channels * 2**i`` channels.
        in_channels: channels of the images.
        out_indices: indices of the stages whose feature maps are returned, ascending; stage i has stride ``4 * 2**i``.
        frozen_stages: number of stages that are frozen together with the stem: no gradients, evaluation mode; 0 freezes
            only the stem, -1 nothing.
        norm_eval: accepted for compatibility with other backbones; no effect, since layer norms have no running
            statistics.
        with_cp: activation checkpointing: recompute each block in the backward pass to save memory.
        drop_path_rate: stochastic depth rate of the last block; rates rise linearly from 0 at the first block.
        layer_scale: initial value of the layer scale of each residual branch; None for no layer scale, as published.
        tree_metric: dissimilarity that defines the trees, ``cosine``, ``euclidean`` or ``manhattan``.
        tree_root: the root of the trees, the ``first`` or ``last`` vertex.
        propagation: ``all``, ``up`` or ``down``, see :func:`grootvl_mm.ops.tree_scan`.
        tree_sharing: ``block``: each block builds its own trees. ``stage``: the blocks of a stage share the trees that
            its first block builds from its own SSM input (after in-projection, depth-wise convolution and SiLU). The
            paper does not specify the features of the shared tree.
        scan: ``tree``; ``raster`` or ``cross``, the baselines of the paper; ``random`` or ``maximum``, other spanning
            trees for ablations. See :class:`TreeSSM`.
        ignore_padding: make features independent of the zero padding to the right of and below each image in a batch,
            see :mod:`grootvl_mm.layers.padding`. Image sizes are inferred from zero margins unless they are passed to
            ``forward``. Feature maps are zero at padded positions.
        init_cfg: initialization config of mmengine.

    Raises:
        ValueError, TypeError: an argument is invalid.
    """

    arch_settings = {
        "pico": {"channels": 24, "depths": (1, 1, 2, 1)},
        "tiny": {"channels": 80, "depths": (2, 2, 9, 2)},
        "small": {"channels": 96, "depths": (2, 2, 13, 2)},
        "base": {"channels": 128, "depths": (2, 2, 13, 2)},
        "large": {"channels": 192, "depths": (2, 2, 13, 2)},
    }
    num_extra_tokens = 0  # class tokens, for mmpretrain's tools
    # Version 1 and files without a version have the published names, see published_checkpoints.py.
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
        ignore_padding: bool = False,
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
        self.ignore_padding = ignore_padding
        self._loads_published = False

        self.stem = Stem(in_channels, channels)
        num_blocks = sum(depths)
        drop_paths = [drop_path_rate * block / max(num_blocks - 1, 1) for block in range(num_blocks)]
        options = (layer_scale, with_cp, tree_metric, tree_root, propagation, scan)
        last = self.out_indices[-1]
        self.stages = nn.ModuleList()
        for i, width in enumerate(self.num_features[: last + 1]):
            first = sum(depths[:i])
            numbers = range(first, first + depths[i])
            blocks = [Block(width, drop_paths[number], *options, scan_seed=number) for number in numbers]
            self.stages.append(Stage(blocks, width, downsample=i < last, share_tree=tree_sharing == "stage"))
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
            raise ValueError(
                f"arch must have an even number of channels and at least one block per stage, got {arch!r}"
            )
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
        """Initialize the weights by ``init_cfg``; pretrained weights must be complete."""
        with complete_pretraining(self):
            super().init_weights()

    def forward(self, image: Tensor, valid_sizes: Tensor | Sequence[Sequence[int]] | None = None) -> tuple[Tensor, ...]:
        """Compute the feature maps of images of any size.

        Args:
            image: (B, in_channels, H, W).
            valid_sizes: (B, 2), height and width of each image without the padding to its right and below; if given,
                padding is ignored. By default, with ``ignore_padding``, the sizes without zero margins.

        Returns:
            A contiguous feature map (B, channels * 2**i, h, w) for each i in ``out_indices``, with
            h = ceil(H / (4 * 2**i)) and w likewise.

        Raises:
            TypeError, ValueError: ``valid_sizes`` are not valid sizes for the batch.
        """
        if isinstance(valid_sizes, torch.fx.Proxy):  # placeholder for the default in torch.fx tracing
            valid_sizes = None
        if valid_sizes is not None:
            valid_sizes = check_valid_sizes(valid_sizes, image)
            image = crop(image, valid_sizes)
        elif self.ignore_padding:
            valid_sizes = find_valid_sizes(image)
        paddings: list[Padding | None] = [None] * (1 + len(self.stages))
        # In a symbolic trace, the sizes are not a tensor.
        if valid_sizes is not None and not (isinstance(valid_sizes, Tensor) and is_unpadded(valid_sizes, image)):
            paddings = pyramid(valid_sizes, image, levels=len(paddings))
        with fast(image):
            x = self.stem(image, paddings[0])
        outputs = []
        for index, stage in enumerate(self.stages):
            feature, x = stage(x, paddings[index + 1])
            if index in self.out_indices:
                # mmcv's RoIAlign on the CPU misreads other memory formats.
                outputs.append(feature.contiguous())
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
        """Set the training mode of all modules except frozen ones."""
        super().train(mode)
        self._freeze_stages()
        return self

    def get_layer_depth(self, param_name: str, prefix: str = "") -> tuple[int, int]:
        """Layer index of a parameter, for layer-wise learning rate decay.

        The stem is layer 0, and each block is a layer of its own. The norm and downsampling of a stage belong to its
        last block. Parameters outside the backbone are in the last layer.

        Args:
            param_name: name of the parameter.
            prefix: prefix of the backbone's parameter names, for example ``backbone.``.

        Returns:
            The layer index and the number of layers.
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

    def _checkpoint_filter(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Convert published weights; mmpretrain's ``ImageClassifier`` calls this before it loads a state dict."""
        self._loads_published = rename_published_classifier(state_dict, prefix)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        published = rename_published_backbone(state_dict, prefix) or self._loads_published
        self._loads_published = False
        *_, unexpected_keys, _ = args
        self._check_matching_keys(state_dict, prefix, unexpected_keys, whole=published)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_matching_keys(
        self, state_dict: dict[str, Any], prefix: str, unexpected_keys: list[str], whole: bool
    ) -> None:
        """Raise an error for checkpoints of another model, which non-strict loading would silently accept.

        Adapters, heads or a few stages may be loaded alone, but a published checkpoint must be complete.
        """
        # Not everything is a tensor: quantized layers keep their dtype, others an extra state.
        own, found = (
            {prefix + name: tuple(getattr(value, "shape", ())) for name, value in values.items()}
            for prefix, values in ((prefix, self.state_dict()), ("", state_dict))
        )
        matching = sum(found.get(name) == shape for name, shape in own.items())
        # state_dict has only the names with this prefix; of the others, torch reports those that match no module.
        foreign = sum(own.get(name) != shape for name, shape in found.items()) or len(unexpected_keys)
        if 2 * matching < len(own) and (whole or foreign > matching):
            example = next(name for name, shape in own.items() if found.get(name) != shape)
            near = [example] if example in found else list(found)
            nothing = f"nothing with the prefix {prefix!r}" if prefix else "nothing"
            raise CheckpointError(
                f"this checkpoint does not fit {type(self).__name__}: {matching} of {len(own)} parameters match in "
                f"name and shape. Expected for example {example!r} {own[example]}, found "
                f"{', '.join(f'{name!r} {found[name]}' for name in near[:3]) or nothing}. Check the file, the arch "
                "and, when the backbone is part of a larger model, init_cfg's prefix."
            )
