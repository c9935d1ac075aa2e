"""The studies of trees in tools/analysis_tools, run at tiny sizes: what they write and what they must find."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from PIL import Image

from tests.helpers.analysis_runs import STAND_INS, read_results, run_here
from tests.helpers.config_cases import ROOT, build_model, load_config
from tests.helpers.tool_runs import load_script

DETECTOR = ROOT / "configs" / "demo" / "mask-rcnn_grootv-pico_fpn_demo.py"
SEGMENTER = ROOT / "configs" / "demo" / "grootv-pico_upernet_demo-seg.py"
CLASSIFIER = ROOT / "configs" / "demo" / "grootv-pico_demo-cls.py"


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


@pytest.fixture
def segmenter(tmp_path: Path) -> Path:
    pytest.importorskip("mmseg")
    path = tmp_path / "iter_6.pth"
    torch.manual_seed(6)
    torch.save({"state_dict": build_model(load_config(SEGMENTER)).state_dict()}, path)
    return path


def test_quality_and_miou_of_a_segmenter(monkeypatch, segmenter: Path, demo_data: Path, tmp_path: Path) -> None:
    """Of class maps, one of which says nothing and one of which is missing."""
    maps = tmp_path / "maps"
    maps.mkdir()
    files = sorted((demo_data / "semantic" / "val").glob("*.png"))[1:]
    for path in files:
        (maps / path.name).write_bytes(path.read_bytes())
    Image.fromarray(np.zeros((128, 128), np.uint8)).save(maps / files[0].name)
    data = ("--images", demo_data / "images" / "val", "--annotations", maps, "--number", 2)
    names = ("--names", "at the start", "at the end")
    arguments = ("--checkpoints", "none", segmenter, *names, *data, "--out", tmp_path / "out")
    run_here(monkeypatch, "tree_quality.py", SEGMENTER, *arguments)
    found, text = read_results(tmp_path / "out", "tree_quality")
    assert list(found["checkpoints"]) == ["at the start", "at the end"]
    results = found["checkpoints"]["at the end"]["pictures"]
    assert {name: len(values) for name, values in results.items()} == {"quality": 2, "mIoU": 2}
    assert found["checkpoints"]["at the start"]["pictures"] == {}
    assert "rank correlation of tree quality with mIoU" in text


def test_miou_of_single_images(monkeypatch, segmenter: Path, demo_data: Path) -> None:
    """A model that predicts the class map has 1, on what counts; its values are those of mmseg's metric."""
    tool = load_script("tools/analysis_tools/image_results.py")
    truth = tool.ClassMaps(demo_data / "semantic" / "val", demo_data / "images" / "val")
    image = truth.images(1)[0]
    labels = truth.labels(image)
    predicted = torch.from_numpy(labels)

    def step(batch: dict) -> list:
        assert batch["inputs"][0].shape[1:] == labels.shape
        return [SimpleNamespace(pred_sem_seg=SimpleNamespace(data=predicted[None]))]

    segmentations = tool.choose_results(tool_model(segmenter), truth)
    monkeypatch.setattr(segmentations.model, "test_step", step)
    picture = np.zeros((*labels.shape, 3), np.uint8)
    assert segmentations.measure(picture, image) == {"mIoU": 1}
    predicted = torch.where(predicted == 0, 1, predicted)
    assert segmentations.measure(picture, image)["mIoU"] < 1
    segmentations.ignored = 0
    assert segmentations.measure(picture, image)["mIoU"] == 1
    segmentations.ignored, segmentations.first_is_ignored = 255, True
    predicted = torch.from_numpy(labels) - 1  # where the class map has 0, anything goes
    assert segmentations.measure(picture, image)["mIoU"] == 1


def tool_model(checkpoint: Path) -> torch.nn.Module:
    return load_script("tools/analysis_tools/tree_measures.py").build_model(load_config(SEGMENTER), str(checkpoint))


