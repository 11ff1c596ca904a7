"""Line charts with Pillow alone: the curves of a training run, the panels of a benchmark."""

import math
from itertools import groupby, pairwise

import numpy as np
from PIL import Image, ImageDraw

from hivg.utils.draw import COLOURS, FAINT, GREY, INK
from hivg.utils.files import save_image
from hivg.utils.fonts import clean_text, font_for, text_block

# Curve i is told apart by its colour, with any kind of colour vision, and without colours by its dashes and its marks
CURVES = [COLOURS[1], COLOURS[0], COLOURS[4], COLOURS[5], COLOURS[3], "#222222"]  # no green beside the red
DASHES = [(10**9, 1), (26, 12), (9, 9), (48, 12)]  # pixels drawn, pixels left out; the first is never left out
SIDES = [32, 4, 3, 5]  # of a mark: a dot, a square, a triangle, a pentagon
MARKED = 24  # points of a curve that are marked; in a longer one only those that stand alone
LEAST = 1 / 12  # of the width: the narrowest piece between two boundaries


def plot_curves(curves, size=(900, 360), **options):
    """A chart of one panel; options: as in plot_panels."""
    return plot_panels([{"curves": curves, **options}], size=size)


def plot_panels(panels, path=None, size=(900, 300)):
    """Line charts below each other with a common range of x -> PIL image, written to `path` if there is one.

    panels: dicts with
        curves                  {name: [(x, y), ...]} in drawing order; a y that is not finite leaves a gap
        title, x_label, y_label optional texts
        boundaries              optional [(x, name), ...]: vertical lines, e.g. where a stage begins. The pieces between
                                them are as wide as the roots of their lengths, so that a short one is seen
        levels                  optional {name: y}: horizontal lines, e.g. what guessing reaches
        log                     whether y is logarithmic; then a y of 0 or less leaves a gap
    size: (width, height) of one panel in pixels. Raises ValueError.
    """
    width, height = size
    if not panels or width < 200 or height < 150:
        raise ValueError(f"a chart needs panels of at least 200 x 150 pixels, got {len(panels)} of {size}")
    starts = [x for panel in panels for x, _ in panel.get("boundaries", ())]
    xs = starts + [x for panel in panels for curve in panel["curves"].values() for x, y in curve if _finite(x, y)]
    low, high = _range(xs, room=0.0)
    knots = np.unique([low, *starts, high])  # (n,) the pieces' ends
    roots = np.sqrt(np.diff(knots))  # (n - 1,)
    shares = np.maximum(roots / roots.sum(), LEAST)
    places = np.append(0, shares.cumsum() / shares.sum())  # (n,) shares of the width
    x_step = 1.0 if (knots % 1 == 0).all() else 0.0  # no ticks between two steps or epochs
    image = Image.new("RGB", (2 * width, 2 * height * len(panels)), "white")
    for i, panel in enumerate(panels):  # drawn at twice the size, then reduced: smooth lines
        image.paste(_panel(2 * width, 2 * height, knots, places, x_step, **panel), (0, 2 * height * i))
    image = image.reduce(2)
    if path is not None:
        save_image(image, path)
    return image


