"""The operators as PyTorch sees them: registration, compilation, and what happens without the compiled ones."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import grootvl_mm
from grootvl_mm.ops import (
    _library,
    extension_error,
    grid_edge_weight,
    grid_tree,
    sequence_edges,
    tree_scan,
)
from grootvl_mm.ops._compat import infer_schema
from tests.helpers.marks import needs_compiler, needs_symbolic_convolutions
from tests.helpers.trees import random_scan, random_selective_scan, random_weight

PACKAGE = Path(grootvl_mm.__file__).parent


def samples(device: torch.device) -> dict[str, tuple]:
    x, decay, tree = random_scan(2, 3, 4, 5, seed=0, dtype=torch.float32)
    x, decay, tree = x.to(device), decay.to(device), tree.to(device)
    feature = torch.randn(2, 3, 3, 4, device=device)
    inputs, selective_tree = random_selective_scan(2, 3, 4, 5, 2, seed=0, dtype=torch.float32)
    selective = (
        *(value.to(device).requires_grad_() for value in inputs.values()),
        *selective_tree.to(device),
        1e-5,
        "all",
    )
    rows, branch = (torch.randn(2, 3, 8, device=device, requires_grad=True) for _ in range(2))
    norm = [torch.randn(8, device=device, requires_grad=True) for _ in range(2)]
    factor = torch.tensor([0.0, 1.25], device=device)
    maps = torch.randn(2, 3, 4, 16, device=device, requires_grad=True)
    taps = torch.randn(8, 1, 3, 3, device=device, requires_grad=True)
    return {
        "layer_norm": (rows, *norm, 1e-5, None),
        "residual_layer_norm": (rows, branch, factor, *norm, 1e-5, None),
        "layer_norm_backward": (branch, branch, rows, factor, norm[0], 1e-5, torch.bfloat16),
        "depthwise_conv_silu": (maps[..., :8], taps),
        "depthwise_conv_silu_backward": (torch.randn(2, 3, 4, 8, device=device), maps[..., :8], taps),
        "tree_selective_scan": selective,
        "tree_selective_scan_backward": (torch.randn_like(selective[0]), *selective),
        "grid_edge_weight": (feature, "cosine", False),
        "grid_tree": (grid_edge_weight(feature), 3, 4, 0),
        "graph_tree": (
            sequence_edges(6, device=device),
            torch.rand(2, 12, device=device, requires_grad=True),
            6,
            torch.tensor([5, 0], device=device),
        ),
        "tree_scan": (x.requires_grad_(), decay.requires_grad_(), *tree, "all"),
        "tree_scan_backward": (torch.randn_like(x), x, decay, *tree, "all"),
    }


def as_tuple(results: torch.Tensor | tuple) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def test_compiled_operators_are_in_use() -> None:
    assert extension_error() is None


def test_every_operator_has_a_reference_with_its_schema() -> None:
    for name, function in _library.REFERENCES.items():
        schema = str(getattr(torch.ops.grootvl, name).default._schema)
        arguments = infer_schema(function, mutates_args=())
        assert schema == f"grootvl::{name}{arguments}"


def test_references_return_no_graph() -> None:
    for name, function in _library.REFERENCES.items():
        inputs = [value.detach() if isinstance(value, torch.Tensor) else value for value in samples("cpu")[name]]
        assert not any(result.requires_grad for result in as_tuple(function(*inputs))), name


NEEDS = {"depthwise_conv_silu_backward": needs_symbolic_convolutions}


@needs_compiler
@pytest.mark.parametrize("name", [pytest.param(n, marks=NEEDS.get(n, ())) for n in sorted(_library.REFERENCES)])
def test_opcheck(device: torch.device, name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.grootvl, name).default, samples(device)[name])


@needs_compiler
@pytest.mark.parametrize("name", [name for name in sorted(_library.REFERENCES) if "scan" in name])
def test_opcheck_of_scans_that_are_given_the_cut(device: torch.device, name: str) -> None:
    if device.type not in _library.CUTTING_DEVICES:
        pytest.skip("scans on this device know no cuts")
    arguments = samples(device)[name]
    trees = [value for value in arguments if isinstance(value, torch.Tensor) and value.dtype == torch.int32]
    cut = torch.ops.grootvl.tree_cut(*trees)
    torch.library.opcheck(torch.ops.grootvl.tree_cut.default, tuple(trees))
    torch.library.opcheck(getattr(torch.ops.grootvl, name).default, (*arguments, cut))


@needs_compiler
def test_opcheck_of_trees_with_cuts(device: torch.device) -> None:
    if device.type not in _library.CUTTING_DEVICES:
        pytest.skip("scans on this device know no cuts")
    weight = random_weight(2, 3, 4, seed=0).to(device)
    torch.library.opcheck(torch.ops.grootvl.grid_tree_and_cut.default, (weight, 3, 4, 5))
    *tree, cut = torch.ops.grootvl.grid_tree_and_cut(weight, 3, 4, 5)
    assert all(map(torch.equal, tree, torch.ops.grootvl.grid_tree(weight, 3, 4, 5)))
    assert torch.equal(cut, torch.ops.grootvl.tree_cut(*tree))


def test_a_cut_is_written_as_a_whole(device: torch.device) -> None:
    """Pieces take a part of its memory; what was in the rest before is no result, and would differ each time."""
    if device.type not in _library.CUTTING_DEVICES:
        pytest.skip("scans on this device know no cuts")
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    for height, width in ((1, 1), (2, 3), (17, 20), (130, 131)):  # the last one by many blocks
        tree = grid_tree(random_weight(2, height, width, seed=0).to(device), height, width)
        torch.use_deterministic_algorithms(True)  # fills new memory with the largest number
        try:
            cut = torch.ops.grootvl.tree_cut(*tree)
        finally:
            torch.use_deterministic_algorithms(is_deterministic)
        assert (cut != torch.iinfo(torch.int32).max).all()


@needs_compiler
def test_compiles_as_one_graph(device: torch.device) -> None:
    def block(feature: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        tree = grid_tree(grid_edge_weight(feature), *feature.shape[2:])
        return tree_scan(feature.flatten(2).transpose(1, 2), decay, tree)

    feature = torch.randn(2, 8, 5, 6, device=device, requires_grad=True)
    decay = torch.rand(2, 30, 8, device=device)
    expected = block(feature, decay)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), feature)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(feature, decay)
    (grad,) = torch.autograd.grad(compiled.square().sum(), feature)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(grad, expected_grad)


@needs_compiler
def test_exports_with_the_operators_as_nodes() -> None:
    class Scan(torch.nn.Module):
        def forward(self, feature: torch.Tensor) -> torch.Tensor:
            tree = grid_tree(grid_edge_weight(feature), *feature.shape[2:])
            x = feature.flatten(2).transpose(1, 2)
            return tree_scan(x, x.sigmoid(), tree)

    feature = torch.randn(2, 4, 5, 5)
    program = torch.export.export(Scan(), (feature,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert [target for target in targets if target.startswith("grootvl")] == [
        "grootvl.grid_edge_weight.default",
        "grootvl.grid_tree.default",
        "grootvl.tree_scan.default",
    ]
    torch.testing.assert_close(program.module()(feature), Scan()(feature))


def test_flops_are_counted() -> None:
    x, decay, tree = random_scan(2, 3, 4, 5, seed=0, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        grid_edge_weight(torch.randn(2, 3, 3, 4))
        tree_scan(x.requires_grad_(), decay, tree).sum().backward()
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items() if count}
    assert counts == {
        "grootvl.grid_edge_weight": 6 * 2 * 3 * 12,
        "grootvl.tree_scan": 6 * 2 * 12 * 5,
        "grootvl.tree_scan_backward": 15 * 2 * 12 * 5,
    }


@pytest.fixture(scope="module")
def package_without_extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(PACKAGE, folder / "grootvl_mm", ignore=shutil.ignore_patterns("_C*", ".mim", "__pycache__"))
    return folder


def run_python(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a separate process with or without the compiled CPU operators, whatever this process uses."""
    inherited = {name: value for name, value in os.environ.items() if name != "GROOTVL_LIBRARY"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | {"PYTHONPATH": str(folder)} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.cpu_kernels
def test_works_without_the_extension_and_says_so(package_without_extension: Path) -> None:
    result = run_python(
        package_without_extension,
        "import torch, grootvl_mm\n"
        "from grootvl_mm.ops import extension_error\n"
        "model = grootvl_mm.models.GrootV('pico', out_indices=(3,))\n"
        "model(torch.randn(1, 3, 32, 32))[0].sum().backward()\n"
        "assert all(p.grad is not None for p in model.parameters())\n"
        "print('reason:', extension_error())\n",
    )
    assert result.returncode == 0, result.stderr
    assert "reason: no compiled library in" in result.stdout
    assert "slow PyTorch operators" in result.stderr


@pytest.mark.cpu_kernels
def test_a_broken_extension_is_named(package_without_extension: Path) -> None:
    broken = package_without_extension / "grootvl_mm" / "_C.so"
    broken.write_bytes(b"not a library")
    try:
        result = run_python(
            package_without_extension, "from grootvl_mm.ops import extension_error; print(extension_error())"
        )
    finally:
        broken.unlink()
    assert result.returncode == 0, result.stderr
    assert "_C.so does not load with torch" in result.stdout


@pytest.mark.cpu_kernels
def test_library_of_the_environment_is_taken(package_without_extension: Path) -> None:
    code = "from grootvl_mm.ops import extension_error; print(extension_error())"
    built, *_ = sorted(PACKAGE.glob("_C*.so"))
    assert run_python(package_without_extension, code, GROOTVL_LIBRARY=str(built)).stdout == "None\n"
    result = run_python(package_without_extension, code, GROOTVL_LIBRARY="/nowhere/other.so")
    assert "other.so does not load with torch" in result.stdout


@pytest.mark.cpu_kernels
def test_a_library_of_other_sources_is_an_error(package_without_extension: Path) -> None:
    other = str(Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so")  # loads, and has none of the operators
    result = run_python(package_without_extension, "import grootvl_mm.ops", GROOTVL_LIBRARY=other)
    assert result.returncode == 1
    assert "was compiled from other sources: it has no grid_edge_weight" in result.stderr
    assert "Recompile it: pip install" in result.stderr.splitlines()[-1]


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_instruction_sets_agree(tmp_path: Path, isa: str) -> None:
    """Trees are bitwise the same, edge weights, scans and their gradients to rounding."""
    feature = torch.randn(2, 37, 20, 21)
    x, decay, tree = random_scan(2, 20, 21, 48, seed=0, dtype=torch.float32)
    maps, taps, norm = torch.randn(2, 9, 11, 83), torch.randn(83, 1, 3, 3), torch.randn(83)
    narrow = maps.bfloat16()
    trees = [("grid_edge_weight", (feature, "cosine", False)), ("grid_tree", (grid_edge_weight(feature), 20, 21, 0))]
    close = [
        ("tree_scan", (x, decay, *tree, "all")),
        ("tree_scan_backward", (x, x, decay, *tree, "all")),
        ("depthwise_conv_silu", (maps, taps)),
        ("depthwise_conv_silu_backward", (maps, maps, taps)),
        ("residual_layer_norm", (maps, narrow, None, norm, norm, 1e-5, None)),
        ("layer_norm_backward", (maps, narrow, maps, None, norm, 1e-5, None)),
    ]
    inputs, tree = random_selective_scan(2, 20, 21, 40, 3, seed=0, dtype=torch.float32)
    rounded = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = [value.to(dtype) if number < 5 else value for number, value in enumerate(inputs.values())]
        x, gate, decay = values[0], values[4], values[4].sigmoid()
        rounded += [
            ("tree_selective_scan", (*values, *tree, 1e-5, "all")),
            ("tree_selective_scan_backward", (x, *values, *tree, 1e-5, "all")),
            ("tree_scan", (x, decay, *tree, "all")),
            ("tree_scan_backward", (gate, x, decay, *tree, "all")),
        ]
    torch.save(trees + close + rounded, tmp_path / "calls.pt")
    process = run_python(
        tmp_path,
        "import torch, grootvl_mm.ops\n"
        "results = [getattr(torch.ops.grootvl, name)(*arguments) for name, arguments in torch.load('calls.pt')]\n"
        "torch.save(results, 'results.pt')\n",
        GROOTVL_CPU_ISA=isa,
        PYTHONPATH=str(PACKAGE.parent),
    )
    assert process.returncode == 0, process.stderr
    weight, found_tree, *results = torch.load(tmp_path / "results.pt")
    torch.testing.assert_close(weight, grid_edge_weight(feature), rtol=1e-6, atol=1e-7)
    assert all(map(torch.equal, found_tree, torch.ops.grootvl.grid_tree(*trees[1][1])))
    for (name, arguments), result in zip(close, results, strict=False):
        tolerance = {} if "scan" in name else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(result, _library.REFERENCES[name](*arguments), **tolerance)
    for (name, arguments), result in zip(rounded, results[len(close) :], strict=True):
        for value, expected in zip(*map(as_tuple, (result, _library.REFERENCES[name](*arguments))), strict=True):
            assert value.dtype == expected.dtype
            rounding = 2e-5 if arguments[0].dtype == torch.float32 else 1e-4
            bound = 2 * torch.finfo(value.dtype).eps if value.element_size() == 2 else rounding
            assert (value.double() - expected.double()).norm() < bound * expected.double().norm(), name
