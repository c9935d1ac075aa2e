"""The explorer in a real browser: what it shows, and how it is used."""

import base64
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from grootvl_mm.models import GrootV
from grootvl_mm.visualization import affinity, compared_scans, cut_segments, mean_decay, path_between
from grootvl_mm.visualization.explorer import ExplorerImage, explorer_page
from tests.helpers.config_cases import ROOT
from tests.visualization.explorer.conftest import make_image

SCANS = ("tree", "raster", "cross")
AFFINITIES = """([scans, sources]) => scans.map((scan) => sources.map((source) =>
    Array.from(explorer.scans.affinity(scan, source, new Float32Array(explorer.block.size)))))"""
SEGMENTS = "() => Array.from({ length: explorer.block.size }, (_, v) => explorer.segments.find(v))"


def center(page, scan: str, row: int, column: int) -> dict[str, float]:
    """Where a position of the first map is on the screen."""
    box = page.locator(f"#{scan}").bounding_box()
    return {"x": box["x"] + (column + 0.5) * box["width"] / 25, "y": box["y"] + (row + 0.5) * box["height"] / 18}


def value(page, scan: str = "tree") -> float:
    page.evaluate("() => new Promise(requestAnimationFrame)")
    return float(page.locator(f"#{scan}-value").text_content())


def becomes(page, expression: str, expected: object) -> None:
    """Browsers hand touches on when they draw the next frame."""
    for _ in range(100):
        found = page.evaluate(expression)
        if found == expected:
            return
        page.wait_for_timeout(50)
    assert found == expected


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    pairs = set(zip(first.tolist(), second.tolist(), strict=True))
    return len(pairs) == len(set(first.tolist())) == len(set(second.tolist()))


def write_page(folder: Path, image: ExplorerImage) -> Path:
    path = folder / "page.html"
    path.write_text(explorer_page("pico", [image]), encoding="utf-8")
    return path


def make_padded_image(model: GrootV) -> tuple[ExplorerImage, list]:
    """An image of 72 x 100 pixels, padded with zeros to 96 x 128."""
    model.register_forward_pre_hook(lambda module, inputs: torch.nn.functional.pad(inputs[0], (0, 28, 0, 24)))
    image, records = make_image(model)
    return image._replace(picture=np.pad(image.picture, ((0, 24), (0, 28), (0, 0)))), records


@pytest.fixture
def page(shown: tuple, visit: Callable):
    return visit(shown[0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tree_root": "last", "propagation": "up", "tree_metric": "manhattan"},
        {"propagation": "down", "tree_sharing": "stage", "tree_metric": "euclidean"},
        {"scan": "raster"},
        {"scan": "cross", "tree_root": "last"},
        {"ignore_padding": True, "tree_root": "last"},
    ],
    ids=str,
)
def test_affinities_are_those_of_python(options: dict, visit: Callable, tmp_path: Path) -> None:
    """Of every block, for the layer's own decays and tree: products of mean decays, and of single channels."""
    model = GrootV("pico", **options).eval()
    for stage in model.stages:
        for block in stage.blocks:
            block.mixer.dt_proj.weight.data.mul_(6)
            block.mixer.x_proj.weight.data.mul_(8)
    image, records = make_padded_image(model) if "ignore_padding" in options else make_image(model)
    page = visit(write_page(tmp_path, image))
    for record in records:
        sources = [0, record.height * record.width // 2 + 1, record.height * record.width - 1]
        page.evaluate(f"explorer.change({{ stage: {record.stage}, block: {record.block} }})")
        for number, title in enumerate(page.locator("#channel option").all_text_contents()):
            page.evaluate(f"explorer.change({{ channel: {number} }})")
            channel = re.match(r"channel (\d+)", title)
            decay = record.decay[:, :, int(channel[1]), None] if channel else mean_decay(record.decay)
            found = np.array(page.evaluate(AFFINITIES, [SCANS, sources]))
            for scan, values in zip(SCANS, found, strict=True):
                expected = affinity(compared_scans(record)[scan], decay, sources, record.propagation)[0]
                np.testing.assert_allclose(values, expected.numpy(), atol=1e-3, err_msg=f"{record.name} {scan} {title}")


def test_ignored_padding_stays_blank(visit: Callable, tmp_path: Path) -> None:
    """It is as black as in the image, whatever is shown, and its edges are neither counted nor drawn."""
    image, _ = make_padded_image(GrootV("pico", ignore_padding=True).eval())
    page = visit(write_page(tmp_path, image))
    for shown in ("show: 'affinity'", "show: 'segments', edges: 400", "show: 'image', lines: 'on'"):
        page.evaluate(f"explorer.change({{ {shown} }})")
        page.evaluate("() => new Promise(requestAnimationFrame)")
        for scan in SCANS:
            drawn = page.locator(f"#{scan}").evaluate("(canvas) => canvas.toDataURL()")
            pixels = cv2.imdecode(np.frombuffer(base64.b64decode(drawn.partition(",")[2]), np.uint8), cv2.IMREAD_COLOR)
            height, width = pixels.shape[:2]
            inside = pixels[: height * 72 // 96, : width * 100 // 128]
            below, beside = pixels[-(height * 22 // 96) :], pixels[:, -(width * 26 // 128) :]
            # JPEG adds some grey levels.
            assert max(below.max(), beside.max()) < 16 < inside.mean(), (shown, scan)
    page.evaluate("explorer.change({ show: 'affinity' })")
    page.mouse.move(**center(page, "raster", 2, 2))
    sums = """() => explorer.panels.map((panel) => {
        const ignored = new Set(explorer.block.padding);
        return panel.affinity.reduce((sum, value, v) => sum + (ignored.has(v) ? 0 : value), 0);
    })"""
    for scan, inside in zip(SCANS, page.evaluate(sums), strict=True):
        assert value(page, scan) == pytest.approx(inside, abs=0.06)
    last = page.evaluate("explorer.change({ edges: 449 }).then(() => document.getElementById('moment').textContent)")
    found = re.fullmatch(r"449 of 449 edges, 1 segment, the largest of 450 positions; last edge: cosine (.+)", last)
    assert -1 <= float(found[1]) <= 1


def test_value_under_the_pointer(page, shown: tuple) -> None:
    record = shown[1][0]
    a, b = (4, 5), (12, 20)
    source, target = (row * 25 + column for row, column in (a, b))
    trees = compared_scans(record)
    for scan in SCANS:
        expected = affinity(trees[scan], mean_decay(record.decay), [source], record.propagation)[0, 0]
        page.keyboard.press("Escape")
        page.mouse.move(**center(page, scan, *a))
        # The sum of several hundred is rounded to a tenth, each of which may be off by 1e-3.
        assert value(page, scan) == pytest.approx(expected.sum().item(), abs=0.1)
        page.mouse.click(**center(page, scan, *a))
        page.mouse.move(**center(page, scan, *b))
        assert value(page, scan) == pytest.approx(expected[target].item(), abs=1e-3)
        page.evaluate("explorer.letGo()")
    path = path_between(trees["tree"][0], source, target)
    page.mouse.click(**center(page, "raster", *a))
    page.mouse.click(**center(page, "cross", *b))
    assert page.evaluate(f"explorer.scans.paths('tree', {source}, {target})[0]") == path
    edges = len(path) - 1
    note = "document.getElementById('{}-note').textContent"
    becomes(page, note.format("tree"), f"affinity · {edges} {'edge' if edges == 1 else 'edges'}")
    rows, columns = 8 * 25 + 15, 15 * 18 + 8
    becomes(page, note.format("cross"), f"affinity · {rows} and {columns} edges")


@pytest.mark.parametrize("metric", ["cosine", "euclidean", "manhattan"])
def test_segments_are_those_of_python(metric: str, page, shown: tuple) -> None:
    (tree,) = (tree for tree in shown[2].blocks[0].trees if tree.metric == metric)
    page.locator("#metric").get_by_text(metric, exact=False).click()
    page.locator("#show").get_by_text("segments").click()
    for edges in (0, 1, 200, 440, 449, 30):
        page.locator("#edge-number").fill(str(edges))
        segments = np.arange(450)
        for v in np.argsort(tree.rank)[1 : edges + 1]:
            segments[segments == segments[v]] = segments[tree.parent[v]]
        assert same_partition(np.array(page.evaluate(SEGMENTS)), segments)
        count, text = 450 - edges, page.locator("#moment").text_content()
        assert text.startswith(f"{edges} of 449 edges, {count} {'segment' if count == 1 else 'segments'}, ")
        assert f"the largest of {np.bincount(segments).max()} position" in text
    record = shown[1][0]
    if metric == record.metric:
        expected = cut_segments(record.tree, record.edge_weight, record.height, record.width, 449 - edges)[0]
        assert same_partition(segments, expected.numpy())


def test_slider_and_play(page) -> None:
    slider = page.locator("#edges")
    slider.focus()
    page.keyboard.press("Home")
    assert page.locator("#moment").text_content() == "0 of 449 edges, 450 segments, the largest of 1 position"
    assert page.locator("#show input[value=segments]").is_checked()  # who moves the slider wants to see segments
    page.keyboard.press("ArrowRight")
    assert page.locator("#edge-number").input_value() == "1"
    assert slider.get_attribute("aria-valuetext") == "1 edge, 449 segments"
    page.locator("#tree").focus()
    for key in "++-":
        page.keyboard.press(key)
    assert slider.input_value() == "2"
    page.locator("#play").click()
    page.wait_for_timeout(200)
    page.locator("#play").click()
    stopped = int(slider.input_value())
    assert 2 < stopped < 449
    page.wait_for_timeout(100)
    assert int(slider.input_value()) == stopped


def test_keys(page, shown: tuple) -> None:
    record = shown[1][0]
    page.locator("#tree").focus()
    for key in ("ArrowUp", "Shift+ArrowLeft", "Enter", "ArrowDown", "ArrowDown", "Shift+ArrowRight"):
        page.keyboard.press(key)
    a, b = 8 * 25 + 4, 10 * 25 + 12  # from the middle, row 9 and column 12
    expected = affinity(record.tree, mean_decay(record.decay), [a])[0, 0, b].item()
    assert value(page) == pytest.approx(expected, abs=1e-3)
    spoken = page.locator("#spoken").text_content()
    assert spoken.startswith("Row 11, column 13. tree ")
    page.keyboard.press("Escape")
    assert page.evaluate("explorer.state.a") is None
    for key, expected in (("]", (1, 0)), ("]", (2, 0)), ("]", (2, 1)), ("[", (2, 0))):
        page.keyboard.press(key)
        assert page.evaluate("[explorer.state.stage, explorer.state.block]") == list(expected)
    assert page.evaluate("document.activeElement.id") == "tree"


def test_address_restores_the_view(page, visit: Callable) -> None:
    page.locator("#image").select_option("1")
    for scope, text in (("stage", "0"), ("metric", "Manhattan"), ("overlay", "ground truth"), ("scale", "logarithmic")):
        page.locator(f"#{scope}").get_by_text(text, exact=True).click()
    page.locator("#channel").select_option("1")
    page.locator("#lines").check()
    page.locator("#edge-number").fill("100")
    box = page.locator("#tree").bounding_box()
    for share in (0.3, 0.8):
        page.mouse.click(box["x"] + share * box["width"], box["y"] + 0.4 * box["height"])
    page.mouse.move(0, 0)
    page.wait_for_timeout(400)
    hash_ = page.evaluate("location.hash")
    drawn = "() => ['tree', 'raster', 'cross'].map((scan) => document.getElementById(scan).toDataURL())"
    other = visit(Path(page.url.partition("#")[0].removeprefix("file://")), hash_)
    other.evaluate("() => new Promise(requestAnimationFrame)")
    assert other.evaluate("explorer.state") == page.evaluate("explorer.state")
    assert other.evaluate(drawn) == page.evaluate(drawn)
    assert page.evaluate("explorer.state.edges") == 100
    # And while the page is open.
    other.evaluate("location.hash = '#stage=2&block=1&show=image'")
    other.locator("#block input[value='1']:checked").wait_for(state="attached")
    assert other.evaluate("[explorer.state.stage, explorer.state.show]") == [2, "image"]
    # A view whose address lacks a field has its initial value.
    assert other.evaluate("[explorer.state.a, explorer.state.b, explorer.state.lines]") == [None, None, "off"]


def test_changes_while_an_image_is_loaded(page) -> None:
    """None is lost."""
    page.evaluate("Promise.all([explorer.change({ image: 1 }), explorer.change({ stage: 0 })])")
    assert page.evaluate("[explorer.state.image, explorer.state.stage]") == [1, 0]
    assert page.locator("#image").input_value() == "1"


def test_very_tall_images_are_drawn(visit: Callable, tmp_path: Path) -> None:
    """Browsers leave larger canvases blank."""
    image, _ = make_image(GrootV("pico").eval(), size=(1600, 8))
    page = visit(write_page(tmp_path, image))
    page.evaluate("() => new Promise(requestAnimationFrame)")
    sizes = page.evaluate("[...document.querySelectorAll('canvas')].map(({ width, height }) => [width, height])")
    assert all(width >= 1 and 8000 < height <= 16384 for width, height in sizes)
    drawn = page.locator("#tree").evaluate("(canvas) => canvas.getContext('2d').getImageData(0, 8000, 9, 1).data[3]")
    assert drawn == 255


def test_the_published_page_of_the_demo(visit: Callable) -> None:
    page = visit(ROOT / "docs" / "_static" / "explorer_demo.html", "#image=2&overlay=prediction")
    assert page.evaluate("[explorer.state.image, explorer.state.overlay]") == [2, "prediction"]
    assert value(page) > 1


@pytest.mark.parametrize(
    "fragment",
    [
        "#stage=99&block=77&image=12&channel=50&edges=999999999",
        "#a=2,3&b=1,1&stage=-1&show=__proto__&metric=x",
        "#%%%&=&&",
    ],
)
def test_senseless_addresses(fragment: str, shown: tuple, visit: Callable) -> None:
    page = visit(shown[0], fragment)
    assert value(page) > 0
    assert page.evaluate("explorer.state.a") is None


def test_touch(shown: tuple, visit: Callable) -> None:
    page = visit(shown[0], viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    touches = page.context.new_cdp_session(page)
    start, end = center(page, "tree", 3, 3), center(page, "tree", 10, 16)
    first, last = 3 * 25 + 3, 10 * 25 + 16
    for kind, points, v in (("touchStart", [start], first), ("touchMove", [end], last), ("touchEnd", [], last)):
        touches.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        becomes(page, "explorer.positionOf(explorer.here)", v)
    assert page.evaluate("window.scrollY") == 0
    for name, point, v in (("a", start, first), ("b", end, last)):
        page.touchscreen.tap(**point)
        becomes(page, f"explorer.state.{name} && explorer.positionOf(explorer.state.{name})", v)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible(scheme: str, shown: tuple, visit: Callable) -> None:
    """A contrast of 4.5 (WCAG 2.2, level AA) of all text with what is behind it."""
    page = visit(shown[0], "#overlay=prediction", color_scheme=scheme)
    page.locator("summary").click()
    pairs = page.evaluate("""() => {
        const opaque = (element) => {
            for (; element; element = element.parentElement) {
                const color = getComputedStyle(element).backgroundColor;
                if (!/, 0\\)$/.test(color)) return color;
            }
        };
        const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
        const found = [];
        while (walker.nextNode()) {
            const element = walker.currentNode.parentElement;
            if (!walker.currentNode.data.trim() || !element.checkVisibility() || element.matches("option")) continue;
            found.push([walker.currentNode.data, getComputedStyle(element).color, opaque(element)]);
        }
        return found;
    }""")
    assert len(pairs) > 40

    def luminance(color: str) -> float:
        parts = np.array([int(part) for part in re.findall(r"\d+", color)[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for text, *colors in pairs:
        low, high = sorted(map(luminance, colors))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (text, colors)
    ground = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert ground < 0.1 if scheme == "dark" else ground > 0.8


@pytest.mark.parametrize("width", [320, 390, 760, 1280, 2000])
def test_fits_the_screen(width: int, shown: tuple, visit: Callable) -> None:
    page = visit(shown[0], viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = [page.locator(f"#{scan}").bounding_box() for scan in SCANS]
    assert all(box["width"] / box["height"] == pytest.approx(100 / 72, rel=0.02) for box in boxes)
    assert (boxes[0]["y"] == boxes[1]["y"]) == (width > 760)
    assert boxes[1]["y"] == boxes[2]["y"]  # side by side


def test_controls_have_names(page) -> None:
    page.locator("summary").click()
    nameless = page.evaluate("""() => {
        const named = (element) => element.getAttribute("aria-label") || element.textContent.trim()
            || [...(element.labels ?? [])].some((label) => label.textContent.trim());
        const controls = [...document.querySelectorAll("input, select, button, canvas")];
        return controls.filter((element) => !named(element)).map((element) => element.outerHTML);
    }""")
    assert nameless == []
    assert all(page.locator("fieldset > legend").all_text_contents())
    assert page.locator("fieldset > legend").count() == page.locator("fieldset").count()


def test_overlays_and_names(page) -> None:
    """Names of files, classes and models are text, whatever is in them."""
    assert "pico </script>" in page.locator("#model").text_content()
    assert page.locator("#image option").all_text_contents() == ["noise.png", "other <b>image</b>.png"]
    drawn = {}
    for name in ("nothing", "ground truth", "prediction"):
        page.locator("#overlay").get_by_text(name, exact=True).click()
        page.evaluate("() => new Promise(requestAnimationFrame)")
        drawn[name] = page.evaluate("document.getElementById('raster').toDataURL()")
    assert drawn["ground truth"] != drawn["nothing"] == drawn["prediction"]
    assert page.locator("#caption").text_content() == "Prediction: leaf, score 0.90"


def test_everything_changes_the_image(page) -> None:
    """Each way to show the tree looks different."""
    seen = set()
    for show, lines, scale in itertools.product(("affinity", "segments", "image"), ("on", "off"), ("linear", "log")):
        page.evaluate(f"explorer.change({{ show: '{show}', lines: '{lines}', scale: '{scale}', edges: 300 }})")
        page.evaluate("() => new Promise(requestAnimationFrame)")
        seen.add(page.evaluate("document.getElementById('tree').toDataURL()"))
    assert len(seen) == 2 * (2 + 1 + 1)  # the scale means something for affinities only


def test_measures_frames(page) -> None:
    page.locator("summary").click()
    assert page.evaluate("explorer.measure(0.3)")["fps"] > 0
    page.locator("#measure").click()
    page.get_by_text(re.compile(r"\d+ per second at 18 . 25")).wait_for(timeout=20_000)
