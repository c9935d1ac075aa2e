"""Images as models see them."""

import os
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope

from grootvl_mm.apis.images import ImageReader, decode_image, find_images, read_image, without_annotations
from grootvl_mm.apis.models import load_model
from tests.helpers.config_cases import ROOT, load_config

for host in ("mmdet", "mmseg", "mmpretrain"):
    pytest.importorskip(host)

CONFIGS = {
    "demo/grootv-pico_demo-cls.py": (64, 64),
    "demo/mask-rcnn_grootv-pico_fpn_demo.py": (85, 128),
    "demo/grootv-pico_upernet_demo-seg.py": (100, 150),
    "grootv/grootv-tiny_8xb128_in1k.py": (224, 224),
    "mask_rcnn/mask-rcnn_grootv-tiny_fpn_1x_coco.py": (800, 1200),
    "upernet/grootv-tiny_upernet_8xb2-160k_ade20k-512x512.py": (512, 768),
}
DOT = (60, 42)  # x, y


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A dark image of 150x100 pixels with a bright red square."""
    pixels = np.full((100, 150, 3), 20, np.uint8)
    x, y = DOT
    pixels[y - 5 : y + 6, x - 5 : x + 6] = (0, 0, 250)
    path = tmp_path / "image.png"
    cv2.imwrite(str(path), pixels)
    return path


def reader(cfg: Config) -> ImageReader:
    """With the data preprocessor of the config, but no model behind it."""
    preprocessor = cfg.get("data_preprocessor") or cfg.model.data_preprocessor
    preprocessor.setdefault("type", "ClsDataPreprocessor")
    return ImageReader(cfg, SimpleNamespace(data_preprocessor=MODELS.build(preprocessor)))


@pytest.mark.parametrize("config", CONFIGS)
def test_positions_follow_the_image(config: str, image: Path) -> None:
    cfg = load_config(ROOT / "configs" / config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        seen = reader(cfg)(image)
    assert (seen.file_size, seen.picture.size) == ((100, 150), CONFIGS[config])
    pixels = seen.picture.pixels
    assert seen.inputs.shape == (1, 3, *pixels.shape[:2])
    assert pixels[-1, -1, 0] == (220 if pixels.shape[:2] != CONFIGS[config] else 20)
    rows, columns = np.nonzero((pixels[..., 0] > 130) & (pixels[..., 1] < 130))
    x, y = seen.locate(*DOT)
    assert abs(columns.mean() - x) < 0.6
    assert abs(rows.mean() - y) < 0.6
    red, green, _ = seen.inputs[0, :, round(y), round(x)].tolist()
    assert red > green + 1


def test_positions_are_lost_where_nobody_knows(image: Path) -> None:
    cfg = load_config(ROOT / "configs" / "demo/mask-rcnn_grootv-pico_fpn_demo.py")
    cfg.test_dataloader.dataset.pipeline.insert(1, {"type": "RandomCrop", "crop_size": (32, 32)})
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        seen = reader(cfg)(image)
    with pytest.raises(SystemExit, match="cannot map positions through RandomCrop"):
        seen.locate(3, 4)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_files_that_are_cut_off(config: str, suffix: str, image: Path) -> None:
    """Their first bytes are those of an image."""
    cfg = load_config(ROOT / "configs" / config)
    whole = cv2.imencode(suffix, cv2.imread(str(image)))[1].tobytes()
    path = image.with_suffix(suffix)
    path.write_bytes(whole[:64])
    assert decode_image(path) is None
    with (
        DefaultScope.overwrite_default_scope(cfg.default_scope),
        pytest.raises(SystemExit, match=rf"OpenCV cannot read '.*{suffix}' as an image; repair or remove it"),
    ):
        reader(cfg)(path)
    path.write_bytes(whole)
    assert read_image(path).shape == (100, 150, 3)


def test_names_and_permissions(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names need not be UTF-8; a file that may not be read is not called damaged."""
    odd = Path(os.fsdecode(os.fsencode(image.parent) + b"/\xff\xfe.png"))
    odd.write_bytes(image.read_bytes())
    assert (read_image(odd) == read_image(image)).all()

    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(SystemExit, match=r"cannot read image '.*image.png': Permission denied"):
        read_image(image)
    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(SystemExit, match=r"cannot read '.*': Permission denied"):
        find_images([image.parent])


