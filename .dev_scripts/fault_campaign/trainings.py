"""Distributed trainings, and trainings with a full or read-only disk."""

import contextlib
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fault_campaign.results import ROOT, TO_END, TO_START, Result
from grootvl_mm.apis.resume import find_resumable_checkpoint

MARK = "GROOTVL_FAULT_CAMPAIGN"
CLASSIFIER = ROOT / "configs" / "demo" / "grootv-pico_demo-cls.py"
CONFIG = """\
_base_ = {base!r}
data = {data!r}
train_dataloader = dict(batch_size=2, num_workers=2, dataset=dict(data_root=data))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data))
test_dataloader = val_dataloader
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1, max_keep_ckpts=3))
log_processor = dict(window_size=1)
randomness = dict(seed=0)
"""


def make_config(folder: Path) -> Path:
    """Write the config of a small training; its data are generated on the first call."""
    data = folder / "data"
    if not data.exists():
        script = ROOT / "tools" / "dataset_converters" / "make_demo_data.py"
        options = ("--out", data, "--train", 24, "--val", 4, "--size", 64, "--workers", 1)
        command = [sys.executable, str(script), *map(str, options)]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    config = folder / "config.py"
    config.write_text(CONFIG.format(base=str(CLASSIFIER), data=f"{data}/classification/"))
    return config


