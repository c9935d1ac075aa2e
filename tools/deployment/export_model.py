"""Export a config's network to a file that runs without its Python code; docs/deployment.md shows how to load it.

  OUT.pt2          a torch.export program; needs torch and the compiled operators (grootvl_mm/_C.so)
  OUT.pt2 --aoti   an AOTInductor package, compiled for this type of CPU; needs the same
  OUT.onnx         an ONNX graph of standard operators; needs neither

The output is the logits of a classifier or segmenter, or the backbone's feature maps for a detector or with --backbone.
The input is the output of the data preprocessor: (B, 3, H, W) float32, normalized. Before the file is written under its
name, it is loaded and its results are compared with the model's.
"""

import argparse
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import grootvl_mm
from grootvl_mm.apis import cli
from grootvl_mm.ops import extension_error
from grootvl_mm.ops.decompositions import decomposition_table

PACKAGE = Path(grootvl_mm.__file__).resolve().parent
DEFAULT_SHAPES = {"mmpretrain": (224, 224), "mmseg": (512, 512), "mmdet": (800, 1344)}
# A dynamic dimension must not shrink to 1, and the last stage has 1/32 of the image size.
SMALLEST_DYNAMIC_SIZE = 33
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # relative error of an output as a whole that counts as rounding

Network = Callable[[Tensor], Sequence[Tensor]]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_config_arguments(parser)
    parser.add_argument(
        "checkpoint", nargs="?", help="path of the checkpoint (default: none, which exports random weights for a test)"
    )
    parser.add_argument("out", metavar="OUT", help="output file, NAME.pt2 or NAME.onnx")
    shapes = ", ".join(f"{height} {width} for {scope}" for scope, (height, width) in DEFAULT_SHAPES.items())
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help=f"height and width of the images in pixels (default: {shapes})",
    )
    parser.add_argument(
        "--dynamic-batch", action="store_true", help="accept any batch size (default: a batch of one image)"
    )
    parser.add_argument(
        "--dynamic-shape",
        action="store_true",
        help=f"accept any height and width of at least {SMALLEST_DYNAMIC_SIZE} pixels, .pt2 only (default: those of "
        "--shape)",
    )
    parser.add_argument(
        "--backbone",
        action="store_true",
        help="export only the backbone of a classifier or segmenter too (default: up to the logits)",
    )
    parser.add_argument(
        "--aoti", action="store_true", help="compile with AOTInductor, which needs a C++ compiler (.pt2 only)"
    )
    # Intermixed, because the optional positional argument may come after options.
    args = parser.parse_intermixed_args()
    if args.shape and min(args.shape) < 1:
        parser.error(f"--shape must be two positive numbers, got {args.shape[0]} {args.shape[1]}")
    if args.shape and args.dynamic_shape and min(args.shape) < SMALLEST_DYNAMIC_SIZE:
        parser.error(
            f"with --dynamic-shape, --shape must be at least {SMALLEST_DYNAMIC_SIZE}, "
            f"got {args.shape[0]} {args.shape[1]}"
        )
    if Path(args.out).suffix not in (".pt2", ".onnx"):
        parser.error(f"the output file must be NAME.pt2 or NAME.onnx, got {args.out!r}")
    if Path(args.out).suffix == ".onnx" and (args.aoti or args.dynamic_shape):
        parser.error(f"--aoti and --dynamic-shape need an output file NAME.pt2, got {args.out!r}")
    return args


def check_requirements(out: Path, kind: str) -> None:
    """Exit with an error up front if the export could not succeed."""
    if not out.parent.is_dir() or out.is_dir():
        cli.fail(f"cannot write {out}: {'it is a folder' if out.is_dir() else 'its folder does not exist'}")
    if kind == "onnx":
        missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
        if missing:
            cli.fail(f"ONNX export needs packages that are not installed; run: pip install {' '.join(missing)}")
    elif extension_error() is not None:
        cli.fail(f"a .pt2 file needs the compiled operators, which are not available: {extension_error()}")
    if kind == "package":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            cli.fail("--aoti needs a C++ compiler, and none was found; install one, or set CXX to its path")


class Logits(nn.Module):
    """A classifier or segmenter that returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """(B, 3, H, W) to (B, classes), or to (B, classes, h, w)."""
        return (self.model(image, mode="tensor"),)


def build_network(cfg: Config, checkpoint: str | None, backbone: bool) -> nn.Module:
    """The network of a config in evaluation mode; it maps a batch of images to a tuple of tensors."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if checkpoint is not None:
        cli.load_weights(model, checkpoint)
    network = model.backbone if backbone or cfg.default_scope == "mmdet" else Logits(model)
    return network.eval().requires_grad_(False)