def test_mean_iou_is_mmsegs() -> None:
    pytest.importorskip("mmseg")
    from mmseg.evaluation import IoUMetric

    tool = load_script("tools/analysis_tools/image_results.py")
    predicted, labels = torch.randint(3, (2, 50), generator=torch.Generator().manual_seed(0))
    intersect, union, *_ = IoUMetric.intersect_and_union(predicted, labels, 3, 255)
    assert tool.mean_iou(predicted.numpy(), labels.numpy()) == pytest.approx(float((intersect / union).mean()))


def test_results_need_suitable_ground_truth(segmenter: Path, demo_data: Path, tmp_path: Path) -> None:
    tool = load_script("tools/analysis_tools/image_results.py")
    instances = tool.Instances(demo_data / "annotations" / "instances_val.json")
    assert tool.choose_results(tool_model(segmenter), instances) is None
    with pytest.raises(SystemExit, match="has no class maps"):
        tool.ClassMaps(tmp_path, demo_data / "images" / "val")


@pytest.mark.parametrize(("missing", "message"), [("annotations", "less than two images"), ("images", "No such file")])
def test_quality_needs_images(missing: str, message: str, monkeypatch, demo_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("mmdet")
    annotations = json.loads((demo_data / "annotations" / "instances_val.json").read_text())
    if missing == "annotations":
        annotations["annotations"] = []
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(annotations))
    images = demo_data / "images" / ("val" if missing == "annotations" else "none")
    options = ("--images", images, "--annotations", path, "--number", 2, "--out", tmp_path / "out")
    with pytest.raises(SystemExit, match=message):
        run_here(monkeypatch, "tree_quality.py", DETECTOR, *options)


@pytest.mark.parametrize("content", ["{", "[]", '{"images": [{"id": 1}], "annotations": [], "categories": []}'])
def test_annotations_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    pytest.importorskip("mmdet")
    path = tmp_path / "instances.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match=r"instances.json'( as a JSON file of COCO instances)?: "):
        load_script("tools/analysis_tools/image_results.py").Instances(path)


def test_class_maps_with_a_palette(tmp_path: Path) -> None:
    """As in Pascal VOC: the values are the classes, the palette is for viewers."""
    pytest.importorskip("mmseg")
    for folder in ("images", "maps"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (6, 4)).save(tmp_path / "images" / "a.jpg")
    classes = np.arange(24, dtype=np.uint8).reshape(4, 6) % 3
    palette = Image.fromarray(classes, "P")
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    palette.save(tmp_path / "maps" / "a.png")
    truth = load_script("tools/analysis_tools/image_results.py").ClassMaps(tmp_path / "maps", tmp_path / "images")
    (image,) = truth.images(5)
    assert (truth.labels(image) == classes).all()


def test_names_of_checkpoints_for_readers() -> None:
    tool = load_script("tools/analysis_tools/tree_quality.py")
    names = {
        "none": "random weights, seed 0",
        "none-3": "random weights, seed 3",
        "iter_600": "iteration 600",
        "run/epoch_12": "epoch 12, run",
        "best": "best",
    }
    assert {name: tool.readable_name(name) for name in names} == names


def test_results_of_configs_without_class_names(demo_data: Path, tmp_path: Path) -> None:
    """The classes are those of the dataset; it may be wrapped, and need not agree with the annotations in all."""
    pytest.importorskip("mmdet")
    tool = load_script("tools/analysis_tools/tree_quality.py")
    instances = tool.Instances(demo_data / "annotations" / "instances_val.json")
    instances.coco.cats[1]["name"] = "person"
    cfg = load_config(ROOT / "configs" / "mask_rcnn" / "mask-rcnn_grootv-tiny_fpn_1x_coco.py")
    dataset = cfg.test_dataloader.dataset
    model = SimpleNamespace(cfg=cfg)
    for wrapped in (dataset, {"type": "ConcatDataset", "datasets": [dataset]}):
        cfg.test_dataloader.dataset = wrapped
        with DefaultScope.overwrite_default_scope("mmdet"):
            detections = tool.choose_results(model, instances)
        assert detections.categories == [1] + 79 * [None]
    instances.coco.cats[1]["name"] = "0"
    with (
        DefaultScope.overwrite_default_scope("mmdet"),
        pytest.raises(SystemExit, match="no class of the model is in the annotations, whose classes are 0, one, two"),
    ):
        tool.choose_results(model, instances)
    del cfg.model.roi_head["mask_head"]  # Faster R-CNN finds no masks
    assert tool.choose_results(model, instances) is None