class Trainings:
    """Starts the tools on generated data, and keeps track of all their processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex
        self.config = make_config(folder)

    def start(
        self,
        script: str,
        *arguments: object,
        prefix: Sequence[str] = (),
        python: Sequence[str] = (),
        env: Mapping[str, object] | None = None,
        **options: Any,
    ) -> subprocess.Popen:
        """Start a script in ``tools/`` in its own session, with Python's options and a command to start it through."""
        own = {MARK: self.mark, "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT, "CUDA_VISIBLE_DEVICES": "", **(env or {})}
        return subprocess.Popen(
            [*prefix, sys.executable, *python, str(ROOT / "tools" / script), *map(str, arguments)],
            cwd=self.folder,
            env={**os.environ, **{name: str(value) for name, value in own.items()}},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )

    def run(self, script: str, *arguments: object, **options: Any) -> tuple[int, str]:
        """Run a script; return its exit status and stderr."""
        process = self.start(script, *arguments, **options)
        errors = process.communicate(timeout=TO_START)[1]
        return process.returncode, errors

    def alive(self) -> list[int]:
        """All processes of this campaign."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
        return found

    def wait_for_end(self, seconds: float) -> float | None:
        """Wait until all processes have ended; return the seconds, or kill them and return None on timeout."""
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            if not self.alive():
                return time.monotonic() - start
            time.sleep(0.1)
        for pid in self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return None


def endless(trainings: Trainings, work_dir: Path, timeout: int) -> tuple[object, ...]:
    """The arguments of a distributed training that runs until it is interrupted."""
    options = ("train_cfg.max_iters=100000", f"env_cfg.dist_cfg.timeout={timeout}")
    return trainings.config, "--work-dir", work_dir, "--launcher", "pytorch", "--cfg-options", *options


def ranks(count: int, rng: random.Random) -> Result:
    """Kill one of two ranks, or start them on a port in use: a timely error, and no process is left."""
    faults, seconds = [], []
    with tempfile.TemporaryDirectory() as temporary, socket.socket() as taken:
        trainings = Trainings(Path(temporary))
        taken.bind(("127.0.0.1", 0))
        taken.listen()

        def start(port: int, work_dir: Path) -> subprocess.Popen:
            launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}")
            return trainings.start("train.py", *endless(trainings, work_dir, timeout=60), python=launcher)

        process = start(taken.getsockname()[1], trainings.folder / "taken")
        if process.wait(timeout=TO_START) == 0:
            faults.append("a taken port is no error")
        for number in range(count):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            work_dir = trainings.folder / f"run-{number}"
            process = start(port, work_dir)
            deadline = time.monotonic() + TO_START
            while not list(work_dir.glob("iter_*.pth")) and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
            main = [pid for pid in trainings.alive() if "train.py" in _command(pid) and _parent(pid) == process.pid]
            if len(main) != 2:
                faults.append(f"{number}: the training did not start: {process.communicate()[1][-300:]}")
                continue
            victim = rng.choice([*main, process.pid])
            os.kill(victim, signal.SIGKILL)
            gone = trainings.wait_for_end(TO_END)
            process.communicate()
            if gone is None:
                faults.append(f"{number}: processes were left")
            seconds.append(gone or TO_END)
    return Result(f"{count} ranks or launchers killed; all gone after {max(seconds, default=0):.1f} s at most", faults)


def links(count: int, rng: random.Random) -> Result:
    """Cut the link between two ranks in network namespaces: both end with an error soon after the timeout."""
    if os.geteuid() or not shutil.which("ip"):
        return Result("not run: needs root and the command ip", [])
    faults, seconds, timeout = [], [], 60

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
                deadline = time.monotonic() + TO_START
                while not list(work_dir.glob("iter_*.pth")) and time.monotonic() < deadline:
                    if any(process.poll() is not None for process in processes):
                        break
                    time.sleep(0.2)
                configure("-n", spaces[0], "link", "set", ends[0], "down")
                gone = trainings.wait_for_end(timeout + TO_END)
                seconds.append(gone or timeout + TO_END)
                outputs = [process.communicate()[1] for process in processes]
                if gone is None or not list(work_dir.glob("iter_*.pth")):
                    faults.append(f"{number}: did not end, or did not start: {outputs[0][-300:]}")
                if any(process.returncode == 0 for process in processes):
                    faults.append(f"{number}: ended with status 0: {[p.returncode for p in processes]}")
                if not all("error: lost another rank" in output for output in outputs):
                    faults.append(f"{number}: no clear error: {[output[-300:] for output in outputs]}")
            finally:
                for space in spaces:
                    subprocess.run(["ip", "netns", "del", space], stderr=subprocess.DEVNULL, check=False)
    return Result(f"{count} links cut, timeout {timeout} s; ended within {max(seconds):.1f} s", faults)


def _rank(trainings: Trainings, work_dir: Path, rank: int, space: str, end: str, timeout: int) -> subprocess.Popen:
    """Start one of two ranks in a network namespace."""
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "10.213.0.1", "MASTER_PORT": 29511}
    return trainings.start(
        "train.py",
        *endless(trainings, work_dir, timeout),
        prefix=("ip", "netns", "exec", space),
        env={**env, "GLOO_SOCKET_IFNAME": end},
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
    """Limit the size of files, as on a full disk: a one-line error, status 1, and the last checkpoint stays intact."""
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
                full = script == "train.py" or limit < size // 4  # published checkpoints are smaller
                if full and (status == 0 or len(lines) != 1 or "Traceback" in errors):
                    faults.append(f"{number}: {script} exited with status {status}: {errors[-300:]}")
                left = [path.name for path in trainings.folder.iterdir() if path.name.startswith(".")]
                if left:
                    faults.append(f"{number}: {script} left {left}")
            if find_resumable_checkpoint(work_dir) is None:
                faults.append(f"{number}: no complete checkpoint is left")
        mounted, more = _mounted_disks(trainings, source)
    return Result(f"{count} full disks; {mounted}", faults + more)


def _mounted_disks(trainings: Trainings, source: Path) -> tuple[str, list[str]]:
    """Run a training and a converter on mounted disks: a read-only one, and one that is too small for a checkpoint."""
    if os.geteuid() or not shutil.which("unshare"):
        return "none mounted: needs root and the command unshare", []
    faults, disk = [], trainings.folder / "disk"
    disk.mkdir()
    commands = {
        "train.py": (trainings.config, "--work-dir", disk / "run", "--cfg-options", "train_cfg.max_iters=4"),
        "model_converters/publish_model.py": (source, disk / "published.pth"),
    }
    disks = {"read-only": "ro", "of 200 KiB": "size=200k"}
    for kind, options in disks.items():
        mount = ("unshare", "-m", "sh", "-c", f'mount -t tmpfs -o {options} none "$0" && exec "$@"', str(disk))
        for script, arguments in commands.items():
            status, errors = trainings.run(script, *arguments, prefix=mount)
            lines = [line for line in errors.splitlines() if line.startswith("error: ")]
            if status == 0 or len(lines) != 1 or "Traceback" in errors:
                faults.append(f"{kind} disk: {script} exited with status {status}: {errors[-300:]}")
    return f"{len(disks)} mounted ones, read-only and too small", faults
