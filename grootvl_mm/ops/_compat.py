"""What PyTorch got after version 2.1: its own where it is there, the same in terms of the older parts where not.

The fallbacks serve PyTorch 2.1 and later (.dev_scripts/check_oldest_torch.sh runs them there). They are for eager mode:
torch.compile and torch.export of the operators need PyTorch 2.4.
"""

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


if hasattr(torch.library, "register_autocast"):
    from torch.library import register_autocast
else:

    def register_autocast(operator: str, device_type: str, dtype: torch.dtype) -> None:
        """Let an operator run in ``dtype`` under autocast; float64 stays."""
        overload = _overload(operator)

        def cast(value: Any) -> Any:
            is_narrow = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if is_narrow else value

        def kernel(*inputs: Any) -> Any:
            with torch.autocast(device_type, enabled=False):
                return overload(*map(cast, inputs))

        _implement(operator, kernel, f"Autocast{device_type.upper()}")


if hasattr(torch, "get_autocast_dtype"):
    from torch import get_autocast_dtype as autocast_dtype
else:

    def autocast_dtype(device_type: str) -> torch.dtype:
        """The dtype of autocast for a kind of device."""
        return torch.get_autocast_cpu_dtype() if device_type == "cpu" else torch.get_autocast_gpu_dtype()


def implement_autocast(operator: str, device_type: str, cast: Callable[..., tuple]) -> None:
    """Let an operator run under autocast with ``cast(dtype of autocast, *inputs)`` in place of its inputs.

    It serves operators whose inputs have different dtypes, where ``register_autocast`` gives all of them one.
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

if hasattr(torch.amp, "is_autocast_available"):

    def is_autocast_enabled(device_type: str) -> bool:
        """Whether autocast is on for a kind of device; some, such as meta, have none."""
        return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)

else:

    def is_autocast_enabled(device_type: str) -> bool:
        """Whether autocast is on for a kind of device; some, such as meta, have none."""
        is_enabled = {"cpu": torch.is_autocast_cpu_enabled, "cuda": torch.is_autocast_enabled}.get(device_type)
        return is_enabled is not None and is_enabled()


__all__ = [
    "autocast_dtype",
    "flop_registry",
    "implement_autocast",
    "infer_schema",
    "is_autocast_enabled",
    "is_compiling",
    "register_autocast",
    "register_autograd",
    "register_fake",
    "register_flop_formula",
]
