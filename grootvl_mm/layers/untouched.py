"""Whether a fused operator may stand for modules."""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PARAMETERS = {"weight", "bias"}


def untouched(*modules: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether calling each module does nothing but what its class says, with its own weight and bias.

    False for another class (adapters, quantized and parametrized layers, replaced norms, FSDP), for hooks on the module
    or on all modules, for a ``forward`` of the instance, and for weights that are no plain parameters (pruning, weight
    norm, quantized tensors). Asked at every call, so that what is added later counts from the next call on.

    Args:
        modules: the modules to be stood for.
        kinds: the classes that they must have, none derived from them.
    """
    return not _has_any_global_hook() and all(_is_untouched(module, kinds) for module in modules)


def _is_untouched(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    own = module.__dict__
    return (
        type(module) in kinds
        and not any(own[hooks] for hooks in _HOOKS)
        and not own["_modules"]
        and not own["_buffers"]
        and own.get("_compiled_call_impl") is None
        and own.keys().isdisjoint({"forward", "__call__", *_PARAMETERS})
        and own["_parameters"].keys() == _PARAMETERS
        and all(type(parameter) is nn.Parameter for parameter in own["_parameters"].values())
    )
