"""Benchmark the backbones of GrootV-T, Swin-T and ConvNeXt-T: time of inference and training steps, and peak memory.

The models run alternately in one process, on several distinct images; Swin-T and ConvNeXt-T are torchvision's, without
their heads. A training step is the forward pass, the mean of every output, and the backward pass. Ratios are those of
the median throughputs, with the 10th to 90th percentiles over the rounds. Peak memory is measured for a training step
in a new process for each model: the growth of the resident set size beyond parameters and images on the CPU, and of the
allocated memory on CUDA. Stochastic depth is off.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torchvision
from matplotlib.figure import Figure
from measuring import (
    AUTOCAST,
    MEMORY_ENVIRONMENT,
    add_autocast_argument,
    add_common_arguments,
    check_common_arguments,
    describe_machine,
    format_ratio,
    format_seconds,
    format_table,
    machine_lines,
    natural_features,
    peak_memory,
    ratio_of,
    run_fresh,
    spread,
    time_in_turn,
    write_results,
)
from mmengine.logging import MMLogger
from torch import Tensor, nn

from grootvl_mm.models import GrootV

NAME = "benchmark_model"
OURS = "GrootV-T"
MODELS = {
    OURS: lambda: GrootV("tiny"),
    "Swin-T": lambda: torchvision.models.swin_t().features,
    "ConvNeXt-T": lambda: torchvision.models.convnext_tiny().features,
}
STEPS = ("inference", "training")
DISTINCT_IMAGES = 4


class Settings(NamedTuple):
    """Settings of a measurement."""

    device: str
    autocast: str
    rounds: int
    compile: bool
    graphs: bool
    tf32: bool


def image_batch(text: str) -> tuple[int, int, int]:
    """Argparse type: ``8x224x224`` is a batch of 8."""
    try:
        batch, height, width = (int(number) for number in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected BATCHxHEIGHTxWIDTH, such as 8x224x224, got {text!r}") from None
    if batch < 1 or min(height, width) < 32:
        raise argparse.ArgumentTypeError(f"expected at least one image of at least 32x32 pixels, got {text!r}")
    return batch, height, width


def build(model: str, settings: Settings) -> nn.Module:
    """A backbone with random weights."""
    torch.manual_seed(0)
    backbone = MODELS[model]().to(settings.device)
    for module in backbone.modules():
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.p = 0.0
    return torch.compile(backbone, dynamic=False) if settings.compile else backbone


def make_images(shape: tuple[int, int, int], device: str) -> list[Tensor]:
    """Distinct batches of images with the spectrum of photographs."""
    generator = torch.Generator(device).manual_seed(0)
    batch, height, width = shape
    return [natural_features(generator, batch, 3, height, width) for _ in range(DISTINCT_IMAGES)]


def autocast(settings: Settings) -> torch.autocast:
    """Mixed precision, if ``settings`` ask for it."""
    dtype = AUTOCAST[settings.autocast]
    return torch.autocast(settings.device, dtype=dtype, enabled=dtype is not None)


def infer(model: nn.Module, settings: Settings, images: Tensor) -> Any:
    """Forward pass of a model in evaluation mode, without gradients."""
    with torch.no_grad(), autocast(settings):
        return model(images)


def train(model: nn.Module, settings: Settings, images: Tensor) -> None:
    """Forward and backward pass; gradients are not accumulated."""
    model.zero_grad(set_to_none=True)
    with autocast(settings):
        outputs = model(images)
    loss = sum(output.float().mean() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))
    loss.backward()


def record(step: Callable[[Tensor], Any], images: Tensor) -> Callable[[Tensor], Any]:
    """The step as a CUDA graph, whose replay takes other images of this shape."""
    own = images.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(own)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(own)

    def replay(images: Tensor) -> Any:
        own.copy_(images)
        graph.replay()
        return result

    return replay


def set_tf32(settings: Settings) -> None:
    """Set whether this process computes float32 matrix products and convolutions on CUDA in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.tf32


def measure_times(shape: tuple[int, int, int], steps: tuple[str, ...], settings: Settings) -> list[dict[str, Any]]:
    """Times of all models on one shape."""
    set_tf32(settings)
    images = make_images(shape, settings.device)
    models = {name: build(name, settings) for name in MODELS}
    rows = []
    for step in steps:
        for model in models.values():
            model.train(step == "training")
        call = train if step == "training" else infer
        contenders = {name: functools.partial(call, model, settings) for name, model in models.items()}
        if settings.graphs:
            contenders = {name: record(step_of_model, images[0]) for name, step_of_model in contenders.items()}
        times = time_in_turn(contenders, images, settings.rounds, settings.device, f"{shape} {step}")
        for name, seconds in times.items():
            row = {"step": step, "model": name, "seconds": spread(seconds)}
            row["images_per_second"] = shape[0] / row["seconds"]["median"]
            if name != OURS:
                row["throughput_ratio"] = ratio_of(seconds, times[OURS])
            rows.append(row)
    return rows


