"""Generate the curve dataset, a task that can only be solved by following a curve, similar to Pathfinder.

Each image shows two long curves of the same length and optional shorter distractors, solid or dashed, none of which
touch each other. Discs mark two of the ends. The same scenes serve two tasks::

    classification/{train,val}/{apart,joined}/000000.png   are the two marks at the ends of the same curve?
    images/{train,val}/000000.png                          RGB images with the first mark only
    semantic/{train,val}/000000.png                        uint8 class map: 0 background, 1 the curve with the mark,
                                                           2 the other curves
    meta.json                                              the arguments that the dataset was made with

Half of the scenes are joined. The distance between the marks is drawn before the scene and is independent of the
answer, and so are the numbers of free ends and curves. Every scene has its own random generator, so the output does not
depend on the number of workers.
"""

import argparse
import json
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from make_demo_data import SPLITS, at_least, is_made, new_folder, run_command, start_workers
from PIL import Image
from tqdm import tqdm

VERSION = 1  # increment with every change of the output
CLASSES = ("apart", "joined")
STEP = 0.5  # pixels between the points of a curve
MARGIN = 2.0  # pixels between a curve and the border of the image
STROKE = 1.5  # width of a curve in pixels
MARK = 2.0  # radius of a mark in pixels
MAX_TURN = 0.25  # maximum curvature, radians per pixel
TURN_CHANGE = 0.06  # standard deviation of the change of the curvature per step
DISTANCE = (0.45, 0.85)  # between the marks, as a share of the length of a curve
TOLERANCE = 0.04  # of that distance, as a share of the length
CANDIDATES = 32  # curves generated at a time
ATTEMPTS = 20  # batches of candidates before giving up on a curve
SCENES = 500  # attempts before giving up on a scene
SKIPPED = 2.0  # a curve keeps its distance from its own points farther away along it than this many gaps


class Options(NamedTuple):
    """Parameters of the scenes."""

    size: int  # side in pixels
    length: int  # of the two long curves, in pixels
    distractors: int  # number of shorter curves
    gap: float  # minimum distance between the centre lines of two curves, in pixels
    dash: int  # length of a dash in pixels, 0 for solid curves
    seed: int


class Scene(NamedTuple):
    """Curves, the two long ones first, and the marked ends."""

    curves: list[np.ndarray]  # (N, 2) points each, row and column
    marks: np.ndarray  # (2, 2) points


def walk(rng: np.random.Generator, options: Options, length: float) -> np.ndarray:
    """Smooth random curves (CANDIDATES, N, 2) with a point every ``STEP``, which start inside the image."""
    count = round(length / STEP)
    turn = np.clip(rng.normal(0, TURN_CHANGE, (CANDIDATES, count)).cumsum(axis=1), -MAX_TURN, MAX_TURN)
    heading = rng.uniform(-np.pi, np.pi, (CANDIDATES, 1)) + STEP * turn.cumsum(axis=1)
    start = rng.uniform(MARGIN, options.size - 1 - MARGIN, (CANDIDATES, 1, 2))
    return start + STEP * np.stack([np.sin(heading), np.cos(heading)], axis=2).cumsum(axis=1)


def is_clear(options: Options, curve: np.ndarray, others: np.ndarray) -> bool:
    """Whether a curve (N, 2) keeps its distance from points (M, 2) and from itself."""
    along = STEP * np.abs(np.arange(len(curve))[:, None] - np.arange(len(curve)))
    far = np.where(along > SKIPPED * options.gap, squared_distance(curve, curve), np.inf)
    return min(far.min(), squared_distance(curve, others).min(initial=np.inf)) >= options.gap**2


