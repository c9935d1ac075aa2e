"""Check the consistency of configs, metafiles, model-index.yml, the tables in READMEs, and the built models.

- model-index.yml imports every configs/FOLDER/metafile.yml, which has one entry for each config of its folder, with the
  config's name and path.
- Each entry agrees with its config: epochs or iterations, batch size (devices as in the name, "8xb128"; otherwise 8, or
  1 in demos), training data, input size, tasks.
- Parameters are those of the built model. FLOPs are those of tools/analysis_tools/get_flops.py for one image of the
  entry's input size (height x width), rounded to four significant digits.
- Results are the paper's, and are marked as such, until we have our own weights.
- Each folder's README has the table of its metafile between "<!-- models: begin -->" and "<!-- models: end -->", and
  all configs that it names exist.

Prints the differences and exits with status 1 if there are any.
"""

import argparse
import functools
import importlib.util
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from mmengine.config import Config
from mmengine.logging import MMLogger

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->\n"
RESULTS_SOURCE = "paper (arXiv 2406.02395)"
REQUIRED = ("Parameters", "FLOPs", "Input Size", "Batch Size", "Training Data")
# Data root of a config -> name of the data, and the fixed size, if any, for which its benchmark reports FLOPs.
DATA = {
    "data/imagenet": ("ImageNet-1k", None),
    "data/imagenet21k": ("ImageNet-21k", None),
    "data/coco": ("COCO", "800x1280"),
    "data/ade": ("ADE20K", "512x2048"),
    "data/demo": ("Demo digits", None),
    "data/curves": ("Demo curves", None),
}
# Model -> metrics by task.
RESULTS = {
    "ImageClassifier": {"Image Classification": {"Top 1 Accuracy"}},
    "RetinaNet": {"Object Detection": {"box AP"}},
    "MaskRCNN": {"Object Detection": {"box AP"}, "Instance Segmentation": {"mask AP"}},
    "CascadeRCNN": {"Object Detection": {"box AP"}, "Instance Segmentation": {"mask AP"}},
    "EncoderDecoder": {"Semantic Segmentation": {"mIoU", "mIoU(ms+flip)"}},
}
COLUMNS = {"Top 1 Accuracy": "top-1", "mIoU(ms+flip)": "mIoU, multi-scale and flip"}


def find_problems(root: Path = ROOT) -> list[str]:
    """All violations of the rules in the module's docstring, one line each.

    Args:
        root: Folder with ``configs`` and ``model-index.yml``.
    """
    problems = list(_index_problems(root))
    for metafile in _metafiles(root):
        entries = _entries(metafile)
        problems += _pairing_problems(root, metafile, entries)
        for entry in entries:
            if (root / entry["Config"]).is_file():
                where = f"{metafile.relative_to(root)}, {entry['Name']}"
                problems += [f"{where}: {problem}" for problem in _entry_problems(root, entry)]
        problems += _readme_problems(root, metafile, entries)
    return problems


def fix(root: Path = ROOT) -> None:
    """Update the numbers in the metafiles, except for results, and the tables in the READMEs."""
    for metafile in _metafiles(root):
        text = metafile.read_text(encoding="utf-8")
        for entry in _entries(metafile):
            if (root / entry["Config"]).is_file() and not _missing(entry):
                for key, value in _expected(root, entry).items():
                    if isinstance(value, int):
                        text = _set_number(text, entry["Name"], key, value)
        metafile.write_text(text, encoding="utf-8")
        readme = metafile.with_name("README.md")
        parts = _split_readme(readme.read_text(encoding="utf-8")) if readme.is_file() else None
        entries = _entries(metafile)
        if parts and not any(map(_missing, entries)):
            readme.write_text(parts[0] + models_table(entries) + parts[2], encoding="utf-8")


def models_table(entries: list[dict[str, Any]]) -> str:
    """The Markdown table of a folder's models."""
    metrics = list(dict.fromkeys(metric for entry in entries for metric in _results(entry)))
    header = ["config", "length", "input", "parameters", "FLOPs"]
    rows = [header + [f"{COLUMNS.get(metric, metric)} (paper)" for metric in metrics], ["---"] * (5 + len(metrics))]
    for entry in entries:
        metadata, results = entry["Metadata"], _results(entry)
        length = f"{metadata['Epochs']} epochs" if "Epochs" in metadata else f"{metadata['Iterations']:,} iterations"
        rows.append(
            [
                f"[{entry['Name']}]({Path(entry['Config']).name})",
                length,
                metadata["Input Size"],
                f"{metadata['Parameters'] / 1e6:.2f} M",
                f"{metadata['FLOPs'] / 1e9:.4g} G",
                *(str(results.get(metric, "-")) for metric in metrics),
            ]
        )
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _metafiles(root: Path) -> list[Path]:
    return sorted((root / "configs").rglob("metafile.yml"))


def _entries(metafile: Path) -> list[dict[str, Any]]:
    return yaml.safe_load(metafile.read_text(encoding="utf-8"))["Models"]


def _results(entry: dict[str, Any]) -> dict[str, float]:
    return {metric: value for result in entry.get("Results", []) for metric, value in result["Metrics"].items()}


def _index_problems(root: Path) -> Iterator[str]:
    imported = yaml.safe_load((root / "model-index.yml").read_text(encoding="utf-8"))["Import"]
    found = [path.relative_to(root).as_posix() for path in _metafiles(root)]
    yield from (f"model-index.yml does not import {path}" for path in sorted(set(found) - set(imported)))
    yield from (f"model-index.yml imports {path}, which does not exist" for path in sorted(set(imported) - set(found)))
    for folder in sorted({path.parent for path in (root / "configs").glob("[!_]*/*.py")}):
        # mim has no metadata for language models.
        if folder.name != "language" and not (folder / "metafile.yml").is_file():
            yield f"{folder.relative_to(root)} has no metafile.yml"


