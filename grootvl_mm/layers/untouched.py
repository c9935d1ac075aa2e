"""Decides whether a fused operator may replace calls of modules and of PyTorch functions."""

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as global_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from grootvl_mm.ops._checks import unwatched
from grootvl_mm.ops._compat import is_compiling
from grootvl_mm.ops._library import has_kernels

try:
    from torch.utils.module_tracker import ModuleTracker
except ImportError:  # before torch 2.4
    ModuleTracker = None

# torch.export replaces plain parameters by fake tensors.
_PLAIN = (nn.Parameter, FakeTensor)
# Methods that profilers and similar tools replace, for all modules of a class or for all modules.
_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward, nn.LayerNorm.forward, nn.GELU.forward)
_CALL = nn.Module.__call__


def untouched(*modules: nn.Module, kinds: tuple[type[nn.Module], ...], bias: bool | None = True) -> bool:
    """Whether calling each module would run exactly the forward of its class on its own weight and bias.

    False for any other class (adapters, quantized and parametrized layers, replaced norms, FSDP), for hooks on the
    module or global hooks, for a ``forward`` set on the instance or its class, for weights that are not plain
    parameters (pruning, weight norm, quantized tensors), and inside a foreign torch function mode, which would not see
    the functions that the modules call. Evaluated at every call, so later changes take effect at the next call.

    Args:
        modules: the modules that a fused operator would replace.
        kinds: the allowed classes, without subclasses.
        bias: True if the modules must have a bias, False if they must not, None for modules without parameters.
    """
    return not _is_watched() and all(_is_untouched(module, kinds, bias) for module in modules)


def has_foreign_mode() -> bool:
    """Whether a torch function mode is active that may change the results of functions or must see their calls."""
    return torch._C._len_torch_function_stack() > 0 and not all(
        isinstance(mode, DeviceContext) or getattr(mode, "keeps_results", False)
        for mode in _get_current_function_mode_stack()
    )


@unwatched
def has_own_kernels(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors on one device with compiled kernels, and no dispatch mode is active."""
    return (
        all(type(value) in (Tensor, nn.Parameter) for value in tensors)
        and len({value.device for value in tensors}) == 1
        and has_kernels(tensors[0].device.type)
        and not torch._C._len_torch_dispatch_stack()
    )


def _is_watched() -> bool:
    if is_compiling():  # the compiler traces or rejects the other ways of watching
        return _has_global_hook()
    return nn.Module.__call__ is not _CALL or has_foreign_mode() or _has_global_hook()


def _has_global_hook() -> bool:
    """Whether a global module hook must see all calls; those of PyTorch's FLOP counter only track module names."""
    if not global_hooks._has_any_global_hook():
        return False
    hooks = (
        *global_hooks._global_forward_hooks.values(),
        *global_hooks._global_forward_pre_hooks.values(),
        *global_hooks._global_backward_hooks.values(),
        *global_hooks._global_backward_pre_hooks.values(),
    )
    return ModuleTracker is None or any(type(getattr(hook, "__self__", None)) is not ModuleTracker for hook in hooks)


def _is_untouched(module: nn.Module, kinds: tuple[type[nn.Module], ...], bias: bool | None) -> bool:
    # Written so that torch.compile can trace it.
    return (
        type(module) in kinds
        and type(module).forward in _FORWARDS
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not (module._modules or module._buffers or module._compiled_call_impl)
        and not any(name in module.__dict__ for name in ("forward", "weight", "bias"))
        and _has_plain_parameters(module, bias)
    )


def _has_plain_parameters(module: nn.Module, bias: bool | None) -> bool:
    parameters = module._parameters
    if bias is None:
        return not parameters
    return (
        len(parameters) == 2
        and type(parameters.get("weight")) in _PLAIN
        and (type(parameters.get("bias")) in _PLAIN if bias else parameters.get("bias", "none") is None)
    )