def test_ap_of_a_perfect_detector(monkeypatch, checkpoint: Path, demo_data: Path) -> None:
    """It finds the masks of the ground truth, and nothing else."""
    tool = load_script("tools/analysis_tools/tree_quality.py")
    from mmengine.structures import InstanceData

    instances = tool.Instances(demo_data / "annotations" / "instances_val.json")
    coco, image = instances.coco, instances.images(1)[0]
    truth = coco.loadAnns(coco.getAnnIds(image["id"]))
    found = InstanceData(
        labels=torch.tensor([one["category_id"] - 1 for one in truth]),
        scores=torch.ones(len(truth)),
        masks=torch.stack([torch.from_numpy(coco.annToMask(one)).bool() for one in truth]),
    )
    detections = tool.choose_results(tool.build_model(load_config(DETECTOR), str(checkpoint)), instances)
    sample = type("Sample", (), {"pred_instances": found})
    monkeypatch.setattr("mmdet.apis.inference_detector", lambda *args, **kwargs: sample)
    picture = np.zeros((image["height"], image["width"], 3), np.uint8)
    assert detections.measure(picture, image) == {"mask AP": pytest.approx(1), "mask IoU": pytest.approx(1)}
    found.labels = (found.labels + 1) % 10
    assert detections.measure(picture, image)["mask IoU"] < 1


def test_labels_of_positions() -> None:
    tool = load_script("tools/analysis_tools/tree_quality.py")
    labels = np.zeros((8, 8), int)
    labels[:, 4:] = 1
    assert tool.labels_of_positions(labels, (8, 8), (2, 3), 4).tolist() == [[0, 1, -1]] * 2
    # The same of an image that was scaled to twice the size.
    assert tool.labels_of_positions(labels, (16, 16), (4, 4), 4).tolist() == [[0, 0, 1, 1]] * 4


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 48), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def test_robustness(monkeypatch, capsys, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("mmpretrain")
    options = ("--number", 1, "--out", tmp_path / "out", "--cfg-options", "model.backbone.out_indices=(0,1,2,3)")
    run_here(monkeypatch, "robustness.py", CLASSIFIER, "--images", images, *options)
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


def test_robustness_of_a_model_that_overflows(monkeypatch, images: Path, tmp_path: Path) -> None:
    """All files are written nevertheless."""
    pytest.importorskip("mmpretrain")
    model = build_model(load_config(CLASSIFIER))
    model.backbone.stages[3].blocks[0].mlp.fc2.weight.data.fill_(3e38)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "huge.pth")
    options = ("--number", 1, "--out", tmp_path / "out", "--checkpoints", tmp_path / "huge.pth", "--cfg-options",
               "model.backbone.out_indices=(0,1,2,3)")  # fmt: skip
    with pytest.raises(SystemExit, match="there are non-finite values"):
        run_here(monkeypatch, "robustness.py", CLASSIFIER, "--images", images, *options)
    found, _ = read_results(tmp_path / "out", "robustness")
    assert found["not finite"]
    assert found["changes"]["cosine, first"]["noise 2"]["moved"] is None


def test_ties_of_maps_of_a_single_position() -> None:
    pytest.importorskip("mmpretrain")
    tool = load_script("tools/analysis_tools/robustness.py")
    model = load_script("tools/analysis_tools/tree_measures.py").build_model(load_config(CLASSIFIER), "none")
    assert all(0 < row["ties"] <= 1 for row in tool.measure_ties(model, 32, tool.Finite()).values())


def test_values_that_are_not_finite_are_found() -> None:
    pytest.importorskip("mmpretrain")
    tool = load_script("tools/analysis_tools/robustness.py")
    finite = tool.Finite()
    finite.check("here", torch.tensor([1.0, float("nan")]), torch.tensor(float("inf")))
    finite.check("there", torch.ones(3))
    assert (finite.checked, finite.wrong) == (6, {"here": 2})


