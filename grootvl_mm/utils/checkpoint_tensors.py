"""Stand-ins for the functions that rebuild tensors from a checkpoint, hardened against hostile files.

PyTorch's own functions act while a file is being read: they allocate as much memory as the file requests, resize the
memory of existing tensors, and let the file attach attributes and hooks to tensors. Here, tensors are only described
until the whole file has been read; :meth:`CheckpointTensor.build` then creates them, if their storages are big enough.
"""

import dataclasses
import math
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.storage import TypedStorage

# An expanded tensor has more elements than its storage. A file could claim any number, and every check copies them.
_MOST_EXPANDED = 2**24
_MOST_AXES = 64
# Elements per byte of the storages: tied weights share one, but not this often.
_MOST_SHARED = 16
# Limit for the total size of Python objects, relative to the size of their file.
_MOST_COPIED = 4
_POINTER = 8  # bytes per item of a container


class _Budget(threading.local):
    """How much this thread may still copy; unlimited unless a file is being read."""

    left = math.inf


_budget = _Budget()


def _refuse(what: str) -> NoReturn:
    raise pickle.UnpicklingError(f"the checkpoint holds {what}"[:200])


@contextmanager
def limited_copies(size: int) -> Iterator[None]:
    """Within the block, refuse objects that a file of ``size`` bytes could only describe by repeating its parts."""
    _budget.left = _MOST_COPIED * size
    try:
        yield
    finally:
        _budget.left = math.inf


def spend(size: int) -> None:
    """Count the bytes of an object.

    Raises:
        pickle.UnpicklingError: all objects of the file together are too large.
    """
    _budget.left -= size
    if _budget.left < 0:
        _refuse("objects that are together much larger than the file")


def check_shared(tensors: Iterable[Tensor]) -> None:
    """Check that tensors, which may share storages, are together not much larger than these.

    Raises:
        pickle.UnpicklingError: they are.
    """
    storages, elements = {}, 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage.nbytes()
        elements += tensor.numel()
    if elements > max(_MOST_SHARED * sum(storages.values()), _MOST_EXPANDED):
        _refuse(f"tensors of {elements} elements in storages of {sum(storages.values())} bytes")


@dataclasses.dataclass(frozen=True)
class CheckpointTensor:
    """The description of a tensor in a file."""

    storage: TypedStorage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    dtype: torch.dtype
    parameter: bool = False

    def build(self) -> Tensor:
        """Create the tensor.

        Raises:
            pickle.UnpicklingError: the tensor is larger than its storage.
        """
        storage = self.storage._untyped_storage
        held, elements = storage.nbytes() // self.dtype.itemsize, math.prod(self.size)
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.size, self.stride, strict=True))
        if elements and last >= held:
            _refuse(f"a tensor of shape {self.size} that is larger than its storage of {held} elements")
        # Without zeros, because PyTorch multiplies the other sizes of an empty tensor as well.
        if math.prod(filter(None, self.size)) > max(held, _MOST_EXPANDED):
            _refuse(f"a tensor of shape {self.size} whose elements are {held} in its storage")
        tensor = torch.empty(0, dtype=self.dtype, device=storage.device)
        tensor.set_(storage, self.offset, self.size, self.stride)
        return Parameter(tensor, self.requires_grad) if self.parameter else tensor.requires_grad_(self.requires_grad)


def _describe(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, dtype: Any) -> CheckpointTensor:
    sizes = [*size, *stride, offset] if isinstance(size, tuple) and isinstance(stride, tuple) else [None]
    known = all(type(value) is int and 0 <= value < 2**63 for value in sizes) and len(size) == len(stride) <= _MOST_AXES
    if not known or type(storage) is not TypedStorage or type(dtype) is not torch.dtype:
        _refuse("a tensor of impossible size, strides or storage")
    return CheckpointTensor(storage, offset, tuple(size), tuple(stride), bool(requires_grad), dtype)


def rebuild_tensor(*arguments: Any) -> CheckpointTensor:
    """Stand in for ``torch._utils._rebuild_tensor``."""
    if len(arguments) != 4:
        _refuse("a tensor in an unknown format")
    return rebuild_tensor_v2(*arguments, False, None)


def rebuild_tensor_v2(*arguments: Any) -> CheckpointTensor:
    """Stand in for ``torch._utils._rebuild_tensor_v2``; hooks are dropped."""
    storage, *shape, requires_grad, _ = _without_metadata(arguments, 6)
    return _describe(storage, *shape, requires_grad, getattr(storage, "dtype", None))


