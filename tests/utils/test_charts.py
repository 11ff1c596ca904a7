"""Line charts: ticks are round and in the right place, curves run through their points, odd input is drawn."""

from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageDraw

from hivg.ablate import charts as ablate_charts
from hivg.utils import charts
from hivg.utils.charts import _log_ticks, _ticks, plot_curves, plot_panels

FIRST = ImageColor.getrgb(charts.CURVES[0])
# Machado et al. 2009: linear red, green and blue as seen without the red, and without the green cones
PROTANOPIA = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
DEUTERANOPIA = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]


@pytest.mark.parametrize("colours", [charts.CURVES, list(ablate_charts.COLOURS.values())], ids=["curves", "ablation"])
@pytest.mark.parametrize("seen", [PROTANOPIA, DEUTERANOPIA], ids=["protanopia", "deuteranopia"])
def test_curves_are_told_apart_with_any_kind_of_colour_vision(colours, seen):
    """And without colour: neighbours differ in their dashes and marks, and the first twelve in something."""
    linear = [(np.array(ImageColor.getrgb(colour)) / 255) ** 2.2 @ np.transpose(seen) for colour in colours]
    for a, b in combinations(np.clip(linear, 0, 1) ** (1 / 2.2), 2):
        assert np.abs(a - b).max() > 0.1
    styles = [(i % len(charts.DASHES), i % len(charts.SIDES), i % len(charts.CURVES)) for i in range(12)]
    assert len(set(styles)) == 12 and len({style[:2] for style in styles[:4]}) == 4
    assert len(set(ablate_charts.SIDES.values())) == 3


@pytest.mark.parametrize("low, high", [(0, 1), (0, 2.5e-4), (-3, 7), (0, 123456), (1e7, 3e7), (0.3, 0.3001), (5, 60)])
def test_ticks_are_round_distinct_and_true(low, high):
    ticks = _ticks(low, high, 5)
    assert 2 <= len(ticks) <= 7 and len({text for _, text in ticks}) == len(ticks)
    step = ticks[1][0] - ticks[0][0]
    assert round(step / 10 ** np.floor(np.log10(step * 1.0000001)), 6) in (1, 2, 5)
    for value, text in ticks:
        assert low - 1e-9 <= value <= high * (1 + 1e-9)
        assert float(text.replace(",", "")) == pytest.approx(value, abs=step * 1e-6)


def test_ticks_have_a_least_distance():
    assert [text for _, text in _ticks(0, 2, 6, least=1.0)] == ["0", "1", "2"]
    assert _ticks(0, 100, 5, least=1.0) == _ticks(0, 100, 5)


NAN = float("nan")


def ranges_of(monkeypatch, curves, **options):
    """(low, high) of y, and the least distance of ticks of x."""
    asked = []
    monkeypatch.setattr(charts, "_ticks", lambda low, high, count, least=0.0: asked.append((low, high, least)) or [])
    plot_curves(curves, **options)
    return asked[0][:2], asked[1][2]


def test_a_chart_of_few_points(monkeypatch):
    """Whole steps have whole ticks, and an accuracy is at most 1."""
    assert ranges_of(monkeypatch, {"a": [(1, 0.8)]})[1] == 0
    assert ranges_of(monkeypatch, {"a": [(0, 0.8), (1.5, 0.8), (3, 0.9)]})[1] == 1
    assert ranges_of(monkeypatch, {"a": [(0.5, 0.8), (2, 0.9)]})[1] == 0
    assert ranges_of(monkeypatch, {"accuracy": [(3, 0.8)]})[0] == (0.4, 1)
    assert ranges_of(monkeypatch, {"accuracy": [(3, 0), (4, 1)]})[0] == (0, 1)
    assert ranges_of(monkeypatch, {"loss": [(3, 0), (4, 2)]})[0] == pytest.approx((-0.1, 2.1))
    with_level = ranges_of(monkeypatch, {"accuracy": [(3, 0.5), (4, 0.7)]}, levels={"guessing": 0.3})[0]
    assert with_level == pytest.approx((0.28, 0.72))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("curves", [
    {}, {"none": []}, {"one": [(3, 5)]}, {"gap": [(0, 1), (1, NAN), (2, 3)]}, {"all": [(0, NAN), (1, float("inf"))]},
    {"flat": [(0, 2), (9, 2)]}, {"huge": [(0, -1e299), (1, 1e299)]}, {"tiny": [(0, 1e-12), (1, 3e-12)]},
    {f"run {i} with a long name": [(0, i), (1, -i)] for i in range(30)}, {"犬": [(i, i % 7) for i in range(5000)]},
])
def test_curves(curves, log):
    image = plot_curves(curves, title="Training", x_label="epoch", y_label="loss", levels={"guessing": 0.2}, log=log,
                        boundaries=[(0, "warm-up"), (0.5, "stage 1"), (0.55, "stage 2"), (1, "end")])
    assert image.size == plot_curves(curves).size == (900, 360) and image.mode == "RGB"


