"""The CUDA operators compile, link and load where there is a toolkit; that takes no GPU."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from grootvl_mm.ops import _library
from tests.ops.kernel_counts import REGISTERS, Code, Usage, compile_cubin, cuobjdump, read_code, read_usage

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(cpp_extension.CUDA_HOME is None, reason="no CUDA toolkit (nvcc)")
# The whole library takes seven minutes of a core, the kernels of scans alone two. That the sources are right C++ and
# compute what they should, the emulator tells in two.
compiles = pytest.mark.slow
SCANS = ("scan", "selective_scan")


def run_setup(*arguments: str, **environment: str) -> str:
    """What setup.py says."""
    inherited = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    result = subprocess.run(
        [sys.executable, "setup.py", *arguments],
        env=inherited | {"FORCE_CUDA": "1"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-4000:]
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operators for sm_90. Object files stay in ``build/cuda_sm90``, where only what has changed is compiled."""
    folder = tmp_path_factory.mktemp("cuda")
    objects = str(ROOT / "build" / "cuda_sm90")
    said = run_setup("build_ext", "--build-lib", str(folder), "--build-temp", objects, TORCH_CUDA_ARCH_LIST="9.0")
    assert "building for the CPU and CUDA." in said
    (built,) = folder.glob("grootvl_mm/_C*.so")
    return built


@compiles
def test_kernels_are_in_the_library(library: Path) -> None:
    assert b".nv_fatbin" in library.read_bytes()
    tool = cuobjdump()
    if tool is not None:
        listed = subprocess.run([tool, "--list-elf", str(library)], capture_output=True, text=True, check=True).stdout
        cubins = [line.split()[-1] for line in listed.splitlines()]
        assert len(cubins) == len(list(ROOT.glob("ops/csrc/cuda/*.cu")))
        assert all(name.endswith(".sm_90.cubin") for name in cubins)


@pytest.fixture(scope="module")
def usage(library: Path) -> dict[str, Usage]:
    if cuobjdump() is None:
        pytest.skip("no cuobjdump")
    return read_usage(library)


@pytest.fixture(scope="module")
def code(library: Path) -> dict[str, Code]:
    if cuobjdump() is None:
        pytest.skip("no cuobjdump")
    return read_code(library)


@pytest.fixture(scope="module")
def scan_cubins() -> list[Path]:
    if cuobjdump() is None:
        pytest.skip("no cuobjdump")
    with ThreadPoolExecutor() as pool:
        return list(pool.map(compile_cubin, SCANS))


@pytest.fixture(scope="module")
def scan_usage(scan_cubins: list[Path]) -> dict[str, Usage]:
    return {name: used for cubin in scan_cubins for name, used in read_usage(cubin).items()}


@pytest.fixture(scope="module")
def scan_code(scan_cubins: list[Path]) -> dict[str, Code]:
    return {name: found for cubin in scan_cubins for name, found in read_code(cubin).items()}


# Mangled names of kernels over tiles: with one stream, and with two.
ONE_STREAM, TWO_STREAMS = r"7StreamsILNS_11PropagationE\d+EJE.*?", r"7StreamsILNS_11PropagationE\d+EJL.*?"
# Of a kernel that computes in float32: its name, the threads of a block, the warps that a multiprocessor must have room
# for, and the bytes of stack that the compiler may use: as many as it does, since launch bounds make it spill a few
# registers outside of loops over terms and pieces. More of them would be spilled inside.
SCAN_KERNELS = {
    "summarise, one stream": (r"16summarise_kernelINS0_" + ONE_STREAM, 256, 32, 32),
    "finish, one stream": (r"13finish_kernelINS0_" + ONE_STREAM, 256, 32, 48),
    "summarise, two streams": (r"16summarise_kernelINS0_" + TWO_STREAMS, 256, 24, 0),
    "finish, two streams": (r"13finish_kernelINS0_" + TWO_STREAMS, 256, 24, 64),
    "output": (r"13output_kernelILi128E.*?", 128, 16, 0),
    "output, backwards": (r"22output_backward_kernelILi128E.*?", 128, 16, 16),
}


@pytest.mark.parametrize("kernel", SCAN_KERNELS)
def test_scan_kernels_leave_room_for_each_other(scan_usage: dict[str, Usage], kernel: str) -> None:
    """Counts the warps whose registers an H100's multiprocessor has room for, and the stack, where spills go.

    For their dynamic shared memory, see tests/cuda_emulation/test_layer.py.
    """
    pattern, threads, least_warps, most_stack = SCAN_KERNELS[kernel]
    kernels = {name: used for name, used in scan_usage.items() if re.search(pattern + r"fLi[14]E", name)}
    assert kernels
    for name, used in kernels.items():
        assert used.resident_warps(threads) >= least_warps, (name, used)
        assert used.stack <= most_stack, (name, used)


def find_kernel(code: dict[str, Code], kernel: str, streams: str, of: str) -> Code:
    """The kernel of float32 in packs of 4, propagation "all"."""
    pattern = rf"\d{kernel}_kernelINS0_{streams.replace(chr(92) + 'd+', '0')}fLi4E.*?{of}"
    (name,) = [name for name in code if re.search(pattern, name)]
    return code[name]


GIVEN, SELECTIVE = "GivenInputIffLi4ELi1E", "SelectiveInputIfffLi4ELb1ELb0E"


