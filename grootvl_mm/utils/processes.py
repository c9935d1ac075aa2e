"""Lets processes end with the one that started them."""

import os
import threading
import time

_INTERVAL = 0.5  # seconds


def end_with_parent(parent: int) -> None:
    """End this process, from a thread of its own, soon after the process ``parent`` has ended.

    Args:
        parent: the number of this process's parent; it may have ended already.
    """

    def watch() -> None:
        # Whoever adopts an orphan has another number.
        while os.getppid() == parent:
            time.sleep(_INTERVAL)
        # At once: an orphan would wait for ever for somebody to read what it has queued.
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()


def end_children_with_this_process() -> None:
    """Let all processes that are forked from here on, and theirs, end when the process that forked them has.

    A data worker of torch looks for its parent while it waits for work, but not while it waits for somebody to take its
    results; killed or terminated, a training leaves workers with their memory behind. It is done for all forks, because
    mmengine starts workers before any hook is called. Processes that are started otherwise (``spawn``) inherit no pipe
    of others and end by themselves.
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
