"""Measure how robust a model's trees and features are to small changes of an image, and how they behave at extremes.

- Noise, JPEG, brightness and sub-pixel shifts: the share of tree edges that change, and the relative change of the
  feature maps (norm of the difference over the norm), for each metric and root with the same weights. The features are
  also computed with the trees of the unchanged image, to separate the effect of the trees.
- Adversarial images: within a few grey levels, gradient ascent raises the weights of tree edges and lowers the others;
  compared with random noise of the same size.
- Other trees for the same image: other metrics, another root, maximum and random spanning trees, the raster path.
- Constant images and checkerboards, where all neighbours are equally similar: whether the tree is deterministic.
- Gradients through the depth, decays close to 1 and 0, and 16-bit autocast.

All results are checked for non-finite values; if there are any, the exit status is 1.
"""

import argparse
import functools
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from measuring import add_output_argument, at_least, format_table, write_results
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from tree_measures import (
    Level,
    add_model_arguments,
    agreement,
    build_model,
    edge_mask,
    metric_weight,
    normalize,
    pixel_statistics,
    read_picture,
    watch_levels,
)

from grootvl_mm.apis import cli
from grootvl_mm.apis.images import find_images
from grootvl_mm.models import TreeSSM
from grootvl_mm.models.tree_ssm import ROOTS, SCANS
from grootvl_mm.ops import Tree
from grootvl_mm.ops.reference import edge_weight
from grootvl_mm.ops.tree import METRICS
from grootvl_mm.visualization import find_backbone

NAME = "robustness"
ASCENT_STEPS = 12
DECAYS = {"unchanged": None, "almost 1": -20.0, "almost 0": 10.0}  # A_log of all blocks
Picture = np.ndarray


class Seen(NamedTuple):
    """The trees and feature maps of an image."""

    levels: list[Level]
    maps: tuple[Tensor, ...]


def add_noise(picture: Picture, scale: float) -> Picture:
    """Add Gaussian noise; ``scale`` is its standard deviation in grey levels."""
    noise = np.random.default_rng(0).normal(0, scale, picture.shape)
    return np.clip(picture + noise, 0, 255)


def compress(picture: Picture, quality: int) -> Picture:
    """Compress to JPEG and decompress."""
    buffer = io.BytesIO()
    Image.fromarray(picture[..., ::-1].astype(np.uint8)).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))[..., ::-1]


def brighten(picture: Picture, factor: float) -> Picture:
    """Multiply the grey levels by a factor and clip them."""
    return np.clip(picture.astype(float) * factor, 0, 255)


def shift(picture: Picture, pixels: float) -> Picture:
    """Shift to the right with linear interpolation; the first column is repeated."""
    columns = np.clip(np.arange(picture.shape[1]) - pixels, 0, None)
    left = columns.astype(int)
    share = (columns - left)[None, :, None]
    right = np.minimum(left + 1, picture.shape[1] - 1)
    return (1 - share) * picture[:, left] + share * picture[:, right]


CHANGES: dict[str, tuple[Callable[..., Picture], float]] = {
    "noise 2": (add_noise, 2),
    "noise 8": (add_noise, 8),
    "noise 32": (add_noise, 32),
    "JPEG 90": (compress, 90),
    "JPEG 50": (compress, 50),
    "JPEG 10": (compress, 10),
    "brightness 0.5": (brighten, 0.5),
    "brightness 1.5": (brighten, 1.5),
    "shift 0.25": (shift, 0.25),
    "shift 0.5": (shift, 0.5),
    "shift 1": (shift, 1),
}


