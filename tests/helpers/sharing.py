"""Shares expensive set-up between the worker processes of pytest-xdist."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from filelock import FileLock

T = TypeVar("T")


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], T]) -> T:
    """The result of ``make`` for a new folder: the first process of a run to call it computes it, the others wait.

    Args:
        factory: pytest's factory of temporary folders.
        name: identifies the result.
        make: fills the folder, which all processes may read but none may change later; its result must be picklable.
    """
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    result = shared / f"{name}.pickle"
    with FileLock(f"{result}.lock"):
        if not result.exists():
            content = pickle.dumps(make(factory.mktemp(name)))
            result.write_bytes(content)
    return pickle.loads(result.read_bytes())
