"""Generate the demo dataset: handwritten digits on photographs, with exact instance masks.

Real handwritten digits (scikit-learn's ``load_digits``) are pasted with random positions, sizes, angles and colours,
partly overlapping, onto photographs that come with scikit-image. Nothing is downloaded. The same scenes serve three
tasks::

    images/{train,val}/000000.png                    RGB scenes, all of one size or of mixed sizes
    annotations/instances_{train,val}.json           COCO instances, RLE masks of the visible parts
    semantic/{train,val}/000000.png                  uint8 class map: 0 background, 1 to 10 the digits
    classification/{train,val}/<zero..nine>/*.png    64x64 crops around one digit each
    meta.json                                        the arguments that the dataset was made with, and its size

The two splits share neither a handwritten digit nor a pixel of a photograph. Every scene has its own random generator,
so the output does not depend on the number of workers.
"""

import argparse
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

VERSION = 1  # increment with every change of the output
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "val")
# Lossless files only: JPEG decoders, and with them the scenes, differ between libraries.
PHOTOS = ("astronaut", "brick", "camera", "chelsea", "coffee", "grass", "gravel", "ihc")
TRAIN_SHARE = 0.7  # of the columns of each photograph; with more, the rest would be too narrow for a crop
TRAIN_DIGITS = 1437  # of 1797, shuffled because the last writers differ from the rest
PHOTO_CROP = (96, 134)  # side of the window taken from a photograph, in its pixels
DIAMETER = (28 / 128, 56 / 128)  # longer side of a digit, as a share of the scene's shorter side
MAX_ANGLE = 15.0  # degrees
STROKE_LEVEL = 110  # grey level (0..255) of the upscaled digit where its ink begins
MIN_CONTRAST = 100.0  # minimum RGB distance of a digit's colour from 9 of 10 pixels below it
MIN_VISIBLE = 0.9  # share of a digit's pixels that later digits must not cover
ATTEMPTS = 50  # to place one digit, or to find a colour for it
MIN_SIDE = 64  # of a scene, in pixels
CROP_SIZE = 64  # classification crops, pixels
CROP_CONTEXT = 1.3  # side of a crop relative to the longer side of its digit
MAX_INTRUSION = 0.33  # ink of other digits in a crop relative to the digit's own
ENDING = {signal.SIGINT, signal.SIGTERM}  # signals that end a run


class Source(NamedTuple):
    """Raw material of one split."""

    photos: list[np.ndarray]  # (H, W, 3) uint8 each, RGB
    digits: np.ndarray  # (N, 8, 8), ink from 0 to 16
    labels: np.ndarray  # (N,), 0..9


