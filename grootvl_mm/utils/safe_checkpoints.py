"""Safe checkpoint loading: no code from a file is executed, and damaged files are detected.

Since torch 2.6, ``torch.load`` refuses everything but tensors and plain containers (``weights_only=True``). Checkpoints
of mmengine's Runner also contain a message hub with :class:`~mmengine.logging.HistoryBuffer` objects, NumPy arrays and
NumPy scalars, and would therefore be refused on ``--resume`` and ``test``. This module allows exactly these types,
through the stand-ins of :mod:`grootvl_mm.utils.checkpoint_types`, and the yacs config in checkpoints of the published
training code, which is read as a dictionary. When our own code reads a file, the stand-ins of
:mod:`grootvl_mm.utils.checkpoint_tensors` also build its tensors. Before torch 2.11, our own code also restricts the
pickle itself, through :mod:`grootvl_mm.utils.safe_unpickler`.
"""

import functools
import os
import pickle
import re
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from mmengine.utils import is_seq_of
from torch import UntypedStorage, _weights_only_unpickler

from grootvl_mm.utils import checkpoint_types
from grootvl_mm.utils.checkpoint_tensors import limited_copies, strict_globals
from grootvl_mm.utils.safe_unpickler import NEWLY_ALLOWED, record_sizes, restricted_pickle

# Records at the end of an archive: signature, numbers of disks and entries, size and offset of the directory, comment.
# Zip64 archives also have a locator (signature, disk, offset of the zip64 end record, disks) and that end record.
_END, _LOCATOR, _LARGE_END = struct.Struct("<4s4H2IH"), struct.Struct("<4sIQI"), struct.Struct("<4sQ2H2I4Q")
_ARCHIVE = b"PK\3\4"  # by which torch distinguishes an archive from a file of torch before 1.6


class CheckpointError(ValueError):
    """A checkpoint cannot be read, used or written; the message is one line for the user."""


# torch looks up every name in a file here, before the types that were registered by add_safe_globals.
_torchs_own = _weights_only_unpickler._get_allowed_globals
_reading = threading.local()
# Whether ``weights_only=True`` is the default, and whether it prevents tensors from reading memory behind their data.
_IS_DEFAULT, _IS_STRICT = (torch.__version__ >= version for version in ("2.6", "2.11"))


@functools.cache
def _for_everybody() -> dict[str, Any]:
    return {**_torchs_own(), **checkpoint_types.STAND_INS}


@functools.cache
def _for_checkpoints() -> dict[str, Any]:
    allowed = _torchs_own() if _IS_DEFAULT else {**_torchs_own(), **NEWLY_ALLOWED}
    return {**strict_globals(allowed), **checkpoint_types.STAND_INS}


def _allowed_globals() -> dict[str, Any]:
    return _for_checkpoints() if getattr(_reading, "strictly", False) else _for_everybody()


def allow_mmengine_checkpoints() -> None:
    """Make ``torch.load`` accept the types in mmengine's and the authors' checkpoints, through stand-ins.

    ``weights_only`` is never turned off: a checkpoint with any other type is still refused.

    The stand-ins are not registered by ``torch.serialization.add_safe_globals``. Other libraries, such as Hugging
    Face's Trainer and onedl-mmengine, temporarily register NumPy's own types there; which of two types with the same
    name torch uses is then arbitrary, and a mixture cannot read any file. The stand-ins take precedence over those
    types, so a file never gets access to them.

    Does nothing before torch 2.6, where safe loading is not the default. Calling it again has no effect.
    """
    if _IS_DEFAULT:
        _weights_only_unpickler._get_allowed_globals = _allowed_globals


@contextmanager
def _strictly() -> Iterator[None]:
    """Within the block, this thread also reads tensors through stand-ins."""
    _reading.strictly = True
    try:
        yield
    finally:
        _reading.strictly = False


def load_safely(path: str | Path | IO[bytes], **options: Any) -> Any:
    """Read a file written by ``torch.save``, by default to the CPU, if it has only the types of mmengine's checkpoints.

    Args:
        path: path or open file.
        options: arguments of ``torch.load``. Files of torch before 1.6 are always read to the CPU.

    Raises:
        pickle.UnpicklingError: the file contains objects of other types, or tensors larger than their data.
    """
    path = str(path) if isinstance(path, Path) else path  # mmap of old versions needs a string
    options = {"map_location": "cpu", **options, "weights_only": _IS_STRICT}
    start, size = _look_at(path)
    if not _IS_STRICT:
        options["pickle_module"] = restricted_pickle(_for_checkpoints(), record_sizes(path, start == _ARCHIVE))
    if start != _ARCHIVE:
        options["map_location"] = _zeroed(size)
    with _strictly(), limited_copies(size):
        content = torch.load(path, **options)
    return checkpoint_types.plain(content)


