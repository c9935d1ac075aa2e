"""Draw ground truth and predictions side by side for images of a config's test set.

Detection: boxes and masks; segmentation: class maps; classification: labels with scores.
"""

import argparse
import math
from collections.abc import Callable

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS
from mmengine.structures import BaseDataElement
from PIL import Image

from grootvl_mm.apis import cli
from grootvl_mm.apis.models import load_model

PANEL = 2.2  # inches
MASK_OPACITY = 0.45
MAP_OPACITY = 0.85
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
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    samples = []
    for index in np.linspace(0, len(dataset) - 1, min(num, len(dataset))).round().astype(int):
        with torch.no_grad():
            samples += model.test_step(pseudo_collate([dataset[index]]))
    return [sample.cpu() for sample in samples], dataset.metainfo


def draw_instances(
    axes: Axes, boxes: np.ndarray, masks: np.ndarray | None, labels: np.ndarray, texts: list[str], palette: np.ndarray
) -> None:
    """Draw boxes (N, 4), x1 y1 x2 y2, optional masks (N, H, W) and texts in the colours of the labels (N,)."""
    for mask, label in zip(() if masks is None else masks, labels, strict=masks is not None):
        overlay = np.zeros((*mask.shape, 4))
        overlay[mask.astype(bool)] = (*palette[label], MASK_OPACITY)
        axes.imshow(overlay)
    for box, label, text in zip(boxes, labels, texts, strict=True):
        colour = palette[label]
        x1, y1, x2, y2 = box
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=colour, linewidth=1.5))
        axes.text(x1, y1, text, fontsize=7, va="bottom", color=_ink_on(colour), bbox={**LABEL_BOX, "facecolor": colour})


def draw_detection(pair: tuple[Axes, Axes], sample: BaseDataElement, meta: dict, score_thr: float) -> None:
    """Draw the instances of one image."""
    classes, palette = meta["classes"], np.array(meta["palette"]) / 255
    truth, found = sample.gt_instances, sample.pred_instances
    found = found[found.scores >= score_thr]
    labels = truth.labels.numpy()
    boxes = getattr(truth.bboxes, "tensor", truth.bboxes).numpy()
    masks = truth.masks.masks if "masks" in truth else None
    draw_instances(pair[0], boxes, masks, labels, [classes[label] for label in labels], palette)
    labels = found.labels.numpy()
    texts = [f"{classes[label]} {score:.2f}" for label, score in zip(labels, found.scores.tolist(), strict=True)]
    masks = found.masks.numpy() if "masks" in found else None
    draw_instances(pair[1], found.bboxes.numpy(), masks, labels, texts, palette)


def draw_segmentation(pair: tuple[Axes, Axes], sample: BaseDataElement, meta: dict, _score_thr: float) -> None:
    """Overlay an image with its class maps, except for the first class (background), and label the classes."""
    classes, palette = meta["classes"], np.array(meta["palette"]) / 255
    for axes, data in zip(pair, (sample.gt_sem_seg, sample.pred_sem_seg), strict=True):
        labels = data.data.squeeze(0).numpy()
        known = labels < len(classes)  # 255 marks pixels to ignore
        overlay = np.zeros((*labels.shape, 4))
        overlay[known, :3] = palette[labels[known]]
        overlay[..., 3] = known & (labels > 0)
        overlay[..., 3] *= MAP_OPACITY
        axes.imshow(overlay)
        for label in np.unique(labels[known & (labels > 0)]):
            rows, columns = np.nonzero(labels == label)
            if len(rows) >= labels.size // 400:  # the labels of specks would hide the image
                colour = palette[label]
                axes.text(
                    np.median(columns),
                    np.median(rows),
                    classes[label],
                    fontsize=7,
                    ha="center",
                    va="center",
                    color=_ink_on(colour),
                    bbox={**LABEL_BOX, "facecolor": colour},
                )


def draw_classification(pair: tuple[Axes, Axes], sample: BaseDataElement, meta: dict, _score_thr: float) -> None:
    """Write the true and the predicted class of one image; a wrong prediction is red."""
    truth, found = sample.gt_label.item(), sample.pred_label.item()
    pair[0].set_xlabel(meta["classes"][truth])
    pair[1].set_xlabel(
        f"{meta['classes'][found]} {sample.pred_score.max():.2f}", color="green" if truth == found else "red"
    )


DRAW: dict[str, Callable[[tuple[Axes, Axes], BaseDataElement, dict, float], None]] = {
    "mmdet": draw_detection,
    "mmseg": draw_segmentation,
    "mmpretrain": draw_classification,
}


def draw_grid(samples: list[BaseDataElement], meta: dict, scope: str, score_thr: float) -> Figure:
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
        image = np.asarray(Image.open(sample.img_path).convert("RGB"))
        for axes in pair:
            axes.imshow(image)
        DRAW[scope](pair, sample, meta, score_thr)
    return figure


def _ink_on(colour: np.ndarray) -> str:
    """Black or white, whichever is legible on ``colour`` (RGB, 0 to 1)."""
    return "black" if colour @ [0.299, 0.587, 0.114] > 0.55 else "white"


def main() -> None:
    """Run the command."""
    args = parse_args()
    logger = MMLogger.get_instance("draw_predictions")
    cfg = cli.load_config(args.config, args.cfg_options)
    samples, meta = predict(cfg, args.checkpoint, args.num)
    figure = draw_grid(samples, meta, cfg.default_scope, args.score_thr)
    with cli.output_file(args.output) as partial:
        figure.savefig(partial, format="png", dpi=130)
    logger.info("Drew ground truth and predictions of %d images: %s", len(samples), args.output)


if __name__ == "__main__":
    main()
