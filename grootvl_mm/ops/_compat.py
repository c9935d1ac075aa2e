"""Backports of APIs newer than PyTorch 2.1, and wrappers of private PyTorch APIs.

The backports support eager mode only (.dev_scripts/check_oldest_torch.sh tests them on PyTorch 2.1): torch.compile and
torch.export of models need PyTorch 2.6.
"""

import contextlib
import ctypes
import functools
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch.eager_transforms import _unwrap_all_tensors_from_functional, _wrap_all_tensors_to_functional
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.utils import flop_counter

if hasattr(torch.library, "infer_schema"):
    from torch.library import infer_schema
else:

    def infer_schema(function: Callable, *, mutates_args: tuple[()]) -> str:
        """Infer an operator schema from the annotations of a function that mutates no arguments."""
        from torch._custom_op.impl import infer_schema

        signature = inspect.signature(function)
        plain = [parameter.replace(default=parameter.empty) for parameter in signature.parameters.values()]

        @functools.wraps(function)
        def without_defaults(*args: Any) -> None:
            """A function whose signature PyTorch 2.1 can parse."""

        without_defaults.__signature__ = signature.replace(parameters=plain)
        schema = infer_schema(without_defaults)
        for parameter in signature.parameters.values():
            if parameter.default is not parameter.empty:
                schema = schema.replace(f" {parameter.name}", f" {parameter.name}={parameter.default}")
        return schema


# Keeps libraries alive: PyTorch undoes the registrations of a destroyed one.
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
        """Decorator that registers a fake kernel, which computes the metadata of the results."""

        def register(function: Callable) -> Callable:
            _implement(operator, function, "Meta")
            return function

        return register


if hasattr(torch.library, "register_autograd"):
    from torch.library import register_autograd as _register_gradient
else:

    def _register_gradient(operator: str, backward: Callable, *, setup_context: Callable) -> None:
        overload = _overload(operator)

        def forward(ctx: torch.autograd.function.FunctionCtx, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = overload(*inputs)
            setup_context(ctx, inputs, output)
            return output

        namespace = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function = type(f"{overload.__name__}_gradient", (torch.autograd.Function,), namespace)
        _implement(operator, function.apply, "Autograd")


def register_autograd(operator: str, backward: Callable, *, setup_context: Callable) -> None:
    """Register the gradient of an operator for autograd and for reverse mode of ``torch.func``.

    PyTorch's own registration supports only autograd and raises an error under ``torch.func`` transforms. Autograd uses
    the compiled gradient instead if there is one (ops/csrc/autograd.cpp).
    """
    if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, "Autograd"):
        _register_gradient(operator, backward, setup_context=setup_context)
    overload = _overload(operator)

    def vmap(info: Any, in_dims: tuple, *inputs: Any) -> Any:
        """Loop over the batch: the operators are batched themselves, but their parameters have no batch axis."""
        outputs = []
        for index in range(info.batch_size):
            pairs = zip(inputs, in_dims, strict=True)
            outputs.append(overload(*(value if dim is None else value.select(dim, index) for value, dim in pairs)))
        if isinstance(outputs[0], Tensor):
            return torch.stack(outputs), 0
        return tuple(map(torch.stack, zip(*outputs, strict=True))), (0,) * len(outputs[0])

    parts = {"forward": overload, "setup_context": setup_context, "backward": backward, "vmap": vmap}
    namespace = {name: staticmethod(part) for name, part in parts.items()}
    function = type(f"{overload.__name__}_transformed", (torch.autograd.Function,), namespace)

    def kernel(*inputs: Any) -> Any:
        interpreter = retrieve_current_functorch_interpreter()
        if interpreter.key() != torch._C._functorch.TransformType.Functionalize:
            return function.apply(*inputs)
        reapply_views = interpreter.functionalize_add_back_views()
        inputs = _unwrap_all_tensors_from_functional(inputs, reapply_views=reapply_views)
        with interpreter.lower():
            return _wrap_all_tensors_to_functional(overload(*inputs), interpreter.level())

    _implement(operator, kernel, "FuncTorchDynamicLayerFrontMode")


if hasattr(torch, "get_autocast_dtype"):
    from torch import get_autocast_dtype as autocast_dtype
else:

    def autocast_dtype(device_type: str) -> torch.dtype:
        """The autocast dtype of a device type."""
        return torch.get_autocast_cpu_dtype() if device_type == "cpu" else torch.get_autocast_gpu_dtype()


_AUTOCAST_KERNELS: dict[tuple[Callable, str], Callable] = {}


def implement_autocast(operator: str, device_type: str, cast: Callable[..., tuple]) -> None:
    """Register an autocast rule: the operator runs on ``cast(autocast_dtype, *inputs)``.

    Unlike ``torch.library.register_autocast``, it allows inputs to have different dtypes.
    """
    overload = _overload(operator)
    key = f"Autocast{device_type.upper()}"
    below = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*inputs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(below):
            return overload(*cast(autocast_dtype(device_type), *inputs))

    _implement(operator, kernel, key)
    _AUTOCAST_KERNELS[overload, device_type] = kernel


def call_operator(overload: Callable, x: Tensor, *inputs: Any) -> Any:
    """``overload(x, *inputs)``; calls an autocast rule directly: the dispatcher would convert all inputs twice."""
    device_type = x.device.type
    if is_autocast_enabled(device_type) and is_eager(x):
        return _AUTOCAST_KERNELS[overload, device_type](x, *inputs)
    return overload(x, *inputs)


if torch.__version__ >= "2.6":
    from torch.utils.flop_counter import register_flop_formula
