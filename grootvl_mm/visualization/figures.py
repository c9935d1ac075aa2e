"""Figures of trees and affinities over the preprocessed image."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colorbar import Colorbar
from matplotlib.colors import ListedColormap, LogNorm, Normalize, hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from grootvl_mm.layers.padding import LARGEST_WEIGHT
from grootvl_mm.ops import Tree
from grootvl_mm.visualization.paths import affinity, compared_scans, cut_segments, join_ranks, parent_edges
from grootvl_mm.visualization.recorder import TreeRecord

COLORS = ("order", "weight", "depth")
SCALES = ("auto", "log", "linear")
PANEL = 3.2  # inches
MARKER = "#ff2d87"
# Inches: between panels, above each panel, above the figure, and below it or beside a panel for a colour bar.
_GAP, _HEADING, _TITLE, _SCALE, _SCALE_MARGIN = 0.08, 0.24, 0.32, 0.72, 0.4
_LEAST_WIDTH = 6.4  # for the labels of colour bars
_LABELS = {
    "order": "rank of the edge by weight: first (similar) to last (dissimilar)",
    "weight": "edge weight",
    "depth": "edges to the root",
}
# Without the darkest colours, which would be invisible on a dark image.
_EDGE_MAP, _DEPTH_MAP = (
    ListedColormap(mpl.colormaps[name](np.linspace(0.18, 1, 256)), name) for name in ("plasma", "viridis")
)
_AFFINITY_MAP = mpl.colormaps["inferno"]
_TINT = 0.45  # opacity of segments, except for the largest, which is transparent
_OPACITY = 0.75
_LEAST = 1e-3  # lower end of the logarithmic scale of affinities
_OUTSIDE, _BORDER = "#b8b8b8", "white"
_PADDING_GREY = 220
_MANY = 4000  # lines, from which on a PDF is smaller with pixels
_BACKGROUND = 0.45  # brightness of the image below edges


class Picture(NamedTuple):
    """The image to draw over.

    Attributes:
        pixels: (H, W, 3) uint8, RGB, the preprocessed image with its padding.
        size: Height and width without padding.
    """

    pixels: np.ndarray
    size: tuple[int, int]

    @classmethod
    def of(cls, content: Tensor, size: tuple[int, int] | None = None) -> "Picture":
        """Create a picture from the output of the hosts' pipelines, (C, H, W), BGR or grey, uint8 or normalized."""
        pixels = content.permute(1, 2, 0).numpy(force=True)
        if pixels.dtype != np.uint8:
            low, high = pixels.min(), pixels.max()
            pixels = ((pixels - low) / max(high - low, 1e-6) * 255).round().astype(np.uint8)
        pixels = pixels[..., ::-1] if pixels.shape[2] == 3 else pixels[..., :1].repeat(3, axis=2)
        return cls(pixels, size or pixels.shape[:2])

    def padded(self, height: int, width: int) -> "Picture":
        """Pad with light grey at the right and bottom to a height and width."""
        margins = [(0, height - self.pixels.shape[0]), (0, width - self.pixels.shape[1]), (0, 0)]
        return self._replace(pixels=np.pad(self.pixels, margins, constant_values=_PADDING_GREY))


def draw_trees(
    records: Sequence[TreeRecord],
    picture: Picture,
    color: str = "order",
    cut_share: float = 0.05,
    image: int = 0,
    title: str | None = None,
    panel: float = PANEL,
) -> Figure:
    """Draw the tree of each record over the picture, and beside it the segments after cutting the heaviest edges.

    Args:
        records: Records of the image, or of a batch with it.
        picture: The image.
        color: What the edge colours show: ``order``, the rank of the edge by weight; ``weight``; or ``depth``, the
            distance to the root.
        cut_share: Share of the edges to cut, 0 to 1.
        image: Index of the image in the batch.
        title: Title of the figure.
        panel: Longer side of each panel in inches.

    Returns:
        The figure, with two panels per record.

    Raises:
        ValueError: ``color`` is unknown, ``cut_share`` is not in [0, 1], or there are no records.
    """
    if color not in COLORS:
        raise ValueError(f"color must be one of {', '.join(COLORS)}, got {color!r}")
    if not 0 <= cut_share <= 1:
        raise ValueError(f"cut_share must be between 0 and 1, got {cut_share}")
    if not records:
        raise ValueError("there are no records to draw")
    per_row = next(count for count, most in ((1, 2), (2, 8), (3, math.inf)) if len(records) <= most)
    rows = math.ceil(len(records) / per_row)
    margin = _SCALE_MARGIN if color == "weight" else 0.0  # each tree has its own colour bar
    figure, grid = _layout(picture, rows, 2 * per_row, panel, title, [margin, 0.0] * per_row)
    pairs = grid.reshape(-1, 2)
    for record, (left, right) in zip(records, pairs, strict=False):
        _draw_edges(left, record, picture, color, image, panel)
        segments = _draw_segments(right, record, picture, cut_share, image, panel)
        left.set_title(_name(record), loc="left", fontsize=9)
        right.set_title("1 segment" if segments == 1 else f"{segments} segments", loc="left", fontsize=9)
    if color != "weight":
        colors = ScalarMappable(Normalize(0, 1), _DEPTH_MAP if color == "depth" else _EDGE_MAP)
        bar = _add_scale(figure, colors, _LABELS[color])
        bar.set_ticks([0, 1], labels=["first", "last"] if color == "order" else ["root", "farthest"])
    return figure


