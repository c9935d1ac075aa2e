"""The benchmarks of tools/analysis_tools, for real but at tiny sizes: what they write, not how fast anything is."""

import functools
import json
import math
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.tool_runs import ROOT, Command

TOOLS = ROOT / "tools" / "analysis_tools"
OPERATORS = ["grid_edge_weight", "grid_tree", "tree_scan", "tree_scan_backward"]
ROWS = {
    *("spanning_tree_4x4", "spanning_tree_8x8", "tree_and_order_4x4", "tree_and_order_8x8"),
    *("edge_weight", "edge_weight_nhwc", "scan", "scan_backward", "growth", "layer", "layer_training"),
}


def read_results(folder: Path, name: str) -> tuple[dict, str]:
    """The JSON file and the text; the picture opens and is not empty."""
    assert {path.name for path in folder.iterdir()} == {f"{name}.json", f"{name}.txt", f"{name}.png"}
    with Image.open(folder / f"{name}.png") as picture:
        extrema = picture.convert("L").getextrema()
        assert min(picture.size) > 200
    assert extrema[0] < 100 < extrema[1]
    return json.loads((folder / f"{name}.json").read_text()), (folder / f"{name}.txt").read_text()


def assert_spread(spread: dict[str, float]) -> None:
    assert all(math.isfinite(value) and value > 0 for value in spread.values())
    assert spread["p10"] <= spread["p90"]


@pytest.fixture
def hide(tmp_path: Path):
    """Environment in which packages seem not to be installed."""

    def make(*packages: str) -> dict[str, str]:
        lines = ["import sys", *(f"sys.modules[{package!r}] = None" for package in packages)]
        (tmp_path / "sitecustomize.py").write_text("\n".join(lines))
        return {"PYTHONPATH": str(tmp_path)}

    return make


@pytest.mark.slow
def test_operators(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    output = command("analysis_tools/benchmark_ops.py", "--quick", "--out", out)
    data, text = read_results(out, "benchmark_ops")
    assert text in output
    assert data["quick"] is True
    assert "QUICK" in text
    assert {"cpu", "cores", "isa", "torch", "operators"} <= set(data["machine"])
    (run,) = data["runs"]
    assert run["threads"] == 1
    rows = {row["name"]: row for row in run["rows"]}
    assert set(rows) == ROWS
    for row in rows.values():
        assert row["title"] in text
        assert row["inputs"] == row["measurements"] == 2
        for spread in (row["ratio"], row["ours"]["seconds"], row["other"]["seconds"]):
            assert_spread(spread)
        # Tiny sizes are held against nothing.
        assert (row["goal"]["floor"], row["goal"]["aim"], row["verdict"]) == (None, None, "")
    assert rows["scan"]["ours"]["gigabytes_per_second"] > 0
    speedup = rows["edge_weight"]
    expected = speedup["other"]["seconds"]["median"] / speedup["ours"]["seconds"]["median"]
    assert speedup["ratio"]["median"] == pytest.approx(expected)
    assert [curve["vertices"] for curve in run["curves"]] == [64, 256]
    for curve in run["curves"]:
        assert list(curve["seconds"]) == [*OPERATORS, "scipy tree + order"]
        for spread in curve["seconds"].values():
            assert_spread(spread)
    assert set(data["memory"]) == {"TreeSSM", "PyTorch operators"}
    for peaks in data["memory"].values():
        assert [peak["vertices"] for peak in peaks] == [1024, 9216]
        assert 0 < peaks[1]["bytes"] < 2**30


@pytest.mark.slow
def test_operators_without_scipy(command: Command, tmp_path: Path, hide) -> None:
    # A folder that is there already, with the results of another run.
    out = tmp_path / "out"
    out.mkdir()
    (out / "benchmark_ops.json").write_text("old")
    only = ("--only", "spanning_tree", "scan", "--threads", 1, "--inputs", 3, "--rounds", 2)
    output = command("analysis_tools/benchmark_ops.py", "--quick", *only, "--out", out, **hide("scipy"))
    assert output.count("scipy not installed") == 2
    assert not (out / "benchmark_ops.png").exists()  # a picture of the curves, which were not asked for
    (run,) = json.loads((out / "benchmark_ops.json").read_text())["runs"]
    rows = {row["name"]: row for row in run["rows"]}
    assert set(rows) == {"spanning_tree_4x4", "spanning_tree_8x8", "scan"}
    assert rows["spanning_tree_4x4"]["not_measured"] == "scipy not installed"
    assert (rows["scan"]["inputs"], rows["scan"]["measurements"]) == (3, 6)


@pytest.mark.slow
def test_models_in_inference(command: Command, tmp_path: Path, hide) -> None:
    out = tmp_path / "out"
    arguments = ("--quick", "--rounds", 1, "--steps", "inference", "--shapes", "224", "512", "--out", out)
    output = command("analysis_tools/benchmark_model.py", *arguments, **hide("mmseg"))
    data, text = read_results(out, "benchmark_model")
    assert text in output
    assert data["memory"] == []
    (run,) = data["runs"]
    rows = {(row["shape"], row["model"]): row for row in run["rows"]}
    assert rows.pop(("512", "Swin-T"))["not_measured"] == "mmsegmentation not installed"
    assert "mmsegmentation not installed" in text
    peers = {("224", "Swin-T"), ("224", "ConvNeXt-T")}
    assert set(rows) == peers | {("224", "GrootV-T"), ("512", "GrootV-T")}
    for key, row in rows.items():
        assert_spread(row["seconds"])
        assert row["images_per_second"] == pytest.approx(1 / row["seconds"]["median"])
        assert (key in peers) == ("throughput_ratio" in row)
        if key in peers:
            assert_spread(row["throughput_ratio"])
    assert [share["shape"] for share in run["shares"]] == ["224", "512"]
    for share in run["shares"]:
        assert list(share["seconds"]) == ["forward", "grid_edge_weight", "grid_tree", "tree_scan"]
        for spread in share["seconds"].values():
            assert_spread(spread)
        parts = sum(share["seconds"][name]["median"] for name in list(share["seconds"])[1:])
        assert share["share"]["median"] == pytest.approx(parts / share["seconds"]["forward"]["median"])


@pytest.mark.slow
def test_models_in_training(command: Command, tmp_path: Path) -> None:
    arguments = ("--quick", "--rounds", 1, "--steps", "training", "--shapes", "800x1333", "--amp", "--out", tmp_path)
    command("analysis_tools/benchmark_model.py", *arguments)
    data, text = read_results(tmp_path, "benchmark_model")
    assert "bfloat16 autocast" in text
    (run,) = data["runs"]
    assert [row["model"] for row in run["rows"]] == ["GrootV-T", "Swin-T"]
    assert run["shares"] == []
    ours, peer = data["memory"]
    # At least the gradients of the parameters, 28 million of 4 bytes.
    assert 2**26 < ours["bytes"] < 2**30
    assert 2**26 < peer["bytes"] < 2**30
    assert peer["ratio"] == pytest.approx(ours["bytes"] / peer["bytes"])


@pytest.fixture
def refuse(monkeypatch, capsys):
    """Run a benchmark in this process until it refuses its arguments; return what it wrote."""

    def run(script: str, *arguments: object) -> str:
        monkeypatch.syspath_prepend(str(TOOLS))
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(TOOLS / script), run_name="__main__")
        assert exit_info.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("script", ["benchmark_ops.py", "benchmark_model.py"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threads", 0), "--threads: expected 1 or more, got 0"),
        (("--rounds", "many"), "--rounds: invalid integer value: 'many'"),
        (("--out", __file__), "--out must be a folder"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
    ],
)
def test_one_clear_error(script: str, arguments: tuple, message: str, refuse) -> None:
    output = refuse(script, *arguments)
    assert message in output
    assert output.count("error:") == 1


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("benchmark_ops.py", ("--only", "speed"), "invalid choice: 'speed'"),
        ("benchmark_model.py", ("--shapes", "7x7"), "invalid choice: '7x7'"),
    ],
)
def test_unknown_names(script: str, arguments: tuple, message: str, refuse) -> None:
    assert message in refuse(script, *arguments)


