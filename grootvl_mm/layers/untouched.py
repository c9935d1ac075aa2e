"""Whether a fused operator may stand for modules, and for PyTorch's functions."""

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

# torch.export puts fake ones in the place of plain parameters.
_PLAIN = (nn.Parameter, FakeTensor)


def untouched(*modules: nn.Module, kinds: tuple[type[nn.Module], ...], bias: bool = True) -> bool:
    """Whether calling each module does nothing but what its class says, with its own weight and bias.

    False for another class (adapters, quantized and parametrized layers, replaced norms, FSDP), for hooks on the module
    or on all modules, for a ``forward`` of the instance, and for weights that are no plain parameters (pruning, weight
    norm, quantized tensors). Asked at every call, so that what is added later counts from the next call on.

    Args:
        modules: the modules to be stood for.
        kinds: the classes that they must have, none derived from them.
        bias: whether they must have a bias, or must have none.
    """
    return not _has_global_hook() and all(_is_untouched(module, kinds, bias) for module in modules)


@unwatched
def has_own_kernels(*tensors: Tensor | None) -> bool:
    """Whether plain tensors are where our operators have kernels, and nobody counts or traces PyTorch's operators."""
    return (
        all(type(value) in (Tensor, nn.Parameter) for value in tensors)
        and len({value.device for value in tensors}) == 1
        and has_kernels(tensors[0].device.type)
        and not torch._C._len_torch_dispatch_stack()
    )


def _has_global_hook() -> bool:
    """Whether hooks on all modules may want to see a call. Those of torch's FLOP counter note a module's name only."""
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
    # In words that torch.compile can follow.
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
