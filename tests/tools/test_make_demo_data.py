"""Tests of the demo data generator."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from tests.helpers.tool_runs import ROOT, load_script

SCRIPT = ROOT / "tools" / "dataset_converters" / "make_demo_data.py"
COUNTS = {"train": 6, "val": 3}


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    return load_script("tools/dataset_converters/make_demo_data.py")


@pytest.fixture(scope="module")
def made(demo, tmp_path_factory) -> Path:
    """A finished set that the tests leave as it is."""
    out = tmp_path_factory.mktemp("data") / "demo"
    assert demo.make_demo_data(out, COUNTS, workers=1)
    return out


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def scenes(demo, count: int, size: tuple[int, int] = (128, 128), digits: tuple[int, int] = (2, 5)) -> list:
    source = demo.load_sources()["train"]
    rngs = [np.random.default_rng(seed) for seed in range(count)]
    return [demo.compose_scene(rng, source, size, digits) for rng in rngs]


def test_command_is_deterministic_for_any_number_of_workers(made, tmp_path):
    out = tmp_path / "new" / "demo"
    done = run("--out", out, "--train", 6, "--val", 3, "--workers", 3)
    assert done.returncode == 0, done.stderr
    assert "train: 100%" in done.stderr
    assert contents(out) == contents(made)
    assert os.listdir(out.parent) == ["demo"]


def test_seed_changes_every_scene(demo, made, tmp_path):
    demo.make_demo_data(tmp_path / "demo", COUNTS, seed=1)
    for path in (tmp_path / "demo" / "images").rglob("*.png"):
        other = made / path.relative_to(tmp_path / "demo")
        assert path.read_bytes() != other.read_bytes()


def test_scene_does_not_depend_on_the_counts(demo, made, tmp_path):
    demo.make_demo_data(tmp_path / "demo", {"train": 1, "val": 1})
    for split in demo.SPLITS:
        name = f"images/{split}/000000.png"
        assert (tmp_path / "demo" / name).read_bytes() == (made / name).read_bytes()


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_masks_boxes_areas_and_semantic_map_agree(demo, made, split):
    coco = COCO(made / "annotations" / f"instances_{split}.json")
    assert len(coco.imgs) == COUNTS[split]
    assert [c["name"] for c in coco.loadCats(range(1, 11))] == list(demo.CLASSES)
    assert min(coco.anns) == 1
    for image_id, info in coco.imgs.items():
        path = made / "images" / split / info["file_name"]
        image = np.asarray(Image.open(path))
        assert image.shape == (info["height"], info["width"], 3) == (128, 128, 3)
        semantic = np.asarray(Image.open(made / "semantic" / split / info["file_name"]))
        assert semantic.dtype == np.uint8
        annotations = coco.loadAnns(coco.getAnnIds(image_id))
        assert 2 <= len(annotations) <= 5
        painted = np.zeros_like(semantic)
        for annotation in annotations:
            mask = coco.annToMask(annotation).astype(bool)
            assert isinstance(annotation["segmentation"]["counts"], str)
            assert annotation["iscrowd"] == 0
            assert annotation["area"] == mask.sum()
            rows, columns = np.nonzero(mask)
            left, top = columns.min(), rows.min()
            box = [left, top, columns.max() - left + 1, rows.max() - top + 1]
            assert annotation["bbox"] == box
            assert not painted[mask].any(), "visible masks must not overlap"
            painted[mask] = annotation["category_id"]
        np.testing.assert_array_equal(painted, semantic)


def test_later_digits_cover_earlier_ones(demo):
    """On a black photograph each pixel inside a glyph has the colour of the digit that owns it."""
    source = demo.load_sources()["train"]._replace(photos=[np.zeros((200, 200, 3), np.uint8)])
    touching = 0
    for seed in range(8):
        scene = demo.compose_scene(np.random.default_rng(seed), source, (128, 128), (5, 5))
        owner = np.pad(scene.owner, 1, mode="edge")
        neighbours = [owner[1 + i : 129 + i, 1 + j : 129 + j] for i in (-1, 0, 1) for j in (-1, 0, 1)]
        inside = np.all([n == scene.owner for n in neighbours], axis=0)
        for k in range(len(scene.labels)):
            colours = scene.image[inside & (scene.owner == k)].astype(int)
            # Rims of later glyphs may tint a few pixels; ink of another digit would be far off.
            typical = np.median(colours, axis=0)
            assert np.mean(np.abs(colours - typical).max(axis=1) <= 2) > 0.9
            around = np.any([n == k for n in neighbours], axis=0)
            touching += bool(np.any(around & (scene.owner >= 0) & (scene.owner != k)))
        assert np.all(scene.image[inside & (scene.owner < 0)] <= 128)
    assert touching > 4, "the scenes hold no overlaps to test with"


def test_covered_digits_stay_mostly_visible(demo, monkeypatch):
    full = []
    render = demo.render_digit

    def spy(*args):
        full.append(int((render(*args) >= 0.5).sum()))
        return render(*args)

    monkeypatch.setattr(demo, "render_digit", spy)
    for seed in range(6):
        full.clear()
        rng = np.random.default_rng(seed)
        scene = demo.compose_scene(rng, demo.load_sources()["val"], (128, 128), (5, 5))
        visible = np.bincount(scene.owner[scene.owner >= 0], minlength=len(scene.labels))
        attempts = iter(full)
        for k, area in enumerate(visible):
            # Full areas come in order of placing, with those of rejected places between.
            assert any(area <= whole <= area / demo.MIN_VISIBLE for whole in attempts), (seed, k)


def test_digits_keep_their_size_and_contrast(demo):
    for scene in scenes(demo, 20, digits=(1, 1)):
        (annotation,) = demo.coco_annotations(scene)
        assert 26 <= max(annotation["bbox"][2:]) <= 56
        ink = np.median(scene.image[scene.owner == 0], axis=0)
        x, y, w, h = map(int, annotation["bbox"])
        near = np.s_[max(0, y - 3) : y + h + 3, max(0, x - 3) : x + w + 3]
        around = scene.image[near][scene.owner[near] < 0]
        assert np.median(np.linalg.norm(around - ink, axis=1)) > 60


@pytest.mark.parametrize("size", [(64, 64), (320, 320), (96, 160), (160, 96), (64, 256)])
def test_any_size(demo, size):
    for scene in scenes(demo, 3, size=size):
        assert scene.image.shape == (*size, 3)
        sides = [max(a["bbox"][2:]) / min(size) for a in demo.coco_annotations(scene)]
        assert max(sides) <= 57 / 128  # rounded up


@pytest.mark.parametrize("split", ["train", "val"])
def test_proportions_of_the_photograph_are_kept(demo, monkeypatch, split):
    """What is scaled to a scene's size has its proportions."""
    windows = []
    resize = demo.Image.Image.resize
    monkeypatch.setattr(
        demo.Image.Image, "resize", lambda image, size, *rest: windows.append(image.size) or resize(image, size, *rest)
    )
    for photo in demo.load_sources()[split].photos:
        for size in ((128, 128), (96, 160), (160, 96)):
            windows.clear()
            patch = demo.crop_photo(np.random.default_rng(0), photo, size)
            assert patch.shape == (*size, 3)
            ((width, height),) = windows
            assert height / width == pytest.approx(size[0] / size[1], rel=0.02)


