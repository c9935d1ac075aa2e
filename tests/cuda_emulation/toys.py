"""Calls the kernels of ``toys.cu``. As a program: ``python -m tests.cuda_emulation.toys LIBRARY NAME [A [B]]``."""

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path


class _Shape(ctypes.Structure):
    _fields_ = [("grid", ctypes.c_int * 3), ("block", ctypes.c_int * 3), ("shared_bytes", ctypes.c_int)]


class Toys:
    """The compiled kernels."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def run(
        self,
        name: str,
        length: int,
        grid: Sequence[int] = (1, 1, 1),
        block: Sequence[int] = (32, 1, 1),
        values: Sequence[int] = (),
        shared_bytes: int = 0,
        a: int = 0,
        b: int = 0,
        seed: int = 0,
    ) -> list[int]:
        """Launch a kernel and return what it has written into ``length`` integers that were 0.

        Raises:
            RuntimeError: the launch failed.
        """
        os.environ["GROOTVL_EMULATION_SEED"] = str(seed)
        result = (ctypes.c_int * length)()
        shape = _Shape((ctypes.c_int * 3)(*grid), (ctypes.c_int * 3)(*block), shared_bytes)
        function = getattr(self._library, f"run_{name}")
        function.restype = ctypes.c_char_p
        message = function(ctypes.byref(shape), (ctypes.c_int * len(values))(*values), result, a, b)
        if message:
            raise RuntimeError(message.decode())
        return list(result)


if __name__ == "__main__":
    library, name, *numbers = sys.argv[1:]
    Toys(Path(library)).run(name, 32, shared_bytes=32, **dict(zip("ab", map(int, numbers), strict=False)))
