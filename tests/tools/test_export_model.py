"""tools/deployment/export_model.py and docs/deployment.md, all of whose commands and code are run."""

import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.export import ExportedProgram

import grootvl_mm
from tests.helpers.config_cases import load_config
from tests.helpers.faults import with_wrong_weight
from tests.helpers.tool_fixtures import SHIPPED
from tests.helpers.tool_runs import ROOT, call_script, load_script

for host in ("mmdet", "mmseg", "mmpretrain"):
    pytest.importorskip(host)

TOOL = "tools/deployment/export_model.py"
PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
LIBRARY = Path(grootvl_mm.__file__).with_name("_C.so")
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# One block of eight channels: a compiler has little to do.
NANO = """\
_base_ = {base!r}
model = dict(backbone=dict(arch=dict(_delete_=True, channels=8, depths=[1]), out_indices=[0]))
"""
HEADS = {
    "cls": "model.update(neck=dict(in_channels=8, out_channels=12), head=dict(in_channels=12))",
    "seg": """\
model.update(
    decode_head=dict(in_channels=[8], in_index=[0], channels=8, pool_scales=(1, 2)),
    auxiliary_head=dict(in_channels=8, in_index=0),
)""",
    "det": "model.update(neck=dict(in_channels=[8], num_outs=4))",
}


def blocks(language: str) -> list[str]:
    """The code of the page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


EXPORTS = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("python tools/")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of a user: configs of small models, and a checkpoint for the classifier."""
    folder = tmp_path_factory.mktemp("deployment")
    for task, name in SHIPPED.items():
        path = folder / "configs" / "demo" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(NANO.format(base=str(ROOT / "configs" / "demo" / name)) + HEADS[task])
    checkpoint = folder / "work_dirs" / "demo-cls" / "iter_600.pth"
    checkpoint.parent.mkdir(parents=True)
    torch.manual_seed(0)
    model = build(folder, "cls")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    torch.save({"meta": {"iter": 600}, "state_dict": model.state_dict()}, checkpoint)
    return folder


def build(folder: Path, task: str) -> nn.Module:
    cfg = load_config(folder / "configs" / "demo" / SHIPPED[task])
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model).eval()


@pytest.fixture(scope="module")
def classifier(folder: Path) -> nn.Module:
    model = build(folder, "cls")
    model.load_state_dict(torch.load(folder / "work_dirs" / "demo-cls" / "iter_600.pth")["state_dict"])
    return model


def call(folder: Path, *arguments: object) -> str | int | None:
    """Run the tool in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return call_script(TOOL, *arguments)


def run(folder: Path, *command: str, **environment: str) -> str:
    """Run a command in a separate process."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | environment
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def export_command(output: str) -> list[str]:
    """The arguments of the page's command that makes a file."""
    (line,) = [line for line in EXPORTS if f" {output} " in line]
    return shlex.split(line)[2:]


@pytest.fixture(scope="module")
def library(folder: Path) -> Path:
    """What the page's command to copy the library leaves."""
    (block,) = [block for block in blocks("bash") if "_C.so" in block and block.startswith("cp ")]
    run(folder, "bash", "-e", "-c", block, PYTHONPATH=str(ROOT))
    assert (folder / "_C.so").read_bytes() == LIBRARY.read_bytes()
    return folder / "_C.so"


@pytest.fixture(scope="module")
def images(folder: Path) -> Tensor:
    torch.manual_seed(0)
    images = torch.randn(3, 3, 64, 64)
    np.save(folder / "images.npy", images.numpy())
    return images


@pytest.fixture(scope="module")
def program(folder: Path) -> Path:
    assert call(folder, *export_command("digits.pt2")) is None
    return folder / "digits.pt2"


@pytest.fixture(scope="module")
def package(folder: Path) -> Path:
    assert call(folder, *export_command("digits-package.pt2")) is None
    return folder / "digits-package.pt2"


@pytest.fixture(scope="module")
def graph(folder: Path) -> Path:
    for name in ONNX_PACKAGES:
        pytest.importorskip(name)
    assert call(folder, *export_command("digits.onnx")) is None
    return folder / "digits.onnx"


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images, mode="tensor")


def load_in_a_fresh_process(folder: Path, output: str, absent: tuple[str, ...]) -> Tensor:
    """Run the page's code that loads a file, and see which packages it did without."""
    (code,) = [block for block in blocks("python") if f'"{output}"' in block]
    code += f"""
import sys
found = set({absent!r}) & {{name.partition(".")[0] for name in sys.modules}}
assert not found, found
np.save("logits.npy", np.asarray(logits))
"""
    run(folder, sys.executable, "-c", code)
    return torch.from_numpy(np.load(folder / "logits.npy"))