def draw_affinity(
    record: TreeRecord,
    picture: Picture,
    positions: Sequence[tuple[float, float]],
    scale: str = "auto",
    image: int = 0,
    title: str | None = None,
    panel: float = PANEL,
) -> Figure:
    """Draw how much all positions contribute to given ones in the tree, raster and cross scans.

    All three use the decays of the record; only the paths between positions differ.

    Args:
        record: Record of the image, or of a batch with it.
        picture: The image.
        positions: (x, y) in pixels of the picture.
        scale: Colour scale: ``linear``; ``log``, from 0.001 at the lowest; or ``auto``, linear if all contributions
            exceed 0.05, otherwise logarithmic.
        image: Index of the image in the batch.
        title: Title of the figure.
        panel: Longer side of each panel in inches.

    Returns:
        The figure, one row per position.

    Raises:
        ValueError: A position is outside the picture, or ``scale`` is unknown.
    """
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
    vertices = [find_vertex(record, picture, position) for position in positions]
    scans = compared_scans(record)
    decay, inside = record.decay[image : image + 1], _inside(record, image)
    maps = {}
    for name, trees in scans.items():
        values = affinity([_one(tree, image) for tree in trees], decay, vertices, record.propagation)[0]
        maps[name] = np.where(inside, values.view(-1, *inside.shape).numpy(force=True), np.nan)
    figure, grid = _layout(picture, len(positions), 1 + len(scans), panel, title, [0.0] * (1 + len(scans)))
    norm = _norm(scale, min(float(np.nanmin(values)) for values in maps.values()))
    for row, (axes_row, (x, y)) in enumerate(zip(grid, positions, strict=True)):
        _show_picture(axes_row[0], picture.pixels)
        axes_row[0].plot(x, y, "o", color=MARKER, markeredgecolor="white", markersize=7)
        for axes, (name, values) in zip(axes_row[1:], maps.items(), strict=True):
            _show_map(axes, record, picture, values[row], norm)
            axes.plot(x, y, "o", color="none", markeredgecolor="white", markersize=7)
            if row == 0:
                axes.set_title(name, fontsize=10)
    grid[0, 0].set_title("image", fontsize=10)
    label = "contribution to the marked position: product of the decays on the path, mean over the channels"
    _add_scale(figure, ScalarMappable(norm, _AFFINITY_MAP), label)
    return figure


