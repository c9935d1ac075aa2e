"""Runs scripts of this repository in forks of this process, so that slow packages are imported only once."""

import contextlib
import os
import runpy
import signal
import sys
import time
import traceback
from pathlib import Path

from fault_campaign.results import ROOT, TO_END, TO_START

# Packages used by tools/train.py for a classifier, and by the converters.
PRELOADED = (
    *("mmengine.runner", "mmengine.visualization", "mmpretrain.datasets", "mmpretrain.engine", "mmpretrain.evaluation"),
    *("mmpretrain.models", "mmpretrain.visualization", "grootvl_mm.apis.cli", "skimage.data"),
)


def preload() -> None:
    """Import the packages of the scripts."""
    import importlib

    import torch

    torch.set_num_threads(1)  # forks do not inherit the threads of a pool
    for name in PRELOADED:
        importlib.import_module(name)


class Fork:
    """A script that runs in a forked process, in a new session.

    Args:
        script: Path relative to the root of the repository.
        arguments: Command line arguments.
        folder: Working directory, where the output is written to a file.
        name: Name of that file.
    """

    def __init__(self, script: str, *arguments: object, folder: Path, name: str = "output") -> None:
        self.output = folder / f"{name}.txt"
        self.status: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._become(script, arguments, folder)

    def _become(self, script: str, arguments: tuple, folder: Path) -> None:
        status = 1
        try:
            os.setsid()
            file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.chdir(folder)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.argv = [script, *map(str, arguments)]
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as stopped:
            status = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
            if isinstance(stopped.code, str):
                os.write(2, stopped.code.encode())
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """The exit status, negative after a signal, or None while running."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def wait(self, seconds: float = TO_START) -> int:
        """Wait for the end.

        Raises:
            TimeoutError: The script takes longer.
        """
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                self.end_all()
                raise TimeoutError(f"{sys.argv} did not end in {seconds} s")
            time.sleep(0.02)
        return self.status

    def stop_after(self, seconds: float, stop: signal.Signals) -> bool:
        """Send a signal after some time; return False if the script has ended before then."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.poll() is not None:
                return False
            time.sleep(0.005)
        if self.poll() is not None:
            return False
        os.kill(self.pid, stop)
        self.wait(TO_END)
        return True

    def wait_for_descendants(self, seconds: float = TO_END) -> float | None:
        """Wait for all processes of the session; return the seconds, or kill them and return None on timeout."""
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            if not in_session(self.pid):
                return time.monotonic() - start
            time.sleep(0.05)
        self.end_all()
        return None

    def end_all(self) -> None:
        """Kill the remaining processes of the session."""
        for pid in in_session(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def said(self) -> str:
        """The last characters of the output, on one line."""
        return " ".join(self.output.read_text(errors="replace").split())[-300:]


def in_session(leader: int) -> list[int]:
    """The processes of a session, without zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            if entry.name.isdigit():
                state, _, _, session, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(session) == leader and state != "Z":
                    found.append(int(entry.name))
    return found
