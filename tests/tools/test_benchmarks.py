"""The benchmarks of tools/analysis_tools, run at tiny sizes: what they write, not how fast anything is."""

import functools
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.helpers.analysis_runs import read_results, run_here
from tests.helpers.tool_runs import ROOT, load_script

ROWS = ["grid_edge_weight", "grid_tree", "tree_scan", "tree_scan, forward + backward"]
ROWS += ["tree_selective_scan", "tree_selective_scan, forward + backward"]


def assert_spread(spread: dict[str, float]) -> None:
    assert all(math.isfinite(value) and value > 0 for value in spread.values())
    assert spread["p10"] <= spread["p90"]


@pytest.mark.parametrize("precision", ["none", "bfloat16"])
def test_operators(precision: str, monkeypatch, capsys, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    options = ("--maps", "2x8x8x32", "--sides", 4, 8, "--rounds", 2, "--autocast", precision, "--out", out)
    run_here(monkeypatch, "benchmark_ops.py", *options)
    data, text = read_results(out, "benchmark_ops")
    assert text in capsys.readouterr().out
    assert {"cpu", "cores", "isa", "torch", "operators"} <= set(data["machine"])
    (shape,) = data["shapes"]
    assert [row["name"] for row in shape["rows"]] == ROWS
    for row in shape["rows"]:
        for spread in (row["ours"], row["other"], row["ratio"]):
            assert_spread(spread)
        assert row["ratio"]["median"] == pytest.approx(row["other"]["median"] / row["ours"]["median"])
    assert {len(seconds) for seconds in data["curves"].values()} == {2}


def test_operators_that_differ_are_not_timed(monkeypatch, tmp_path: Path) -> None:
    module = load_script("tools/analysis_tools/benchmark_ops.py")
    monkeypatch.setattr(module, "weights_in_pytorch", lambda feature: torch.zeros(1))
    with pytest.raises(AssertionError, match="the results of grid_edge_weight and cosine_similarity differ"):
        run_here(monkeypatch, "benchmark_ops.py", "--maps", "1x4x4x8", "--out", tmp_path)
    assert not list(tmp_path.iterdir())


def test_models(monkeypatch, capsys, tmp_path: Path) -> None:
    options = ("--images", "1x64x64", "--rounds", 1, "--autocast", "bfloat16", "--out", tmp_path)
    run_here(monkeypatch, "benchmark_model.py", *options)
    data, text = read_results(tmp_path, "benchmark_model")
    assert text in capsys.readouterr().out
    assert "bfloat16 autocast" in text
    (shape,) = data["shapes"]
    models = ["GrootV-T", "Swin-T", "ConvNeXt-T"]
    assert [(row["step"], row["model"]) for row in shape["times"]] == [
        (step, model) for step in ("inference", "training") for model in models
    ]
    for row in shape["times"]:
        assert_spread(row["seconds"])
        assert row["images_per_second"] == pytest.approx(1 / row["seconds"]["median"])
        assert ("throughput_ratio" in row) == (row["model"] != "GrootV-T")
    assert shape["memory"] == dict.fromkeys(models, 2**20)


@pytest.mark.parametrize("script", ["benchmark_ops.py", "benchmark_model.py"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threads", 0), "--threads: expected 1 or more, got 0"),
        (("--rounds", "many"), "--rounds: invalid integer value: 'many'"),
        (("--out", __file__), "--out must be a folder"),
        (("--device", "tpu"), "invalid choice: 'tpu'"),
        (("--autocast", "int8"), "invalid choice: 'int8'"),
    ],
)
def test_one_clear_error(script: str, arguments: tuple, message: str, monkeypatch, capsys) -> None:
    assert message in refusal(script, arguments, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("benchmark_ops.py", ("--maps", "8x8"), "expected BATCHxHEIGHTxWIDTHxCHANNELS, got '8x8'"),
        ("benchmark_model.py", ("--images", "1x7x7"), "at least 32x32 pixels, got '1x7x7'"),
        ("benchmark_ops.py", ("--device", "cuda"), "--device cuda needs a GPU"),
    ],
)
def test_sizes_and_devices(script: str, arguments: tuple, message: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert message in refusal(script, arguments, monkeypatch, capsys)


def refusal(script: str, arguments: tuple, monkeypatch, capsys) -> str:
    """What a benchmark that refuses its arguments writes."""
    with pytest.raises(SystemExit) as exit_info:
        run_here(monkeypatch, script, *arguments)
    assert exit_info.value.code == 2
    output = capsys.readouterr().err
    assert output.count("error:") == 1
    return output


@pytest.fixture
def measuring(monkeypatch) -> ModuleType:
    """As spawned processes import it."""
    monkeypatch.syspath_prepend(str(ROOT / "tools" / "analysis_tools"))
    import measuring

    return measuring


def test_every_contender_meets_every_input_and_is_first_in_turn(measuring) -> None:
    calls = []
    contenders = {name: lambda value, name=name: calls.append((name, value)) for name in "ab"}
    times = measuring.time_in_turn(contenders, [0, 1, 2], 4, "cpu", "test")
    warm_up = 2 * measuring.WARM_UPS
    assert [name for name, _ in calls[warm_up::2]] == ["a", "b"] * 2
    assert [value for _, value in calls[warm_up::2]] == [0, 1, 2, 0]
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4}


def test_ratio_is_that_of_the_medians(measuring) -> None:
    ratio = measuring.ratio_of([20.0, 40.0, 900.0], [1.0, 2.0, 3.0])
    assert ratio["median"] == pytest.approx(20)
    assert 20 <= ratio["p10"] <= ratio["p90"] <= 300


def test_peak_memory_sees_what_is_freed(measuring) -> None:
    """In a separate process, whose memory earlier tests have not grown."""
    size = 2**26
    fill = functools.partial(b"".ljust, size, b"x")
    environment = measuring.MEMORY_ENVIRONMENT
    peak = measuring.run_fresh(measuring.peak_memory, fill, "cpu", threads=1, environment=environment)
    assert 0.5 * size < peak < 4 * size


def test_a_measuring_process_that_dies_is_an_error(measuring) -> None:
    with pytest.raises(SystemExit, match="the measuring process exited with status 3"):
        measuring.run_fresh(sys.exit, 3, threads=1)


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.34, "12.3 s"), (0.1234, "123 ms"), (1.5e-6, "1.50 us"), (0, "0.00 us")]
)
def test_seconds_have_three_digits(seconds: float, text: str, measuring) -> None:
    assert measuring.format_seconds(seconds) == text
