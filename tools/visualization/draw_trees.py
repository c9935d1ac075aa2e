"""Draw the trees along which a model scans images, and the segments that remain after cutting the heaviest edges.

    python tools/visualization/draw_trees.py CONFIG CHECKPOINT street.jpg -o trees.png
    python tools/visualization/draw_trees.py CONFIG CHECKPOINT pictures/ -o trees/ --format pdf

Each block has two panels: its tree and its segments, both over the preprocessed image. Images go through the config's
test pipeline and data preprocessor.
"""

import argparse

from drawing import add_arguments, check_arguments, record_images, write_figure
from mmengine.logging import MMLogger

from grootvl_mm.apis import cli
from grootvl_mm.visualization.figures import COLORS, draw_trees


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, default_out="trees")
    parser.add_argument(
        "--color",
        choices=COLORS,
        default="order",
        help="what the edge colours show: the edge's rank by weight (order), its weight, or its distance to the root "
        "(depth) (default: %(default)s)",
    )
    parser.add_argument(
        "--cut-share",
        type=float,
        default=0.05,
        help="share of the edges to cut, the heaviest first, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument("--stages", nargs="+", type=int, help="stages to draw, counted from 0 (default: all)")
    args = parser.parse_args()
    check_arguments(parser, args)
    if not 0 <= args.cut_share <= 1:
        parser.error(f"--cut-share must be between 0 and 1, got {args.cut_share:g}")
    return args


def main() -> None:
    """Run the command."""
    args = parse_args()
    count = 0
    for seen, records, output in record_images(args):
        stages = sorted({record.stage for record in records})
        if args.stages and not set(args.stages) <= set(stages):
            wanted = " ".join(map(str, args.stages))
            cli.fail(f"--stages {wanted}: the model has stages {', '.join(map(str, stages))} only")
        drawn = [record for record in records if record.stage in (args.stages or stages)]
        figure = draw_trees(
            drawn,
            seen.picture,
            args.color,
            args.cut_share,
            title=seen.path.name,
            panel=args.panel,
        )
        write_figure(figure, output, args.dpi)
        count += 1
    MMLogger.get_instance("draw_trees").info("Trees of %d image%s: %s", count, "s" * (count > 1), args.out)


if __name__ == "__main__":
    main()
