"""Layer-wise learning rate decay for backbones of mmdet, mmseg and mmpretrain."""

from collections.abc import Iterator
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from grootvl_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning rate decay: early backbone layers get smaller learning rates than late ones.

    The learning rate of layer i of n, counted from the stem, is multiplied by ``layer_decay_rate ** (n - 1 - i)``.
    Modules outside the backbone (necks, heads) keep the full learning rate. All options of mmengine's
    ``DefaultOptimWrapperConstructor``, the base class, are supported; ``lr_mult`` in ``custom_keys`` multiplies the
    decayed learning rate.

    Schedulers scale all learning rates by the same factor, so set minimum rates relatively: ``eta_min_ratio`` instead
    of ``eta_min``.

    The layers come from the backbone's ``get_layer_depth(name, prefix)``, which GrootV and mmpretrain's backbones have.
    The model can be one of mmdet, mmseg or mmpretrain, or a plain backbone.

    Example::

        custom_imports = dict(imports=["grootvl_mm"])
        optim_wrapper = dict(
            optimizer=dict(type="AdamW", lr=1e-4, weight_decay=0.05),
            constructor="grootvl_mm.LayerDecayOptimWrapperConstructor",
            paramwise_cfg=dict(
                layer_decay_rate=0.8, norm_decay_mult=0.0, bias_decay_mult=0.0, flat_decay_mult=0.0
            ),
        )

    Args:
        optim_wrapper_cfg: As in mmengine; its ``optimizer`` needs ``lr``.
        paramwise_cfg: As in mmengine, and ``layer_decay_rate``, above 0 and at most 1.

    Raises:
        ValueError: ``layer_decay_rate`` or ``lr`` is missing or out of range, or, when called, no module of the model
            has ``get_layer_depth``.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        rate = self.paramwise_cfg.get("layer_decay_rate")
        if not isinstance(rate, int | float) or not 0 < rate <= 1:
            raise ValueError(f"paramwise_cfg.layer_decay_rate must be above 0 and at most 1, got {rate!r}")
        if self.base_lr is None:
            raise ValueError("layer-wise learning rate decay needs optimizer.lr, which is missing")

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = "", **kwargs: Any) -> None:
        """Add one parameter group for each parameter of ``module`` and decay the learning rates."""
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:  # a submodule, in the recursion of the base class
            return
        scales = self._layer_scales(module)
        for group in params:
            (parameter,) = group["params"]
            group["lr_scale"] = scales.get(parameter, 1.0)
            group["lr"] = group.get("lr", self.base_lr) * group["lr_scale"]
        rates = {group["lr"] for group in params} or {self.base_lr}
        print_log(
            f"Layer-wise decay: {len(rates)} learning rates from {min(rates):.3g} to {max(rates):.3g}", logger="current"
        )

    def _layer_scales(self, model: nn.Module) -> dict[nn.Parameter, float]:
        """The learning rate factor of each backbone parameter."""
        rate = self.paramwise_cfg["layer_decay_rate"]
        scales = {}
        for backbone_name, backbone in _layered_modules(model):
            prefix = f"{backbone_name}." if backbone_name else ""
            for name, parameter in backbone.named_parameters(prefix=backbone_name):
                layer, num_layers = backbone.get_layer_depth(name, prefix)
                scales[parameter] = rate ** (num_layers - 1 - layer)
        if not scales:
            backbone = getattr(model, "backbone", model)
            raise ValueError(
                "layer-wise learning rate decay needs a backbone with get_layer_depth, which "
                f"{type(backbone).__name__} does not have"
            )
        return scales


def _layered_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules with ``get_layer_depth``, without wrappers that only delegate to one (classifiers)."""
    found = [(name, module) for name, module in model.named_modules() if hasattr(module, "get_layer_depth")]
    for name, module in found:
        if not any(other is not module and other in set(module.modules()) for _, other in found):
            yield name, module