class Scene(NamedTuple):
    """One scene with its instances."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    owner: np.ndarray  # (H, W) int64, index of the digit on top, -1: background
    labels: list[int]  # 0..9 for each digit


@lru_cache(maxsize=1)
def load_sources() -> dict[str, Source]:
    """Load digits and photographs from the installed packages.

    Raises:
        ModuleNotFoundError: scikit-learn or scikit-image is not installed.
        FileNotFoundError: The installed scikit-image lacks one of the photographs.
    """
    import skimage.data
    from sklearn.datasets import load_digits

    folder = Path(skimage.data.__file__).parent
    # Read as files, because the functions of skimage.data may start a download.
    if missing := [name for name in PHOTOS if not (folder / f"{name}.png").is_file()]:
        raise FileNotFoundError(
            f"scikit-image {skimage.__version__} in {folder} lacks the photographs {', '.join(missing)}; install "
            "another version (0.26 has them)"
        )
    photos = [np.asarray(Image.open(folder / f"{name}.png").convert("RGB")) for name in PHOTOS]
    parts = [np.split(photo, [round(TRAIN_SHARE * photo.shape[1])], axis=1) for photo in photos]
    pixels, classes = load_digits(return_X_y=True)
    # The same split for every seed, so that no training digit of one dataset is a validation digit of another.
    chosen = np.split(np.random.default_rng(0).permutation(len(classes)), [TRAIN_DIGITS])
    return {
        split: Source(
            [part[i] for part in parts],
            pixels[chosen[i]].reshape(-1, 8, 8),
            classes[chosen[i]],
        )
        for i, split in enumerate(SPLITS)
    }


def render_digit(digit: np.ndarray, diameter: int, angle: float) -> np.ndarray:
    """Render an (8, 8) digit, 0 to 16, as the (h, w) coverage, 0 to 1, of a sharp, anti-aliased glyph.

    The longer of h and w is ``diameter`` pixels; ``angle`` is in degrees, counter-clockwise.
    """
    grey = np.pad(digit * (255 / 16), 1).astype(np.uint8)
    fine = Image.fromarray(grey).resize((4 * diameter,) * 2, Image.Resampling.BICUBIC)
    fine = fine.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    ink = fine.point(lambda level: 255 * (level >= STROKE_LEVEL))
    ink = ink.crop(ink.getbbox())
    shape = [max(1, round(side * diameter / max(ink.size))) for side in ink.size]
    return np.asarray(ink.resize(shape, Image.Resampling.BOX)) / 255.0


def pick_colour(rng: np.random.Generator, below: np.ndarray) -> np.ndarray:
    """Draw an RGB colour that stands out from the (N, 3) pixels ``below`` it."""
    below = below[:: 1 + len(below) // 500]
    colours = rng.uniform(0, 255, (ATTEMPTS, 3))
    distance = np.linalg.norm(colours[:, None] - below[None], axis=2)
    contrast = np.percentile(distance, 10, axis=1)
    good = contrast >= MIN_CONTRAST
    # The first good colour, or the best one if the background has all colours.
    return colours[np.argmax(good) if good.any() else np.argmax(contrast)]


def crop_photo(rng: np.random.Generator, photo: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crop a photograph to the aspect ratio of ``size`` (height, width) and scale it to that size."""
    ratios = np.array(size) / min(size)
    widest = min(PHOTO_CROP[1], *(int(length / ratio) for length, ratio in zip(photo.shape[:2], ratios, strict=True)))
    side = rng.integers(min(PHOTO_CROP[0], widest), widest, endpoint=True)
    height, width = (int(side * ratio) for ratio in ratios)
    y = rng.integers(photo.shape[0] - height, endpoint=True)
    x = rng.integers(photo.shape[1] - width, endpoint=True)
    quarters = rng.integers(4)
    # A quarter turn changes the aspect ratio of anything but a square.
    patch = np.rot90(photo[y : y + height, x : x + width], quarters if height == width else 2 * (quarters % 2))
    return np.asarray(Image.fromarray(patch).resize(size[::-1], Image.Resampling.BICUBIC))


def compose_scene(rng: np.random.Generator, source: Source, size: tuple[int, int], digits: Sequence[int]) -> Scene:
    """Compose one scene of ``size``, height and width in pixels.

    It has between ``digits[0]`` and ``digits[1]`` digits, inclusive, or fewer if no more fit without hiding too much of
    the earlier ones.
    """
    photo = source.photos[rng.integers(len(source.photos))]
    # The tint colours the grey photographs and changes the light of the others.
    canvas = crop_photo(rng, photo, size) * rng.uniform(0.6, 1.0, 3)

    owner = np.full(size, -1)
    labels: list[int] = []
    full_area: list[int] = []
    for _ in range(rng.integers(*digits, endpoint=True)):
        for _ in range(ATTEMPTS):
            chosen = rng.integers(len(source.labels))
            diameter = round(min(size) * rng.uniform(*DIAMETER))
            angle = rng.uniform(-MAX_ANGLE, MAX_ANGLE)
            alpha = render_digit(source.digits[chosen], diameter, angle)
            y, x = (rng.integers(side - length, endpoint=True) for side, length in zip(size, alpha.shape, strict=True))
            window = np.s_[y : y + alpha.shape[0], x : x + alpha.shape[1]]
            ink = alpha >= 0.5
            after = owner.copy()
            after[window][ink] = len(labels)
            visible = np.bincount(after[after >= 0], minlength=len(labels))[: len(labels)]
            if np.all(visible >= MIN_VISIBLE * np.array(full_area)):
                break
        else:
            break
        colour = pick_colour(rng, canvas[window][ink])
        canvas[window] += alpha[..., None] * (colour - canvas[window])
        owner = after
        labels.append(int(source.labels[chosen]))
        full_area.append(int(ink.sum()))
    return Scene(np.rint(canvas).astype(np.uint8), owner, labels)


def coco_annotations(scene: Scene) -> list[dict]:
    """COCO annotations of the visible parts of the digits, without ``id`` and ``image_id``."""
    annotations = []
    for k, label in enumerate(scene.labels):
        rle = coco_mask.encode(np.asfortranarray(scene.owner == k, dtype=np.uint8))
        annotations.append(
            {
                "category_id": label + 1,
                "bbox": coco_mask.toBbox(rle).tolist(),
                "area": int(coco_mask.area(rle)),
                "iscrowd": 0,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
            }
        )
    return annotations