@pytest.fixture(scope="module")
def mixed(demo, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "demo"
    assert demo.make_demo_data(out, {"train": 8, "val": 4}, size=[(96, 160), (128, 128), (160, 96)], workers=2)
    return out


def test_mixed_sizes(demo, mixed):
    """Images, annotations and maps agree on the size of each scene, and all sizes occur."""
    found = set()
    for split in demo.SPLITS:
        coco = COCO(mixed / "annotations" / f"instances_{split}.json")
        for image_id, info in coco.imgs.items():
            size = (info["height"], info["width"])
            found.add(size)
            assert np.asarray(Image.open(mixed / "images" / split / info["file_name"])).shape == (*size, 3)
            semantic = np.asarray(Image.open(mixed / "semantic" / split / info["file_name"]))
            painted = np.zeros(size, np.uint8)
            for annotation in coco.loadAnns(coco.getAnnIds(image_id)):
                painted[coco.annToMask(annotation).astype(bool)] = annotation["category_id"]
            np.testing.assert_array_equal(painted, semantic)
        for path in (mixed / "classification" / split).rglob("*.png"):
            assert Image.open(path).size == (64, 64)
    assert found == {(96, 160), (128, 128), (160, 96)}


def test_mixed_sizes_are_remembered(demo, mixed):
    counts = {"train": 8, "val": 4}
    assert not demo.make_demo_data(mixed, counts, size=[(96, 160), (128, 128), (160, 96)])
    with pytest.raises(FileExistsError, match=r"size \[\[96, 160\].* \(requested: 128\)"):
        demo.make_demo_data(mixed, counts)


def test_sizes_of_the_command_line(demo, monkeypatch):
    for arguments, size in ([], 128), (["--size", "96"], 96), (["--sizes", "96x160", "64x64"], [(96, 160), (64, 64)]):
        monkeypatch.setattr(sys, "argv", ["make_demo_data.py", *arguments])
        assert demo.parse_args().size == size


def test_crowded_scene_holds_as_many_digits_as_fit(demo):
    (scene,) = scenes(demo, 1, size=(64, 64), digits=(90, 90))
    assert 5 < len(scene.labels) < 90


def test_classification_crops_show_one_digit_each(demo, made):
    meta = json.loads((made / "meta.json").read_text())
    for split in demo.SPLITS:
        coco = COCO(made / "annotations" / f"instances_{split}.json")
        folders = sorted(path.name for path in (made / "classification" / split).iterdir())
        assert folders == sorted(demo.CLASSES)
        crops = list((made / "classification" / split).rglob("*.png"))
        assert 0 < len(crops) == meta["crops"][split] <= meta["instances"][split]
        for path in crops:
            assert Image.open(path).size == (64, 64)
            image, k = map(int, path.stem.split("_"))
            annotation = coco.loadAnns(coco.getAnnIds(image))[k]
            assert path.parent.name == demo.CLASSES[annotation["category_id"] - 1]


def test_crop_with_a_second_digit_in_it_is_left_out(demo):
    owner = np.full((128, 128), -1)
    owner[40:60, 40:60] = 0
    owner[40:60, 61:63] = 1
    owner[100:120, 100:120] = 2
    image = np.zeros((128, 128, 3), np.uint8)
    scene = demo.Scene(image, owner, [3, 1, 4])
    assert [k for k, _ in demo.digit_crops(scene, demo.coco_annotations(scene))] == [0, 2]


def test_splits_share_neither_digits_nor_photographs(demo):
    train, val = (demo.load_sources()[split] for split in demo.SPLITS)
    assert not {d.tobytes() for d in train.digits} & {d.tobytes() for d in val.digits}
    assert len(train.digits) + len(val.digits) == 1797
    assert set(train.labels) == set(val.labels) == set(range(10))
    for left, right in zip(train.photos, val.photos, strict=True):
        assert left.shape[0] == right.shape[0]
        assert not np.shares_memory(left, right)
        assert min(right.shape[:2]) >= demo.PHOTO_CROP[0]


def test_finished_set_is_left_alone_and_other_arguments_are_refused(made):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    same = run("--out", made, "--train", 6, "--val", 3, "--workers", 1)
    assert same.returncode == 0
    assert "already exists with the same arguments" in same.stdout
    other = run("--out", made, "--train", 6, "--val", 3, "--seed", 5)
    assert other.returncode == 1
    assert "seed 0 (requested: 5)" in other.stderr
    assert "--force" in other.stderr
    assert "Traceback" not in other.stderr
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before


@pytest.mark.parametrize("meta", [None, "{", "[]", '{"version": 1}'])
def test_foreign_folder_is_refused_and_replaced_only_with_force(demo, tmp_path, meta):
    out = tmp_path / "demo"
    out.mkdir()
    (out / "thesis.txt").write_text("dear")
    if meta is not None:
        (out / "meta.json").write_text(meta)
    with pytest.raises(FileExistsError, match=r"something other than demo data.*--force"):
        demo.make_demo_data(out, {"train": 1, "val": 1})
    assert (out / "thesis.txt").read_text() == "dear"
    if meta is None:
        assert demo.make_demo_data(out, {"train": 1, "val": 1}, force=True)
        assert not (out / "thesis.txt").exists()
        assert (out / "meta.json").exists()
        assert os.listdir(tmp_path) == ["demo"]


def test_files_and_the_current_folder_are_refused_even_with_force(demo, tmp_path, monkeypatch):
    (tmp_path / "demo").write_text("")
    monkeypatch.chdir(tmp_path)
    for out in (tmp_path / "demo", tmp_path):
        with pytest.raises(FileExistsError, match="choose another --out"):
            demo.make_demo_data(out, {"train": 1, "val": 1}, force=True)


def test_empty_folder_is_filled(demo, tmp_path):
    assert demo.make_demo_data(tmp_path, {"train": 1, "val": 1})
    assert not demo.make_demo_data(tmp_path, {"train": 1, "val": 1})


@pytest.fixture
def running(tmp_path):
    """A run with two workers that is in the middle of its scenes."""
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "demo"), "--workers", "2"]
    # A shell starts what runs in its background with SIGINT ignored, which children take over.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".demo-*/new/images/train/*.png")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_nothing(running, tmp_path, stop):
    os.killpg(running.pid, stop)
    running.communicate(timeout=120)
    assert running.returncode != 0
    assert os.listdir(tmp_path) == []


