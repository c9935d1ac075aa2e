"""Draw the minimum spanning trees along which a model scans a picture: alone, padded, and padded but ignoring it.

The trees are those of one block. Each edge is drawn between the centres of the positions that it joins, over the
picture.
"""

import argparse
import os
from pathlib import Path

import mmcv
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

from grootvl_mm.apis import cli
from grootvl_mm.models import GrootV
from grootvl_mm.ops import Tree

PANEL = 4.5  # inches
INSIDE, CROSSING, OUTSIDE = "#1f77b4", "#d62728", "#bbbbbb"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_config_arguments(parser)
    parser.add_argument("checkpoint", help="path of the checkpoint")
    parser.add_argument("picture", help="picture to scan")
    parser.add_argument("output", help="PNG file to write")
    parser.add_argument("--pad-to", nargs=2, type=int, metavar=("H", "W"), help="size with padding (default: 3/2)")
    parser.add_argument("--stage", type=int, default=1, help="stage of the backbone (default: %(default)s)")
    parser.add_argument("--block", type=int, default=0, help="block of the stage (default: %(default)s)")
    args = parser.parse_args()
    if not args.output.endswith(".png"):
        parser.error(f"the output is a PNG file, but {args.output!r} does not end in .png")
    return args


def build_model(args: argparse.Namespace) -> nn.Module:
    """The model of the config, with a backbone that has the block."""
    cfg = cli.load_config(args.config, args.cfg_options)
    init_default_scope(cfg.default_scope)
    if "data_preprocessor" in cfg:
        cfg.model.setdefault("data_preprocessor", cfg.data_preprocessor)
    model = MODELS.build(cfg.model)
    cli.check_file(args.checkpoint, "checkpoint", "give the path of a .pth file, e.g. from work_dirs/")
    with cli.checkpoint_errors(args.checkpoint):
        load_checkpoint(model, args.checkpoint, map_location="cpu", logger="silent")
    if not isinstance(model.backbone, GrootV):
        cli.fail(f"the backbone of {args.config} is a {type(model.backbone).__name__}, which has no trees")
    depths = model.backbone.depths[: len(model.backbone.stages)]
    if not (0 <= args.stage < len(depths) and 0 <= args.block < depths[args.stage]):
        cli.fail(f"the backbone has stages of {', '.join(map(str, depths))} blocks, not block {args.block} of "
                 f"stage {args.stage}")  # fmt: skip
    return model.eval()


def find_tree(backbone: GrootV, image: Tensor, stage: int, block: int) -> tuple[Tree, int]:
    """The tree of the first image at a block, and the width of its map."""
    found = []
    mixer = backbone.stages[stage].blocks[block].mixer
    handle = mixer.register_forward_hook(lambda module, inputs, output: found.append((output[1], inputs[0].shape[2])))
    with torch.no_grad():
        backbone(image)
    handle.remove()
    return found[0]


def draw_tree(axes: Axes, image: np.ndarray, size: tuple[int, int], tree: Tree, columns: int, stride: int) -> None:
    """Draw the edges; those within the picture of ``size``, those that leave it, and those at padding."""
    vertices = tree.edges()[0].numpy()
    ends = np.stack([vertices % columns, vertices // columns], axis=-1) * stride + (stride - 1) / 2
    inside = (ends[..., 0] < size[1]) & (ends[..., 1] < size[0])
    kind = inside.sum(axis=1)
    axes.imshow(image)
    for count, colour, width in ((0, OUTSIDE, 0.8), (2, INSIDE, 1.4), (1, CROSSING, 1.8)):
        axes.add_collection(LineCollection(ends[kind == count], colors=colour, linewidths=width))
    axes.set(xticks=[], yticks=[], xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))


def main() -> None:
    """Run the command."""
    args = parse_args()
    model = build_model(args)
    cli.check_file(args.picture, "picture", "give the path of a picture")
    picture = mmcv.imread(args.picture)
    height, width = size = picture.shape[:2]
    padded_height, padded_width = args.pad_to or (-(-height * 3 // 2), -(-width * 3 // 2))
    if padded_height < height or padded_width < width:
        cli.fail(f"--pad-to {padded_height} {padded_width} is smaller than the picture, {height} {width}")

    preprocessor = model.data_preprocessor
    colour = torch.from_numpy(mmcv.bgr2rgb(picture)).permute(2, 0, 1).float()
    alone = ((colour - preprocessor.mean.cpu()) / preprocessor.std.cpu())[None]
    padded = nn.functional.pad(alone, (0, padded_width - width, 0, padded_height - height))
    shown = np.full((padded_height, padded_width, 3), 255, np.uint8)
    shown[:height, :width] = mmcv.bgr2rgb(picture) // 2 + 127

    stride = 4 * 2**args.stage
    figure = Figure(figsize=(3 * PANEL, PANEL * padded_height / padded_width + 0.3), layout="compressed")
    panels = (("the picture alone", alone, False), ("padded", padded, False), ("padded, ignore_padding", padded, True))
    for axes, (title, image, ignore) in zip(figure.subplots(1, 3), panels, strict=True):
        model.backbone.ignore_padding = ignore
        tree, columns = find_tree(model.backbone, image, args.stage, args.block)
        draw_tree(axes, shown, size, tree, columns, stride)
        axes.set_title(title, fontsize=11)
    partial = f"{args.output}.part"
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(partial, format="png", dpi=110)
    os.replace(partial, args.output)
    MMLogger.get_instance("draw_trees").info("%s", args.output)


if __name__ == "__main__":
    main()
