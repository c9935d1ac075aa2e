"""Finds the checkpoint to resume from, and its seed."""

import logging
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

from grootvl_mm.engine.hooks.untrusted_checkpoint_hook import check_training_checkpoint
from grootvl_mm.utils.safe_checkpoints import CheckpointError, check_sums, read_checkpoint


def find_resumable_checkpoint(work_dir: str | Path) -> Path | None:
    """Return the newest complete training checkpoint of a work dir, or None if there is none.

    mmengine writes checkpoints in place, and then the file ``last_checkpoint``. A process that is killed meanwhile
    leaves a truncated checkpoint, or an empty or outdated ``last_checkpoint``. So the checkpoints themselves are
    checked, and incomplete ones are skipped.

    Args:
        work_dir: Folder with ``iter_N.pth`` or ``epoch_N.pth``. The checkpoint named in its ``last_checkpoint``, which
            may be in another folder, is a candidate too.
    """
    work_dir = Path(work_dir)
    found = {*work_dir.glob("iter_*.pth"), *work_dir.glob("epoch_*.pth")}
    # A truncated or overwritten name may contain bytes that no file name can have.
    with suppress(OSError, ValueError):
        target = Path((work_dir / "last_checkpoint").read_text().strip())
        if target.is_file():
            found.add(target)
    by_age = sorted((path for path in found if path.is_file()), key=lambda path: path.stat().st_mtime)
    return next((path for path in reversed(by_age) if _is_whole(path)), None)


def _is_whole(path: Path) -> bool:
    # torch.save writes a zip archive, whose directory is at its end: a truncated file is not recognized as one.
    if not zipfile.is_zipfile(path):
        return False
    try:
        check_sums(path)
    except CheckpointError as error:
        print_log(f"{error}; trying an older one.", "current", logging.WARNING)
        return False
    return True


def read_seed(checkpoint: str | Path) -> int | None:
    """Return the seed of the run that wrote a training checkpoint, or None if the file does not hold it.

    Raises:
        CheckpointError: The file is damaged.
    """
    meta = _read_mapped(checkpoint).get("meta")
    seed = meta.get("seed") if isinstance(meta, Mapping) else None
    return seed if type(seed) is int else None


def check_resumable(checkpoint: str | Path) -> None:
    """Check that a training can be resumed from a file.

    Raises:
        CheckpointError: The file is damaged or not a training checkpoint.
    """
    try:
        check_training_checkpoint(_read_mapped(checkpoint))
    except CheckpointError as error:
        raise CheckpointError(str(error) if str(checkpoint) in str(error) else f"{checkpoint}: {error}") from error


def _read_mapped(checkpoint: str | Path) -> dict[str, Any]:
    # Memory-mapped, so that the weights stay on disk; impossible for the format of torch before 1.6.
    return read_checkpoint(checkpoint, mmap=zipfile.is_zipfile(checkpoint))
