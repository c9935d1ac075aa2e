"""Restricts how ``torch.load`` reads a file as PyTorch 2.11 does with ``weights_only=True``, for older versions.

Before 2.6, PyTorch's own restricted unpickler supports too few types for mmengine's checkpoints. Before 2.11, it trusts
the size that a file states for a storage, so tensors could include memory behind their data.
"""

import pickle
import tarfile
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import Counter, OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch

# What PyTorch allows since 2.6.
NEWLY_ALLOWED = {
    "builtins.complex": complex,
    "builtins.set": set,
    "collections.Counter": Counter,
    "torch.device": torch.device,
    **{str(value): value for value in vars(torch).values() if isinstance(value, (torch.dtype, torch.qscheme))},
}
# Other instructions that create objects; neither torch.save nor mmengine use them.
_REFUSED = (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID)


def record_sizes(file: str | Path | IO[bytes], is_archive: bool) -> dict[str, int] | None:
    """The bytes of each storage in an archive by its key, or None for a file in the format of torch before 1.6.

    Raises:
        pickle.UnpicklingError: it is a TorchScript program or a tar archive, which ``torch.load`` reads in other ways.
    """
    position = None if isinstance(file, (str, Path)) else file.tell()
    sizes = None
    if is_archive:
        sizes = {}
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                _, _, name = entry.filename.lower().partition("/")  # torch looks names up in any case
                if name == "constants.pkl":
                    raise pickle.UnpicklingError("the checkpoint holds a TorchScript program")
                if name.startswith("data/"):
                    sizes[name[5:]] = min(entry.file_size, sizes.get(name[5:], entry.file_size))
    elif tarfile.is_tarfile(file):
        raise pickle.UnpicklingError("the checkpoint holds a tar archive")
    if position is not None:
        file.seek(position)
    return sizes


def restricted_pickle(allowed: dict[str, Any], sizes: dict[str, int] | None) -> SimpleNamespace:
    """A ``pickle_module`` for ``torch.load`` that uses only allowed objects.

    Args:
        allowed: functions and classes by their full names. A file can look up only these, call only these, and set the
            state of only their instances and of ordered dictionaries.
        sizes: see :func:`record_sizes`; no storage may be larger.
    """

    def check(value: Any) -> None:
        if not any(value is one for one in allowed.values()):
            raise pickle.UnpicklingError(f"the checkpoint asks for {value!r}"[:200])

    class Unpickler(pickle._Unpickler):
        dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if bytes([code]) not in _REFUSED}

        def find_class(self, module: str, name: str) -> Any:
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            if f"{module}.{name}" not in allowed:
                raise pickle.UnpicklingError(f"Unsupported class {module}.{name}")
            return allowed[f"{module}.{name}"]

        def load_reduce(self) -> None:
            check(self.stack[-2])
            super().load_reduce()

        def load_newobj(self) -> None:
            check(self.stack[-2])
            super().load_newobj()

        def load_build(self) -> None:
            if type(self.stack[-2]) is not OrderedDict:
                check(type(self.stack[-2]))
            super().load_build()

        def load_binpersid(self) -> None:
            kind, storage, key, _, numel, *_ = self.stack[-1]
            if kind not in ("storage", b"storage"):
                raise pickle.UnpicklingError(f"the checkpoint asks for {kind!r}"[:200])
            if sizes is not None and not 0 <= numel * storage.dtype.itemsize <= sizes[key.lower()]:
                raise pickle.UnpicklingError(f"the checkpoint holds a storage of {numel} numbers, larger than its data")
            super().load_binpersid()

        dispatch |= {
            pickle.REDUCE[0]: load_reduce,
            pickle.NEWOBJ[0]: load_newobj,
            pickle.BUILD[0]: load_build,
            pickle.BINPERSID[0]: load_binpersid,
        }

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return SimpleNamespace(__name__=__name__, Unpickler=Unpickler, load=load)
