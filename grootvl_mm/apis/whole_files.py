"""Atomic file writing: complete or not at all, also on errors, a full disk, Ctrl-C and SIGTERM."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to; on success it is renamed to ``path``, on failure removed.

    Args:
        path: The file, in an existing folder. The temporary path has the same suffix.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    with exit_on_sigterm():
        try:
            yield partial
            _write_through(partial)
            os.replace(partial, path)
        finally:
            with suppress(OSError):  # nothing was written to a read-only folder
                partial.unlink(missing_ok=True)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into ``SystemExit`` within the block, so that its cleanup runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _write_through(path: Path) -> None:
    """Flush a file to disk before it is renamed, so that a power loss leaves either the old file or the new one."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
