"""No process outlives the one that it works for."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Workers whose results nobody takes: they wait with full queues. Their numbers are the first line, as soon as they are.
LOADING = """
import os, sys, time
import torch
from torch.utils.data import DataLoader
from grootvl_mm.utils.processes import end_children_with_this_process

class Large(torch.utils.data.Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        return bytes(5_000_000)

if sys.argv[1] == "tied":
    end_children_with_this_process()
batches = iter(DataLoader(Large(), batch_size=None, num_workers=3, prefetch_factor=8))
next(batches)
time.sleep(1)
print(*[worker.pid for worker in batches._workers], flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks processes up as Linux shows them")
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_data_workers_end_with_their_training(stop: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", LOADING, "tied"], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    workers = [int(number) for number in process.stdout.readline().split()]
    assert len(workers) == 3
    assert all(map(alive, workers))
    process.send_signal(stop)
    process.wait(timeout=30)
    deadline = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)
    process.stdout.close()
