"""Makes child processes exit with their parent."""

import os
import threading
import time

_INTERVAL = 0.5  # seconds


def end_with_parent(parent: int) -> None:
    """Start a thread that exits this process soon after its parent has exited.

    Args:
        parent: Process id of the parent, which may have exited already.
    """

    def watch() -> None:
        # An orphan gets another parent process id.
        while os.getppid() == parent:
            time.sleep(_INTERVAL)
        # Without cleanup: an orphan would block forever on flushing its queue, which nobody reads.
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def end_children_with_this_process() -> None:
    """Make all processes forked from now on, and their own forks, exit with the process that forked them.

    A data loader worker of torch checks for its parent while it waits for work, but not while it waits for its results
    to be read; a training that is killed or terminated would leave workers and their memory behind. This applies to all
    forks, because mmengine starts workers before it calls any hook. Processes started by ``spawn`` do not inherit the
    pipes of others and exit by themselves.
    """
    global _registered
    if not _registered:
        _registered = True
        os.register_at_fork(before=_remember, after_in_child=lambda: end_with_parent(_forking))


def _remember() -> None:
    global _forking
    _forking = os.getpid()


_registered = False
_forking = 0
