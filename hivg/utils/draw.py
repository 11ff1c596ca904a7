"""Images with boxes, masks and heat maps drawn over them, with Pillow alone (line charts: charts.py).

Pixels: x runs right, y runs down, (0, 0) is the top left corner of the top left pixel. Boxes are (xmin, ymin, xmax,
ymax) in pixels; the rectangles inside this file are the same in integers, right and bottom excluded. Colours are (red,
green, blue) in 0..255. Every function returns a new RGB image and does not change its arguments.
"""

import math

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter, ImageOps

from hivg.utils.fonts import clean_text, text_block

# Okabe and Ito, distinct with any kind of colour vision: vermillion, blue, green, orange, sky, purple, yellow
COLOURS = ["#d55e00", "#0072b2", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#f0e442"]
HEAT = ["#2a0a8f", "#d4436f", "#f6ef20"]  # violet, red, yellow: their lightness rises, so that they also read in grey
WHITE = (255, 255, 255)
PAPER = (252, 252, 250)
INK = (34, 34, 34)
GREY = (105, 105, 105)
FAINT = (228, 228, 228)
OPACITY = 0.85  # of a heat map where it is highest
OUTLINED = 400  # long side in pixels at which outlines are traced
TILE = 240  # pixels: in a smaller tile of a contact sheet labels cannot be read


def colour_of(i):
    """The i-th colour: seven hues, then darker, then lighter, then again from the start."""
    hue = ImageColor.getrgb(COLOURS[i % len(COLOURS)])
    mixed_with, share = [(0, 0.0), (0, 0.4), (255, 0.5)][i // len(COLOURS) % 3]
    return tuple(round(channel + (mixed_with - channel) * share) for channel in hue)


def contrast(colour):
    """White where its contrast to `colour` (WCAG) is at least 3.5, else black."""
    luminance = (np.array(colour) / 255) ** 2.2 @ [0.2126, 0.7152, 0.0722]
    return WHITE if luminance < 0.25 else (0, 0, 0)


def _layer(values, size):
    """An (h, w) array in 0..1 as a grey image of `size` (W, H), bicubic; NaN counts as 0."""
    levels = np.nan_to_num(np.asarray(values, dtype=np.float64) * 255 + 0.5)
    return Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)


def heat_range_of(*heatmaps):
    """(lowest, highest) finite value of heat maps: the range to draw them with if they are to be compared."""
    values = np.concatenate([np.asarray(heatmap, dtype=np.float64).ravel() for heatmap in heatmaps])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)


def overlay_heatmap(image, heatmap, heat_range=None):
    """Lay a heat map over an image: nothing where it is lowest, then violet, red and, where it is highest, yellow.

    image: RGB. heatmap: (h, w), scaled to the image; NaN counts as lowest. heat_range: (low, high), the values that
    count as lowest and highest, by default the map's own; of a constant map nothing is seen. Raises ValueError.
    """
    heat = np.asarray(heatmap, dtype=np.float64)
    given = np.array(heat_range_of(heat) if heat_range is None else heat_range, dtype=np.float64)
    if given.shape != (2,) or not -math.inf < given[0] <= given[1] < math.inf:
        raise ValueError(f"heat_range must be (low, high), finite, with low <= high, got {heat_range!r:.100}")
    low, high = given
    grey = _layer((heat - low) / (high - low or 1.0), image.size)
    colours = ImageOps.colorize(grey, HEAT[0], HEAT[2], HEAT[1])
    return Image.composite(colours, image, grey.point(lambda level: OPACITY * level))


def overlay_mask(image, mask, colour=WHITE):
    """Dim an image where the mask is not, and trace the mask where it is 0.5: a line of the colour in a contrasting
    casing, visible on anything. image: RGB. mask: (h, w) bool or 0..1, scaled to the image."""
    grey = _layer(mask, image.size)
    image = Image.composite(image, image.point(lambda level: level * 0.4), grey)
    grey.thumbnail((OUTLINED, OUTLINED))  # the filters are slow on a large image
    inside = grey.point(lambda level: 255 * (level > 127))
    for width, line in ((5, contrast(colour)), (3, colour)):
        larger = inside.filter(ImageFilter.MaxFilter(width))
        smaller = inside.filter(ImageFilter.MinFilter(width))
        image.paste(line, mask=ImageChops.subtract(larger, smaller).resize(image.size, Image.Resampling.BICUBIC))
    return image


