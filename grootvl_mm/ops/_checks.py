"""Checks of what users pass to the operators: each error says what came, what was expected and what to do."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from grootvl_mm.ops._compat import is_compiling

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def unwatched(look: Callable) -> Callable:
    """A decorator for functions that only look at tensors.

    A torch function mode, such as that of :mod:`grootvl_mm.layers.recompute`, would be called for every dtype, shape
    and device that is asked for; that takes longer than to launch a kernel.
    """

    @functools.wraps(look)
    def look_unwatched(*args: object, **kwargs: object) -> object:
        if is_compiling():
            return look(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return look(*args, **kwargs)

    return look_unwatched


@unwatched
def check_tensor(
    name: str, value: Tensor, shape: str | tuple[int, ...], dim: int, dtypes: tuple[torch.dtype, ...] = FLOATING
) -> None:
    """A tensor of the given rank and of one of the dtypes.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another rank.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {type(value).__name__}")
    if value.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be of dtype {expected}, got {value.dtype}")
    if value.dim() != dim:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """One of a few words.

    Raises:
        ValueError: another one.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


@unwatched
def check_same_device(**tensors: Tensor) -> None:
    """All tensors on one device.

    Raises:
        ValueError: they are on several.
    """
    if len({tensor.device for tensor in tensors.values()}) > 1:
        found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"all inputs must be on one device, got {found}")


@unwatched
def check_parameter_dtype(name: str, parameter: Tensor, x: Tensor) -> None:
    """A parameter in the dtype of ``x``, or in float32 where ``x`` has 16 bits.

    Raises:
        TypeError: another dtype.
    """
    if parameter.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
        raise TypeError(f"{name} must be {x.dtype} as x is, or float32 where x has 16 bits, got {parameter.dtype}")
