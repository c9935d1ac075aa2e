"""Reads and writes the checkpoint files of ``tools/model_converters``: safely, whole or not at all."""

import hashlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.utils import is_seq_of
from torch import Tensor

from grootvl_mm.models.published_checkpoints import CheckpointError
from grootvl_mm.utils.safe_checkpoints import load_safely

SUFFIX = ".pth"
HASH_DIGITS = 8


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in the file is executed (``weights_only``).

    Args:
        path: File that ``torch.save`` wrote. Beside tensors it may hold what mmengine puts into its checkpoints and
            the configs of yacs, which come as dictionaries.

    Returns:
        The content, names to values.

    Raises:
        CheckpointError: There is no such file, it is damaged, it holds objects that safe loading refuses, or its
            content is no dictionary of names.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; give a checkpoint file")
    try:
        _check_sums(path)
        content = load_safely(path)
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
    return dict(content)


def _check_sums(path: Path) -> None:
    """Compare the content with the check sums in the archive, which torch writes but does not look at."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            changed = archive.testzip()
        if changed is not None:
            raise zipfile.BadZipFile(f"the check sum of {changed} is wrong")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    text = str(error).strip()
    # Errors such as KeyError(101) say nothing but their type.
    reason = text.splitlines()[0].split(". ")[0] if " " in text else type(error).__name__
    return CheckpointError(f"{path} is no checkpoint, or is cut off or damaged: {reason}")


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
