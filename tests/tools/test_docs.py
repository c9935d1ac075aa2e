"""Every piece of Python in the documentation is run, and every command is parsed with its arguments and its config.

The tests of the tools check what the scripts do.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope
from PIL import Image

from tests.helpers.config_cases import build_model, build_optimizer, load_config, random_batch
from tests.helpers.doc_pages import (
    LANGUAGE,
    PAGES,
    WRONG,
    all_commands,
    anchors,
    blocks,
    check_command,
    commands,
    links,
    python_blocks,
    with_bases_found,
)
from tests.helpers.tool_runs import ROOT, Command, read_scalars


@pytest.fixture(autouse=True)
def _checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("command", all_commands())
def test_command_is_valid(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_command(command, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "make no-such-target",
        "make demo TUSK=cls",
        "pip install --no-such-option .",
        "pip install no/such/folder",
        "pip install '.[no-such-extra]'",
        "python -m pytest tests/no_such_folder",
        "python tools/train.py configs/demo/grootv-pico_demo-cls.py --aamp",
        "bash tools/dist_train.sh configs/demo/no-such-config.py 8",
        "GPUS=8 bash tools/slurm_train.sh PARTITION JOB configs/demo/grootv-pico_demo-cls.py DIR --no-such-option",
        "mim train mmdet configs/no_such/config.py",
        "mim train grootvl_mm no-such-config.py",
        "mim search --no-such-option",
        "python tools/no_such_script.py",
        "no-such-program",
    ],
)
def test_wrong_command_is_found(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WRONG):
        check_command(command, tmp_path, monkeypatch)


# tests/language/test_docs.py runs the page on language models, and
# tests/demo/test_inferencers.py that on inference, which needs checkpoints.
@pytest.mark.parametrize("code", python_blocks("code", "docs/inference.md", LANGUAGE))
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page", "exec"), {})


@pytest.mark.parametrize("code", python_blocks("config", LANGUAGE))
def test_config_builds_and_trains_a_step(code: str, tmp_path: Path) -> None:
    if "_base_" not in code:
        code = f"_base_ = 'configs/demo/grootv-pico_demo-cls.py'\n{code}"
    config = tmp_path / "config.py"
    config.write_text(with_bases_found(code))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    cfg = load_config(config)
    # Weights of other backbones would be downloaded for nothing.
    assert "Pretrained" not in str(cfg.model)
    if "num_queries" in cfg.model:
        cfg.model.num_queries = 20  # a small image has no more positions
    model = build_model(cfg).train()
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        losses = model.train_step(random_batch(cfg), build_optimizer(cfg, model))
    assert losses["loss"].isfinite()


def make_instances(root: Path, demo: Path, classes: Sequence[str]) -> None:
    """The demo scenes in the folders of docs/detection.md, with the first digits as its classes."""
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copytree(demo / "images" / split, root / split)
        content = json.loads((demo / "annotations" / f"instances_{split}.json").read_text())
        content["categories"] = [{"id": i, "name": name} for i, name in enumerate(classes, start=1)]
        content["annotations"] = [item for item in content["annotations"] if item["category_id"] <= len(classes)]
        (root / "annotations" / f"{split}.json").write_text(json.dumps(content))


def make_maps(root: Path, demo: Path, classes: Sequence[str]) -> None:
    """The demo scenes in the folders of docs/segmentation.md; some pixels are left out."""
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        (root / "masks" / split).mkdir(parents=True)
        for path in sorted((demo / "images" / split).iterdir()):
            Image.open(path).save(root / "images" / split / f"{path.stem}.jpg")
            labels = Image.open(demo / "semantic" / split / path.name)
            labels.point(lambda label: label if label < len(classes) else 255).save(root / "masks" / split / path.name)


def make_folders(root: Path, demo: Path, classes: Sequence[str]) -> None:
    """The demo digits in the folders of docs/classification.md."""
    for split in ("train", "val"):
        digits = sorted(path for path in (demo / "classification" / split).iterdir() if any(path.iterdir()))
        for name, digit in zip(classes, digits, strict=False):
            shutil.copytree(digit, root / split / name)


PICO = ["model.backbone.arch=pico"]
# Page -> its data, what makes its config small, and the metric to find.
OWN_DATA: dict[str, tuple[Callable, list[str], str]] = {
    "docs/detection.md": (
        make_instances,
        [
            *("model.neck.in_channels=24,48,96,192", "model.train_cfg.rpn_proposal.max_per_img=50"),
            *("model.test_cfg.rpn.max_per_img=50", "model.test_cfg.rcnn.max_per_img=10"),
            *(
                "train_dataloader.dataset.pipeline.2.scale=(128,128)",
                "val_dataloader.dataset.pipeline.1.scale=(128,128)",
            ),
            *("train_dataloader.batch_size=4", "train_cfg.max_epochs=1"),
        ],
        "coco/segm_mAP",
    ),
    "docs/segmentation.md": (
        make_maps,
        [
            *("model.decode_head.in_channels=24,48,96,192", "model.auxiliary_head.in_channels=96"),
            *("model.decode_head.channels=32", "model.data_preprocessor.size=(64,64)"),
            *("train_dataloader.dataset.pipeline.2.scale=(128,64)", "val_dataloader.dataset.pipeline.1.scale=(128,64)"),
            *(
                "train_dataloader.dataset.pipeline.3.crop_size=(64,64)",
                "train_cfg.max_iters=2",
                "train_cfg.val_interval=2",
            ),
        ],
        "mIoU",
    ),
    "docs/classification.md": (
        make_folders,
        [
            *("model.neck.in_channels=192", "model.neck.out_channels=288", "model.head.in_channels=288"),
            *("train_dataloader.dataset.pipeline.1.scale=64", "val_dataloader.dataset.pipeline.1.scale=64"),
            *(
                "val_dataloader.dataset.pipeline.2.crop_size=64",
                "train_dataloader.batch_size=8",
                "train_cfg.max_epochs=1",
            ),
        ],
        "accuracy/top1",
    ),
}
WITHOUT_WORKERS = [
    f"{name}_dataloader.{setting}"
    for name in ("train", "val")
    for setting in ("num_workers=0", "persistent_workers=False")
]


@pytest.mark.slow
@pytest.mark.parametrize("page", OWN_DATA)
def test_own_data(page: str, demo_data: Path, tmp_path: Path) -> None:
    """The config that a page gives for data of one's own, with its command, on tiny data."""
    make_data, small, metric = OWN_DATA[page]
    (code,) = (code for code in blocks(page, "python") if code.startswith("# my_"))
    name = code.splitlines()[0].removeprefix("# ")
    (command,) = (command for command in commands(page) if command.startswith("python tools/train.py my_"))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / name).write_text(code)
    cfg = load_config(tmp_path / name)
    metainfo = cfg.train_dataloader.dataset.get("metainfo")
    classes = metainfo.classes if metainfo else [f"class {i}" for i in range(cfg.num_classes)]
    make_data(tmp_path / "data" / "mine", demo_data, classes)

    arguments = command.split()[2:]
    if "load_from=CHECKPOINT" in arguments:
        classifier = build_model(load_config(ROOT / "configs" / "demo" / "grootv-pico_demo-cls.py"))
        torch.save({"state_dict": classifier.state_dict()}, tmp_path / "CHECKPOINT")
    if "--cfg-options" not in arguments:
        arguments.append("--cfg-options")
    options = ["default_hooks.logger.interval=1", "default_hooks.checkpoint.interval=100", *PICO, *WITHOUT_WORKERS]
    output = Command(tmp_path)("train.py", *arguments, *small, *options, CUDA_VISIBLE_DEVICES="")

    work_dir = tmp_path / "work_dirs" / Path(name).stem
    assert all(line["loss"] > 0 for line in read_scalars(work_dir).values())
    assert f"{metric}: " in output
    assert "load_from=CHECKPOINT" not in arguments or "size mismatch for head.fc.weight" in output


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    for path, anchor in links((ROOT / page).read_text(encoding="utf-8")):
        target = folder / path if path else ROOT / page
        assert target.exists(), f"{page} links {path}, which does not exist"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page} links {path}#{anchor}"


def test_site_shows_every_public_name() -> None:
    """Each package with ``__all__``, or one above or below it, is in docs/api; Sphinx itself runs in ``make docs``."""
    shown = "".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    for path in (ROOT / "grootvl_mm").glob("**/__init__.py"):
        module = ".".join(path.relative_to(ROOT).parent.parts)
        places = (f"{module}\n", f"{module}.", f"{module.rpartition('.')[0]}\n")
        assert "__all__" not in path.read_text() or any(f"automodule:: {place}" in shown for place in places), module