def squared_distance(points: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Squared distances (N, M) between points (N, 2) and (M, 2)."""
    return np.square(points[:, None] - others).sum(axis=2)


def place_curve(rng: np.random.Generator, options: Options, length: float, curves: list[np.ndarray]) -> bool:
    """Add a curve to the list if there is room; return whether there was."""
    others = np.concatenate(curves) if curves else np.empty((0, 2))
    for _ in range(ATTEMPTS):
        candidates = walk(rng, options, length)
        inside = np.abs(candidates - (options.size - 1) / 2).max(axis=(1, 2)) <= (options.size - 1) / 2 - MARGIN
        for curve in candidates[inside]:
            if is_clear(options, curve, others):
                curves.append(curve)
                return True
    return False


def compose_scene(rng: np.random.Generator, options: Options, joined: bool) -> Scene:
    """Compose a scene; the distance between its marks is independent of ``joined``.

    Raises:
        ValueError: The curves do not fit into the image.
    """
    wanted = rng.uniform(*DISTANCE) * options.length
    for _ in range(SCENES):
        curves: list[np.ndarray] = []
        if not (
            place_curve(rng, options, options.length, curves) and place_curve(rng, options, options.length, curves)
        ):
            continue
        first, second = (curve[[0, -1]] for curve in curves)
        pairs = [first, second] if joined else [np.stack([a, b]) for a in first for b in second]
        pairs = [pair for pair in pairs if abs(np.linalg.norm(pair[0] - pair[1]) - wanted) < TOLERANCE * options.length]
        if not pairs:
            continue
        marks = pairs[rng.integers(len(pairs))]
        lengths = rng.uniform(0.25, 0.6, options.distractors) * options.length
        if all(place_curve(rng, options, length, curves) for length in lengths):
            return Scene(curves, rng.permutation(marks))
    raise ValueError(
        f"no room for two curves of {options.length} pixels and {options.distractors} more in {options.size}x"
        f"{options.size} pixels with a gap of {options.gap}; use a larger --size, or shorter, fewer or closer curves"
    )


def paint(options: Options, points: np.ndarray, radius: float) -> np.ndarray:
    """Coverage (H, W), 0 to 1, by discs around points (N, 2)."""
    grid = np.arange(options.size)
    offsets = np.square(grid[:, None] - points[:, 0])[:, None] + np.square(grid[:, None] - points[:, 1])[None]
    return np.clip(radius + 0.5 - np.sqrt(offsets.min(axis=2)), 0, 1)


def dashes(options: Options, curve: np.ndarray) -> np.ndarray:
    """The points of a curve to draw, with both ends."""
    if not options.dash:
        return curve
    period = round(2 * options.dash / STEP)
    position = np.minimum(np.arange(len(curve)), np.arange(len(curve))[::-1])
    return curve[position % period < period // 2]


def render(options: Options, scene: Scene, marks: np.ndarray) -> np.ndarray:
    """Draw the image (H, W, 3) uint8: white curves and red marks on black."""
    ink = paint(options, np.concatenate([dashes(options, curve) for curve in scene.curves]), STROKE / 2)
    image = np.repeat(ink[:, :, None], 3, axis=2)
    disc = paint(options, marks, MARK)[:, :, None]
    image += disc * (np.array([1.0, 0.1, 0.1]) - image)
    return np.rint(255 * image).astype(np.uint8)


def class_map(options: Options, scene: Scene, mark: np.ndarray) -> np.ndarray:
    """Class map (H, W) uint8: 1 for the curve that ends at the mark, including gaps between dashes, 2 for others."""
    result = np.zeros((options.size, options.size), np.uint8)
    for curve in scene.curves:
        marked = any(np.array_equal(curve[end], mark) for end in (0, -1))
        result[paint(options, curve, STROKE / 2) >= 0.5] = 1 if marked else 2
    return result


def write_scene(index: int, root: Path, split: str, options: Options) -> None:
    """Write the files of one scene below ``root``."""
    rng = np.random.default_rng([options.seed, SPLITS.index(split), index])
    joined = index % 2
    scene = compose_scene(rng, options, bool(joined))
    name = f"{index:06d}.png"
    files = {
        f"classification/{split}/{CLASSES[joined]}": render(options, scene, scene.marks),
        f"images/{split}": render(options, scene, scene.marks[:1]),
        f"semantic/{split}": class_map(options, scene, scene.marks[0]),
    }
    for folder, pixels in files.items():
        Image.fromarray(pixels).save(root / folder / name)


def make_curve_data(out: Path, counts: dict[str, int], options: Options, workers: int = 1, force: bool = False) -> bool:
    """Generate the curve dataset in the folder ``out``, completely or not at all.

    Args:
        out: Output folder.
        counts: Number of scenes of each split.
        options: Parameters of the scenes.
        workers: Number of processes; the output does not depend on it.
        force: Replace ``out`` if it has other content.

    Returns:
        False if ``out`` already holds this dataset, which is then left unchanged.

    Raises:
        FileExistsError: ``out`` has other content and ``force`` is not set.
        ValueError: The curves do not fit into the image.
    """
    out = out.resolve()
    meta: dict[str, Any] = {"version": VERSION, **options._asdict(), "counts": counts}
    if is_made(out, meta, force, "curve data"):
        return False
    with new_folder(out) as new:
        pool = start_workers(workers)
        try:
            for split in SPLITS:
                for folder in (
                    *(f"classification/{split}/{name}" for name in CLASSES),
                    f"images/{split}",
                    f"semantic/{split}",
                ):
                    (new / folder).mkdir(parents=True)
                write = partial(write_scene, root=new, split=split, options=options)
                scenes = pool.map(write, range(counts[split]), chunksize=16)
                for _ in tqdm(scenes, split, counts[split], unit="scene"):
                    pass
        finally:
            pool.shutdown(cancel_futures=True)
        (new / "meta.json").write_text(json.dumps({**meta, "classes": CLASSES}, indent=2) + "\n")
    return True


def parse_args() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add, number = parser.add_argument, at_least(1)
    add("--out", type=Path, default=Path("data/curves"), help="output folder")
    add("--train", type=number, default=4000, metavar="N", help="number of training scenes")
    add("--val", type=number, default=1000, metavar="N", help="number of validation scenes")
    add("--size", type=at_least(16), default=32, metavar="N", help="side of an image in pixels")
    add("--length", type=at_least(4), default=18, metavar="N", help="length of the two long curves in pixels")
    add("--distractors", type=at_least(0), default=0, metavar="N", help="number of shorter curves")
    add("--gap", type=float, default=5.0, metavar="PIXELS", help="minimum distance between two curves in pixels")
    add("--dash", type=at_least(0), default=0, metavar="N", help="length of a dash in pixels, 0 for solid curves")
    add("--seed", type=at_least(0), default=0, metavar="N", help="random seed")
    add("--workers", type=number, default=os.cpu_count(), metavar="N",
        help="number of processes; the output does not depend on it")  # fmt: skip
    add("--force", action="store_true", help="replace --out if it has other content")
    return parser.parse_args()


def main() -> None:
    """Run the command line."""
    args = parse_args()
    options = Options(args.size, args.length, args.distractors, args.gap, args.dash, args.seed)
    counts = {"train": args.train, "val": args.val}
    run_command(args.out, partial(make_curve_data, args.out, counts, options, args.workers, args.force))


if __name__ == "__main__":
    main()
