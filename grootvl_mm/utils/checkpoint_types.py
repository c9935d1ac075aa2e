"""Stand-ins for the non-tensor types in mmengine's checkpoints, hardened against hostile files.

``torch.load(weights_only=True)`` calls the allowed types with arguments and state from the file. NumPy's own types must
not be exposed to this: a file can make ``ndarray`` and ``dtype`` interpret its bytes as object pointers. The stand-ins
build only numeric arrays and scalars, and validate all arguments. The results have the type, values and memory layout
of the real ones, with one exception: torch creates arrays of a subclass, which :func:`plain` and pickling convert to
``numpy.ndarray``.
"""

import math
import pickle
from collections import OrderedDict
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any, NoReturn

import numpy as np
from mmengine.logging import HistoryBuffer
from torch import Tensor
from torch.storage import TypedStorage, UntypedStorage

from grootvl_mm.utils.checkpoint_tensors import CheckpointTensor, check_shared, spend

# Booleans, integers, floats and complex numbers, as NumPy spells them in its pickles.
_CODES = frozenset(["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"])
_BYTE_ORDERS = frozenset("<>|=")
# The part of a dtype's state after the byte order if it has no fields, subarray, metadata or special alignment.
_SIMPLE_DTYPE = (None, None, None, -1, -1, 0)
# The dtype of an array without content yet: neither arithmetic nor torch.from_numpy accepts it.
_EMPTY = np.dtype("V1")
_MAX_BYTES = 2**47  # more than any machine addresses; protects NumPy's own size computations
# The statistics that every HistoryBuffer has and pickles as attributes of the class.
_STATISTICS = ("mean", "min", "max", "current")


def _refuse(what: str) -> NoReturn:
    raise pickle.UnpicklingError(f"the checkpoint holds {what}; of NumPy's types, only numbers are allowed")


class CheckpointDtype:
    """Stand-in for ``numpy.dtype``: a numeric type whose only option is the byte order."""

    __slots__ = ("dtype",)  # NumPy treats an object with this attribute as a dtype
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, *arguments: Any) -> None:
        code, align, copy = arguments if len(arguments) == 3 else (None, None, None)
        # Old versions of NumPy write the flags as 0 and 1.
        if type(code) is not str or code not in _CODES or not all(type(flag) in (bool, int) for flag in (align, copy)):
            _refuse(f"a NumPy dtype {code!r}"[:100])
        if align:
            _refuse("a NumPy dtype with alignment")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        """Set the byte order; refuse any state other than that of a plain number."""
        simple = type(state) is tuple and len(state) == 8 and state[0] == 3 and state[2:] == _SIMPLE_DTYPE
        if not simple or type(state[1]) is not str or state[1] not in _BYTE_ORDERS:
            _refuse("a NumPy dtype with fields, metadata or other options")
        self.dtype = self.dtype.newbyteorder(state[1])

    def __reduce__(self) -> tuple:
        return self.dtype.__reduce__()


def _numeric(dtype: Any) -> np.dtype:
    """A new real dtype equal to a stand-in or to a real dtype; nothing else references it."""
    dtype = getattr(dtype, "dtype", None) if type(dtype) is CheckpointDtype else dtype
    if not isinstance(dtype, np.dtype) or dtype.str[1:] not in _CODES:
        _refuse("an array or a scalar of no numeric type")
    return np.dtype(dtype.str)