def to_array(figure: Figure, dpi: int) -> np.ndarray:
    """Render a figure to (H, W, 3) uint8, RGB."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def find_vertex(record: TreeRecord, picture: Picture, position: tuple[float, float]) -> int:
    """The vertex of a map at a position (x, y) of the picture, in pixels.

    Raises:
        ValueError: The position is outside the picture.
    """
    x, y = position
    height, width = picture.size
    if not (-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5):
        raise ValueError(f"the position ({x:g}, {y:g}) is outside the picture of {width}x{height} pixels")
    cell_width, cell_height = _cell(record, picture)
    column = min(max(int((x + 0.5) / cell_width), 0), record.width - 1)
    row = min(max(int((y + 0.5) / cell_height), 0), record.height - 1)
    return row * record.width + column


def _draw_edges(axes: Axes, record: TreeRecord, picture: Picture, color: str, image: int, panel: float) -> None:
    """Draw the edges as lines between the centres of the positions, the heaviest on top."""
    _show_picture(axes, _dimmed(picture))
    tree = _one(record.tree, image)
    edge = parent_edges(tree, record.height, record.width)[0].numpy(force=True)
    rank = join_ranks(tree, record.edge_weight[image : image + 1], record.height, record.width)[0].numpy(force=True)
    weight = _weights(record, image, edge)
    cell = _cell(record, picture)
    parent = tree.parent[0].numpy(force=True)
    ends = np.stack([np.arange(len(parent)), parent], axis=1)
    ends = (np.stack([ends % record.width, ends // record.width], axis=2) + 0.5) * cell - 0.5
    is_inside = (edge >= 0) & (weight <= LARGEST_WEIGHT)
    width = _line_width(record, picture, panel)
    outside = (rank > 0) & ~is_inside
    axes.add_collection(LineCollection(ends[outside], colors=_OUTSIDE, linewidths=width / 2, rasterized=True))

    chosen = np.flatnonzero(is_inside)[np.argsort(rank[is_inside])]
    values = {
        "order": lambda: np.arange(len(chosen)),
        "weight": lambda: weight[chosen],
        "depth": lambda: tree.depth()[0].numpy(force=True)[chosen],
    }[color]()
    lines = LineCollection(
        ends[chosen],
        array=values,
        cmap=_DEPTH_MAP if color == "depth" else _EDGE_MAP,
        linewidths=width,
        capstyle="round",
        rasterized=len(chosen) > _MANY,
    )
    axes.add_collection(lines)
    if color == "weight" and len(chosen):
        width = axes.figure.get_figwidth()
        box = axes.get_position()
        place = (box.x1 + 0.05 / width, box.y0 + 0.1 * box.height, 0.09 / width, 0.8 * box.height)
        bar = axes.figure.colorbar(lines, cax=axes.figure.add_axes(place))
        bar.ax.tick_params(labelsize=7)


def _draw_segments(axes: Axes, record: TreeRecord, picture: Picture, share: float, image: int, panel: float) -> int:
    """Draw the segments in different colours, with their borders; return their number."""
    inside = _inside(record, image)
    height, width = inside.shape
    outside = int((~inside).sum())  # as many edges lead to ignored padding, and they are the heaviest
    cuts = outside + round(share * (height * width - 1 - outside))
    tree, weight = _one(record.tree, image), record.edge_weight[image : image + 1]
    segments = cut_segments(tree, weight, height, width, cuts)[0].view(height, width).numpy(force=True)
    pixels = picture.pixels
    cell_width, cell_height = _cell(record, picture)
    columns = np.minimum((np.arange(pixels.shape[1]) / cell_width).astype(int), width - 1)
    rows = np.minimum((np.arange(pixels.shape[0]) / cell_height).astype(int), height - 1)
    tints = np.concatenate([hsv_to_rgb(_hues(cuts + 1)), np.full((cuts + 1, 1), _TINT)], axis=1)
    tints[np.bincount(segments[inside]).argmax(), 3] = 0
    colors = np.where(inside[..., None], tints[segments], 0)
    _show_picture(axes, pixels)
    axes.imshow(colors[rows[:, None], columns])

    borders = []
    for row, column in np.argwhere((segments[:-1] != segments[1:]) & inside[1:]):
        borders.append([(column, row + 1), (column + 1, row + 1)])
    for row, column in np.argwhere((segments[:, :-1] != segments[:, 1:]) & inside[:, 1:]):
        borders.append([(column + 1, row), (column + 1, row + 1)])
    ends = np.array(borders, dtype=float).reshape(-1, 2, 2) * (cell_width, cell_height) - 0.5
    axes.add_collection(
        LineCollection(
            ends, colors=_BORDER, linewidths=_line_width(record, picture, panel) / 2, rasterized=len(ends) > _MANY
        )
    )
    return len(np.unique(segments[inside]))


def _show_map(axes: Axes, record: TreeRecord, picture: Picture, values: np.ndarray, norm: Normalize) -> None:
    """Draw a colour map over the greyscale image; NaN is transparent."""
    _show_picture(axes, picture.pixels.mean(axis=2, keepdims=True).astype(np.uint8).repeat(3, axis=2))
    cell_width, cell_height = _cell(record, picture)
    extent = (-0.5, record.width * cell_width - 0.5, record.height * cell_height - 0.5, -0.5)
    limits = axes.axis()
    axes.imshow(values, cmap=_AFFINITY_MAP, norm=norm, extent=extent, interpolation="nearest", alpha=_OPACITY)
    axes.axis(limits)


def _show_picture(axes: Axes, pixels: np.ndarray) -> None:
    axes.imshow(pixels)
    axes.set(xlim=(-0.5, pixels.shape[1] - 0.5), ylim=(pixels.shape[0] - 0.5, -0.5))


def _dimmed(picture: Picture) -> np.ndarray:
    """The picture darkened and desaturated, as a background."""
    pixels = picture.pixels.astype(float)
    grey = pixels.mean(axis=2, keepdims=True)
    return (_BACKGROUND * (0.75 * grey + 0.25 * pixels)).round().astype(np.uint8)


def _norm(scale: str, least: float) -> Normalize:
    if scale == "linear" or (scale == "auto" and least > 0.05):
        return Normalize(math.floor(10 * least) / 10 if scale == "auto" else 0, 1)
    return LogNorm(max(10 ** math.floor(math.log10(max(least, _LEAST))), _LEAST), 1, clip=True)


def _layout(
    picture: Picture, rows: int, columns: int, panel: float, title: str | None, margins: Sequence[float]
) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of panels (rows, columns) with the picture's aspect ratio, and a margin after each column.

    The panels are placed manually, because matplotlib's layout engines take longer than everything else.
    """
    height, width = picture.pixels.shape[:2]
    width, height = (panel * side / max(height, width) for side in (width, height))
    top = _TITLE if title is not None else 0.05
    lefts = np.cumsum([_GAP, *(width + _GAP + margin for margin in margins)])
    lefts += max(_LEAST_WIDTH - lefts[-1], 0) / 2
    size = max(lefts[-1], _LEAST_WIDTH), top + rows * (height + _HEADING) + _SCALE
    figure = Figure(figsize=size)
    grid = np.empty((rows, columns), dtype=object)
    for row in range(rows):
        bottom = size[1] - top - (row + 1) * (height + _HEADING)
        for column in range(columns):
            place = (lefts[column] / size[0], bottom / size[1], width / size[0], height / size[1])
            grid[row, column] = figure.add_axes(place)
            grid[row, column].set_axis_off()
    if title is not None:
        # A file name may contain dollar signs, or bytes that are not UTF-8.
        text = title.encode(errors="replace").decode()
        figure.suptitle(text, fontsize=11, y=1 - 0.5 * top / size[1], va="center", parse_math=False)
    return figure, grid


