"""Stand-ins for the types that mmengine's checkpoints name beside tensors, which treat a file as hostile.

``torch.load(weights_only=True)`` calls what a file names, with arguments of the file, and hands it a state of the file.
NumPy's own types must not be exposed to that: ``ndarray`` and ``dtype`` together can be made to take bytes of the file
for pointers to objects. The stand-ins here build numeric arrays and scalars, nothing else, and check everything that
they are given. What they build has the type, values and memory layout that the real ones would have, but for arrays:
while torch reads, an array is of a subclass, which :func:`plain` and pickling turn into ``numpy.ndarray``.
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
from torch.nn import Parameter

# Booleans, integers, floats and complex numbers, as NumPy spells them in its pickles.
_CODES = frozenset(["b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16"])
_BYTE_ORDERS = frozenset("<>|=")
# What follows the byte order in the state of a dtype without fields, subarray, metadata or special alignment.
_SIMPLE_DTYPE = (None, None, None, -1, -1, 0)
# An array that has not got its content yet: no operation on numbers takes this type, torch.from_numpy neither.
_EMPTY = np.dtype("V1")
_MAX_BYTES = 2**47  # more than any machine addresses; protects NumPy's own size computations
# The statistics that every HistoryBuffer knows and writes into its pickle as attributes of the class.
_STATISTICS = ("mean", "min", "max", "current")


def _refuse(what: str) -> NoReturn:
    raise pickle.UnpicklingError(f"the checkpoint holds {what}; of NumPy, numbers are allowed only")


class CheckpointDtype:
    """Stands in for ``numpy.dtype``: a numeric type without any option but the byte order."""

    __slots__ = ("dtype",)  # by this name, NumPy takes an instance for the dtype itself
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, *arguments: Any) -> None:
        code, align, copy = arguments if len(arguments) == 3 else (None, None, None)
        # Old versions of NumPy write 0 and 1.
        if type(code) is not str or code not in _CODES or not all(type(flag) in (bool, int) for flag in (align, copy)):
            _refuse(f"a NumPy dtype {code!r}"[:100])
        if align:
            _refuse("a NumPy dtype with alignment")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        """Set the byte order; any other state than that of a simple number is refused."""
        simple = type(state) is tuple and len(state) == 8 and state[0] == 3 and state[2:] == _SIMPLE_DTYPE
        if not simple or type(state[1]) is not str or state[1] not in _BYTE_ORDERS:
            _refuse("a NumPy dtype with fields, metadata or other options")
        self.dtype = self.dtype.newbyteorder(state[1])

    def __reduce__(self) -> tuple:
        return self.dtype.__reduce__()


def _numeric(dtype: Any) -> np.dtype:
    """The real dtype of a stand-in, or of a real one, made anew so that nothing else refers to it."""
    dtype = getattr(dtype, "dtype", None) if type(dtype) is CheckpointDtype else dtype
    if not isinstance(dtype, np.dtype) or dtype.str[1:] not in _CODES:
        _refuse("an array or a scalar of no numeric type")
    return np.dtype(dtype.str)


class CheckpointArray(np.ndarray):
    """Stands in for ``numpy.ndarray``: gets its numbers once, by ``__setstate__``, into memory of its own."""

    __slots__ = ()

    def __new__(cls, *_: Any, **__: Any) -> NoReturn:
        _refuse("a NumPy array over memory that is not its own")

    def __setstate__(self, state: Any) -> None:
        """Take shape, type, memory order and bytes, if they agree."""
        # NumPy's own _reconstruct, which a host may have allowed, begins with bytes.
        if self.dtype not in (_EMPTY, np.int8) or self.shape != (0,):
            _refuse("a NumPy array that changes while it is read")
        if type(state) is not tuple or len(state) != 5 or type(state[0]) is not int or state[0] != 1:
            _refuse("a NumPy array in an unknown format")
        shape, dtype, fortran, content = state[1:]
        dtype = _numeric(dtype)
        if type(shape) is not tuple or not all(type(size) is int and size >= 0 for size in shape):
            _refuse("a NumPy array of impossible shape")
        if type(fortran) not in (bool, int) or type(content) is not bytes:
            _refuse("a NumPy array whose content is no bytes")
        fits = math.prod(shape) * dtype.itemsize == len(content)
        extent = math.prod(max(size, 1) for size in shape) * dtype.itemsize
        if not fits or len(shape) > 32 or extent > _MAX_BYTES:
            _refuse(f"a NumPy array of shape {shape} whose content has {len(content)} bytes"[:200])
        # NumPy would keep long bytes as the array's memory; what it gets is referred to by nothing else.
        super().__setstate__((1, shape, dtype, bool(fortran), bytes(bytearray(content))))

    def __reduce_ex__(self, protocol: int) -> tuple:
        return self.view(np.ndarray).__reduce_ex__(protocol)

    def __reduce__(self) -> tuple:
        return self.view(np.ndarray).__reduce__()


def reconstruct(*arguments: Any) -> np.ndarray:
    """Stand in for ``numpy.core.multiarray._reconstruct``: an array that waits for its content."""
    # The real class, too: a host may put it on torch's list of safe types beside the stand-in.
    if len(arguments) != 3 or (arguments[0] is not CheckpointArray and arguments[0] is not np.ndarray):
        _refuse("a NumPy array of a special class")
    return np.ndarray.__new__(CheckpointArray, (0,), _EMPTY)


def scalar(*arguments: Any) -> np.generic:
    """Stand in for ``numpy.core.multiarray.scalar``: a number of NumPy."""
    dtype, content = arguments if len(arguments) == 2 else (None, None)
    dtype = _numeric(dtype)
    if type(content) is not bytes or len(content) != dtype.itemsize:
        _refuse("a NumPy scalar of impossible size")
    return np.frombuffer(content, dtype)[0]


class CheckpointHistory(HistoryBuffer):
    """Stands in for mmengine's ``HistoryBuffer`` and becomes one when it gets its content."""

    def __new__(cls, *arguments: Any) -> "CheckpointHistory":
        """An instance that waits for its content."""
        if arguments:
            _refuse("a history in an unknown format")
        return super().__new__(cls)

    def __init__(self) -> None:
        """Do nothing: the content comes by ``__setstate__``."""

    def __setstate__(self, state: Any) -> None:
        """Take two one-dimensional histories and their maximal length.

        What the file says about statistics is not looked at: mmengine would change them for all histories.
        """
        if type(state) is not dict:
            _refuse("a history without content")
        values, counts, length = (state.get(name) for name in ("_log_history", "_count_history", "max_length"))
        for history in (values, counts):
            if not isinstance(history, np.ndarray) or history.ndim != 1 or history.dtype.str[1:] not in _CODES:
                _refuse("a history that is no row of numbers")
        if len(values) != len(counts) or type(length) is not int or not len(values) <= length <= 2**62:
            _refuse("a history whose lengths do not agree")
        super().__init__(values, counts, length)
        self.__class__ = HistoryBuffer


