"""Line charts with Pillow alone: the curves of a training run, the panels of a benchmark."""

import math
from dataclasses import dataclass
from itertools import groupby

from PIL import Image, ImageDraw

from hivg.utils.draw import FAINT, GREY, INK, colour_of
from hivg.utils.files import save_image
from hivg.utils.fonts import clean_text, font_for, fonts_of_size, text_block, write_block


def plot_curves(curves, path=None, size=(900, 360), **options):
    """A chart of one panel; options: title, x_label, y_label and boundaries, as in plot_panels."""
    return plot_panels([{"curves": curves, **options}], path, size)


def plot_panels(panels, path=None, size=(900, 300)):
    """Line charts below each other with a common range of x -> PIL image, written to `path` if there is one.

    panels: dicts with
        curves                  {name: [(x, y), ...]} in drawing order; a y that is not finite leaves a gap
        title, x_label, y_label optional texts
        boundaries              optional [(x, name), ...]: vertical lines, e.g. where a stage begins
    size: (width, height) of one panel in pixels. Raises ValueError.
    """
    width, height = size
    if not panels or width < 200 or height < 150:
        raise ValueError(f"a chart needs panels of at least 200 x 150 pixels, got {len(panels)} of {size}")
    xs = []
    for panel in panels:
        xs += [x for x, _ in _finite_points(panel["curves"])]
        xs += [x for x, _ in panel.get("boundaries", ())]
    x_range = _range(xs, room=0.0)
    x_step = 1.0 if all(float(x).is_integer() for x in xs) else 0.0  # no ticks between two steps or epochs
    image = Image.new("RGB", (2 * width, 2 * height * len(panels)), "white")
    for i, panel in enumerate(panels):  # drawn at twice the size, then reduced: smooth lines
        image.paste(_panel(2 * width, 2 * height, x_range, x_step, **panel), (0, 2 * height * i))
    image = image.reduce(2)
    if path is not None:
        save_image(image, path)
    return image


@dataclass
class Axes:
    """The plotting area in pixels and the ranges of its axes."""

    left: int
    right: int
    top: int
    bottom: int
    x_range: tuple
    y_range: tuple
    x_step: float  # least distance between two ticks

    def column(self, x):
        low, high = self.x_range
        return self.left + (x - low) / (high - low) * (self.right - self.left)

    def row(self, y):
        low, high = self.y_range
        return self.bottom - (y - low) / (high - low) * (self.bottom - self.top)


