"""Damaged images and annotations, which tools/misc/check_dataset.py must find."""

import collections
import contextlib
import io
import json
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from PIL import Image

from fault_campaign.results import Result
from tests.helpers.faults import damage_bytes
from tests.helpers.tool_runs import load_script

SIZE = (30, 40)
# Invalid values by key of an annotation.
WRONG: dict[str, list[Any]] = {
    "bbox": [[1, 1, math.nan, 4], [1, 1, 0, 4], [1, 1, 3, -4], [-9, 1, 3, 3], [90, 90, 3, 3], [1, 1], "1 1 3 4", None],
    "segmentation": [[[1, 1, 2, 2]], [[]], [[1, 1, 2, 2, math.inf, 3]], [[1, 1, 2, 2, 99, 3]], [], "abc", {"size": 3}],
    "category_id": [7, -1, None, "cat", 1.5, [1], {}],
    "image_id": [77, None, "a.png", [1], {}],
    "id": [None, [2], {}],
}
ENTRIES = [None, 5, "a.png", [], {}, {"id": {}}]


def make_dataset(folder: Path) -> dict[str, Any]:
    """Write images and return valid COCO annotations."""
    images, annotations = [], []
    for number in range(1, 4):
        values = np.random.default_rng(number).integers(0, 255, (*SIZE, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": SIZE[0], "width": SIZE[1]})
        polygon = [[2, 2, 20, 2, 20, 20]]
        box = {"image_id": number, "category_id": 1, "bbox": [2, 2, 18, 18], "segmentation": polygon, "area": 162}
        annotations += [{"id": 2 * number + side, "iscrowd": 0, **box} for side in (0, 1)]
    return {"images": images, "categories": [{"id": 1, "name": "cat"}], "annotations": annotations}


def config(folder: Path) -> Config:
    """The config of a detector with this dataset."""
    dataset = {"type": "CocoDataset", "ann_file": "a.json", "data_prefix": {"img": ""}, "data_root": str(folder)}
    dataset["metainfo"] = {"classes": ("cat",)}
    return Config({"default_scope": "mmdet", "train_dataloader": {"dataset": dataset}})


def datasets(count: int, rng: random.Random) -> Result:
    """Damage annotations, their file or an image: the tool must find it, and must not fail in any other way."""
    tool = load_script("tools/misc/check_dataset.py")
    faults, outcomes = [], collections.Counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        content = make_dataset(folder)
        whole = {name: (folder / name).read_bytes() for name in ("1.png", "2.png", "3.png")}
        whole["a.json"] = json.dumps(content).encode()
        (folder / "a.json").write_bytes(whole["a.json"])
        faults += [f"undamaged: {problem}" for problem in tool.check_config(config(folder))["train"]]
        for number in range(count):
            for name, written in whole.items():
                (folder / name).write_bytes(written)
            kind, must_be_found = _damage(folder, content, whole, rng)
            try:
                with contextlib.redirect_stderr(io.StringIO()):
                    problems = tool.check_config(config(folder))["train"]
            except SystemExit as stopped:
                message = str(stopped.code)
                outcomes["one error"] += 1
                if not message.startswith("error: ") or "\n" in message:
                    faults.append(f"{number}: {kind}: {message[:200]}")
                continue
            except Exception as error:
                faults.append(f"{number}: {kind}: {type(error).__name__}: {str(error)[:200]}")
                continue
            outcomes["found" if problems else "harmless"] += 1
            if must_be_found and not problems:
                faults.append(f"{number}: {kind}: not found")
    return Result(f"{count} damaged datasets: {dict(outcomes)}", faults)


def _damage(folder: Path, content: dict, whole: dict[str, bytes], rng: random.Random) -> tuple[str, bool]:
    """Damage something; return what, and whether it must be found (a flipped bit may be harmless)."""
    if rng.random() < 0.5:
        changed = json.loads(json.dumps(content))
        name = rng.choice([*WRONG, *content])
        value = rng.choice(WRONG.get(name, ENTRIES))
        if name in WRONG:
            rng.choice(changed["annotations"])[name] = value
        else:
            changed[name][rng.randrange(len(changed[name]))] = value
        (folder / "a.json").write_text(json.dumps(changed))
        return f"{name} {value}", True
    name = rng.choice(list(whole))
    kind, damaged = damage_bytes(whole[name], rng)
    (folder / name).write_bytes(damaged)
    return f"{name} {kind}", kind == "cut"
