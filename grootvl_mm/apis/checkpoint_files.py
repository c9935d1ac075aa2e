"""Reads and writes the checkpoint files of ``tools/model_converters``: safely, whole or not at all."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.utils import is_seq_of
from torch import Tensor

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
    """Check, before any work is done, that a checkpoint can be written to ``target``.

    Returns:
        ``target`` as a path.

    Raises:
        CheckpointError: The name does not end in ``.pth``, or the folder does not exist.
    """
    target = Path(target)
    if target.suffix != SUFFIX or target.is_dir():
        raise CheckpointError(f"the target {target} must be the name of a {SUFFIX} file")
    if not target.parent.is_dir():
        raise CheckpointError(f"the folder of the target {target} does not exist; make it first")
    return target


def write_checkpoint(content: Mapping[str, Any], target: str | Path) -> Path:
    """Write a checkpoint under a name that ends in a part of its hash, as model zoos name them.

    The file is complete when it gets its name. Equal contents give equal files. ``torch.hub`` and mmengine can check
    the hash when they download it.

    Args:
        content: What ``torch.save`` shall write.
        target: ``FOLDER/NAME.pth``; the file becomes ``FOLDER/NAME-01234567.pth``, with the first eight digits of its
            SHA-256.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: As :func:`check_target`, and when the file cannot be written.
    """
    target = check_target(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        # Through an open file: given a path, torch.save would write the path's name into the file and so its hash.
        with partial.open("wb") as file:
            torch.save(dict(content), file)
        digest = hashlib.sha256(partial.read_bytes()).hexdigest()[:HASH_DIGITS]
        final = target.with_name(f"{target.stem}-{digest}{SUFFIX}")
        os.replace(partial, final)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(f"cannot write {target}: {str(error).splitlines()[0]}") from error
    finally:
        partial.unlink(missing_ok=True)
    return final


def rewrite_checkpoint(
    source: str | Path, target: str | Path, convert: Callable[[dict[str, Any]], dict[str, Any]]
) -> tuple[dict[str, Any], Path]:
    """Read a checkpoint, convert its content and write the result; nothing is written unless all of it works.

    Args:
        source: As for :func:`read_checkpoint`.
        target: As for :func:`write_checkpoint`.
        convert: Makes the new content of the old one, or raises :class:`CheckpointError`.

    Returns:
        The new content, and the path of the new file.

    Raises:
        CheckpointError: Something of it failed.
    """
    check_target(target)
    content = read_checkpoint(source)
    try:
        converted = convert(content)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error
    return converted, write_checkpoint(converted, target)
