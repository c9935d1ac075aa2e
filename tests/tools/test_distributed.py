"""dist_train.sh and dist_test.sh on the CPU, and the command lines of the slurm scripts."""

import socket
from pathlib import Path

import pytest

from tests.tools.tool_runs import ROOT, Command, read_metrics, read_scalars


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
def test_two_processes_compute_what_one_does(command: Command, make_config, tmp_path: Path):
    config = make_config("cls", batch_norm=False)
    one, two = tmp_path / "one", tmp_path / "two"
    command("train.py", config, "--work-dir", one, CUDA_VISIBLE_DEVICES="")
    halved = ("--work-dir", two, "--cfg-options", "train_dataloader.batch_size=1")
    command("dist_train.sh", config, 2, *halved, PORT=free_port(), CUDA_VISIBLE_DEVICES="")
    expected, got = read_scalars(one), read_scalars(two)
    assert sorted(got) == sorted(expected) == [1, 2, 3, 4]
    for iteration, line in expected.items():
        assert got[iteration]["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert got[iteration]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)

    # Going on from iteration 2 gives the same losses again.
    resume = ("--resume", two / "iter_2.pth")
    command("dist_train.sh", config, 2, *resume, *halved, PORT=free_port(), CUDA_VISIBLE_DEVICES="")
    resumed = read_scalars(two)
    assert sorted(resumed) == [3, 4]
    for iteration, line in resumed.items():
        assert line["loss"] == pytest.approx(expected[iteration]["loss"], rel=1e-5)

    checkpoint = one / "iter_4.pth"
    command("test.py", config, checkpoint, "--work-dir", tmp_path / "test1", CUDA_VISIBLE_DEVICES="")
    arguments = (config, checkpoint, 2, "--work-dir", tmp_path / "test2")
    command("dist_test.sh", *arguments, PORT=free_port(), CUDA_VISIBLE_DEVICES="")
    metrics = [read_metrics(tmp_path / name)["accuracy/top5"] for name in ("test1", "test2")]
    assert metrics[0] == metrics[1]


@pytest.fixture
def echoing_srun(tmp_path: Path) -> dict[str, str]:
    """An environment whose srun writes its arguments, one in a line."""
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    srun.chmod(0o755)
    return {"PATH": f"{tmp_path}:/usr/bin:/bin", "GPUS": "4", "GPUS_PER_NODE": "2", "SRUN_ARGS": "-q long"}


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
