"""Check the datasets of a config before training; lists all problems and exits with status 1 if there are any.

Detection (COCO annotations): boxes that are not finite, empty, or outside their image; polygons with fewer than three
points; masks of the wrong size; unknown images and categories. Segmentation: class maps with unknown classes or of
another size than their image. Classification: unknown classes. All tasks: images that are missing or unreadable.
"""

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from tqdm import tqdm

from grootvl_mm.apis import cli

SPLITS = ("train", "val", "test")
SHOWN = 10  # problems listed per kind
TOLERANCE = 1.0  # pixels by which rounded boxes and points may be outside the image
IGNORED = 255  # ignore index of class maps


class Problem(NamedTuple):
    """A problem in a dataset."""

    kind: str
    where: str


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_config_arguments(parser)
    parser.add_argument(
        "--splits", nargs="+", choices=SPLITS, default=SPLITS, help="dataloaders to check (default: all in the config)"
    )
    parser.add_argument(
        "--no-images",
        action="store_true",
        help="check annotations only; reading the images takes most of the time (default: check both)",
    )
    return parser.parse_args()


def find_datasets(dataset: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The datasets inside wrappers such as RepeatDataset, MultiImageMixDataset and ConcatDataset."""
    if "datasets" in dataset:
        for part in dataset["datasets"]:
            yield from find_datasets(part)
    elif "dataset" in dataset:
        yield from find_datasets(dataset["dataset"])
    else:
        yield dataset


def check_coco(content: Any, classes: Sequence[str]) -> Iterator[Problem]:
    """Problems in the content of a COCO annotation file.

    Args:
        content: Content of the file.
        classes: Class names in the config; empty if it uses those of the dataset class.
    """
    parts = ("images", "annotations", "categories")
    missing = [name for name in parts if not isinstance(content, dict) or not isinstance(content.get(name), list)]
    if missing:
        yield Problem("not COCO annotations", f"no list {', '.join(missing)}")
        return
    odd = [f"{part}[{index}]" for part in parts for index, entry in enumerate(content[part]) if not _is_entry(entry)]
    if odd:
        yield from (Problem("malformed entry in COCO annotations", where) for where in odd)
        return
    images = {image.get("id"): image for image in content["images"]}
    categories = {category.get("id"): category.get("name") for category in content["categories"]}
    for name in sorted(set(classes) - set(categories.values())):
        yield Problem("class of the config missing in the annotations", repr(name))
    for part in parts:
        for number, times in Counter(entry.get("id") for entry in content[part]).items():
            if times > 1 or number is None:
                yield Problem(f"{part} without a unique id", f"id {number}, {times} times")
    for image in content["images"]:
        if not _is_size(image.get("width")) or not _is_size(image.get("height")):
            yield Problem("image without size", f"{image.get('file_name')}")
    for annotation in content["annotations"]:
        where = f"annotation {annotation.get('id')}"
        image = images.get(annotation.get("image_id"))
        if image is None:
            yield Problem("unknown image", f"{where}: image_id {annotation.get('image_id')}")
            continue
        where += f" of {image.get('file_name')}"
        if annotation.get("category_id") not in categories:
            yield Problem("unknown category", f"{where}: category_id {annotation.get('category_id')}")
        area, is_crowd = annotation.get("area"), annotation.get("iscrowd", 0)
        if not _are_numbers([area]) or not _is_finite(area) or area <= 0:
            yield Problem("area that is not a positive number", f"{where}: {area!r}"[:200])
        if is_crowd not in (0, 1):
            yield Problem("iscrowd that is neither 0 nor 1", f"{where}: {is_crowd!r}"[:200])
        if not _is_size(image.get("width")) or not _is_size(image.get("height")):
            continue
        size = (image["width"], image["height"])
        yield from (Problem(kind, f"{where}: {detail}") for kind, detail in check_box(annotation.get("bbox"), size))
        outline = annotation.get("segmentation")
        if outline is not None:
            yield from (Problem(kind, f"{where}: {detail}") for kind, detail in check_outline(outline, size))


def check_box(box: Any, size: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """Problems of a box (x, y, width, height) in an image of ``size`` (width, height)."""
    if not _are_numbers(box) or len(box) != 4:
        yield "box that is not four numbers", f"{box}"
    elif not all(map(_is_finite, box)):
        yield "box that is not finite", f"{box}"
    elif box[2] <= 0 or box[3] <= 0:
        yield "box without area", f"{box}"
    elif _outside(box[:2], size) or _outside((box[0] + box[2], box[1] + box[3]), size):
        yield "box outside its image", f"{box} in {size[0]}x{size[1]}"


def check_outline(outline: Any, size: tuple[int, int]) -> Iterator[tuple[str, str]]:
    """Problems of a mask in COCO's formats: polygons or run-length encoding."""
    if isinstance(outline, dict):
        if outline.get("size") != [size[1], size[0]]:
            yield "mask of another size than its image", f"{outline.get('size')} in {size[0]}x{size[1]}"
        counts = outline.get("counts")
        if isinstance(counts, list) and (not _are_numbers(counts) or sum(counts) != size[0] * size[1]):
            yield "mask whose run lengths do not add up to its size", f"{len(counts)} counts"
        elif not isinstance(counts, (list, str)):
            yield "mask in an unknown format", type(counts).__name__
        return
    if not isinstance(outline, list) or not outline:
        yield "mask in an unknown format", f"{outline}"[:80]
        return
    for polygon in outline:
        if not _are_numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
            yield "polygon with fewer than three points", f"{polygon}"[:80]
        elif not all(map(_is_finite, polygon)):
            yield "polygon that is not finite", f"{polygon}"[:80]
        elif any(_outside(point, size) for point in zip(polygon[::2], polygon[1::2], strict=True)):
            yield "polygon outside its image", f"in {size[0]}x{size[1]}"


def check_image(path: Path, size: tuple[int, int] | None = None) -> Iterator[Problem]:
    """Problems of an image file, which should have ``size`` (width, height)."""
    try:
        with Image.open(path) as image:
            image.load()
    except FileNotFoundError:
        yield Problem("missing image", str(path))
    except Exception as error:  # decoders raise errors of many types
        yield Problem("unreadable image", f"{path}: {cli.one_line(error)}")
    else:
        if size is not None and None not in size and image.size != size:
            yield Problem("image of another size than annotated", f"{path}: {image.size}, annotated as {size}")


def check_map(path: Path, image_path: Path, num_classes: int, reduce_zero_label: bool) -> Iterator[Problem]:
    """Problems of the class map of an image."""
    faults = list(check_image(path))
    yield from faults
    if faults:
        return
    with Image.open(path) as image:
        values, size = np.unique(np.asarray(image)), image.size
    labels = values.astype(int) - reduce_zero_label
    unknown = [int(value) for value, label in zip(values, labels, strict=True) if label >= num_classes]
    unknown = [value for value in unknown if value != IGNORED]
    if unknown:
        yield Problem("unknown class in a map", f"{path}: {unknown[:5]} of {num_classes} classes")
    if image_path.is_file():
        with Image.open(image_path) as image:
            if image.size != size:
                yield Problem("map of another size than its image", f"{path}: {size}, {image_path.name}: {image.size}")


def check_detection(dataset: Mapping[str, Any], read_images: bool) -> Iterator[Problem]:
    """Problems of a detection dataset with COCO annotations."""
    root = Path(dataset.get("data_root") or "")
    path = root / dataset.get("ann_file", "")
    if path.suffix != ".json":
        cli.fail(f"can only check COCO annotations (.json), got {dataset.get('type')} with ann_file {str(path)!r}")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        yield Problem("unreadable annotations", f"{path}: {error}")
        return
    yield from check_coco(content, (dataset.get("metainfo") or {}).get("classes", ()))
    images = content.get("images") if isinstance(content, dict) else None
    if read_images and isinstance(images, list):
        folder = root / (dataset.get("data_prefix") or {}).get("img", "")
        for image in tqdm(filter(_is_entry, images), "images", len(images), leave=False):
            yield from check_image(folder / str(image.get("file_name")), (image.get("width"), image.get("height")))


def check_listed(dataset: Mapping[str, Any], read_images: bool) -> Iterator[Problem]:
    """Problems of a classification or segmentation dataset, using the file list of its dataset class."""
    try:
        built = DATASETS.build({**dataset, "pipeline": [], "serialize_data": False})
        entries = [built.get_data_info(index) for index in range(len(built))]
    except Exception as error:  # the hosts' classes raise errors of many types
        yield Problem("unreadable dataset", cli.one_line(error))
        return
    if not entries:
        yield Problem("empty dataset", str(dataset.get("data_root")))
    num_classes = len(built.metainfo.get("classes") or ())
    for entry in tqdm(entries, "images", leave=False):
        path = Path(entry["img_path"])
        if read_images:
            yield from check_image(path)
        if "seg_map_path" in entry:
            yield from check_map(Path(entry["seg_map_path"]), path, num_classes, bool(entry.get("reduce_zero_label")))
        labels = np.atleast_1d(entry.get("gt_label", 0))
        if num_classes and not all(0 <= label < num_classes for label in labels):
            yield Problem("unknown class", f"{path}: {labels.tolist()} of {num_classes} classes")


def _is_entry(value: Any) -> bool:
    """Whether the ids and names of an annotation entry have valid types."""
    keys = ("id", "image_id", "category_id", "name", "file_name")
    return isinstance(value, dict) and all(isinstance(value.get(key, 0), (int, float, str, NoneType)) for key in keys)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) in (int, float) for value in values)


