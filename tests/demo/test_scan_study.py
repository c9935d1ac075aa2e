"""demo/scan_study.py: its tables and configs, and a complete run on tiny data."""

import json
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from tests.helpers.config_cases import build_model, load_config
from tests.helpers.tool_runs import Command, load_script

for host in ("mmdet", "mmpretrain", "mmseg"):
    pytest.importorskip(host)


@pytest.fixture(scope="module")
def study():
    return load_script("demo/scan_study.py")


def test_table_tells_what_can_be_told_apart(study) -> None:
    title = "accuracy on the pixels of curves"
    results = {
        "tree": {seed: {title: value} for seed, value in enumerate((0.80, 0.82, 0.84))},
        "raster": {seed: {title: value} for seed, value in enumerate((0.70, 0.72, 0.745))},
        "cross": {seed: {title: value} for seed, value in enumerate((0.70, 0.90, 0.84))},
        "swin": {1: {title: 0.5}},
    }
    header, _, tree, raster, cross, swin = study.make_table("curves", results).splitlines()
    assert header == f"| backbone | seeds | {title} | difference to tree | significant |"
    assert tree == "| tree (cosine, per block) | 3 | 0.820 ± 0.020 | - | - |"
    assert raster == "| raster | 3 | 0.722 ± 0.023 | -0.098 ± 0.049 | yes |"
    assert cross.endswith("| no |")
    assert swin == "| Swin Transformer | 1 | 0.500 | - | - |"


