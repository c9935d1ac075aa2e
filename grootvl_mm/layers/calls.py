"""Calls of modules and functions that the policy of a block may replace, see :mod:`grootvl_mm.layers.recompute`."""

import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from grootvl_mm.ops._compat import is_compiling


class Policy(Protocol):
    """Decides how the functions that a block calls are executed.

    Attributes:
        is_direct: whether all modules of the block are known to be untouched, so that their functions are called
            instead of the modules.
    """

    is_direct: bool

    def call(self, func: Callable, args: tuple, kwargs: dict) -> Any:
        """Call a function."""


class _Current(threading.local):
    policy: Policy | None = None


_CURRENT = _Current()


def set_policy(policy: Policy | None) -> Policy | None:
    """Set the policy of this thread and return the previous one."""
    previous, _CURRENT.policy = _CURRENT.policy, policy
    return previous


def is_direct() -> bool:
    """Whether this thread computes a block all of whose modules are known to be untouched."""
    if is_compiling():
        return False
    policy = _CURRENT.policy
    return policy is not None and policy.is_direct


def call(func: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a PyTorch function: through the policy if it is direct; otherwise, its torch function mode intercepts it."""
    if not is_direct():
        return func(*args, **kwargs)
    return _CURRENT.policy.call(func, args, kwargs)


def call_own(func: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a function of :mod:`grootvl_mm.ops` through the policy; torch function modes do not intercept these."""
    if is_compiling() or _CURRENT.policy is None:
        return func(*args, **kwargs)
    return _CURRENT.policy.call(func, args, kwargs)


def call_module(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module or, in a block of untouched modules, the function that its ``forward`` would call."""
    if not is_direct():
        return module(x)
    parameters = module._parameters
    if type(module) is nn.Linear:
        return call(F.linear, x, parameters["weight"], parameters["bias"])
    if type(module) is nn.LayerNorm:
        return call(F.layer_norm, x, module.normalized_shape, parameters["weight"], parameters["bias"], module.eps)
    if type(module) is nn.Conv2d and module.padding_mode == "zeros":
        options = (module.stride, module.padding, module.dilation, module.groups)
        return call(F.conv2d, x, parameters["weight"], parameters["bias"], *options)
    if type(module) is nn.GELU and module.approximate == "none":
        return call(F.gelu, x)
    return module(x)
