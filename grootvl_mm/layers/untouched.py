"""Decides whether a fused operator may replace calls of modules and of PyTorch functions."""

from collections.abc import Callable, Iterable
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as global_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from grootvl_mm.layers.calls import is_direct
from grootvl_mm.ops._checks import unwatched
from grootvl_mm.ops._compat import is_compiling

try:
    from torch.utils.module_tracker import ModuleTracker
except ImportError:  # before torch 2.4
    ModuleTracker = None

# torch.export replaces plain parameters by fake tensors.
_PLAIN = (nn.Parameter, FakeTensor)
_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward, nn.LayerNorm.forward, nn.GELU.forward)
# Functions that profilers and similar tools replace.
_FUNCTIONS = (F.linear, F.conv2d, F.layer_norm, F.gelu, F.silu, F.softplus)


class _Part(NamedTuple):
    """The functions that run when a module is called: those of its class unless tools replace them.

    Attributes:
        names: names of functions and parameters that an attribute of a module with the same name hides.
        look_up: returns the functions of a class.
        functions: those of the class when it was registered.
    """

    names: frozenset[str]
    look_up: Callable[[type[nn.Module]], tuple[Callable, ...]]
    functions: tuple[Callable, ...]


# Parts of a block that run no foreign code.
_PARTS: dict[type[nn.Module], _Part] = {}


def called_directly(kind: type[nn.Module]) -> type[nn.Module]:
    """Class decorator for parts of blocks: their forward runs no foreign code if all modules in them are untouched."""
    methods = {name for name, value in vars(kind).items() if isinstance(value, FunctionType)}
    names = methods - {"__init__", "reset_parameters", "extra_repr"} | {"forward", "_call_impl"}
    look_up = attrgetter("__call__", *names)
    functions = look_up(kind)
    if _are_original(functions):
        _PARTS[kind] = _Part(frozenset(names | {"weight", "bias"}), look_up, functions)
    return kind


def _are_original(functions: Iterable[Callable]) -> bool:
    """False if a tool replaced a function before this package was imported."""
    packages = ("torch", __name__.partition(".")[0])
    return all(
        isinstance(function, BuiltinFunctionType)
        or getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0] in packages
        for function in functions
    )


_ARE_FUNCTIONS_ORIGINAL = _are_original(_FUNCTIONS)
for _kind in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GELU):
    called_directly(_kind)


def untouched(*modules: nn.Module, kinds: tuple[type[nn.Module], ...], bias: bool | None = True) -> bool:
    """Whether calling each module would run exactly the forward of its class on its own weight and bias.

    False for any other class (adapters, quantized and parametrized layers, replaced norms, FSDP), for hooks on the
    module or global hooks, for a ``forward`` or another method of a call that is set on the instance or its class, for
    weights that are not plain dense parameters (pruning, weight norm, quantized and sparse tensors), and where a
    foreign torch function mode or a replaced function of ``torch.nn.functional`` must see the calls of the modules.
    Evaluated at every call, so later changes take effect at the next call; inside a block, once for all its modules,
    see :func:`is_wholly_untouched`.

    Args:
        modules: the modules that a fused operator would replace.
        kinds: the allowed classes, without subclasses.
        bias: True if the modules must have a bias, False if they must not, None for modules without parameters.
    """
    if is_direct():  # all modules of the block have been checked
        return all(type(module) in kinds and _has_bias(module, bias) for module in modules)
    return not _is_watched() and all(_is_untouched(module, kinds, bias) for module in modules)


def is_wholly_untouched(block: nn.Module) -> bool:
    """Whether all modules in a block are untouched parts of it, so that no foreign code runs while it is computed.

    The functions of its modules may then be called directly, without asking again for each module.
    """
    # A dispatch mode such as a FLOP counter reports what each module calls.
    if is_compiling() or torch._C._len_torch_dispatch_stack() or _is_watched():
        return False
    if any(look_up(kind) != functions for kind, (_, look_up, functions) in _PARTS.items()):
        return False
    with torch._C.DisableTorchFunction():
        return _are_untouched_parts(block._modules.values())


def _are_untouched_parts(modules: Iterable[nn.Module]) -> bool:
    # Plain loops: this runs for each block at each call.
    for module in modules:
        part, attributes = _PARTS.get(type(module)), module.__dict__
        if part is None or not attributes.keys().isdisjoint(part.names) or not _has_no_hooks(module):
            return False
        for parameter in attributes["_parameters"].values():
            if parameter is not None and not _is_plain(parameter):
                return False
        children = attributes["_modules"]
        if children and (type(module).forward in _FORWARDS or not _are_untouched_parts(children.values())):
            return False
    return True


def are_functions_watched() -> bool:
    """Whether a torch function mode, or a replaced function, may change the results of functions or must see calls."""
    functions = (F.linear, F.conv2d, F.layer_norm, F.gelu, F.silu, F.softplus)
    return functions != _FUNCTIONS or not _ARE_FUNCTIONS_ORIGINAL or _has_foreign_mode()


def _has_foreign_mode() -> bool:
    return torch._C._len_torch_function_stack() > 0 and not all(
        isinstance(mode, DeviceContext) or getattr(mode, "keeps_results", False)
        for mode in _get_current_function_mode_stack()
    )


def _is_watched() -> bool:
    # The compiler traces or rejects the other ways of watching.
    return _has_global_hook() or (not is_compiling() and are_functions_watched())


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
        and _runs_its_class(module)
        and _has_no_hooks(module)
        and not module._modules
        and _has_plain_parameters(module, bias)
    )


def _runs_its_class(module: nn.Module) -> bool:
    """Whether a call of a module runs the functions of a registered class, as they were, on its own parameters."""
    if is_compiling():
        names = ("forward", "_conv_forward", "weight", "bias")
        return type(module).forward in _FORWARDS and not any(name in module.__dict__ for name in names)
    part = _PARTS.get(type(module))
    return (
        part is not None
        and part.look_up(type(module)) == part.functions
        and module.__dict__.keys().isdisjoint(part.names)
    )


def _has_no_hooks(module: nn.Module) -> bool:
    """Whether a module has neither hooks nor buffers, which pruning and quantization add."""
    return (
        not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not (module._buffers or module._compiled_call_impl)
    )


@unwatched
def _has_plain_parameters(module: nn.Module, bias: bool | None) -> bool:
    parameters = module._parameters
    if bias is None:
        return not parameters
    return (
        len(parameters) == 2
        and _is_plain(parameters.get("weight"))
        and (_is_plain(parameters.get("bias")) if bias else parameters.get("bias", "none") is None)
    )


def _is_plain(parameter: nn.Parameter | None) -> bool:
    return type(parameter) in _PLAIN and parameter.layout == torch.strided


def _has_bias(module: nn.Module, bias: bool | None) -> bool:
    return bias is None or (module._parameters["bias"] is not None) == bias