def _add_scale(figure: Figure, colors: ScalarMappable, label: str) -> Colorbar:
    """Add a colour bar at the bottom of a figure."""
    width, height = figure.get_size_inches()
    length = min(0.8 * width, 6)
    place = ((1 - length / width) / 2, (_SCALE - 0.25) / height, length / width, 0.12 / height)
    bar = figure.colorbar(colors, cax=figure.add_axes(place), orientation="horizontal")
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    return bar


def _cell(record: TreeRecord, picture: Picture) -> tuple[float, float]:
    """Width and height in pixels that a position of the map covers."""
    if record.stride is not None:
        return record.stride, record.stride
    height, width = picture.pixels.shape[:2]
    return width / record.width, height / record.height


def _line_width(record: TreeRecord, picture: Picture, panel: float) -> float:
    """Line width in points, a fifth of the distance between positions."""
    points = panel * 72 / max(picture.pixels.shape[:2]) * min(_cell(record, picture))
    return min(max(points / 5, 0.3), 3.0)


def _hues(count: int) -> np.ndarray:
    """HSV colours (count, 3); successive hues differ strongly."""
    hue = np.arange(count) * 0.618034 % 1
    return np.stack([hue, np.full(count, 0.9), np.full(count, 1.0)], axis=1)


def _weights(record: TreeRecord, image: int, edge: np.ndarray) -> np.ndarray:
    """Weights (L,) of the edges (L,) to the parents; 0 for edges outside the grid."""
    weight = record.edge_weight[image].numpy(force=True)
    return np.where(edge >= 0, weight[edge.clip(min=0)], 0) if len(weight) else np.zeros(len(edge))


def _inside(record: TreeRecord, image: int) -> np.ndarray:
    """(H, W) bool, the positions of one image of the batch that are not ignored padding."""
    rows, columns = (record.height, record.width) if record.valid_sizes is None else record.valid_sizes[image].tolist()
    inside = np.zeros((record.height, record.width), bool)
    inside[:rows, :columns] = True
    return inside


def _one(tree: Tree, image: int) -> Tree:
    return Tree(*(part[image : image + 1] for part in tree))


def _name(record: TreeRecord) -> str:
    where = record.name or "layer" if record.stage is None else f"stage {record.stage}, block {record.block}"
    scan = "" if record.scan == "tree" else f", {record.scan}"
    return f"{where}{scan}: {record.height}x{record.width}"