class CheckpointArray(np.ndarray):
    """Stand-in for ``numpy.ndarray``: ``__setstate__`` sets its content once, in newly allocated memory."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> NoReturn:
        _refuse("a NumPy array over memory that is not its own")

    def __setstate__(self, state: Any) -> None:
        """Set shape, dtype, memory order and bytes, if they are consistent."""
        # NumPy's own _reconstruct, which another library may have allowed, starts with an int8 array.
        if self.dtype not in (_EMPTY, np.int8) or self.shape != (0,):
            _refuse("a NumPy array that changes while it is read")
        if type(state) is not tuple or len(state) != 5 or type(state[0]) is not int or state[0] != 1:
            _refuse("a NumPy array in an unknown format")
        shape, dtype, fortran, content = state[1:]
        dtype = _numeric(dtype)
        if type(shape) is not tuple or not all(type(size) is int and size >= 0 for size in shape):
            _refuse("a NumPy array of impossible shape")
        if type(fortran) not in (bool, int) or type(content) is not bytes:
            _refuse("a NumPy array whose content is not bytes")
        fits = math.prod(shape) * dtype.itemsize == len(content)
        extent = math.prod(max(size, 1) for size in shape) * dtype.itemsize
        if not fits or len(shape) > 32 or extent > _MAX_BYTES:
            _refuse(f"a NumPy array of shape {shape} whose content has {len(content)} bytes"[:200])
        spend(len(content))
        # NumPy uses long bytes objects as the array's memory without a copy, so pass one that nothing else references.
        super().__setstate__((1, shape, dtype, bool(fortran), bytes(bytearray(content))))

    def __reduce_ex__(self, protocol: int) -> tuple:
        return self.view(np.ndarray).__reduce_ex__(protocol)

    def __reduce__(self) -> tuple:
        return self.view(np.ndarray).__reduce__()


def reconstruct(*arguments: Any) -> np.ndarray:
    """Stand in for ``numpy.core.multiarray._reconstruct``: an array without content yet."""
    # Also accept the real class: another library may have added it to torch's safe types.
    if len(arguments) != 3 or (arguments[0] is not CheckpointArray and arguments[0] is not np.ndarray):
        _refuse("a NumPy array of a special class")
    return np.ndarray.__new__(CheckpointArray, (0,), _EMPTY)


def scalar(*arguments: Any) -> np.generic:
    """Stand in for ``numpy.core.multiarray.scalar``: a NumPy number."""
    dtype, content = arguments if len(arguments) == 2 else (None, None)
    dtype = _numeric(dtype)
    if type(content) is not bytes or len(content) != dtype.itemsize:
        _refuse("a NumPy scalar of impossible size")
    return np.frombuffer(content, dtype)[0]


class CheckpointHistory(HistoryBuffer):
    """Stand-in for mmengine's ``HistoryBuffer``; becomes a real one when its content is set."""

    def __new__(cls, *arguments: Any) -> "CheckpointHistory":
        """An instance without content yet."""
        if arguments:
            _refuse("a history in an unknown format")
        return super().__new__(cls)

    def __init__(self) -> None:
        """Do nothing: ``__setstate__`` sets the content."""

    def __setstate__(self, state: Any) -> None:
        """Set the two one-dimensional histories and their maximum length.

        Statistics in the file are ignored: mmengine would register them for all histories.
        """
        if type(state) is not dict:
            _refuse("a history without content")
        values, counts, length = (state.get(name) for name in ("_log_history", "_count_history", "max_length"))
        for history in (values, counts):
            if not isinstance(history, np.ndarray) or history.ndim != 1 or history.dtype.str[1:] not in _CODES:
                _refuse("a history that is not a one-dimensional array of numbers")
        if len(values) != len(counts) or type(length) is not int or not len(values) <= length <= 2**62:
            _refuse("a history of inconsistent lengths")
        spend(values.nbytes + counts.nbytes)
        super().__init__(values, counts, length)
        self.__class__ = HistoryBuffer


def history_statistic(*arguments: Any) -> Callable:
    """Stand in for ``getattr``, which a history's pickle uses to refer to its statistics.

    The real ``getattr`` would give a crafted file access to any attribute of any allowed object.
    """
    owner, name = arguments if len(arguments) == 2 else (None, None)
    known = owner is CheckpointHistory or owner is HistoryBuffer
    if not known or type(name) is not str or name not in _STATISTICS:
        raise pickle.UnpicklingError(
            f"the checkpoint asks for attribute {name!r} of {owner!r}; "
            f"only {', '.join(_STATISTICS)} of mmengine's HistoryBuffer are allowed"
        )
    return getattr(HistoryBuffer, name)


