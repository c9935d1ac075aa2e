#!/usr/bin/env python
"""Break things on purpose, and check that nothing is lost, executed, deleted or left behind.

    python .dev_scripts/fault_campaign.py pickles checkpoints operators    # in this process, minutes
    python .dev_scripts/fault_campaign.py kills ranks links disks          # starts trainings; wants a quiet machine

Each part ends with one line of figures, and the command with status 1 if anything was wrong. docs/reliability.md has
the figures that were seen. Everything is random; --seed repeats it.
"""

import argparse
import collections
import contextlib
import json
import logging
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from grootvl_mm.apis.resume import find_resumable_checkpoint  # noqa: E402
from grootvl_mm.ops import grid_edge_weight, grid_tree, reference  # noqa: E402
from grootvl_mm.utils.safe_checkpoints import CheckpointError, read_checkpoint  # noqa: E402
from tests.helpers.crafted_pickles import HOSTILE, NO_DATA, write  # noqa: E402
from tests.helpers.faults import Way, attempt, damage_bytes, damage_weights, make_files, same, ways  # noqa: E402

logger = logging.getLogger("fault_campaign")
MARK = "GROOTVL_FAULT_CAMPAIGN"
CLASSIFIER = ROOT / "configs" / "demo" / "grootv-pico_demo-cls.py"


class Result(NamedTuple):
    """Figures of a part, and what went wrong."""

    figures: str
    faults: list[str]


def checkpoints(count: int, rng: random.Random) -> Result:
    """Damaged checkpoints through all ways of loading: loaded right, or one clear error; nothing else written."""
    faults, outcomes, loads = [], collections.Counter(), 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = make_files(folder)
        originals = {name: path.read_bytes() for name, path in files.items()}
        contents = {name: read_checkpoint(path) for name, path in files.items()}
        target = folder / "damaged" / "iter_9.pth"
        target.parent.mkdir()
        for number in range(count):
            what = rng.choice(list(files))
            bytewise = rng.random() < 0.6
            if bytewise:
                kind, damaged = damage_bytes(originals[what], rng)
                target.write_bytes(damaged)
            else:
                kind, content = damage_weights(contents[what], rng)
                torch.save(content, target)
            for name, way in ways(folder)[what].items():
                loads += 1
                try:
                    message = attempt(way, target)
                except BaseException as error:  # whatever is not a clear error is a fault
                    faults.append(f"{number}: {kind} {what}, {name}: {type(error).__name__}: {str(error)[:200]}")
                    continue
                outcomes["refused" if message else "loaded"] += 1
                if message is None and bytewise and not _holds(target, contents[what]):
                    faults.append(f"{number}: {kind} {what}, {name}: loaded other content")
                if message is None and not bytewise and way.complete:
                    faults.append(f"{number}: {kind} {what}, {name}: loaded in silence")
                leftovers = [path.name for path in target.parent.iterdir() if path != target]
                leftovers += [path.name for path in folder.iterdir() if path.name.startswith((".", "published"))]
                if leftovers:
                    faults.append(f"{number}: {kind} {what}, {name}: left {leftovers}")
    return Result(f"{count} damaged files, {loads} loads: {dict(outcomes)}", faults)


def _holds(path: Path, content: dict[str, Any]) -> bool:
    with contextlib.suppress(CheckpointError):
        return same(read_checkpoint(path), content)
    return False


def pickles(count: int, rng: random.Random) -> Result:
    """Hostile pickles through torch.load and all ways of loading: refused, nothing executed."""
    faults, loads = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train = ways(folder)["training"]
        for name, make in [*HOSTILE.items(), *NO_DATA.items()]:
            path = write(folder / "iter_1.pth", {"state_dict": {}, "meta": make()})
            for label, way in {"torch.load": Way(torch.load, complete=False), **train}.items():
                if label == "torch.load" and name in NO_DATA:
                    continue
                loads += 1
                try:
                    message = attempt(way, path)
                except Exception as error:
                    if label != "torch.load":
                        faults.append(f"{name}, {label}: {type(error).__name__}: {str(error)[:200]}")
                    continue
                if message is None:
                    faults.append(f"{name}, {label}: loaded")
    return Result(f"{len(HOSTILE) + len(NO_DATA)} hostile pickles, {loads} loads", faults)


