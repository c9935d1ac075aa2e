"""Reads images as a config's model sees them, for the visualization and analysis tools."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import mmcv
import numpy as np
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset, Compose, pseudo_collate
from mmengine.registry import DATASETS
from torch import Tensor, nn

from grootvl_mm.apis import cli
from grootvl_mm.visualization.figures import Picture

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# What the hosts' datasets raise if their files are missing or damaged.
ABSENT = (OSError, AssertionError, RuntimeError, ValueError, KeyError)


class SeenImage(NamedTuple):
    """An image file and its preprocessed image.

    Attributes:
        path: The file.
        inputs: (1, C, H, W), the input of the backbone: resized, cropped, normalized and padded.
        picture: The same for display.
        file_size: Height and width of the image in the file.
        locate: Maps a position (x, y) in the file, in pixels, to one in the picture, possibly outside it.
    """

    path: Path
    inputs: Tensor
    picture: Picture
    file_size: tuple[int, int]
    locate: Callable[[float, float], tuple[float, float]]

    def padded(self, height: int, width: int) -> "SeenImage":
        """Pad to this size, as in a batch with a larger image; exit with an error if it is smaller than the image."""
        if height < self.inputs.shape[2] or width < self.inputs.shape[3]:
            came = f"{self.inputs.shape[2]} {self.inputs.shape[3]}"
            cli.fail(f"cannot pad '{self.path}' to {height} {width}: the preprocessed image has size {came}")
        margins = height - self.inputs.shape[2], width - self.inputs.shape[3]
        inputs = nn.functional.pad(self.inputs, (0, margins[1], 0, margins[0]))
        return self._replace(inputs=inputs, picture=self.picture.padded(height, width))


def find_images(paths: Sequence[Path]) -> list[Path]:
    """List the given files and the images in the given folders; exit with an error if one of them has none."""
    found = []
    for path in map(Path, paths):
        try:
            if path.is_dir():
                inside = sorted(child for child in path.iterdir() if child.suffix.lower() in IMAGE_SUFFIXES)
                if not inside:
                    cli.fail(f"the folder '{path}' has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
                found += inside
            elif path.is_file():
                found.append(path)
            else:
                cli.fail(f"image '{path}' does not exist; give image files or folders of images")
        except OSError as error:
            cli.fail(f"cannot read '{path}': {error.strerror}")
    return found


def decode_image(path: Path) -> np.ndarray | None:
    """Read an image file, (H, W, 3) uint8, BGR, upright; None if it is not an image, or cut off.

    Raises:
        OSError: the file cannot be read.
    """
    # Not by name: OpenCV crashes if a name is not UTF-8.
    content = Path(path).read_bytes()
    try:
        return mmcv.imfrombytes(content) if content else None
    except cv2.error:
        return None


def read_image(path: Path) -> np.ndarray:
    """Read an image file, (H, W, 3) uint8, BGR, upright, or exit with a one-line error."""
    try:
        image = decode_image(path)
    except OSError as error:
        cli.fail(f"cannot read image '{path}': {error.strerror}")
    if image is None:
        cli.fail(f"OpenCV cannot read '{path}' as an image; repair or remove it")
    return image


def single_dataset(cfg: Config) -> ConfigDict:
    """The config of the test set inside wrappers such as ``ConcatDataset``, of which the first one counts.

    Exits with an error if it has no pipeline.
    """
    dataset = (cfg.get("test_dataloader") or {}).get("dataset")
    while dataset and not dataset.get("pipeline"):
        dataset = dataset.get("dataset") or next(iter(dataset.get("datasets") or ()), None)
    if not dataset:
        cli.fail("the config needs a test_dataloader whose dataset has a pipeline: images are read through it")
    return dataset


def metainfo_of(cfg: Config) -> dict[str, Any]:
    """The metainfo of the config's test set, such as its classes, without reading the files of the set."""
    return DATASETS.build({**single_dataset(cfg), "lazy_init": True}).metainfo