def draw_boxes(image, boxes, labels=None, colours=None, heatmap=None, mask=None, scores=None, doubtful=0.5,
               heat_range=None, note=""):
    """Draw boxes, each with its expression and its score beside it.

    image:   PIL image
    boxes:   (n, 4), (xmin, ymin, xmax, ymax) in pixels; clipped to the image
    labels:  n strings
    colours: n colours; by default those of colour_of
    heatmap: (h, w), with heat_range: see overlay_heatmap; a bar below the image prints the two ends
    mask:    (h, w) in 0..1, see overlay_mask
    scores:  n numbers or None; a box that scores below `doubtful` is dashed
    note:    a line below the image: what the heat map and the mask are of

    A box's line runs around its inside and labels lie outside all boxes, so neither hides an object; only a line along
    the image's border lies inside the box. Labels that do not fit, or would hide more than a sixth of the image, go
    into a colour key below it. With anything below it the returned image is larger, with the old one in its top left
    corner, so that coordinates stay the same. Raises ValueError for boxes of another shape, not finite or inverted, and
    for lists of another length.
    """
    image = image.convert("RGB")  # a copy, also of an RGB image
    boxes = np.array(boxes, dtype=np.float64).reshape(len(boxes), 4)
    if not np.isfinite(boxes).all() or (boxes[:, :2] > boxes[:, 2:]).any():
        raise ValueError("boxes must be finite, with xmin <= xmax and ymin <= ymax")
    labels = _one_each(labels, len(boxes), "labels")
    scores = _one_each(scores, len(boxes), "scores")
    colours = [colour or colour_of(i) for i, colour in enumerate(_one_each(colours, len(boxes), "colours"))]
    if heatmap is not None:
        heat_range = heat_range_of(heatmap) if heat_range is None else heat_range
        image = overlay_heatmap(image, heatmap, heat_range=heat_range)
    if mask is not None:
        image = overlay_mask(image, mask, *colours[:1])

    scale = math.sqrt(image.width * image.height)  # everything grows with the image, down to a readable size
    line = max(2, round(scale / 180))
    casing = max(1, round(scale / 600))
    size = max(12, round(scale / 32))  # of the font
    limit = np.array(image.size * 2)  # W, H, W, H
    boxes = np.clip(boxes, 0, limit)  # a box outside the image leaves a mark at its border
    frames = np.hstack([np.floor(boxes[:, :2]) - line - casing, np.ceil(boxes[:, 2:]) + line + casing])
    frames = np.clip(frames, 0, limit).astype(int).tolist()  # the rectangles at the outer edges of the boxes' lines
    for frame, colour, score in zip(frames, colours, scores):
        _outline(image, frame, colour, line, casing, is_dashed=score is not None and score < doubtful)

    draw = ImageDraw.Draw(image)
    taken = list(frames)
    rows = []  # below the image
    width = max(image.width, 16 * size) - size  # of a row; at least 15: a very narrow image leaves no room
    for frame, label, colour, score in zip(frames, labels, colours, scores):
        text = f"{clean_text(label or '')} {'' if score is None else f'{score:.2f}'}".strip()
        place = _place_tag(text, size, frame, taken, image.size) if text else None
        if place:
            (x0, y0, x1, y1), block = place
            taken.append((x0, y0, x1, y1))
            draw.rectangle((x0, y0, x1 - 1, y1 - 1), colour, contrast(colour), casing)
            draw.bitmap((x0 + size // 3, y0 + size // 8), block, contrast(colour))
        elif text:
            rows.append(key_row(text, size, width, colour))
    if note:
        rows.append(key_row(clean_text(note), size, width))
    if heatmap is not None:
        rows.append(heat_bar(size, *heat_range))
    return with_rows(image, rows, size // 2)


def _one_each(values, n, name):
    """A list of n values; n times None for None."""
    if values is None:
        return [None] * n
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != n:
        raise ValueError(f"{name} must be a list of {n}, got {values!r:.100}")
    return list(values)


def _outline(image, frame, colour, line, casing, is_dashed):
    """A line along the inside of a frame, in a casing of a contrasting colour, which shows in the gaps of a dashed
    line. Its corners are whole."""
    x0, y0, x1, y1 = frame
    edge = line + casing
    inside = image.crop((x0 + edge, y0 + edge, max(x0 + edge, x1 - edge), max(y0 + edge, y1 - edge)))
    image.paste(contrast(colour), (x0 - casing, y0 - casing, x1 + casing, y1 + casing))
    image.paste(colour, (x0, y0, x1, y1))
    for axis in (0, 1) if is_dashed else ():
        low, high = frame[axis], frame[axis + 2]
        cuts = np.linspace(low, high, 2 * max(1, (high - low) // (8 * line)) + 2).round().astype(int).tolist()
        for start, end in zip(cuts[1::2], cuts[2::2]):
            image.paste(contrast(colour), (x0, start, x1, end) if axis else (start, y0, end, y1))
    image.paste(inside, (x0 + edge, y0 + edge))


def _place_tag(text, size, frame, taken, image_size):
    """(rectangle, its text) of a label that touches its frame and overlaps nothing taken, or None. Above the frame, or
    else below, right or left of it."""
    W, H = image_size
    x0, y0, x1, y1 = frame
    for share in (0.6, 0.4, 0.25, 1.0):  # of the image's width
        room = W * share - 2 * (size // 3)
        if room < 3 * size:  # one or two letters a line
            continue
        block = text_block(text, size, room)
        w, h = block.width + 2 * (size // 3), block.height + 2 * (size // 8)
        if block.height > 5 * size or w * h > W * H / 6:
            continue
        columns = [min(max(x, 0), W - w) for x in (x0, x1 - w, (x0 + x1 - w) // 2)]
        rows = [min(max(y, 0), H - h) for y in (y0, y1 - h, (y0 + y1 - h) // 2)]
        above_or_below = [(x, y) for y in (y0 - h, y1) for x in columns]
        for x, y in above_or_below + [(x, y) for x in (x1, x0 - w) for y in rows]:
            is_free = all(x >= x1 or x + w <= x0 or y >= y1 or y + h <= y0 for x0, y0, x1, y1 in taken)
            if is_free and 0 <= x <= W - w and 0 <= y <= H - h:
                return (x, y, x + w, y + h), block
    return None


def with_rows(image, rows, gap):
    """An image with rows, which are images too, below it, `gap` pixels around each."""
    width = max([image.width] + [row.width + 2 * gap for row in rows])
    height = image.height + sum(row.height + gap for row in rows) + gap * bool(rows)
    canvas = Image.new("RGB", (width, height), PAPER)
    canvas.paste(image, (0, 0))
    y = image.height + gap
    for row in rows:
        canvas.paste(row, (gap, y))
        y += row.height + gap
    return canvas


def key_row(text, size, width, colour=None):
    """Text of `size`, wrapped to `width` pixels, behind a square of the colour if there is one -> PIL image."""
    indent = 3 * size // 2 if colour else 0
    block = text_block(text, size, width - indent)
    row = Image.new("RGB", (indent + block.width, block.height), PAPER)
    draw = ImageDraw.Draw(row)
    if colour:
        draw.rectangle((0, size // 8, size - 1, size // 8 + size - 1), colour, GREY)
    draw.bitmap((indent, 0), block, INK)
    return row


def heat_bar(size, low, high):
    """The colours of a heat map from low to high between these numbers, in a font of `size` -> PIL image."""
    places = max(0, 1 - math.floor(math.log10(high - low))) if low < high else 2
    start, end = (text_block(f"{value:.{places}f}", size) for value in (low, high))
    bar = overlay_heatmap(Image.new("RGB", (7 * size, size), "white"), [np.linspace(0, 1, 7 * size)])
    row = Image.new("RGB", (start.width + bar.width + end.width + size, start.height), PAPER)
    row.paste(ImageOps.expand(bar, 1, GREY), (start.width + size // 2, size // 8))
    for block, x in ((start, 0), (end, row.width - end.width)):
        ImageDraw.Draw(row).bitmap((x, 0), block, INK)
    return row


def contact_sheet(tiles, captions=None, columns=4, tile=320):
    """A grid of images, `columns` wide, each fitted into a square of `tile` pixels, or of TILE if that is more, with
    its caption below. tiles: images as in draw_boxes; captions: as many strings. Raises ValueError."""
    if not tiles:
        raise ValueError("a contact sheet needs at least one image")
    captions = _one_each(captions, len(tiles), "captions")
    tile = max(tile, TILE)
    columns = min(columns, len(tiles))
    gap = tile // 20
    size = max(12, tile // 24)  # of the font
    strips = []
    for start in range(0, len(tiles), columns):
        images = []
        for image in tiles[start : start + columns]:
            scale = (tile - 2) / max(image.size)  # a line of a pixel around it shows where a white image ends
            image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
            images.append(ImageOps.expand(image.convert("RGB"), 1, GREY))
        texts = [text_block(clean_text(text or "", 200), size, tile) for text in captions[start : start + columns]]
        top = max(image.height for image in images)  # of the captions
        height = top + max(gap // 2 + text.height for text in texts) * any(captions)
        strip = Image.new("RGB", (columns * (tile + gap) - gap, height), PAPER)
        for i, (image, text) in enumerate(zip(images, texts)):
            strip.paste(image, (i * (tile + gap) + (tile - image.width) // 2, 0))
            ImageDraw.Draw(strip).bitmap((i * (tile + gap), top + gap // 2), text, INK)
        strips.append(strip)
    return with_rows(Image.new("RGB", (1, 0)), strips, gap)
