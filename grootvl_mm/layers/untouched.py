"""Decides whether a fused operator may replace the calls of modules and of PyTorch's functions."""

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as global_hooks

from grootvl_mm.ops._checks import unwatched
from grootvl_mm.ops._library import has_kernels

try:
    from torch.utils.module_tracker import ModuleTracker
except ImportError:  # before torch 2.4
    ModuleTracker = None

# torch.export replaces plain parameters by fake tensors.
_PLAIN = (nn.Parameter, FakeTensor)


def untouched(*modules: nn.Module, kinds: tuple[type[nn.Module], ...], bias: bool = True) -> bool:
    """Whether calling each module would run exactly the forward of its class on its own weight and bias.

    False for any other class (adapters, quantized and parametrized layers, replaced norms, FSDP), for hooks on the
    module or global hooks, for a ``forward`` set on the instance, and for weights that are not plain parameters
    (pruning, weight norm, quantized tensors). Evaluated at every call, so later changes take effect at the next call.

    Args:
        modules: the modules that a fused operator would replace.
        kinds: their allowed classes; subclasses are not.
        bias: whether they must have a bias or must not have one.
    """
    return not _has_global_hook() and all(_is_untouched(module, kinds, bias) for module in modules)


@unwatched
def has_own_kernels(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors on a device with our kernels, and no dispatch mode (counter, tracer) is on."""
    return (
        all(type(value) in (Tensor, nn.Parameter) for value in tensors)
        and len({value.device for value in tensors}) == 1
        and has_kernels(tensors[0].device.type)
        and not torch._C._len_torch_dispatch_stack()
    )


def _has_global_hook() -> bool:
    """Whether a global module hook needs to see calls. Those of torch's FLOP counter record only the module's name."""
    if not global_hooks._has_any_global_hook():
        return False
    hooks = (
        *global_hooks._global_forward_hooks.values(),
        *global_hooks._global_forward_pre_hooks.values(),
        *global_hooks._global_backward_hooks.values(),
        *global_hooks._global_backward_pre_hooks.values(),
    )
    return ModuleTracker is None or any(type(getattr(hook, "__self__", None)) is not ModuleTracker for hook in hooks)


def _is_untouched(module: nn.Module, kinds: tuple[type[nn.Module], ...], bias: bool) -> bool:
    parameters = module._parameters
    # Written so that torch.compile can trace it.
    return (
        type(module) in kinds
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not (module._modules or module._buffers or module._compiled_call_impl)
        and not any(name in module.__dict__ for name in ("forward", "weight", "bias"))
        and len(parameters) == 2
        and type(parameters.get("weight")) in _PLAIN
        and (type(parameters.get("bias")) in _PLAIN if bias else parameters.get("bias", "none") is None)
    )
