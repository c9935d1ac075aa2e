"""Make the demo data: handwritten digits on photographs, with exact instance masks.

Real handwritten digits (scikit-learn's ``load_digits``) are pasted at random places, sizes, angles
and colours, partly over one another, onto photographs that scikit-image ships. Nothing is
downloaded. One set of scenes serves three tasks::

    images/{train,val}/000000.png                    RGB scenes, all of one size or of mixed sizes
    annotations/instances_{train,val}.json           COCO instances, RLE masks of the visible parts
    semantic/{train,val}/000000.png                  uint8 class map: 0 background, 1..10 the digits
    classification/{train,val}/<zero..nine>/*.png    64x64 crops around one digit each
    meta.json                                        what the set was made with, and what it holds

The two splits share neither a handwritten digit nor a pixel of a photograph. Every scene has a
random generator of its own, so the number of workers does not change a byte of the output.
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
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

VERSION = 1  # raise it with every change that alters the output
CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "val")
# Lossless files only: decoders of JPEG differ between libraries, and so would the scenes.
PHOTOS = ("astronaut", "brick", "camera", "chelsea", "coffee", "grass", "gravel", "ihc")
TRAIN_SHARE = 0.7  # of the columns of each photograph; more, and the rest is too narrow for a crop
TRAIN_DIGITS = 1437  # of 1797, shuffled: in their own order the last writers differ from the rest
PHOTO_CROP = (96, 134)  # side of the window taken from a photograph, in its pixels
DIAMETER = (28 / 128, 56 / 128)  # longer side of a digit, as a share of the scene's shorter side
MAX_ANGLE = 15.0  # degrees
STROKE_LEVEL = 110  # grey level (0..255) of the upscaled digit where its ink begins
MIN_CONTRAST = 100.0  # RGB distance that 9 of 10 pixels below a digit keep from its colour
MIN_VISIBLE = 0.9  # of a digit's pixels that later ones must leave uncovered
ATTEMPTS = 50  # to place one digit, or to find a colour for it
MIN_SIDE = 64  # of a scene, in pixels
CROP_SIZE = 64  # classification crops, pixels
CROP_CONTEXT = 1.3  # side of such a crop over the longer side of its digit
MAX_INTRUSION = 0.33  # ink of other digits in such a crop over the digit's own
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
    """Load what the scenes are made of, from the installed packages alone.

    Raises:
        ModuleNotFoundError: scikit-learn or scikit-image is not installed.
        FileNotFoundError: the installed scikit-image does not ship one of the photographs.
    """
    import skimage.data
    from sklearn.datasets import load_digits

    folder = Path(skimage.data.__file__).parent
    # Read as files: the functions of skimage.data may try a download.
    if missing := [name for name in PHOTOS if not (folder / f"{name}.png").is_file()]:
        raise FileNotFoundError(
            f"scikit-image {skimage.__version__} in {folder} does not ship the photographs "
            f"{', '.join(missing)}; install another version (0.26 has them)"
        )
    photos = [np.asarray(Image.open(folder / f"{name}.png").convert("RGB")) for name in PHOTOS]
    parts = [np.split(photo, [round(TRAIN_SHARE * photo.shape[1])], axis=1) for photo in photos]
    pixels, classes = load_digits(return_X_y=True)
    # The same cut for every seed: no digit of one set's training is another's validation.
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
    """Turn an (8, 8) digit 0..16 into the (h, w) coverage 0..1 of a sharp, anti-aliased glyph.

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
    # The first good colour; the best one on a background of everything.
    return colours[np.argmax(good) if good.any() else np.argmax(contrast)]


