"""What is drawn: the edges, segments and maps themselves, not the pixels."""

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from torch import Tensor

from grootvl_mm.models import GrootV, TreeSSM
from grootvl_mm.visualization import TreeRecord, affinity, compared_scans, cut_segments, join_ranks, record_trees
from grootvl_mm.visualization.figures import COLORS, Picture, draw_affinity, draw_trees, find_vertex, to_array

SIZE = (20, 28)


def records_of(images: Tensor, **options) -> list[TreeRecord]:
    torch.manual_seed(0)
    model = GrootV(**{"arch": {"channels": 8, "depths": [1, 2]}, "out_indices": (0, 1)} | options).eval()
    with torch.no_grad(), record_trees(model) as records:
        model(images)
    return records


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def picture() -> Picture:
    return Picture(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8), SIZE)


def lines(axes: Axes) -> list:
    """The lines that are drawn, those of edges at padding or out of the grid first."""
    return [collection for collection in axes.collections if len(collection.get_segments())]


def as_vertices(ends: np.ndarray, record: TreeRecord) -> list[tuple[int, int]]:
    """The vertices at the ends of lines, lower first."""
    grid = (np.asarray(ends) + 0.5) / record.stride - 0.5
    assert np.allclose(grid, grid.round())
    return [tuple(sorted(edge)) for edge in (grid[..., 1] * record.width + grid[..., 0]).round().astype(int).tolist()]


@pytest.mark.parametrize("color", COLORS)
def test_every_edge_of_each_tree_in_its_colour(color: str, images: Tensor, picture: Picture) -> None:
    records = records_of(images)
    figure = draw_trees(records, picture, color, cut_share=0.2, image=1, title="a title")
    panels = [axes for axes in figure.axes if axes.images]
    assert len(panels) == 2 * len(records)
    for record, left, right in zip(records, panels[::2], panels[1::2], strict=True):
        vertices = record.height * record.width
        (drawn,) = lines(left)
        edges = as_vertices(drawn.get_segments(), record)
        assert sorted(edges) == list(map(tuple, record.tree.edges()[1].tolist()))
        child = {tuple(sorted((v, p))): v for v, p in enumerate(record.tree.parent[1].tolist()) if v != p}
        ranks = join_ranks(record.tree, record.edge_weight, record.height, record.width)[1]
        assert [int(ranks[child[edge]]) for edge in edges] == list(range(1, vertices))  # the heaviest on top
        values = drawn.get_array()
        if color == "depth":
            assert values.tolist() == [int(record.tree.depth()[1, child[edge]]) for edge in edges]
        else:
            assert (np.diff(values) >= 0).all()
        assert left.get_title(loc="left") == (
            f"stage {record.stage}, block {record.block}: {record.height}x{record.width}"
        )
        segments = 1 + round(0.2 * (vertices - 1))
        assert right.get_title(loc="left") == f"{segments} segments"
    assert figure.get_suptitle() == "a title"
    assert to_array(figure, 30).std() > 10


def test_borders_lie_between_segments(images: Tensor, picture: Picture) -> None:
    (record, *_) = records_of(images)
    figure = draw_trees([record], picture, cut_share=0.3)
    right = figure.axes[1]
    cuts = round(0.3 * (record.height * record.width - 1))
    segments = cut_segments(record.tree, record.edge_weight, record.height, record.width, cuts)[0].view(5, 7).numpy()
    drawn = (np.array(lines(right)[0].get_segments()) + 0.5) / record.stride
    expected = (segments[1:] != segments[:-1]).sum() + (segments[:, 1:] != segments[:, :-1]).sum()
    assert len(drawn) == expected
    for (x1, y1), (x2, y2) in drawn.round().astype(int):
        if y1 == y2:
            assert segments[y1 - 1, x1] != segments[y1, x1]
        else:
            assert segments[y1, x1 - 1] != segments[y1, x1]
            assert x1 == x2
    tints = right.images[1].get_array()
    assert tints.shape == (*SIZE, 4)
    centres = tints[2::4, 2::4]
    for segment in range(cuts + 1):
        assert len(np.unique(centres[segments == segment], axis=0)) == 1
    largest = np.bincount(segments.ravel()).argmax()
    assert (centres[..., 3] == 0).sum() == (segments == largest).sum()