def _pairing_problems(root: Path, metafile: Path, entries: list[dict[str, Any]]) -> Iterator[str]:
    where = metafile.relative_to(root)
    shipped = {path.relative_to(root).as_posix() for path in metafile.parent.glob("*.py")}
    listed = Counter(entry["Config"] for entry in entries)
    yield from (f"{where} has no entry for {config}" for config in sorted(shipped - set(listed)))
    yield from (f"{where} has an entry for {config}, which does not exist" for config in sorted(set(listed) - shipped))
    yield from (f"{where} has {times} entries for {config}" for config, times in listed.items() if times > 1)
    for entry in entries:
        if Path(entry["Config"]).stem != entry["Name"]:
            yield f"{where}: {entry['Name']} must have the name of its config {entry['Config']}"


def _entry_problems(root: Path, entry: dict[str, Any]) -> Iterator[str]:
    if _missing(entry):
        yield f"lacks {', '.join(_missing(entry))}"
        return
    expected = _expected(root, entry)
    for key, value in expected.items():
        found = entry["Metadata"].get(key)
        if found != value or type(found) is not type(value):
            yield f"{key} must be {value!r}, got {found!r}"
    if "Results" in entry:
        tasks = {result["Task"]: set(result["Metrics"]) for result in entry["Results"]}
        model = _load_config(root / entry["Config"]).model.type
        if tasks != RESULTS[model]:
            yield f"Results must be {RESULTS[model]} for {model}, got {tasks}"
        if any(result["Dataset"] != expected["Training Data"] for result in entry["Results"]):
            yield f"Results must be those on {expected['Training Data']}"


def _missing(entry: dict[str, Any]) -> list[str]:
    missing = [key for key in REQUIRED if key not in entry["Metadata"]]
    return missing if {"Epochs", "Iterations"} & entry["Metadata"].keys() else [*missing, "Epochs or Iterations"]


def _expected(root: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """The metadata that follow from the config and its model."""
    cfg = _load_config(root / entry["Config"])
    folder = cfg.train_dataloader.dataset.data_root.rstrip("/") + "/"
    data, size = next((value for start, value in DATA.items() if folder.startswith(f"{start}/")), (None, None))
    if cfg.default_scope == "mmpretrain":
        # The size to which training images are resized.
        (scale,) = [step.scale for step in cfg.train_dataloader.dataset.pipeline if "scale" in step]
        size = f"{scale}x{scale}"
    size = size or entry["Metadata"]["Input Size"]
    total = _count(root / entry["Config"], size)
    by_epoch = "max_epochs" in cfg.train_cfg
    stated = re.search(r"_(\d+)xb\d+", entry["Name"])
    devices = int(stated[1]) if stated else 1 if "demo" in entry["Name"] else 8
    return {
        "Parameters": total["parameters"],
        "FLOPs": int(float(f"{total['flops']:.4g}")),
        "Input Size": size,
        "Epochs": cfg.train_cfg.max_epochs if by_epoch else None,
        "Iterations": None if by_epoch else cfg.train_cfg.max_iters,
        "Batch Size": devices * cfg.train_dataloader.batch_size,
        "Training Data": data,
        "Results Source": RESULTS_SOURCE if "Results" in entry else None,
    }


@functools.cache
def _load_config(path: Path) -> Config:
    return Config.fromfile(path)


@functools.cache
def _count(path: Path, size: str) -> dict[str, int]:
    """Parameters and FLOPs of the built model."""
    return _get_flops().count(_load_config(path), tuple(map(int, size.split("x"))))["total"]


@functools.cache
def _get_flops() -> ModuleType:
    spec = importlib.util.spec_from_file_location("get_flops", ROOT / "tools" / "analysis_tools" / "get_flops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _readme_problems(root: Path, metafile: Path, entries: list[dict[str, Any]]) -> Iterator[str]:
    readme = metafile.with_name("README.md")
    where = readme.relative_to(root)
    if not readme.is_file():
        yield f"{where} does not exist"
        return
    text = readme.read_text(encoding="utf-8")
    parts = _split_readme(text)
    if parts is None:
        yield f"{where} lacks the lines {BEGIN.strip()} and {END.strip()}"
    elif any(map(_missing, entries)):
        yield f"{where}: no table without complete entries"
    elif parts[1] != models_table(entries):
        yield f"{where} has an outdated table; --fix updates it"
    for config in sorted(set(re.findall(r"configs/[\w./-]+\.py", text))):
        if not (root / config).is_file():
            yield f"{where} names {config}, which does not exist"


def _split_readme(text: str) -> tuple[str, str, str] | None:
    """The text before the table, the table, and the text after it."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        return None
    before, rest = text.split(BEGIN)
    table, after = rest.split(END)
    return before + BEGIN, table, END + after


def _set_number(text: str, name: str, key: str, value: int) -> str:
    entry = re.compile(rf"(^  - Name: {re.escape(name)}\n(?:(?!  - Name:).*\n)*?      {key}: )\d+$", re.MULTILINE)
    return entry.sub(rf"\g<1>{value}", text)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--fix",
        action="store_true",
        help="first update the READMEs' tables and the metafiles' numbers, except for results (default: only check)",
    )
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    args = parse_args()
    warnings.simplefilter("ignore")  # deprecations inside the hosts
    MMLogger.get_instance("check_zoo", log_level="ERROR")
    if args.fix:
        fix()
    problems = find_problems()
    if problems:
        raise SystemExit("\n".join(problems))


if __name__ == "__main__":
    main()
