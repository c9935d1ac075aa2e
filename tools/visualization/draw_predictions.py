"""Draw ground truth and predictions side by side for images of a config's test set.

Detection: boxes and masks; segmentation: class maps; classification: labels with scores.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.structures import BaseDataElement

from grootvl_mm.apis import cli
from grootvl_mm.apis.images import build_test_set, read_image
from grootvl_mm.apis.models import load_model
from grootvl_mm.visualization.explorer import Overlay, make_overlays

PANEL = 2.2  # inches
LABEL_BOX = {"pad": 0.8, "linewidth": 0, "alpha": 0.85}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    cli.add_config_arguments(parser)
    parser.add_argument("checkpoint", help="path of the checkpoint")
    parser.add_argument("output", help="output PNG file")
    parser.add_argument("--num", type=int, default=8, help="number of images to draw (default: %(default)s)")
    parser.add_argument(
        "--score-thr", type=float, default=0.5, help="minimum score of the detections drawn (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.num < 1:
        parser.error(f"--num must be at least 1, got {args.num}")
    if not args.output.endswith(".png"):
        parser.error(f"the output file must end in .png, got {args.output!r}")
    return args


def predict(cfg: Config, checkpoint: str, num: int) -> tuple[list[BaseDataElement], dict]:
    """Run the model on ``num`` images spread evenly over the test set.

    Returns:
        The data samples, with ground truth and prediction, and the dataset's metainfo.
    """
    model = load_model(cfg, checkpoint).to(get_device())
    dataset = build_test_set(cfg)
    if not len(dataset):
        cli.fail("the config's test set is empty")
    samples = []
    for index in np.linspace(0, len(dataset) - 1, min(num, len(dataset))).round().astype(int):
        with torch.no_grad():
            samples += model.test_step(pseudo_collate([dataset[index]]))
    return [sample.cpu() for sample in samples], dataset.metainfo


def draw_overlay(axes: Axes, overlay: Overlay) -> None:
    """Draw ground truth or predictions over an image."""
    if overlay.picture is not None:
        axes.imshow(overlay.picture)
    axes.set_xlabel(overlay.caption, fontsize=8)
    for box in overlay.boxes:
        color = np.array(box.color) / 255
        place = {"ha": "left", "va": "bottom"}
        if box.width and box.height:
            axes.add_patch(Rectangle((box.x, box.y), box.width, box.height, fill=False, color=color, linewidth=1.5))
        else:
            place = {"ha": "center", "va": "center"}
        axes.text(box.x, box.y, box.text, fontsize=7, color=box.ink, bbox={**LABEL_BOX, "facecolor": color}, **place)


def draw_grid(samples: list[BaseDataElement], meta: dict, score_thr: float) -> Figure:
    """Draw pairs of panels, up to two pairs per row."""
    pairs_per_row = min(2, len(samples))
    rows = math.ceil(len(samples) / pairs_per_row)
    columns = 2 * pairs_per_row
    figure = Figure(figsize=(columns * PANEL, rows * PANEL + 0.3), layout="compressed")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, title in zip(grid[0], ["ground truth", "prediction"] * pairs_per_row, strict=True):
        axes.set_title(title, fontsize=10)
    for sample, pair in zip(samples, grid.reshape(-1, 2), strict=False):
        image = read_image(Path(sample.img_path))[..., ::-1]
        overlays = {overlay.name: overlay for overlay in make_overlays(sample, meta, image.shape[:2], score_thr)}
        for axes, name in zip(pair, ("ground truth", "prediction"), strict=True):
            axes.imshow(image)
            if name in overlays:
                draw_overlay(axes, overlays[name])
        if "pred_label" in sample:
            is_right = torch.equal(sample.gt_label, sample.pred_label)
            pair[1].xaxis.label.set_color("green" if is_right else "red")
    return figure


def main() -> None:
    """Run the command."""
    args = parse_args()
    logger = MMLogger.get_instance("draw_predictions")
    cfg = cli.load_config(args.config, args.cfg_options)
    samples, meta = predict(cfg, args.checkpoint, args.num)
    figure = draw_grid(samples, meta, args.score_thr)
    with cli.output_file(args.output) as partial:
        figure.savefig(partial, format="png", dpi=130)
    logger.info("Drew ground truth and predictions of %d images: %s", len(samples), args.output)


if __name__ == "__main__":
    main()
