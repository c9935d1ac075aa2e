"""A browser, and pages that were written for it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from grootvl_mm.models import GrootV
from grootvl_mm.visualization import TreeRecord, record_trees
from grootvl_mm.visualization.explorer import (
    Box,
    ExplorerImage,
    Overlay,
    TreeFeatures,
    explorer_blocks,
    explorer_page,
)
from grootvl_mm.visualization.explorer.browser import HOW_TO_GET_ONE, open_browser

LOCAL = ("file:", "data:", "blob:")
SIZE = (72, 100)  # a map of 18 x 25 and smaller ones


@pytest.fixture(scope="session")
def browser() -> Iterator:
    pytest.importorskip("playwright", reason="no Playwright: pip install playwright")
    try:
        opened = open_browser()
        browser = opened.__enter__()
    except FileNotFoundError:
        pytest.skip(f"no browser: {HOW_TO_GET_ONE}")
    yield browser
    opened.__exit__(None, None, None)


@pytest.fixture
def visit(browser) -> Iterator[Callable]:
    """Open a page; nothing may go wrong in it until the test ends, and nothing may be asked of the network."""
    contexts, faults = [], []

    def open_page(path: Path, fragment: str = "", **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: request.url.startswith(LOCAL) or faults.append(f"asks for {request.url}"))
        page.goto(f"{path.as_uri()}{fragment}")
        page.locator("html[data-ready]").wait_for()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


@contextmanager
def watched(model: torch.nn.Module) -> Iterator[tuple[list[TreeRecord], TreeFeatures]]:
    with torch.no_grad(), record_trees(model) as records, TreeFeatures(model) as features:
        yield records, features


def make_image(model: GrootV, name: str = "noise.png", size: tuple[int, int] = SIZE) -> tuple[ExplorerImage, list]:
    """An image of smooth noise, and what was recorded."""
    noise = torch.rand(1, 3, size[0] // 8 + 1, size[1] // 8 + 1)
    image = torch.nn.functional.interpolate(noise, size, mode="bicubic").clamp(0, 1)
    with watched(model) as (records, features):
        model(4 * image - 2)
    picture = (255 * image[0]).permute(1, 2, 0).byte().numpy()
    mask = np.zeros((*size, 4), np.uint8)
    mask[10:30, 20:50] = (20, 200, 90, 120)
    overlays = [
        Overlay("ground truth", (Box(20, 10, 30, 20, "leaf </script>", (20, 200, 90)),), mask),
        Overlay("prediction", caption="Prediction: leaf, score 0.90"),
    ]
    return ExplorerImage(name, picture, size, explorer_blocks(records, features), overlays), records


@pytest.fixture(scope="session")
def model() -> GrootV:
    """With decays as those of a trained model: far from 1 at some positions and near it at others."""
    torch.manual_seed(0)
    model = GrootV("pico").eval()
    model.init_weights()
    for stage in model.stages:
        for block in stage.blocks:
            block.mixer.dt_proj.weight.data.mul_(6)
            block.mixer.x_proj.weight.data.mul_(8)
    return model


@pytest.fixture(scope="session")
def shown(model: GrootV, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TreeRecord], ExplorerImage]:
    """A page of two images, the records of the first, and the first as it was written."""
    torch.manual_seed(1)
    first, records = make_image(model)
    second, _ = make_image(model, "other <b>image</b>.png", (64, 64))
    path = tmp_path_factory.mktemp("explorer") / "explorer.html"
    path.write_text(explorer_page("pico </script>", [first, second]), encoding="utf-8")
    return path, records, first
