"""What a drawing must leave visible stays as it was, and odd input is drawn or explained."""

import numpy as np
import pytest
from PIL import Image

from hivg.utils.charts import _ticks, plot_curves, plot_panels
from hivg.utils.draw import COLOURS, colour_of, contact_sheet, draw_boxes, overlay_heatmap, overlay_mask

WORDS = "the giraffe left of the fence zebra man in a red shirt umbrella second person from right".split()


def picture(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def random_boxes(rng, n, width, height):
    corners = rng.uniform(0, 1, (n, 2, 2)) * [width, height]
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def margin(width, height):
    """No line with its halo is wider than this."""
    return 3 + np.sqrt(width * height) / 100


def inside(boxes, width, height, inset=0.0):
    """(H, W) bool: pixels inside any box; sides within `inset` of the picture's border are moved in by it."""
    mask = np.zeros((height, width), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        x0, y0 = (v + inset if v < inset else v for v in (x0, y0))
        x1, y1 = (v - inset if side - v < inset else v for v, side in ((x1, width), (y1, height)))
        mask[max(0, int(np.floor(y0))):max(0, int(np.ceil(y1))), max(0, int(np.floor(x0))):max(0, int(np.ceil(x1)))] = 1
    return mask


def sizes():
    rng = np.random.default_rng(1)
    small = [tuple(rng.integers(50, 400, 2).tolist()) for _ in range(40)]
    return small + [(50, 50), (50, 700), (700, 50), (1333, 800), (5000, 60)]


@pytest.mark.parametrize("width, height", sizes())
def test_nothing_is_drawn_inside_a_box(width, height):
    rng = np.random.default_rng(width * height)
    before = picture(width, height)
    box = random_boxes(rng, 1, width, height)
    label = " ".join(rng.choice(WORDS, rng.integers(1, 12)))
    after = np.asarray(draw_boxes(before, box, [label], scores=[0.5]))
    assert after.shape[0] >= height and after.shape[1] >= width
    changed = (after[:height, :width] != before).any(axis=2)
    assert changed.any()
    assert not changed[inside(box, width, height, inset=margin(width, height))].any()


@pytest.mark.parametrize("width, height", sizes())
def test_labels_cover_no_inside_and_not_each_other(width, height):
    rng = np.random.default_rng(width + height)
    boxes = random_boxes(rng, 4, width, height)
    boxes[:, 2:] = boxes[:, :2] + (boxes[:, 2:] - boxes[:, :2]) / 2  # smaller, so that there is room for some labels
    labels = [" ".join(rng.choice(WORDS, 4)) for _ in boxes]
    image = picture(width, height)
    lines = np.asarray(draw_boxes(image, boxes))
    assert lines.shape == image.shape
    drawn, covered = lines, np.zeros((height, width), dtype=bool)
    for n in range(1, 5):  # one label more each time; those before it stay where they are
        before, drawn = drawn, np.asarray(draw_boxes(image, boxes, labels[:n] + [None] * (4 - n)))[:height, :width]
        added = (drawn != before).any(axis=2)
        assert not (added & inside(boxes, width, height)).any()
        assert not (added & covered).any()
        covered |= added


def test_a_large_picture():
    before = picture(100, 75).repeat(50, axis=0).repeat(50, axis=1)  # 5000 x 3750
    box = [[1000.5, 800, 3200, 3000]]
    after = np.asarray(draw_boxes(before, box, ["the giraffe left of the fence"]))
    assert after.shape == before.shape  # there is room for the label
    rows, columns = np.nonzero((after != before).any(axis=2))
    assert not (after != before)[800:3000, 1000:3200].any()
    assert 300 < rows.min() and rows.max() < 3100 and 900 < columns.min() and columns.max() < 3300


def test_label_touches_its_box_and_has_its_colour():
    image = Image.new("RGB", (640, 480), "white")
    lines, drawn = (np.asarray(draw_boxes(image, [[200, 150, 400, 350]], labels)) for labels in (None, ["zebra"]))
    rows, columns = np.nonzero((lines != drawn).any(axis=2))
    assert rows.max() < 150 <= rows.max() + 8 and abs(columns.min() - 200) < 8
    tag = drawn[rows.min():rows.max() - 2, columns.min():columns.max()].reshape(-1, 3)
    assert (tag == colour_of(0)).all(axis=1).mean() > 0.5


@pytest.mark.parametrize("box", [[0, 0, 640, 480], [-50, -50, 700, 500]])
def test_without_room_the_label_goes_below_the_picture(box):
    before = picture(640, 480)
    drawn = draw_boxes(before, [box], ["the whole room"])
    assert drawn.width == 640 and 480 < drawn.height < 560
    after, strip = np.asarray(drawn)[:480], np.asarray(drawn)[480:]
    assert (after[10:-10, 10:-10] == before[10:-10, 10:-10]).all()
    assert (strip == colour_of(0)).all(axis=2).any() and (strip.max(axis=2) < 60).any()  # key and text


def test_boxes_have_distinct_colours():
    boxes = [[10 + 70 * i, 50, 60 + 70 * i, 100] for i in range(len(COLOURS))]
    colours = {c for _, c in draw_boxes(Image.new("RGB", (640, 200)), boxes).getcolors(1000)}
    assert {colour_of(i) for i in range(len(COLOURS))} <= colours
    assert len({colour_of(i) for i in range(3 * len(COLOURS))}) == 3 * len(COLOURS)
    assert (1, 2, 3) in {c for _, c in draw_boxes(Image.new("RGB", (99, 99)), [[9, 9, 50, 50]],
                                                   colours=[(1, 2, 3)]).getcolors(1000)}


@pytest.mark.parametrize("size", [(1, 1), (4000, 8), (8, 4000), (2, 3), (50, 50)])
@pytest.mark.parametrize("label", ["", "dog", "犬が左にいる" * 50, "word " * 400, "x" * 5000, None,
                                   "a\n\tb\ud800\u202e🦒\0é"])
def test_odd_sizes_and_labels(size, label):
    w, h = size
    for box in ([0, 0, w, h], [w / 4, h / 4, w / 4, h / 4], [-9, -9, -5, -5], [1e30, 1e30, 1e30, 1e30]):
        image = draw_boxes(Image.new("RGB", size, "white"), [box], [label], [0.1])
        assert image.mode == "RGB" and image.width >= w and image.height >= h
        assert image.width <= max(w, 400) and image.height <= h + 600


def test_many_long_labels():
    boxes = random_boxes(np.random.default_rng(0), 30, 640, 480)
    image = draw_boxes(picture(640, 480), boxes, ["word " * 400] * 30)
    assert image.width == 640 and image.height < 480 + 30 * 200


def test_arguments_are_left_alone_and_may_be_lists():
    image, boxes = Image.new("L", (60, 60)), np.array([[5, 5, 20, 20]])
    draw_boxes(image, boxes, ["a"])
    assert not np.asarray(image).any() and boxes.tolist() == [[5, 5, 20, 20]]
    assert draw_boxes(image, [], []).size == (60, 60)
    assert draw_boxes(image, boxes, heatmap=np.ones((3, 3)), mask=np.ones((2, 2), dtype=bool)).size == (60, 60)


@pytest.mark.parametrize("arguments, message", [
    (dict(boxes=[1, 2, 3, 4]), "shape"), (dict(boxes=[[1, 2, 3]]), "shape"),
    (dict(boxes=[[9, 0, 3, 4]]), "xmin"), (dict(boxes=[[0, 0, float("nan"), 4]]), "finite"),
    (dict(boxes=[[0, 0, 3, 4]], labels=["a", "b"]), "labels"), (dict(boxes=[[0, 0, 3, 4]], labels="a"), "labels"),
    (dict(boxes=[[0, 0, 3, 4]], scores=[]), "scores"), (dict(boxes=[[0, 0, 3, 4]], scores=0.5), "scores"),
    (dict(boxes=[], heatmap=np.ones(4)), "heatmap"), (dict(boxes=[], mask=np.ones((0, 4))), "mask"),
    (dict(boxes=[], image=np.ones((4, 4))), "uint8"), (dict(boxes=[], image=picture(4, 4)[:0]), "pixels"),
])
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_boxes(**{"image": Image.new("RGB", (10, 10)), **arguments})


def test_heatmap():
    white = Image.new("RGB", (40, 20), "white")
    ramp = np.asarray(overlay_heatmap(white, np.linspace(-5, 900, 8)[None], alpha=1.0)).astype(int)
    assert ramp.shape == (20, 40, 3)
    assert ramp[10, 36, 0] > ramp[10, 36, 2] and ramp[10, 8, 2] > ramp[10, 8, 1]  # yellow high, violet low
    black = np.asarray(overlay_heatmap(Image.new("RGB", (40, 20)), np.arange(64).reshape(1, 64), alpha=1.0))
    assert (np.diff(black[10].astype(float) @ [0.21, 0.72, 0.07]) > -1).all()  # lightness rises all the way
    for odd in (np.zeros((14, 14)), np.full((3, 5), np.nan), [[np.nan, np.inf], [0, 1]], np.array([[7.0]]),
                np.ones((300, 2), dtype=bool)):
        assert overlay_heatmap(white, odd).size == (40, 20)
    assert (np.asarray(overlay_heatmap(white, ramp[..., 0], alpha=0.0)) == 255).all()


def test_mask():
    mask = np.zeros((20, 40), dtype=bool)
    mask[5:10, 30:] = True
    tinted = np.asarray(overlay_mask(Image.new("RGB", (40, 20), "white"), mask, "#ff0000", alpha=1.0))
    assert ((tinted == (255, 0, 0)).all(axis=2) == mask).all() and ((tinted == 255).all(axis=2) == ~mask).all()
    half = np.asarray(overlay_mask(Image.new("RGB", (40, 20), "white"), mask * 1.0, (255, 0, 0), alpha=0.5))
    assert abs(int(half[7, 35, 1]) - 128) <= 2


@pytest.mark.parametrize("low, high", [(0, 1), (0, 2.5e-4), (-3, 7), (0, 123456), (1e7, 3e7), (0.3, 0.3001), (5, 60)])
def test_ticks_are_round_distinct_and_true(low, high):
    ticks = _ticks(low, high, 5)
    assert 2 <= len(ticks) <= 7 and len({text for _, text in ticks}) == len(ticks)
    step = ticks[1][0] - ticks[0][0]
    assert round(step / 10 ** np.floor(np.log10(step * 1.0000001)), 6) in (1, 2, 5)
    for value, text in ticks:
        assert low - 1e-9 <= value <= high * (1 + 1e-9)
        assert float(text.replace(",", "")) == pytest.approx(value, abs=step * 1e-6)


NAN = float("nan")


@pytest.mark.parametrize("curves", [
    {}, {"none": []}, {"one": [(3, 5)]}, {"gap": [(0, 1), (1, NAN), (2, 3)]}, {"all": [(0, NAN), (1, float("inf"))]},
    {"flat": [(0, 2), (9, 2)]}, {"huge": [(0, -1e299), (1, 1e299)]}, {"tiny": [(0, 1e-12), (1, 3e-12)]},
    {f"run {i} with a long name": [(0, i), (1, -i)] for i in range(30)}, {"犬": [(i, i % 7) for i in range(5000)]},
])
def test_curves(curves):
    image = plot_curves(curves, title="Training", x_label="epoch", y_label="loss",
                        boundaries=[(0, "warm-up"), (0.5, "stage 1"), (0.55, "stage 2"), (1, "end")])
    assert image.size == (900, 360) and image.mode == "RGB"
    assert plot_curves(curves).size == (900, 360)


def test_a_curve_is_where_its_points_are():
    line = np.asarray(plot_curves({"a": [(0, 0), (1, 1)]}))[60:]  # below the legend
    rows, columns = np.nonzero(np.abs(line.astype(int) - colour_of(0)).sum(axis=2) < 60)
    assert np.corrcoef(rows, columns)[0, 1] < -0.999  # rises to the right
    broken = np.asarray(plot_curves({"a": [(0, 0), (0.4, 0.4), (0.5, NAN), (0.6, 0.6), (1, 1)]}))[60:]
    assert (broken[:, 470:490] == 255).all(axis=2).mean() > (line[:, 470:490] == 255).all(axis=2).mean()


def test_panels(tmp_path):
    panels = [dict(curves={"train": [(0, 3), (1, 2)]}, y_label="loss"), dict(curves={}, title="nothing yet")]
    image = plot_panels(panels, tmp_path / "curves.png")
    assert image.size == (900, 600)
    assert (np.asarray(Image.open(tmp_path / "curves.png")) == np.asarray(image)).all()
    for bad in (dict(panels=[]), dict(panels=panels, size=(20, 20))):
        with pytest.raises(ValueError, match="panels"):
            plot_panels(**bad)


def test_contact_sheet():
    tiles = [picture(50, 50), Image.new("RGB", (300, 20)), Image.new("L", (1, 4000)), picture(7, 9), picture(30, 30)]
    sheet = contact_sheet(tiles, ["a", "word " * 100, "犬", "", None], columns=4, tile=100)
    assert 400 < sheet.width < 500 and sheet.height > 2 * 100
    assert contact_sheet(tiles[:1], tile=100).width < 130
    for bad in (dict(tiles=[]), dict(tiles=tiles, columns=0), dict(tiles=tiles, captions=["a"])):
        with pytest.raises(ValueError):
            contact_sheet(**bad)
