"""What tools say when called wrongly, and to openmim, which reads their help."""

from pathlib import Path

import pytest

from tests.helpers.tool_runs import ROOT, call_script

CONFIG = ROOT / "configs" / "demo" / "grootv-pico_demo-cls.py"


@pytest.fixture
def call(capsys):
    """Run a tool until it exits; return its status and what it wrote."""

    def run(script: str, *arguments: object) -> tuple[int, str]:
        code = call_script(f"tools/{script}", *arguments)
        captured = capsys.readouterr()
        # Python writes a code that is a text to stderr and makes the status 1.
        return (1, code) if isinstance(code, str) else (code, captured.out + captured.err)

    return run


def test_help_has_no_gpus(call):
    status, output = call("train.py", "-h")
    assert status == 0
    assert "--resume" in output
    # openmim would pass a --gpus that it finds there.
    assert "--gpus" not in output


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("train.py", "nowhere.py", "--local_rank", "0"), 1, "error: config 'nowhere.py' does not exist"),
        (("train.py", CONFIG, "--local-rank=0", "--resume", "no.pth"), 1, "error: checkpoint 'no.pth' does not exist"),
        (("train.py", CONFIG, "--auto-scale-lr"), 1, "error: --auto-scale-lr needs the batch size"),
        (("test.py", CONFIG, "no.pth"), 1, "error: checkpoint 'no.pth' does not exist"),
        (("test.py", CONFIG, "no.pth", "--out", "a.json"), 2, "--out must end in .pkl or .pickle, got 'a.json'"),
        (("visualization/draw_predictions.py", CONFIG, "no.pth", "a.jpg"), 2, "must end in .png, got 'a.jpg'"),
        (("../demo/train_on_digits.py", "--task", "nothing"), 2, "invalid choice: 'nothing'"),
    ],
    ids=lambda value: " ".join(Path(str(part)).name for part in value[:1]) if isinstance(value, tuple) else None,
)
def test_one_clear_error(arguments: tuple, status: int, message: str, call):
    got, output = call(*arguments)
    assert got == status
    assert message in output
