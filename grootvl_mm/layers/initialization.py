"""Weight initialization, also of models that were created on the meta device."""

import math
from collections.abc import Callable
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import Tensor, nn


def init_linear(layer: nn.Linear) -> None:
    """Weights truncated normal with deviation 0.02, bias 0."""
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class _Linear(nn.Linear):
    """An intermediate base: ``init_cfg`` matches layers by the names of their class and of its direct bases."""


class StepProjection(_Linear):
    """The linear layer before the softplus that gives the step sizes of a state space model.

    The initial steps are log-uniform between ``dt_min`` and ``dt_max``. An ``init_cfg`` of a parent model for all
    ``Linear`` layers leaves it alone: zero biases would start all steps at softplus(0) = 0.69.
    """

    dt_min, dt_max = 0.001, 0.1

    def reset_parameters(self) -> None:
        """Draw the weights and steps anew."""
        bound = self.in_features**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        with torch.no_grad():
            # In place, which sharded parameters can do too: bias = softplus^-1(dt) = dt + log(1 - exp(-dt)).
            dt = self.bias.uniform_(math.log(self.dt_min), math.log(self.dt_max)).exp_()
            dt.add_(dt.neg().expm1().neg().log())


class InitializedModule(BaseModule):
    """mmengine's ``BaseModule``, whose ``init_weights`` also initializes what ``to_empty`` left uninitialized.

    That is the case after ``with torch.device("meta"): model = ...`` and ``model.to_empty(device=...)``. Weights that
    were loaded or initialized before are left alone.
    """

    def __init__(self, init_cfg: dict | list[dict] | None = None) -> None:
        super().__init__(init_cfg)
        self._is_empty = False

    def init_weights(self) -> None:
        """Initialize the weights if they are uninitialized, then apply ``init_cfg``."""
        if self._is_empty:
            # Children first, so that a module can override them.
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
