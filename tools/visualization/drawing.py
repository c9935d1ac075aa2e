"""What the tools that draw trees have in common: their arguments, the model, the images and the files they write."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from mmengine.device import get_device
from tqdm import tqdm

from grootvl_mm.apis import cli
from grootvl_mm.apis.images import ImageReader, SeenImage, find_images
from grootvl_mm.apis.models import NO_CHECKPOINT, load_model
from grootvl_mm.apis.whole_files import whole_file
from grootvl_mm.visualization import TreeRecord, find_backbone, record_trees

FORMATS = ("png", "pdf")


class Recorded(NamedTuple):
    """An image, what a model did with it, and the file to draw it to."""

    seen: SeenImage
    records: list[TreeRecord]
    output: Path


def add_arguments(parser: argparse.ArgumentParser, default_out: str) -> None:
    """Add the arguments of all these tools."""
    cli.add_config_arguments(parser, "path of a config of any task whose model has a GrootV inside")
    parser.add_argument("checkpoint", help=f"path of the checkpoint; {NO_CHECKPOINT} for initial weights")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="images, or folders of images")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path(default_out),
        help="file to draw to (.png or .pdf) if there is one image, else folder (default: %(default)s)",
    )
    parser.add_argument("--format", choices=FORMATS, default="png", help="of files in a folder (default: %(default)s)")
    parser.add_argument("--dpi", type=int, default=130, help="pixels to an inch (default: %(default)s)")
    parser.add_argument("--panel", type=float, default=3.2, help="inches of each picture (default: %(default)s)")
    parser.add_argument(
        "--pad-to",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help="pad what the model sees, as in a batch with a larger image; compare ignore_padding by "
        "--cfg-options model.backbone.ignore_padding=True",
    )


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse sizes that nothing can be drawn in."""
    if args.dpi < 10:
        parser.error(f"--dpi must be at least 10, got {args.dpi}")
    if not 0.5 <= args.panel <= 40:
        parser.error(f"--panel must be 0.5 to 40 inches, got {args.panel:g}")


def record_images(args: argparse.Namespace) -> Iterator[Recorded]:
    """Run the model on one image after the other, with a progress bar."""
    paths = find_images(args.images)
    outputs = _outputs(args, paths)
    cfg = cli.load_config(args.config, args.cfg_options)
    model = load_model(cfg, args.checkpoint).to(get_device())
    try:
        backbone = find_backbone(model)
    except ValueError as error:
        cli.fail(f"{args.config}: {error}")
    read = ImageReader(cfg, model)
    for path, output in zip(tqdm(paths, unit="image"), outputs, strict=True):
        seen = read(path)
        if args.pad_to is not None:
            seen = seen.padded(*args.pad_to)
        with torch.no_grad(), record_trees(model) as records:
            backbone(seen.inputs)
        yield Recorded(seen, records, output)


def write_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a figure, whole or not at all, or fail with one clear line."""
    with cli.file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            figure.savefig(partial, format=path.suffix[1:], dpi=dpi)


def _outputs(args: argparse.Namespace, paths: list[Path]) -> list[Path]:
    """The file to draw each image to."""
    out: Path = args.out
    if out.suffix[1:] in FORMATS:
        if len(paths) > 1:
            cli.fail(f"{len(paths)} images cannot be drawn to one file '{out}'; give a folder to -o")
        outputs = [out]
    else:
        outputs = [out / f"{path.stem}.{args.format}" for path in paths]
    if out.exists() and out.is_dir() == (out.suffix[1:] in FORMATS):
        cli.fail(f"-o '{out}' is {'a folder' if out.is_dir() else 'a file, but neither .png nor .pdf'}; give another")
    inputs = {path.resolve() for path in paths}
    for output in outputs:
        if output.resolve() in inputs:
            cli.fail(f"'{output}' is one of the images, which would be lost; give another folder to -o")
        if outputs.count(output) > 1:
            cli.fail(f"several images would be drawn to '{output}', as they have the same name; draw them one by one")
    return outputs