OWN = ("grootvl_mm", "mmengine", "mmcv", "mmpretrain")


@pytest.mark.parametrize(
    ("kind", "absent"),
    [("program", OWN), pytest.param("package", OWN, marks=pytest.mark.slow), ("graph", (*OWN, "torch"))],
    ids=str,
)
def test_runs_in_a_fresh_process(
    kind: str, absent: tuple, folder: Path, library: Path, images: Tensor, classifier: nn.Module, request
) -> None:
    output = request.getfixturevalue(kind)
    logits = load_in_a_fresh_process(folder, output.name, absent)
    torch.testing.assert_close(logits, logits_of(classifier, images), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_package_in_cpp(folder: Path, library: Path, package: Path, classifier: nn.Module) -> None:
    (code,), (build,) = blocks("cpp"), [block for block in blocks("bash") if "g++" in block]
    (folder / "logits.cpp").write_text(code)
    printed = run(folder, "bash", "-e", "-c", build)
    expected = logits_of(classifier, torch.linspace(-2, 2, 3 * 64 * 64).view(1, 3, 64, 64))
    torch.testing.assert_close(torch.tensor([[*map(float, printed.split())]]), expected, rtol=1e-4, atol=1e-4)


def test_the_onnx_graph_has_standard_operators_only(graph: Path) -> None:
    """What the page states about it."""
    import onnx

    model = onnx.load(graph)
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version >= 18) for entry in model.opset_import] == [("", True)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions
    kinds = {node.op_type for node in model.graph.node}
    assert {"GatherElements", "ScatterElements"} <= kinds
    assert not {"Loop", "Scan", "If"} & kinds
    reductions = {
        attribute.s
        for node in model.graph.node
        if node.op_type == "ScatterElements"
        for attribute in node.attribute
        if attribute.name == "reduction"
    }
    assert reductions == {b"min", b"add"}
    batch, *rest = model.graph.input[0].type.tensor_type.shape.dim
    assert batch.dim_param
    assert [dim.dim_value for dim in rest] == [3, 64, 64]


@pytest.mark.parametrize(
    ("output", "task", "shape"), [("segmenter.pt2", "seg", (3, 3, 80, 65)), ("maps.pt2", "det", (1, 3, 64, 64))]
)
def test_other_tasks(output: str, task: str, shape: tuple, folder: Path) -> None:
    torch.manual_seed(0)  # the weights are random
    assert call(folder, *export_command(output)) is None
    torch.manual_seed(0)
    model = build(folder, task)
    images = torch.randn(shape)
    with torch.no_grad():
        actual = torch.export.load(folder / output).module()(images)
        expected = (model(images, mode="tensor"),) if task == "seg" else model.backbone(images)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_backbone_of_a_classifier(folder: Path, classifier: nn.Module) -> None:
    options = ("--backbone", "--shape", 32, 40)
    config, checkpoint, *_ = export_command("digits.pt2")
    assert call(folder, config, *options, checkpoint, "backbone.pt2") is None
    images = torch.randn(1, 3, 32, 40)
    with torch.no_grad():
        (actual,), (expected,) = (
            torch.export.load(folder / "backbone.pt2").module()(images),
            classifier.backbone(images),
        )
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_every_command_and_all_code_of_the_page_is_run() -> None:
    commands = [block for block in blocks("bash") if not block.startswith("python tools/deployment/")]
    assert [block.split()[0] for block in commands] == ["cp", "TORCH=$(python"]
    outputs = [re.search(r"([\w-]+\.(pt2|onnx)) ", line)[1] for line in EXPORTS]
    assert outputs == ["digits.pt2", "digits-package.pt2", "digits.onnx", "segmenter.pt2", "maps.pt2"]
    loaded = [re.search(r'"([\w-]+\.(pt2|onnx))"', block)[1] for block in blocks("python")]
    assert loaded == outputs[:3]
    assert len(blocks("cpp")) == 1
    assert set(re.findall(r"^```(\w+)", PAGE, re.MULTILINE)) == {"bash", "python", "cpp"}


@pytest.fixture
def classification() -> list[str]:
    """Config and checkpoint of the page."""
    return export_command("digits.pt2")[:2]


WRONG_CALLS = {
    "suffix": (("out.pth",), "the output file must be NAME.pt2 or NAME.onnx, got 'out.pth'"),
    "shape": (("out.pt2", "--shape", "0", "5"), "--shape must be two positive numbers, got 0 5"),
    "small": (
        ("out.pt2", "--dynamic-shape", "--shape", "64", "32"),
        "with --dynamic-shape, --shape must be at least 33, got 64 32",
    ),
    "onnx": (("out.onnx", "--aoti"), "--aoti and --dynamic-shape need an output file NAME.pt2, got 'out.onnx'"),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_calls(case: str, classification: list, folder: Path, capsys: pytest.CaptureFixture) -> None:
    arguments, message = WRONG_CALLS[case]
    assert call(folder, *classification, *arguments) == 2
    assert message in capsys.readouterr().err


def another_model(folder: Path) -> str:
    torch.save({"state_dict": {"layer1.0.conv1.weight": torch.ones(2)}}, folder / "other.pth")
    return "other.pth"


# tests/demo/test_image_demo.py has the other kinds of wrong weights.
def half_precision(folder: Path) -> str:
    content = torch.load(folder / "work_dirs" / "demo-cls" / "iter_600.pth")
    torch.save(with_wrong_weight(content, "head.fc.bias", "half"), folder / "half.pth")
    return "half.pth"


def text(folder: Path) -> str:
    (folder / "text.pth").write_text("hello")
    return "text.pth"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: "nothing.pth", "checkpoint 'nothing.pth' does not exist"),
        (text, "text.pth is not a checkpoint, or is damaged"),
        (another_model, "this checkpoint does not fit GrootV"),
        (half_precision, "would stay random: 'head.fc.bias' is float16, expected float32"),
    ],
    ids=["missing", "text", "another model", "half precision"],
)
def test_checkpoints_that_do_not_fit(make: Callable, message: str, classification: list, folder: Path) -> None:
    assert_fails(folder, message, classification[0], make(folder), "out.pt2")


