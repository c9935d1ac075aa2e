"""Backports of what is newer than PyTorch 2.1, and the parts of PyTorch that have no public name.

The fallbacks serve PyTorch 2.1 and later (.dev_scripts/check_oldest_torch.sh runs them there). They are for eager mode:
torch.compile and torch.export of the operators need PyTorch 2.4.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

if hasattr(torch.library, "infer_schema"):
    from torch.library import infer_schema
else:

    def infer_schema(function: Callable, *, mutates_args: tuple[()]) -> str:
        """The schema of an operator that changes none of its inputs, by the annotations of a function."""
        import torch._custom_op.impl

        return torch._custom_op.impl.infer_schema(function)


# Registrations end with the library that they were made by.
_LIBRARIES: list[torch.library.Library] = []


def _implement(operator: str, kernel: Callable, dispatch_key: str) -> None:
    namespace, name = operator.split("::")
    library = torch.library.Library(namespace, "FRAGMENT")
    library.impl(name, kernel, dispatch_key)
    _LIBRARIES.append(library)


def _overload(operator: str) -> Callable:
    namespace, name = operator.split("::")
    return getattr(getattr(torch.ops, namespace), name).default


if hasattr(torch.library, "register_fake"):
    from torch.library import register_fake
else:

    def register_fake(operator: str) -> Callable[[Callable], Callable]:
        """A decorator: the function says what the results look like, for tensors without values."""

        def register(function: Callable) -> Callable:
            _implement(operator, function, "Meta")
            return function

        return register


if hasattr(torch.library, "register_autograd"):
    from torch.library import register_autograd
else:

    def register_autograd(operator: str, backward: Callable, *, setup_context: Callable) -> None:
        """Give an operator its gradient."""
        overload = _overload(operator)

        def forward(ctx: torch.autograd.function.FunctionCtx, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = overload(*inputs)
            setup_context(ctx, inputs, output)
            return output

        namespace = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function = type(f"{overload.__name__}_gradient", (torch.autograd.Function,), namespace)
        _implement(operator, function.apply, "Autograd")


if hasattr(torch, "get_autocast_dtype"):
    from torch import get_autocast_dtype as autocast_dtype
else:

    def autocast_dtype(device_type: str) -> torch.dtype:
        """The dtype of autocast for a kind of device."""
        return torch.get_autocast_cpu_dtype() if device_type == "cpu" else torch.get_autocast_gpu_dtype()


def implement_autocast(operator: str, device_type: str, cast: Callable[..., tuple]) -> None:
    """Let an operator run under autocast with ``cast(dtype of autocast, *inputs)`` in place of its inputs.

    It serves operators whose inputs have different dtypes, where ``torch.library.register_autocast`` gives them one.
    """
    overload = _overload(operator)
    key = f"Autocast{device_type.upper()}"
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*inputs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(below):
            return overload(*cast(autocast_dtype(device_type), *inputs))

    _implement(operator, kernel, key)


try:
    from torch.utils.flop_counter import flop_registry, register_flop_formula
except ImportError:
    from torch.utils.flop_counter import flop_mapping as flop_registry

    def register_flop_formula(target: Callable) -> Callable[[Callable], Callable]:
        """A decorator: the function counts the operations of an operator from the shapes of its inputs."""

        def register(formula: Callable) -> Callable:
            flop_registry[target] = formula
            return formula

        return register


if hasattr(torch.compiler, "is_compiling"):
    from torch.compiler import is_compiling
else:
    from torch._utils import is_compiling

# Where PyTorch does not tell them apart, every compiler counts as an export.
is_exporting = getattr(torch.compiler, "is_exporting", is_compiling)

if hasattr(torch.amp, "is_autocast_available"):

    def is_autocast_enabled(device_type: str) -> bool:
        """Whether autocast is on for a kind of device; some, such as meta, have none."""
        return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)

else:

    def is_autocast_enabled(device_type: str) -> bool:
        """Whether autocast is on for a kind of device; some, such as meta, have none."""
        is_enabled = {"cpu": torch.is_autocast_cpu_enabled, "cuda": torch.is_autocast_enabled}.get(device_type)
        return is_enabled is not None and is_enabled()


def enable_autograd() -> contextlib.AbstractContextManager:
    """Within a kernel, which the dispatcher calls below autograd, lets autograd see what the kernel calls."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for device_type in ("CPU", "CUDA", "Other", "Functionality"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, f"Autograd{device_type}"))
    excluded = excluded.remove(torch._C.DispatchKey.ADInplaceOrView)
    return torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded)


_top_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)

# (x, weight, bias, activation, its scalars, its algorithm); None if PyTorch was built without oneDNN, and below 2.4,
# whose oneDNN misreads expanded tensors.
onednn_linear = None
if torch.backends.mkldnn.is_available() and hasattr(torch.library, "register_autograd"):
    onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def is_eager(x: Tensor) -> bool:
    """Whether operators on ``x`` run at once and as they are: no compiler, tracer, subclass or functional transform.

    Never on versions of PyTorch that do not say which hooks on saved tensors are active.
    """
    return (
        type(x) is Tensor
        and _top_saved_tensors_hooks is not None
        and not is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not is_forward_ad()
    )


def is_forward_ad() -> bool:
    """Whether forward-mode automatic differentiation is on."""
    return torch.autograd.forward_ad._current_level >= 0


def top_saved_tensors_hooks() -> tuple[Callable, Callable] | None:
    """The innermost pair of active hooks on saved tensors (pack, unpack), such as those of activation checkpointing."""
    return _top_saved_tensors_hooks(True)


__all__ = [
    "autocast_dtype",
    "enable_autograd",
    "flop_registry",
    "implement_autocast",
    "infer_schema",
    "is_autocast_enabled",
    "is_compiling",
    "is_eager",
    "is_exporting",
    "is_forward_ad",
    "onednn_linear",
    "register_autograd",
    "register_fake",
    "register_flop_formula",
    "top_saved_tensors_hooks",
]
