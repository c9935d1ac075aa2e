"""Draw the trees that GrootL builds over the tokens of a prompt: one row per layer, one arc per edge.

The large dot is the root, the last token of the prompt (with causal trees, the first). The width of an arc shows how
many tokens are connected to the root through it, its colour how many tokens it spans. Each row is labelled with the
mean number of edges between a token and the root. The output format depends on the suffix: .png, .pdf, or .html, a
self-contained page that highlights the path to the root of the token under the mouse.
"""

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Curve
from mmengine.logging import print_log

from grootvl_mm.apis import cli
from grootvl_mm.ops import Tree

COLORS = ("#5b6b7f", "#2a7ab9", "#e07b39", "#8e44ad", "#2e9e6b")  # of arcs that span 1, 2, 3, ... tokens
INK, QUIET = "#22272e", "#8a939e"
ROW = 78  # heights and widths are in points
ARC = 15  # height of an arc per token that it spans
MARGIN, LABELS, TOKENS = 26, 124, 20
CHARACTER = 7.3
MIN_STEP = 24
WIDEST = 4.5


class Drawn(NamedTuple):
    """The content of a drawing."""

    tokens: Sequence[str]
    parents: dict[int, list[int]]  # layer -> parent of each token, -1 for the root, which is the last one or the first


class Arc(NamedTuple):
    """One edge of a tree."""

    start: int
    end: int
    child: int
    width: float

    @property
    def span(self) -> int:
        """Number of tokens from one end to the other."""
        return self.end - self.start

    @property
    def color(self) -> str:
        """The colour for the span."""
        return COLORS[min(self.span, len(COLORS)) - 1]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of a GrootL or Mamba model, or folder of an adapter")
    parser.add_argument("text", help="the prompt, or - to read it from stdin")
    parser.add_argument("output", help="output file, .html, .png or .pdf")
    parser.add_argument(
        "--layers", type=int, nargs="+", metavar="N", help="layers to draw, counted from 0 (default: all)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=96, metavar="N", help="maximum length of the prompt (default: %(default)s)"
    )
    args = parser.parse_args()
    if Path(args.output).suffix not in (".html", ".png", ".pdf"):
        parser.error(f"the output file must end in .html, .png or .pdf, got {args.output!r}")
    if args.max_tokens < 2:
        parser.error(f"--max-tokens must be at least 2, got {args.max_tokens}")
    return args


def depths(parents: Sequence[int]) -> list[int]:
    """The number of edges between each token and the root."""
    found: list[int | None] = [None] * len(parents)
    for token in range(len(parents)):
        way = []
        while token >= 0 and found[token] is None:
            way.append(token)
            token = parents[token]
        depth = -1 if token < 0 else found[token]
        for passed in reversed(way):
            depth += 1
            found[passed] = depth
    return found


def arcs(parents: Sequence[int]) -> list[Arc]:
    """The edges of a tree; the more tokens are connected to the root through an edge, the wider it is."""
    passing = [1] * len(parents)
    for token in sorted(range(len(parents)), key=depths(parents).__getitem__, reverse=True):
        if parents[token] >= 0:
            passing[parents[token]] += passing[token]
    scale = WIDEST / len(parents) ** 0.5
    return [
        Arc(min(token, parent), max(token, parent), token, max(0.7, scale * passing[token] ** 0.5))
        for token, parent in enumerate(parents)
        if parent >= 0
    ]


def agreement(parents: dict[int, list[int]]) -> float | None:
    """The mean share of edges common to two layers, or None for a single layer."""
    edges = [{frozenset(edge) for edge in enumerate(row) if edge[1] >= 0} for row in parents.values()]
    shares = [len(one & other) / len(one) for index, one in enumerate(edges) for other in edges[:index]]
    return sum(shares) / len(shares) if shares else None


