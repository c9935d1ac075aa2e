"""Weight initialization, including models created on the meta device."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from mmengine.model import BaseInit, BaseModule
from torch import Tensor, nn

from grootvl_mm.layers.untouched import called_directly

INIT_CFG_MODULE = BaseInit.__module__


def init_linear(layer: nn.Linear) -> None:
    """Initialize weights from a truncated normal distribution with standard deviation 0.02, and biases with 0."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def linear_layer(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    """A linear layer whose ``reset_parameters`` is :func:`init_linear`; its owner must call that.

    FSDP calls ``reset_parameters`` of each module after ``to_empty``. It is set on the instance, not in a subclass,
    because quantization and FLOP counters look for exactly ``nn.Linear``.
    """
    layer = nn.Linear(in_features, out_features, bias)
    layer.reset_parameters = partial(init_linear, layer)
    return layer


@called_directly
class StepProjection(nn.Linear):
    """Linear layer that computes the step sizes of a state space model before their softplus.

    Initial step sizes are log-uniform between ``dt_min`` and ``dt_max``. An ``init_cfg`` of the enclosing model does
    not apply to this layer: most would set all step sizes to softplus(0) = 0.69.
    """

    dt_min, dt_max = 0.001, 0.1

    def reset_parameters(self) -> None:
        """Initialize the weights and the step sizes."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        with torch.no_grad():
            # In place, which also works for sharded parameters: bias = softplus^-1(dt) = dt + log(1 - exp(-dt)).
            dt = self.bias.uniform_(math.log(self.dt_min), math.log(self.dt_max)).exp_()
            dt.add_(dt.neg().expm1().neg().log())

    def apply(self, fn: Callable[[nn.Module], None]) -> nn.Module:
        """Like ``nn.Module.apply``, but ignore the functions with which mmengine applies an ``init_cfg``."""
        return self if getattr(fn, "__module__", None) == INIT_CFG_MODULE else super().apply(fn)


class InitializedModule(BaseModule):
    """mmengine's ``BaseModule`` with an ``init_weights`` that also initializes parameters after ``to_empty``.

    This is needed after ``with torch.device("meta"): model = ...`` and ``model.to_empty(device=...)``. Weights that
    were loaded or initialized since are not changed.
    """

    def __init__(self, init_cfg: dict | list[dict] | None = None) -> None:
        super().__init__(init_cfg)
        self._is_empty = False

    def init_weights(self) -> None:
        """Initialize uninitialized weights, then apply ``init_cfg``."""
        if self._is_empty:
            # Children first, so that a module can override their initialization.
            for module in reversed(list(self.modules())):
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                if isinstance(module, InitializedModule):
                    module._is_empty = False
        super().init_weights()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        was_meta = any(parameter.is_meta for parameter in self.parameters())
        result = super()._apply(fn, *args, **kwargs)
        self._is_empty |= was_meta and not any(parameter.is_meta for parameter in self.parameters())
        return result

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._is_empty &= not any(name.startswith(prefix) for name in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)