def test_changes_of_images() -> None:
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
    found, text = read_results(tmp_path, "complexity", "measured.json")
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


def test_complexity_resumes(monkeypatch, capsys, tmp_path: Path) -> None:
    """What is measured is kept, more sizes and contenders are added, and other conditions are refused."""
    measured = []

    def run(*arguments: object) -> dict:
        measured.clear()
        options = ("--width", 32, "--rounds", 2, "--steps", "inference", "--operator-sides", "--out", tmp_path)
        run_here(monkeypatch, "complexity.py", *options, *arguments, run_fresh=run_fresh)
        return read_results(tmp_path, "complexity", "measured.json")[0]

    def run_fresh(function, *args, **_):
        measured.append((function.__name__, *args[:2]))
        return function(*args)

    first = run("--sides", 32, "--contenders", "tree", "--no-memory")
    assert first["memory"] == {}
    again = run("--sides", 32, 64, "--contenders", "tree", "raster")
    assert again["steps"]["inference"]["tree"][0] == first["steps"]["inference"]["tree"][0]
    assert measured == [
        ("time_blocks", 32, ("raster",)),
        ("time_blocks", 64, ("tree", "raster")),
        ("memory_of_block", [32, 64], "tree"),
        ("memory_of_block", [32, 64], "raster"),
    ]
    with pytest.raises(SystemExit, match="give another folder to --out"):
        run("--sides", 32, "--rounds", 3)
    with pytest.raises(SystemExit, match="nothing was measured"):
        run("--steps")


def test_slope_and_limit(monkeypatch, tmp_path: Path) -> None:
    tool = load_script("tools/analysis_tools/complexity.py")
    points = [{"positions": n, "rounds": [n**2 * 1e-6] * 3} for n in (10, 40, 160)]
    assert tool.slope_of(points)["value"] == pytest.approx(2)
    assert tool.slope_of(points[:1]) is None
    assert tool.next_seconds([], 100) == 0
    assert tool.next_seconds([(10, 1.0)], 40) == pytest.approx(16)
    assert tool.next_seconds([(10, 1.0), (20, 2.0)], 40) == pytest.approx(4)

    def measure(side: int, names: tuple[str, ...], settings: object) -> dict[str, list[float]]:
        return {name: [side * (100.0 if name == "slow" else 1e-3)] * 2 for name in names}

    monkeypatch.setattr(tool, "run_fresh", STAND_INS["run_fresh"])
    settings = tool.Settings(32, "inference", 2, "cpu")
    measured = tool.Measured(tmp_path / "measured.json", {})
    found = tool.sweep(measure, ("fast", "slow"), (32, 64), settings, 20.0, 1, measured)
    assert {name: len(values) for name, values in found.items()} == {"fast": 2, "slow": 1}


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("complexity.py", ("--width", 40), "--width must be a multiple of 32, got 40"),
        ("robustness.py", (CLASSIFIER, "--images", "no.png"), "image 'no.png' does not exist"),
        (
            "robustness.py",
            (CLASSIFIER, "--checkpoints", "a", "b", "--images", "c"),
            "takes a single checkpoint here, got 2",
        ),
        (
            "tree_quality.py",
            (CLASSIFIER, "--images", "a", "--annotations", "no.json"),
            "annotations 'no.json' does not",
        ),
        ("tree_quality.py", (CLASSIFIER, "--images", "a"), "required: --annotations"),
        (
            "tree_quality.py",
            (CLASSIFIER, "--images", "a", "--annotations", "b", "--names", "c", "d"),
            "takes a name per checkpoint, got 2 for 1",
        ),
    ],
)
def test_one_clear_error(script: str, arguments: tuple, message: str, monkeypatch, capsys) -> None:
    pytest.importorskip("mmpretrain")
    with pytest.raises(SystemExit) as exit_info:
        run_here(monkeypatch, script, *arguments)
    assert message in f"{exit_info.value.code} {capsys.readouterr().err}"
