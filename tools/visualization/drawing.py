"""Shared code of the tools that show trees: command line arguments, model, images and output files."""

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.device import get_device
from torch import nn
from tqdm import tqdm

from grootvl_mm.apis import cli
from grootvl_mm.apis.images import IMAGE_SUFFIXES, ImageReader, SeenImage, find_images
from grootvl_mm.apis.models import NO_CHECKPOINT, load_grootv
from grootvl_mm.models import GrootV
from grootvl_mm.visualization import TreeRecord, record_trees
from grootvl_mm.visualization.figures import PANEL

FORMATS = ("png", "pdf")
MOST_PIXELS = 8000  # on the longer side of a panel
OTHER_FORMATS = IMAGE_SUFFIXES | {".eps", ".jfif", ".ps", ".svg"}


class Opened(NamedTuple):
    """The config and model of a command line, and the reader of its images."""

    cfg: Config
    model: nn.Module
    backbone: GrootV
    read: ImageReader


class Recorded(NamedTuple):
    """An image, its recorded trees, and the file to draw them to."""

    seen: SeenImage
    records: list[TreeRecord]
    output: Path


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Add config, checkpoint and images."""
    cli.add_config_arguments(parser, "path of a config, of any task, whose model has a GrootV backbone")
    parser.add_argument(
        "checkpoint", help=f"path of the checkpoint, or {NO_CHECKPOINT} for the initial weights of a training"
    )
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files, or folders of images")


def open_model(args: argparse.Namespace) -> Opened:
    """Load the config, the model and its weights from the arguments of :func:`add_input_arguments`."""
    cfg = cli.load_config(args.config, args.cfg_options)
    model, backbone = load_grootv(cfg, args.checkpoint)
    return Opened(cfg, model.to(get_device()), backbone, ImageReader(cfg, model))


def add_arguments(parser: argparse.ArgumentParser, default_out: str) -> None:
    """Add the arguments of the tools that draw figures."""
    add_input_arguments(parser)
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path(default_out),
        help="output file (.png or .pdf) for a single image, otherwise output folder (default: %(default)s)",
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="png", help="file format in an output folder (default: %(default)s)"
    )
    parser.add_argument("--dpi", type=int, default=130, help="resolution in pixels per inch (default: %(default)s)")
    parser.add_argument(
        "--panel", type=float, default=PANEL, help="longer side of each panel in inches (default: %(default)s)"
    )
    parser.add_argument(
        "--pad-to",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="pad the model's input to this height and width in pixels, as in a batch with a larger image (default: no "
        "padding); to compare, set --cfg-options model.backbone.ignore_padding=True or False",
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject sizes that are too small or too large to draw."""
    if args.dpi < 10:
        parser.error(f"--dpi must be at least 10, got {args.dpi}")
    if not 0.5 <= args.panel <= 40:
        parser.error(f"--panel must be between 0.5 and 40 inches, got {args.panel:g}")
    if args.dpi * args.panel > MOST_PIXELS:
        parser.error(f"--dpi times --panel must be at most {MOST_PIXELS} pixels, got {args.dpi * args.panel:g}")


def record_images(args: argparse.Namespace) -> Iterator[Recorded]:
    """Run the model on one image after the other, with a progress bar."""
    paths = find_images(args.images)
    outputs = _outputs(args, paths)
    opened = open_model(args)
    for path, output in zip(tqdm(paths, unit="image"), outputs, strict=True):
        seen = opened.read(path)
        if args.pad_to is not None:
            seen = seen.padded(*args.pad_to)
        with torch.no_grad(), record_trees(opened.model) as records:
            opened.backbone(seen.inputs)
        yield Recorded(seen, records, output)


def write_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure, or exit with a one-line error."""
    with cli.output_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:].lower(), dpi=dpi)


def _outputs(args: argparse.Namespace, paths: list[Path]) -> list[Path]:
    """The output file of each image."""
    out: Path = args.out
    is_file = out.suffix[1:].lower() in FORMATS
    if not is_file and out.suffix.lower() in OTHER_FORMATS:
        cli.fail(f"-o '{out}': figures are written as .png or .pdf, not {out.suffix}; give another path")
    if is_file:
        if len(paths) > 1:
            cli.fail(f"-o '{out}' is a single file, but there are {len(paths)} images; give a folder to -o")
        outputs = [out]
    else:
        outputs = [out / f"{path.stem}.{args.format}" for path in paths]
    if out.exists() and out.is_dir() == is_file:
        found = "a folder, not a file" if out.is_dir() else "a file, but neither .png nor .pdf"
        cli.fail(f"-o '{out}' is {found}; give another path")
    inputs = set(map(os.path.realpath, paths))
    for output, count in Counter(outputs).items():
        if os.path.realpath(output) in inputs:
            cli.fail(f"the output '{output}' would overwrite an input image; give another folder to -o")
        if count > 1:
            cli.fail(f"several images of the same name would be drawn to '{output}'; draw them one by one")
    return outputs