def test_difference_is_welchs(study) -> None:
    mean, half = study.difference([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
    assert mean == 2
    assert half == pytest.approx(4.303 / 3**0.5, rel=1e-3)  # two degrees of freedom, from the first sample alone
    _, half = study.difference([1.0, 2.0, 3.0], [7.0, 6.0, 5.0])
    assert half == pytest.approx(2.776 * (2 / 3) ** 0.5, rel=1e-3)  # equal variances: four degrees of freedom
    assert study.difference([1.0], [2.0, 3.0]) is None


@pytest.mark.parametrize(
    ("task", "arm"),
    [
        *(("curves", arm) for arm in ("raster", "random", "maximum", "stage-tree", "convnext", "swin")),
        *(("curves-cls", "swin"), ("det", "swin"), ("seg", "convnext"), ("seg", "swin")),
    ],
)
def test_configs(study, task: str, arm: str, tmp_path: Path) -> None:
    """They build, accept an image, and have the channels of the GrootV that they replace."""
    cfg = load_config(study.write_config(arm, task, tmp_path))
    base = load_config(study.ROOT / "configs" / "demo" / study.TASKS[task].config)
    cfg.merge_from_dict({"randomness": {"seed": 1}})
    image = torch.randn(1, 3, 64, 64)
    models = build_model(cfg).eval(), build_model(base).eval()
    shapes = [[tuple(feature.shape) for feature in model.backbone(image)] for model in models]
    assert shapes[0] == shapes[1]
    for option, value in study.ARMS[arm].options.items():
        assert cfg.model.backbone[option] == value
    parsed = dict(option.split("=", 1) for option in study.overrides(cfg, task, Path("/there")))
    assert parsed["data_root"] == ("/there/classification/" if task == "curves-cls" else "/there/")
    assert ("model.data_preprocessor.size" in parsed) == (task == "curves")


@pytest.mark.parametrize("name", ["minutes", "short"])
def test_presets(study, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["scan_study.py", "--preset", name, "--seeds", "7"])
    args = study.parse_args()
    assert args.seeds == [7]
    assert set(args.arms) <= set(study.ARMS)
    assert args.tasks == ["curves"]
    assert args.iters == study.PRESETS[name]["iters"]


FAKE_TRAINING = """
import json, pathlib, sys, zipfile
folder = pathlib.Path(sys.argv[1])
if "raster" in folder.name and folder.name.endswith("-1"):
    sys.exit("out of luck")
(folder / "now" / "vis_data").mkdir(parents=True)
(folder / "now" / "vis_data" / "scalars.json").write_text(json.dumps({"loss": 1}) + "\\n" + json.dumps({"aAcc": 75.0}))
with zipfile.ZipFile(folder / "iter_5.pth", "w") as file:
    file.writestr("iter_5/data.pkl", b"")
"""


def test_failures_are_reported_at_the_end(study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other trainings go on, finished ones are not repeated, and the output of failed ones is named."""
    made = []

    def command_of(script: str, config: Path, option: str, folder: Path, *_: object) -> list[str]:
        assert (script, option) == ("train.py", "--work-dir")
        return [sys.executable, "-c", FAKE_TRAINING, str(folder)]

    monkeypatch.setattr(study, "command_of", command_of)
    monkeypatch.setattr(study, "make_data", lambda task, args: made.append(task))
    monkeypatch.setattr(study.signal, "signal", lambda *_: None)
    work_dir = tmp_path / "study"
    options = ["--tasks", "curves", "--arms", "tree", "raster", "--iters", "5", "--seeds", "0", "1", "--jobs", "4"]
    monkeypatch.setattr(sys, "argv", ["scan_study.py", "--work-dir", str(work_dir), *options])
    log = work_dir / "curves-raster-5-4000-1000-1" / "output.txt"
    with pytest.raises(
        SystemExit, match=rf"1 trainings failed.*\n.*curves/raster/5/4000-1000/1: exit status 1 .*{log}"
    ):
        study.main()
    assert log.read_text() == "out of luck\n"
    results = json.loads((work_dir / "results.json").read_text())
    assert {name: values["accuracy on the pixels of curves"] for name, values in results.items()} == {
        "curves/tree/5/4000-1000/0": 0.75,
        "curves/raster/5/4000-1000/0": 0.75,
        "curves/tree/5/4000-1000/1": 0.75,
    }
    assert "| raster | 1 | 0.750 |" in (work_dir / "README.md").read_text()

    assert made == ["curves"]

    # A checkpoint of the end with metrics counts, even if the study was killed before it noted them.
    (work_dir / "results.json").write_text(
        json.dumps({"curves/tree/5/4000-1000/0": results["curves/tree/5/4000-1000/0"]})
    )
    with pytest.raises(SystemExit, match="1 trainings failed"):
        study.main()
    assert json.loads((work_dir / "results.json").read_text()).keys() == results.keys()


def test_presets_share_a_folder(study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own data, trainings and results; results of other settings are not in its tables."""
    options = [("--preset", "minutes"), ("--preset", "short"), ()]
    plans = []
    results = {"curves/tree/250/0": {}}  # of a version that did not count scenes
    for chosen in options:
        monkeypatch.setattr(sys, "argv", ["scan_study.py", *chosen, "--work-dir", str(tmp_path)])
        args = study.parse_args()
        training = study.plan("tree", "curves", 0, args)
        plans.append((training.name, training.folder, study.data_folder("curves", args)))
        results[training.name] = {"accuracy on the pixels of curves": 0.5 + len(plans) / 10}
        assert f"| {0.5 + len(plans) / 10:.3f} |" in study.make_page(results, args)
    assert [len(set(values)) for values in zip(*plans, strict=True)] == [3, 3, 3]


@pytest.mark.slow
def test_study_runs_and_does_not_repeat_itself(study, tmp_path: Path) -> None:
    command = Command(tmp_path)
    arguments = ["../demo/scan_study.py", "--work-dir", tmp_path / "study", "--seeds", 3, "--iters", 2]
    arguments += ["--tasks", "curves", "curves-cls", "seg", "--arms", "tree", "swin", "--train", 64, "--val", 8]
    command(*arguments, "--jobs", 2)
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert set(results) == {
        f"{task}/{arm}/2/64-8/3" for task in ("curves", "curves-cls", "seg") for arm in ("tree", "swin")
    }
    assert all(0 <= value <= 1 for values in results.values() for key, value in values.items() if key != "seconds")
    page = (tmp_path / "study" / "README.md").read_text()
    assert page.count("| Swin Transformer | 1 |") == 3
    assert "Iter(val)" in (tmp_path / "study" / "seg-swin-2-64-8-3" / "output.txt").read_text()
    again = command(*arguments)
    assert "Iter(val)" not in again
    assert "Missing trainings: 0" in again
    assert (tmp_path / "study" / "README.md").read_text() == page
    assert isinstance(Config.fromfile(tmp_path / "study" / "configs" / "seg_swin.py"), Config)