def test_a_curve_is_broken_where_a_number_is_missing():
    _, columns = curve_pixels(plot_curves({"a": [(0, 0), (0.4, 0.4), (0.5, NAN), (0.6, 0.6), (1, 1)]}))
    assert not ((470 < columns) & (columns < 490)).any()


def curve_pixels(image):
    """(rows, columns) of the first curve, below the legend."""
    pixels = np.asarray(image)[26:].astype(int)
    rows, columns = np.nonzero(np.abs(pixels - FIRST).sum(axis=2) < 60)
    return rows + 26, columns


def test_a_curve_is_where_its_points_are():
    rows, columns = curve_pixels(plot_curves({"a": [(0, 0), (0.5, 0.5), (1, 1)]}))
    assert np.corrcoef(rows, columns)[0, 1] < -0.999  # rises to the right


def test_a_curve_stays_within_the_axes():
    rows, columns = curve_pixels(plot_curves({"a": [(0, 0), (1, 9), (2, -9), (3, 0)]}))
    assert rows.min() > 32 and rows.max() <= 332  # between the legend and the tick labels of x
    assert columns.min() >= 75 and columns.max() <= 885
    assert columns.max() - columns.min() > 790


def test_points_alone_are_dots_with_nothing_between():
    rows, columns = curve_pixels(plot_curves({"a": [(0, 1), (1, NAN), (2, 3)]}))
    left = columns < 90
    right = columns > 870
    assert (left | right).all()
    for dot in (rows[left], rows[right]):
        assert len(dot) > 10 and dot.max() - dot.min() < 10
    assert rows[left].min() > 250 and rows[right].max() < 200


def test_boundaries_count_for_the_range():
    _, columns = curve_pixels(plot_curves({"a": [(0, 0), (1, 1)]}, boundaries=[(2, "end")]))
    assert 470 < columns.max() < 490  # half of the width


@pytest.mark.parametrize("lengths", [(16, 16, 16), (1, 1, 1, 1, 96), (1, 10**6), (9000, 3000, 3000, 3000)], ids=str)
def test_each_stage_can_be_seen(lengths):
    """However short it is beside the others; a longer one is wider."""
    ends = np.cumsum([0, *lengths]).tolist()
    boundaries = [(end, "") for end in ends]
    widths = []
    for start, end in zip(ends, ends[1:]):
        _, columns = curve_pixels(plot_curves({"a": [(start, 0), (end, 0)]}, title="A stage", boundaries=boundaries))
        widths.append(int(np.ptp(columns)) - 10)  # without the marks at its ends
    assert min(widths) > 800 * charts.LEAST / 2 and sum(widths) == pytest.approx(800, abs=12)
    for (a, wide), (b, other) in combinations(zip(lengths, widths), 2):
        assert abs(wide - other) <= 2 if a == b else (wide < other) == (a < b)


def test_a_logarithmic_axis():
    """Equal factors are equal distances, and the ticks are true."""
    line = plot_curves({"a": [(x, 10 ** (-x / 4)) for x in range(9)]}, log=True)
    rows, columns = curve_pixels(line)
    assert np.corrcoef(rows, columns)[0, 1] > 0.999
    ticks = _log_ticks(np.log10(0.03), np.log10(20), 9)
    assert [text for _, text in ticks] == ["0.05", "0.1", "0.2", "0.5", "1", "2", "5", "10", "20"]
    assert all(10**place == pytest.approx(float(text)) for place, text in ticks)
    assert [text for _, text in _log_ticks(-3, 3, 5)] == ["0.001", "0.01", "0.1", "1", "10", "100", "1000"]


def test_names_that_do_not_fit_take_another_row():
    draw = ImageDraw.Draw(Image.new("RGB", (1800, 600)))

    def rows(n):
        return (charts._legend(draw, [f"a long name of curve {i}" for i in range(n)], 160, 1760, 0) - 40) / 34

    assert [rows(n) for n in (0, 1, 4, 5, 12)] == [-40 / 34, 0, 0, 1, 2]


def test_what_a_lone_curve_is_called_is_the_title():
    """Without a title it has its legend."""
    def top(**options):
        rows, _ = curve_pixels(plot_curves({"loss": [(0, 0), (1, 1)]}, **options))
        return rows.min()

    alone, named = top(title="Training loss"), top()
    assert alone != named
    assert (np.asarray(plot_curves({"loss": [(0, 0)], "more": [(1, 1)]}, y_label="ms"))[:24] < 128).any()


def test_panels(tmp_path):
    panels = [dict(curves={"train": [(0, 3), (1, 2)]}, y_label="loss"), dict(curves={}, title="nothing yet")]
    image = plot_panels(panels, tmp_path / "curves.png")
    assert image.size == (900, 600)
    assert (np.asarray(Image.open(tmp_path / "curves.png")) == np.asarray(image)).all()
    for bad in (dict(panels=[]), dict(panels=panels, size=(20, 20))):
        with pytest.raises(ValueError, match="panels"):
            plot_panels(**bad)