def history_statistic(*arguments: Any) -> Callable:
    """Stand in for ``getattr``, which a history's pickle uses to name its statistics.

    The real ``getattr`` would give a crafted file a way to any attribute of any allowed object.
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
    """Stand in for ``bytes``, which the content of an empty array is pickled as a call of."""
    if arguments:
        _refuse("bytes in an unknown format")
    return b""


class ConfigNode:
    """Stands in for yacs' config class, and makes a plain dictionary of it."""

    def __new__(cls, *arguments: Any) -> OrderedDict:
        """A dictionary in place of an instance."""
        if arguments:
            _refuse("a config in an unknown format")
        return OrderedDict()


def plain(content: Any) -> Any:
    """Replace what the stand-ins built by what a file's writer had; dictionaries and lists are changed in place.

    Attributes that a file gives to dictionaries and tensors are dropped, but for the ``_metadata`` of state dicts:
    they would hide methods.

    Raises:
        pickle.UnpicklingError: There are functions, classes or unfinished objects.
    """
    return _plain(content, {})


def _plain(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    if id(value) in done:
        return done[id(value)][1]
    result = value
    if isinstance(value, dict):
        done[id(value)] = value, value
        for key in value:
            _plain(key, done)
            dict.__setitem__(value, key, _plain(dict.__getitem__(value, key), done))
        if getattr(value, "__dict__", None):
            metadata = vars(value).get("_metadata")
            vars(value).clear()
            if isinstance(metadata, dict):
                value._metadata = _plain(metadata, done)
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
    elif type(value) in (Tensor, Parameter):
        vars(value).clear()
    elif isinstance(value, set):
        for item in value:
            _plain(item, done)
    elif isinstance(value, (CheckpointHistory, type, FunctionType, BuiltinFunctionType)):
        raise pickle.UnpicklingError(f"the checkpoint holds {value!r}, which is no data"[:200])
    done[id(value)] = value, result  # with the value itself, whose id nothing else may get meanwhile
    return result