def _panel(width, height, knots, places, x_step, curves, title="", x_label="", y_label="", boundaries=(), levels=None,
           log=False):
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    levels = levels or {}
    scale = math.log10 if log else float
    curves = {name: [(x, scale(y)) if _finite(x, y) and (y > 0 or not log) else None for x, y in curve]
              for name, curve in curves.items()}
    ys = [*map(scale, levels.values()), *(point[1] for curve in curves.values() for point in curve if point)]
    low, high = _range(ys, room=0.05)
    if not log and all(0 <= y <= 1 for y in ys):  # an accuracy is never 1.1
        low, high = max(low, 0.0), min(high, 1.0)

    left, right, top, bottom = 160, width - 40, 16, height - (92 if x_label else 56)
    heading = clean_text(", ".join(filter(None, (title, y_label))), 80)
    if heading:
        draw.bitmap((left, top), text_block(heading, 32), INK)
        top += 48
    if len(curves) > 1 or not heading:
        top = _legend(draw, curves, left, right, top)
    top = min(top + (40 if boundaries else 8), bottom - 60)  # very many names must not push the chart out

    def column(x):
        return left + float(np.interp(x, knots, places)) * (right - left)

    def row(y):  # of a scaled y
        return bottom - (y - low) / (high - low) * (bottom - top)

    font = font_for("0", 24)
    for y, text in (_log_ticks if log else _ticks)(low, high, (bottom - top) // 64):
        draw.line((left, row(y), right, row(y)), FAINT, 2)
        draw.text((left - 14, row(y)), text, GREY, font, anchor="rm")
    last = -math.inf
    for start, end in pairwise(knots.tolist()):
        for x, text in _ticks(start, end, int(column(end) - column(start)) // 160, x_step):
            if column(x) >= last + 80:
                last = column(x)
                draw.line((last, top, last, bottom), FAINT, 2)
                draw.text((last, bottom + 12), text, GREY, font, anchor="ma")
    end = 0  # of the last name
    for x, name in sorted(boundaries):
        _line(draw, [(column(x), top - 8), (column(x), bottom)], GREY, 2, 8, 8)
        block = text_block(clean_text(name, 40), 22)
        start = min(column(x), right - block.width)
        if start >= end:  # else there is no room for it
            draw.bitmap((start, top - 38), block, GREY)
            end = start + block.width + 12
    draw.line((left, top, left, bottom, right, bottom), GREY, 2)
    for name, y in levels.items():
        _line(draw, [(left, row(scale(y))), (right, row(scale(y)))], GREY, 3, 4, 8)
        block = text_block(clean_text(name, 60), 22)
        draw.bitmap((right - block.width, row(scale(y)) - block.height - 2), block, GREY)
    for i, points in enumerate(curves.values()):
        _curve(draw, [point and (column(point[0]), row(point[1])) for point in points], i)
    middle = (left + right) // 2
    if not ys:
        draw.text((middle, (top + bottom) // 2), "no data", GREY, font_for("no data", 28), anchor="mm")
    if x_label:
        x_label = clean_text(x_label, 80)
        draw.text((middle, height - 12), x_label, INK, font_for(x_label, 24), anchor="md")
    return image


def _finite(x, y):
    return abs(x) < 1e300 and abs(y) < 1e300  # False for NaN; beyond 1e300 a difference could overflow


def _range(values, room):
    """(minimum, maximum), widened on both sides by `room`, a share of the range; never the same number twice."""
    low = min(values, default=0.0)
    high = max(values, default=1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    return low - room * (high - low), high + room * (high - low)


def _ticks(low, high, count, least=0.0):
    """[(value, text)] of about `count` values between low and high, 1, 2 or 5 times a power of ten and at least
    `least` apart."""
    least = max(least, (high - low) / max(count, 2))
    power = 10.0 ** math.floor(math.log10(least))
    step = next((factor * power for factor in (1, 2, 5) if factor * power >= least), 10 * power)
    values = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    is_plain = 1e-3 <= max(map(abs, values), default=0.0) < 1e6
    return [(value, f"{value + 0.0:,.{decimals}f}" if is_plain else f"{value:g}") for value in values]  # + 0.0: no "-0"


def _log_ticks(low, high, count):
    """The same of a logarithmic axis, where low, high and each value are powers of ten: at 1, 2 and 5 times every whole
    power, or where these are many at the powers alone."""
    powers = range(max(math.floor(low), -300), min(math.ceil(high), 300) + 1)
    numbers = [factor * 10.0**power for power in powers for factor in ((1, 2, 5) if len(powers) <= count else (1,))]
    return [(math.log10(y), f"{y:g}") for y in numbers if low <= math.log10(y) <= high]


def _legend(draw, names, left, right, top):
    """The line and the name of each curve, in as many rows as it takes -> the pixel row below."""
    x = left
    for i, name in enumerate(names):
        block = text_block(clean_text(name, 60), 24)
        if x > left and x + 88 + block.width > right:
            x, top = left, top + 34
        _curve(draw, [(x, top + 16), (x + 37, top + 16), (x + 74, top + 16)], i)
        draw.bitmap((x + 88, top), block, INK)
        x += 88 + block.width + 36
    return top + 40 if names else top


def _curve(draw, points, i):
    """Curve number i through (x, y) points in pixels, interrupted at each None."""
    for run in (run for is_there, run in groupby(points, bool) if is_there):
        run = [np.mean(list(close), 0) for _, close in groupby(run, lambda point: point[0] // 8)]  # of many, their mean
        _line(draw, run, CURVES[i % len(CURVES)], 5, *DASHES[i % len(DASHES)])
        for point in run if len(run) == 1 or len(points) <= MARKED else ():
            draw.regular_polygon((*point, 9), SIDES[i % len(SIDES)], fill=CURVES[i % len(CURVES)])


def _line(draw, points, colour, width, drawn, left_out):
    """A line through points, dashed: pixels drawn, pixels left out."""
    x, y = np.transpose(points)  # (n,) each
    along = np.append(0, np.hypot(np.diff(x), np.diff(y)).cumsum())  # (n,) how far along the line each point is
    for start in np.arange(0, along[-1], drawn + left_out):
        end = min(start + drawn, along[-1])
        at = np.unique([start, *along[(along > start) & (along < end)], end])
        draw.line(list(zip(np.interp(at, along, x), np.interp(at, along, y))), colour, width, joint="curve")
