"""Bad boxes, polygons, categories, maps and images are found before they are trained on."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from tests.helpers.tool_runs import load_script


@pytest.fixture(scope="module")
def tool():
    return load_script("tools/misc/check_dataset.py")


def coco() -> dict:
    common = {"image_id": 1, "category_id": 1, "area": 12.5}
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 30}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [
            {"id": 1, **common, "bbox": [0, 0, 40, 30], "segmentation": [[0, 0, 40, 0, 40, 30]]},
            {"id": 2, **common, "bbox": [5.5, 5, 3, 4], "iscrowd": 1},
        ],
    }


def change(**values: object) -> Callable[[dict], None]:
    return lambda content: content["annotations"][1].update(values)


BAD = {
    "box that is not finite": [
        change(bbox=[1, 1, math.nan, 4]),
        change(bbox=[math.inf, 1, 3, 4]),
        change(bbox=[1, 1, 10**400, 4]),
    ],
    "area that is not a positive number": [change(area=area) for area in (0, -1, math.nan, 10**400, "12", None, [1])],
    "iscrowd that is neither 0 nor 1": [change(iscrowd=flag) for flag in ("0", 2, None, [0], math.nan)],
    "box without area": [change(bbox=[1, 1, 0, 4]), change(bbox=[1, 1, 3, -4])],
    "box outside its image": [
        change(bbox=[-5, 1, 9, 9]),
        change(bbox=[38, 1, 9, 9]),
        change(bbox=[90, 90, 9, 9]),
        change(bbox=[1, 1, 1e9, 1]),
    ],
    "box that is not four numbers": [
        change(bbox=[1, 2, 3]),
        change(bbox=None),
        change(bbox="1 2 3 4"),
        change(bbox=[1, 2, 3, "4"]),
    ],
    "polygon with fewer than three points": [
        change(segmentation=[[1, 1, 2, 2]]),
        change(segmentation=[[]]),
        change(segmentation=[[1, 1, 2, 2, 3, 3, 4]]),
    ],
    "polygon that is not finite": [change(segmentation=[[1, 1, 2, 2, math.nan, 3]])],
    "polygon outside its image": [change(segmentation=[[1, 1, 2, 2, 80, 3]])],
    "mask in an unknown format": [
        change(segmentation=[]),
        change(segmentation="abc"),
        change(segmentation={"size": [30, 40]}),
    ],
    "mask of another size than its image": [
        change(segmentation={"size": [40, 30], "counts": "abc"}),
        change(segmentation={"size": 3, "counts": "abc"}),
    ],
    "mask whose run lengths do not add up to its size": [change(segmentation={"size": [30, 40], "counts": [1, 2]})],
    "unknown category": [change(category_id=2), change(category_id=None), change(category_id="cat")],
    "unknown image": [change(image_id=2), change(image_id=None)],
    "annotations without a unique id": [change(id=1), change(id=None)],
    "image without size": [
        lambda content: content["images"][0].update(width=0),
        lambda content: content["images"][0].update(width=10**400),
        lambda content: content["images"][0].pop("height"),
    ],
    "class of the config missing in the annotations": [lambda content: content["categories"][0].update(name="cart")],
    "malformed entry in COCO annotations": [
        lambda content: content["images"].append(5),
        lambda content: content["annotations"].append(None),
        lambda content: content["categories"].append(["cat"]),
        lambda content: content["images"][0].update(id=[1]),
        lambda content: content["images"][0].update(file_name={}),
        lambda content: content["categories"][0].update(name=["cat"]),
        change(image_id={}),
    ],
    "not COCO annotations": [lambda content: content.pop("categories"), lambda content: content.update(images={})],
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_annotations_are_found(kind: str, tool) -> None:
    assert list(tool.check_coco(coco(), ["cat"])) == []
    for make in BAD[kind]:
        content = coco()
        make(content)
        # As a file brings it, with NaN and Infinity.
        problems = list(tool.check_coco(json.loads(json.dumps(content)), ["cat"]))
        assert kind in [problem.kind for problem in problems]
        assert all("\n" not in problem.where for problem in problems)


@pytest.mark.parametrize("text", ["[" * 200_000, "1" * 5000, "{", "\xff"])
def test_unreadable_annotations_are_found(text: str, tool, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("latin1"))
    (problem,) = tool.check_detection({"ann_file": str(tmp_path / "a.json")}, read_images=False)
    assert problem.kind == "unreadable annotations"


def write_image(path: Path, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(path)
    return path


def test_bad_images_are_found(tool, tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png")
    assert list(tool.check_image(path, (40, 30))) == []
    assert [problem.kind for problem in tool.check_image(path, (30, 40))] == ["image of another size than annotated"]
    assert [problem.kind for problem in tool.check_image(tmp_path / "b.png")] == ["missing image"]
    whole = path.read_bytes()
    for broken in (b"", b"hello", whole[: len(whole) // 2], whole[:60] + bytes(100) + whole[160:]):
        path.write_bytes(broken)
        assert [problem.kind for problem in tool.check_image(path)] == ["unreadable image"]


def test_bad_maps_are_found(tool, tmp_path: Path) -> None:
    image, path = write_image(tmp_path / "a.jpg"), tmp_path / "a.png"

    def kinds(values: np.ndarray, reduce_zero_label: bool = False) -> list[str]:
        Image.fromarray(values.astype(np.uint8)).save(path)
        return [problem.kind for problem in tool.check_map(path, image, 3, reduce_zero_label)]

    values = np.zeros((30, 40))
    values[0, :3] = 1, 2, 255
    assert kinds(values) == []
    assert kinds(values + (values == 2)) == ["unknown class in a map"]
    assert kinds(values + (values == 2), reduce_zero_label=True) == []
    assert kinds(values.T) == ["map of another size than its image"]
    path.write_text("hello")
    assert [problem.kind for problem in tool.check_map(path, image, 3, False)] == ["unreadable image"]


def test_config_of_a_detector(tool, tmp_path: Path) -> None:
    """Below wrappers; val and test, which are the same, once."""
    write_image(tmp_path / "images" / "a.png")
    content = coco()
    content["annotations"][1]["bbox"] = [1, 1, math.nan, 4]
    (tmp_path / "bad.json").write_text(json.dumps(content))
    (tmp_path / "good.json").write_text(json.dumps(coco()))
    common = {"type": "CocoDataset", "data_root": str(tmp_path), "metainfo": {"classes": ("cat",)}}
    common["data_prefix"] = {"img": "images/"}
    bad, good = ({**common, "ann_file": f"{name}.json"} for name in ("bad", "good"))
    cfg = Config(
        {
            "default_scope": "mmdet",
            "train_dataloader": {
                "dataset": {"type": "RepeatDataset", "dataset": {"type": "ConcatDataset", "datasets": [good, bad]}}
            },
            "val_dataloader": {"dataset": good},
            "test_dataloader": {"dataset": good},
        }
    )
    found = tool.check_config(cfg)
    assert {split: [problem.kind for problem in problems] for split, problems in found.items()} == {
        "train": ["box that is not finite"],
        "val": [],
    }


def test_config_of_a_classifier_and_the_command(tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mmpretrain")
    for name in ("cat", "dog"):
        write_image(tmp_path / "data" / name / "a.png")
    config = tmp_path / "config.py"
    config.write_text(
        "default_scope = 'mmpretrain'\n"
        f"val_dataloader = dict(dataset=dict(type='CustomDataset', data_root={str(tmp_path / 'data')!r}))\n"
    )
    monkeypatch.setattr("sys.argv", ["check_dataset.py", str(config)])
    tool.main()
    (tmp_path / "data" / "dog" / "b.png").write_text("hello")
    with pytest.raises(SystemExit, match=r"^error: 1 problems in val$"):
        tool.main()
