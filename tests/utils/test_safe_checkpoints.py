import io
import pickle
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

from grootvl_mm.utils.checkpoint_types import reconstruct
from grootvl_mm.utils.safe_checkpoints import CheckpointError, load_safely, read_checkpoint
from tests.helpers.crafted_pickles import (
    HOSTILE,
    HOSTILE_TENSORS,
    NO_DATA,
    Op,
    build,
    call,
    dump,
    named,
    storage,
    tensor,
    write,
)
from tests.helpers.faults import TRAINING
from tests.helpers.marks import needs_safe_globals
from tests.helpers.small_runs import run


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    run(tmp_path, 2, **TRAINING)
    return tmp_path / "iter_2.pth"


def load_in_fresh_process(checkpoint: Path, imports: str) -> subprocess.CompletedProcess:
    code = (
        f"{imports}\nimport torch\n"
        f"content = torch.load({str(checkpoint)!r}, weights_only=True)\n"
        "loss = content['message_hub']['log_scalars']['train/loss']\n"
        "assert loss.statistics('mean', 2) == loss.mean(2) > 0\n"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@needs_safe_globals
def test_runner_checkpoint_loads_safely_once_the_package_is_imported(checkpoint: Path):
    without = load_in_fresh_process(checkpoint, "import mmengine")
    assert "Unsupported global" in without.stderr
    loaded = load_in_fresh_process(checkpoint, "import grootvl_mm")
    assert loaded.returncode == 0, loaded.stderr


def test_resume_works(checkpoint: Path):
    runner = run(checkpoint.parent, 4, checkpoint, scores=(1.0, 2.0), **TRAINING)
    assert runner.iter == 4
    assert len(runner.message_hub.get_scalar("train/loss").data[0]) == 4


def same(got: object, value: object) -> bool:
    """Whether ``got`` is what Python's own pickle makes of a value."""
    expected = pickle.loads(pickle.dumps(value, 2))
    if isinstance(expected, np.ndarray):
        flags = ("C_CONTIGUOUS", "F_CONTIGUOUS", "WRITEABLE", "ALIGNED")
        return (
            type(got) is np.ndarray
            and (got.dtype, got.shape, got.strides) == (expected.dtype, expected.shape, expected.strides)
            and got.tobytes() == expected.tobytes()
            and all(got.flags[flag] == expected.flags[flag] for flag in flags)
        )
    return type(got) is type(expected) and (got == expected or got != got)


VALUES = {
    **{f"array of {code}": np.arange(6).astype(code).reshape(2, 3) for code in "?bhilqBHILQefdFD"},
    **{f"scalar of {code}": np.ones(1, code)[0] for code in "?bhilBHILefdFD"},
    "big-endian": np.arange(3, dtype=">f8"),
    "big-endian integers": np.arange(3, dtype=">i4"),
    "Fortran order": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "no axes": np.array(2.5),
    "empty": np.zeros((0, 3), np.float32),
    "large": np.arange(5000.0),
    "not contiguous": np.arange(6.0)[::2].copy(),
    "not a number": np.array([np.nan, np.inf, -0.0]),
    "dtype": np.dtype("float32"),
    "big-endian dtype": np.dtype(">i2"),
    "tuple": (1, "a", (None, 2.5)),
}


@pytest.mark.usefixtures("reader")
def test_what_mmengine_writes_is_read_exactly(tmp_path: Path):
    shared = np.arange(3.0)
    content = OrderedDict(values=dict(VALUES), nested=[({"a": shared},), shared], weights=nn.Linear(2, 2).state_dict())
    history = HistoryBuffer([1.0, 2.5], [1, 3], 7)
    torch.save({**content, "history": history}, tmp_path / "file.pth")
    loaded = load_safely(tmp_path / "file.pth")
    wrong = [name for name, value in VALUES.items() if not same(loaded["values"][name], value)]
    assert not wrong
    (nested,), again = loaded["nested"]
    assert nested["a"] is again
    assert loaded["weights"]._metadata == content["weights"]._metadata
    assert type(loaded["history"]) is HistoryBuffer
    assert loaded["history"].max_length == 7
    assert loaded["history"].statistics("mean", 2) == history.mean(2)
    assert all(same(*pair) for pair in zip(loaded["history"].data, history.data, strict=True))
    loaded["history"].update(3.0)
    assert len(loaded["history"].data[0]) == 3


@needs_safe_globals
def test_plain_loading_gives_arrays_that_compute_and_are_saved_as_such(tmp_path: Path):
    arrays = {name: value for name, value in VALUES.items() if isinstance(value, np.ndarray)}
    torch.save(arrays, tmp_path / "file.pth")
    loaded = torch.load(tmp_path / "file.pth", weights_only=True)
    for name, value in arrays.items():
        assert isinstance(loaded[name], np.ndarray)
        np.testing.assert_array_equal(loaded[name] + loaded[name].sum(), value + value.sum())
        assert same(pickle.loads(pickle.dumps(loaded[name])), value)


@pytest.mark.usefixtures("reader")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(name: str, tmp_path: Path):
    path = write(tmp_path / "crafted.pth", {"state_dict": {}, "meta": HOSTILE[name]()})
    with pytest.raises(CheckpointError) as raised:
        read_checkpoint(path)
    assert "\n" not in str(raised.value)


def test_no_hostile_pickle_hides_another():
    assert len(HOSTILE | HOSTILE_TENSORS | NO_DATA) == len(HOSTILE) + len(HOSTILE_TENSORS) + len(NO_DATA)


def test_versions_of_modules_are_numbers(tmp_path: Path):
    for metadata in ({"": 5}, {"": {"version": "2"}}, [1], {1: {"version": 1}}, {"": {"version": 1, "a": tensor()}}):
        crafted = build(call(named("collections.OrderedDict"), [("a", 1)]), {"_metadata": metadata})
        loaded = load_safely(write(tmp_path / "crafted.pth", {"weights": crafted}))["weights"]
        assert not hasattr(loaded, "_metadata")


@pytest.mark.parametrize("name", NO_DATA)
def test_what_is_no_data_is_refused(name: str, tmp_path: Path):
    path = write(tmp_path / "crafted.pth", {"state_dict": NO_DATA[name]()})
    torch.load(path)
    with pytest.raises(pickle.UnpicklingError, match="the checkpoint holds"):
        load_safely(path)


def test_real_types_beside_the_stand_ins_are_no_way_around():
    """A host may allow NumPy's own types, too; the stand-ins then meet them."""
    array = reconstruct(np.ndarray, (0,), b"b")
    array.__setstate__((1, (2,), np.dtype("f8", copy=True), False, bytes(16)))
    assert same(array.view(np.ndarray), np.zeros(2))
    for wrong in ("O", "V8", "f8,f8", "U2", "M8[s]", "g"):
        dtype = np.dtype(wrong)
        with pytest.raises(pickle.UnpicklingError):
            reconstruct(np.ndarray, (0,), b"b").__setstate__((1, (1,), dtype, False, bytes(dtype.itemsize)))


def test_attributes_that_hide_methods_are_dropped(tmp_path: Path):
    dictionary = call(named("collections.OrderedDict"), [("a", 1)])
    crafted = build(dictionary, {"items": "hidden", "_metadata": {"": {"version": 1}}})
    loaded = load_safely(write(tmp_path / "crafted.pth", {"weights": crafted}))["weights"]
    assert list(loaded.items()) == [("a", 1)]
    assert vars(loaded) == {"_metadata": {"": {"version": 1}}}
    weight = torch.ones(3)
    weight.numel = "hidden"
    torch.save({"a": weight}, tmp_path / "file.pth")
    assert load_safely(tmp_path / "file.pth")["a"].numel() == 3


def test_content_that_holds_itself(tmp_path: Path):
    crafted = Op(pickle.EMPTY_LIST + pickle.BINPUT + b"\0" + pickle.BINGET + b"\0" + pickle.APPEND)
    content = load_safely(write(tmp_path / "crafted.pth", {"a": crafted}))
    assert content["a"][0] is content["a"]
    deep = Op(pickle.EMPTY_TUPLE + 100_000 * pickle.TUPLE1)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(write(tmp_path / "crafted.pth", {"a": deep}))


@pytest.mark.usefixtures("reader")
def test_torchscript_and_tar_archives_are_refused(tmp_path: Path):
    torch.jit.script(nn.Identity()).save(str(tmp_path / "program.pth"))
    with tarfile.open(tmp_path / "archive.pth", "w") as file:
        file.add(tmp_path / "program.pth", "pickle")
    for name in ("program.pth", "archive.pth"):
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / name)