def test_killed_run_leaves_no_set_and_no_workers(running, tmp_path):
    running.kill()
    # The pipe ends when the last process that holds it does: the workers have gone.
    running.communicate(timeout=120)
    assert not (tmp_path / "demo").exists()


def test_failure_keeps_the_old_set(demo, tmp_path, monkeypatch):
    out = tmp_path / "demo"
    demo.make_demo_data(out, {"train": 1, "val": 1})
    before = contents(out)

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "write_split", full_disk)
    with pytest.raises(OSError, match="No space left"):
        demo.make_demo_data(out, {"train": 2, "val": 1}, force=True)
    assert contents(out) == before
    assert os.listdir(tmp_path) == ["demo"]


def test_missing_photograph_is_named(demo, monkeypatch):
    monkeypatch.setattr(demo, "PHOTOS", (*demo.PHOTOS, "unicorn"))
    with pytest.raises(FileNotFoundError, match="lacks the photographs unicorn"):
        demo.load_sources.__wrapped__()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "0"], "argument --train: expected 1 or more, got 0"),
        (["--size", "63"], "argument --size: expected 64 or more, got 63"),
        (["--sizes", "96x160", "128"], "argument --sizes: expected HEIGHTxWIDTH, got '128'"),
        (["--sizes", "63x160"], "argument --sizes: expected 64 or more, got 63"),
        (["--size", "64", "--sizes", "96x96"], "argument --sizes: not allowed with argument --size"),
        (["--digits", "4", "3"], "expected MIN <= MAX, got [4, 3]"),
        (["--workers", "many"], "argument --workers: invalid integer value: 'many'"),
    ],
)
def test_bad_arguments(demo, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["make_demo_data.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        demo.parse_args()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
