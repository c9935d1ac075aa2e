"""Count the parameters and FLOPs of the model of a config, part by part.

Nothing is computed: the model and the image have shapes but no values (torch's meta device), so that the largest model
is counted in seconds on any machine.

What is counted. FLOPs are multiply-adds, as papers count them: half of the single operations below. PyTorch's counter
finds them in one forward pass of the model in its "tensor" mode, in evaluation mode, for one image:

  convolution, linear layer   one multiply-add for each weight that meets a value
  grid_edge_weight            6 operations for each element of the feature (manhattan: 4)
  grid_tree                   none: it compares, it does not calculate
  tree_scan                   6 operations for each element (up or down only: 2)
  tree_selective_scan         33 + 2 R for each element (up or down only: 29 + 2 R), R the rank of dt: the scan,
                              the projection of dt (2 R), softplus (2), decay (2), input (2), both layer norms (14),
                              skip connection (3) and gate (4)

Not counted, as usual: activations, norms, additions and resizing outside of these, and what has no fixed size or no
multiplications to speak of. For a two-stage detector that is the choice of the proposals (NMS) and RoIAlign: its heads
get as many boxes as the config lets through (test_cfg.rpn.max_per_img), the mask head at most 100 of them, as mmdet's
own tool counts. Heads that only training uses have parameters but no FLOPs.
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

# Height and width for which the task's papers state FLOPs.
DEFAULT_SHAPES = {"mmpretrain": (224, 224), "mmdet": (800, 1280), "mmseg": (512, 2048)}
# Parts whose children are counted one by one.
OPENED = ("roi_head",)
MAX_MASKS = 100  # boxes of an image whose masks are made


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_config_arguments(parser)
    shapes = ", ".join(f"{height} {width} for {scope}" for scope, (height, width) in DEFAULT_SHAPES.items())
    parser.add_argument(
        "--shape", nargs=2, type=int, metavar=("H", "W"), help=f"height and width of the image (default: {shapes})"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures to a JSON file too")
    args = parser.parse_args()
    if args.shape and min(args.shape) < 1:
        parser.error(f"--shape takes two positive numbers, got {args.shape[0]} {args.shape[1]}")
    return args


def count(cfg: Config, shape: Sequence[int] | None = None) -> dict[str, Any]:
    """Count one forward pass.

    Args:
        cfg: A config of one of the three tasks.
        shape: Height and width of the image, by default that of :data:`DEFAULT_SHAPES`.

    Returns:
        ``shape``; ``parts``, name to ``parameters`` and ``flops`` (multiply-adds); ``operators``, name to
        multiply-adds; ``total``, as a part.

    Raises:
        NotImplementedError, RuntimeError: The model does not run without values, or not with this shape.
    """
    height, width = shape = tuple(shape or DEFAULT_SHAPES[cfg.default_scope])
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        # Not built on the meta device: some backbones read values, of their drop path, while they are built.
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
    """The FLOPs of a part: its own, or, where it is not called as a module itself, those of the modules in it."""
    if part in modules:
        return modules[part]
    inside = [name for name in modules if name.startswith(f"{part}.")]
    outermost = [name for name in inside if not any(name.startswith(f"{other}.") for other in inside)]
    return sum(modules[name] for name in outermost)


def _detection_arguments(detector: nn.Module, height: int, width: int) -> tuple:
    """The data samples of the image; what depends on values in a two-stage detector is taken out of it."""
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
        # A cascade gives all proposals to its mask heads in this mode, a plain RoI head the first 100.
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
    """Write the tables to the standard output."""
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
    console.print("FLOPs are multiply-adds; --help states what is counted.")


def _readable(flops: int) -> str:
    return f"{flops / 1e9:.2f} G" if flops >= 1e8 else f"{flops / 1e6:.2f} M"


def main() -> None:
    """Run the command."""
    args = parse_args()
    cfg = cli.load_config(args.config, args.cfg_options)
    try:
        result = count(cfg, args.shape)
    except (NotImplementedError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        cli.fail(f"{args.config} does not run on shapes alone, or not on images of this size: {reason}")
    show(result)
    if args.json:
        try:
            Path(args.json).write_text(json.dumps({"config": Path(args.config).name, **result}, indent=2) + "\n")
        except OSError as error:
            cli.fail(f"cannot write {args.json}: {error.strerror}")


if __name__ == "__main__":
    main()