def build_test_set(cfg: Config) -> BaseDataset:
    """The config's test set, or an exit with a one-line error if its files cannot be read."""
    single_dataset(cfg)
    try:
        return DATASETS.build(cfg.test_dataloader.dataset)
    except ABSENT as error:
        cli.fail(f"cannot read the config's test set: {cli.one_line(error)}")


def type_name(step: ConfigDict) -> str:
    """The name of what a config builds; its ``type`` is a name, perhaps with a scope, or a class."""
    kind = step["type"]
    return kind.rpartition(".")[2] if isinstance(kind, str) else kind.__name__


def without_annotations(cfg: Config) -> list[ConfigDict]:
    """The steps of the test pipeline, except for those that load annotations."""
    return [step for step in single_dataset(cfg).pipeline if "Annotations" not in type_name(step)]


class ImageReader:
    """Reads images through a config's test pipeline and its model's data preprocessor.

    Args:
        cfg: The config. Its default scope must be the current one, see :func:`grootvl_mm.apis.models.load_model`.
        model: The model of the config.
    """

    def __init__(self, cfg: Config, model: nn.Module) -> None:
        if not hasattr(model, "data_preprocessor"):
            cli.fail("the model needs a data_preprocessor: images are read through it")
        self.pipeline = Compose(without_annotations(cfg))
        self.preprocessor = model.data_preprocessor

    def __call__(self, path: Path) -> SeenImage:
        """Read an image file, or exit with a one-line error."""
        read_image(path)  # the pipelines of the hosts fail with a traceback
        results: dict[str, Any] = {"img_path": str(path), "img_id": 0}
        followed = _Followed()
        for step in self.pipeline.transforms:
            results = step(results)
            if results is None or ("img" in results and results["img"] is None):
                cli.fail(f"cannot read '{path}': {type(step).__name__} of the test pipeline returned nothing")
            if "img" in results:
                followed.step(type(step).__name__, results["img"].shape[:2])
        inputs = self.preprocessor(pseudo_collate([results]), False)["inputs"]
        if not isinstance(inputs, Tensor):
            cli.fail(f"the model's data_preprocessor, a {type(self.preprocessor).__name__}, does not batch images")
        picture = Picture.of(results["inputs"], followed.size).padded(*inputs.shape[2:])
        return SeenImage(path, inputs, picture, followed.file_size, followed.locate)


class _Followed:
    """Tracks positions through the transforms that change the size of an image."""

    def __init__(self) -> None:
        self.file_size: tuple[int, int] | None = None
        self.shape: tuple[int, int] | None = None  # of the array
        self.size: tuple[int, int] | None = None  # of the image in it, without padding
        self.scale, self.offset = np.ones(2), np.zeros(2)  # x and y
        self.lost: str | None = None

    def step(self, name: str, size: tuple[int, int]) -> None:
        if self.shape is None:
            self.file_size = self.shape = self.size = size
        elif size != self.shape:
            old, new = np.array(self.shape[::-1]), np.array(size[::-1])
            if "Pad" in name:  # at the right and bottom: no position moves
                pass
            elif "Resize" in name:
                self.scale = self.scale * new / old
                self.offset = self.offset * new / old
                columns, rows = np.round(self.size[::-1] * new / old).astype(int).tolist()
                self.size = rows, columns
            elif name == "CenterCrop" and self.size == self.shape:
                self.offset = self.offset - np.maximum(np.round((old - new) / 2), 0)
                self.size = size
            else:
                self.lost = name
                self.size = size
            self.shape = size

    def locate(self, x: float, y: float) -> tuple[float, float]:
        if self.lost is not None:
            cli.fail(f"cannot map positions through {self.lost} of the test pipeline; use a pipeline without it")
        # The centre of pixel 0 is half a pixel inside the image.
        x, y = (np.array([x, y]) + 0.5) * self.scale + self.offset - 0.5
        return float(x), float(y)
