"""Charts of the ablation: differences with their intervals, and where [REG] looks."""

import base64
import math

import numpy as np
from PIL import Image, ImageDraw

from hivg.ablate.arms import CLAIMS
from hivg.ablate.runs import MAPS_KEPT
from hivg.data.drawn.scenes import EXPRESSIONS_PER_SCENE, Shapes
from hivg.data.transforms import Letterbox
from hivg.utils.draw import FAINT, GREY, INK, WHITE, contact_sheet, draw_boxes
from hivg.utils.fonts import text_block

LINE = 44  # pixels a row, before the chart is reduced to half its size
NAMES = 760  # pixels for the names on the left
WIDTH = 1800
COLOURS = {"better": "#0072b2", "worse": "#d55e00", "undecided": "#6e6e6e"}  # distinct with any kind of colour vision
SIDES = {"better": 32, "worse": 4, "undecided": 3}  # of the mark: a dot, a square, a triangle


def plot_differences(results):
    """The comparisons [(Arm, Difference)] as points with their intervals, by claim -> a PIL image."""
    lines = []  # (text, Difference or None for a heading)
    for claim in CLAIMS:
        of_claim = [(arm, d) for arm, d in results if arm.claim == claim]
        if of_claim:
            lines.append((claim, None))
        for arm, d in of_claim:
            lines.append((f"{arm.name} against {arm.against}, {d.seeds} seed{'s' * (d.seeds > 1)}", d))
    least = min(d.low for _, d in results)
    most = max(d.high for _, d in results)
    step = 5 if most - least < 60 else 10  # points between two vertical lines
    least = step * math.floor(min(least, -1) / step)
    most = step * math.ceil(max(most, 1) / step)
    height = LINE * (len(lines) + 3)
    image = Image.new("RGB", (WIDTH, height), "white")
    draw = ImageDraw.Draw(image)

    def column(points):
        return NAMES + (points - least) / (most - least) * (WIDTH - NAMES - 60)

    for points in range(least, most + 1, step):
        x = column(points)
        draw.line((x, 10, x, height - 2 * LINE), INK if points == 0 else FAINT, 3 if points == 0 else 2)
        label = text_block(f"{points:+d}" if points else "0", 24)
        draw.bitmap((x - label.width / 2, height - 2 * LINE + 4), label, GREY)
    label = text_block("points of Acc@0.5 on test; intervals that hold for all at once, 95 %", 24)
    draw.bitmap((WIDTH - label.width - 60, height - LINE), label, GREY)
    for number, (text, d) in enumerate(lines):
        y = LINE * number + LINE
        block = text_block(text, 28)
        draw.bitmap((20 if d is None else 60, y - 18), block, INK if d is None else GREY)
        if d is not None:
            colour = COLOURS[d.verdict]
            draw.line((column(d.low), y, column(d.high), y), colour, 6)
            draw.regular_polygon((column(d.points), y, 12), SIDES[d.verdict], fill=colour)
    return image.reduce(2)


def plot_attention(columns, expressions, size, across=None):
    """Where [REG] looks in the last encoder layer, relative to the patch that it looks at most -> a PIL image, a row
    for each expression.

    columns: {caption: the `maps` of a results row}. expressions: their numbers in `test`. size: of the model's square.
    across: images side by side, by default a whole row.
    """
    test = Shapes("test")
    tiles = []
    captions = []
    for number in expressions:
        item = test[number // EXPRESSIONS_PER_SCENE]
        which = number % EXPRESSIONS_PER_SCENE
        letterbox = Letterbox(*item["image"].size, size)
        box = item["boxes"][which]
        tiles.append(draw_boxes(item["image"], [box], colours=[WHITE]))
        captions.append(item["expressions"][which])
        for caption, maps in columns.items():
            heatmap = letterbox.map_to_image(map_of(maps, number, size))
            tiles.append(draw_boxes(item["image"], [box], colours=[WHITE], heatmap=heatmap, heat_range=(0, 1)))
            captions.append(caption)
    return contact_sheet(tiles, captions, columns=across or 1 + len(columns), tile=240)


def map_of(maps, number, size):
    """The map of one expression from base64, enlarged: (size, size) float32 in 0..1."""
    values = np.frombuffer(base64.b64decode(maps), np.uint8)
    side = math.isqrt(len(values) // MAPS_KEPT)
    patches = values.reshape(MAPS_KEPT, side, side)[number] / np.float32(255)
    return np.asarray(Image.fromarray(patches).resize((size, size), Image.BILINEAR))
