"""Compiles CUDA sources for the CPU, against the emulator beside this file.

g++ takes them as C++ once the few statements are rewritten that C++ cannot express; everything else is in ``include/``.
Results are kept in ``build/cuda_emulation-HASH`` and made again when a source, a flag or PyTorch changes.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
CSRC = ROOT / "ops" / "csrc"
BUILD = ROOT / "build"

# Device code puns types freely, which nvcc permits. Fortified longjmp refuses to change stacks.
FLAGS = ("-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE")
FLAGS += ("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function")
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all")
SANITIZERS += ("-fno-omit-frame-pointer",)

_REWRITTEN = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\\n])*"          # comments and strings stay
    | \b(?P<extern>extern\s+)?__shared__\s+(?P<shared>[^;]+);
    | \bTORCH_LIBRARY_IMPL\(\s*(?P<library>\w+)\s*,\s*CUDA\s*,""",
    re.VERBOSE | re.DOTALL,
)
_DECLARATION = re.compile(
    r"(?P<type>[^=]*?[\w>*&\s])\b(?P<name>[A-Za-z_]\w*)\s*(?P<extents>(\[[^\]]*\]\s*)*)", re.DOTALL
)


def translate(source: Path) -> str:
    """The source as C++: shared variables come from the emulator, kernels for CUDA are registered for the CPU."""

    def rewrite(match: re.Match) -> str:
        if match["library"]:
            return f"TORCH_LIBRARY_IMPL({match['library']}, CPU,"
        if not match["shared"]:
            return match[0]
        text = re.sub(r"\b(?:__align__|alignas)\s*\([^)]*\)\s*", "", match["shared"])
        parts = _DECLARATION.fullmatch(text)
        if parts is None or parts["type"].rstrip().endswith(","):
            raise ValueError(f"{source}: __shared__ must declare one variable without a value, got: {match[0]}")
        kind, name, extents = parts["type"].strip(), parts["name"], parts["extents"].strip()
        if match["extern"]:
            # A reference, since it may stand outside of functions, where its memory is not there yet.
            pointer = f"{kind}* const&"
            code = f"static {pointer} {name} = reinterpret_cast<{pointer}>(emulation::dynamic_shared_memory);"
        else:
            code = (
                f"using {name}_shared_type = {kind}{extents}; "
                f"static emulation::SharedVariable<{name}_shared_type, emulation::place_of(__FILE__, __LINE__)> "
                f"{name}_shared; "
                f"{name}_shared_type& {name} = {name}_shared.of_this_block();"
            )
        return code + "\n" * match[0].count("\n")

    return f'#line 1 "{source}"\n' + _REWRITTEN.sub(rewrite, source.read_text(encoding="utf-8"))


def compile_library(
    sources: Sequence[Path],
    headers: Sequence[Path] = (),
    base: Path = CSRC,
    flags: Sequence[str] = (),
    link: Sequence[str] = (),
    sanitize: bool = False,
) -> Path:
    """A shared library of the emulator and some sources, compiled once.

    Args:
        sources: ``.cu`` and ``.cpp`` files under ``base``.
        headers: what they include from there.
        base: the folder that quoted includes start from.
        flags: further flags of the compiler.
        link: further flags of the linker.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.

    Returns:
        The library.

    Raises:
        RuntimeError: a source does not compile; says what the compiler said.
    """
    compiler = os.environ.get("CXX", "g++")
    flags = (*FLAGS, *(SANITIZERS if sanitize else ()), *flags)
    own = sorted(path for path in FOLDER.rglob("*") if path.suffix in ("", ".h", ".cpp") and path.is_file())
    key = hashlib.sha256(repr((flags, link, _run([compiler, "--version"]))).encode())
    for path in (Path(__file__), *own, *sources, *headers):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = BUILD / f"cuda_emulation-{key.hexdigest()[:16]}"
    library = folder / "library.so"
    if library.exists():
        return library

    BUILD.mkdir(exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix="cuda_emulation-", dir=BUILD))
    try:
        for path in (*sources, *headers):
            translated = working / path.relative_to(base)
            translated.parent.mkdir(parents=True, exist_ok=True)
            translated.write_text(translate(path), encoding="utf-8")
        include = (f"-I{working}", f"-I{FOLDER / 'include'}", f"-I{FOLDER}")

        def compile_one(path: Path) -> str:
            target = working / f"{path.stem}.o" if path.parent == FOLDER else working / f"{path.relative_to(base)}.o"
            source = path if path.parent == FOLDER and path.suffix == ".cpp" else working / path.relative_to(base)
            _run([compiler, *include, *flags, "-x", "c++", "-c", str(source), "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, (*sources, FOLDER / "emulator.cpp")))
        _run([compiler, "-shared", *flags, *objects, "-o", str(working / library.name), *link])
        try:
            working.rename(folder)
        except OSError:
            # Somebody else was faster.
            if not library.exists():
                raise
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return library


def operator_library(sanitize: bool = False, only: Sequence[str] = ()) -> Path:
    """The operators of ``ops/csrc/cuda``, registered for CPU tensors; for ``GROOTVL_LIBRARY``.

    Args:
        sanitize: see :func:`compile_library`.
        only: names of ``.cu`` files, without which the library has all of them and takes minutes to compile.

    Raises:
        FileNotFoundError: there are no CUDA sources.
        RuntimeError: they do not compile.
    """
    import torch
    from torch.utils import cpp_extension

    kernels = [path for path in sorted((CSRC / "cuda").glob("*.cu")) if not only or path.stem in only]
    if not kernels:
        raise FileNotFoundError(f"no CUDA sources in {CSRC / 'cuda'}")
    headers = [*sorted(CSRC.glob("*.h")), *sorted((CSRC / "cuda").glob("*.cuh")), *sorted((CSRC / "cuda").glob("*.h"))]
    include = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    return compile_library(
        [*sorted(CSRC.glob("*.cpp")), *kernels],
        headers,
        # Newer headers of PyTorch need more than the C++17 of the kernels.
        flags=("-std=c++20", *include, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"),
        link=[f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"],
        sanitize=sanitize,
    )


def sanitizer_environment() -> dict[str, str]:
    """What a process without sanitizers of its own needs to load a library with them."""
    compiler = os.environ.get("CXX", "g++")
    runtime = _run([compiler, "-print-file-name=libasan.so"]).strip()
    return {
        "LD_PRELOAD": str(Path(runtime).resolve()),
        # Python and PyTorch leave memory to the end of the process.
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout
