"""What tools/visualization/draw_predictions.py draws."""

from matplotlib.figure import Figure

from grootvl_mm.visualization.explorer import Box, Overlay
from tests.helpers.tool_runs import load_script


def test_boxes_and_texts() -> None:
    """A text without a box, as in class maps, is centred on its place."""
    axes = Figure().subplots()
    boxes = (Box(1, 2, 4, 5, "cat 0.90", (255, 255, 0)), Box(3, 4, 0, 0, "dog", (0, 0, 90)))
    load_script("tools/visualization/draw_predictions.py").draw_overlay(axes, Overlay("prediction", boxes, None, "two"))
    assert [(*patch.get_xy(), patch.get_width(), patch.get_height()) for patch in axes.patches] == [(1, 2, 4, 5)]
    texts = [(*text.get_position(), text.get_text(), text.get_ha(), text.get_color()) for text in axes.texts]
    assert texts == [(1, 2, "cat 0.90", "left", "black"), (3, 4, "dog", "center", "white")]
    assert axes.get_xlabel() == "two"
    assert not axes.images
