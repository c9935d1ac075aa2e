"""Write an interactive HTML page to explore the trees of a model: a single file that needs no server and no network.

    python tools/visualization/explore_trees.py CONFIG CHECKPOINT street.jpg -o explorer.html

The page shows the affinities of any position, the trees of all blocks and metrics, and how segments grow. Predictions
can be overlaid on the image, and so can the ground truth if the image is in the config's test set.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from drawing import Opened, add_input_arguments, open_model
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS
from tqdm import tqdm

from grootvl_mm.apis import cli
from grootvl_mm.apis.images import ABSENT, find_images, metainfo_of
from grootvl_mm.apis.models import NO_CHECKPOINT
from grootvl_mm.visualization import record_trees
from grootvl_mm.visualization.explorer import (
    ExplorerImage,
    Overlay,
    TreeFeatures,
    explorer_blocks,
    explorer_page,
    make_overlays,
)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_input_arguments(parser)
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("explorer.html"), help="output HTML file (default: %(default)s)"
    )
    parser.add_argument(
        "--score-thr", type=float, default=0.5, help="minimum score of the detections shown (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.out.suffix != ".html":
        parser.error(f"the output file must end in .html, got {str(args.out)!r}")
    return args


class Overlays:
    """Ground truth and predictions of images.

    Args:
        opened: The model.
        predicts: Whether to show predictions, which are meaningless for initial weights.
        score_thr: Minimum score of a detection.
    """

    def __init__(self, opened: Opened, predicts: bool, score_thr: float) -> None:
        self.model, self.read, self.predicts, self.score_thr = opened.model, opened.read, predicts, score_thr
        self.metainfo = metainfo_of(opened.cfg)
        self.indices: dict[str, int] = {}
        try:
            self.dataset = DATASETS.build(opened.cfg.test_dataloader.dataset)
            infos = map(self.dataset.get_data_info, range(len(self.dataset)))
            self.indices = {os.path.realpath(info["img_path"]): index for index, info in enumerate(infos)}
        except ABSENT as error:
            MMLogger.get_instance("explore_trees").info(
                "No ground truth: cannot read the config's test set (%s)", cli.one_line(error)
            )

    def __call__(self, path: Path, size: tuple[int, int]) -> list[Overlay]:
        """The overlays of an image file, for a preprocessed image of this height and width."""
        index = self.indices.get(os.path.realpath(path))
        data: dict[str, Any]
        data = self.read.pipeline({"img_path": str(path), "img_id": 0}) if index is None else self.dataset[index]
        sample = data["data_samples"]
        if self.predicts:
            with torch.no_grad():
                (sample,) = self.model.test_step(pseudo_collate([data]))
        return make_overlays(sample.cpu(), self.metainfo, size, self.score_thr)


def explore(args: argparse.Namespace, paths: list[Path]) -> list[ExplorerImage]:
    """Run the model on all images, with a progress bar."""
    opened = open_model(args)
    backbone = opened.backbone
    overlays = Overlays(opened, args.checkpoint != NO_CHECKPOINT, args.score_thr)
    images = []
    all_seen = [opened.read(path) for path in paths]  # an unreadable image is found before the model has run
    for path, seen in zip(paths, tqdm(all_seen, unit="image"), strict=True):
        with torch.no_grad(), record_trees(backbone) as records, TreeFeatures(backbone) as features:
            backbone(seen.inputs)
        blocks = explorer_blocks(records, features)
        pixels, size = seen.picture
        images.append(ExplorerImage(path.name, pixels, size, blocks, overlays(path, size)))
    return images


def main() -> None:
    """Run the command."""
    args = parse_args()
    paths = find_images(args.images)
    page = explorer_page(Path(args.config).stem, explore(args, paths))
    with cli.output_file(args.out) as partial:
        partial.write_text(page, encoding="utf-8")
    megabytes = args.out.stat().st_size / 1e6
    MMLogger.get_instance("explore_trees").info("%d image(s), %.1f MB: %s", len(paths), megabytes, args.out)


if __name__ == "__main__":
    main()
