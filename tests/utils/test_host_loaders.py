"""mmengine's ways to load checkpoints, with our loaders: from disk, from the network, from model zoos."""

import functools
import http.server
import os
import pickle
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import checkpoint as host

from grootvl_mm.utils.host_loaders import safe_loaders
from grootvl_mm.utils.safe_checkpoints import CheckpointError
from tests.helpers.crafted_pickles import call, named, write


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serves a folder from this machine."""

    daemon_threads = True


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "served"
    folder.mkdir()
    with Server(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "cache"))


class Executes:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple:
        return Path.touch, (self.canary,)


def names(file: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The file by its path, by its address, and by names of two model zoos."""
    url = f"{address}/{file.name}"
    monkeypatch.setattr(host, "get_torchvision_models", lambda: {"model": url})
    monkeypatch.setattr(host, "get_external_models", lambda: {"model": url})
    return [str(file), url, "torchvision://model", "open-mmlab://model", "openmmlab://model"]


def test_code_is_never_executed(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    canary = tmp_path / "canary"
    file = tmp_path / "served" / "crafted.pth"
    torch.save({"state_dict": Executes(canary)}, file)
    with safe_loaders():
        for name in names(file, address, monkeypatch):
            with pytest.raises(CheckpointError, match="refuses"):
                host._load_checkpoint(name, map_location="cpu")
    assert not canary.exists()
    # The host itself, in a process where nobody has replaced its readers, executes what it downloads.
    code = "import sys; from mmengine.runner.checkpoint import _load_checkpoint; _load_checkpoint(sys.argv[1], 'cpu')"
    environment = {**os.environ, "TORCH_HOME": str(tmp_path / "home")}
    subprocess.run([sys.executable, "-c", code, f"{address}/crafted.pth"], env=environment, check=True)
    assert canary.exists()


def test_files_are_read_as_they_were_written(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "served" / "file.pth"
    meta = {"b": np.arange(3.0), "c": HistoryBuffer([1.0], [1])}
    torch.save({"state_dict": {"a": torch.ones(2)}, "meta": meta}, file)
    with safe_loaders():
        for name in names(file, address, monkeypatch):
            content = host._load_checkpoint(name, map_location="cpu")
            assert type(content["meta"]["b"]) is np.ndarray
            assert content["state_dict"]["a"].tolist() == [1, 1]


def test_damaged_and_missing_files(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "served" / "damaged.pth"
    torch.save({"a": torch.ones(1000)}, file)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    torch.load(file)  # which does not see it
    with safe_loaders():
        for name in names(file, address, monkeypatch):
            with pytest.raises(CheckpointError, match=r"the checksum of .* is wrong"):
                host._load_checkpoint(name)
        for name in (str(tmp_path / "nowhere.pth"), f"{address}/nowhere.pth", "http://127.0.0.1:1/a.pth"):
            with pytest.raises(CheckpointError, match=r"does not exist|cannot download") as raised:
                host._load_checkpoint(name)
            assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["", "..", "%2e%2e", "a/.."])
def test_addresses_of_no_file_write_nothing(name: str, tmp_path: Path, address: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    with safe_loaders(), pytest.raises(CheckpointError, match="names no file"):
        host._load_checkpoint(f"{address}/{name}")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(not hasattr(host, "_safe_torch_load"), reason="onedl-mmengine's way")
def test_refused_files_are_not_read_a_second_time(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    torch.save({"state_dict": Executes(canary)}, tmp_path / "crafted.pth")
    with safe_loaders(), pytest.raises(pickle.UnpicklingError):
        host._safe_torch_load(str(tmp_path / "crafted.pth"))
    assert not canary.exists()
    torch.save({"b": np.arange(3), "c": HistoryBuffer([1.0], [1])}, tmp_path / "file.pth")
    # The host's own way, beside our stand-ins.
    assert host._safe_torch_load(str(tmp_path / "file.pth"))["b"].tolist() == [0, 1, 2]
    crafted = write(tmp_path / "crafted.pth", {"a": call(named("builtins.getattr"), named("numpy.dtype"), "mro")})
    with pytest.raises(pickle.UnpicklingError), torch.serialization.safe_globals(host.get_torch_safe_globals()):
        torch.load(crafted)
