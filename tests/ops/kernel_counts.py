"""Resource usage and instruction counts of the compiled CUDA kernels.

Without a GPU, counts replace times. Instructions are counted in the disassembly: all instructions of a loop's body,
although branches may skip some, divided by the rows of 32 channels that an iteration processes.
"""

import importlib.util
import os
import re
import shutil
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from torch.utils import cpp_extension

from tests.cuda_emulation.build import BUILD, CSRC, digest, made_once, run

# Limits of a multiprocessor of compute capability 9.0: registers, bytes of shared memory, warps; shared memory that is
# reserved for each block.
REGISTERS, SHARED_BYTES, MOST_WARPS, RESERVED_BYTES = 65536, 233472, 64, 1024
WARP, ROW_LANES, PACK = 32, 4, 4


def cuobjdump() -> str | None:
    """The path of ``cuobjdump`` in the CUDA toolkit or in Triton, or None."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(cpp_extension.CUDA_HOME or "", "bin")]
    folders += [Path(place, "backends", "nvidia", "bin") for place in triton.submodule_search_locations or ()]
    return shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders))) or shutil.which("cuobjdump")


class Usage(NamedTuple):
    """Registers and stack bytes per thread, and bytes of static shared memory per block."""

    registers: int
    stack: int
    shared: int

    def resident_warps(self, threads: int, dynamic_bytes: int = 0) -> int:
        """The resident warps of a multiprocessor with this number of threads per block."""
        # Registers are allocated per warp in units of 256, eight per thread.
        of_a_warp = -(-self.registers // 8) * 8 * WARP
        warps = threads // WARP
        blocks = min(
            REGISTERS // (of_a_warp * warps),
            SHARED_BYTES // max(self.shared + dynamic_bytes, RESERVED_BYTES),
            MOST_WARPS // warps,
        )
        return blocks * warps


class Loop(NamedTuple):
    """The first and the last instruction of a loop's body."""

    first: int
    last: int


class Code:
    """The instructions of a kernel.

    Args:
        listing: the kernel's section in the output of ``cuobjdump -sass``.
    """

    def __init__(self, listing: str) -> None:
        found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", listing)
        self._index = {int(address, 16): i for i, (address, _) in enumerate(found)}
        self.instructions = [text for _, text in found]

    @cached_property
    def loops(self) -> list[Loop]:
        """All loops. Code after the last exit is for rare cases and jumps back from there, so it is not a loop."""
        end = max(i for i, text in enumerate(self.instructions) if text == "EXIT")
        found: dict[int, int] = {}
        for i, text in enumerate(self.instructions[:end]):
            jump = re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)$", text)
            if jump and self._index[int(jump[1], 16)] < i:
                found[self._index[int(jump[1], 16)]] = i
        return [Loop(*loop) for loop in found.items()]

    def count(self, loop: Loop, pattern: str) -> int:
        """The number of a loop's instructions that match a pattern."""
        return sum(bool(re.search(pattern, text)) for text in self.instructions[loop.first : loop.last + 1])

    def smallest_loops(self, *patterns: str, without: str = "^$") -> list[Loop]:
        """The innermost loops with matches of all ``patterns`` but none of ``without``."""
        having = [
            loop
            for loop in self.loops
            if all(self.count(loop, pattern) for pattern in patterns) and not self.count(loop, without)
        ]
        return [
            loop
            for loop in having
            if not any(other != loop and loop.first <= other.first and other.last <= loop.last for other in having)
        ]

    def per_row(self, loops: list[Loop], pattern: str, matches_of_row: int) -> float:
        """Instructions per row of 32 channels in loops with ``matches_of_row`` matches of a pattern per lane's row."""
        lane_rows = WARP // ROW_LANES * ROW_LANES * PACK / 32
        return sum(
            (loop.last - loop.first + 1) * matches_of_row / (self.count(loop, pattern) * lane_rows) for loop in loops
        )


def compile_cubin(stem: str) -> Path:
    """Compile a source of ``ops/csrc/cuda`` for compute capability 9.0, or return the cached file.

    Raises:
        RuntimeError: it does not compile; the message includes the compiler's output.
    """
    source = CSRC / "cuda" / f"{stem}.cu"
    include = [flag for path in (CSRC, *cpp_extension.include_paths("cuda")) for flag in ("-isystem", str(path))]
    command = [str(Path(cpp_extension.CUDA_HOME, "bin", "nvcc")), "-cubin", "-arch=sm_90", "-O3", "-std=c++20"]
    command += [*cpp_extension.COMMON_NVCC_FLAGS, *include, str(source), "-o"]
    headers = [path for pattern in ("*.h", "cuda/*.h", "cuda/*.cuh") for path in sorted(CSRC.glob(pattern))]
    key = repr((command, run([command[0], "--version"]))).encode()
    key += b"".join(path.read_bytes() for path in (source, *headers))
    return made_once(BUILD / f"{stem}-{digest(key)}.cubin", lambda target: run([*command, str(target)]))


def read_usage(library: Path) -> dict[str, Usage]:
    """Resource usage of each kernel of a library or cubin, by its mangled name.

    Raises:
        FileNotFoundError: there is no ``cuobjdump``.
    """
    said = _dump("-res-usage", library)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", said)
    return {name: Usage(*map(int, numbers)) for name, *numbers in found}


def read_code(library: Path) -> dict[str, Code]:
    """The instructions of each kernel of a library or cubin, by its mangled name.

    Raises:
        FileNotFoundError: there is no ``cuobjdump``.
    """
    parts = re.split(r"^\s*Function : (\S+)$", _dump("-sass", library), flags=re.MULTILINE)
    return {name: Code(listing) for name, listing in zip(parts[1::2], parts[2::2], strict=True)}


def _dump(flag: str, library: Path) -> str:
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("no cuobjdump, neither in the CUDA toolkit nor in triton")
    return run([tool, flag, str(library)])