def empty_bytes(*arguments: Any) -> bytes:
    """Stand in for ``bytes``, which the pickle of an empty array calls for its content."""
    if arguments:
        _refuse("bytes in an unknown format")
    return b""


class ConfigNode:
    """Stand-in for the config class of yacs that builds a plain dictionary."""

    def __new__(cls, *arguments: Any) -> OrderedDict:
        """A dictionary instead of an instance."""
        if arguments:
            _refuse("a config in an unknown format")
        return OrderedDict()


# Includes real tensors: where the stand-ins for tensors are used, a real one has bypassed them.
_NO_DATA = (CheckpointHistory, type, FunctionType, BuiltinFunctionType, Tensor, TypedStorage, UntypedStorage)


def plain(content: Any) -> Any:
    """Replace the stand-ins' objects by those of the original types; dictionaries and lists are modified in place.

    Attributes that a file sets on dictionaries and tensors could shadow methods and are dropped, except for the
    ``_metadata`` of state dicts.

    Raises:
        pickle.UnpicklingError: The content includes functions, classes, unfinished objects, or tensors larger than
            their data in the file.
    """
    done: dict[int, tuple[Any, Any]] = {}
    result = _plain(content, done)
    check_shared(built for value, built in done.values() if type(value) is CheckpointTensor)
    return result


def _plain(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    if id(value) in done:
        return done[id(value)][1]
    result = value
    if isinstance(value, dict):
        done[id(value)] = value, value
        for key in value:
            _unchanged(key, done)
            dict.__setitem__(value, key, _plain(dict.__getitem__(value, key), done))
        if getattr(value, "__dict__", None):
            metadata = vars(value).get("_metadata")
            vars(value).clear()
            if _is_metadata(metadata):
                value._metadata = metadata
    elif type(value) is list:
        done[id(value)] = value, value
        value[:] = [_plain(item, done) for item in value]
    elif type(value) is tuple:
        items = tuple(_plain(item, done) for item in value)
        result = value if all(a is b for a, b in zip(items, value, strict=True)) else items
    elif isinstance(value, CheckpointArray):
        if value.dtype == _EMPTY:
            _refuse("a NumPy array without content")
        result = value.view(np.ndarray)
    elif isinstance(value, CheckpointDtype):
        result = value.dtype
    elif type(value) is CheckpointTensor:
        result = value.build()
    elif isinstance(value, set):
        for item in value:
            _unchanged(item, done)
    elif isinstance(value, _NO_DATA):
        _refuse_object(value)
    done[id(value)] = value, result  # keep the value alive, so that no other object gets its id
    return result


def _is_metadata(value: Any) -> bool:
    """Whether this is the metadata of a ``state_dict``: the versions of a model's modules."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and type(own) is dict and set(own) <= {"version"} and type(own.get("version", 1)) is int
        for name, own in value.items()
    )


def _unchanged(value: Any, done: dict[int, tuple[Any, Any]]) -> None:
    """Check a key of a dictionary or an item of a set, which cannot be replaced in place."""
    if _plain(value, done) is not value:
        _refuse_object(value)


def _refuse_object(value: Any) -> NoReturn:
    what = f"{value!r}" if isinstance(value, (type, FunctionType, BuiltinFunctionType)) else f"a {type(value).__name__}"
    raise pickle.UnpicklingError(f"the checkpoint holds {what} in a place for data"[:200])


# The two functions are private to NumPy and moved in version 2; files use either path.
STAND_INS: dict[str, Callable] = {
    "mmengine.logging.history_buffer.HistoryBuffer": CheckpointHistory,
    "builtins.getattr": history_statistic,
    "builtins.bytes": empty_bytes,
    "yacs.config.CfgNode": ConfigNode,
    "numpy.ndarray": CheckpointArray,
    "numpy.dtype": CheckpointDtype,
    "numpy.core.multiarray._reconstruct": reconstruct,
    "numpy._core.multiarray._reconstruct": reconstruct,
    "numpy.core.multiarray.scalar": scalar,
    "numpy._core.multiarray.scalar": scalar,
}
