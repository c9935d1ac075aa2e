"""Checks of the operators' arguments."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from grootvl_mm.ops._compat import is_compiling, is_eager
from grootvl_mm.ops._library import has_kernels

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def unwatched(look: Callable) -> Callable:
    """Decorator for functions that only read properties of tensors: disables torch function modes.

    Otherwise a mode such as that of :mod:`grootvl_mm.layers.recompute` is called for every access to a dtype, shape or
    device, which takes longer than launching a kernel.
    """

    @functools.wraps(look)
    def look_unwatched(*args: object, **kwargs: object) -> object:
        if is_compiling():
            return look(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return look(*args, **kwargs)

    return look_unwatched


def checked(check: Callable[..., None], call: Callable, inputs: Sequence[Tensor], *options: object) -> object:
    """``call(inputs, *options)``; raises the errors of ``check(inputs, *options)``.

    Compiled kernels check the same for floating inputs on their device, in a fraction of the time. For them, ``check``
    runs only after an error, to report it in terms of the caller's arguments.
    """
    if not _are_checked_by_kernels(inputs):
        check(inputs, *options)
        return call(inputs, *options)
    try:
        return call(inputs, *options)
    except Exception:
        check(inputs, *options)
        raise


@unwatched
def has_own_kernels(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors on one device with compiled kernels, and no dispatch mode is active."""
    for value in tensors:
        if type(value) not in (Tensor, torch.nn.Parameter) or value.device != tensors[0].device:
            return False
    return has_kernels(tensors[0].device.type) and not torch._C._len_torch_dispatch_stack()


@unwatched
def _are_checked_by_kernels(inputs: Sequence[Tensor]) -> bool:
    return is_eager(inputs[0]) and has_own_kernels(*inputs) and all(value.dtype in FLOATING for value in inputs)


@unwatched
def check_tensor(
    name: str, value: Tensor, shape: str | tuple[int, ...], dim: int, dtypes: tuple[torch.dtype, ...] = FLOATING
) -> None:
    """Check that a value is a tensor with the given number of axes and one of the dtypes.

    Raises:
        TypeError: it is not a tensor or has another dtype.
        ValueError: it has another number of axes.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be of dtype {expected}, got {value.dtype}")
    if value.dim() != dim:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Check that a value is one of the choices.

    Raises:
        ValueError: it is not.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


@unwatched
def check_same_device(**tensors: Tensor) -> None:
    """Check that all tensors are on one device.

    Raises:
        ValueError: they are not.
    """
    if len({tensor.device for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"all inputs must be on one device, got {found}")


@unwatched
def check_parameter_dtype(name: str, parameter: Tensor, x: Tensor) -> None:
    """Check that a parameter has the dtype of ``x``, or float32 if ``x`` is 16-bit.

    Raises:
        TypeError: it has another dtype.
    """
    if parameter.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
        raise TypeError(f"{name} must be {x.dtype} like x, or float32 if x is 16-bit, got {parameter.dtype}")