def test_cuda_needs_a_gpu(refuse, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--device cuda needs a GPU" in refuse("benchmark_ops.py", "--device", "cuda")


@pytest.fixture
def measuring(monkeypatch) -> Iterator:
    monkeypatch.syspath_prepend(str(TOOLS))
    import measuring

    yield measuring
    del sys.modules["measuring"]


def test_every_contender_meets_every_input_and_is_first_in_turn(measuring) -> None:
    calls = []
    contenders = {name: lambda value, name=name: calls.append((name, value)) for name in "ab"}
    times = measuring.time_in_turn(contenders, iter(range(10)), 3, "cpu", "test", hold=2, rounds=2)
    warm_up = 2 * measuring.WARM_UPS
    assert [name for name, _ in calls[warm_up::2]] == ["a", "b"] * 3
    assert [value for _, value in calls[warm_up::2]] == [0, 1, 0, 1, 2, 2]
    assert {name: len(values) for name, values in times.items()} == {"a": 6, "b": 6}


def test_ratio_is_that_of_the_medians(measuring) -> None:
    ratio = measuring.ratio_of([2.0, 4.0, 90.0], [1.0, 2.0, 3.0], factor=10)
    assert ratio["median"] == pytest.approx(20)
    assert 20 <= ratio["p10"] <= ratio["p90"] <= 300


@pytest.mark.parametrize(
    ("lower_is_better", "ratio", "verdict"),
    [(False, 3, "reaches aim"), (False, 1.5, "holds floor"), (False, 0.5, "misses floor"), (True, 1.5, "misses floor")],
)
def test_verdicts(lower_is_better: bool, ratio: float, verdict: str, measuring) -> None:
    floor, aim = (1, 0.5) if lower_is_better else (1, 2)
    assert measuring.Goal(floor, aim, lower_is_better).verdict(ratio) == verdict
    assert measuring.Goal().verdict(ratio) == ""


def test_peak_memory_sees_what_is_freed(measuring) -> None:
    """In a process of its own, whose memory no earlier test has grown."""
    size = 2**26
    fill = functools.partial(b"".ljust, size, b"x")
    environment = measuring.MEMORY_ENVIRONMENT
    peak = measuring.run_fresh(measuring.peak_memory, fill, "cpu", threads=1, environment=environment)
    assert 0.5 * size < peak < 4 * size


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.34, "12.3 s"), (0.1234, "123 ms"), (1.5e-6, "1.50 us"), (0, "0.00 us")]
)
def test_seconds_have_three_digits(seconds: float, text: str, measuring) -> None:
    assert measuring.format_seconds(seconds) == text