def test_pipelines_in_wrappers_and_classes(image: Path) -> None:
    """Wrapped test sets, steps given by class as in configs in pure Python, and a size that changes after padding."""
    cfg = load_config(ROOT / "configs" / "demo/mask-rcnn_grootv-pico_fpn_demo.py")
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        expected = reader(cfg)(image)
        inner = cfg.test_dataloader.dataset
        load, resize, *rest = without_annotations(cfg)
        resize = {**resize, "type": TRANSFORMS.get("mmdet.Resize")}
        inner.pipeline = [load, {"type": TRANSFORMS.get("mmdet.LoadAnnotations")}, resize, *rest]
        for wrapped in (
            {"type": "RepeatDataset", "dataset": inner, "times": 1},
            {"type": "ConcatDataset", "datasets": [inner, inner]},
        ):
            cfg.test_dataloader.dataset = wrapped
            found = reader(cfg)(image)
            assert torch.equal(found.inputs, expected.inputs)
            assert found.locate(*DOT) == expected.locate(*DOT)
        cfg.test_dataloader.dataset = {"type": "ConcatDataset", "datasets": []}
        with pytest.raises(SystemExit, match="whose dataset has a pipeline"):
            reader(cfg)
        pad = {"type": "mmdet.Pad", "size": (300, 200)}  # width, height
        halve = {"type": "mmdet.Resize", "scale_factor": 0.5}
        cfg.test_dataloader.dataset = {**inner, "pipeline": [load, pad, halve, *rest]}
        seen = reader(cfg)(image)
    assert seen.picture.size == (50, 75)
    assert seen.locate(*DOT) == ((DOT[0] + 0.5) / 2 - 0.5, (DOT[1] + 0.5) / 2 - 0.5)


def test_what_is_no_image(tmp_path: Path, image: Path) -> None:
    cfg = load_config(ROOT / "configs" / "demo/grootv-pico_demo-cls.py")
    text = tmp_path / "text.png"
    text.write_text("no image")
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        read = reader(cfg)
        with pytest.raises(SystemExit, match=r"OpenCV cannot read '.*text.png' as an image"):
            read(text)
        with pytest.raises(SystemExit, match=r"cannot read image '.*no.png': No such file"):
            read(tmp_path / "no.png")
        seen = read(image).padded(80, 96)
    assert (seen.inputs.shape, seen.picture.pixels.shape) == ((1, 3, 80, 96), (80, 96, 3))
    assert (seen.inputs[..., 64:, :] == 0).all()
    with pytest.raises(SystemExit, match=r"cannot pad '.*image.png' to 16 16: the preprocessed image has size 64 64"):
        seen._replace(inputs=seen.inputs[..., :64, :64]).padded(16, 16)
    for dataloader in ({}, {"test_dataloader": None}, {"test_dataloader": {"dataset": None}}):
        with pytest.raises(SystemExit, match="needs a test_dataloader whose dataset has a pipeline"):
            ImageReader(Config({"model": {}, **dataloader}), SimpleNamespace(data_preprocessor=None))


def test_files_and_folders(tmp_path: Path, image: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "empty").mkdir()
    assert find_images([tmp_path, image]) == [image, image]
    with pytest.raises(SystemExit, match=r"the folder '.*empty' has no images \(.bmp"):
        find_images([tmp_path / "empty"])
    with pytest.raises(SystemExit, match=r"image 'no.png' does not exist"):
        find_images([Path("no.png")])


def test_initial_weights_are_the_same_each_time() -> None:
    cfg = load_config(ROOT / "configs" / "demo/grootv-pico_demo-cls.py")
    before = torch.get_rng_state()
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        one, other = (load_model(cfg, "none") for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert not one.training
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    with pytest.raises(SystemExit, match=r"checkpoint 'no.pth' does not exist .*or none for initial weights"):
        load_model(cfg, "no.pth")
