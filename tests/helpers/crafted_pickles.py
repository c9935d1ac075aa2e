"""Assembles hostile checkpoints opcode by opcode, in the dialect that ``torch.load(weights_only=True)`` reads."""

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Op(NamedTuple):
    """Opcodes that leave one object on the stack."""

    code: bytes


def push(value: object) -> bytes:
    """Opcodes for a value of plain types, in which any part may be an :class:`Op`."""
    if isinstance(value, Op):
        return value.code
    if value is None:
        return pickle.NONE
    if isinstance(value, bool):
        return pickle.NEWTRUE if value else pickle.NEWFALSE
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return pickle.BININT + struct.pack("<i", value)
        number = pickle.encode_long(value)
        return pickle.LONG1 + bytes([len(number)]) + number
    if isinstance(value, float):
        return pickle.BINFLOAT + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode()
        return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    if isinstance(value, bytes):
        return call(named("_codecs.encode"), value.decode("latin1"), "latin1").code
    if isinstance(value, tuple):
        return pickle.MARK + b"".join(map(push, value)) + pickle.TUPLE
    if isinstance(value, list):
        return pickle.EMPTY_LIST + pickle.MARK + b"".join(map(push, value)) + pickle.APPENDS
    items = b"".join(push(key) + push(item) for key, item in value.items())
    return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS


def named(path: str) -> Op:
    """A global by its name."""
    module, name = path.rsplit(".", 1)
    return Op(pickle.GLOBAL + f"{module}\n{name}\n".encode())


def call(function: Op, *arguments: object) -> Op:
    """REDUCE."""
    return Op(function.code + push(arguments) + pickle.REDUCE)


def new(cls: Op, *arguments: object) -> Op:
    """NEWOBJ."""
    return Op(cls.code + push(arguments) + pickle.NEWOBJ)


def build(instance: Op, state: object) -> Op:
    """BUILD, which can be applied several times."""
    return Op(instance.code + push(state) + pickle.BUILD)


def keep(value: Op, number: int) -> Op:
    """Keep an object under a number, and leave it on the stack."""
    return Op(value.code + pickle.BINPUT + bytes([number]))


def kept(number: int) -> Op:
    """The object that was kept under the number."""
    return Op(pickle.BINGET + bytes([number]))


def dump(content: object) -> bytes:
    """A whole pickle."""
    return pickle.PROTO + b"\x02" + push(content) + pickle.STOP


