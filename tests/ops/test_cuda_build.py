"""The CUDA operators compile, link and load where there is a toolkit; that takes no GPU."""

import importlib.util
import os
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


def test_library_loads_and_registers_every_operator(library: Path) -> None:
    code = (
        "import sys, torch\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "for name in sys.argv[2:]:\n"
        "    for key in ('CPU', 'CUDA'):\n"
        "        assert torch._C._dispatch_has_kernel_for_dispatch_key(f'grootvl::{name}', key), (name, key)\n"
    )
    command = [sys.executable, "-c", code, str(library), *_library.REFERENCES]
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