def semantic_map(scene: Scene) -> np.ndarray:
    """Return the (H, W) uint8 class map: 0 for the background, label + 1 for a digit."""
    # Owner -1, the background, indexes the last entry.
    return np.array([label + 1 for label in scene.labels] + [0], dtype=np.uint8)[scene.owner]


def digit_crops(scene: Scene, annotations: Sequence[dict]) -> Iterator[tuple[int, Image.Image]]:
    """Yield (index, square crop) of each digit that is mostly alone in its crop."""
    scene_height, scene_width = scene.owner.shape
    for k, annotation in enumerate(annotations):
        x, y, width, height = annotation["bbox"]
        side = min(scene_height, scene_width, round(CROP_CONTEXT * max(width, height)))
        left = int(np.clip(round(x + (width - side) / 2), 0, scene_width - side))
        top = int(np.clip(round(y + (height - side) / 2), 0, scene_height - side))
        owner = scene.owner[top : top + side, left : left + side]
        if np.sum((owner >= 0) & (owner != k)) <= MAX_INTRUSION * annotation["area"]:
            crop = Image.fromarray(scene.image[top : top + side, left : left + side])
            yield k, crop.resize((CROP_SIZE, CROP_SIZE), Image.Resampling.BICUBIC)


def write_scene(
    index: int, root: Path, split: str, seed: int, size: int | Sequence[Sequence[int]], digits: Sequence[int]
) -> tuple[dict, list[dict], int]:
    """Write the files of one scene below ``root``; return its COCO image entry, annotations and number of crops."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    size = (size, size) if isinstance(size, int) else tuple(size[rng.integers(len(size))])
    scene = compose_scene(rng, load_sources()[split], size, digits)
    annotations = coco_annotations(scene)
    name = f"{index:06d}.png"
    Image.fromarray(scene.image).save(root / "images" / split / name)
    Image.fromarray(semantic_map(scene)).save(root / "semantic" / split / name)
    crops = 0
    for k, crop in digit_crops(scene, annotations):
        folder = root / "classification" / split / CLASSES[scene.labels[k]]
        crop.save(folder / f"{index:06d}_{k}.png")
        crops += 1
    return {"id": index, "file_name": name, "width": size[1], "height": size[0]}, annotations, crops


def follow_parent() -> None:
    """Make this worker process exit with its parent, and not before."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    # Ctrl-C reaches the whole process group, but only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The inherited handler raises an exception, which the pool would treat as the result of a scene.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    # After kill -9 of the parent, the worker would wait for work forever.
    threading.Thread(target=wait, daemon=True).start()


def start_workers(count: int) -> ProcessPoolExecutor:
    """Start worker processes whose signal handlers are set before any signal can reach them."""
    # Until follow_parent has run, a signal would run the parent's handler inside the pool's own code.
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        pool = ProcessPoolExecutor(count, initializer=follow_parent)
        for started in [pool.submit(os.getpid) for _ in range(count)]:
            started.result()
        return pool
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)


def write_split(
    root: Path, split: str, count: int, options: dict[str, Any], pool: ProcessPoolExecutor
) -> tuple[int, int]:
    """Write one split below ``root``; return its numbers of instances and crops."""
    crop_folders = [root / "classification" / split / name for name in CLASSES]
    for folder in [root / "images" / split, root / "semantic" / split, *crop_folders]:
        folder.mkdir(parents=True)
    scenes = pool.map(partial(write_scene, root=root, split=split, **options), range(count))
    images, annotations, crops = [], [], 0
    for image, found, cropped in tqdm(scenes, split, count, unit="scene"):
        images.append(image)
        for annotation in found:
            # Ids start at 1: pycocotools treats a match with id 0 as no match.
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **annotation})
        crops += cropped
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASSES, start=1)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(coco))
    return len(annotations), crops