def write(path: Path, content: object) -> Path:
    """Write an archive like that of ``torch.save`` with this pickle, 16 bytes of numbers, and right check sums."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", dump(content))
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/version", "3\n")
    return path


def write_old(path: Path, content: object, filled: dict[str, bytes]) -> Path:
    """Write a file as torch before 1.6 did, with the content of the storages that are filled."""
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, content, list(filled)]
    numbers = b"".join(struct.pack("<q", len(value) // 4) + value for value in filled.values())
    path.write_bytes(b"".join(map(dump, parts)) + numbers)
    return path


NDARRAY, DTYPE = named("numpy.ndarray"), named("numpy.dtype")
HISTORY = named("mmengine.logging.history_buffer.HistoryBuffer")
RECONSTRUCT = named("numpy._core.multiarray._reconstruct")
EMPTY = call(RECONSTRUCT, NDARRAY, (0,), b"b")
PLAIN_STATE = (3, "<", None, None, None, -1, -1, 0)
POINTERS = b"A" * 16


def dtype(code: object, state: object = PLAIN_STATE) -> Op:
    """A dtype as NumPy pickles it."""
    return build(call(DTYPE, code, False, True), state)


def array(shape: object = (2,), kind: object = None, fortran: object = False, content: object = POINTERS) -> Op:
    """An array as NumPy pickles it."""
    return build(EMPTY, (1, shape, dtype("f8") if kind is None else kind, fortran, content))


def history(**changes: object) -> Op:
    """A history as mmengine pickles it, with changes."""
    state = {"max_length": 10, "_log_history": array(), "_count_history": array(), **changes}
    return build(new(HISTORY), state)


def storage(key: str = "0", numel: int = 4, kind: str = "FloatStorage", *view: object) -> Op:
    """The numbers of a tensor."""
    return Op(push(("storage", named(f"torch.{kind}"), key, "cpu", numel, *view)) + pickle.BINPERSID)


def tensor(size: object = (4,), stride: object = (1,), offset: object = 0, **changes: object) -> Op:
    """A tensor as torch pickles it."""
    hooks = changes.get("hooks", call(named("collections.OrderedDict")))
    function = named("torch._utils._rebuild_tensor_v2")
    return call(function, changes.get("numbers", storage()), offset, size, stride, False, hooks)


# Each of these tries to get at memory, objects or functions; whoever reads it must refuse.
HOSTILE: dict[str, Callable[[], object]] = {
    "array of objects": lambda: array(kind=call(DTYPE, "O8", False, True)),
    "array of objects, short name": lambda: array(kind=call(DTYPE, "O")),
    "array of objects, other byte order": lambda: array(kind=dtype("O8", (3, "|", None, None, None, -1, -1, 63))),
    "array of objects by NEWOBJ": lambda: new(NDARRAY, (2,), new(DTYPE, "O"), POINTERS),
    "array of objects by REDUCE": lambda: call(NDARRAY, (2,), call(DTYPE, "O"), POINTERS),
    "array of objects, name by NumPy 1": lambda: build(
        call(named("numpy.core.multiarray._reconstruct"), NDARRAY, (0,), b"b"),
        (1, (2,), call(DTYPE, "O8"), False, POINTERS),
    ),
    "array by a special class": lambda: call(RECONSTRUCT, HISTORY, (0,), b"b"),
    "array of a class that is not loaded": lambda: call(RECONSTRUCT, named("numpy.memmap"), (0,), b"b"),
    "array over a buffer": lambda: new(NDARRAY, (2,), dtype("f8"), POINTERS),
    "array over a buffer with strides": lambda: call(NDARRAY, (2,), dtype("f8"), POINTERS, 0, (1 << 40,)),
    "array of uninitialized memory": lambda: new(NDARRAY, (1000,), dtype("f8")),
    "array of uninitialized memory, default type": lambda: call(NDARRAY, (1000,)),
    "dtype becomes an object type": lambda: array(kind=dtype("f8", (3, "|", None, None, None, 8, 8, 63))),
    "dtype gets fields": lambda: dtype("f8", (3, "|", None, ("a",), {"a": (call(DTYPE, "O"), 0)}, 8, 1, 27)),
    "dtype gets other fields later": lambda: (
        array(kind=keep(dtype("f8"), 0)),
        build(kept(0), (3, "|", None, ("a",), {"a": (dtype("f8"), 0)}, 8, 1, 27)),
    ),
    "dtype gets object flags later": lambda: (
        array(kind=keep(dtype("f8"), 0)),
        build(kept(0), (3, "|", None, None, None, 8, 8, 63)),
    ),
    "dtype gets metadata": lambda: dtype("f8", (4, "<", None, None, None, -1, -1, 0, {"a": 1})),
    "dtype gets a size": lambda: dtype("f8", (3, "<", None, None, None, 80, 1, 0)),
    "dtype gets a subarray": lambda: dtype("f8", (3, "<", (dtype("f8"), (9,)), None, None, -1, -1, 0)),
    "dtype gets a list": lambda: dtype("f8", list(PLAIN_STATE)),
    "dtype gets another byte order": lambda: dtype("f8", (3, "O", None, None, None, -1, -1, 0)),
    "dtype of records": lambda: call(DTYPE, [("a", "f8")]),
    "dtype of records by dictionary": lambda: call(DTYPE, {"names": ["a"], "formats": ["O"], "offsets": [3]}),
    "dtype of records by text": lambda: call(DTYPE, "f8,O"),
    "dtype of void": lambda: call(DTYPE, "V8", False, True),
    "dtype of text": lambda: call(DTYPE, "U4", False, True),
    "dtype of bytes": lambda: call(DTYPE, "S8", False, True),
    "dtype of dates": lambda: call(DTYPE, "M8", False, True),
    "dtype with padding": lambda: call(DTYPE, "f16", False, True),
    "dtype with alignment": lambda: call(DTYPE, "f8", True, True),
    "dtype of a class": lambda: call(DTYPE, named("builtins.set")),
    "dtype of a history": lambda: call(DTYPE, history()),
    "dtype of the dtype": lambda: call(DTYPE, dtype("f8")),
    "dtype by its class": lambda: call(named("numpy.dtypes.ObjectDType")),
    "dtype by the class of numbers": lambda: call(named("numpy.dtypes.Float64DType")),
    "content too short": lambda: array((3,)),
    "content too long": lambda: array((1,)),
    "content for no elements": lambda: array((0,)),
    "content is a list": lambda: array(content=[1.0, 2.0]),
    "content is a text": lambda: array(content="A" * 16),
    "content is a bytearray": lambda: array(content=call(named("builtins.bytearray"), POINTERS)),
    "content is an array": lambda: array(content=array()),
    "shape is negative": lambda: array((-1, -2)),
    "shape is negative in one axis": lambda: array((-2,)),
    "shape is a product that overflows": lambda: array((2**32, 2**32), content=b""),
    "shape is zero times a huge number": lambda: array((0, 2**62, 2**62), content=b""),
    "shape is a number": lambda: array(2),
    "shape is a list": lambda: array([2]),
    "shape is of booleans": lambda: array((True,), content=b"A" * 8),
    "shape is of NumPy's numbers": lambda: array((call(named("numpy._core.multiarray.scalar"), dtype("i1"), b"\2"),)),
    "shape has too many axes": lambda: array((1,) * 33, content=b"A" * 8),
    "order is an object": lambda: array(fortran=history()),
    "type is a text": lambda: array(kind="O"),
    "type is a class": lambda: array(kind=DTYPE),
    "type is an array": lambda: array(kind=array()),
    "state of another version": lambda: build(EMPTY, (9, (2,), dtype("f8"), False, POINTERS)),
    "state without version": lambda: build(EMPTY, ((2,), dtype("f8"), False, POINTERS)),
    "state is a dictionary": lambda: build(EMPTY, {"dtype": dtype("f8")}),
    "state of attributes": lambda: build(EMPTY, (None, {"dtype": dtype("f8")})),
    "array gets content twice": lambda: build(array(), (1, (2,), dtype("f8"), False, POINTERS)),
    "tensor over an array that changes": lambda: (
        call(
            named("torch._utils._rebuild_device_tensor_from_numpy"),
            keep(EMPTY, 0),
            named("torch.float32"),
            "cpu",
            False,
        ),
        build(kept(0), (1, (2,), dtype("f8"), False, POINTERS)),
    ),
    "array with attributes": lambda: call(
        named("torch._tensor._rebuild_from_type_v2"), RECONSTRUCT, NDARRAY, (NDARRAY, (0,), b"b"), {"shape": (9,)}
    ),
    "array as another class": lambda: call(
        named("torch._tensor._rebuild_from_type_v2"), RECONSTRUCT, DTYPE, (NDARRAY, (0,), b"b"), {}
    ),
    "history with attributes": lambda: call(
        named("torch._tensor._rebuild_from_type_v2"), HISTORY, HISTORY, (), {"__class__": DTYPE}
    ),
    "scalar of objects": lambda: call(named("numpy._core.multiarray.scalar"), call(DTYPE, "O8"), POINTERS[:8]),
    "scalar of objects, name by NumPy 1": lambda: call(named("numpy.core.multiarray.scalar"), call(DTYPE, "O"), 1),
    "scalar too short": lambda: call(named("numpy._core.multiarray.scalar"), dtype("f8"), b"A"),
    "scalar too long": lambda: call(named("numpy._core.multiarray.scalar"), dtype("f8"), POINTERS),
    "scalar of a text": lambda: call(named("numpy._core.multiarray.scalar"), dtype("f8"), "A" * 8),
    "scalar without content": lambda: call(named("numpy._core.multiarray.scalar"), dtype("f8")),
    "frombuffer": lambda: call(named("numpy._core.numeric._frombuffer"), POINTERS, dtype("f8"), (2,), "C"),
    "frombuffer, public": lambda: call(named("numpy.frombuffer"), POINTERS, "O"),
    "fromfile": lambda: call(named("numpy.fromfile"), "/etc/hostname"),
    "load": lambda: call(named("numpy.load"), "file.npy", None, True),
    "history with methods": lambda: build(new(HISTORY), {"statistics_methods": {"mean": RECONSTRUCT}}),
    "history of a list": lambda: history(_log_history=[1.0, 2.0]),
    "history of an array without content": lambda: history(_log_history=EMPTY, _count_history=EMPTY),
    "history of a table": lambda: history(_log_history=array((1, 2))),
    "history of different lengths": lambda: history(_count_history=array((1,), content=b"A" * 8)),
    "history without counts": lambda: history(_count_history=None),
    "history shorter than itself": lambda: history(max_length=1),
    "history of negative length": lambda: history(max_length=-1),
    "history whose length is a text": lambda: history(max_length="10"),
    "history by slots": lambda: build(new(HISTORY), (None, {"__class__": DTYPE})),
    "history gets content twice": lambda: build(history(), {"_log_history": [1]}),
    "history with arguments": lambda: call(HISTORY, [1.0], [1]),
    "history with arguments by NEWOBJ": lambda: new(HISTORY, [1.0], [1]),
    "method of a history": lambda: call(named("builtins.getattr"), HISTORY, "__init__"),
    "globals of a method": lambda: call(named("builtins.getattr"), HISTORY, "__init__.__globals__"),
    "method of something else": lambda: call(named("builtins.getattr"), DTYPE, "mean"),
    "method of an array": lambda: call(named("builtins.getattr"), array(), "mean"),
    "attribute with a default": lambda: call(named("builtins.getattr"), HISTORY, "x", RECONSTRUCT),
    "call of a statistic": lambda: call(call(named("builtins.getattr"), HISTORY, "mean"), history()),
    "bytes of a number": lambda: call(named("builtins.bytes"), 1 << 40),
    "config with arguments": lambda: call(named("yacs.config.CfgNode"), {"a": 1}),
    "call of a text": lambda: call(Op(push("print")), 1),
    "eval": lambda: call(named("builtins.eval"), "1 + 1"),
    "eval, name by Python 2": lambda: call(named("__builtin__.eval"), "1 + 1"),
    "system": lambda: call(named("os.system"), "true"),
    "system, name by Linux": lambda: call(named("posix.system"), "true"),
    "config of mmengine": lambda: call(named("mmengine.config.config.Config.fromstring"), "a = 1", ".py"),
    "our own reader": lambda: call(named("grootvl_mm.utils.safe_checkpoints.load_safely"), "file.pth"),
    "the stand-in by its name": lambda: call(named("grootvl_mm.utils.checkpoint_types.CheckpointArray"), (2,)),
}

# torch.load reads many of these: uninitialized memory, and more memory than the file has. Our own readers must refuse.
HOSTILE_TENSORS: dict[str, Callable[[], object]] = {
    "more numbers than the file has": lambda: tensor((10**6,), numbers=storage(numel=10**6)),
    "larger than its storage": lambda: tensor((1000,)),
    "much larger than its storage": lambda: tensor((10**12,)),
    "behind its storage": lambda: tensor((1,), offset=4),
    "before its storage": lambda: tensor((1,), offset=-1),
    "of a negative stride": lambda: tensor(stride=(-1,), offset=3),
    "of a large stride": lambda: tensor((2,), (2,), offset=3),
    "of a stride that overflows": lambda: tensor((5,), (2**62,)),
    "of strides that overflow to zero": lambda: tensor((3, 2), (2**61, 2**62)),
    "of a negative size": lambda: tensor((-4,)),
    "of a size that overflows": lambda: tensor((2**33, 2**33), (0, 0)),
    "of a size that overflows, with a zero": lambda: tensor((0, 2**62, 2**62), (0, 0, 0)),
    "expanded without limit": lambda: tensor((2**36,), (0,)),
    "expanded, too many of them": lambda: [tensor((2**23,), (0,)) for _ in range(3)],
    "with fewer strides": lambda: tensor((2, 2)),
    "with a size of texts": lambda: tensor(("4",)),
    "with a size of booleans": lambda: tensor((True,)),
    "with too many axes": lambda: tensor((1,) * 100, (1,) * 100),
    "of no storage": lambda: tensor(numbers=array()),
    "of another tensor": lambda: tensor(numbers=tensor()),
    "of a larger type": lambda: call(
        named("torch._utils._rebuild_tensor_v3"), storage(), 0, (4,), (1,), False, None, named("torch.float64")
    ),
    "of a type that is none": lambda: call(
        named("torch._utils._rebuild_tensor_v3"), storage(), 0, (4,), (1,), False, None, dtype("f4")
    ),
    "of old format, larger": lambda: call(named("torch._utils._rebuild_tensor"), storage(), 0, (9,), (1,)),
    "that is set again": lambda: build(tensor(), (storage(), 0, (2**36,), (0,))),
    "parameter that is set again": lambda: build(
        call(named("torch._utils._rebuild_parameter"), tensor(), False, None), (storage(), 0, (2**36,), (0,))
    ),
    "parameter of an array": lambda: call(named("torch._utils._rebuild_parameter"), array(), False, None),
    "of uninitialized memory": lambda: call(named("torch.Tensor"), 1000),
    "of uninitialized memory by NEWOBJ": lambda: new(named("torch.Tensor"), 1000),
    "of uninitialized memory, by type": lambda: call(named("torch.FloatTensor"), 1000),
    "of uninitialized memory, parameter": lambda: new(named("torch.nn.parameter.Parameter"), tensor()),
    "storage of uninitialized memory": lambda: call(named("torch.storage.UntypedStorage"), 1000),
    "storage of uninitialized memory, typed": lambda: call(named("torch.storage.TypedStorage"), 1000),
    "storage alone": lambda: storage(),
    "from an array": lambda: call(
        named("torch._utils._rebuild_device_tensor_from_numpy"), array(), named("torch.float32"), "cpu", False
    ),
    "without memory": lambda: call(
        *(named("torch._utils._rebuild_wrapper_subclass"), named("torch.Tensor"), named("torch.float32")),
        *((4,), (1,), 0, call(named("torch.serialization._get_layout"), "torch.strided"), "cpu", False),
    ),
    "meta": lambda: call(
        named("torch._utils._rebuild_meta_tensor_no_storage"), named("torch.float32"), (2**40,), (1,), False
    ),
    "quantized, larger than its storage": lambda: call(
        *(named("torch._utils._rebuild_qtensor"), storage(), 0, (10**9,), (1,)),
        *((named("torch.per_tensor_affine"), 1.0, 0), False, None),
    ),
    "sparse": lambda: call(
        named("torch._utils._rebuild_sparse_tensor"),
        call(named("torch.serialization._get_layout"), "torch.sparse_coo"),
        (tensor((1, 4), (4, 1)), tensor(), (9,), True),
    ),
    "nested": lambda: call(named("torch._utils._rebuild_nested_tensor"), tensor(), tensor(), tensor(), tensor()),
    "by a function of another kind": lambda: call(
        named("torch._tensor._rebuild_from_type_v2"), named("builtins.getattr"), named("torch.Tensor"), (1,), {}
    ),
    "of a class of another kind": lambda: call(
        *(named("torch._tensor._rebuild_from_type_v2"), named("torch._utils._rebuild_tensor_v2"), HISTORY),
        *((storage(), 0, (4,), (1,), False, None), {}),
    ),
    "as a key": lambda: {tensor(): 1},
    "in a set": lambda: call(named("builtins.set"), [tensor()]),
    "bytes that multiply": lambda: call(named("_codecs.encode"), b"A" * 100, "hex"),
    "bytes of another encoding": lambda: call(named("_codecs.encode"), "A" * 100, "utf-32"),
    "bytes that can be changed": lambda: call(named("builtins.bytearray"), 1 << 32),
}

# These can be read, as there is nothing to be gained from them; load_safely refuses them.
NO_DATA: dict[str, Callable[[], object]] = {
    "array without content": lambda: EMPTY,
    "history without content": lambda: new(HISTORY),
    "a class": lambda: [NDARRAY],
    "a function": lambda: {"state_dict": (RECONSTRUCT,)},
    "a class as a key": lambda: {named("builtins.set"): 1},
    "a function in a set": lambda: call(named("builtins.set"), [named("builtins.getattr")]),
}

_MANY = 5000


def _of_one(whole: Op, make: Callable[[Op], object]) -> tuple[Op, list]:
    """An object that is kept, and many others made of it."""
    return keep(whole, 0), [make(kept(0)) for _ in range(_MANY)]


# Each describes, by repeating a part of the file, objects of a hundred times its size and more.
HOSTILE_COPIES: dict[str, Callable[[], object]] = {
    "bytes": lambda: _of_one(Op(push("a" * _MANY)), lambda text: call(named("_codecs.encode"), text, "latin1")),
    "arrays": lambda: _of_one(
        call(named("_codecs.encode"), "a" * 8 * _MANY, "latin1"), lambda content: array((_MANY,), content=content)
    ),
    "histories": lambda: _of_one(
        array((_MANY,), content=b"a" * 8 * _MANY),
        lambda values: history(_log_history=values, _count_history=values, max_length=_MANY),
    ),
    "sets": lambda: _of_one(Op(push(list(range(_MANY)))), lambda items: call(named("builtins.set"), items)),
    "counters": lambda: _of_one(Op(push(list(range(_MANY)))), lambda items: call(named("collections.Counter"), items)),
    "sizes": lambda: _of_one(Op(push(list(range(_MANY)))), lambda items: call(named("torch.Size"), items)),
    "dictionaries": lambda: _of_one(
        Op(push(dict.fromkeys(map(str, range(_MANY))))), lambda items: call(named("collections.OrderedDict"), items)
    ),
}