def find_trees(path: str, text: str, layers: Sequence[int] | None, max_tokens: int) -> Drawn:
    """The tokens of a text and the trees of a model over them."""
    import torch

    from grootvl_mm.language.data import encode_prompts
    from grootvl_mm.language.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(path)
    (ids,) = encode_prompts(tokenizer, [text])
    if not 2 <= len(ids) <= max_tokens:
        cli.fail(f"the text has {len(ids)} tokens; expected 2 to {max_tokens} (--max-tokens)")
    model = load_model(path)
    number = model.config.num_hidden_layers
    if wrong := sorted(set(layers or ()) - set(range(number))):
        cli.fail(f"--layers must be between 0 and {number - 1}, got {', '.join(map(str, wrong))}")
    with torch.no_grad():
        output = model(torch.tensor([ids]), prompt_lengths=torch.tensor([len(ids)]), output_trees=True, use_cache=False)
    chosen = {layer: output.trees[layer] for layer in (layers or range(number))}
    tokens = [tokenizer.decode([index]).replace("\n", "⏎").strip() or "␣" for index in ids]
    return Drawn(tokens, {layer: list_parents(tree, len(ids)) for layer, tree in chosen.items()})


def list_parents(tree: Tree | None, length: int) -> list[int]:
    """The parent of each token, -1 for the root; in a chain (``tree`` is None), it is the next token."""
    if tree is None:
        return [*range(1, length), -1]
    parents = tree.parent[0].tolist()
    parents[int(tree.order[0, 0])] = -1
    return parents


class Layout:
    """The layout, in points from the top left corner."""

    def __init__(self, drawn: Drawn) -> None:
        widths = [max(MIN_STEP, CHARACTER * len(token) + 9) for token in drawn.tokens]
        starts = [LABELS + sum(widths[:index]) for index in range(len(widths))]
        self.x = [start + width / 2 for start, width in zip(starts, widths, strict=True)]
        highest = max((arc.span for parents in drawn.parents.values() for arc in arcs(parents)), default=1)
        self.arc_height = min(ARC, (ROW - 24) / highest)
        self.baselines = {layer: ROW * (index + 1) for index, layer in enumerate(drawn.parents)}
        self.tokens = ROW * len(drawn.parents) + TOKENS
        words = "".join(text for _, text in legend(drawn)) + footnote(drawn)
        self.width = LABELS + max(sum(widths), 34 * len(legend(drawn)) + 5 * len(words)) + MARGIN
        self.legend = self.tokens + 30
        self.height = self.legend + 18

    def curve(self, arc: Arc, baseline: float) -> tuple[tuple[float, float], ...]:
        """The four points of the Bezier curve of an arc."""
        left, right = self.x[arc.start], self.x[arc.end]
        top = baseline - 5 - self.arc_height * arc.span * 4 / 3
        inset = 0.12 * (right - left)
        return (left, baseline - 5), (left + inset, top), (right - inset, top), (right, baseline - 5)


def legend(drawn: Drawn) -> list[tuple[str, str]]:
    """Colours and their meanings."""
    spans = sorted({min(arc.span, len(COLORS)) for parents in drawn.parents.values() for arc in arcs(parents)})
    return [(COLORS[span - 1], "next token" if span == 1 else f"{span} tokens apart") for span in spans]


def footnote(drawn: Drawn) -> str:
    """The mean depth of a chain and the agreement of the layers."""
    share = agreement(drawn.parents)
    shared = "" if share is None else f" · two layers share {share:.0%} of their edges"
    return f"a chain has {(len(drawn.tokens) - 1) / 2:.1f} edges to the root{shared}"


