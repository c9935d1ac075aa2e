"""Measure the frame rate of the tree explorer while the pointer moves, in a headless browser without a GPU.

The page holds random trees on maps of the given sizes and measures itself. To measure your own browser, use the button
on the page.
"""

import argparse
import re
import tempfile
from pathlib import Path

import numpy as np
import torch
from mmengine.logging import MMLogger

from grootvl_mm.apis import cli
from grootvl_mm.ops import grid_tree
from grootvl_mm.visualization import join_ranks, parent_edges
from grootvl_mm.visualization.explorer import ExplorerBlock, ExplorerImage, ExplorerTree, explorer_page
from grootvl_mm.visualization.explorer.browser import open_browser


def size(text: str) -> tuple[int, int]:
    """Parse rows and columns, such as ``56x56``."""
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS, such as 56x56, got {text!r}")
    return int(match[1]), int(match[2])


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=size, default=[(56, 56), (200, 334)], metavar="ROWSxCOLUMNS",
                        help="sizes of the maps (default: 56x56 200x334)")  # fmt: skip
    parser.add_argument("--seconds", type=float, default=3.0, help="seconds per size (default: %(default)s)")
    parser.add_argument("--width", type=int, default=1360, help="browser width in pixels (default: %(default)s)")
    args = parser.parse_args()
    if args.seconds <= 0:
        parser.error(f"--seconds must be positive, got {args.seconds}")
    return args


def random_image(height: int, width: int) -> ExplorerImage:
    """A noise image with a random spanning tree whose decays reach a few hundred positions."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(1, (height - 1) * width + height * (width - 1), generator=generator)
    tree = grid_tree(weight, height, width)
    edge = parent_edges(tree, height, width).clamp(min=0)
    explorer_tree = ExplorerTree(
        metric="cosine",
        parent=tree.parent[0].numpy(),
        rank=join_ranks(tree, weight, height, width)[0].numpy(),
        edge_weight=weight.gather(1, edge)[0].numpy(),
    )
    block = ExplorerBlock(
        stage=0,
        block=0,
        height=height,
        width=width,
        valid_size=(height, width),
        root=0,
        scan="tree",
        propagation="all",
        trees=(explorer_tree,),
        decays={"random": torch.empty(height * width).uniform_(0.9, 0.999, generator=generator).numpy()},
    )
    picture = np.random.default_rng(0).integers(0, 256, (4 * height, 4 * width, 3), dtype=np.uint8)
    return ExplorerImage(f"{height}x{width}", picture, picture.shape[:2], [block], [])


def measure(sizes: list[tuple[int, int]], seconds: float, width: int) -> list[dict[str, float]]:
    """The page's measurements at each size: ``fps``, and medians of ``interval`` and ``work`` in milliseconds."""
    with tempfile.TemporaryDirectory() as folder, open_browser() as browser:
        path = Path(folder, "explorer.html")
        path.write_text(explorer_page("benchmark", [random_image(*size) for size in sizes]), encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto(path.as_uri())
        page.locator("html[data-ready]").wait_for()
        results = []
        for index in range(len(sizes)):
            page.evaluate(f"explorer.change({{ image: {index} }})")
            page.evaluate("explorer.measure(0.5)")  # warm-up: lets the browser compile hot code
            results.append(page.evaluate(f"explorer.measure({seconds})"))
        return results


def main() -> None:
    """Run the command."""
    args = parse_args()
    try:
        results = measure(args.sizes, args.seconds, args.width)
    except (ModuleNotFoundError, FileNotFoundError) as error:
        cli.fail(f"the benchmark needs Playwright and a browser: {error}")
    for (height, width), found in zip(args.sizes, results, strict=True):
        MMLogger.get_instance("benchmark_explorer").info(
            "%dx%d: %.0f frames per second; computing and drawing take %.1f ms per frame (median)",
            *(height, width, found["fps"], found["work"]),
        )


if __name__ == "__main__":
    main()