def random_case(rng: random.Random) -> None:
    """Call the operators directly, with a tree that may be none, and any sizes and strides; errors are fine."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    height, width, batch, channels = (rng.choice([1, 1, 2, 3, 5, 8]) for _ in range(4))
    vertices = height * width
    dtype = rng.choice([torch.float32, torch.float64, torch.bfloat16])
    x = strided(torch.randn(batch, vertices, channels, generator=generator).to(dtype), rng)
    decay = strided(torch.rand(batch, vertices, channels, generator=generator).to(dtype), rng)
    weight = grid_edge_weight(strided(torch.randn(batch, channels, height, width, generator=generator), rng))
    parent, order = (strided(part, rng) for part in grid_tree(weight, height, width))
    hostile = rng.random() < 0.7
    if hostile:
        low, high = rng.choice([(0, vertices), (-3, vertices + 3), (-(2**31), 2**31 - 1)])
        parts = [parent.contiguous().clone(), order.contiguous().clone()]
        part = parts[rng.randrange(2)]
        for _ in range(rng.randint(1, vertices)):
            part.view(-1)[rng.randrange(part.numel())] = rng.randrange(low, high)
        parent, order = (strided(part, rng) for part in parts)
        if rng.random() < 0.2:
            parent = parent[:, : rng.randint(0, vertices)]
    arguments = (x, decay, parent, order, rng.choice(["all", "up", "down"]))
    try:
        result = torch.ops.grootvl.tree_scan(*arguments)
        torch.ops.grootvl.tree_scan_backward(torch.ones_like(result), *arguments)
    except (RuntimeError, ValueError, TypeError, IndexError):
        if not hostile:
            raise
        return
    if not hostile:
        expected = reference.tree_scan(*(value.double() for value in arguments[:2]), *arguments[2:])
        tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)


def strided(value: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """The same values in other memory."""
    choice = rng.randrange(4)
    if choice == 1:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if choice == 2:
        wide = value.new_zeros(*value.shape[:-1], 2 * value.shape[-1])
        wide[..., ::2] = value
        return wide[..., ::2]
    if choice == 3:
        return torch.cat([value[:1], value])[1:]
    return value


def operators(count: int, rng: random.Random) -> Result:
    """Random and hostile calls of the operators: right, or an error; memory does not grow."""
    faults = []
    seeds = [rng.randrange(2**62) for _ in range(count)]
    half = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, seed in enumerate(seeds):
        if number == count // 2:
            half = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            random_case(random.Random(seed))
        except Exception as error:
            faults.append(f"case {seed}: {type(error).__name__}: {str(error)[:200]}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - half) / 1024
    if grown > 16:
        faults.append(f"the process grew by {grown:.0f} MiB in the second half")
    kernels = os.environ.get("GROOTVL_CPU_ISA", "best of this machine")
    return Result(f"{count} calls on {kernels}; grown by {grown:.1f} MiB in the second half", faults)


class Trainings:
    """Starts the tools on generated data, and knows all processes that come of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        data = folder / "data"
        arguments = ("--out", data, "--train", 24, "--val", 4, "--size", 64, "--workers", 1)
        self.run("dataset_converters/make_demo_data.py", *arguments)
        self.config = folder / "config.py"
        self.config.write_text(
            f"_base_ = {str(CLASSIFIER)!r}\ndata = '{data}/classification/'\n"
            "train_dataloader = dict(batch_size=2, num_workers=2, dataset=dict(data_root=data))\n"
            "val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data))\n"
            "test_dataloader = val_dataloader\n"
            "default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1, max_keep_ckpts=3))\n"
            "log_processor = dict(window_size=1)\nrandomness = dict(seed=0)\n"
        )

    def start(self, script: str, *arguments: object, **options: Any) -> subprocess.Popen:
        """Start a script of ``tools/`` in a session of its own."""
        env = {
            **os.environ,
            MARK: self.mark,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
        }
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tools" / script), *map(str, arguments)],
            cwd=self.folder,
            env={**env, **options.pop("env", {})},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )

    def run(self, script: str, *arguments: object, **options: Any) -> tuple[int, str]:
        """Run a script; its status and what it wrote to stderr."""
        process = self.start(script, *arguments, **options)
        errors = process.communicate(timeout=3600)[1]
        return process.returncode, errors

    def alive(self) -> list[int]:
        """Processes that came of this campaign."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def wait_for_end(self, seconds: float) -> float | None:
        """Seconds until no process was left, or None if some were; these are ended."""
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            if not self.alive():
                return time.monotonic() - start
            time.sleep(0.1)
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return None


def kills(count: int, rng: random.Random) -> Result:
    """Kill trainings at random moments; resumed until they end, they equal one that was not, bitwise."""
    faults, done, longest = [], collections.Counter(), 0.0
    with tempfile.TemporaryDirectory() as temporary:
        trainings = Trainings(Path(temporary))
        kinds = {
            "iterations": ("train_cfg.max_iters=24", "train_cfg.val_interval=4"),
            "epochs": ("train_cfg.by_epoch=True", "train_cfg.max_epochs=4", "train_cfg.val_interval=1"),
        }
        for kind, steps in kinds.items():
            options = ["--exact-resume", "--cfg-options", *steps]
            if kind == "epochs":
                options += ["train_cfg._delete_=True", "default_hooks.checkpoint.by_epoch=True"]
                options += ["train_dataloader.sampler.type=DefaultSampler"]
            whole, killed = trainings.folder / f"{kind}-whole", trainings.folder / f"{kind}-killed"
            begin = time.monotonic()
            status, errors = trainings.run("train.py", trainings.config, "--work-dir", whole, *options)
            length = time.monotonic() - begin
            if status:
                faults.append(f"{kind}: the training itself failed: {errors[-300:]}")
                continue
            for number in range(count // len(kinds)):
                process = trainings.start("train.py", trainings.config, "--work-dir", killed, "--resume", *options)
                time.sleep(rng.uniform(0, length))
                if process.poll() is None:
                    stop = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
                    process.send_signal(stop)
                    done[signal.Signals(stop).name] += 1
                process.communicate(timeout=600)
                seconds = trainings.wait_for_end(60)
                if seconds is None:
                    faults.append(f"{kind}, kill {number}: processes were left")
                longest = max(longest, seconds or 60)
            status, errors = trainings.run("train.py", trainings.config, "--work-dir", killed, "--resume", *options)
            if status:
                faults.append(f"{kind}: resuming failed: {errors[-300:]}")
                continue
            last = find_resumable_checkpoint(whole)
            expected, got = read_checkpoint(last), read_checkpoint(killed / last.name)
            for part in ("state_dict", "optimizer", "param_schedulers"):
                if not same(expected.get(part), got.get(part)):
                    faults.append(f"{kind}: {part} differs from that of the training that was not killed")
    return Result(f"{dict(done)}; all processes gone after {longest:.1f} s at most", faults)


def ranks(count: int, rng: random.Random) -> Result:
    """Two processes, of which one is killed, or whose port is taken: an error in time, and no process is left."""
    faults, seconds = [], []
    with tempfile.TemporaryDirectory() as temporary, socket.socket() as taken:
        trainings = Trainings(Path(temporary))
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        options = ("--cfg-options", "train_cfg.max_iters=100000", "env_cfg.dist_cfg.timeout=60")

        def start(port: int, work_dir: Path) -> subprocess.Popen:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
            command += [str(ROOT / "tools/train.py"), str(trainings.config), "--work-dir", str(work_dir)]
            env = {**os.environ, MARK: trainings.mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            return subprocess.Popen(
                [*command, "--launcher", "pytorch", *options],
                env={**env, "CUDA_VISIBLE_DEVICES": ""},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )

        process = start(taken.getsockname()[1], trainings.folder / "taken")
        if process.wait(timeout=300) == 0:
            faults.append("a taken port is no error")
        for number in range(count):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            work_dir = trainings.folder / f"run-{number}"
            process = start(port, work_dir)
            deadline = time.monotonic() + 300
            while not list(work_dir.glob("iter_*.pth")) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
            main = [pid for pid in trainings.alive() if "train.py" in _command(pid) and _parent(pid) == process.pid]
            if len(main) != 2:
                faults.append(f"{number}: the training did not start: {process.communicate()[1][-300:]}")
                continue
            victim = rng.choice([*main, process.pid])
            os.kill(victim, signal.SIGKILL)
            gone = trainings.wait_for_end(120)
            process.communicate()
            if gone is None:
                faults.append(f"{number}: processes were left")
            seconds.append(gone or 120)
    return Result(f"{count} ranks or launchers killed; all gone after {max(seconds, default=0):.1f} s at most", faults)


def links(count: int, rng: random.Random) -> Result:
    """Two processes in two network namespaces, whose link is cut: both end with an error soon after the timeout."""
    if os.geteuid() or not shutil.which("ip"):
        return Result("not run: needs root and the command ip", [])
    faults, seconds, timeout = [], [], 20

    def configure(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    with tempfile.TemporaryDirectory() as temporary:
        trainings = Trainings(Path(temporary))
        for number in range(count):
            spaces = [f"faults{os.getpid()}{side}" for side in "ab"]
            ends = [f"fc{os.getpid()}{side}" for side in "ab"]
            try:
                for space in spaces:
                    configure("netns", "add", space)
                configure("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
                for side, (space, end) in enumerate(zip(spaces, ends, strict=True)):
                    configure("link", "set", end, "netns", space)
                    configure("-n", space, "addr", "add", f"10.213.0.{side + 1}/24", "dev", end)
                    configure("-n", space, "link", "set", end, "up")
                    configure("-n", space, "link", "set", "lo", "up")
                work_dir = trainings.folder / f"run-{number}"
                processes = [_rank(trainings, work_dir, side, spaces[side], ends[side], timeout) for side in (0, 1)]
                deadline = time.monotonic() + 300
                while not list(work_dir.glob("iter_*.pth")) and time.monotonic() < deadline:
                    time.sleep(0.2)
                configure("-n", spaces[0], "link", "set", ends[0], "down")
                gone = trainings.wait_for_end(timeout + 60)
                seconds.append(gone or timeout + 60)
                outputs = [process.communicate()[1] for process in processes]
                if gone is None or not list(work_dir.glob("iter_*.pth")):
                    faults.append(f"{number}: did not end, or did not start: {outputs[0][-300:]}")
                if any(process.returncode == 0 for process in processes):
                    faults.append(f"{number}: ended as if nothing was: {[p.returncode for p in processes]}")
                if not all("error: lost another process" in output for output in outputs):
                    faults.append(f"{number}: no clear error: {[output[-300:] for output in outputs]}")
            finally:
                for space in spaces:
                    subprocess.run(["ip", "netns", "del", space], stderr=subprocess.DEVNULL, check=False)
    return Result(f"{count} links cut, timeout {timeout} s; ended after {max(seconds):.1f} s at most", faults)


def _rank(trainings: Trainings, work_dir: Path, rank: int, space: str, end: str, timeout: int) -> subprocess.Popen:
    """One process of a training of two, in a network namespace."""
    command = ["ip", "netns", "exec", space, sys.executable, str(ROOT / "tools/train.py"), str(trainings.config)]
    options = ["train_cfg.max_iters=100000", f"env_cfg.dist_cfg.timeout={timeout}"]
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "10.213.0.1", "MASTER_PORT": 29511}
    env |= {MARK: trainings.mark, "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*command, "--work-dir", str(work_dir), "--launcher", "pytorch", "--cfg-options", *options],
        env={**os.environ, "GLOO_SOCKET_IFNAME": end, **{name: str(value) for name, value in env.items()}},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def disks(count: int, rng: random.Random) -> Result:
    """Files that may not grow any more, as on a full disk: one line, status 1, and the last checkpoint stays whole."""
    faults = []
    with tempfile.TemporaryDirectory() as temporary:
        trainings = Trainings(Path(temporary))
        work_dir = trainings.folder / "run"
        options = ("--work-dir", work_dir, "--cfg-options")
        trainings.run("train.py", trainings.config, *options, "train_cfg.max_iters=2")
        source = find_resumable_checkpoint(work_dir)
        size = source.stat().st_size
        for number in range(count):
            limit = rng.randint(size // 10, size - 1)

            def limited(limit: int = limit) -> None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

            commands = {
                "train.py": (trainings.config, "--resume", *options, "train_cfg.max_iters=4"),
                "model_converters/publish_model.py": (source, trainings.folder / "published.pth"),
            }
            for script, arguments in commands.items():
                status, errors = trainings.run(script, *arguments, preexec_fn=limited)
                lines = [line for line in errors.splitlines() if line.startswith("error: ")]
                full = script == "train.py" or limit < size // 4  # what is published is smaller
                if full and (status == 0 or len(lines) != 1 or "Traceback" in errors):
                    faults.append(f"{number}: {script} ends with status {status}: {errors[-300:]}")
                left = [path.name for path in trainings.folder.iterdir() if path.name.startswith(".")]
                if left:
                    faults.append(f"{number}: {script} left {left}")
            if find_resumable_checkpoint(work_dir) is None:
                faults.append(f"{number}: no whole checkpoint is left")
    return Result(f"{count} full disks", faults)


PARTS: dict[str, tuple[Callable[[int, random.Random], Result], int]] = {
    "pickles": (pickles, 1),
    "checkpoints": (checkpoints, 1000),
    "operators": (operators, 10_000),
    "kills": (kills, 50),
    "ranks": (ranks, 6),
    "links": (links, 2),
    "disks": (disks, 5),
}


def run_parts(names: list[str], count: int | None, seed: int) -> Iterator[tuple[str, Result]]:
    """Run some parts."""
    for name in names:
        part, default = PARTS[name]
        yield name, part(default if count is None else count, random.Random(f"{name} {seed}"))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, help="what to break")
    parser.add_argument("--count", type=int, help="how often (default: that of docs/reliability.md)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures as JSON, too")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    results = {}
    for name, result in run_parts(args.parts, args.count, args.seed):
        logger.info("%s: %s; %d faults", name, result.figures, len(result.faults))
        for fault in result.faults[:20]:
            logger.info("  %s", fault)
        results[name] = result._asdict()
    if args.out:
        args.out.write_text(json.dumps(results, indent=2))
    sys.exit(any(result["faults"] for result in results.values()))


if __name__ == "__main__":
    main()
