"""Images with boxes, masks and heat maps drawn over them, with Pillow alone (line charts: charts.py).

Pixels: x runs right, y runs down, (0, 0) is the top left corner of the top left pixel. Boxes are
(xmin, ymin, xmax, ymax) in pixels; the rectangles inside this file are the same in integers, right and bottom
excluded. Every function returns a new RGB image and does not change its arguments.
"""

import math

import numpy as np
from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFilter

from hivg.utils.fonts import clean_text, text_block, write_block

# Okabe and Ito, distinct with any kind of colour vision: vermillion, blue, green, orange, sky, purple, yellow
COLOURS = ["#d55e00", "#0072b2", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#f0e442"]
# eleven equal steps of "inferno", whose lightness rises evenly, so that it also reads in grey
HEAT = "#000004 #160b39 #420a68 #6a176e #932667 #bc3754 #dd513a #f37819 #fca50a #f6d746 #fcffa4".split()
PAPER = (252, 252, 250)
INK = (34, 34, 34)
GREY = (105, 105, 105)
FAINT = (228, 228, 228)
OUTLINED = 400  # long side in pixels at which outlines are traced


# ---- colours and images ---------------------------------------------------------------------------------------------

def colour_of(i):
    """The i-th colour (red, green, blue), 0..255: seven hues, then darker, then lighter, then again from the start."""
    hue = ImageColor.getrgb(COLOURS[i % len(COLOURS)])
    mixed_with, share = [(0, 0.0), (0, 0.4), (255, 0.5)][i // len(COLOURS) % 3]
    return tuple(round(channel + (mixed_with - channel) * share) for channel in hue)


def _colour(colour, i):
    """(r, g, b) of a tuple or of a name that Pillow knows; None: the i-th of ours."""
    if colour is None:
        return colour_of(i)
    return ImageColor.getrgb(colour)[:3] if isinstance(colour, str) else tuple(map(int, colour))


def _contrast(colour):
    """White where its contrast to `colour` (WCAG) is at least 3.5, else black."""
    luminance = (np.array(colour) / 255) ** 2.2 @ [0.2126, 0.7152, 0.0722]
    return (255, 255, 255) if luminance < 0.25 else (0, 0, 0)


def _rgb(image):
    """A PIL image of any mode, or an (H, W, 3) uint8 array, as a new RGB image."""
    if not isinstance(image, Image.Image):
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"image must be a PIL image or (H, W, 3) uint8 with H, W > 0, got {image.shape} "
                             f"{image.dtype}")
        image = Image.fromarray(image)
    if 0 in image.size:
        raise ValueError("image has no pixels")
    return image.convert("RGB")  # a copy, also of an RGB image


def _layer(values, size, name):
    """An (h, w) array in 0..1 as a grey image of `size` (W, H), bicubic."""
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"{name} must have shape (h, w), got {values.shape}")
    grey = np.clip(np.nan_to_num(values) * 255 + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(grey).resize(size, Image.Resampling.BICUBIC)


def overlay_heatmap(image, heatmap, alpha=0.65):
    """Lay a heat map over an image, from dark violet (lowest) to light yellow (highest).

    heatmap: (h, w) of any range and size; scaled to the image and to its own minimum and maximum. NaN and a constant
    map count as lowest. alpha: opacity in 0..1 at the maximum; half of it at the minimum, to keep the image visible.
    """
    image = _rgb(image)
    heat = np.asarray(heatmap, dtype=np.float64)
    finite = heat[np.isfinite(heat)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    heat = np.nan_to_num(heat, nan=low, posinf=high, neginf=low)
    grey = _layer((heat - low) / (high - low or 1.0), image.size, "heatmap")
    anchors = np.array([ImageColor.getrgb(c) for c in HEAT])  # (11, 3)
    at = np.linspace(0, 10, 256)  # where each grey level lies between them
    table = np.stack([np.interp(at, range(11), channel) for channel in anchors.T], 1).round()  # (256, 3)
    colours = Image.fromarray(table.astype(np.uint8)[np.asarray(grey)])
    opacity = grey.point([round(255 * alpha * (0.5 + 0.5 * level / 255)) for level in range(256)])
    return Image.composite(colours, image, opacity)


def overlay_mask(image, mask, colour=None):
    """Tint the masked part of an image, and trace it where the mask is 0.5: a white line between black ones, visible
    on any colour. mask: (h, w) bool or 0..1, scaled to the image. colour: (r, g, b), a name or "#rrggbb"."""
    image = _rgb(image)
    mask = np.asarray(mask, dtype=np.float64)
    opacity = _layer(mask, image.size, "mask").point(lambda level: level * 0.5)
    image.paste(_colour(colour, 0), mask=opacity)
    scale = min(1, OUTLINED / max(image.size))  # the filters are slow on a large image
    size = [max(1, round(side * scale)) for side in image.size]
    inside = _layer(mask, size, "mask").point(lambda level: 255 * (level > 127))
    for width, colour in ((5, "black"), (3, "white")):
        larger = inside.filter(ImageFilter.MaxFilter(width))
        smaller = inside.filter(ImageFilter.MinFilter(width))
        image.paste(colour, mask=ImageChops.subtract(larger, smaller).resize(image.size, Image.Resampling.BICUBIC))
    return image


# ---- boxes ----------------------------------------------------------------------------------------------------------

def draw_boxes(image, boxes, labels=None, colours=None, heatmap=None, mask=None):
    """Draw boxes, each with its expression beside it.

    image:   PIL image, or (H, W, 3) uint8 RGB array
    boxes:   (n, 4), (xmin, ymin, xmax, ymax) in pixels; clipped to the image
    labels:  n strings
    colours: n colours, (r, g, b) or "#rrggbb"; by default those of colour_of
    heatmap: (h, w), see overlay_heatmap; mask: (h, w) in 0..1, see overlay_mask

    A box's line runs around its inside and labels lie outside all boxes, so neither hides an object; only a line along
    the image's border lies inside the box. Labels that do not fit, or would hide more than a sixth of the image, go
    into a colour key below it. The returned image is then larger, with the old one in its top left corner, so that
    coordinates stay the same.

    Raises ValueError for boxes of another shape, not finite or inverted, and for lists of another length.
    """
    image = _rgb(image)
    boxes = _checked_boxes(boxes)
    labels = _one_each(labels, len(boxes), "labels")
    colours = [_colour(colour, i) for i, colour in enumerate(_one_each(colours, len(boxes), "colours"))]
    if heatmap is not None:
        image = overlay_heatmap(image, heatmap)
    if mask is not None:
        image = overlay_mask(image, mask, colours[0] if colours else None)

    scale = math.sqrt(image.width * image.height)  # everything grows with the image, down to a readable size
    line = max(2, round(scale / 180))
    halo = max(1, round(scale / 600))
    size = max(12, round(scale / 32))  # of the font
    draw = ImageDraw.Draw(image)
    frames = [_frame(box, line + halo, image.size) for box in boxes]
    for frame, colour in zip(frames, colours):
        _outline(draw, frame, colour, line, halo)

    taken = list(frames)
    in_key = []  # (text, colour)
    for frame, label, colour in zip(frames, labels, colours):
        text = clean_text(label or "")
        if not text:
            continue
        place = _place_tag(text, size, frame, taken, image.size)
        if place is None:
            in_key.append((text, colour))
            continue
        tag, block = place
        taken.append(tag)
        _fill(draw, tag, colour)
        write_block(draw, (tag[0] + size // 3, tag[1] + size // 8), block, _contrast(colour))
    return _with_key(image, in_key, size) if in_key else image


def _checked_boxes(boxes):
    """(n, 4) float64. Raises ValueError."""
    boxes = np.asarray(boxes, dtype=np.float64)
    boxes = boxes if boxes.size else boxes.reshape(0, 4)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must have shape (n, 4), got {boxes.shape}")
    if not np.isfinite(boxes).all() or (boxes[:, :2] > boxes[:, 2:]).any():
        raise ValueError("boxes must be finite, with xmin <= xmax and ymin <= ymax")
    return boxes


def _one_each(values, n, name):
    """A list of n values; n times None for None."""
    if values is None:
        return [None] * n
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != n:
        raise ValueError(f"{name} must be a list of {n}, got {values!r:.100}")
    return list(values)


def _frame(box, margin, size):
    """The rectangle at the outer edge of a box's line: the box grown by `margin`, within an image of `size`."""
    limit = np.array(size * 2)  # W, H, W, H
    box = np.clip(box, 0, limit)  # a box outside the image leaves a mark at its border
    frame = np.concatenate([np.floor(box[:2]) - margin, np.ceil(box[2:]) + margin])
    return tuple(np.clip(frame, 0, limit).astype(int).tolist())


def _fill(draw, rectangle, colour, **outline):
    x0, y0, x1, y1 = rectangle
    draw.rectangle((x0, y0, x1 - 1, y1 - 1), colour, **outline)  # Pillow includes the last pixel


def _outline(draw, frame, colour, line, halo):
    """A line along the inside of a frame, with a halo of a contrasting colour."""
    x0, y0, x1, y1 = frame
    _fill(draw, (x0 - halo, y0 - halo, x1 + halo, y1 + halo), None, outline=_contrast(colour), width=line + 2 * halo)
    _fill(draw, frame, None, outline=colour, width=line)


def _place_tag(text, size, frame, taken, image_size):
    """(rectangle, wrapped text) of a label that touches its frame and overlaps nothing taken, or None."""
    image_width, image_height = image_size
    indent = size // 3
    for share in (0.6, 0.4, 0.25, 1.0):  # of the image's width
        text_width = image_width * share - 2 * indent
        if text_width < 3 * size:  # one or two letters a line
            continue
        block = text_block(text, size, text_width)
        width = block.width + 2 * indent
        height = block.height + 2 * (size // 8)
        if len(block.lines) > 3 or width * height > image_width * image_height / 6 or width > image_width:
            continue
        for x, y in _spots(frame, width, height, image_size):
            tag = (x, y, x + width, y + height)
            is_inside = x >= 0 and y >= 0 and tag[2] <= image_width and tag[3] <= image_height
            if is_inside and not any(_overlap(tag, other) for other in taken):
                return tag, block
    return None


def _spots(frame, width, height, image_size):
    """Top left corners for a label around a frame, in order of preference: above, below, right, left."""
    x0, y0, x1, y1 = frame
    columns = [min(max(x, 0), image_size[0] - width) for x in (x0, x1 - width, (x0 + x1 - width) // 2)]
    rows = [min(max(y, 0), image_size[1] - height) for y in (y0, y1 - height, (y0 + y1 - height) // 2)]
    return [(x, y) for y in (y0 - height, y1) for x in columns] + [(x, y) for x in (x1, x0 - width) for y in rows]


def _overlap(a, b):
    """Whether two rectangles have pixels in common."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _with_key(image, entries, size):
    """The image with a strip below it: for each (text, colour) a square of the colour and the wrapped text."""
    pad = size // 2
    indent = 2 * size
    text_width = max(image.width, 16 * size) - indent - pad  # at least 16: a very narrow image leaves no room
    blocks = [text_block(text, size, text_width) for text, _ in entries]
    width = max([image.width] + [block.width + indent + pad for block in blocks])
    height = sum(block.height + pad // 2 for block in blocks) + 2 * pad - pad // 2
    canvas = Image.new("RGB", (width, image.height + height), PAPER)
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    y = image.height + pad
    for (_, colour), block in zip(entries, blocks):
        top = y + (block.height // len(block.lines) - size) // 2
        _fill(draw, (pad, top, pad + size, top + size), colour)
        write_block(draw, (indent, y), block, INK)
        y += block.height + pad // 2
    return canvas


# ---- contact sheet --------------------------------------------------------------------------------------------------

def contact_sheet(tiles, captions=None, columns=4, tile=320):
    """A grid of images, `columns` wide, each fitted into a square of `tile` pixels with its caption below.

    tiles: images as in draw_boxes; captions: as many strings. Raises ValueError.
    """
    if not tiles:
        raise ValueError("a contact sheet needs at least one image")
    captions = _one_each(captions, len(tiles), "captions")
    columns = min(columns, len(tiles))
    gap = size = max(11, tile // 20)  # of the font
    blocks = [text_block(clean_text(caption or "", 200), size, tile) for caption in captions]
    rows = [range(i, min(i + columns, len(tiles))) for i in range(0, len(tiles), columns)]
    heights = [tile + max([blocks[i].height for i in row if captions[i]], default=0) + gap // 2 for row in rows]
    sheet = Image.new("RGB", (columns * (tile + gap) + gap, sum(heights) + gap * (len(rows) + 1)), PAPER)
    draw = ImageDraw.Draw(sheet)
    y = gap
    for row, height in zip(rows, heights):
        for column, i in enumerate(row):
            x = gap + column * (tile + gap)
            image = _rgb(tiles[i])
            scale = tile / max(image.size)
            image = image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)
            _fill(draw, (x, y, x + tile, y + tile), (240, 240, 238))
            sheet.paste(image, (x + (tile - image.width) // 2, y + (tile - image.height) // 2))
            write_block(draw, (x, y + tile + gap // 2), blocks[i], INK)
        y += height + gap
    return sheet
