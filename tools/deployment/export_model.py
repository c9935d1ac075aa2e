"""Export the network of a config to a file that runs without its Python code; docs/deployment.md says how to load it.

  OUT.pt2          a program of torch.export; needs torch and the compiled operators (grootvl_mm/_C.so)
  OUT.pt2 --aoti   a package of AOTInductor, compiled for this machine's kind of processor; needs the same
  OUT.onnx         an ONNX graph of standard operators; needs neither

Of a classifier or segmenter the network gives the logits, of a detector (or with --backbone) the feature maps of the
backbone. It takes images as the data preprocessor leaves them: (B, 3, H, W) float32, normalised. Before the file gets
its name, it is loaded and its results are compared with those of the model that it was made from.
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
from grootvl_mm.apis.checkpoint_files import CheckpointError, read_checkpoint
from grootvl_mm.apis.whole_files import whole_file
from grootvl_mm.ops import extension_error
from grootvl_mm.ops.decompositions import decomposition_table
from grootvl_mm.utils.loaded_weights import all_weights_loaded, check_weights

PACKAGE = Path(grootvl_mm.__file__).resolve().parent
DEFAULT_SHAPES = {"mmpretrain": (224, 224), "mmseg": (512, 512), "mmdet": (800, 1344)}
# A free dimension must not shrink to 1, and the last stage has 1/32 of the size of the image.
SMALLEST_FREE_SIZE = 33
# What writes, optimizes and runs an .onnx file.
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Relative error of an output as a whole that is put down to rounding.
TOLERANCE = 1e-4
MAX_REASON = 300  # characters of an error of PyTorch that are shown

Network = Callable[[Tensor], Sequence[Tensor]]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_config_arguments(parser)
    parser.add_argument("checkpoint", nargs="?", help="path of the checkpoint (default: random weights, to try it out)")
    parser.add_argument("out", metavar="OUT", help="file to write: NAME.pt2 or NAME.onnx")
    shapes = ", ".join(f"{height} {width} for {scope}" for scope, (height, width) in DEFAULT_SHAPES.items())
    parser.add_argument(
        "--shape", nargs=2, type=int, metavar=("H", "W"), help=f"height and width of the images (default: {shapes})"
    )
    parser.add_argument("--dynamic-batch", action="store_true", help="take any number of images instead of one")
    parser.add_argument(
        "--dynamic-shape",
        action="store_true",
        help=f"take images of any height and width from {SMALLEST_FREE_SIZE} on (.pt2 only)",
    )
    parser.add_argument("--backbone", action="store_true", help="export the backbone alone, whatever the task")
    parser.add_argument("--aoti", action="store_true", help="compile with AOTInductor, which needs a C++ compiler")
    # The optional position in the middle is only found if options may stand anywhere.
    args = parser.parse_intermixed_args()
    if args.shape and min(args.shape) < 1:
        parser.error(f"--shape takes two positive numbers, got {args.shape[0]} {args.shape[1]}")
    if args.shape and args.dynamic_shape and min(args.shape) < SMALLEST_FREE_SIZE:
        parser.error(f"--dynamic-shape takes sizes from {SMALLEST_FREE_SIZE} on, got {args.shape[0]} {args.shape[1]}")
    if Path(args.out).suffix not in (".pt2", ".onnx"):
        parser.error(f"the output is a file NAME.pt2 or NAME.onnx, got {args.out!r}")
    if Path(args.out).suffix == ".onnx" and (args.aoti or args.dynamic_shape):
        parser.error("--aoti and --dynamic-shape go with NAME.pt2")
    return args


def check_requirements(out: Path, kind: str) -> None:
    """Fail if something is missing that the export would need in the end."""
    if not out.parent.is_dir() or out.is_dir():
        cli.fail(f"{out} cannot be written: {'it is a folder' if out.is_dir() else 'its folder does not exist'}")
    if kind == "onnx":
        missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
        if missing:
            cli.fail(f"ONNX needs packages that are not installed; run: pip install {' '.join(missing)}")
    elif extension_error() is not None:
        cli.fail(f"a .pt2 file calls the compiled operators, which are not in use here: {extension_error()}")
    if kind == "package":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            cli.fail("--aoti compiles C++, but no compiler works here; install one, or name it in the variable CXX")


class Logits(nn.Module):
    """A classifier or segmenter up to its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor]:
        """(B, 3, H, W) to (B, classes), or to (B, classes, h, w)."""
        return (self.model(image, mode="tensor"),)


