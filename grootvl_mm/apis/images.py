"""Reads images as the model of a config sees them, for tools that show what a model does with them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from torch import Tensor, nn

from grootvl_mm.apis import cli
from grootvl_mm.visualization.figures import Picture

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class SeenImage(NamedTuple):
    """An image file, and what a model makes of it before its first layer.

    Attributes:
        path: the file.
        inputs: (1, C, H, W), what the backbone gets: resized, cropped, normalised and padded.
        picture: the same to look at.
        file_size: height and width of the image in the file.
        locate: from a position (x, y) in the file, in pixels, to that in the picture, which may be outside of it.
    """

    path: Path
    inputs: Tensor
    picture: Picture
    file_size: tuple[int, int]
    locate: Callable[[float, float], tuple[float, float]]

    def padded(self, height: int, width: int) -> "SeenImage":
        """The same as in a batch with an image of this size, or fail where that is smaller."""
        if height < self.inputs.shape[2] or width < self.inputs.shape[3]:
            came = f"{self.inputs.shape[2]} {self.inputs.shape[3]}"
            cli.fail(f"{height} {width} is smaller than what the model sees of '{self.path}', {came}")
        margins = height - self.inputs.shape[2], width - self.inputs.shape[3]
        inputs = nn.functional.pad(self.inputs, (0, margins[1], 0, margins[0]))
        return self._replace(inputs=inputs, picture=self.picture.padded(height, width))


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files among paths, and the images in the folders among them; fail where there is nothing to read."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(child for child in path.iterdir() if child.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                cli.fail(f"the folder '{path}' has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            cli.fail(f"image '{path}' does not exist; give images or folders of images")
    return found


class ImageReader:
    """Reads images through the test pipeline of a config and the data preprocessor of its model.

    Args:
        cfg: the config; its default scope must be that of this process, see :func:`grootvl_mm.apis.models.load_model`.
        model: the model of the config.
    """

    def __init__(self, cfg: Config, model: nn.Module) -> None:
        if "test_dataloader" not in cfg or not hasattr(model, "data_preprocessor"):
            cli.fail(
                "the config needs a test_dataloader and a model with a data_preprocessor, by which images are read"
            )
        steps = cfg.test_dataloader.dataset.pipeline
        # Annotations are not known, and not needed.
        self.pipeline = Compose([step for step in steps if "Annotations" not in step["type"]])
        self.preprocessor = model.data_preprocessor

    def __call__(self, path: Path) -> SeenImage:
        """Read an image file, or fail with one clear line."""
        if not cv2.haveImageReader(str(path)):
            cli.fail(f"'{path}' is no image that OpenCV can read; remove it or repair it")
        results: dict[str, Any] = {"img_path": str(path), "img_id": 0}
        followed = _Followed()
        for step in self.pipeline.transforms:
            results = step(results)
            if results is None or ("img" in results and results["img"] is None):
                cli.fail(f"'{path}' cannot be read: {type(step).__name__} of the test pipeline gave nothing")
            if "img" in results:
                followed.step(type(step).__name__, results["img"].shape[:2])
        inputs = self.preprocessor(pseudo_collate([results]), False)["inputs"]
        picture = Picture.of(results["inputs"], followed.size).padded(*inputs.shape[2:])
        return SeenImage(path, inputs, picture, followed.file_size, followed.locate)


class _Followed:
    """Follows positions through the transforms that change the size of an image."""

    def __init__(self) -> None:
        self.file_size: tuple[int, int] | None = None
        self.size: tuple[int, int] | None = None
        self.scale, self.offset = np.ones(2), np.zeros(2)  # x and y
        self.lost: str | None = None

    def step(self, name: str, size: tuple[int, int]) -> None:
        if self.size is None:
            self.file_size = self.size = size
        elif size != self.size:
            old, new = np.array(self.size[::-1]), np.array(size[::-1])
            if "Pad" in name:  # to the right and below, which the model sees, but there is no image
                return
            if "Resize" in name:
                self.scale = self.scale * new / old
                self.offset = self.offset * new / old
            elif name == "CenterCrop":
                self.offset = self.offset - np.maximum(np.round((old - new) / 2), 0)
            else:
                self.lost = name
            self.size = size

    def locate(self, x: float, y: float) -> tuple[float, float]:
        if self.lost is not None:
            cli.fail(
                f"positions cannot be followed through {self.lost} of the test pipeline; use a pipeline without it"
            )
        # The centre of pixel 0 lies half a pixel inside of the image.
        x, y = (np.array([x, y]) + 0.5) * self.scale + self.offset - 0.5
        return float(x), float(y)
