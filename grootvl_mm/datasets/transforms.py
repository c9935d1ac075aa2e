"""Transforms for the data pipelines of the hosts, which call them with a dictionary; they need numpy only."""

from typing import Any

import numpy as np

from grootvl_mm.registry import TRANSFORMS


@TRANSFORMS.register_module()
class ToBGR:
    """Gives a greyscale image the three channels that the data preprocessor expects.

    Files are read in colour, but an array that is handed to an inferencer stays as it is, and mmdet's data preprocessor
    exchanges channels that a greyscale image does not have.
    """

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Change ``results['img']``, (H, W), (H, W, 1) or (H, W, 3), to (H, W, 3).

        Raises:
            ValueError: The image has another shape.
        """
        image = results["img"]
        if image.ndim == 2:
            image = image[..., np.newaxis]
        if image.ndim != 3 or image.shape[2] not in (1, 3):
            raise ValueError(
                "an image must be an array (H, W) or (H, W, 1), greyscale, or (H, W, 3), BGR; "
                f"got shape {results['img'].shape}"
            )
        return {**results, "img": np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image}

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"