def build_network(cfg: Config, checkpoint: str | None, backbone: bool) -> nn.Module:
    """The network of a config in evaluation mode, which makes a tuple of tensors of a batch of images."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
    if checkpoint is not None:
        load_weights(model, checkpoint)
    network = model.backbone if backbone or cfg.default_scope == "mmdet" else Logits(model)
    return network.eval().requires_grad_(False)


def load_weights(model: nn.Module, checkpoint: str) -> None:
    """Load a checkpoint of the whole model, or fail."""
    try:
        content = read_checkpoint(checkpoint)
        check_weights(content)
        with all_weights_loaded(model):
            model.load_state_dict(content.get("state_dict", content))
    except CheckpointError as error:
        cli.fail(str(error) if checkpoint in str(error) else f"{checkpoint}: {error}")
    except (RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        cli.fail(f"{checkpoint} does not fit the model of the config: {reason[:MAX_REASON]}")


def random_images(batch: int, shape: Sequence[int]) -> Tensor:
    """(B, 3, H, W), always the same."""
    return torch.randn(batch, 3, *shape, generator=torch.Generator().manual_seed(0))


def trace(network: nn.Module, image: Tensor, dynamic_batch: bool, dynamic_shape: bool) -> ExportedProgram:
    """The network as a graph for images like these."""
    free = {0: Dim("batch", min=1)} if dynamic_batch else {}
    if dynamic_shape:
        free |= {2: Dim("height", min=SMALLEST_FREE_SIZE), 3: Dim("width", min=SMALLEST_FREE_SIZE)}
    return torch.export.export(network, (image,), dynamic_shapes=(free,))


def write_program(program: ExportedProgram, path: Path) -> Network:
    """Write a program of torch.export and load it again."""
    torch.export.save(program, path)
    return torch.export.load(path).module()


def write_package(program: ExportedProgram, path: Path) -> Network:
    """Compile a package of AOTInductor and load it."""
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
    """The largest relative error of an output as a whole (Frobenius norms)."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(actual, expected, strict=True))


def check(exported: Network, network: nn.Module, image: Tensor) -> float:
    """Compare what was exported with the model, or fail.

    Where two edges weigh almost the same, rounding decides which of them is in the tree, and with it what the model
    makes of the image. So the exported network may differ from the model by somewhat more than the model from itself
    when the last bits of the image are changed.

    Returns:
        The deviation.
    """
    expected = network(image)
    changed = network(image * (1 + 1e-7 * torch.randn_like(image)))
    found, allowed = deviation(exported(image), expected), max(TOLERANCE, 10 * deviation(changed, expected))
    if not found <= allowed:
        cli.fail(f"what was exported differs from the model by {found:.1e} of its output, more than {allowed:.1e}")
    return found


class Format(NamedTuple):
    """A kind of file."""

    name: str
    write: Callable[[ExportedProgram, Path], Network]
    load: str  # how to load it


FORMATS = {
    "program": Format(
        "program of torch.export",
        write_program,
        "torch.ops.load_library({library!r}); network = torch.export.load({out!r}).module()",
    ),
    "package": Format(
        "package of AOTInductor",
        write_package,
        "torch.ops.load_library({library!r}); network = torch._inductor.aoti_load_package({out!r})",
    ),
    "onnx": Format("ONNX graph", write_onnx, "network = onnxruntime.InferenceSession({out!r})"),
}


def export(cfg: Config, args: argparse.Namespace, kind: Format) -> None:
    """Write the file, check it, and log what it is."""
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
        reason = " ".join(str(error).split())
        cli.fail(f"the model does not run on images of {shape[0]}x{shape[1]}: {reason[:MAX_REASON]}")
    program = trace(network, trials[0], args.dynamic_batch, args.dynamic_shape)
    with cli.file_errors(out), whole_file(out) as partial:
        exported = kind.write(program, partial)
        found = max(check(exported, network, trial) for trial in trials)

    logger = MMLogger.get_instance("export_model")
    results = ", ".join(str(tuple(output.shape)) for output in outputs)
    logger.info("%s of %s: %s to %s", kind.name, args.config, tuple(trials[0].shape), results)
    logger.info("it differs from the model by at most %.1e of an output", found)
    library = next((path for path in torch.ops.loaded_libraries if Path(path).parent == PACKAGE), None)
    logger.info("to load it: %s", kind.load.format(library=library, out=str(out)))


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