def crop_photo(rng: np.random.Generator, photo: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Take a window of the proportions of ``size`` (height, width) from a photograph and scale it to that size."""
    ratios = np.array(size) / min(size)
    widest = min(PHOTO_CROP[1], *(int(length / ratio) for length, ratio in zip(photo.shape[:2], ratios, strict=True)))
    side = rng.integers(min(PHOTO_CROP[0], widest), widest, endpoint=True)
    height, width = (int(side * ratio) for ratio in ratios)
    y = rng.integers(photo.shape[0] - height, endpoint=True)
    x = rng.integers(photo.shape[1] - width, endpoint=True)
    quarters = rng.integers(4)
    # A quarter turn of anything but a square would change its proportions.
    patch = np.rot90(photo[y : y + height, x : x + width], quarters if height == width else 2 * (quarters % 2))
    return np.asarray(Image.fromarray(patch).resize(size[::-1], Image.Resampling.BICUBIC))


def compose_scene(rng: np.random.Generator, source: Source, size: tuple[int, int], digits: Sequence[int]) -> Scene:
    """Compose one scene of ``size``, height and width in pixels.

    Between ``digits[0]`` and ``digits[1]`` digits, both included, are placed, fewer where no
    more fit without hiding too much of the earlier ones.
    """
    photo = source.photos[rng.integers(len(source.photos))]
    # The tint gives the grey photographs a colour and the others a different light.
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
    """Describe the visible part of each digit; ``id`` and ``image_id`` are left to the caller."""
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
    """Yield (index, square crop) of each digit that has its surroundings mostly to itself."""
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
    """Write the files of one scene below ``root``; return COCO's entry for it, its annotations and number of crops."""
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
    """Let this worker process end when its parent does, and not before."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    # Ctrl-C reaches the whole process group; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The parent's handler raises an exception, which the pool would take for the scene's, and wait for this worker.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    # After kill -9 of the parent the workers would wait for work for ever.
    threading.Thread(target=wait, daemon=True).start()


def start_workers(count: int) -> ProcessPoolExecutor:
    """Start worker processes that know from their first moment on what a signal means to them."""
    # Until follow_parent has run, a worker would answer with the parent's handler, anywhere in the pool's own code.
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
    """Write one split below ``root``; return its numbers of instances and of crops."""
    crop_folders = [root / "classification" / split / name for name in CLASSES]
    for folder in [root / "images" / split, root / "semantic" / split, *crop_folders]:
        folder.mkdir(parents=True)
    scenes = pool.map(partial(write_scene, root=root, split=split, **options), range(count))
    images, annotations, crops = [], [], 0
    for image, found, cropped in tqdm(scenes, split, count, unit="scene"):
        images.append(image)
        for annotation in found:
            # Ids start at 1: pycocotools takes a match with id 0 for none.
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **annotation})
        crops += cropped
    categories = [{"id": k, "name": name} for k, name in enumerate(CLASSES, start=1)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    path = root / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(coco))
    return len(annotations), crops


def is_made(out: Path, meta: dict[str, Any], force: bool, kind: str = "demo data") -> bool:
    """Tell whether ``out`` holds the set of a kind that ``meta`` describes already.

    Raises:
        FileExistsError: something else is there, and ``force`` is not set or too dangerous.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not out.is_dir() or Path.cwd().is_relative_to(out):
        raise FileExistsError(f"{out} is a file, or holds the current folder; give another --out")
    if force:
        return False
    try:
        found = json.loads((out / "meta.json").read_text())
        changed = [f"{k} {found[k]} (asked: {v})" for k, v in meta.items() if found[k] != v]
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(
            f"{out} holds something else than {kind}; give another --out, or --force to replace the whole folder"
        ) from None
    if changed:
        raise FileExistsError(
            f"{out} holds {kind} made with {', '.join(changed)}; give another --out, or --force to replace it"
        )
    return True


def make_demo_data(
    out: Path,
    counts: dict[str, int],
    size: int | Sequence[Sequence[int]] = 128,
    digits: Sequence[int] = (2, 5),
    seed: int = 0,
    workers: int = 1,
    force: bool = False,
) -> bool:
    """Make the demo data in the folder ``out``, whole or not at all.

    ``counts`` has the number of scenes of each split, ``size`` is their side in pixels or a list of
    heights and widths, one of which each scene gets at random, ``digits`` the least and greatest
    number of digits in one. ``force`` replaces whatever ``out`` holds.

    Returns:
        False if ``out`` already holds this very set, which is then left as it is.

    Raises:
        FileExistsError: ``out`` holds something else, and ``force`` is not set.
        FileNotFoundError: the installed scikit-image lacks a photograph.
        ModuleNotFoundError: scikit-learn or scikit-image is not installed.
    """
    out = out.resolve()
    size = size if isinstance(size, int) else [list(pair) for pair in size]
    options = {"seed": seed, "size": size, "digits": list(digits)}
    meta = {"version": VERSION, **options, "counts": counts}
    if is_made(out, meta, force):
        return False
    load_sources()  # fails early; forked workers inherit what it has loaded
    out.parent.mkdir(parents=True, exist_ok=True)
    # A sibling, because a rename works within one file system only.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        new = Path(temporary, "new")
        pool = start_workers(workers)
        try:
            made = {n: write_split(new, n, counts[n], options, pool) for n in SPLITS}
        finally:
            pool.shutdown(cancel_futures=True)
        for i, key in enumerate(("instances", "crops")):
            meta[key] = {n: made[n][i] for n in SPLITS}
        (new / "meta.json").write_text(json.dumps({**meta, "classes": CLASSES}, indent=2) + "\n")
        if out.exists():
            out.rename(Path(temporary, "old"))
        new.rename(out)
    return True


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: integers from ``least``."""

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
    add("--out", type=Path, default=Path("data/demo"), help="folder to make")
    add("--train", type=number, default=1500, metavar="N", help="training scenes")
    add("--val", type=number, default=200, metavar="N", help="validation scenes")
    sides = parser.add_mutually_exclusive_group()
    sides.add_argument("--size", type=at_least(MIN_SIDE), default=128, metavar="N", help="side of a scene in pixels")
    sides.add_argument("--sizes", dest="size", type=height_and_width, nargs="+", metavar="HxW",
        default=argparse.SUPPRESS, help="sizes, of which each scene gets one at random, e.g. 96x128")  # fmt: skip
    add("--digits", type=number, nargs=2, default=[2, 5], metavar=("MIN", "MAX"),
        help="number of digits in a scene; fewer where no more fit")  # fmt: skip
    add("--seed", type=at_least(0), default=0, metavar="N", help="seed of everything random")
    add("--workers", type=number, default=os.cpu_count(), metavar="N",
        help="processes; changes nothing in the output")  # fmt: skip
    add("--force", action="store_true", help="replace whatever --out holds")
    args = parser.parse_args()
    if args.digits[0] > args.digits[1]:
        parser.error(f"argument --digits: expected MIN <= MAX, got {args.digits}")
    return args


def main() -> None:
    """Run the command line."""
    args = parse_args()
    # Turns kill's polite signal into an exception, so that the temporary folder goes too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    counts = {"train": args.train, "val": args.val}
    try:
        made = make_demo_data(args.out, counts, args.size, args.digits, args.seed, args.workers, args.force)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}; pip install scikit-learn scikit-image")
    except OSError as error:
        sys.exit(f"error: {error}")
    tqdm.write(f"{args.out}: {'made' if made else 'already made with the same arguments'}")


if __name__ == "__main__":
    main()
