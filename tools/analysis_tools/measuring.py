"""What the benchmarks share: timing in turn, spreads, fresh processes, peak memory, tables and files."""

import argparse
import gc
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from grootvl_mm.apis import cli
from grootvl_mm.ops import extension_error
from grootvl_mm.version import __version__

AUTOCAST = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARM_UPS = 2  # of each contender: the first calls load code and fill the allocator
ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "amx_bf16")
PROC_SELF = Path("/proc/self")


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: integers from ``least``."""

    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {value}")
        return value

    return integer


def add_common_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Add what both benchmarks take."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--autocast",
        choices=list(AUTOCAST),
        default="none",
        help="16-bit inputs of the operators, autocast of the models (default: none, float32)",
    )
    parser.add_argument(
        "--threads", type=at_least(1), default=1, metavar="N", help="CPU threads (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=at_least(1), default=20, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--out", type=Path, default=Path("work_dirs", name), help="folder for the results (default: %(default)s)"
    )


def check_common_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what cannot be measured or written before anything is measured."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU that torch can use, and torch.cuda.is_available() is False")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder, but {str(args.out)!r} is a file")


def natural_features(generator: torch.Generator, *shape: int) -> Tensor:
    """Random maps (..., H, W) like those of photographs: amplitudes fall with 1 / frequency; a little white noise."""
    height, width = shape[-2:]
    device = generator.device
    rows, columns = torch.fft.fftfreq(height, device=device), torch.fft.rfftfreq(width, device=device)
    frequency = torch.hypot(rows[:, None], columns).clamp(min=1 / max(height, width))
    white = torch.randn(shape, generator=generator, device=device)
    smooth = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    return smooth / smooth.std() + 0.1 * torch.randn(shape, generator=generator, device=device)


def timed(call: Callable[[], object], device: str) -> float:
    """Seconds that one call takes. What it returns is released after the clock has stopped."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        result = call()
        end.record()
        end.synchronize()
        seconds = start.elapsed_time(end) / 1000
    else:
        before = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - before
    del result
    return seconds


def time_in_turn(
    contenders: Mapping[str, Callable[[Any], object]], inputs: Sequence[Any], rounds: int, device: str, label: str
) -> dict[str, list[float]]:
    """Time every contender ``rounds`` times, the inputs in turn, and each contender first in its turn.

    A disturbance of the machine thus meets all of them, and no branch predictor learns one input by heart.

    Returns:
        Seconds of each contender, all in the same order of inputs.
    """
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names * WARM_UPS:
        contenders[name](inputs[0])
    with _without_garbage_collection():
        for done in tqdm(range(rounds), desc=label, leave=False):
            value = inputs[done % len(inputs)]
            shift = done % len(names)
            for name in names[shift:] + names[:shift]:
                times[name].append(timed(lambda run=contenders[name], value=value: run(value), device))
    return times


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    low, high = (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    )
    return {"median": statistics.median(values), "p10": low, "p90": high}


def ratio_of(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """The ratio of two medians, and percentiles of the ratios on the single inputs."""
    pairs = [a / b for a, b in zip(numerator, denominator, strict=True)]
    ratio = statistics.median(numerator) / statistics.median(denominator)
    return {**spread(pairs), "median": ratio}


def run_fresh(function: Callable, *args: Any, threads: int, environment: Mapping[str, str] | None = None) -> Any:
    """Call a function of a module's top level in a new process with so many threads and return what it returns.

    ``torch.set_num_threads`` would not do: OpenMP, MKL and oneDNN size their pools once and keep what they have
    prepared for that size, and workers of a larger pool go on spinning on the cores that are measured.

    The command ends with an error if the process does not end well.
    """
    variables = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **(environment or {})}
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, args), daemon=True)
    with _environment(variables):
        process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        process.join()
        cli.fail(f"the measuring process ended with status {process.exitcode}; its own message stands above, if any")
    process.join()
    return result


