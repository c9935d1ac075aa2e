"""dist_train.sh and dist_test.sh on the CPU, and the command lines of the slurm scripts."""

import re
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from grootvl_mm.apis.checkpoint_files import read_checkpoint
from tests.helpers.tool_runs import ROOT, Command, read_metrics, read_scalars


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
SHARDED_CONFIG = """\
_base_ = [{config!r}, {runtime!r}]
"""


class Runs(NamedTuple):
    """The same training by one process and, with half of the batch for each, by two."""

    config: Path
    halved: tuple[str, ...]
    one: Path
    two: Path


@pytest.fixture(scope="module")
def runs(command: Command, make_config, tmp_path_factory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    config = make_config("cls", batch_norm=False)
    halved = ("--exact-resume", "--cfg-options", "train_dataloader.batch_size=1")
    runs = Runs(config, halved, folder / "one", folder / "two")
    command.forked("train.py", config, "--work-dir", runs.one, "--exact-resume", **ON_CPU)
    command("dist_train.sh", config, 2, "--work-dir", runs.two, *halved, PORT=free_port(), **ON_CPU)
    return runs


def test_two_processes_compute_what_one_does(runs: Runs):
    expected, got = read_scalars(runs.one), read_scalars(runs.two)
    assert sorted(got) == sorted(expected) == [1, 2, 3, 4]
    for iteration, line in expected.items():
        assert got[iteration]["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert got[iteration]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_go_on_from_a_checkpoint(runs: Runs, command: Command, tmp_path: Path):
    arguments = ("--work-dir", tmp_path, "--resume", runs.two / "iter_2.pth", *runs.halved)
    command("dist_train.sh", runs.config, 2, *arguments, PORT=free_port(), **ON_CPU)
    assert sorted(read_scalars(tmp_path)) == [3, 4]
    got, expected = (read_checkpoint(folder / "iter_4.pth") for folder in (tmp_path, runs.two))
    for part in ("state_dict", "optimizer"):
        torch.testing.assert_close(got[part], expected[part], rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(runs: Runs, command: Command, tmp_path: Path):
    checkpoint = runs.one / "iter_4.pth"
    command.forked("test.py", runs.config, checkpoint, "--work-dir", tmp_path / "one", **ON_CPU)
    arguments = (runs.config, checkpoint, 2, "--work-dir", tmp_path / "two")
    command("dist_test.sh", *arguments, PORT=free_port(), **ON_CPU)
    metrics = [read_metrics(tmp_path / name)["accuracy/top5"] for name in ("one", "two")]
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_two_nodes_of_one_process_are_one_node_of_two(runs: Runs, command: Command, tmp_path: Path):
    arguments = ("dist_train.sh", runs.config, 1, "--work-dir", tmp_path, *runs.halved)
    env = {"NNODES": "2", "MASTER_ADDR": "127.0.0.2", "PORT": free_port(), "GLOO_SOCKET_IFNAME": "lo", **ON_CPU}
    nodes = [command.popen(*arguments, NODE_RANK=rank, **env) for rank in "01"]
    for node in nodes:
        output = node.communicate(timeout=300)[0]
        assert node.returncode == 0, output[-4000:]
    got, expected = (read_checkpoint(folder / "iter_4.pth") for folder in (tmp_path, runs.two))
    torch.testing.assert_close(got["state_dict"], expected["state_dict"], rtol=0, atol=0)


@pytest.mark.slow
def test_sharded_training_goes_on_from_one_that_is_not(runs: Runs, command: Command, tmp_path: Path):
    config = tmp_path / "sharded.py"
    runtime = ROOT / "configs" / "_base_" / "sharded_runtime.py"
    config.write_text(SHARDED_CONFIG.format(config=str(runs.config), runtime=str(runtime)))
    arguments = ("--work-dir", tmp_path, "--resume", runs.two / "iter_2.pth", *runs.halved)
    arguments += ("model.backbone.with_cp=True",)  # changes nothing but the memory
    output = command("dist_train.sh", config, 2, *arguments, PORT=free_port(), **ON_CPU)
    assert re.search(r"Sharded the model in 5 units: this rank holds [\d,]+ of [\d,]+ parameters", output)
    scalars, expected_scalars = read_scalars(tmp_path), read_scalars(runs.two)
    assert sorted(scalars) == [3, 4]
    for iteration, line in scalars.items():
        assert line["loss"] == pytest.approx(expected_scalars[iteration]["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(expected_scalars[iteration]["grad_norm"], rel=1e-4)
    got, expected = (read_checkpoint(folder / "iter_4.pth") for folder in (tmp_path, runs.two))
    for part in ("state_dict", "optimizer"):
        torch.testing.assert_close(got[part], expected[part], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_frozen_stages_and_sync_bn_with_two_processes(command: Command, make_config, tmp_path: Path):
    heads = ("decode_head", "auxiliary_head")
    output = command(
        "dist_train.sh",
        *(make_config("seg"), 2, "--work-dir", tmp_path),
        *(
            "--cfg-options",
            "model.backbone.frozen_stages=2",
            "train_cfg.max_iters=2",
            "default_hooks.checkpoint.interval=1",
        ),
        *(f"model.{head}.norm_cfg.type=SyncBN" for head in heads),
        *("val_cfg=None", "val_dataloader=None", "val_evaluator=None"),
        PORT=free_port(),
        **ON_CPU,
    )
    assert "Replaced 2 x SyncBN in the config by BN" in output
    first, second = (read_checkpoint(tmp_path / f"iter_{i}.pth")["state_dict"] for i in (1, 2))
    frozen = ("backbone.stem.", "backbone.stages.0.", "backbone.stages.1.")
    for name, value in first.items():
        if not name.startswith("data_preprocessor."):
            assert torch.equal(value, second[name]) == name.startswith(frozen), name


@pytest.fixture
def echoing_srun(tmp_path: Path) -> dict[str, str]:
    """An environment whose srun writes its arguments, one in a line."""
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    srun.chmod(0o755)
    return {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "PYTHON": sys.executable,
        "GPUS": "4",
        "GPUS_PER_NODE": "2",
        "SRUN_ARGS": "-q long",
    }


def test_slurm_train(command: Command, echoing_srun: dict[str, str]):
    output = command("slurm_train.sh", "part", "my job", "a b.py", "out dir", "--amp", **echoing_srun).splitlines()
    for argument in ("--partition=part", "--job-name=my job", "--ntasks=4", "--gres=gpu:2", "--cpus-per-task=5", "-q"):
        assert argument in output
    script = output[output.index("-u") + 1 :]
    assert script == [
        str(ROOT / "tools" / "train.py"),
        *("a b.py", "--work-dir", "out dir", "--launcher", "slurm", "--amp"),
    ]
    without_folder = command("slurm_train.sh", "part", "job", "a.py", "--amp", **echoing_srun).splitlines()
    assert without_folder[-4:] == ["a.py", "--launcher", "slurm", "--amp"]


def test_slurm_test(command: Command, echoing_srun: dict[str, str]):
    output = command("slurm_test.sh", "part", "job", "a.py", "b c.pth", "--tta", **echoing_srun).splitlines()
    assert output[-6:] == [str(ROOT / "tools" / "test.py"), "a.py", "b c.pth", "--launcher", "slurm", "--tta"]


@pytest.mark.parametrize("script", ["dist_train.sh", "dist_test.sh", "slurm_train.sh", "slurm_test.sh"])
def test_scripts_say_how_they_are_used(script: str, command: Command):
    output = command(script, "only-one", status=2)
    assert output.startswith("usage: ")
    assert script in output