def archive(method: int, content: bytes) -> tuple[bytes, bytes, bytes]:
    """A checkpoint of one tensor: its entries, their directory, and the end record."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as writer:
        numbers = storage(numel=len(content) // 4)
        writer.writestr("archive/data.pkl", dump({"a": tensor((len(content) // 4,), numbers=numbers)}))
        writer.writestr("archive/data/0", content, method)
        writer.writestr("archive/version", "3\n")
        start = writer.start_dir
    whole = file.getvalue()
    return whole[:start], whole[start:-22], whole[-22:]


def test_an_archive_has_one_directory(tmp_path: Path):
    """Python's reader looks for it before the end record, torch's where the end record says that it is."""
    entries, directory, end = archive(zipfile.ZIP_DEFLATED, bytes(2**20))
    size = len(entries)
    harmless = next(
        found
        for content in range(size - size % 4, 0, -4)
        for found in [archive(zipfile.ZIP_STORED, bytes(content))]
        if len(found[0]) <= size
    )
    padding = bytes(size - len(harmless[0]))
    path = tmp_path / "crafted.pth"
    path.write_bytes(entries + directory + padding + harmless[0] + harmless[1] + end)
    assert torch.load(path)["a"].numel() == 2**18
    with pytest.raises(CheckpointError, match="its directory is not where it should be"):
        read_checkpoint(path)
    path.write_bytes(b"".join(harmless))
    assert read_checkpoint(path)["a"].numel() < 2**18


@pytest.mark.skipif(
    torch.__version__ < "2.6", reason="PyTorch 2.4 cannot read small archives that are written as large"
)
def test_archives_written_as_large_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "file.pth"
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    write(path, {"a": tensor()})
    assert read_checkpoint(path)["a"].tolist() == [0] * 4
    content = bytearray(path.read_bytes())
    assert content[-42:-38] == b"PK\6\7"
    for place, message in ((-42 + 8, "end record is not where"), (-42 - 8, "directory is not where")):
        changed = content.copy()
        changed[place] ^= 1
        path.write_bytes(changed)
        # Python 3.13 checks that itself.
        with pytest.raises(CheckpointError, match=f"{message}|the archive has no end"):
            read_checkpoint(path)


class Command:
    def __reduce__(self):
        return (print, ("executed",))


@needs_safe_globals
def test_objects_are_still_refused(tmp_path: Path, capsys):
    for content in (Command(), np.array([Command()], dtype=object)):
        torch.save({"state_dict": content}, tmp_path / "crafted.pth")
        with pytest.raises(pickle.UnpicklingError):
            torch.load(tmp_path / "crafted.pth")
    assert not capsys.readouterr().out


def numpys_own() -> list:
    """What Hugging Face's Trainer and Accelerate put on torch's list while they read states of random generators."""
    reconstruct, scalar = (value.__reduce__()[0] for value in (np.zeros(1), np.float64(0)))
    return [reconstruct, scalar, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


@needs_safe_globals
def test_other_libraries_read_beside_the_stand_ins(tmp_path: Path) -> None:
    """Whatever of their types torch's list has: it has no order, and a mixture would read nothing."""
    path = tmp_path / "state.pth"
    torch.save({"state": np.random.RandomState(5).get_state(), "score": np.float64(0.5)}, path)
    own = numpys_own()
    for number in range(2 ** len(own)):
        allowed = [entry for position, entry in enumerate(own) if number >> position & 1]
        with torch.serialization.safe_globals(allowed):
            found = torch.load(path, weights_only=True)
        generator = np.random.RandomState()
        generator.set_state(found["state"])
        assert generator.randint(1000) == np.random.RandomState(5).randint(1000)
        assert found["score"] == 0.5


@needs_safe_globals
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_by_plain_loading(name: str, tmp_path: Path) -> None:
    """And the types that another library has allowed are no way around."""
    path = write(tmp_path / "crafted.pth", {"state_dict": {}, "meta": HOSTILE[name]()})
    for allowed in ([], numpys_own()):
        with (
            torch.serialization.safe_globals(allowed),
            pytest.raises((pickle.UnpicklingError, AttributeError, TypeError)),
        ):
            torch.load(path)


def test_threads_read_as_if_alone(tmp_path: Path) -> None:
    """While one thread reads a checkpoint, another one's torch.load gives tensors, not what stands in for them."""
    torch.save({"a": torch.ones(3)}, tmp_path / "file.pth")
    done, wrong = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            wrong.extend(
                type(value) for value in torch.load(tmp_path / "file.pth").values() if type(value) is not torch.Tensor
            )

    thread = threading.Thread(target=read)
    thread.start()
    for _ in range(50):
        assert type(load_safely(tmp_path / "file.pth")["a"]) is torch.Tensor
    done.set()
    thread.join()
    assert not wrong