def _answer(sender: Connection, function: Callable, args: tuple) -> None:
    # Also after kill -9 of the parent, nobody waits for the answer.
    threading.Thread(target=_follow_parent, daemon=True).start()
    sender.send(function(*args))


def _follow_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# glibc moves the limit from which on a block is mapped alone, and returned when it is freed, up to 32 MB. With a fixed
# one the resident size follows the tensors that are alive, whatever was freed before.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}


def peak_memory(step: Callable[[], object], device: str) -> int:
    """Bytes that one step takes at its peak beyond what was there before it.

    On the CPU those of the resident size; run it in a process with :data:`MEMORY_ENVIRONMENT`, in ascending order of
    sizes if there are several.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _reset_peak()
    before = _resident_bytes("VmRSS")
    step()
    return _resident_bytes("VmHWM") - before


def _reset_peak() -> None:
    try:
        (PROC_SELF / "clear_refs").write_text("5")
    except OSError:
        return  # the peak then counts from the start of the process: right for ascending sizes


def _resident_bytes(field: str) -> int:
    """A line of the process's status; where the system has none, the peak since the start."""
    status = PROC_SELF / "status"
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_machine(device: str) -> dict[str, Any]:
    """What a reader needs to know to compare numbers with those of another machine."""
    model, flags = _cpu()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine = {
        "cpu": model,
        "cores": cores,
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "load_average": round(os.getloadavg()[0], 2),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "grootvl_mm": __version__,
        "operators": "compiled" if extension_error() is None else f"PyTorch fallback: {extension_error()}",
    }
    if device == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return machine


def _cpu() -> tuple[str, set[str]]:
    info = Path("/proc/cpuinfo")
    entries = {}
    if info.is_file():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            entries.setdefault(name.strip(), value.strip())
    model = entries.get("model name") or platform.processor() or platform.machine()
    return model, set(entries.get("flags", "").split())


def machine_lines(machine: Mapping[str, Any]) -> list[str]:
    """The same for the head of a text."""
    lines = [
        f"CPU: {machine['cpu']}, {machine['cores']} cores, {' '.join(machine['isa'])}; "
        f"load average at the start {machine['load_average']}",
        f"{machine['system']}, Python {machine['python']}, torch {machine['torch']} ({machine['torch_isa']}), "
        f"grootvl_mm {machine['grootvl_mm']}, operators {machine['operators']}",
    ]
    if "gpu" in machine:
        lines.insert(1, f"GPU: {machine['gpu']}, CUDA {machine['cuda']}")
    return lines


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of text, aligned: numbers to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    columns = []
    for column in zip(*lines, strict=True):
        width = max(map(len, column))
        numeric = all(not cell or cell[0].isdigit() or cell == "-" for cell in column[1:])
        columns.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in column])
    columns = [[column[0], "-" * len(column[0]), *column[1:]] for column in columns]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def format_seconds(seconds: float) -> str:
    """With three digits and a fitting unit."""
    unit, scale = next(((u, f) for u, f in (("s", 1), ("ms", 1e3)) if seconds * f >= 1), ("us", 1e6))
    value = seconds * scale
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f} {unit}"


def format_ratio(ratio: Mapping[str, float]) -> tuple[str, str]:
    """The ratio of the medians, and its spread."""
    return f"{ratio['median']:.2f}x", f"{ratio['p10']:.2f}..{ratio['p90']:.2f}"


def write_results(out: Path, name: str, data: Mapping[str, Any], text: str, figure: Figure) -> None:
    """Write NAME.json, NAME.txt and NAME.png into the folder, each whole or not at all."""
    out.mkdir(parents=True, exist_ok=True)

    def save(suffix: str, write: Callable[[Path], object]) -> None:
        part = out / f"{name}{suffix}.part"
        write(part)
        os.replace(part, out / f"{name}{suffix}")

    save(".json", lambda part: part.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n"))
    save(".txt", lambda part: part.write_text(text))
    save(".png", lambda part: figure.savefig(part, format="png", dpi=130))
