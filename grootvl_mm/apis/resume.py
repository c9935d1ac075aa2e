"""Finds the checkpoint from which an interrupted run goes on, and its seed."""

import zipfile
from pathlib import Path

from grootvl_mm.utils.safe_checkpoints import load_safely


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
    # A zip archive, torch.save's format, ends with its directory: a cut-off one is not recognized.
    return next((path for path in reversed(by_age) if zipfile.is_zipfile(path)), None)


def read_seed(checkpoint: str | Path) -> int | None:
    """Return the seed of the run that wrote a training checkpoint, or None if the file does not tell."""
    # Memory-mapped: the weights stay on disk.
    content = load_safely(checkpoint, mmap=True)
    return content.get("meta", {}).get("seed")
