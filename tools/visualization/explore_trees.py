"""Write a page in which the trees of a model can be explored: one HTML file for any browser, without server or network.

    python tools/visualization/explore_trees.py CONFIG CHECKPOINT street.jpg -o explorer.html

It shows the affinities of any position, the trees of all blocks and metrics, and how segments grow. Predictions can be
laid over the image, and the ground truth of images that belong to the config's test set.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS
from torch import nn
from tqdm import tqdm

from grootvl_mm.apis import cli
from grootvl_mm.apis.images import ImageReader, find_images
from grootvl_mm.apis.models import NO_CHECKPOINT, load_model
from grootvl_mm.apis.whole_files import whole_file
from grootvl_mm.visualization import find_backbone, record_trees
from grootvl_mm.visualization.explorer import (
    ExplorerImage,
    Overlay,
    TreeFeatures,
    explorer_blocks,
    explorer_page,
    make_overlays,
)

# What the hosts' data sets raise where their files are missing.
ABSENT = (OSError, AssertionError, RuntimeError)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_config_arguments(parser, "path of a config of any task whose model has a GrootV inside")
    parser.add_argument("checkpoint", help=f"path of the checkpoint; {NO_CHECKPOINT} for initial weights")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="images, or folders of images")
    parser.add_argument(
        "-o", "--out", type=Path, default=Path("explorer.html"), help="file to write (default: %(default)s)"
    )
    parser.add_argument(
        "--score-thr", type=float, default=0.5, help="lowest score of a shown detection (default: %(default)s)"
    )
    args = parser.parse_args()
    if args.out.suffix != ".html":
        parser.error(f"the output is an HTML file, but {str(args.out)!r} does not end in .html")
    return args


class Overlays:
    """Ground truth and predictions of images.

    Args:
        cfg: the config.
        model: its model.
        read: the reader of images.
        predicts: whether the model has been trained and its predictions mean anything.
        score_thr: lowest score of a detection.
    """

    def __init__(self, cfg: Config, model: nn.Module, read: ImageReader, predicts: bool, score_thr: float) -> None:
        self.model, self.read, self.predicts, self.score_thr = model, read, predicts, score_thr
        self.dataset = DATASETS.build({**cfg.test_dataloader.dataset, "lazy_init": True})
        self.indices: dict[Path, int] = {}
        try:
            self.dataset.full_init()
            infos = map(self.dataset.get_data_info, range(len(self.dataset)))
            self.indices = {Path(info["img_path"]).resolve(): index for index, info in enumerate(infos)}
        except ABSENT as error:
            MMLogger.get_instance("explore_trees").info(
                "No ground truth: the test set of the config is not here (%s)", error
            )

    def __call__(self, path: Path, size: tuple[int, int]) -> list[Overlay]:
        """Those of an image that the model sees in a size."""
        index = self.indices.get(path.resolve())
        data: dict[str, Any]
        data = self.read.pipeline({"img_path": str(path), "img_id": 0}) if index is None else self.dataset[index]
        sample = data["data_samples"]
        if self.predicts:
            with torch.no_grad():
                (sample,) = self.model.test_step(pseudo_collate([data]))
        return make_overlays(sample.cpu(), self.dataset.metainfo, size, self.score_thr)


def explore(args: argparse.Namespace, paths: list[Path]) -> list[ExplorerImage]:
    """Run the model on all images, with a progress bar."""
    cfg = cli.load_config(args.config, args.cfg_options)
    model = load_model(cfg, args.checkpoint).to(get_device())
    try:
        backbone = find_backbone(model)
    except ValueError as error:
        cli.fail(f"{args.config}: {error}")
    read = ImageReader(cfg, model)
    overlays = Overlays(cfg, model, read, args.checkpoint != NO_CHECKPOINT, args.score_thr)
    images = []
    for path in tqdm(paths, unit="image"):
        seen = read(path)
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
    with cli.file_errors(args.out):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(args.out) as partial:
            partial.write_text(page, encoding="utf-8")
    megabytes = args.out.stat().st_size / 1e6
    MMLogger.get_instance("explore_trees").info("%d image(s), %.1f MB: %s", len(paths), megabytes, args.out)


if __name__ == "__main__":
    main()
