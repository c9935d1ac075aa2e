"""Builds the compiled operators and the ``.mim`` folder that openmim searches; see the docstrings of the commands.

Environment variables: ``FORCE_CUDA=1`` builds the CUDA operators even without a GPU; ``TORCH_CUDA_ARCH_LIST`` sets the
architectures (default: those from 8.0 on that torch supports, regardless of the GPU); ``GROOTVL_CXXFLAGS`` adds C++
compiler flags; ``GROOTVL_NO_EXTENSION=1`` skips the compiled operators.
"""

import importlib.util
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "grootvl_mm"
SOURCES = Path("ops", "csrc")
MIM_CONTENT = ("configs", "tools", "model-index.yml")

logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
log = logging.getLogger(PACKAGE)

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None


class BuildPyWithMim(build_py):
    """Adds ``grootvl_mm/.mim`` with configs, tools and model index: copies in wheels, links in editable installs."""

    def run(self) -> None:
        """Build, then create ``.mim``."""
        super().run()
        if getattr(self, "editable_mode", False):
            target = ROOT / PACKAGE / ".mim"
        else:
            target = Path(self.build_lib, PACKAGE, ".mim")
        if target.exists():
            shutil.rmtree(target)
        target.mkdir(parents=True)
        for name in MIM_CONTENT:
            source = ROOT / name
            if getattr(self, "editable_mode", False):
                (target / name).symlink_to(os.path.relpath(source, target))
            elif source.is_dir():
                shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, target / name)


class BdistWheelWithMim(bdist_wheel):
    """Builds one wheel for all Python versions, with ``.mim`` also in the metadata folder.

    onedl-mim 0.5.1 searches the first folder listed by an installation, which is the metadata folder if distribution
    and module have the same name.
    """

    def initialize_options(self) -> None:
        """Declare the stable ABI: the extension registers dispatcher operators and uses no Python symbols."""
        super().initialize_options()
        self.py_limited_api = "cp310"

    def write_wheelfile(self, wheelfile_base: str, *args, **kwargs) -> None:
        """Write the file ``WHEEL`` and copy ``.mim`` beside it."""
        super().write_wheelfile(wheelfile_base, *args, **kwargs)
        built = Path(self.get_finalized_command("build_py").build_lib, PACKAGE, ".mim")
        if built.is_dir():  # does not exist in editable installs, where onedl-mim searches the checkout
            shutil.copytree(built, Path(wheelfile_base, ".mim"))


def compiler() -> str | None:
    """Path of the C++ compiler, or None."""
    command = os.environ.get("CXX", "cl" if os.name == "nt" else "c++").split()[0]
    return shutil.which(command)


def cuda_reason() -> str | None:
    """Why the CUDA operators are not built, or None if they are."""
    if not list((ROOT / SOURCES / "cuda").glob("*.cu")):
        return "this version has no CUDA sources; CUDA tensors use the PyTorch operators"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if cpp_extension.CUDA_HOME is None:
        return "no CUDA toolkit found (CUDA_HOME)"
    wanted = os.environ.get("FORCE_CUDA") == "1" or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not (wanted or torch.cuda.is_available()):
        return "no GPU found, and neither FORCE_CUDA=1 nor TORCH_CUDA_ARCH_LIST is set"
    return None


def cuda_architectures() -> str:
    """Torch's CUDA architectures from 8.0 on, in the format of TORCH_CUDA_ARCH_LIST, and PTX for newer ones."""
    numbers = {int(number) for number in re.findall(r"sm_(\d+)", torch._C._cuda_getArchFlags() or "")}
    names = [f"{number // 10}.{number % 10}" for number in sorted(numbers) if number >= 80]
    if not names:
        sys.exit(f"error: torch {torch.__version__} has no CUDA architecture from 8.0 on; set TORCH_CUDA_ARCH_LIST")
    return ";".join(names) + "+PTX"


