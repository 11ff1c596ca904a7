"""Line charts with Pillow alone: the curves of a training run, the bars of a benchmark."""

import math

from PIL import Image, ImageDraw

from hivg.utils.draw import FAINT, GREY, INK, clean_text, colour_of, font_for, fonts_of_size, text_block, write_block


def plot_curves(curves, path=None, title="", x_label="", y_label="", boundaries=(), size=(900, 360)):
    """A line chart.

    curves: {name: [(x, y), ...]} in drawing order; a gap is left where y is no finite number
    path: a file to write as well; boundaries: [(x, name), ...] vertical lines, for instance where a stage begins
    size: (width, height) in pixels. Returns the picture.
    """
    return plot_panels([dict(curves=curves, title=title, x_label=x_label, y_label=y_label, boundaries=boundaries)],
                       path, size)


def plot_panels(panels, path=None, size=(900, 300)):
    """Line charts below each other, with one range of x for all, so that they can be read downwards.

    panels: a list of dicts with `curves` and, at will, title, x_label, y_label, boundaries, as in plot_curves
    path: a file to write as well; size: (width, height) of one panel in pixels. Returns the picture.
    """
    width, height = size
    if not panels or width < 200 or height < 150:
        raise ValueError(f"expected one or more panels of 200 x 150 pixels or more, got {len(panels)} of {size}")
    x_range = _range([x for panel in panels for curve in panel["curves"].values() for x, y in curve if _finite(x, y)]
                     + [x for panel in panels for x, _ in panel.get("boundaries", ())], room=0.0)
    image = Image.new("RGB", (2 * width, 2 * height * len(panels)), "white")
    for i, panel in enumerate(panels):  # drawn at twice the size and reduced: smooth lines
        image.paste(_panel(2 * width, 2 * height, x_range, **panel), (0, 2 * height * i))
    image = image.reduce(2)
    if path is not None:
        image.save(path)
    return image


def _panel(width, height, x_range, curves, title="", x_label="", y_label="", boundaries=()):
    image = Image.new("RGB", (width, height), "white")
    draw, left, right, bottom = ImageDraw.Draw(image), 160, width - 40, height - (92 if x_label else 56)
    ys = [y for curve in curves.values() for x, y in curve if _finite(x, y)]
    (x_low, x_high), (y_low, y_high) = x_range, _range(ys, room=0.05)

    def column(x):
        return left + (x - x_low) / (x_high - x_low) * (right - left)

    def row(y):
        return bottom - (y - y_low) / (y_high - y_low) * (bottom - top)

    top = 16
    if title:
        write_block(draw, (left, top), text_block(clean_text(title, 80), 32, math.inf), INK)
        top += 48
    names = [(clean_text(name, 60), colour_of(i)) for i, name in enumerate(curves)]
    top = _legend(draw, names, left, right, top)
    top = _boundary_names(draw, [(column(x), clean_text(name, 40)) for x, name in boundaries], right, top) + 8
    top = min(top, bottom - 60)  # a legend of very many names must not push the chart out

    for y, text in _ticks(y_low, y_high, (bottom - top) // 64):
        draw.line((left, row(y), right, row(y)), FAINT, 2)
        draw.text((left - 14, row(y)), text, GREY, fonts_of_size(24)[0], anchor="rm")
    for x, text in _ticks(x_low, x_high, (right - left) // 160):
        draw.line((column(x), top, column(x), bottom), FAINT, 2)
        draw.text((column(x), bottom + 12), text, GREY, fonts_of_size(24)[0], anchor="ma")
    for x, _ in boundaries:
        for y in range(top - 8, bottom, 16):  # dashed
            draw.line((column(x), y, column(x), min(y + 8, bottom)), GREY, 2)
    draw.line((left, top, left, bottom, right, bottom), GREY, 2)
    for curve, (_, colour) in zip(curves.values(), names):
        _curve(draw, [(column(x), row(y)) if _finite(x, y) else None for x, y in curve], colour)
    if not ys:
        draw.text(((left + right) / 2, (top + bottom) / 2), "no data", GREY, fonts_of_size(28)[0], anchor="mm")
    _axis_names(image, clean_text(x_label, 80), clean_text(y_label, 40), (left + right) // 2, (top + bottom) // 2)
    return image


def _finite(x, y):
    return abs(x) < 1e300 and abs(y) < 1e300  # false for not-a-number; beyond, a difference would overflow


def _range(values, room):
    """Lowest and highest value with `room` (a share of the range) on both sides; never the same number twice."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        return low - (abs(low) / 2 or 0.5), high + (abs(high) / 2 or 0.5)
    return low - room * (high - low), high + room * (high - low)


def _ticks(low, high, count):
    """About `count` round values between low and high, 1, 2 or 5 times a power of ten apart, with their texts."""
    least = (high - low) / max(count, 2)
    power = 10.0 ** math.floor(math.log10(least))
    step = next((m * power for m in (1, 2, 5) if m * power >= least), 10 * power)
    values = [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    largest = max(map(abs, values), default=0.0)
    if 1e-3 <= largest < 1e6:
        return [(v, f"{v + 0.0:,.{max(0, -math.floor(math.log10(step) + 1e-9))}f}") for v in values]
    digits = max(0, math.floor(math.log10(largest or 1.0)) - math.floor(math.log10(step) + 1e-9))
    mantissas = [f"{v:.{digits}e}".split("e") for v in values]
    return [(v, f"{float(m):g}e{int(e)}" if v else "0") for v, (m, e) in zip(values, mantissas)]


def _legend(draw, names, left, right, top):
    """A line of colour and a name for each curve, in as many rows as it takes; returns the row below."""
    x = left
    for name, colour in names:
        block = text_block(name, 24, math.inf)
        if x > left and x + 52 + block.width > right:
            x, top = left, top + 34
        draw.line((x, top + 16, x + 40, top + 16), colour, 8)
        write_block(draw, (x + 52, top), block, INK)
        x += 52 + block.width + 36
    return top + 40 if names else top


def _boundary_names(draw, names, right, top):
    """Names of vertical lines at their columns, a row lower where they would run into each other."""
    ends = []  # of the last name in each row
    for x, name in sorted(names):
        block = text_block(name, 22, math.inf)
        x = min(x, right - block.width)
        level = next((i for i, end in enumerate(ends) if end <= x), len(ends))
        ends[level:level + 1] = [x + block.width + 12]
        write_block(draw, (x, top + 28 * level), block, GREY)
    return top + 28 * len(ends)


def _curve(draw, points, colour):
    """A line through (x, y) points in pixels, broken at each None; a point alone is a dot."""
    run = []
    for point in points + [None]:
        if point is not None:
            run.append(point)
        elif run:
            if len(run) > 1:
                draw.line(run, colour, 5, joint="curve")
            else:
                draw.ellipse((run[0][0] - 7, run[0][1] - 7, run[0][0] + 7, run[0][1] + 7), colour)
            run = []


def _axis_names(image, x_label, y_label, middle_x, middle_y):
    draw = ImageDraw.Draw(image)
    if x_label:
        draw.text((middle_x, image.height - 12), x_label, INK, font_for(x_label, 24), anchor="md")
    if y_label:
        block = text_block(y_label, 24, math.inf)
        upright = Image.new("L", (block.width, block.height))
        write_block(ImageDraw.Draw(upright), (0, 0), block, 255)
        upright = upright.transpose(Image.Transpose.ROTATE_90)
        image.paste(INK, (14, middle_y - upright.height // 2), upright)