def _look_at(path: str | Path | IO[bytes]) -> tuple[bytes, int]:
    """The first bytes of a file from its current position, and the number of remaining bytes."""
    if isinstance(path, (str, Path)):
        with open(path, "rb") as file:
            return _look_at(file)
    position = path.tell()
    start, end = path.read(len(_ARCHIVE)), path.seek(0, os.SEEK_END)
    path.seek(position)
    return start, end - position


def _zeroed(size: int) -> Callable[[UntypedStorage, str], UntypedStorage]:
    """A ``map_location`` that zeroes each storage of an old file; torch then fills those for which there are data."""
    left = size

    def clear(storage: UntypedStorage, location: str) -> UntypedStorage:
        nonlocal left
        left -= storage.nbytes()
        if left < 0:
            raise pickle.UnpicklingError(f"the checkpoint holds tensors that are larger than the file of {size} bytes")
        return storage.fill_(0)

    return clear


def read_checkpoint(path: str | Path, **options: Any) -> dict[str, Any]:
    """Read a checkpoint, by default to the CPU; no code from the file is executed (``weights_only``).

    Args:
        path: File written by ``torch.save``. Besides tensors, it may contain the types in mmengine's checkpoints, and
            yacs configs, which are returned as dictionaries.
        options: Arguments of ``torch.load``.

    Returns:
        The content, a dictionary from names to values.

    Raises:
        CheckpointError: The file does not exist, is damaged, contains objects that safe loading refuses, or is not a
            dictionary with string keys.
    """
    path = Path(path)
    check_sums(path)
    try:
        content = load_safely(path, **options)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} holds objects of {refused[1]}, which safe loading refuses; with the code that wrote it, save "
                "only its weights: torch.save(weights, FILE)"
            ) from error
        refused = re.search(r"the checkpoint (?:holds|asks) .*", str(error))
        if refused:
            raise CheckpointError(f"{path}: {refused[0]}") from error
        raise _damaged(path, error) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        # Damaged files raise errors of many types: from the zip reader, the unpickler or the tensors.
        raise _damaged(path, error) from error
    if not isinstance(content, Mapping) or not is_seq_of(list(content), str):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dictionary with string keys")
    return content


def check_sums(path: str | Path) -> None:
    """Verify the checksums in a checkpoint file, which torch writes but does not check.

    Files in other formats (torch before 1.6) have no checksums and always pass.

    Raises:
        CheckpointError: The file does not exist or is damaged.
    """
    path = Path(path)
    if not os.path.isfile(path):  # Path.is_file raises an error for some impossible names
        raise CheckpointError(
            f"{path} {'is a folder' if os.path.isdir(path) else 'does not exist'}; give a checkpoint file"
        )
    try:
        status = path.stat()
        _check_sums(os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ino)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        raise _damaged(path, error) from error


@functools.lru_cache(maxsize=64)
def _check_sums(path: str, size: int, *version: int) -> None:
    """Raise an error if a file is damaged; cached for each version of the file that is intact."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                raise zipfile.BadZipFile("the archive has no end")
        return
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        _check_directory(file, size, len(archive.comment))
        entries = archive.infolist()
        # torch does not compress, so the entries are as large as the file; decompressing could exhaust the memory.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise zipfile.BadZipFile("its entries are compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > size:
            raise zipfile.BadZipFile("its entries are larger than the file")
        changed = archive.testzip()
    if changed is not None:
        raise zipfile.BadZipFile(f"the checksum of {changed} is wrong")


def _check_directory(file: IO[bytes], size: int, comment: int) -> None:
    """Raise an error if the archive's directory does not end where its end record begins.

    Python's reader looks for the directory there; torch's reader looks at the offset in the end record. In an archive
    with two directories, the checked entries would not be those that torch reads.
    """
    end = size - _END.size - comment
    file.seek(end)
    *_, length, start, _ = _END.unpack(file.read(_END.size))
    locator = end - _LOCATOR.size
    file.seek(max(locator, 0))
    signature, _, large, _ = _LOCATOR.unpack(file.read(_LOCATOR.size))
    if signature == b"PK\6\7":  # zip64: larger than 4 GiB, or written in this format anyway
        end = locator - _LARGE_END.size
        if large != end:
            raise zipfile.BadZipFile("its end record is not where it should be")
        file.seek(end)
        *_, length, start = _LARGE_END.unpack(file.read(_LARGE_END.size))
    if start + length != end:
        raise zipfile.BadZipFile("its directory is not where it should be")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    # torch wraps the original error in advice.
    text = str(error).strip().rpartition("WeightsUnpickler error: ")[2].strip()
    # Only the type of errors such as KeyError(101) is informative.
    reason = text.splitlines()[0].split(". ")[0][:300] if " " in text else type(error).__name__
    return CheckpointError(f"{path} is not a checkpoint, or is damaged: {reason}")
