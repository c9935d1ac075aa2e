"""Count the parameters and FLOPs of a config's model and of its parts.

Model and image are on torch's meta device, so nothing is computed, and the largest model takes seconds on any machine.

FLOPs are multiply-adds, as in papers: half of the operations below. PyTorch's FlopCounterMode counts one forward pass
in "tensor" mode, in evaluation mode, for one image:

  convolution, linear layer   one multiply-add per product of weight and value
  grid_edge_weight            6 operations per element of the feature (manhattan: 4)
  grid_tree                   none (comparisons only)
  tree_scan                   6 operations per element (up or down only: 2)
  tree_selective_scan         33 + 2 R per element (up or down only: 29 + 2 R), R the rank of dt: the scan,
                              the projection of dt (2 R), softplus (2), decay (2), input (2), both layer norms (14),
                              skip connection (3) and gate (4)

As usual, other activations, norms, additions and resizing are not counted, nor is anything of variable size or almost
without multiplications. In two-stage detectors this is the selection of proposals (NMS) and RoIAlign: the heads get
test_cfg.rpn.max_per_img boxes, the mask head at most 100 of them, as in mmdet's own tool. Heads used in training only
have parameters but no FLOPs.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from grootvl_mm.apis import cli

# Height and width for which papers on each task report FLOPs.
DEFAULT_SHAPES = {"mmpretrain": (224, 224), "mmdet": (800, 1280), "mmseg": (512, 2048)}
# Parts whose children are listed separately.
OPENED = ("roi_head",)
MAX_MASKS = 100  # boxes per image that get a mask


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_config_arguments(parser)
    shapes = ", ".join(f"{height} {width} for {scope}" for scope, (height, width) in DEFAULT_SHAPES.items())
    parser.add_argument(
        "--shape",
        nargs=2,
        type=int,
        metavar=("H", "W"),
        help=f"height and width of the image in pixels (default: {shapes})",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the results to this JSON file (default: none)")
    args = parser.parse_args()
    if args.shape and min(args.shape) < 1:
        parser.error(f"--shape must be two positive numbers, got {args.shape[0]} {args.shape[1]}")
    return args


def count(cfg: Config, shape: Sequence[int] | None = None) -> dict[str, Any]:
    """Count one forward pass.

    Args:
        cfg: A detection, segmentation or classification config.
        shape: Height and width of the image; default: :data:`DEFAULT_SHAPES`.

    Returns:
        ``shape``; ``parts``, name to ``parameters`` and ``flops`` (multiply-adds); ``operators``, name to
        multiply-adds; ``total``, like a part.

    Raises:
        NotImplementedError, RuntimeError: The model does not run on the meta device, or not with this shape.
    """
    height, width = shape = tuple(shape or DEFAULT_SHAPES[cfg.default_scope])
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        # Built on the CPU, because some backbones read values (drop path rates) in their constructor.
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).eval().to("meta")
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            arguments = _detection_arguments(model, height, width) if cfg.default_scope == "mmdet" else ()
            model(torch.empty(1, 3, height, width), *arguments, mode="tensor")

    modules = {name: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()}
    operators = {str(operator): operations // 2 for operator, operations in counter.get_flop_counts()["Global"].items()}
    parts = {}
    for name, part in _parts(model):
        flops = _part_flops(modules, f"{type(model).__name__}.{name}")
        parameters = _count_parameters(part)
        if parameters or flops:
            parts[name] = {"parameters": parameters, "flops": flops}
    total = {"parameters": _count_parameters(model), "flops": modules["Global"]}
    rest = {key: total[key] - sum(part[key] for part in parts.values()) for key in total}
    if any(rest.values()):
        parts["(other)"] = rest
    return {"shape": list(shape), "parts": parts, "operators": operators, "total": total}


def _count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    parts = []
    for name, child in model.named_children():
        if name in OPENED:
            parts += [(f"{name}.{inner}", module) for inner, module in child.named_children()]
        else:
            parts.append((name, child))
    return parts


def _part_flops(modules: dict[str, int], part: str) -> int:
    """The FLOPs of a part; if it is never called as a module, the sum over its submodules."""
    if part in modules:
        return modules[part]
    inside = [name for name in modules if name.startswith(f"{part}.")]
    outermost = [name for name in inside if not any(name.startswith(f"{other}.") for other in inside)]
    return sum(modules[name] for name in outermost)


def _detection_arguments(detector: nn.Module, height: int, width: int) -> tuple:
    """The data samples of the image. Replaces those methods of a two-stage detector that depend on values."""
    from mmdet.models.roi_heads.mask_heads import FCNMaskHead
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    def propose(features: tuple[Tensor, ...], *args: Any, **kwargs: Any) -> list[InstanceData]:
        detector.rpn_head(features)
        return [InstanceData(bboxes=torch.empty(detector.rpn_head.test_cfg.max_per_img, 4))]

    def extractor(module: SingleRoIExtractor) -> Any:
        def extract(features: tuple[Tensor, ...], rois: Tensor, **kwargs: Any) -> Tensor:
            return features[0].new_empty(len(rois), module.out_channels, *module.roi_layers[0].output_size)

        return extract

    def mask_head(module: FCNMaskHead) -> Any:
        # In this mode a cascade passes all proposals to its mask heads, a plain RoI head the first 100.
        forward = module.forward

        def predict(features: Tensor) -> Tensor:
            masks = forward(features[:MAX_MASKS])
            return masks.new_empty(len(features), *masks.shape[1:])

        return predict

    if getattr(detector, "with_rpn", False):
        detector.rpn_head.predict = propose
    for module in detector.modules():
        if isinstance(module, SingleRoIExtractor):
            module.forward = extractor(module)
        elif isinstance(module, FCNMaskHead):
            module.forward = mask_head(module)
    shape = {f"{name}_shape": (height, width) for name in ("img", "ori", "pad", "batch_input")}
    return ([DetDataSample(metainfo={**shape, "scale_factor": (1.0, 1.0)})],)


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(width=None if Console().is_terminal else 100, highlight=False)
    height, width = result["shape"]
    table = Table("part", title=f"one image of {height}x{width}", box=box.ASCII2)
    table.add_column("parameters", justify="right")
    table.add_column("FLOPs", justify="right")
    table.add_column("share", justify="right")
    for name, part in [*result["parts"].items(), ("total", result["total"])]:
        if name == "total":
            table.add_section()
        share = part["flops"] / max(result["total"]["flops"], 1)
        table.add_row(name, f"{part['parameters'] / 1e6:.2f} M", _readable(part["flops"]), f"{share:.1%}")
    console.print(table)
    table = Table("operator", box=box.ASCII2)
    table.add_column("FLOPs", justify="right")
    for name, flops in sorted(result["operators"].items(), key=lambda item: -item[1]):
        table.add_row(name, _readable(flops))
    console.print(table)
    console.print("FLOPs are multiply-adds; see --help for what is counted.")


def _readable(flops: int) -> str:
    return f"{flops / 1e9:.2f} G" if flops >= 1e8 else f"{flops / 1e6:.2f} M"


def main() -> None:
    """Run the command."""
    args = parse_args()
    cfg = cli.load_config(args.config, args.cfg_options)
    try:
        result = count(cfg, args.shape)
    except (NotImplementedError, RuntimeError) as error:
        cli.fail(f"{args.config} does not run on the meta device, or not with this --shape: {cli.one_line(error)}")
    show(result)
    if args.json:
        with cli.output_file(args.json) as partial:
            partial.write_text(json.dumps({"config": Path(args.config).name, **result}, indent=2) + "\n")


if __name__ == "__main__":
    main()
