"""Transforms, by themselves and as the hosts build them."""

import numpy as np
import pytest
from mmengine.registry import TRANSFORMS, DefaultScope

from grootvl_mm.datasets import ToBGR


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_greyscale_becomes_three_equal_channels(dtype: type) -> None:
    grey = np.arange(12).reshape(3, 4).astype(dtype)
    for image in (grey, grey[..., None]):
        results = {"img": image, "img_shape": (3, 4)}
        changed = ToBGR()(results)
        assert changed["img"].dtype == dtype
        assert changed["img_shape"] == (3, 4)
        np.testing.assert_array_equal(changed["img"], np.stack([grey] * 3, axis=-1))
        assert results["img"] is image


def test_colour_stays() -> None:
    image = np.zeros((3, 4, 3), np.uint8)
    assert ToBGR()({"img": image})["img"] is image


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 4, 2), (3, 64, 64), (2, 3, 4, 3), (5,), (0, 4, 3), (0, 4)])
def test_other_shapes_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"greyscale, or \(H, W, 3\), BGR; got shape \(" + str(shape[0])):
        ToBGR()({"img": np.zeros(shape)})


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint16, np.complex64])
def test_other_dtypes_are_an_error(dtype: type) -> None:
    with pytest.raises(TypeError, match=f"dtype uint8, or floating point.*got {np.dtype(dtype)}"):
        ToBGR()({"img": np.zeros((3, 4, 3), dtype)})


@pytest.mark.parametrize("scope", ["mmengine", "mmdet"])
def test_built_by_name(scope: str) -> None:
    if scope != "mmengine":
        pytest.importorskip(scope)
    with DefaultScope.overwrite_default_scope(scope):
        assert isinstance(TRANSFORMS.build({"type": "grootvl_mm.ToBGR"}), ToBGR)
