"""Shared code of the benchmarks: alternating timing, statistics, new processes, peak memory, tables, output files."""

import argparse
import gc
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
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
from grootvl_mm.utils.processes import end_with_parent
from grootvl_mm.version import __version__

AUTOCAST = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
WARM_UPS = 2  # calls that load code and fill the allocator
ISA_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "amx_bf16")
PROC_SELF = Path("/proc/self")


def at_least(least: int) -> Callable[[str], int]:
    """Argparse type: integers from ``least`` on."""

    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {value}")
        return value

    return integer


def add_output_argument(parser: argparse.ArgumentParser, name: str) -> None:
    """Add ``--out``."""
    parser.add_argument(
        "--out", type=Path, default=Path("work_dirs", name), help="folder for the results (default: %(default)s)"
    )


def add_common_arguments(parser: argparse.ArgumentParser, name: str, rounds: int = 20) -> None:
    """Add device, threads, rounds and ``--out``."""
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cpu", help="device to measure on (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=at_least(1), default=1, metavar="N", help="number of CPU threads (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=at_least(1), default=rounds, metavar="N", help="measured calls of each (default: %(default)s)"
    )
    add_output_argument(parser, name)


def add_autocast_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--autocast``."""
    parser.add_argument(
        "--autocast",
        choices=list(AUTOCAST),
        default="none",
        help="dtype of the operators' inputs, or of autocast for models (default: none, i.e. float32)",
    )


def check_common_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fail before the measurement if the device or the output folder is unusable."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a GPU, but torch.cuda.is_available() is False")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"--out must be a folder, but {str(args.out)!r} is a file")


def natural_features(generator: torch.Generator, *shape: int) -> Tensor:
    """Random maps (..., H, W) with the spectrum of photographs: 1 / frequency amplitudes plus a little white noise."""
    height, width = shape[-2:]
    device = generator.device
    rows, columns = torch.fft.fftfreq(height, device=device), torch.fft.rfftfreq(width, device=device)
    frequency = torch.hypot(rows[:, None], columns).clamp(min=1 / max(height, width))
    white = torch.randn(shape, generator=generator, device=device)
    smooth = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(height, width))
    return smooth / smooth.std() + 0.1 * torch.randn(shape, generator=generator, device=device)


def timed(call: Callable[[], object], device: str) -> float:
    """Time one call, in seconds; its result is freed after the clock has stopped."""
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
    """Time all contenders alternately, ``rounds`` times each, cycling through the inputs and rotating who goes first.

    Disturbances of the machine thus affect all contenders, and branch predictors cannot learn a single input.

    Returns:
        Seconds of each contender, in the same order of inputs for all.
    """
    names = list(contenders)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in tqdm(names * WARM_UPS, desc=f"{label}, warming up", leave=False):
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
    """The median and the 10th and 90th percentiles."""
    low, high = (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
    )
    return {"median": statistics.median(values), "p10": low, "p90": high}


def ratio_of(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """The ratio of two medians, and percentiles of the ratios of single calls."""
    pairs = [a / b for a, b in zip(numerator, denominator, strict=True)]
    ratio = statistics.median(numerator) / statistics.median(denominator)
    return {**spread(pairs), "median": ratio}


def run_fresh(function: Callable, *args: Any, threads: int, environment: Mapping[str, str] | None = None) -> Any:
    """Call a top-level function in a new process with a given number of threads and return its result.

    ``torch.set_num_threads`` is not enough: OpenMP, MKL and oneDNN size their thread pools and caches once, and idle
    threads of a larger pool keep spinning on the measured cores.

    Exits with an error if the process fails.
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
        cli.fail(f"the measuring process exited with status {process.exitcode}; see its output above")
    process.join()
    return result


def _answer(sender: Connection, function: Callable, args: tuple) -> None:
    end_with_parent(multiprocessing.parent_process().pid)
    sender.send(function(*args))


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


# glibc raises its mmap threshold dynamically, and then keeps freed blocks. With a fixed threshold, the resident set
# size follows the live tensors.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}


def peak_memory(step: Callable[[], object], device: str) -> int:
    """Peak memory of one step in bytes, beyond the memory in use before it.

    On the CPU it is measured by the resident set size: run it in a process with :data:`MEMORY_ENVIRONMENT`, and in
    ascending order of sizes if there are several.
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
        return  # the peak since the start of the process, which is correct for ascending sizes


def _resident_bytes(field: str) -> int:
    """A field of ``/proc/self/status``; on systems without it, the peak since the start of the process."""
    status = PROC_SELF / "status"
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def describe_machine(device: str) -> dict[str, Any]:
    """Hardware and software, to compare results across machines."""
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
    """:func:`describe_machine` as lines of text."""
    lines = [
        f"CPU: {machine['cpu']}, {machine['cores']} cores, {' '.join(machine['isa'])}; "
        f"load average {machine['load_average']} at the start",
        f"{machine['system']}, Python {machine['python']}, torch {machine['torch']} ({machine['torch_isa']}), "
        f"grootvl_mm {machine['grootvl_mm']}, operators {machine['operators']}",
    ]
    if "gpu" in machine:
        lines.insert(1, f"GPU: {machine['gpu']}, CUDA {machine['cuda']}")
    return lines


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Align columns of text; numbers are right-aligned."""
    lines = [list(header), *(list(row) for row in rows)]
    columns = []
    for column in zip(*lines, strict=True):
        width = max(map(len, column))
        numeric = all(not cell or cell[0].isdigit() or cell == "-" for cell in column[1:])
        columns.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in column])
    columns = [[column[0], "-" * len(column[0]), *column[1:]] for column in columns]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def format_seconds(seconds: float) -> str:
    """Three digits with a suitable unit."""
    unit, scale = next(((u, f) for u, f in (("s", 1), ("ms", 1e3)) if seconds * f >= 1), ("us", 1e6))
    value = seconds * scale
    decimals = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{decimals}f} {unit}"


def format_ratio(ratio: Mapping[str, float]) -> tuple[str, str]:
    """The ratio of the medians, and its percentiles."""
    return f"{ratio['median']:.2f}x", f"{ratio['p10']:.2f}..{ratio['p90']:.2f}"


def without_infinities(data: Any) -> Any:
    """JSON has neither NaN nor infinity: None instead."""
    if isinstance(data, Mapping):
        return {name: without_infinities(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [without_infinities(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def write_results(out: Path, name: str, data: Mapping[str, Any], text: str, figure: Figure) -> None:
    """Write the text to stdout, and NAME.json, NAME.txt and NAME.png to a folder; NaN and infinity become null."""
    sys.stdout.write(text)
    with cli.output_file(out / f"{name}.json") as partial:
        partial.write_text(json.dumps(without_infinities(data), indent=2, allow_nan=False) + "\n")
    with cli.output_file(out / f"{name}.txt") as partial:
        partial.write_text(text)
    with cli.output_file(out / f"{name}.png") as partial:
        figure.savefig(partial, format="png", dpi=130)
