"""Draw affinity maps: how much every position contributes to given ones in the tree, raster and cross scans.

    python tools/visualization/draw_affinity.py CONFIG CHECKPOINT street.jpg --at 320 200 --at 90 410 -o affinity.png

A position contributes the product of the decays on the path to the marked one (figure 4 of the paper), computed exactly
for each channel, then averaged over the channels. All three scans use the decays of the model; only their paths differ.

Images go through the config's test pipeline and data preprocessor, and the maps are drawn over the preprocessed image.
Positions are given in pixels of the image file, from its upper left corner, as in image viewers. They are mapped
through resizing and cropping to the position of the feature map that contains them.
"""

import argparse

from drawing import add_arguments, check_arguments, record_images, write_figure
from mmengine.logging import MMLogger

from grootvl_mm.apis import cli
from grootvl_mm.visualization import TreeRecord
from grootvl_mm.visualization.figures import SCALES, draw_affinity


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, default_out="affinity")
    parser.add_argument(
        "--at",
        nargs=2,
        type=float,
        action="append",
        required=True,
        metavar=("X", "Y"),
        help="position in pixels of the image file; repeat the option for more positions, one row each",
    )
    parser.add_argument("--stage", type=int, default=0, help="stage, counted from 0 (default: %(default)s)")
    parser.add_argument(
        "--block",
        type=int,
        default=-1,
        help="block of the stage, counted from 0; -1 is the last (default: %(default)s)",
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="auto",
        help="colour scale; auto is linear if all contributions exceed 0.05, else logarithmic (default: %(default)s)",
    )
    args = parser.parse_args()
    check_arguments(parser, args)
    return args


def choose(records: list[TreeRecord], stage: int, block: int) -> TreeRecord:
    """Select the record of one block, or exit with an error."""
    of_stage = [record for record in records if record.stage == stage]
    if not -len(of_stage) <= block < len(of_stage):
        stages = [record.stage for record in records]
        depths = ", ".join(str(stages.count(number)) for number in sorted(set(stages)))
        cli.fail(f"there is no block {block} in stage {stage}: the model's stages have {depths} blocks")
    return of_stage[block]


def main() -> None:
    """Run the command."""
    args = parse_args()
    count = 0
    for seen, records, output in record_images(args):
        record = choose(records, args.stage, args.block)
        height, width = seen.file_size
        for x, y in args.at:
            if not (0 <= x <= width - 1 and 0 <= y <= height - 1):
                cli.fail(f"--at {x:g} {y:g} is outside '{seen.path}', which has {width}x{height} pixels")
        positions = [seen.locate(x, y) for x, y in args.at]
        title = f"{seen.path.name}: stage {record.stage}, block {record.block}, {record.height}x{record.width}"
        try:
            figure = draw_affinity(record, seen.picture, positions, args.scale, title=title, panel=args.panel)
        except ValueError as error:
            cli.fail(f"the test pipeline crops '{seen.path}', so that the model does not see all positions: {error}")
        write_figure(figure, output, args.dpi)
        count += 1
    MMLogger.get_instance("draw_affinity").info("Affinities in %d image%s: %s", count, "s" * (count > 1), args.out)


if __name__ == "__main__":
    main()
