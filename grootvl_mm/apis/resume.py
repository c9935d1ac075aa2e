"""Finds the checkpoint from which an interrupted run goes on, and its seed."""

import logging
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

from grootvl_mm.engine.hooks.untrusted_checkpoint_hook import check_training_checkpoint
from grootvl_mm.utils.safe_checkpoints import CheckpointError, check_sums, read_checkpoint


def find_resumable_checkpoint(work_dir: str | Path) -> Path | None:
    """Return the newest complete training checkpoint of a work dir, or None if there is none.

    mmengine writes checkpoints, and the file ``last_checkpoint`` after them, in place. A process
    that is killed meanwhile leaves a cut-off file or a pointer that is empty or behind; so the
    files themselves are looked at, and those that are not whole are passed over.

    Args:
        work_dir: Folder with ``iter_N.pth`` or ``epoch_N.pth`` and maybe ``last_checkpoint``,
            whose target is considered too (``CheckpointHook`` may write to another folder).
    """
    work_dir = Path(work_dir)
    found = {*work_dir.glob("iter_*.pth"), *work_dir.glob("epoch_*.pth")}
    pointer = work_dir / "last_checkpoint"
    if pointer.is_file() and (target := pointer.read_text().strip()):
        found.add(Path(target))
    by_age = sorted((path for path in found if path.is_file()), key=lambda path: path.stat().st_mtime)
    return next((path for path in reversed(by_age) if _is_whole(path)), None)


def _is_whole(path: Path) -> bool:
    # A zip archive, torch.save's format, ends with its directory: a cut-off one is not recognized.
    if not zipfile.is_zipfile(path):
        return False
    try:
        check_sums(path)
    except CheckpointError as error:
        print_log(f"{error}; an older one is taken.", "current", logging.WARNING)
        return False
    return True


def read_seed(checkpoint: str | Path) -> int | None:
    """Return the seed of the run that wrote a training checkpoint, or None if the file does not tell.

    Raises:
        CheckpointError: The file is damaged.
    """
    meta = _read_mapped(checkpoint).get("meta")
    seed = meta.get("seed") if isinstance(meta, Mapping) else None
    return seed if type(seed) is int else None


def check_resumable(checkpoint: str | Path) -> None:
    """Check that a training can go on from a file.

    Raises:
        CheckpointError: The file is damaged, or no checkpoint of a training.
    """
    try:
        check_training_checkpoint(_read_mapped(checkpoint))
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(checkpoint) in str(error) else f"{checkpoint}: {error}") from error


def _read_mapped(checkpoint: str | Path) -> dict[str, Any]:
    # Memory-mapped: the weights stay on disk. Files of torch before 1.6 cannot be.
    return read_checkpoint(checkpoint, mmap=zipfile.is_zipfile(checkpoint))