def link_cuda_runtime(extension) -> None:
    """If the linker would not find libcudart, link the one in torch's dependencies."""
    folders = [*extension.library_dirs, *os.environ.get("LIBRARY_PATH", "").split(os.pathsep)]
    if os.name == "nt" or any(Path(folder, "libcudart.so").exists() for folder in folders if folder):
        return
    packages = importlib.util.find_spec("nvidia")
    places = packages.submodule_search_locations if packages else []
    runtimes = sorted(path for place in places for path in Path(place).glob("*/lib/libcudart.so.*"))
    if runtimes:
        extension.libraries.remove("cudart")
        extension.extra_link_args.append(str(runtimes[-1]))


def supports_openmp(command: str) -> bool:
    """Whether the compiler supports ``-fopenmp``."""
    check = subprocess.run(
        [command, "-fopenmp", "-x", "c++", "-fsyntax-only", "-"], input="int main() {}", text=True, capture_output=True
    )
    return check.returncode == 0


def extensions() -> list:
    """The extension ``grootvl_mm._C``, a library of dispatcher operators without Python symbols."""
    if os.environ.get("GROOTVL_NO_EXTENSION") == "1":
        log.info("grootvl_mm: skipping the compiled operators (GROOTVL_NO_EXTENSION=1).")
        return []
    command = compiler()
    if command is None:
        log.warning("grootvl_mm: no C++ compiler found; installing only the slow PyTorch operators.")
        return []
    # With -ftrapping-math, the default, GCC does not vectorize loops with conditionals, such as a sigmoid, for AVX2.
    flags = [] if os.name == "nt" else ["-O3", "-fvisibility=hidden", "-fno-trapping-math", "-g0"]
    # Compiled with OpenMP but not linked to it: the symbols come from torch's own runtime, so that both share one
    # thread pool and torch.set_num_threads applies to both.
    if supports_openmp(command):
        flags.append("-fopenmp")
    flags += shlex.split(os.environ.get("GROOTVL_CXXFLAGS", ""))
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / SOURCES).glob("*.cpp"))
    sources += sorted(str(path.relative_to(ROOT)) for path in (ROOT / SOURCES / "cpu").glob("*.cpp"))
    reason = cuda_reason()
    log.info("grootvl_mm: building for the CPU %s", "and CUDA." if reason is None else f"only: {reason}.")
    extension = cpp_extension.CppExtension
    if reason is None:
        extension = cpp_extension.CUDAExtension
        sources += sorted(str(path.relative_to(ROOT)) for path in (ROOT / SOURCES / "cuda").glob("*.cu"))
        # Line numbers for profilers and compute-sanitizer have no run-time cost.
        flags = {"cxx": flags, "nvcc": ["-O3", "-lineinfo"]}
        os.environ["TORCH_CUDA_ARCH_LIST"] = os.environ.get("TORCH_CUDA_ARCH_LIST") or cuda_architectures()
        log.info("grootvl_mm: CUDA architectures %s.", os.environ["TORCH_CUDA_ARCH_LIST"])
    built = extension(
        f"{PACKAGE}._C",
        sources,
        include_dirs=[str(ROOT / SOURCES)],
        extra_compile_args=flags,
        py_limited_api=True,
    )
    if reason is None:
        link_cuda_runtime(built)
    return [built]


def build_ext_command() -> type:
    """Torch's build command without exporting a Python module's init function, which does not exist."""

    class BuildOperators(cpp_extension.BuildExtension):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, no_python_abi_suffix=True, **kwargs)

        def get_export_symbols(self, ext) -> list[str]:
            return ext.export_symbols

    return BuildOperators


def main() -> None:
    """Run setuptools."""
    command_classes = {"build_py": BuildPyWithMim, "bdist_wheel": BdistWheelWithMim}
    modules = []
    if torch is not None:
        modules = extensions()
        command_classes["build_ext"] = build_ext_command()
    elif not {"sdist", "egg_info", "dist_info"} & set(sys.argv):
        sys.exit(
            "error: building grootvl_mm's operators needs torch, which is not installed here; install it, then run: "
            "pip install --no-build-isolation ."
        )
    setup(ext_modules=modules, cmdclass=command_classes)


main()