def rebuild_tensor_v3(*arguments: Any) -> CheckpointTensor:
    """Stand in for ``torch._utils._rebuild_tensor_v3``; hooks are dropped."""
    storage, *shape, requires_grad, _, dtype = _without_metadata(arguments, 7)
    return _describe(storage, *shape, requires_grad, dtype)


def _without_metadata(arguments: tuple, number: int) -> tuple:
    """The arguments without the optional last one, which would conjugate or negate the numbers."""
    if len(arguments) not in (number, number + 1):
        _refuse("a tensor in an unknown format")
    if any(arguments[number:]):
        _refuse("a tensor that is conjugated or negated when it is read")
    return arguments[:number]


def rebuild_parameter(*arguments: Any) -> CheckpointTensor:
    """Stand in for ``_rebuild_parameter`` and ``_rebuild_parameter_with_state``; hooks and state are dropped."""
    tensor, requires_grad = arguments[:2] if len(arguments) in (3, 4) else (None, None)
    if type(tensor) is not CheckpointTensor:
        _refuse("a parameter without a tensor")
    return dataclasses.replace(tensor, requires_grad=bool(requires_grad), parameter=True)


def rebuild_from_type(*arguments: Any) -> CheckpointTensor:
    """Stand in for ``torch._tensor._rebuild_from_type_v2``, which restores attributes of tensors; they are dropped."""
    function, cls, inner = arguments[:3] if len(arguments) == 4 else (None, None, None)
    if function not in (rebuild_tensor_v2, rebuild_tensor_v3) or cls is not tensor_class or type(inner) is not tuple:
        _refuse("a tensor of a special class")
    return function(*inner)


def tensor_class(*_: Any) -> NoReturn:
    """Stand in for the classes ``Tensor`` and ``Parameter``, which would create tensors of uninitialized memory."""
    _refuse("a tensor that is made by its class")


def encode(*arguments: Any) -> bytes:
    """Stand in for ``_codecs.encode``, with which Python pickles bytes; other encodings can multiply their number."""
    text, encoding = arguments if len(arguments) == 2 else (None, None)
    if type(text) is not str or encoding != "latin1":
        _refuse("bytes in an unknown encoding")
    spend(len(text))
    return text.encode(encoding)


def _counting(make: Callable) -> Callable:
    """The constructor of a container, which counts what it copies."""

    def make_counting(*arguments: Any) -> Any:
        spend(_POINTER * sum(len(argument) for argument in arguments))
        return make(*arguments)

    return make_counting


def _refusing(what: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any) -> NoReturn:
        _refuse(what)

    return refuse


_NOT_DENSE = "a sparse or nested tensor; dense ones are expected"
STAND_INS: dict[str, Callable] = {
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": rebuild_parameter,
    "torch._tensor._rebuild_from_type_v2": rebuild_from_type,
    "torch.Tensor": tensor_class,
    "torch.nn.parameter.Parameter": tensor_class,
    "_codecs.encode": encode,
    # Refused with specific messages.
    "torch._utils._rebuild_sparse_tensor": _refusing(_NOT_DENSE),
    "torch._utils._rebuild_nested_tensor": _refusing(_NOT_DENSE),
    "torch._utils._rebuild_meta_tensor_no_storage": _refusing("a meta tensor, which has no content"),
    "torch._utils._rebuild_qtensor": _refusing("a quantized tensor; plain numbers are expected"),
    "torch.serialization._get_layout": _refusing(_NOT_DENSE),
}
# The types allowed by torch that create plain data, no larger than in the file.
_HARMLESS = ("builtins.complex", "torch.device")
_CONTAINERS = ("collections.OrderedDict", "collections.Counter", "builtins.set", "torch.Size")


def strict_globals(allowed: dict[str, Any]) -> dict[str, Any]:
    """The table of names that a pickle may use: torch's harmless types, and stand-ins instead of the others.

    Args:
        allowed: torch's own table, from full names to types and functions.
    """
    kept = {name: allowed[name] for name in _HARMLESS if name in allowed}
    kept |= {name: _counting(allowed[name]) for name in _CONTAINERS if name in allowed}
    kept |= {name: value for name, value in allowed.items() if isinstance(value, (torch.dtype, torch.qscheme))}
    # Storage types only carry the dtype of a storage; calling them has no effect.
    kept |= {name: value for name, value in allowed.items() if isinstance(value, torch.serialization.StorageType)}
    kept["torch.storage.UntypedStorage"] = torch.serialization.StorageType("ByteStorage")
    return {**kept, **STAND_INS}
