"""tools/visualization/explore_trees.py and tools/analysis_tools/benchmark_explorer.py."""

import base64
import json
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.helpers.config_cases import ROOT, build_model, load_config
from tests.helpers.tool_fixtures import SHIPPED
from tests.helpers.tool_runs import call_script, load_script

pytest.importorskip("mmpretrain")
CLASSIFIER = ROOT / "configs" / "demo" / SHIPPED["cls"]


def call(*arguments: object) -> str | int | None:
    return call_script("tools/visualization/explore_trees.py", *arguments)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.resize(noise, (128, 96), interpolation=cv2.INTER_CUBIC))
    return path


def read_page(path: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="meta">(.*?)</script>', path.read_text())[1])


@pytest.mark.parametrize("task", ["det", "seg", "cls"])
def test_every_task(task: str, make_config: Callable, demo_data: Path, picture: Path) -> None:
    """An image of the test set has its ground truth, another one has predictions alone."""
    config = make_config(task)
    checkpoint, page = picture.with_name("model.pth"), picture.with_name("new") / "page.html"
    torch.save({"state_dict": build_model(load_config(config)).state_dict()}, checkpoint)
    folder = demo_data / ("classification/val" if task == "cls" else "images/val")
    known = sorted(folder.rglob("*.png"))[0]
    assert call(config, checkpoint, known, picture, "-o", page, "--score-thr", 0) is None
    meta = read_page(page)
    assert [image["name"] for image in meta["images"]] == [known.name, picture.name]
    first, second = meta["images"]
    assert [overlay["name"] for overlay in first["overlays"]] == ["ground truth", "prediction"]
    assert [overlay["name"] for overlay in second["overlays"]] == ["prediction"]
    assert all(overlay["boxes"] or overlay["picture"] or overlay["caption"] for overlay in first["overlays"])
    assert [(block["stage"], block["block"]) for block in first["blocks"]] == [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0)]
    assert list(page.parent.iterdir()) == [page]


@pytest.mark.parametrize("task", ["det", "seg", "cls"])
def test_without_checkpoint_and_data(task: str, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Initial weights, whose predictions mean nothing; and no test set."""
    monkeypatch.chdir(picture.parent)
    assert call(ROOT / "configs" / "demo" / SHIPPED[task], "none", picture.parent) is None
    (image,) = read_page(picture.with_name("explorer.html"))["images"]
    assert image["overlays"] == []
    assert image["width"] >= 64


@pytest.mark.parametrize("wrapper", ["ConcatDataset", "RepeatDataset"])
@pytest.mark.parametrize("data", ["missing", "damaged"])
def test_wrapped_test_sets_without_data(
    wrapper: str, data: str, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(picture.parent)
    if data == "damaged":
        folder = picture.parent / "data" / "demo" / "annotations"
        folder.mkdir(parents=True)
        (folder / "instances_val.json").write_text("{")
    inner = {"ConcatDataset": "datasets=[dataset]", "RepeatDataset": "dataset=dataset, times=1"}[wrapper]
    config = picture.with_name("wrapped.py")
    config.write_text(
        f"_base_ = {str(ROOT / 'configs' / 'demo' / SHIPPED['det'])!r}\n"
        "dataset = _base_.test_dataloader.dataset\n"
        f"test_dataloader = dict(dataset=dict(_delete_=True, type='{wrapper}', {inner}))\n"
    )
    assert call(config, "none", picture) is None
    assert read_page(picture.with_name("explorer.html"))["images"][0]["overlays"] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: "no.py"}, "config 'no.py' does not exist"),
        ({1: "no.pth"}, "checkpoint 'no.pth' does not exist"),
        ({2: "no.png"}, "image 'no.png' does not exist"),
        ({2: str(ROOT / "docs" / "api")}, "has no images"),
        ({4: "/proc/no/page.html"}, "cannot write /proc/no/page.html"),
    ],
)
def test_one_clear_error(change: dict, message: str, picture: Path) -> None:
    arguments = [CLASSIFIER, "none", picture, "-o", picture.with_name("page.html")]
    error = call(*(change.get(index, value) for index, value in enumerate(arguments)))
    assert error.startswith("error: ")
    assert message in error
    assert [path.name for path in picture.parent.iterdir()] == [picture.name]


def test_other_outputs_are_refused(picture: Path, capsys: pytest.CaptureFixture) -> None:
    assert call(CLASSIFIER, "none", picture, "-o", "page.png") == 2
    assert "must end in .html" in capsys.readouterr().err


@pytest.mark.slow
def test_size_of_the_largest_page(tmp_path: Path) -> None:
    """All blocks of GrootV-T for a photograph of 512 x 512; noise deflates worse than any photograph."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "noise.png"), cv2.resize(noise, (512, 512), interpolation=cv2.INTER_CUBIC))
    config = ROOT / "configs" / "upernet" / "grootv-tiny_upernet_8xb2-160k_ade20k-512x512.py"
    page = tmp_path / "page.html"
    options = ("--cfg-options", "model.backbone.init_cfg=None", "norm_cfg.type=BN")
    assert call(config, "none", tmp_path / "noise.png", "-o", page, *options) is None
    (image,) = read_page(page)["images"]
    assert len(image["blocks"]) == 2 + 2 + 9 + 2
    assert (image["blocks"][0]["rows"], image["blocks"][0]["columns"]) == (128, 128)
    assert all(len(block["trees"]) == 3 and len(block["channels"]) >= 4 for block in image["blocks"])
    assert page.stat().st_size < 6e6
    packed = re.search(r'id="data-0">(.*?)</script>', page.read_text())[1]
    last = image["blocks"][-1]
    length = last["rows"] * last["columns"]
    content = len(last["trees"]) * (-(-length // 4) + 4 * length - 2) + len(last["channels"]) * 2 * length
    assert len(zlib.decompress(base64.b64decode(packed))) == last["offset"] + content


def test_benchmark(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command measures what it is asked for; without a browser it says so."""
    benchmark = "tools/analysis_tools/benchmark_explorer.py"
    tool = load_script(benchmark)
    assert tool.size("200x334") == (200, 334)
    image = tool.random_image(5, 7)
    (block,) = image.blocks
    assert (block.height, block.width) == (5, 7)
    (tree,) = block.trees
    assert (np.diff(tree.edge_weight[np.argsort(tree.rank)[1:]]) >= 0).all()
    measured = []
    monkeypatch.setattr(tool, "measure", lambda *arguments: measured.append(arguments) or [{"fps": 60, "work": 1.5}])
    assert call_script(benchmark, "--sizes", "8x9", "--seconds", 0.5) is None
    assert measured == [([(8, 9)], 0.5, 1360)]

    def missing(*_: object) -> None:
        raise FileNotFoundError("no Chromium or Chrome found")

    monkeypatch.setattr(tool, "measure", missing)
    error = call_script(benchmark)
    assert error == "error: the benchmark needs Playwright and a browser: no Chromium or Chrome found"


def test_installed_package_has_the_page(mim) -> None:
    code = (
        "from grootvl_mm.visualization.explorer.page import SOURCES; print(*(path.name for path in SOURCES.iterdir()))"
    )
    sources = ROOT / "grootvl_mm" / "visualization" / "explorer"
    assert {path.name for path in sources.iterdir() if path.suffix in (".css", ".html", ".js")} < set(
        mim.ask(code).split()
    )
