"""Draw how much every position of an image contributes to some: along the tree, by rows, and by rows and columns.

    python tools/visualization/draw_affinity.py CONFIG CHECKPOINT street.jpg --at 320 200 --at 90 410 -o affinity.png

A position contributes the product of the decays on the way to the marked one (figure 4 of the paper): computed exactly
for each channel, then the mean of the channels. All three ways have the decays of the model, so only the way differs.

Images go through the test pipeline and the data preprocessor of the config, and what is drawn over is what the model
saw. Positions are those of the image file, in pixels from its upper left corner, as image viewers show them. They
follow the image through resizing and cropping to the position of the feature map that lies over them.
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
        help="position in pixels of the image file; may be given several times, for a row each",
    )
    parser.add_argument("--stage", type=int, default=0, help="stage of the model, from 0 (default: %(default)s)")
    parser.add_argument(
        "--block", type=int, default=-1, help="block of the stage, from 0; -1 is its last (default: %(default)s)"
    )
    parser.add_argument(
        "--scale", choices=SCALES, default="auto", help="of the colours; auto fits the values (default: %(default)s)"
    )
    args = parser.parse_args()
    check_arguments(parser, args)
    return args


def choose(records: list[TreeRecord], stage: int, block: int) -> TreeRecord:
    """The record of one block, or fail."""
    of_stage = [record for record in records if record.stage == stage]
    if not -len(of_stage) <= block < len(of_stage):
        stages = [record.stage for record in records]
        depths = ", ".join(str(stages.count(number)) for number in sorted(set(stages)))
        cli.fail(f"the model has stages of {depths} blocks, not block {block} of stage {stage}")
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
                cli.fail(f"--at {x:g} {y:g} is outside of '{seen.path}', which has {width}x{height} pixels")
        positions = [seen.locate(x, y) for x, y in args.at]
        title = f"{seen.path.name}: stage {record.stage}, block {record.block}, {record.height}x{record.width}"
        try:
            figure = draw_affinity(record, seen.picture, positions, args.scale, title=title, panel=args.panel)
        except ValueError as error:
            cli.fail(f"the model does not see all positions of '{seen.path}', which its pipeline crops: {error}")
        write_figure(figure, output, args.dpi)
        count += 1
    MMLogger.get_instance("draw_affinity").info("Affinities in %d image%s: %s", count, "s" * (count > 1), args.out)


if __name__ == "__main__":
    main()
