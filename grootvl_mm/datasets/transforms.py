"""Transforms for the data pipelines of mmdet, mmseg and mmpretrain; they need NumPy only."""

from typing import Any

import numpy as np

from grootvl_mm.registry import TRANSFORMS


@TRANSFORMS.register_module()
class ToBGR:
    """Converts greyscale images to the three channels that the data preprocessor expects.

    Image files are decoded to BGR, but inferencers pass arrays on unchanged, and mmdet's data preprocessor then swaps
    channels that a greyscale image does not have.
    """

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Convert ``results['img']``, (H, W), (H, W, 1) or (H, W, 3), to (H, W, 3).

        Raises:
            TypeError: The image has a dtype other than uint8 and floating point, such as 16-bit integers, whose values
                would not be those that the model was trained with.
            ValueError: The image has any other shape, or no pixels.
        """
        image = results["img"]
        if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
            raise TypeError(f"an image must have dtype uint8, or floating point values of 0 to 255; got {image.dtype}")
        if image.ndim == 2:
            image = image[..., np.newaxis]
        if image.ndim != 3 or image.shape[2] not in (1, 3) or image.size == 0:
            raise ValueError(
                "an image must be a non-empty array of shape (H, W) or (H, W, 1), greyscale, or (H, W, 3), BGR; "
                f"got shape {results['img'].shape}"
            )
        return {**results, "img": np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image}

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