def measure_memory(shape: tuple[int, int, int], model: str, settings: Settings) -> int:
    """Peak bytes of a training step of one model; the first step, which loads code, does not count."""
    set_tf32(settings)
    images = make_images(shape, settings.device)[0]
    backbone = build(model, settings).train()
    step = functools.partial(train, backbone, settings, images)
    step()
    backbone.zero_grad(set_to_none=True)
    # A small forward pass frees the memory that our operators keep for the next backward pass, so that it counts, too.
    infer(GrootV("pico").to(settings.device), settings, images[:, :, :32, :32])
    return peak_memory(step, settings.device)


def report(data: dict[str, Any]) -> str:
    """The results as text."""
    times, memory = [], []
    for shape in data["shapes"]:
        for row in shape["times"]:
            low, high = (format_seconds(row["seconds"][key]) for key in ("p10", "p90"))
            ratio = format_ratio(row["throughput_ratio"]) if "throughput_ratio" in row else ("-", "-")
            cells = (shape["images"], row["step"], row["model"], format_seconds(row["seconds"]["median"]))
            times.append([*cells, f"{low} .. {high}", f"{row['images_per_second']:.2f}", *ratio])
        for model, peak in shape["memory"].items():
            memory.append([shape["images"], model, f"{peak / 2**20:.0f} MiB", f"{shape['memory'][OURS] / peak:.2f}x"])
    columns = ["images", "step", "model", "time", "spread", "images/s", f"relative throughput of {OURS}", "spread"]
    lines = [f"Backbones, {data['precision']}", *machine_lines(data["machine"]), "", format_table(columns, times)]
    if memory:
        columns = ["images", "model", "peak memory of a training step", f"relative memory of {OURS}"]
        lines += ["", format_table(columns, memory)]
    return "\n".join(lines) + "\n"


def draw(data: dict[str, Any]) -> Figure:
    """Bar chart of our throughput relative to the others'."""
    rows = [
        (f"{shape['images']} {row['step']}\n{row['model']}", row["throughput_ratio"]["median"])
        for shape in data["shapes"]
        for row in shape["times"]
        if "throughput_ratio" in row
    ]
    figure = Figure(figsize=(7, 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels, ratios = zip(*rows, strict=True)
    axes.barh(range(len(rows)), ratios, color=["tab:blue" if "Swin" in label else "tab:orange" for label in labels])
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(
        title=f"{data['hardware']}, {data['precision']}", xlabel=f"throughput of {OURS} relative to the other model"
    )
    return figure


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser, NAME)
    add_autocast_argument(parser)
    parser.add_argument(
        "--images",
        type=image_batch,
        nargs="+",
        default=[(8, 224, 224), (1, 800, 1344)],
        metavar="BATCHxHEIGHTxWIDTH",
        help="input shapes (default: 8x224x224 1x800x1344)",
    )
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="default: both")
    parser.add_argument("--compile", action="store_true", help="measure under torch.compile")
    parser.add_argument("--graphs", action="store_true", help="measure CUDA graphs of the steps, without peak memory")
    parser.add_argument("--tf32", action="store_true", help="compute float32 matrix products on CUDA in TF32")
    args = parser.parse_args()
    check_common_arguments(parser, args)
    if args.device != "cuda" and (args.graphs or args.tf32):
        parser.error("--graphs and --tf32 need --device cuda")
    return args


def main() -> None:
    """Run the command."""
    args = parse_args()
    logger = MMLogger.get_instance(NAME)
    settings = Settings(args.device, args.autocast, args.rounds, args.compile, args.graphs, args.tf32)
    machine = describe_machine(args.device)
    shapes = []
    for shape in args.images:
        text = "x".join(map(str, shape))
        logger.info("Measuring the time of %s.", text)
        times = run_fresh(measure_times, shape, tuple(args.steps), settings, threads=args.threads)
        memory = {}
        for model in MODELS if "training" in args.steps and not args.graphs else ():
            logger.info("Measuring the memory of %s, %s.", text, model)
            memory[model] = run_fresh(
                measure_memory, shape, model, settings, threads=args.threads, environment=MEMORY_ENVIRONMENT
            )
        shapes.append({"images": text, "times": times, "memory": memory})
    precision = "float32" if args.autocast == "none" else f"{args.autocast} autocast"
    precision += f"{', TF32' * args.tf32}, {args.threads} thread{'s' * (args.threads > 1)}"
    precision += f"{', torch.compile' * args.compile}{', CUDA graphs' * args.graphs}"
    hardware = machine.get("gpu", machine["cpu"])
    data = {"hardware": hardware, "precision": precision, "machine": machine, "shapes": shapes}
    write_results(args.out, NAME, data, report(data), draw(data))


if __name__ == "__main__":
    main()