def _panel(width, height, x_range, x_step, curves, title="", x_label="", y_label="", boundaries=()):
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    ys = [y for _, y in _finite_points(curves)]
    low, high = _range(ys, room=0.05)
    if all(0 <= y <= 1 for y in ys):  # an accuracy is never 1.1
        low = max(low, 0.0)
        high = min(high, 1.0)
    axes = Axes(160, width - 40, 16, height - (92 if x_label else 56), x_range, (low, high), x_step)
    if title:
        write_block(draw, (axes.left, axes.top), text_block(clean_text(title, 80), 32), INK)
        axes.top += 48
    axes.top = _legend(draw, curves, axes)
    axes.top = _boundary_names(draw, boundaries, axes) + 8
    axes.top = min(axes.top, axes.bottom - 60)  # a legend of very many names must not push the chart out

    _grid(draw, axes)
    for x, _ in boundaries:
        column = axes.column(x)
        for y in range(axes.top - 8, axes.bottom, 16):  # dashed
            draw.line((column, y, column, min(y + 8, axes.bottom)), GREY, 2)
    draw.line((axes.left, axes.top, axes.left, axes.bottom, axes.right, axes.bottom), GREY, 2)
    for i, points in enumerate(curves.values()):
        _curve(draw, [(axes.column(x), axes.row(y)) if _finite(x, y) else None for x, y in points], colour_of(i))
    middle = ((axes.left + axes.right) / 2, (axes.top + axes.bottom) / 2)
    if not ys:
        draw.text(middle, "no data", GREY, fonts_of_size(28)[0], anchor="mm")
    if x_label:
        x_label = clean_text(x_label, 80)
        draw.text((int(middle[0]), height - 12), x_label, INK, font_for(x_label, 24), anchor="md")
    if y_label:  # reads upwards
        block = text_block(clean_text(y_label, 40), 24)
        upright = Image.new("L", (block.width, block.height))
        write_block(ImageDraw.Draw(upright), (0, 0), block, 255)
        upright = upright.transpose(Image.Transpose.ROTATE_90)
        image.paste(INK, (14, int(middle[1]) - upright.height // 2), upright)
    return image


def _grid(draw, axes):
    """Lines at round values, which are written beside the axes."""
    font = fonts_of_size(24)[0]
    for y, text in _ticks(*axes.y_range, (axes.bottom - axes.top) // 64):
        row = axes.row(y)
        draw.line((axes.left, row, axes.right, row), FAINT, 2)
        draw.text((axes.left - 14, row), text, GREY, font, anchor="rm")
    for x, text in _ticks(*axes.x_range, (axes.right - axes.left) // 160, axes.x_step):
        column = axes.column(x)
        draw.line((column, axes.top, column, axes.bottom), FAINT, 2)
        draw.text((column, axes.bottom + 12), text, GREY, font, anchor="ma")


def _finite(x, y):
    return abs(x) < 1e300 and abs(y) < 1e300  # False for NaN; beyond 1e300 a difference could overflow


def _finite_points(curves):
    return [point for curve in curves.values() for point in curve if _finite(*point)]


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
    largest = max(map(abs, values), default=0.0)
    step_power = math.floor(math.log10(step) + 1e-9)
    if 1e-3 <= largest < 1e6:
        decimals = max(0, -step_power)
        return [(value, f"{value + 0.0:,.{decimals}f}") for value in values]  # + 0.0: no "-0"
    decimals = max(0, math.floor(math.log10(largest or 1.0)) - step_power)
    ticks = []
    for value in values:
        mantissa, exponent = f"{value:.{decimals}e}".split("e")
        ticks.append((value, f"{float(mantissa):g}e{int(exponent)}" if value else "0"))
    return ticks


def _legend(draw, names, axes):
    """A coloured line and the name of each curve, in as many rows as it takes -> the pixel row below."""
    x = axes.left
    top = axes.top
    for i, name in enumerate(names):
        block = text_block(clean_text(name, 60), 24)
        if x > axes.left and x + 52 + block.width > axes.right:
            x = axes.left
            top += 34
        draw.line((x, top + 16, x + 40, top + 16), colour_of(i), 8)
        write_block(draw, (x + 52, top), block, INK)
        x += 52 + block.width + 36
    return top + 40 if names else top


def _boundary_names(draw, boundaries, axes):
    """The names of vertical lines above them, a row lower where they would overlap -> the pixel row below."""
    ends = []  # of the last name in each row
    for x, name in sorted((axes.column(x), clean_text(name, 40)) for x, name in boundaries):
        block = text_block(name, 22)
        x = min(x, axes.right - block.width)
        row = 0
        while row < len(ends) and ends[row] > x:
            row += 1
        ends[row:row + 1] = [x + block.width + 12]
        write_block(draw, (x, axes.top + 28 * row), block, GREY)
    return axes.top + 28 * len(ends)


def _curve(draw, points, colour):
    """A line through (x, y) points in pixels, interrupted at each None; an isolated point is a dot."""
    for is_gap, run in groupby(points, lambda point: point is None):
        run = list(run)
        if len(run) > 1 and not is_gap:
            draw.line(run, colour, 5, joint="curve")
        elif not is_gap:
            x, y = run[0]
            draw.ellipse((x - 7, y - 7, x + 7, y + 7), colour)
