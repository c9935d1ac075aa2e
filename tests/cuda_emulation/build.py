"""Compiles CUDA sources for the CPU, with the emulator in this folder.

g++ compiles them as C++ after the few constructs that C++ lacks have been rewritten; ``include/`` provides the rest.
Results are cached in ``build/cuda_emulation-HASH`` and rebuilt if a source, a flag or PyTorch changes. Libraries share
the object files of their common sources.
"""

import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
CSRC = ROOT / "ops" / "csrc"
BUILD = ROOT / "build"

# Device code uses type punning, which nvcc permits. Fortified longjmp refuses to switch stacks. -O2 takes 1.5 times as
# long to compile, which costs more time than the tests gain.
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE")
FLAGS += ("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function")
# For each sanitizer, the flags for kernels and the flags for all sources.
_ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-g1")
SANITIZERS = {
    "": ((), ()),
    "address": ((), (*_ADDRESS, "-fno-omit-frame-pointer")),
    # The emulator reports which threads of a block have waited for each other; its own code runs in a single thread.
    "thread": (("-fsanitize=thread",), ("-DEMULATED_THREADS_ARE_WATCHED", "-fno-omit-frame-pointer", "-g1")),
}

_REWRITTEN = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\\n])*"          # comments and strings are kept
    | \b(?P<extern>extern\s+)?__shared__\s+(?P<shared>[^;]+);
    | \bTORCH_LIBRARY_IMPL\(\s*(?P<library>\w+)\s*,\s*CUDA\s*,""",
    re.VERBOSE | re.DOTALL,
)
_DECLARATION = re.compile(
    r"(?P<type>[^=]*?[\w>*&\s])\b(?P<name>[A-Za-z_]\w*)\s*(?P<extents>(\[[^\]]*\]\s*)*)", re.DOTALL
)


def translate(source: Path) -> str:
    """Translate a source to C++: the emulator provides shared variables, CUDA kernels are registered for the CPU."""

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
            # A reference, because outside of functions it is initialized before its memory exists.
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
    sanitizer: str = "",
) -> Path:
    """Compile a shared library of the emulator and some sources, or return the cached one.

    Args:
        sources: ``.cu`` and ``.cpp`` files under ``base``.
        headers: the headers under ``base`` that they include.
        base: the folder to which quoted includes are relative.
        flags: additional compiler flags.
        link: additional linker flags.
        sanitizer: "address" for AddressSanitizer and UndefinedBehaviorSanitizer, "thread" for ThreadSanitizer.

    Returns:
        The path of the library.

    Raises:
        RuntimeError: a source does not compile; the message includes the compiler's output.
    """
    compiler = os.environ.get("CXX", "g++")
    of_kernels, of_all = SANITIZERS[sanitizer]
    flags = (*FLAGS, *of_all, *flags)
    own = sorted(path for path in FOLDER.rglob("*") if path.suffix in ("", ".h", ".cpp") and path.is_file())
    key = hashlib.sha256(repr((of_kernels, flags, run([compiler, "--version"]))).encode())
    for path in (Path(__file__), *own, *headers):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = BUILD / f"cuda_emulation-{key.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    include = (f"-I{folder}", f"-I{FOLDER / 'include'}", f"-I{FOLDER}")

    def put_translated(path: Path, name: str) -> Path:
        target = folder / path.relative_to(base).with_name(name)
        return made_once(target, lambda unfinished: unfinished.write_text(translate(path), encoding="utf-8"))

    def compile_one(path: Path) -> Path:
        emulator = path.parent == FOLDER and path.suffix == ".cpp"
        source = path if emulator else put_translated(path, f"{path.stem}-{digest(path.read_bytes())}{path.suffix}")
        own_flags = flags if emulator else (*flags, *of_kernels)
        command = [compiler, *include, *own_flags, "-x", "c++", "-c", str(source), "-o"]
        return made_once(folder / f"{source.name}.o", lambda target: run([*command, str(target)]))

    for path in headers:
        put_translated(path, path.name)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(path) for path in pool.map(compile_one, (*sources, FOLDER / "emulator.cpp"))]
    command = [compiler, "-shared", *flags, *of_kernels, *objects, *link, "-o"]
    library = folder / f"library-{digest(repr(command).encode())}.so"
    return made_once(library, lambda target: run([*command, str(target)]))


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def made_once(target: Path, make: Callable[[Path], object]) -> Path:
    """Create a file in one process, while other processes that need it wait."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            unfinished = target.with_name(f"unfinished-{target.name}")
            make(unfinished)
            unfinished.rename(target)
    return target


def operator_library(sanitizer: str = "", only: Sequence[str] = ()) -> Path:
    """Compile the operators of ``ops/csrc/cuda`` for CPU tensors, as a library for ``GROOTVL_LIBRARY``.

    Args:
        sanitizer: see :func:`compile_library`.
        only: stems of ``.cu`` files; by default all of them, which take minutes to compile.

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
        # Recent PyTorch headers require C++20, although the kernels are C++17.
        flags=("-std=c++20", *include, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"),
        link=[f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch", "-ltorch_cpu", "-lc10"],
        sanitizer=sanitizer,
    )


def sanitizer_environment(sanitizer: str) -> dict[str, str]:
    """The environment variables with which an uninstrumented process can load an instrumented library."""
    compiler = os.environ.get("CXX", "g++")
    # Python and PyTorch do not free all memory before the process ends.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "PYTHONMALLOC": "malloc"}
    runtime = "libasan.so"
    if sanitizer == "thread":
        options = {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1"}
        runtime = "libtsan.so"
    # AddressSanitizer looks for the functions that throw exceptions when it starts, so the C++ library must be there.
    libraries = [run([compiler, f"-print-file-name={name}"]).strip() for name in (runtime, "libstdc++.so")]
    return options | {"LD_PRELOAD": " ".join(str(Path(library).resolve()) for library in libraries)}


def run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout
