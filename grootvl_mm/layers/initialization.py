"""Initial values: drawn once, and once more where a model that was made on the meta device gets memory."""

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
    """One class between, for ``init_cfg`` finds the layers of a type by the names of a class and of its bases."""


class StepProjection(_Linear):
    """The linear layer before the softplus that gives the step sizes of a state space model.

    They start log-uniformly between ``dt_min`` and ``dt_max``. An ``init_cfg`` of a larger model for all layers of the
    type ``Linear`` does not reach it, as it would start all steps at softplus(0) = 0.69.
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
    """mmengine's module, whose ``init_weights`` also draws the weights that ``to_empty`` left without values.

    That is, after ``with torch.device("meta"): model = ...`` and ``model.to_empty(device=...)``. Weights that were
    loaded or drawn before stay.
    """

    def __init__(self, init_cfg: dict | list[dict] | None = None) -> None:
        super().__init__(init_cfg)
        self._is_empty = False

    def init_weights(self) -> None:
        """Draw the weights if they have no values yet, then do as ``init_cfg`` says."""
        if self._is_empty:
            # A module's children first: it may know better than they do.
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