def to_figure(drawn: Drawn) -> Figure:
    """Draw with Matplotlib."""
    layout = Layout(drawn)
    figure = Figure(figsize=(layout.width / 72, layout.height / 72), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, layout.width), ylim=(layout.height, 0))
    axes.axis("off")
    for layer, parents in drawn.parents.items():
        baseline = layout.baselines[layer]
        for arc in sorted(arcs(parents), key=lambda arc: -arc.width):
            curve = Curve(layout.curve(arc, baseline), [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
            style = {"edgecolor": arc.color, "linewidth": arc.width, "capstyle": "round"}
            axes.add_patch(PathPatch(curve, fill=False, gid=f"arc-{layer}-{arc.child}", **style))
        root = parents.index(-1)
        axes.plot(layout.x, [baseline] * len(parents), "o", color=QUIET, markersize=3, markeredgewidth=0)
        axes.plot(layout.x[root], baseline, "o", color=INK, markersize=7, markeredgewidth=0)
        detail = f"{sum(depths(parents)) / len(parents):.1f} edges to the root"
        axes.text(MARGIN / 2, baseline - 15, f"layer {layer}", color=INK, fontsize=10, fontweight="bold", va="center")
        axes.text(MARGIN / 2, baseline - 2, detail, color=QUIET, fontsize=8, va="center")
    style = {"color": INK, "fontsize": 10, "family": "monospace", "ha": "center", "va": "center", "parse_math": False}
    for index, (x, token) in enumerate(zip(layout.x, drawn.tokens, strict=True)):
        axes.text(x, layout.tokens, token, gid=f"token-{index}", **style)
    x = float(LABELS)
    for color, text in legend(drawn):
        axes.plot([x, x + 18], [layout.legend] * 2, color=color, linewidth=2.5, solid_capstyle="round")
        axes.text(x + 24, layout.legend, text, color=QUIET, fontsize=8, va="center")
        x += 34 + 5 * len(text)
    axes.text(x + 8, layout.legend, footnote(drawn), color=QUIET, fontsize=8, va="center")
    return figure


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Trees over a text</title><style>
body {{ margin: 2rem; font-family: system-ui, sans-serif; color: {ink}; background: #fff; }}
h1 {{ font-size: 1.15rem; margin: 0 0 .3rem; }} p {{ color: {quiet}; margin: 0 0 1rem; max-width: 48rem; }}
.scroll {{ overflow-x: auto; border: 1px solid #e3e6ea; border-radius: 8px; padding: .4rem; }}
[id^=token] {{ cursor: default; }}
.lit [id^=arc] {{ opacity: .12; }} .lit [id^=token] {{ opacity: .3; }} .lit .on {{ opacity: 1; }}
</style></head><body><h1>Trees over a text</h1>
<p>The large dot is the root. The wider an arc, the more tokens are connected to the root through it. Hover over a token
to see its path to the root in each layer.</p><div class="scroll">{svg}</div><script>
const parents = {parents};
const svg = document.querySelector("svg");
function light(token) {{
  const path = [`token-${{token}}`];
  for (const [layer, row] of Object.entries(parents))
    for (let at = token; row[at] >= 0; at = row[at]) path.push(`arc-${{layer}}-${{at}}`);
  svg.classList.add("lit");
  for (const id of path) document.getElementById(id).classList.add("on");
}}
function dim() {{
  svg.classList.remove("lit");
  svg.querySelectorAll(".on").forEach((part) => part.classList.remove("on"));
}}
svg.querySelectorAll("[id^=token]").forEach((part) => {{
  part.addEventListener("mouseenter", () => light(Number(part.id.split("-")[1])));
  part.addEventListener("mouseleave", dim);
}});
</script></body></html>
"""


def to_html(drawn: Drawn) -> str:
    """Draw as a self-contained HTML page with Matplotlib's SVG, in which arcs and tokens have ids."""
    written = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):
        to_figure(drawn).savefig(written, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = written.getvalue()
    return PAGE.format(svg=svg[svg.index("<svg") :], parents=json.dumps(drawn.parents), ink=INK, quiet=QUIET)


def main() -> None:
    """Run the command."""
    args = parse_args()
    text = sys.stdin.read() if args.text == "-" else args.text
    with cli.language_errors():
        drawn = find_trees(args.model, text, args.layers, args.max_tokens)
    with cli.output_file(args.output) as partial:
        if partial.suffix == ".html":
            partial.write_text(to_html(drawn), encoding="utf-8")
        else:
            to_figure(drawn).savefig(partial, dpi=160)
    print_log(f"Wrote the trees to {args.output}")


if __name__ == "__main__":
    main()