def assert_fails(folder: Path, message: str, *arguments: object) -> None:
    """One line, and no file."""
    before = set(folder.iterdir())
    error = call(folder, *arguments)
    assert error.startswith("error: ")
    assert message in error
    assert "\n" not in error
    assert set(folder.iterdir()) == before


def test_files_that_are_not_there(classification: list, folder: Path) -> None:
    assert_fails(folder, "config 'nowhere.py' does not exist", "nowhere.py", "out.pt2")
    assert_fails(folder, "its folder does not exist", *classification, "nowhere/out.pt2")
    (folder / "folder.pt2").mkdir(exist_ok=True)
    assert_fails(folder, "cannot write folder.pt2: it is a folder", *classification, "folder.pt2")


def test_a_model_that_does_not_run(classification: list, folder: Path) -> None:
    wrong = ("--shape", 64, 64, "--cfg-options", "model.neck.in_channels=5")
    assert_fails(folder, "the model does not run on images of 64x64: ", classification[0], "out.pt2", *wrong)


def test_no_compiler(classification: list, folder: Path) -> None:
    # Not by monkeypatch, which would leave the option hidden from later tests.
    with torch._inductor.config.patch("cpp.cxx", ("no-such-compiler",)):
        assert_fails(folder, "--aoti needs a C++ compiler, and none was found", *classification, "out.pt2", "--aoti")


def test_no_operators(classification: list, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_script(TOOL), "extension_error", lambda: "no compiled library in FOLDER")
    assert_fails(folder, "not available: no compiled library in FOLDER", *classification, "out.pt2")


def test_no_onnx(classification: list, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_script(TOOL), "find_spec", lambda name: None if name == "onnxscript" else name)
    assert_fails(folder, "not installed; run: pip install onnxscript", *classification, "out.onnx")


def test_a_file_that_differs_from_the_model_is_not_kept(classification: list, folder: Path) -> None:
    tool = load_script(TOOL)

    def write(program: ExportedProgram, path: Path) -> Callable[[Tensor], list[Tensor]]:
        path.write_text("wrong")
        return lambda images: [1.01 * output for output in program.module()(images)]

    config, out = folder / classification[0], folder / "out.pt2"
    options = Namespace(
        config=config, checkpoint=None, out=out, shape=(32, 32), dynamic_batch=False, dynamic_shape=False, backbone=True
    )
    before = set(folder.iterdir())
    with pytest.raises(SystemExit, match=r"has a relative error of 1.0e-02; at most 1.0e-04 is allowed"):
        tool.export(load_config(config), options, tool.Format("wrong file", write, ""))
    assert set(folder.iterdir()) == before
