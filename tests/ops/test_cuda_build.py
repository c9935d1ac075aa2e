"""The CUDA operators compile, link and load where there is a toolkit; that takes no GPU."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from grootvl_mm.ops import _library

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(cpp_extension.CUDA_HOME is None, reason="no CUDA toolkit (nvcc)")


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


def cuobjdump() -> str | None:
    """The toolkit's, or the one that comes with triton."""
    triton = importlib.util.find_spec("triton")
    folders = [Path(cpp_extension.CUDA_HOME, "bin")]
    folders += [Path(place, "backends", "nvidia", "bin") for place in triton.submodule_search_locations or ()]
    return shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders))) or shutil.which("cuobjdump")


def test_kernels_are_in_the_library(library: Path) -> None:
    assert b".nv_fatbin" in library.read_bytes()
    tool = cuobjdump()
    if tool is not None:
        listed = subprocess.run([tool, "--list-elf", str(library)], capture_output=True, text=True, check=True).stdout
        cubins = [line.split()[-1] for line in listed.splitlines()]
        assert len(cubins) == len(list(ROOT.glob("ops/csrc/cuda/*.cu")))
        assert all(name.endswith(".sm_90.cubin") for name in cubins)


@pytest.fixture(scope="module")
def usage(library: Path) -> dict[str, dict[str, int]]:
    """What each kernel takes, by its mangled name: registers a thread, bytes of stack, and of static shared memory."""
    tool = cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump")
    said = subprocess.run([tool, "-res-usage", str(library)], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", said)
    return {name: dict(zip(("registers", "stack", "shared"), map(int, rest), strict=True)) for name, *rest in found}


# Of a kernel that computes in float32: its name and its streams, the threads of a block, the warps that a
# multiprocessor must have room for, and the bytes of stack that the compiler may use.
SCAN_KERNELS = {
    "summarise, forwards": (r"16summarise_kernelINS0_7StreamsILNS_11PropagationE\d+EJE", 256, 24, 64),
    "finish, forwards": (r"13finish_kernelINS0_7StreamsILNS_11PropagationE\d+EJE", 256, 24, 64),
    "summarise, backwards": (r"16summarise_kernelINS0_7StreamsILNS_11PropagationE\d+EJL", 256, 16, 0),
    "finish, backwards": (r"13finish_kernelINS0_7StreamsILNS_11PropagationE\d+EJL", 256, 16, 0),
    "inputs, backwards": (r"21input_backward_kernelI", 256, 16, 0),
    "output": (r"13output_kernelILi128E", 128, 16, 0),
    "output, backwards": (r"22output_backward_kernelILi128E", 128, 16, 16),
}


@pytest.mark.parametrize("kernel", SCAN_KERNELS)
def test_scan_kernels_leave_room_for_each_other(usage: dict[str, dict[str, int]], kernel: str) -> None:
    """Counts the warps whose registers an H100's multiprocessor has room for, and the stack, where spills go.

    Shared memory is no limit beside: the tiles of a scan are cut to what these blocks have room for, and
    ``output_backward_kernel`` asks for 30 KiB a block.
    """
    pattern, threads, least_warps, most_stack = SCAN_KERNELS[kernel]
    kernels = {name: used for name, used in usage.items() if re.search(pattern + r".*?fLi[14]E", name)}
    assert kernels
    for name, used in kernels.items():
        # A warp's registers are given out 256 at a time, eight a thread.
        of_a_warp = -(-used["registers"] // 8) * 8 * 32
        blocks = 65536 // (of_a_warp * (threads // 32))
        assert blocks * threads // 32 >= least_warps, (name, used)
        assert used["stack"] <= most_stack, (name, used)


def test_blocks_of_row_kernels_have_registers_enough(usage: dict[str, dict[str, int]]) -> None:
    """Counts registers of the largest block, for every dtype: a launch that takes more than 65,536 fails."""
    found = [re.search(r"output(?:_backward)?_kernelILi(\d+)E", name) for name in usage]
    sizes = {match.string: int(match[1]) for match in found if match}
    assert {128, 256, 1024} <= set(sizes.values())
    for name, threads in sizes.items():
        assert -(-usage[name]["registers"] // 8) * 8 * threads <= 65536, (name, usage[name])


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
