"""Assembles the explorer's page: markup, style, modules and data in one file."""

import base64
import html
import json
import re
import zlib
from importlib.resources import files
from typing import Any, NamedTuple

import cv2
import numpy as np

from grootvl_mm.visualization.explorer.blocks import ExplorerBlock
from grootvl_mm.visualization.explorer.encoding import encode_block
from grootvl_mm.visualization.explorer.overlays import Box, Overlay

JPEG_QUALITY = 88
SOURCES = files(__package__)


class ExplorerImage(NamedTuple):
    """One image of the page.

    Attributes:
        name: Name of the image file.
        picture: (H, W, 3) uint8, RGB, the preprocessed image with its padding.
        content: Height and width without padding.
        blocks: The blocks of the backbone.
        overlays: Ground truth and predictions.
    """

    name: str
    picture: np.ndarray
    content: tuple[int, int]
    blocks: list[ExplorerBlock]
    overlays: list[Overlay]


def explorer_page(title: str, images: list[ExplorerImage]) -> str:
    """Create the page as self-contained HTML.

    Args:
        title: Name of the model.
        images: At least one image.

    Raises:
        ValueError: There is no image.
    """
    if not images:
        raise ValueError("an explorer needs at least one image")
    described, contents = zip(*map(_encode_image, images), strict=True)
    parts = {
        "title": html.escape(f"{title}: tree explorer"),
        "style": _source("page.css"),
        "meta": _json({"title": title, "images": described}),
        "data": "\n".join(
            f'<script type="application/octet-stream" id="data-{index}">{_base64(zlib.compress(content, 9))}</script>'
            for index, content in enumerate(contents)
        ),
        "modules": _json({"imports": _modules()}),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _source("page.html"))


def _modules() -> dict[str, str]:
    """Import map with the modules as data URLs, because a page opened from disk cannot import other files."""
    names = sorted(path.name for path in SOURCES.iterdir() if path.name.endswith(".js"))
    code = {name: f"{_source(name)}\n//# sourceURL=explorer/{name}\n" for name in names}
    return {f"explorer/{name}": _data_url("text/javascript", text.encode()) for name, text in code.items()}


def _encode_image(image: ExplorerImage) -> tuple[dict[str, Any], bytes]:
    blocks, contents, offset = [], [], 0
    for block in image.blocks:
        info, content = encode_block(block)
        blocks.append({**info, "offset": offset})
        contents.append(content)
        offset += len(content)
    height, width = image.picture.shape[:2]
    described = {
        "name": image.name,
        "width": width,
        "height": height,
        "content": image.content[::-1],
        "picture": _picture(image.picture[..., ::-1], ".jpg", "image/jpeg", [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]),
        "overlays": [_encode_overlay(overlay) for overlay in image.overlays],
        "blocks": blocks,
    }
    return described, b"".join(contents)


def _encode_overlay(overlay: Overlay) -> dict[str, Any]:
    picture = None
    if overlay.picture is not None:
        picture = _picture(overlay.picture[..., [2, 1, 0, 3]], ".png", "image/png", [cv2.IMWRITE_PNG_COMPRESSION, 9])
    boxes = [_encode_box(box) for box in overlay.boxes]
    return {"name": overlay.name, "caption": overlay.caption, "picture": picture, "boxes": boxes}


def _encode_box(box: Box) -> dict[str, Any]:
    edges = {name: round(getattr(box, name), 1) for name in ("x", "y", "width", "height")}
    return {**edges, "text": box.text, "color": f"rgb({' '.join(map(str, box.color))})", "ink": box.ink}


def _picture(pixels: np.ndarray, suffix: str, kind: str, options: list[int]) -> str:
    """Pixels, BGR or BGRA, as a data URL."""
    return _data_url(kind, cv2.imencode(suffix, np.ascontiguousarray(pixels), options)[1].tobytes())


def _source(name: str) -> str:
    return SOURCES.joinpath(name).read_text(encoding="utf-8")


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{_base64(content)}"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _json(value: Any) -> str:
    """JSON escaped for a script element, so that nothing in it can close the element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
