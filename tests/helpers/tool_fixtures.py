"""Fixtures of the tests that run the real commands: tiny demo data and configs on them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.sharing import made_once
from tests.helpers.tool_runs import ROOT, Command, Mim

SHIPPED = {
    "det": "mask-rcnn_grootv-pico_fpn_demo.py",
    "seg": "grootv-pico_upernet_demo-seg.py",
    "cls": "grootv-pico_demo-cls.py",
}
# What a user would write to run a shipped config on other data, for a few iterations.
USER_CONFIG = """\
_base_ = {base!r}
data = {data!r}
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(data_root=data))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=data))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=4, val_interval=4)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
log_processor = dict(window_size=1)
"""
DETECTION = """\
val_evaluator = dict(ann_file=data + "annotations/instances_val.json")
test_evaluator = val_evaluator
"""
# Nothing that depends on how a batch is shared among processes: no batch norm.
WITHOUT_BATCH_NORM = """\
model = dict(neck=dict(_delete_=True, type="GlobalAveragePooling"), head=dict(in_channels=192))
"""


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Run scripts in an empty folder."""
    return Command(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def mim(tmp_path_factory: pytest.TempPathFactory) -> Mim:
    """openmim in a separate environment, after ``pip install .``."""
    return made_once(tmp_path_factory, "mim", Mim)


@pytest.fixture(scope="session")
def demo_data(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 training and 4 validation scenes of 64 pixels."""

    def make(folder: Path) -> Path:
        options = ("--train", 16, "--val", 4, "--size", 64)
        command("dataset_converters/make_demo_data.py", "--out", folder / "demo", *options)
        return folder / "demo"

    return made_once(tmp_path_factory, "demo-data", make)


@pytest.fixture(scope="session")
def make_config(demo_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a user's config for a task, derived from the shipped demo config."""
    folder = tmp_path_factory.mktemp("configs")

    def make(task: str, *, batch_norm: bool = True) -> Path:
        data = f"{demo_data}/classification/" if task == "cls" else f"{demo_data}/"
        text = USER_CONFIG.format(base=str(ROOT / "configs" / "demo" / SHIPPED[task]), data=data)
        if task == "det":
            text += DETECTION
        if not batch_norm:
            text += WITHOUT_BATCH_NORM
        path = folder / f"{task}{'' if batch_norm else '-without-bn'}.py"
        path.write_text(text)
        return path

    return make
