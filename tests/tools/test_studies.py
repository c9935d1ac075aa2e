"""The studies of trees in tools/analysis_tools, for real but at tiny sizes: what they write and what they must find."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.config_cases import ROOT, build_model, load_config
from tests.helpers.tool_runs import load_script

TOOLS = ROOT / "tools" / "analysis_tools"
DETECTOR = ROOT / "configs" / "demo" / "mask-rcnn_grootv-pico_fpn_demo.py"
CLASSIFIER = ROOT / "configs" / "demo" / "grootv-pico_demo-cls.py"


def run_here(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> None:
    """Run a tool in this process, with the measurements that it would start processes for."""
    monkeypatch.syspath_prepend(str(TOOLS))
    module = load_script(f"tools/analysis_tools/{script}")
    if script == "complexity.py":
        monkeypatch.setattr(module, "run_fresh", lambda function, *args, **_: function(*args))
        monkeypatch.setattr(module, "peak_memory", lambda step, device: step() or 2**20)
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    module.main()


def read_results(folder: Path, name: str) -> tuple[dict, str]:
    """The JSON file and the text; the picture opens and is not empty."""
    assert {path.name for path in folder.iterdir()} == {f"{name}.json", f"{name}.txt", f"{name}.png"}
    with Image.open(folder / f"{name}.png") as picture:
        extrema = picture.convert("L").getextrema()
    assert extrema[0] < 100 < extrema[1]
    return json.loads((folder / f"{name}.json").read_text()), (folder / f"{name}.txt").read_text()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    pytest.importorskip("mmdet")
    path = tmp_path / "iter_4.pth"
    torch.manual_seed(4)  # other weights than those of "none"
    torch.save({"state_dict": build_model(load_config(DETECTOR)).state_dict()}, path)
    return path


def test_quality_of_trees(monkeypatch, capsys, checkpoint: Path, demo_data: Path, tmp_path: Path) -> None:
    data = ("--images", demo_data / "images" / "val", "--annotations", demo_data / "annotations" / "instances_val.json")
    arguments = ("--checkpoints", "none", "none-1", checkpoint, *data, "--number", 2, "--out", tmp_path / "out")
    run_here(monkeypatch, "tree_quality.py", DETECTOR, *arguments)
    found, text = read_results(tmp_path / "out", "tree_quality")
    assert text in capsys.readouterr().out
    assert list(found["checkpoints"]) == ["none", "none-1", "iter_4"]
    assert list(found["between checkpoints"]) == ["none and none-1", "none and iter_4", "none-1 and iter_4"]
    between = {name: value["value"] for name, value in found["between checkpoints"].items()}
    assert all(0.3 < value < 1 for value in between.values()), between
    for values in found["checkpoints"].values():
        # Maps of 2 x 2 positions may have no border.
        assert {"stage 0, block 0", "stage 1, block 0", "stage 2, block 1"} <= set(values["blocks"])
        for block in values["blocks"].values():
            shares = {
                kind: block[kind]["value"] for kind in ("least", "tree", "8-connected", "maximum", "random", "raster")
            }
            assert all(shares["least"] <= share + 1e-9 <= 1 for share in shares.values())
            assert 0 <= block["auc"]["low"] <= block["auc"]["value"] <= block["auc"]["high"] <= 1
        first = values["blocks"]["stage 0, block 0"]
        assert first["tree"]["value"] < first["maximum"]["value"]
        assert {"blocks of a stage", "a stage and the next", "cosine and euclidean", "cosine and manhattan",
                "two random trees", "left and right mirrored", "upside down"} == set(values["agreement"])  # fmt: skip
    pictures = found["checkpoints"]["iter_4"]["pictures"]
    assert {name: len(values) for name, values in pictures.items()} == {"quality": 2, "mask AP": 2, "mask IoU": 2}
    assert found["checkpoints"]["none"]["pictures"] == {}


def test_ap_of_a_perfect_detector(monkeypatch, checkpoint: Path, demo_data: Path) -> None:
    """It finds the masks of the ground truth, and nothing else."""
    monkeypatch.syspath_prepend(str(TOOLS))
    tool = load_script("tools/analysis_tools/tree_quality.py")
    from mmengine.structures import InstanceData
    from pycocotools.coco import COCO

    coco = COCO(str(demo_data / "annotations" / "instances_val.json"))
    image = tool.chosen_images(coco, 1)[0]
    truth = coco.loadAnns(coco.getAnnIds(image["id"]))
    found = InstanceData(
        labels=torch.tensor([one["category_id"] - 1 for one in truth]),
        scores=torch.ones(len(truth)),
        masks=torch.stack([torch.from_numpy(coco.annToMask(one)).bool() for one in truth]),
    )
    detections = tool.Detections(tool.build_model(load_config(DETECTOR), str(checkpoint)), coco)
    sample = type("Sample", (), {"pred_instances": found})
    monkeypatch.setattr("mmdet.apis.inference_detector", lambda *args, **kwargs: sample)
    picture = np.zeros((image["height"], image["width"], 3), np.uint8)
    assert detections.measure(picture, image) == {"mask AP": pytest.approx(1), "mask IoU": pytest.approx(1)}
    found.labels = (found.labels + 1) % 10
    assert detections.measure(picture, image)["mask IoU"] < 1


def test_labels_of_positions(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    tool = load_script("tools/analysis_tools/tree_quality.py")
    labels = np.zeros((8, 8), int)
    labels[:, 4:] = 1
    assert tool.labels_of_positions(labels, (8, 8), (2, 3), 4).tolist() == [[0, 1, -1]] * 2
    # The same of an image that was scaled to twice the size.
    assert tool.labels_of_positions(labels, (16, 16), (4, 4), 4).tolist() == [[0, 0, 1, 1]] * 4


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def test_robustness(monkeypatch, capsys, pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("mmpretrain")
    options = ("--number", 1, "--out", tmp_path / "out", "--cfg-options", "model.backbone.out_indices=(0,1,2,3)")
    run_here(monkeypatch, "robustness.py", CLASSIFIER, "--pictures", pictures, *options)
    found, text = read_results(tmp_path / "out", "robustness")
    assert text in capsys.readouterr().out
    assert found["not finite"] == {}
    assert set(found["changes"]) == {"cosine, first", "euclidean, first", "manhattan, first", "cosine, last"}
    own = found["changes"]["cosine, first"]
    assert own["noise 2"]["edges"] < own["noise 32"]["edges"]
    assert all(0 < row["edges"] < 1 and row["moved"] > 0 for row in own.values())
    assert found["attacks"]["8"]["ascent"]["edges"] > 2 * found["attacks"]["8"]["random"]["edges"]
    assert found["other trees"]["last"]["edges"] == 0
    assert found["other trees"]["maximum"]["edges"] > 0.5
    assert all(row["same again"] for row in found["ties"].values())
    assert all(row["depth"] > 0 for row in found["ties"].values())
    assert all(norms[-1] == 1 for norms in found["gradients"].values())
    assert set(found["precisions"]) == {"bfloat16", "float16"}


def test_values_that_are_not_finite_are_found(monkeypatch, pictures: Path, tmp_path: Path) -> None:
    pytest.importorskip("mmpretrain")
    monkeypatch.syspath_prepend(str(TOOLS))
    tool = load_script("tools/analysis_tools/robustness.py")
    finite = tool.Finite()
    finite.check("here", torch.tensor([1.0, float("nan")]), torch.tensor(float("inf")))
    finite.check("there", torch.ones(3))
    assert (finite.checked, finite.wrong) == (6, {"here": 2})


def test_changes_of_pictures() -> None:
    pytest.importorskip("mmpretrain")
    tool = load_script("tools/analysis_tools/robustness.py")
    picture = np.tile(np.arange(8, dtype=np.uint8)[None, :, None] * 10, (4, 1, 3))
    np.testing.assert_array_equal(tool.shift(picture, 1)[:, 1:], picture[:, :-1])
    np.testing.assert_allclose(tool.shift(picture, 0.5)[0, 1:, 0], picture[0, 1:, 0] - 5.0)
    assert tool.brighten(picture, 100).max() == 255
    assert tool.compress(picture, 90).shape == picture.shape
    assert abs(tool.add_noise(np.full((64, 64, 3), 128), 8).std() - 8) < 0.5


def test_complexity(monkeypatch, capsys, tmp_path: Path) -> None:
    sizes = ("--sides", 32, 64, "--operator-sides", 32, 64, "--width", 32, "--rounds", 2)
    run_here(monkeypatch, "complexity.py", *sizes, "--out", tmp_path)
    found, text = read_results(tmp_path, "complexity")
    assert text in capsys.readouterr().out
    blocks = ["tree", "raster", "cross", "Swin", "ConvNeXt", "global attention"]
    assert {step: list(values) for step, values in found["steps"].items()} == {
        "inference": blocks,
        "training": blocks,
        "operators": ["grid_edge_weight", "grid_tree", "tree_scan"],
    }
    for values in found["steps"].values():
        assert all([point["positions"] for point in points] == [64, 256] for points in values.values())
    for slopes in found["slopes"].values():
        assert all(slope["low"] <= slope["high"] for slope in slopes.values())
    assert found["memory"]["training"]["tree"] == {"32": 2**20, "64": 2**20}


def test_slope_and_limit(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    tool = load_script("tools/analysis_tools/complexity.py")
    points = [{"positions": n, "rounds": [n**2 * 1e-6] * 3} for n in (10, 40, 160)]
    assert tool.slope_of(points)["value"] == pytest.approx(2)
    assert tool.slope_of(points[:1]) is None
    assert tool.next_seconds([], 100) == 0
    assert tool.next_seconds([(10, 1.0)], 40) == pytest.approx(16)
    assert tool.next_seconds([(10, 1.0), (20, 2.0)], 40) == pytest.approx(4)

    def measure(side: int, names: tuple[str, ...], settings: object) -> dict[str, list[float]]:
        return {name: [side * (100.0 if name == "slow" else 1e-3)] * 2 for name in names}

    monkeypatch.setattr(tool, "run_fresh", lambda function, *args, **_: function(*args))
    found = tool.sweep(measure, ("fast", "slow"), (32, 64), None, limit=20.0, threads=1)
    assert {name: len(values) for name, values in found.items()} == {"fast": 2, "slow": 1}


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("complexity.py", ("--width", 40), "--width must be a multiple of 32, got 40"),
        ("robustness.py", (CLASSIFIER, "--pictures", "no.png"), "image 'no.png' does not exist"),
        ("robustness.py", (CLASSIFIER, "--checkpoints", "a", "b", "--pictures", "c"), "takes one here, got 2"),
        (
            "tree_quality.py",
            (CLASSIFIER, "--images", "a", "--annotations", "no.json"),
            "annotations 'no.json' does not",
        ),
        ("tree_quality.py", (CLASSIFIER, "--images", "a"), "required: --annotations"),
    ],
)
def test_one_clear_error(script: str, arguments: tuple, message: str, monkeypatch, capsys) -> None:
    pytest.importorskip("mmpretrain")
    with pytest.raises(SystemExit) as exit_info:
        run_here(monkeypatch, script, *arguments)
    assert message in f"{exit_info.value.code} {capsys.readouterr().err}"
