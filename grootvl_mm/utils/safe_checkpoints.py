"""Reads checkpoints safely: nothing in a file is executed, and damaged files are told from whole ones.

From torch 2.6 on, ``torch.load`` refuses everything but tensors and plain containers (``weights_only=True``). The
checkpoints of mmengine's Runner also hold their message hub: :class:`~mmengine.logging.HistoryBuffer` objects, NumPy
arrays and NumPy scalars, which are therefore refused on ``--resume`` and ``test``. Exactly these are allowed here, by
the stand-ins of :mod:`grootvl_mm.utils.checkpoint_types`, and one more: the config that the published training code
puts into its checkpoints, which is read as a dictionary.
"""

import functools
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from mmengine.utils import is_seq_of

from grootvl_mm.utils import checkpoint_types as stand_ins


class CheckpointError(ValueError):
    """A checkpoint file that cannot be read, used or written; the message is one line for the user."""


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load`` read what mmengine's (and the published) checkpoints hold, through stand-ins.

    ``weights_only`` is never turned off: a checkpoint with any other type is still refused.
    Before torch 2.6, where safe loading is not the default, nothing is done. Calling it twice
    does no harm.
    """
    if torch.__version__ < "2.6":
        return
    # The two functions are private to NumPy and moved in version 2; files name them by either path.
    moved = [
        (function, f"{module}.multiarray.{name}")
        for module in ("numpy.core", "numpy._core")
        for function, name in ((stand_ins.reconstruct, "_reconstruct"), (stand_ins.scalar, "scalar"))
    ]
    torch.serialization.add_safe_globals(
        [
            (stand_ins.CheckpointHistory, "mmengine.logging.history_buffer.HistoryBuffer"),
            (stand_ins.history_statistic, "builtins.getattr"),
            (stand_ins.empty_bytes, "builtins.bytes"),
            (stand_ins.ConfigNode, "yacs.config.CfgNode"),
            (stand_ins.CheckpointArray, "numpy.ndarray"),
            (stand_ins.CheckpointDtype, "numpy.dtype"),
            *moved,
        ]
    )


@contextmanager
def without_stand_ins() -> Iterator[None]:
    """Take our stand-ins off torch's list for some lines, in which another library allows NumPy's own types.

    With both on the list, torch takes either by chance, and a mixture reads nothing.
    """
    if torch.__version__ < "2.6":
        yield
        return
    allowed = torch.serialization.get_safe_globals()
    ours = [entry for entry in allowed if isinstance(entry, tuple) and entry[0].__module__ == stand_ins.__name__]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([entry for entry in allowed if entry not in ours])
    try:
        yield
    finally:
        torch.serialization.add_safe_globals(ours)


def load_safely(path: str | Path | IO[bytes], **options: Any) -> Any:
    """Read a file of ``torch.save``, onto the CPU unless told otherwise, with what mmengine's checkpoints hold only.

    Args:
        path: the file, or the opened file.
        options: of ``torch.load``.

    Raises:
        pickle.UnpicklingError: the file holds objects of other stand_ins.
    """
    # Again: a host or a user may have cleared torch's list.
    allow_mmengine_checkpoints()
    return stand_ins.plain(torch.load(path, **{"map_location": "cpu", **options, "weights_only": True}))


def read_checkpoint(path: str | Path, **options: Any) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in the file is executed (``weights_only``).

    Args:
        path: File that ``torch.save`` wrote. Beside tensors it may hold what mmengine puts into its checkpoints and
            the configs of yacs, which come as dictionaries.
        options: of ``torch.load``.

    Returns:
        The content, names to values.

    Raises:
        CheckpointError: There is no such file, it is damaged, it holds objects that safe loading refuses, or its
            content is no dictionary of names.
    """
    path = Path(path)
    check_sums(path)
    try:
        content = load_safely(path, **options)
    except pickle.UnpicklingError as error:
        refused = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        if refused:
            raise CheckpointError(
                f"{path} holds objects of {refused[1]}, which safe loading refuses; save its weights alone with the "
                "code that wrote it: torch.save(weights, FILE)"
            ) from error
        raise _damaged(path, error) from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        # Broken bytes end in errors of many types, from the archive's reader, the unpickler or the tensors.
        raise _damaged(path, error) from error
    if not isinstance(content, Mapping) or not is_seq_of(list(content), str):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a dictionary of names")
    return content


def check_sums(path: str | Path) -> None:
    """Compare a file's content with the check sums in the archive, which torch writes but does not look at.

    Files of other formats than torch's archive (those of torch before 1.6) have none, and pass.

    Raises:
        CheckpointError: There is no such file, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; give a checkpoint file")
    try:
        status = path.stat()
        _check_sums(os.path.realpath(path), status.st_size, status.st_mtime_ns, status.st_ino)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:
        raise _damaged(path, error) from error


@functools.lru_cache(maxsize=64)
def _check_sums(path: str, size: int, *version: int) -> None:
    """Raise an error if a file is damaged; that it is whole is found out once for each version of the file."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                raise zipfile.BadZipFile("the archive has no end")
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # torch stores: what it writes is as large as the file. Unpacking anything else could fill the memory.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise zipfile.BadZipFile("its entries are compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > size:
            raise zipfile.BadZipFile("its entries are larger than the file")
        changed = archive.testzip()
    if changed is not None:
        raise zipfile.BadZipFile(f"the check sum of {changed} is wrong")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    # torch puts advice around the error that there was.
    text = str(error).strip().rpartition("WeightsUnpickler error: ")[2]
    # Errors such as KeyError(101) say nothing but their type.
    reason = text.splitlines()[0].split(". ")[0] if " " in text else type(error).__name__
    return CheckpointError(f"{path} is no checkpoint, or is cut off or damaged: {reason}")