def is_made(out: Path, meta: dict[str, Any], force: bool, kind: str = "demo data") -> bool:
    """Whether ``out`` already holds the dataset described by ``meta``.

    Raises:
        FileExistsError: ``out`` has other content and ``force`` is not set, or is not a folder, or is or holds the
            current folder.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not out.is_dir() or Path.cwd().is_relative_to(out):
        raise FileExistsError(f"{out} is a file, or contains the current folder; choose another --out")
    if force:
        return False
    try:
        found = json.loads((out / "meta.json").read_text())
        changed = [f"{k} {found[k]} (requested: {v})" for k, v in meta.items() if found[k] != v]
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(
            f"{out} holds something other than {kind}; choose another --out, or --force to replace the whole folder"
        ) from None
    if changed:
        raise FileExistsError(
            f"{out} holds {kind} made with {', '.join(changed)}; choose another --out, or --force to replace it"
        )
    return True


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield the path of a temporary folder, which replaces ``out`` on success and is removed on failure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename works within one file system only.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        new = Path(temporary, "new")
        yield new
        if out.exists():
            out.rename(Path(temporary, "old"))
        new.rename(out)


def make_demo_data(
    out: Path,
    counts: dict[str, int],
    size: int | Sequence[Sequence[int]] = 128,
    digits: Sequence[int] = (2, 5),
    seed: int = 0,
    workers: int = 1,
    force: bool = False,
) -> bool:
    """Generate the demo dataset in the folder ``out``, completely or not at all.

    Args:
        out: Output folder.
        counts: Number of scenes of each split.
        size: Side of the scenes in pixels, or a list of heights and widths to draw from.
        digits: Minimum and maximum number of digits per scene.
        seed: Random seed.
        workers: Number of processes; the output does not depend on it.
        force: Replace ``out`` if it has other content.

    Returns:
        False if ``out`` already holds this dataset, which is then left unchanged.

    Raises:
        FileExistsError: ``out`` has other content and ``force`` is not set.
        FileNotFoundError: The installed scikit-image lacks a photograph.
        ModuleNotFoundError: scikit-learn or scikit-image is not installed.
    """
    out = out.resolve()
    size = size if isinstance(size, int) else [list(pair) for pair in size]
    options = {"seed": seed, "size": size, "digits": list(digits)}
    meta = {"version": VERSION, **options, "counts": counts}
    if is_made(out, meta, force):
        return False
    load_sources()  # fails early; forked workers inherit its cache
    with new_folder(out) as new:
        pool = start_workers(workers)
        try:
            made = {n: write_split(new, n, counts[n], options, pool) for n in SPLITS}
        finally:
            pool.shutdown(cancel_futures=True)
        for i, key in enumerate(("instances", "crops")):
            meta[key] = {n: made[n][i] for n in SPLITS}
        (new / "meta.json").write_text(json.dumps({**meta, "classes": CLASSES}, indent=2) + "\n")
    return True


def at_least(least: int) -> Callable[[str], int]:
    """Argparse type: integers from ``least`` on."""

    def integer(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"expected {least} or more, got {value}")
        return value

    return integer


def parse_args() -> argparse.Namespace:
    """Parse and check the command line."""

    def height_and_width(text: str) -> tuple[int, int]:
        if not re.fullmatch(r"\d+x\d+", text):
            raise argparse.ArgumentTypeError(f"expected HEIGHTxWIDTH, got {text!r}")
        return tuple(map(at_least(MIN_SIDE), text.split("x")))

    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add, number = parser.add_argument, at_least(1)
    add("--out", type=Path, default=Path("data/demo"), help="output folder")
    add("--train", type=number, default=1500, metavar="N", help="number of training scenes")
    add("--val", type=number, default=200, metavar="N", help="number of validation scenes")
    sides = parser.add_mutually_exclusive_group()
    sides.add_argument("--size", type=at_least(MIN_SIDE), default=128, metavar="N", help="side of a scene in pixels")
    sides.add_argument("--sizes", dest="size", type=height_and_width, nargs="+", metavar="HxW",
        default=argparse.SUPPRESS,
        help="sizes in pixels to draw from for each scene, e.g. 96x128, instead of --size")  # fmt: skip
    add("--digits", type=number, nargs=2, default=[2, 5], metavar=("MIN", "MAX"),
        help="number of digits per scene; fewer if no more fit")  # fmt: skip
    add("--seed", type=at_least(0), default=0, metavar="N", help="random seed")
    add("--workers", type=number, default=os.cpu_count(), metavar="N",
        help="number of processes; the output does not depend on it")  # fmt: skip
    add("--force", action="store_true", help="replace --out if it has other content")
    args = parser.parse_args()
    if args.digits[0] > args.digits[1]:
        parser.error(f"argument --digits: expected MIN <= MAX, got {args.digits}")
    return args


def run_command(out: Path, make: Callable[[], bool]) -> None:
    """Run ``make``, which returns whether it made ``out``; on errors, exit with one line."""
    # An exception, so that the temporary folder is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        made = make()
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; pip install scikit-learn scikit-image")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    tqdm.write(f"{out}: {'done' if made else 'already exists with the same arguments'}")


def main() -> None:
    """Run the command line."""
    args = parse_args()
    counts = {"train": args.train, "val": args.val}
    options = (args.size, args.digits, args.seed, args.workers, args.force)
    run_command(args.out, partial(make_demo_data, args.out, counts, *options))


if __name__ == "__main__":
    main()