def synthetic_pictures(size: int) -> dict[str, Picture]:
    """Images full of ties."""
    rows, columns = np.indices((size, size))
    pictures = {name: np.full((size, size, 3), value, np.uint8) for name, value in (("black", 0), ("grey", 128))}
    for period in (1, 4, 16):
        board = ((rows // period + columns // period) % 2 * 255).astype(np.uint8)
        pictures[f"checkerboard {period}"] = np.repeat(board[:, :, None], 3, axis=2)
    return pictures


class Finite:
    """Counts the values checked, and non-finite ones by place."""

    def __init__(self) -> None:
        self.checked = 0
        self.wrong: dict[str, int] = {}

    def check(self, where: str, *tensors: Tensor) -> None:
        """Check some tensors."""
        for tensor in tensors:
            self.checked += tensor.numel()
            count = int((~tensor.isfinite()).sum())
            if count:
                self.wrong[where] = self.wrong.get(where, 0) + count


def look(model: nn.Module, image: Tensor, choose: Callable[[int, Tree], Tree] | None = None) -> Seen:
    """Run the backbone."""
    with watch_levels(model, choose) as levels, torch.no_grad():
        maps = find_backbone(model)(image)
    return Seen(levels, maps)


def look_with_trees(model: nn.Module, image: Tensor, levels: Sequence[Level]) -> Seen:
    """Run the backbone along given trees."""
    return look(model, image, lambda number, _: levels[number].tree)


def changed_edges(before: Seen, after: Seen) -> float:
    """The share of tree edges that are gone, averaged over the blocks."""
    shares = [1 - agreement(one.tree, other.tree) for one, other in zip(before.levels, after.levels, strict=True)]
    return float(np.mean(shares))


def moved(before: Seen, after: Seen) -> float:
    """The relative change of the feature maps (norm of the difference over the norm), averaged over the stages."""
    pairs = zip(before.maps, after.maps, strict=True)
    return float(np.mean([float((one.float() - other.float()).norm() / one.float().norm()) for one, other in pairs]))


def compare(model: nn.Module, before: Seen, image: Tensor, finite: Finite, where: str) -> dict[str, float]:
    """Changes of trees and features, and changes of the features along the old trees."""
    after, kept = look(model, image), look_with_trees(model, image, before.levels)
    finite.check(where, *after.maps, *kept.maps)
    return {"edges": changed_edges(before, after), "moved": moved(before, after), "with old trees": moved(before, kept)}


def set_option(model: nn.Module, name: str, value: str) -> None:
    """Set an option of all blocks."""
    for module in model.modules():
        if isinstance(module, TreeSSM):
            setattr(module, name, value)


def measure_changes(model: nn.Module, pictures: Sequence[Picture], finite: Finite) -> dict[str, Any]:
    """Effects of each change for each metric and root, averaged over the images."""
    mixer = find_backbone(model).stages[0].blocks[0].mixer
    own = mixer.tree_metric, mixer.tree_root
    variants = [own, *((metric, own[1]) for metric in METRICS if metric != own[0])]
    variants += [(own[0], root) for root in ROOTS if root != own[1]]
    results = {}
    for metric, root in tqdm(variants, desc="changes", unit="variant"):
        set_option(model, "tree_metric", metric)
        set_option(model, "tree_root", root)
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for picture in pictures:
            before = look(model, normalize(model, picture))
            for name, (change, amount) in CHANGES.items():
                image = normalize(model, change(picture, amount))
                for what, value in compare(model, before, image, finite, f"{name}, {metric}").items():
                    found[name][what].append(value)
        results[f"{metric}, {root}"] = means(found)
    set_option(model, "tree_metric", own[0])
    set_option(model, "tree_root", own[1])
    return results


def measure_other_trees(model: nn.Module, pictures: Sequence[Picture], finite: Finite) -> dict[str, Any]:
    """Changes of the features of the same images along other trees, with the same weights."""
    mixer = find_backbone(model).stages[0].blocks[0].mixer
    own = {name: getattr(mixer, name) for name in ("tree_metric", "tree_root", "scan")}
    others = [("tree_metric", metric) for metric in METRICS] + [("tree_root", root) for root in ROOTS]
    others += [("scan", scan) for scan in SCANS]
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for picture in pictures:
        image = normalize(model, picture)
        before = look(model, image)
        for option, value in others:
            if value != own[option]:
                set_option(model, option, value)
                after = look(model, image)
                finite.check(f"{option} {value}", *after.maps)
                found[value]["edges"].append(changed_edges(before, after))
                found[value]["moved"].append(moved(before, after))
                set_option(model, option, own[option])
    return means(found)


def means(found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Average the innermost lists."""
    return {name: {what: float(np.mean(values)) for what, values in row.items()} for name, row in found.items()}


def attack(model: nn.Module, picture: Picture, before: Seen, limit: float) -> Tensor:
    """Find the image within ``limit`` grey levels whose edge weights contradict the trees of ``picture`` most.

    Projected gradient ascent on the sign of the gradient (Madry et al.); all blocks have equal influence.
    """
    metric = find_backbone(model).stages[0].blocks[0].mixer.tree_metric
    mean, std = pixel_statistics(model)
    clean = normalize(model, picture)
    low, high = (
        torch.maximum(clean - limit / std, -mean / std),
        torch.minimum(clean + limit / std, (255 - mean) / std),
    )
    masks = [edge_mask(level.tree, level.feature.shape[3]) for level in before.levels]
    generator = torch.Generator().manual_seed(0)
    image = clean + limit / std * (2 * torch.rand(clean.shape, generator=generator) - 1) / 2
    for _ in range(ASCENT_STEPS):
        image = image.clamp(low, high).detach().requires_grad_()
        with watch_levels(model) as found:
            find_backbone(model)(image)
        gain = torch.zeros(())
        for level, mask in zip(found, masks, strict=True):
            weight = edge_weight(level.feature, metric, log=True)
            scale = weight.detach().std() + 1e-12
            gain = gain + (weight[mask].mean() - weight[~mask].mean()) / scale
        (gradient,) = torch.autograd.grad(gain, image)
        image = image.detach() + 2.5 * limit / ASCENT_STEPS / std * gradient.sign()
    return image.clamp(low, high).detach()


def measure_attacks(model: nn.Module, pictures: Sequence[Picture], finite: Finite) -> dict[str, Any]:
    """Effects of adversarial and random changes, by the maximum change in grey levels."""
    _, std = pixel_statistics(model)
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    for limit in tqdm((1, 2, 4, 8), desc="attacks", unit="size"):
        found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for picture in pictures:
            clean = normalize(model, picture)
            before = look(model, clean)
            sign = torch.rand(clean.shape, generator=torch.Generator().manual_seed(1)).sub(0.5).sign()
            images = {"ascent": attack(model, picture, before, limit), "random": clean + limit / std * sign}
            for name, image in images.items():
                for what, value in compare(model, before, image, finite, f"{name} {limit}").items():
                    found[name][what].append(value)
        results[str(limit)] = means(found)
    return results


def measure_ties(model: nn.Module, size: int, finite: Finite) -> dict[str, Any]:
    """Trees of synthetic images: ties, depth, and whether they are the same when repeated and in a batch."""
    metric = find_backbone(model).stages[0].blocks[0].mixer.tree_metric
    results = {}
    for name, picture in synthetic_pictures(size).items():
        image = normalize(model, picture)
        alone, again = look(model, image), look(model, image)
        batch = look(model, torch.cat([torch.randn_like(image), image]))
        noisy = look(model, normalize(model, add_noise(picture, 1)))
        finite.check(name, *alone.maps, *noisy.maps)
        weights = [metric_weight(level.feature, metric)[0] for level in alone.levels]
        parents = [[level.tree.parent for level in seen.levels] for seen in (alone, again, batch)]
        in_batch = [torch.equal(one[0], other[1]) for one, other in zip(parents[0], parents[2], strict=True)]
        results[name] = {
            "ties": float(np.mean([1 - len(weight.unique()) / max(len(weight), 1) for weight in weights])),
            "same again": all(map(torch.equal, parents[0], parents[1])),
            "same in a batch": all(in_batch),
            "depth": int(max(int(level.tree.depth().max()) for level in alone.levels)),
            "edges changed by noise 1": changed_edges(alone, noisy),
        }
    return results


def keep_output(outputs: list[Tensor], block: nn.Module, inputs: Any, output: Any) -> None:
    """Forward hook of a block."""
    outputs.append(output[0])


def measure_gradients(model: nn.Module, image: Tensor, finite: Finite) -> dict[str, list[float]]:
    """Gradient norms at each block's output, relative to the last block's, for each scan with the same weights."""
    backbone = find_backbone(model)
    blocks = [block for stage in backbone.stages for block in stage.blocks]
    results = {}
    for scan in SCANS:
        set_option(model, "scan", scan)
        outputs: list[Tensor] = []
        keep = functools.partial(keep_output, outputs)
        handles = [block.register_forward_hook(keep) for block in blocks]
        generator = torch.Generator().manual_seed(0)
        last = backbone(image)[-1]
        # A random projection: the gradient of the mean square would almost vanish in the last norm.
        loss = (last * torch.randn(last.shape, generator=generator)).mean()
        gradients = torch.autograd.grad(loss, [*outputs, *backbone.parameters()], allow_unused=True)
        finite.check(f"gradients, {scan}", *(gradient for gradient in gradients if gradient is not None))
        norms = [float(gradient.norm()) for gradient in gradients[: len(outputs)]]
        results[scan] = [norm / norms[-1] for norm in norms]
        for handle in handles:
            handle.remove()
    set_option(model, "scan", "tree")
    return results


def measure_decays(model: nn.Module, image: Tensor, finite: Finite) -> dict[str, dict[str, float]]:
    """The largest feature and gradient with decays close to 1 and 0 everywhere, and the change of the features."""
    backbone = find_backbone(model)
    values = [module.A_log for module in backbone.modules() if isinstance(module, TreeSSM)]
    kept = [value.detach().clone() for value in values]
    before = look(model, image)
    results = {}
    for name, logarithm in DECAYS.items():
        for value, own in zip(values, kept, strict=True):
            value.data = own.clone() if logarithm is None else torch.full_like(own, logarithm)
        maps = backbone(image)
        loss = sum(feature.square().mean() for feature in maps)
        gradients = torch.autograd.grad(loss, list(backbone.parameters()), allow_unused=True)
        gradients = [gradient for gradient in gradients if gradient is not None]
        finite.check(f"decays {name}", *maps, *gradients)
        results[name] = {
            "moved": moved(before, Seen([], tuple(feature.detach() for feature in maps))),
            "largest feature": max(float(feature.detach().abs().max()) for feature in maps),
            "largest gradient": max(float(gradient.abs().max()) for gradient in gradients),
        }
    for value, own in zip(values, kept, strict=True):
        value.data = own
    return results


def measure_precisions(model: nn.Module, image: Tensor, finite: Finite) -> dict[str, dict[str, float]]:
    """Changes of trees and features under autocast, compared with float32."""
    before = look(model, image)
    results = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        with torch.autocast("cpu", dtype=dtype):
            results[name] = compare(model, before, image, finite, f"{name} autocast")
    return results


def yes_no(value: bool) -> str:
    """Format a boolean for tables."""
    return "yes" if value else "no"


def report(data: dict[str, Any]) -> str:
    """The results as text."""
    percent = "{:.1f} %".format
    lines = [f"{data['config']}, {data['checkpoint']}, {data['count']} images"]
    header = ["change", "edges changed", "features changed", "with the old trees"]
    tables = {f"metric and root: {variant}": rows for variant, rows in data["changes"].items()}
    tables["adversarial and random images, by grey levels"] = {
        f"{name} {limit}": row for limit, found in data["attacks"].items() for name, row in found.items()
    }
    tables["autocast"] = data["precisions"]
    for title, rows in tables.items():
        cells = [[name, *(percent(100 * row[what]) for what in ("edges", "moved", "with old trees"))]
                 for name, row in rows.items()]  # fmt: skip
        lines += ["", title, format_table(header, cells)]
    rows = [
        [name, percent(100 * row["edges"]), percent(100 * row["moved"])] for name, row in data["other trees"].items()
    ]
    lines += ["", "the same images along other trees", format_table(["trees", *header[1:3]], rows)]
    rows = [
        [name, percent(100 * row["ties"]), yes_no(row["same again"]), yes_no(row["same in a batch"]),
         str(row["depth"]), percent(100 * row["edges changed by noise 1"])]
        for name, row in data["ties"].items()
    ]  # fmt: skip
    header = ["image", "tied edge weights", "same tree again", "in a batch", "depth", "changed by noise 1"]
    lines += ["", "images full of ties", format_table(header, rows)]
    blocks = [str(number) for number in range(len(next(iter(data["gradients"].values()))))]
    rows = [[scan, *(f"{norm:.2f}" for norm in norms)] for scan, norms in data["gradients"].items()]
    lines += [
        "",
        "gradient norm at each block's output, last = 1",
        format_table(["scan", *blocks], rows),
    ]
    rows = [
        [name, percent(100 * row["moved"]), *(f"{row[f'largest {what}']:.3g}" for what in ("feature", "gradient"))]
        for name, row in data["decays"].items()
    ]
    header = ["decays", "features changed", "largest feature", "largest gradient"]
    lines += ["", "extreme decays", format_table(header, rows)]
    wrong = ", ".join(f"{count} at {where}" for where, count in data["not finite"].items()) or "none"
    lines += ["", f"non-finite values: {wrong}, of {data['checked']:,}"]
    return "\n".join(lines) + "\n"


def draw(data: dict[str, Any]) -> Figure:
    """Plot changes of edges and features, adversarial images, and gradients by depth."""
    figure = Figure(figsize=(14, 8), layout="constrained")
    (edges, features), (attacks, gradients) = figure.subplots(2, 2)
    positions = np.arange(len(CHANGES))
    width = 0.8 / len(data["changes"])
    for number, (variant, rows) in enumerate(data["changes"].items()):
        edges.bar(positions + number * width, [100 * rows[name]["edges"] for name in CHANGES], width, label=variant)
    rows = next(iter(data["changes"].values()))
    for shift, what, label in ((0, "moved", "new trees"), (0.4, "with old trees", "trees of the original image")):
        features.bar(positions + shift, [100 * rows[name][what] for name in CHANGES], 0.4, label=label)
    for axes, title in ((edges, "Tree edges that change"), (features, "Change of the features")):
        axes.set_xticks(positions + 0.3, list(CHANGES), rotation=45, ha="right", fontsize=8)
        axes.set(title=title, ylabel="%")
    sizes = [int(limit) for limit in data["attacks"]]
    for name, title, style in (("ascent", "adversarial", "o-"), ("random", "random signs", "s--")):
        labels = ("edges", "features, new trees", "features, original trees")
        keys, colours = ("edges", "moved", "with old trees"), ("tab:blue", "tab:red", "tab:orange")
        for what, label, colour in zip(keys, labels, colours, strict=True):
            values = [100 * found[name][what] for found in data["attacks"].values()]
            attacks.plot(sizes, values, style, color=colour, label=f"{title}: {label}")
    attacks.set(title="Change by adversarial images and random signs", ylabel="%", ylim=(0, None))
    attacks.set_xlabel("largest change of a pixel, grey levels")
    for scan, norms in data["gradients"].items():
        gradients.semilogy(norms, "o-", label=scan)
        gradients.set_xticks(range(len(norms)))
    gradients.set(title="Gradient with respect to the output of each block", ylabel="norm, relative to the last block")
    gradients.set_xlabel("block, counted through all stages from 0")
    for axes, title in zip(figure.axes, ("metric, root", "scanned along", None, "scan"), strict=True):
        axes.legend(title=title, fontsize=8)
    return figure


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_arguments(parser)
    parser.add_argument("--images", nargs="+", required=True, metavar="IMAGE", help="image files, or folders of images")
    parser.add_argument(
        "--number", type=at_least(1), default=8, metavar="N", help="number of images to use (default: %(default)s)"
    )
    add_output_argument(parser, NAME)
    args = parser.parse_args()
    if len(args.checkpoints) > 1:
        parser.error(f"--checkpoints takes a single checkpoint here, got {len(args.checkpoints)}")
    return args


def main() -> None:
    """Run the command."""
    args = parse_args()
    model = build_model(cli.load_config(args.config, args.cfg_options), args.checkpoints[0])
    if find_backbone(model).stages[0].share_tree or find_backbone(model).stages[0].blocks[0].mixer.scan != "tree":
        cli.fail("the config's backbone must have scan='tree' and tree_sharing='block'")
    files = find_images(args.images)[: args.number]
    pictures = [read_picture(path, args.longest) for path in files]
    image = normalize(model, pictures[0])
    finite = Finite()
    data = {
        "config": Path(args.config).stem,
        "checkpoint": args.checkpoints[0],
        "count": len(pictures),
        "changes": measure_changes(model, pictures, finite),
        "other trees": measure_other_trees(model, pictures, finite),
        "attacks": measure_attacks(model, pictures, finite),
        "ties": measure_ties(model, max(pictures[0].shape[:2]), finite),
        "gradients": measure_gradients(model, image, finite),
        "decays": measure_decays(model, image, finite),
        "precisions": measure_precisions(model, image, finite),
    }
    data |= {"not finite": finite.wrong, "checked": finite.checked}
    write_results(args.out, NAME, data, report(data), draw(data))
    if finite.wrong:
        cli.fail("there are non-finite values; see the end of the report")


if __name__ == "__main__":
    main()
