"""tools/visualization/draw_trees.py and draw_affinity.py, for all tasks, and what they say to wrong arguments."""

from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from PIL import Image

from tests.helpers.config_cases import ROOT, build_model, load_config
from tests.helpers.tool_fixtures import SHIPPED
from tests.helpers.tool_runs import call_script, load_script

for host in ("mmdet", "mmseg", "mmpretrain"):
    pytest.importorskip(host)

CONFIG = ROOT / "configs" / "demo" / SHIPPED["cls"]
TOOLS = ("draw_trees", "draw_affinity")
AT = ("--at", 40, 30)


@pytest.fixture(autouse=True)
def _scope() -> Iterator[None]:
    """The tools change the default scope of their process."""
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "model.pth"
    torch.save({"state_dict": build_model(load_config(CONFIG)).state_dict()}, path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of two images, of different sizes and formats, and a text."""
    folder = tmp_path / "images"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)
    cv2.imwrite(str(folder / "b.png"), pixels)
    cv2.imwrite(str(folder / "a.jpg"), pixels[:, :50])
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str | int | None]:
    """Run a command in an own folder."""
    monkeypatch.chdir(tmp_path)
    return lambda tool, *arguments: call_script(f"tools/visualization/{tool}.py", *arguments)


def spy(tool: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The arguments by which the figures of a tool are made."""
    script = load_script(f"tools/visualization/{tool}.py")
    draw, calls = getattr(script, tool), []

    def drawn(*args: object, **kwargs: object) -> object:
        calls.append(args)
        return draw(*args, **kwargs)

    monkeypatch.setattr(script, tool, drawn)
    return calls


@pytest.mark.parametrize("task", SHIPPED)
def test_draws_with_any_task(task: str, call: Callable, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ROOT / "configs" / "demo" / SHIPPED[task]
    trees, affinities = spy("draw_trees", monkeypatch), spy("draw_affinity", monkeypatch)
    assert call("draw_trees", config, "none", images, "-o", "out/trees", "--dpi", 30) is None
    assert sorted(path.name for path in Path("out/trees").iterdir()) == ["a.png", "b.png"]
    assert np.asarray(Image.open("out/trees/a.png")).std() > 10
    sizes = {"cls": (64, 64), "det": (96, 128), "seg": (48, 64)}[task]
    for (records, picture, *_), name in zip(trees, ("a.jpg", "b.png"), strict=True):
        assert [(r.stage, r.block) for r in records] == [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0)]
        if name == "b.png":
            assert picture.size == sizes
            height, width = picture.pixels.shape[:2]
            assert (records[0].height, records[0].width) == (height // 4, width // 4)

    assert call("draw_affinity", config, "none", images / "b.png", *AT, "--stage", 2, "-o", "here.pdf") is None
    assert Path("here.pdf").read_bytes().startswith(b"%PDF")
    ((record, picture, positions, _),) = affinities
    assert (record.stage, record.block) == (2, 1)
    scale = np.array(picture.size[::-1]) / (64, 48)
    assert np.allclose(positions, (np.array([40, 30]) + 0.5) * scale - 0.5)


def test_weights_stages_and_padding(
    call: Callable, checkpoint: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = spy("draw_trees", monkeypatch)
    arguments = (CONFIG, checkpoint, images / "a.jpg", "-o", "x.png", "--dpi", 30, "--stages", 1, 2)
    ignoring = ("--pad-to", 64, 96, "--cfg-options", "model.backbone.ignore_padding=True")
    for more in ((), ("--pad-to", 64, 96), ignoring):
        assert call("draw_trees", *arguments, *more) is None
    (alone, _, *_), (padded, picture, *_), (ignored, *_) = calls
    assert [record.stage for record in alone] == [1, 2, 2]
    assert [(record.height, record.width) for record in padded[:1]] == [(8, 12)]
    assert picture.pixels.shape == (64, 96, 3)
    assert picture.size == (64, 64)
    own = {tuple(edge) for edge in alone[0].tree.edges()[0].tolist()}

    def inside(record) -> set[tuple[int, int]]:
        edges = record.tree.edges()[0]
        kept = edges[(edges % 12 < 8).all(dim=1)]
        return {tuple(edge) for edge in (kept // 12 * 8 + kept % 12).tolist()}

    assert inside(ignored[0]) == own
    assert inside(padded[0]) != own


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "no.pth"}, "checkpoint 'no.pth' does not exist"),
        ({"image": "no.png"}, "image 'no.png' does not exist"),
        ({"image": "images/notes.txt"}, "OpenCV cannot read 'images/notes.txt' as an image"),
        ({"image": "images", "out": "x.png"}, "-o 'x.png' is a single file, but there are 2 images"),
        ({"image": "images", "out": "images"}, "the output 'images/b.png' would overwrite an input image"),
        ({"out": "images/notes.txt"}, "-o 'images/notes.txt' is a file, but neither .png nor .pdf"),
        ({"out": "new/x.jpg"}, "-o 'new/x.jpg': figures are written as .png or .pdf, not .jpg; give another path"),
        ({"out": "new/x.SVG"}, "-o 'new/x.SVG': figures are written as .png or .pdf, not .SVG; give another path"),
        ({"out": "images/notes.txt/x.png"}, "cannot write images/notes.txt/x.png"),
        ({"more": ("--pad-to", 16, 16)}, "cannot pad 'images/b.png' to 16 16: the preprocessed image has size 64 64"),
        (
            {"more": ("--cfg-options", "model.backbone._delete_=True", "model.backbone.type=ResNet",
                      "model.backbone.depth=18")},
            "this ImageClassifier has no GrootV backbone, but a ResNet",
        ),
    ],
)  # fmt: skip
def test_one_clear_error(tool: str, change: dict, message: str, call: Callable, images: Path) -> None:
    values = {"checkpoint": "none", "image": "images/b.png", "out": "new/x.png", "more": ()} | change
    before = sorted(Path().rglob("*"))
    at = AT if tool == "draw_affinity" else ()
    error = call(tool, CONFIG, values["checkpoint"], values["image"], *at, "-o", values["out"], *values["more"])
    assert error.startswith("error: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert sorted(path for path in Path().rglob("*") if path.name != "new") == before


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("draw_trees", ("--stages", 3, 4), "--stages 3 4: the model has stages 0, 1, 2, 3 only"),
        ("draw_trees", ("--cut-share", 2), 2),
        ("draw_trees", ("--dpi", 1), 2),
        ("draw_affinity", (*AT, "--stage", 4), "no block -1 in stage 4: the model's stages have 1, 1, 2, 1 blocks"),
        ("draw_affinity", (*AT, "--stage", 2, "--block", 2), "no block 2 in stage 2"),
        ("draw_affinity", ("--at", 64, 2), "--at 64 2 is outside 'images/b.png', which has 64x48 pixels"),
        ("draw_affinity", (), 2),
        ("draw_affinity", (*AT, "--panel", 0), 2),
        ("draw_affinity", (*AT, "--panel", 40, "--dpi", 600), 2),
    ],
)
def test_what_the_model_does_not_have(
    tool: str, arguments: tuple, message: str | int, call: Callable, images: Path
) -> None:
    error = call(tool, CONFIG, "none", "images/b.png", *arguments)
    assert error == message or message in error
