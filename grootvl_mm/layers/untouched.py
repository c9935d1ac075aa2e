"""Decides whether a fused operator may replace calls of modules and of PyTorch functions."""

import torch
import torch.nn.functional as F
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
# Methods and functions that profilers and similar tools replace: of a class, of all modules, of torch.nn.functional.
_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward, nn.LayerNorm.forward, nn.GELU.forward)
_CALL = nn.Module.__call__
_FUNCTIONS = (F.linear, F.conv2d, F.layer_norm, F.gelu, F.silu, F.softplus)


def untouched(*modules: nn.Module, kinds: tuple[type[nn.Module], ...], bias: bool | None = True) -> bool:
    """Whether calling each module would run exactly the forward of its class on its own weight and bias.

    False for any other class (adapters, quantized and parametrized layers, replaced norms, FSDP), for hooks on the
    module or global hooks, for a ``forward`` set on the instance or its class, for weights that are not plain dense
    parameters (pruning, weight norm, quantized and sparse tensors), and where a foreign torch function mode or a
    replaced function of ``torch.nn.functional`` must see the calls of the modules. Evaluated at every call, so later
    changes take effect at the next call.

    Args:
        modules: the modules that a fused operator would replace.
        kinds: the allowed classes, without subclasses.
        bias: True if the modules must have a bias, False if they must not, None for modules without parameters.
    """
    return not _is_watched() and all(_is_untouched(module, kinds, bias) for module in modules)


def are_functions_watched() -> bool:
    """Whether a torch function mode, or a replaced function, may change the results of functions or must see calls."""
    functions = (F.linear, F.conv2d, F.layer_norm, F.gelu, F.silu, F.softplus)
    return functions != _FUNCTIONS or _has_foreign_mode()


def _has_foreign_mode() -> bool:
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
    return nn.Module.__call__ is not _CALL or are_functions_watched() or _has_global_hook()


def _has_global_hook() -> bool:
    """Whether a global module hook must see all calls; those of PyTorch's FLOP counter only track module names."""
    forward, forward_pre = global_hooks._global_forward_hooks, global_hooks._global_forward_pre_hooks
    backward, backward_pre = global_hooks._global_backward_hooks, global_hooks._global_backward_pre_hooks
    if not (forward or forward_pre or backward or backward_pre):
        return False
    hooks = (*forward.values(), *forward_pre.values(), *backward.values(), *backward_pre.values())
    return any(type(getattr(hook, "__self__", None)) is not ModuleTracker for hook in hooks)


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


@unwatched
def _has_plain_parameters(module: nn.Module, bias: bool | None) -> bool:
    parameters = module._parameters
    if bias is None:
        return not parameters
    return (
        len(parameters) == 2
        and type(parameters.get("weight")) in _PLAIN
        and parameters["weight"].layout == torch.strided
        and (type(parameters.get("bias")) in _PLAIN if bias else parameters.get("bias", "none") is None)
    )
