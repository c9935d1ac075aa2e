"""Every command and every piece of Python in the documentation is run, or is named here with what checks it.

Arguments and configs of all commands are checked in any case. A new command belongs into one of the tables below; the
longest start that fits decides.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from mmengine.registry import DefaultScope
from PIL import Image

from tests.helpers.config_cases import build_model, build_optimizer, load_config, random_batch
from tests.helpers.doc_pages import (
    PAGES,
    all_commands,
    anchors,
    blocks,
    check_command,
    commands,
    links,
    with_bases_found,
)
from tests.helpers.tool_runs import ROOT, Command, Mim, mim_finds_us, mim_name, read_scalars

COMMANDS = all_commands()
SHORT = (
    "train_cfg.max_iters=2 train_cfg.val_interval=10 default_hooks.checkpoint.interval=2 train_dataloader.batch_size=2"
)
# Run here, with what to append, so that a command takes seconds, not minutes. The last model is iter_2.pth then.
SHORTENED = {
    "mim train mmdet configs/demo/": f"--cfg-options {SHORT}",
    "mim train grootvl_mm grootv-pico": f"--cfg-options {SHORT}",
    "mim test mmdet configs/demo/": "",
    "mim search": "",
    "python tools/analysis_tools/get_flops.py": "",
    "python tools/analysis_tools/benchmark": "--quick",
    "python tools/model_converters/publish_model.py": "",
    "python tools/train.py configs/demo/grootv-pico_upernet": f"--cfg-options {SHORT}",
    "python tools/test.py configs/demo/grootv-pico_upernet": "",
    "tools/dist_train.sh configs/demo/": f"--cfg-options {SHORT}",
    "tools/dist_test.sh configs/demo/": "",
}
# Run by other tests (the same scripts with the same options), or what runs the tests.
ELSEWHERE = {
    "make demo": "tests/tools/test_run_demo.py",
    "make test": ".ci/run",
    "make setup": ".ci/run",
    "make format": ".ci/run",
    ".venv/bin/python -m pytest": ".ci/run",
    ".venv/bin/python .dev_scripts/check_zoo.py": "tests/configs/test_metafiles.py",
    ".venv/bin/python .dev_scripts/make_api_docs.py": "tests/tools/test_api_docs.py",
    "pip install --no-build-isolation .": "tests/tools/test_mim.py",
    "python tools/dataset_converters/make_demo_data.py": "tests/tools/test_make_demo_data.py",
    "python tools/train.py configs/demo/mask-rcnn": "tests/tools/test_train_and_test.py",
    "python tools/test.py configs/demo/mask-rcnn": "tests/tools/test_train_and_test.py",
    "python tools/model_converters/grootv_to_mmpretrain.py": "tests/tools/test_model_converters.py",
    "python tools/train.py my_": "tests/tools/test_docs.py",
    "python demo/image_demo.py": "tests/demo/test_image_demo.py",
    "python demo/padding_study.py": "tests/demo/test_padding_study.py",
    "mim run mmpretrain vis_cam": "tests/models/test_other_tools.py",
}
# Not run: they need what no test has.
NEEDS = {
    "python tools/train.py configs/": "COCO, ADE20K or ImageNet",
    "python tools/test.py configs/": "COCO, ADE20K or ImageNet",
    "python tools/visualization/draw_predictions.py configs/": "COCO, ADE20K or ImageNet",
    "bash tools/dist_": "COCO, ADE20K or ImageNet",
    "mim train mm": "COCO, ADE20K or ImageNet",
    "mim test mm": "COCO, ADE20K or ImageNet",
    "mim train grootvl_mm grootv-tiny": "ImageNet",
    'pip install "grad-cam': "a package that only this page needs",
    "GPUS=": "a cluster",
    "NNODES=": "two machines; tests/tools/test_distributed.py runs two nodes on this one",
    "FORCE_CUDA=1 pip install": "a CUDA toolkit; tests/ops/test_cuda_build.py runs the build itself",
}
# Pages whose Python is run by another test, for example because it needs a checkpoint.
PYTHON_ELSEWHERE = {"docs/inference.md": "tests/demo/test_inferencers.py"}


def find_start(command: str) -> str:
    """The key of the tables that decides about a command."""
    starts = [start for start in (*SHORTENED, *ELSEWHERE, *NEEDS) if command.startswith(start)]
    assert starts, f"no test runs {command!r}: let test_docs.py run it, or name the test that does, or what it needs"
    return max(starts, key=len)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_known(page: str) -> None:
    for command in commands(page):
        start = find_start(command)
        if start in ELSEWHERE:
            test = (ROOT / ELSEWHERE[start]).read_text()
            script = re.search(r"\w+\.(py|sh)\b", command)
            assert script is None or script[0] in test, f"{ELSEWHERE[start]} does not run {script[0]}"


def test_no_entry_is_left_over() -> None:
    used = {find_start(command) for command in COMMANDS}
    assert used == {*SHORTENED, *ELSEWHERE, *NEEDS}
    assert set(PYTHON_ELSEWHERE) <= set(PAGES)
    assert all((ROOT / path).is_file() for path in PYTHON_ELSEWHERE.values())


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.startswith(("make", "pip"))])
def test_arguments_and_configs_exist(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    check_command(command, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "python tools/train.py configs/demo/grootv-pico_demo-cls.py --aamp",
        "bash tools/dist_train.sh configs/demo/no-such-config.py 8",
        "GPUS=8 bash tools/slurm_train.sh PARTITION JOB configs/demo/grootv-pico_demo-cls.py DIR --no-such-option",
        "mim train mmdet configs/no_such/config.py",
        "mim train grootvl_mm no-such-config.py",
        "python tools/no_such_script.py",
    ],
)
def test_wrong_arguments_are_found(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((SystemExit, OSError, ValueError)):
        check_command(command, tmp_path, monkeypatch)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make")])
def test_make_targets_exist(command: str) -> None:
    dry_run = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "setup_env.sh" in dry_run.stdout


@pytest.mark.slow
def test_commands_run_one_after_the_other(mim: Mim, demo_data: Path, tmp_path: Path) -> None:
    """In a checkout with demo data, through the environment where grootvl_mm is installed with pip."""
    for name in ("configs", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "demo").symlink_to(demo_data)
    environment = os.environ | {
        "PATH": f"{mim.python.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    for command in COMMANDS:
        if re.match(r"mim \w+ grootvl_mm", command) and not mim_finds_us():
            continue
        if (start := find_start(command)) in SHORTENED:
            line = re.sub(r"iter_\d+", "iter_2", f"{command} {SHORTENED[start]}")
            line = re.sub(r"^(mim \w+) (mm\w+)", lambda found: f"{found[1]} {mim_name(found[2])}", line)
            line = re.sub(r"^mim ", f"{mim.python} -m mim ", line)
            line = re.sub(r"^python ", f"{mim.python} ", line)
            done = subprocess.run(
                line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert list((tmp_path / "shown").rglob("*.png"))


def python_blocks(*starts: str) -> list:
    """The Python of all pages that begins with one of ``starts``; without any, what is no config."""
    found = []
    for page in PAGES:
        for code in blocks(page, "python"):
            is_config = code.startswith(("_base_", "optim_wrapper", "# my_"))
            if code.startswith(starts) if starts else not is_config and page not in ("docs/api.md", *PYTHON_ELSEWHERE):
                found.append(pytest.param(code, id=f"{page}: {code.splitlines()[0]}"))
    return found


@pytest.mark.parametrize("code", python_blocks())
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "page", "exec"), {})


@pytest.mark.parametrize("code", python_blocks("_base_"))
def test_config_builds_and_trains_a_step(code: str, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("code", python_blocks("optim_wrapper"))
def test_layer_wise_decay(code: str, tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    demo = ROOT / "configs" / "demo" / "grootv-pico_demo-cls.py"
    config.write_text(f"_base_ = {str(demo)!r}\n{code}")
    cfg = load_config(config)
    model = build_model(cfg)
    rates = {group["lr"] for group in build_optimizer(cfg, model).optimizer.param_groups}
    assert len(rates) == model.backbone.get_layer_depth("stem")[1]


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


def test_index_names_every_page() -> None:
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert pages - {"README.md"} <= {path for path, _ in links(PAGES["docs/README.md"])}
