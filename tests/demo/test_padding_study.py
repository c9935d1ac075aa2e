"""demo/padding_study.py: its table, and a complete run on tiny data."""

import json
from pathlib import Path

import pytest

from tests.helpers.tool_runs import Command, load_script

for host in ("mmdet", "mmpretrain"):
    pytest.importorskip(host)


EVALUATED = ("batch size 1", "batch size 8", "padded to 256")


def result(ap: float, loss: float) -> dict:
    return {"loss": loss, **{name: {"box AP": ap, "mask AP": ap / 2} for name in EVALUATED}}


def test_table_has_means_and_standard_deviations() -> None:
    study = load_script("demo/padding_study.py")
    results = {"grootv": {"seed 0": result(0.2, 1.0), "seed 1": result(0.4, 2.0)}, "swin": {"seed 0": result(0.5, 3.0)}}
    header, _, grootv, swin = study.make_table(results, ["grootv", "convnext", "swin"]).splitlines()
    assert header == (
        "| backbone | seeds | training loss | box AP, batch size 1 | box AP, batch size 8 | box AP, padded to 256 "
        "| mask AP, batch size 1 | mask AP, batch size 8 | mask AP, padded to 256 |"
    )
    assert grootv.startswith(
        "| GrootV-pico | 2 | 1.500 ± 0.707 | 0.300 ± 0.141 | 0.300 ± 0.141 | 0.300 ± 0.141 | 0.150 ± 0.071 |"
    )
    assert swin.startswith("| Swin-pico | 1 | 3.000 | 0.500 |")


@pytest.mark.slow
def test_study_runs_and_does_not_repeat_itself(tmp_path: Path) -> None:
    command = Command(tmp_path)
    arguments = ("../demo/padding_study.py", "--work-dir", tmp_path / "study", "--seeds", 3, "--iters", 2)
    arguments += ("--train", 16, "--val", 8)
    output = command(*arguments)
    assert "Iter(train)" in output
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert set(results) == {"grootv", "grootv-ignoring", "convnext", "swin"}
    for runs in results.values():
        (run,) = runs.values()
        assert run["loss"] > 0
        assert set(run) == {"loss", *EVALUATED}
    table = (tmp_path / "study" / "README.md").read_text()
    assert len(table.splitlines()) == 6
    again = command(*arguments)
    assert "Iter(train)" not in again
    assert (tmp_path / "study" / "README.md").read_text() == table