else:
    # PyTorch 2.3 and 2.4 register overloads of operators, but look up operators; 2.1 has formulas of shapes.
    _FORMULAS = getattr(flop_counter, "flop_registry", None) or flop_counter.flop_mapping
    _of_shapes = getattr(flop_counter, "shape_wrapper", lambda formula: formula)

    def register_flop_formula(target: Callable) -> Callable[[Callable], Callable]:
        """Decorator that registers a FLOP formula, a function of the shapes of the inputs."""

        def register(formula: Callable) -> Callable:
            _FORMULAS[target] = _of_shapes(formula)
            return formula

        return register


if hasattr(torch.compiler, "is_compiling"):
    from torch.compiler import is_compiling
else:
    from torch._utils import is_compiling

# Older versions cannot tell an export from other compilations, so every compilation counts as an export.
is_exporting = getattr(torch.compiler, "is_exporting", is_compiling)

if hasattr(torch.amp, "is_autocast_available"):

    def is_autocast_enabled(device_type: str) -> bool:
        """Whether autocast is enabled for a device type; False for meta, which has no autocast."""
        # Not is_autocast_available, which torch.compile of PyTorch 2.11 cannot trace.
        return device_type != "meta" and torch.is_autocast_enabled(device_type)

else:

    def is_autocast_enabled(device_type: str) -> bool:
        """Whether autocast is enabled for a device type; False for types without autocast, such as meta."""
        is_enabled = {"cpu": torch.is_autocast_cpu_enabled, "cuda": torch.is_autocast_enabled}.get(device_type)
        return is_enabled is not None and is_enabled()


@contextlib.contextmanager
def enable_autograd() -> Iterator[None]:
    """Re-enable autograd inside a kernel, which the dispatcher calls below autograd."""
    names = ("AutogradFunctionality", "AutogradOther", "ADInplaceOrView")
    keys = [getattr(torch._C.DispatchKey, name) for name in names]
    excluded = [key for key in keys if torch._C._dispatch_tls_is_dispatch_key_excluded(key)]
    for key in excluded:
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
    try:
        yield
    finally:
        for key in excluded:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)


def _find_top_hooks() -> Callable[[], tuple[Callable, Callable] | None] | None:
    """The function that returns the innermost saved-tensor hooks, which only C++ can call before PyTorch 2.7.

    None if the library has no symbols of this name (other compilers).
    """
    if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
        return functools.partial(torch._C._autograd._top_saved_tensors_default_hooks, True)
    prefix = "_ZN2at23SavedTensorDefaultHooks"
    try:
        library = ctypes.PyDLL(str(next(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*"))))
        get_hooks = library[f"{prefix}9get_hooksEv"]
    except (StopIteration, OSError, AttributeError):
        return None
    # The mangled name of push_hooks tells what get_hooks returns: a pair of PyObject*, or an optional pair of
    # SafePyObject, each a new reference with its interpreter.
    fields = [("pack", ctypes.py_object), ("unpack", ctypes.py_object)]
    is_optional = not hasattr(library, f"{prefix}10push_hooksEP7_objectS2_")
    if is_optional:
        fields = [fields[0], ("_1", ctypes.c_void_p), fields[1], ("_2", ctypes.c_void_p), ("has_value", ctypes.c_bool)]
    get_hooks.restype = type("Hooks", (ctypes.Structure,), {"_fields_": fields})

    def top_hooks() -> tuple[Callable, Callable] | None:
        result = get_hooks()
        if is_optional and not result.has_value:
            return None
        try:
            hooks = result.pack, result.unpack
        except ValueError:  # null pointers
            return None
        if is_optional:
            for hook in hooks:
                ctypes.pythonapi.Py_DecRef(ctypes.py_object(hook))
        return hooks

    return top_hooks


# Returns the innermost active saved-tensor hooks (pack, unpack), such as those of activation checkpointing, or None.
top_saved_tensors_hooks = _find_top_hooks()

# (x, weight, bias, activation, its scalars, its algorithm). None if PyTorch was built without oneDNN, and before
# PyTorch 2.4, whose oneDNN misreads expanded tensors.
onednn_linear = None
if torch.backends.mkldnn.is_available() and hasattr(torch.library, "register_autograd"):
    onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def is_eager(x: Tensor) -> bool:
    """Whether ``x`` is a plain tensor in eager mode: no compiler, tracer, subclass or functional transform."""
    return (
        type(x) is Tensor
        and not is_compiling()
        and not torch.jit.is_tracing()
        and not is_transformed()
        and not is_forward_ad()
    )


def is_transformed() -> bool:
    """Whether a transform of ``torch.func``, such as ``vmap`` or ``grad``, is active."""
    return torch._C._are_functorch_transforms_active()


def is_forward_ad() -> bool:
    """Whether forward-mode automatic differentiation is enabled."""
    return torch.autograd.forward_ad._current_level >= 0


def are_saved_tensors_hooks_enabled() -> bool:
    """Whether hooks on saved tensors may be used; ``torch.autograd.graph.disable_saved_tensors_hooks`` forbids them."""
    return torch._C._autograd._saved_tensors_hooks_is_enabled()


__all__ = [
    "are_saved_tensors_hooks_enabled",
    "autocast_dtype",
    "call_operator",
    "enable_autograd",
    "implement_autocast",
    "infer_schema",
    "is_autocast_enabled",
    "is_compiling",
    "is_eager",
    "is_exporting",
    "is_forward_ad",
    "is_transformed",
    "onednn_linear",
    "register_autograd",
    "register_fake",
    "register_flop_formula",
    "top_saved_tensors_hooks",
]