def test_ignored_padding_is_grey_or_blank(images: Tensor, picture: Picture) -> None:
    images = images.clone()
    images[0, :, 12:], images[0, :, :, 16:] = 0, 0
    (record, *_) = records_of(images, ignore_padding=True)
    assert record.valid_sizes.tolist() == [[3, 4], [5, 7]]
    picture = picture._replace(size=(12, 16))
    figure = draw_trees([record], picture, cut_share=0.0)
    grey, drawn = lines(figure.axes[0])
    assert len(drawn.get_segments()) == 3 * 4 - 1
    assert len(grey.get_segments()) == 5 * 7 - 3 * 4
    inside = [vertex for edge in as_vertices(drawn.get_segments(), record) for vertex in edge]
    assert all(vertex // 7 < 3 and vertex % 7 < 4 for vertex in inside)
    assert figure.axes[1].get_title(loc="left") == "1 segment"

    # Otherwise, padding stays blank: no colours and no borders.
    right = draw_trees([record], picture, cut_share=0.4).axes[1]
    assert right.get_title(loc="left") == f"{1 + round(0.4 * 11)} segments"
    opacity = right.images[1].get_array()[..., 3]
    assert opacity[:12, :16].any()
    assert not opacity[12:].any()
    assert not opacity[:, 16:].any()
    assert (np.concatenate(lines(right)[0].get_segments()).max(axis=0) <= (15.5, 11.5)).all()
    for axes in draw_affinity(record, picture, [(2, 3)]).axes[1:4]:
        blank = np.ma.getmaskarray(axes.images[1].get_array())
        assert blank.sum() == 5 * 7 - 3 * 4
        assert not blank[:3, :4].any()


@pytest.mark.parametrize("scan", ["raster", "cross"])
def test_paths(scan: str, images: Tensor, picture: Picture) -> None:
    (record, *_) = records_of(images, scan=scan)
    figure = draw_trees([record], picture)
    jumps, drawn = lines(figure.axes[0])
    assert (len(jumps.get_segments()), len(drawn.get_segments())) == (4, 5 * 6)
    assert scan in figure.axes[0].get_title(loc="left")


@pytest.mark.parametrize("name", ["a$x_$.jpg", "cost$5$.png", "caf\udce9.png"])
def test_titles_are_file_names(name: str, images: Tensor, picture: Picture) -> None:
    """They are not formulas, and need not be UTF-8."""
    figure = draw_trees(records_of(images), picture, title=name)
    assert figure.get_suptitle() == name.replace("\udce9", "?")
    assert not figure._suptitle.get_parse_math()
    assert to_array(figure, 30).std() > 0


def test_labels_fit_into_narrow_figures(images: Tensor) -> None:
    """Of portrait images, with panels in the middle."""
    picture = Picture(np.zeros((200, 20, 3), np.uint8), (200, 20))
    records = records_of(images.transpose(2, 3)[:, :, :, :4])[:1]
    for figure in (draw_trees(records, picture), draw_affinity(records[0], picture, [(5, 5)])):
        figure.draw_without_rendering()
        width = figure.get_window_extent().width
        for axes in figure.axes:
            box = axes.get_tightbbox()
            assert box.x0 >= 0
            assert box.x1 <= width


def test_maps_of_a_single_vertex(picture: Picture) -> None:
    records = records_of(torch.randn(1, 3, 4, 4))
    assert [(record.height, record.width) for record in records] == [(1, 1)] * 3
    small = Picture(picture.pixels[:4, :4], (4, 4))
    for figure in (draw_trees(records, small), draw_trees(records, small, "weight", 1.0)):
        assert to_array(figure, 30).ndim == 3
    assert to_array(draw_affinity(records[0], small, [(1, 1)]), 30).ndim == 3


def test_a_layer_outside_of_a_backbone(picture: Picture) -> None:
    mixer = TreeSSM(8)
    with record_trees(mixer) as records:
        mixer(torch.randn(1, 4, 7, 8))
    figure = draw_trees(records, picture)
    assert figure.axes[0].get_title(loc="left") == "layer: 4x7"
    assert find_vertex(records[0], picture, (4, 5)) == 8


@pytest.mark.parametrize("scale", ["auto", "log", "linear"])
def test_affinity_beside_the_other_scans(scale: str, images: Tensor, picture: Picture) -> None:
    (record, *_) = records_of(images)
    positions = [(2.0, 3.0), (25.0, 18.0)]
    vertices = [find_vertex(record, picture, position) for position in positions]
    assert vertices == [0, 34]
    figure = draw_affinity(record, picture, positions, scale, image=1)
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels[:4]] == ["image", "tree", "raster", "cross"]
    for row, vertex in enumerate(vertices):
        for axes, trees in zip(panels[4 * row + 1 : 4 * row + 4], compared_scans(record).values(), strict=True):
            drawn = axes.images[1]
            expected = affinity(trees, record.decay, [vertex], record.propagation)[1, 0].view(5, 7)
            assert np.allclose(drawn.get_array(), expected)
            assert drawn.get_extent() == [-0.5, 27.5, 19.5, -0.5]
            assert isinstance(drawn.norm, LogNorm) == (scale == "log")
            assert drawn.norm.vmax == 1
            if scale != "log":
                assert drawn.norm.vmin <= expected.min()


def test_small_decays_get_a_logarithmic_scale(images: Tensor, picture: Picture) -> None:
    (record, *_) = records_of(images)
    figure = draw_affinity(record._replace(decay=record.decay * 0.01), picture, [(2, 3)])
    assert isinstance(figure.axes[1].images[1].norm, LogNorm)
    assert figure.axes[1].images[1].norm.vmin == 1e-3


def test_what_cannot_be_drawn(images: Tensor, picture: Picture) -> None:
    records = records_of(images)
    with pytest.raises(ValueError, match="color must be one of order, weight, depth, got 'red'"):
        draw_trees(records, picture, "red")
    with pytest.raises(ValueError, match=r"cut_share must be between 0 and 1, got 2"):
        draw_trees(records, picture, cut_share=2)
    with pytest.raises(ValueError, match="no records"):
        draw_trees([], picture)
    with pytest.raises(ValueError, match="scale must be one of"):
        draw_affinity(records[0], picture, [(0, 0)], "square")
    with pytest.raises(ValueError, match=r"\(28, 3\) is outside the picture of 28x20 pixels"):
        draw_affinity(records[0], picture, [(28, 3)])


def test_images_of_pipelines() -> None:
    content = torch.tensor([[[1]], [[2]], [[3]]], dtype=torch.uint8)
    assert Picture.of(content).pixels.tolist() == [[[3, 2, 1]]]
    assert Picture.of(content[:1]).pixels.tolist() == [[[1, 1, 1]]]
    assert Picture.of(torch.tensor([[[-1.0, 1.0]]])).pixels[0, :, 0].tolist() == [0, 255]
    padded = Picture.of(content).padded(2, 3)
    assert (padded.pixels.shape, padded.size) == ((2, 3, 3), (1, 1))