def _is_finite(value: float) -> bool:
    return abs(value) <= sys.float_info.max  # math.isfinite raises an error for larger integers


def _outside(point: Sequence[float], size: tuple[int, int]) -> bool:
    return not all(-TOLERANCE <= value <= limit + TOLERANCE for value, limit in zip(point, size, strict=True))


def check_config(cfg: Config, splits: Sequence[str] = SPLITS, read_images: bool = True) -> dict[str, list[Problem]]:
    """Check the datasets of a config.

    Args:
        cfg: A detection, segmentation or classification config.
        splits: The splits to check, of those that the config has.
        read_images: Also read the images.

    Returns:
        The problems of each split.
    """
    check = check_detection if cfg.default_scope == "mmdet" else check_listed
    found, checked = {}, []
    for split in splits:
        loader = cfg.get(f"{split}_dataloader")
        if loader is None or loader["dataset"] in checked:  # val and test are often the same
            continue
        checked.append(loader["dataset"])
        found[split] = [problem for part in find_datasets(loader["dataset"]) for problem in check(part, read_images)]
    return found


def main() -> None:
    """Run the command."""
    args = parse_args()
    logger = MMLogger.get_instance("check_dataset")
    cfg = cli.load_config(args.config, args.cfg_options)
    init_default_scope(cfg.default_scope)
    found = check_config(cfg, args.splits, not args.no_images)
    for split, problems in found.items():
        kinds = defaultdict(list)
        for problem in problems:
            kinds[problem.kind].append(problem.where)
        for kind, places in kinds.items():
            more = f"\n  and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
            logger.warning("%s: %d x %s\n  %s%s", split, len(places), kind, "\n  ".join(places[:SHOWN]), more)
    total = sum(map(len, found.values()))
    if total:
        cli.fail(f"{total} problems in {', '.join(split for split, problems in found.items() if problems)}")
    logger.info("No problems in: %s", ", ".join(found) or "(no datasets)")


if __name__ == "__main__":
    main()