@pytest.mark.parametrize(("of", "most"), [(GIVEN, 90), (SELECTIVE, 290)])
def test_instructions_of_a_row_of_32_channels(scan_code: dict[str, Code], of: str, most: int) -> None:
    """In the loops of both passes of a forward scan over tiles; each of the loops over ranks of the step sizes once."""
    summarise, finish = (find_kernel(scan_code, kernel, ONE_STREAM, of) for kernel in ("summarise", "finish"))
    maps = 2 if of == GIVEN else 1
    total = 0.0
    for kernel in (summarise, finish):
        copies = kernel.smallest_loops("LDGSTS")
        computes = kernel.smallest_loops("MUFU", r"STS\.128", without="STG|LDGSTS")
        walks = kernel.smallest_loops("FFMA", r"STS\.128", without="MUFU|LDGSTS")
        # Given decays need not be computed.
        assert (len(copies), len(computes), len(walks)) == (1, of == SELECTIVE, 1 if kernel is summarise else 2)
        total += kernel.per_row(copies, "LDGSTS", maps) + kernel.per_row(computes, r"STS\.128", 2)
        total += kernel.per_row(walks, r"STS\.128", 1)
    assert 20 < total <= most


@pytest.mark.parametrize("of", [GIVEN, SELECTIVE])
@pytest.mark.parametrize("kernel", ["summarise", "finish"])
def test_no_copy_of_a_tile_waits_for_another(scan_code: dict[str, Code], kernel: str, of: str) -> None:
    """The loop that starts the copies of all rows waits for the places of rows only."""
    function = find_kernel(scan_code, kernel, ONE_STREAM, of)
    (loop,) = function.smallest_loops("LDGSTS")
    assert function.count(loop, "LDGSTS") >= 4
    assert not function.count(loop, "LDGDEPBAR|DEPBAR|BAR")


IN_FLOAT = r"(?:f|N3c108BFloat16E)f"


@compiles
@pytest.mark.parametrize(("kernel", "most", "least_warps"), [("convolve", 45, 30), ("convolve_backward", 110, 20)])
def test_instructions_of_a_row_of_the_convolution(
    code: dict[str, Code], usage: dict[str, Usage], kernel: str, most: int, least_warps: int
) -> None:
    """Per row of 32 channels, of which a warp stores one at a time; float32 and bfloat16."""
    names = [name for name in code if re.search(rf"\d{kernel}_kernelI{IN_FLOAT}", name)]
    assert len(names) == 2
    for name in names:
        loops = code[name].smallest_loops("STG", "FFMA")
        assert loops
        assert all(loop.last - loop.first + 1 <= most * code[name].count(loop, "STG") for loop in loops), name
        assert usage[name].stack == 0
        assert usage[name].resident_warps(160) >= least_warps, (name, usage[name])


@compiles
def test_instructions_of_edge_weights(code: dict[str, Code]) -> None:
    """A step of the cosine metric processes 32 rows of 32 channels, with eight or 32 lanes to a vertex."""
    names = [name for name in code if re.search(rf"edge_weight_kernelILNS_6MetricE0ELi\d+ELi4E{IN_FLOAT}", name)]
    assert len(names) == 4
    for name in names:
        (loop,) = code[name].smallest_loops("LDG", "FFMA")
        assert code[name].count(loop, "LDG") == 17
        assert loop.last - loop.first + 1 <= 10 * 32, name


@compiles
def test_blocks_of_row_kernels_have_registers_enough(usage: dict[str, Usage]) -> None:
    """Counts registers of the largest block, for every dtype: a launch that takes more than 65,536 fails."""
    found = [re.search(r"output(?:_backward)?_kernelILi(\d+)E", name) for name in usage]
    sizes = {match.string: int(match[1]) for match in found if match}
    assert {128, 256, 1024} <= set(sizes.values())
    for name, threads in sizes.items():
        assert -(-usage[name].registers // 8) * 8 * threads <= REGISTERS, (name, usage[name])


@compiles
def test_blocks_that_build_and_cut_trees_have_registers_enough(usage: dict[str, Usage]) -> None:
    """For 1024 threads, with and without the cut."""
    kernels = [used for name, used in usage.items() if re.search(r"11tree_kernelILb[01]E|10cut_kernel", name)]
    assert len(kernels) == 3
    assert all(used.resident_warps(1024) >= 32 and used.stack == 0 for used in kernels)


@compiles
def test_library_loads_and_registers_every_operator(library: Path) -> None:
    code = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "for kernel in sys.argv[2:]:\n"
        "    name, key = kernel.split()\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'grootvl::{name}', key), kernel\n"
    )
    kernels = [f"{name} CPU" for name in _library.REFERENCES]
    kernels += [f"{name} CUDA" for name in _library.REFERENCES.keys() - _library.THROUGH_HOST]
    command = [sys.executable, "-c", code, str(library), *kernels]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_default_architectures_are_those_of_torch() -> None:
    said = run_setup("--version")
    (line,) = [line for line in said.splitlines() if "CUDA architectures" in line]
    names = line.rstrip(".").split()[-1].removesuffix("+PTX").split(";")
    assert line.endswith("+PTX.")
    assert "9.0" in names
    assert all(float(name) >= 8 for name in names)


def test_given_architectures_are_kept() -> None:
    assert "CUDA architectures 8.9." in run_setup("--version", TORCH_CUDA_ARCH_LIST="8.9")
