"""Writes files whole or not at all, whatever ends the writing: an error, a full disk, Ctrl-C, SIGTERM."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A name to write to; the file gets its own name when all has gone well, and vanishes otherwise.

    Args:
        path: the file, in a folder that exists. The name to write to has the same suffix.

    Raises:
        OSError: the file cannot be written.
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
    """Let SIGTERM end the lines below by an exception, so that they clean up; it ends a process at once otherwise."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _write_through(path: Path) -> None:
    """Have a file on the disk before it gets its name, so that a loss of power leaves the old file or the new one."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
