"""Safe reading and atomic writing of the checkpoint files of ``tools/model_converters``."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from mmengine.utils import is_seq_of
from torch import Tensor

from grootvl_mm.apis.whole_files import exit_on_sigterm
from grootvl_mm.utils.safe_checkpoints import CheckpointError, read_checkpoint

SUFFIX = ".pth"
HASH_DIGITS = 8


def is_state_dict(value: Any) -> bool:
    """Whether ``value`` is a non-empty dictionary of names to tensors."""
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and is_seq_of(list(value), str)
        and is_seq_of(list(value.values()), Tensor)
    )


def check_target(target: str | Path) -> Path:
    """Check up front that a checkpoint can be written to ``target``.

    Returns:
        ``target`` as a path.

    Raises:
        CheckpointError: The name does not end in ``.pth``, or its folder does not exist.
    """
    target = Path(target)
    if target.suffix != SUFFIX or target.is_dir():
        raise CheckpointError(f"the target must be the path of a {SUFFIX} file, got {target}")
    if not target.parent.is_dir():
        raise CheckpointError(f"the folder of the target {target} does not exist; create it first")
    return target


def write_checkpoint(content: Mapping[str, Any], target: str | Path) -> Path:
    """Write a checkpoint whose file name ends in its hash, as in model zoos.

    The file is written under a temporary name, then renamed. Equal contents give identical files. ``torch.hub`` and
    mmengine verify the hash when they download the file.

    Args:
        content: Passed to ``torch.save``.
        target: ``FOLDER/NAME.pth``; the file is written to ``FOLDER/NAME-01234567.pth``, where the digits are the first
            eight of its SHA-256.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: See :func:`check_target`, or the file cannot be written.
    """
    target = check_target(target)
    try:
        with exit_on_sigterm(), tempfile.TemporaryDirectory(prefix=f".{target.stem}-", dir=target.parent) as folder:
            partial = Path(folder, target.name)
            with partial.open("wb") as file:
                _save(dict(content), file)
                os.fsync(file.fileno())
            digest = hashlib.sha256(partial.read_bytes()).hexdigest()[:HASH_DIGITS]
            final = target.with_name(f"{target.stem}-{digest}{SUFFIX}")
            os.replace(partial, final)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    return final


def _save(content: dict[str, Any], file: IO[bytes]) -> None:
    """``torch.save`` into an open file; given a path, it would store the file's name and thereby change the hash.

    Raises:
        OSError: The content cannot be written. torch would only raise a RuntimeError that hides this cause.
    """
    errors = []

    class Remembering:
        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                errors.append(error)
                raise

        def flush(self) -> None:
            file.flush()

    try:
        torch.save(content, Remembering())
        file.flush()
    except RuntimeError as error:
        raise errors[0] if errors else error from None


def rewrite_checkpoint(
    source: str | Path, target: str | Path, convert: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[dict[str, Any], Path]:
    """Read a checkpoint, convert its content and write the result; a failure at any point writes nothing.

    Args:
        source: See :func:`read_checkpoint`.
        target: See :func:`write_checkpoint`.
        convert: Returns the new content given the old one, or raises :class:`CheckpointError`.

    Returns:
        The new content and the path of the new file.

    Raises:
        CheckpointError: Reading, converting or writing failed.
    """
    check_target(target)
    content = read_checkpoint(source)
    try:
        converted = convert(content)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return converted, write_checkpoint(converted, target)
