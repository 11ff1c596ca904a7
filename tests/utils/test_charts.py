"""Line charts: ticks are round and in the right place, curves run through their points, odd input is drawn."""

import numpy as np
import pytest
from PIL import Image

from hivg.utils import charts
from hivg.utils.charts import _ticks, plot_curves, plot_panels
from hivg.utils.draw import colour_of


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


def axes_of(monkeypatch, curves, **options):
    """The Axes of a chart."""
    found = []
    monkeypatch.setattr(charts, "_grid", lambda draw, axes: found.append(axes))
    plot_curves(curves, **options)
    return found[0]


def test_a_chart_of_few_points(monkeypatch):
    """Whole steps have whole ticks, and an accuracy is at most 1."""
    assert axes_of(monkeypatch, {"a": [(1, 0.8)]}).x_step == 1
    assert axes_of(monkeypatch, {"a": [(0.5, 0.8), (2, 0.9)]}).x_step == 0
    low, high = axes_of(monkeypatch, {"accuracy": [(3, 0.8)]}).y_range
    assert (low, high) == (0.4, 1)
    assert axes_of(monkeypatch, {"accuracy": [(3, 0), (4, 1)]}).y_range == (0, 1)
    assert axes_of(monkeypatch, {"loss": [(3, 0), (4, 2)]}).y_range == pytest.approx((-0.1, 2.1))


@pytest.mark.parametrize("curves", [
    {}, {"none": []}, {"one": [(3, 5)]}, {"gap": [(0, 1), (1, NAN), (2, 3)]}, {"all": [(0, NAN), (1, float("inf"))]},
    {"flat": [(0, 2), (9, 2)]}, {"huge": [(0, -1e299), (1, 1e299)]}, {"tiny": [(0, 1e-12), (1, 3e-12)]},
    {f"run {i} with a long name": [(0, i), (1, -i)] for i in range(30)}, {"犬": [(i, i % 7) for i in range(5000)]},
])
def test_curves(curves):
    image = plot_curves(curves, title="Training", x_label="epoch", y_label="loss",
                        boundaries=[(0, "warm-up"), (0.5, "stage 1"), (0.55, "stage 2"), (1, "end")])
    assert image.size == plot_curves(curves).size == (900, 360) and image.mode == "RGB"


def test_a_curve_is_where_its_points_are():
    line = np.asarray(plot_curves({"a": [(0, 0), (0.5, 0.5), (1, 1)]}))[60:]  # below the legend
    rows, columns = np.nonzero(np.abs(line.astype(int) - colour_of(0)).sum(axis=2) < 60)
    assert np.corrcoef(rows, columns)[0, 1] < -0.999  # rises to the right
    broken = np.asarray(plot_curves({"a": [(0, 0), (0.4, 0.4), (0.5, NAN), (0.6, 0.6), (1, 1)]}))[60:]
    assert (broken[:, 470:490] == 255).all(axis=2).mean() > (line[:, 470:490] == 255).all(axis=2).mean()


def curve_pixels(image):
    """(rows, columns) of the first curve, below the legend."""
    pixels = np.asarray(image)[26:].astype(int)
    rows, columns = np.nonzero(np.abs(pixels - colour_of(0)).sum(axis=2) < 60)
    return rows + 26, columns


def test_a_curve_stays_within_the_axes():
    rows, columns = curve_pixels(plot_curves({"a": [(0, 0), (1, 9), (2, -9), (3, 0)]}))
    assert rows.min() > 32 and rows.max() <= 332  # between the legend and the tick labels of x
    assert columns.min() >= 78 and columns.max() <= 882
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


def test_names_that_do_not_fit_take_another_row(monkeypatch):
    one_row = axes_of(monkeypatch, {"a long name of a curve": []}).top
    assert axes_of(monkeypatch, {f"a long name of curve {i}": [] for i in range(4)}).top == one_row
    assert axes_of(monkeypatch, {f"a long name of curve {i}": [] for i in range(12)}).top == one_row + 2 * 34
    stages = [(0, "stage 1"), (300, "stage 2"), (1000, "end")]
    assert axes_of(monkeypatch, {}, boundaries=stages).top == axes_of(monkeypatch, {}).top + 28
    stages.append((5, "stage 1b"))
    assert axes_of(monkeypatch, {}, boundaries=stages).top == axes_of(monkeypatch, {}).top + 2 * 28


def test_the_name_of_y_reads_upwards():
    image = np.asarray(plot_curves({}, y_label="MMMMMM.........."))[:, :40]
    rows, _ = np.nonzero(image.max(axis=2) < 128)
    assert np.median(rows) > rows.min() + 0.6 * (rows.max() - rows.min())


def test_panels(tmp_path):
    panels = [dict(curves={"train": [(0, 3), (1, 2)]}, y_label="loss"), dict(curves={}, title="nothing yet")]
    image = plot_panels(panels, tmp_path / "curves.png")
    assert image.size == (900, 600)
    assert (np.asarray(Image.open(tmp_path / "curves.png")) == np.asarray(image)).all()
    for bad in (dict(panels=[]), dict(panels=panels, size=(20, 20))):
        with pytest.raises(ValueError, match="panels"):
            plot_panels(**bad)