def random_images(batch: int, shape: Sequence[int]) -> Tensor:
    """Random images (B, 3, H, W) with a fixed seed."""
    return torch.randn(batch, 3, *shape, generator=torch.Generator().manual_seed(0))


def trace(network: nn.Module, image: Tensor, dynamic_batch: bool, dynamic_shape: bool) -> ExportedProgram:
    """Trace the network into a graph."""
    dynamic = {0: Dim("batch", min=1)} if dynamic_batch else {}
    if dynamic_shape:
        dynamic |= {2: Dim("height", min=SMALLEST_DYNAMIC_SIZE), 3: Dim("width", min=SMALLEST_DYNAMIC_SIZE)}
    return torch.export.export(network, (image,), dynamic_shapes=(dynamic,))


def write_program(program: ExportedProgram, path: Path) -> Network:
    """Write a torch.export program and load it."""
    torch.export.save(program, path)
    return torch.export.load(path).module()


def write_package(program: ExportedProgram, path: Path) -> Network:
    """Compile an AOTInductor package and load it."""
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return torch._inductor.aoti_load_package(str(path))


def write_onnx(program: ExportedProgram, path: Path) -> Network:
    """Write an ONNX graph and load it with ONNX Runtime."""
    import onnxruntime

    program = program.run_decompositions(decomposition_table())
    torch.onnx.export(program, input_names=["image"], verbose=False).save(path, external_data=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image: [torch.from_numpy(output) for output in session.run(None, {"image": image.numpy()})]


def deviation(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative error over the outputs (Frobenius norms)."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(actual, expected, strict=True))


def check(exported: Network, network: nn.Module, image: Tensor) -> float:
    """Compare the exported network with the model; exit with an error if they differ.

    If two edges have almost the same weight, rounding decides which of them is in the tree, and the output changes. So
    the allowed deviation is ten times that of the model itself when the last bits of the image are changed, or
    ``TOLERANCE`` if that is larger.

    Returns:
        The relative error.
    """
    expected = network(image)
    changed = network(image * (1 + 1e-7 * torch.randn_like(image)))
    found, allowed = deviation(exported(image), expected), max(TOLERANCE, 10 * deviation(changed, expected))
    if not found <= allowed:
        cli.fail(f"the exported network has a relative error of {found:.1e}; at most {allowed:.1e} is allowed")
    return found


class Format(NamedTuple):
    """An export format."""

    name: str
    write: Callable[[ExportedProgram, Path], Network]
    load: str  # how to load it


FORMATS = {
    "program": Format(
        "torch.export program",
        write_program,
        "torch.ops.load_library({library!r}); network = torch.export.load({out!r}).module()",
    ),
    "package": Format(
        "AOTInductor package",
        write_package,
        "torch.ops.load_library({library!r}); network = torch._inductor.aoti_load_package({out!r})",
    ),
    "onnx": Format("ONNX graph", write_onnx, "network = onnxruntime.InferenceSession({out!r})"),
}


def export(cfg: Config, args: argparse.Namespace, kind: Format) -> None:
    """Write the file, check it, and log a summary."""
    out, shape = Path(args.out), tuple(args.shape or DEFAULT_SHAPES[cfg.default_scope])
    network = build_network(cfg, args.checkpoint, args.backbone)
    trials = [random_images(2 if args.dynamic_batch else 1, shape)]
    if args.dynamic_batch:
        trials.append(random_images(3, shape))
    if args.dynamic_shape:
        trials.append(random_images(len(trials[0]), (shape[0] + 35, shape[1] + 64)))
    try:
        outputs = network(trials[0])
    except RuntimeError as error:
        cli.fail(f"the model does not run on images of {shape[0]}x{shape[1]}: {cli.one_line(error)}")
    program = trace(network, trials[0], args.dynamic_batch, args.dynamic_shape)
    with cli.output_file(out) as partial:
        exported = kind.write(program, partial)
        found = max(check(exported, network, trial) for trial in trials)

    logger = MMLogger.get_instance("export_model")
    results = ", ".join(str(tuple(output.shape)) for output in outputs)
    logger.info("%s of %s: %s to %s", kind.name, args.config, tuple(trials[0].shape), results)
    logger.info("Relative error compared with the model: at most %.1e", found)
    library = next((path for path in torch.ops.loaded_libraries if Path(path).parent == PACKAGE), None)
    logger.info("Load it with: %s", kind.load.format(library=library, out=str(out)))


def main() -> None:
    """Run the command."""
    args = parse_args()
    out = Path(args.out)
    kind = "onnx" if out.suffix == ".onnx" else "package" if args.aoti else "program"
    check_requirements(out, kind)
    cfg = cli.load_config(args.config, args.cfg_options)
    with torch.no_grad():
        export(cfg, args, FORMATS[kind])


if __name__ == "__main__":
    main()
