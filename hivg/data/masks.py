"""Segmentation masks as COCO stores them, polygons and run lengths, to arrays of pixels.

Polygons are filled here by pixel centres. COCO's own program traces the outline on a grid five times as fine, so single
pixels along an outline differ from it; run lengths are exact.
"""

import numpy as np


def polygon_mask(polygons, height, width):
    """-> (height, width) bool, True where a pixel's centre (x + 0.5, y + 0.5) is inside any of the polygons.

    polygons is a list of flat lists [x0, y0, x1, y1, ..] in pixels, closed by themselves; each is filled by the
    even-odd rule, so where a polygon covers itself twice is a hole. It may reach out of the image. Left and upper
    outlines are inside, right and lower ones not. Raises ValueError for a list that is no polygon.
    """
    mask = np.zeros((height, width), dtype=bool)
    for polygon in polygons:
        mask |= _fill(_corners(polygon), height, width)
    return mask


def _corners(polygon):
    """Flat list -> (n, 2) float64."""
    try:
        flat = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError):
        flat = np.array(np.nan)
    if flat.ndim != 1 or len(flat) % 2 or not np.isfinite(flat).all():
        raise ValueError(f"a polygon is a flat list of numbers x0, y0, x1, y1, .., not {_short(polygon)}")
    return flat.reshape(-1, 2)


def _fill(corners, height, width):
    """Scan lines through the middles of the pixel rows: a pixel is inside if an odd number of the polygon's edges
    cross its line at or left of its centre."""
    x, y = corners.T  # (n,) where each edge starts
    to_x, to_y = np.roll(corners, -1, axis=0).T  # (n,) and ends
    # An edge crosses the lines from its upper end to before its lower one, so a corner on a line counts once.
    first = _first_centre(np.minimum(y, to_y), height)  # (n,) rows
    end = _first_centre(np.maximum(y, to_y), height)
    crossings = end - first  # (n,) of each edge
    edge = np.repeat(np.arange(len(corners)), crossings)  # (m,) the edge of each crossing
    number = np.arange(len(edge)) - np.repeat(np.cumsum(crossings) - crossings, crossings)  # (m,) 0, 1, .. in its edge
    row = first[edge] + number
    x_at = x[edge] + (row + 0.5 - y[edge]) * (to_x - x)[edge] / (to_y - y)[edge]
    column = _first_centre(x_at, width)
    odd = np.zeros((height, width + 1), dtype=bool)
    np.logical_xor.at(odd, (row, column), True)
    return np.logical_xor.accumulate(odd[:, :width], axis=1)


def _first_centre(position, limit):
    """The first pixel whose centre is not before a position, at most `limit`."""
    return np.ceil(position - 0.5).clip(0, limit).astype(int)


def rle_mask(rle):
    """COCO's run lengths -> (H, W) bool.

    rle is {"size": [H, W], "counts": ..}: counts of pixels down one column after the other, in turn 0 and 1, starting
    with 0; a list of ints, or COCO's compressed string (str or bytes). Raises ValueError for anything else, or counts
    that are negative or do not add up to H * W.
    """
    height, width = _size(rle)
    counts = rle.get("counts")
    if isinstance(counts, (str, bytes)):
        counts = _decompress(counts)
    if not isinstance(counts, (list, tuple)) or not all(isinstance(c, (int, np.integer)) for c in counts):
        raise ValueError(f"the counts of a run-length mask are a list of ints or a string, not {_short(counts)}")
    if any(c < 0 for c in counts):
        raise ValueError(f"a run-length mask has a negative count, {_short(min(counts))}")
    if sum(counts) != height * width:
        raise ValueError(f"the counts of a run-length mask add up to {_short(sum(counts))}, "
                         f"its size is {height} x {width} = {height * width}")
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def _size(rle):
    """(H, W) of a dictionary of run lengths."""
    size = rle.get("size") if isinstance(rle, dict) else None
    if not (isinstance(size, (list, tuple)) and len(size) == 2
            and all(isinstance(side, (int, np.integer)) and side >= 0 for side in size)):
        raise ValueError(f'a run-length mask is {{"size": [height, width], "counts": ..}}, not {_short(rle)}')
    return tuple(size)


def _decompress(text):
    """COCO's string of counts -> list of ints (pycocotools, maskApi.c, rleFrString).

    Each character less 48 is six bits. The lower five are bits of the count, lowest first; the sixth says that more
    follow; the fifth of the last one is the sign. From the fourth count on it is the difference to the last but one.
    """
    counts = []
    value = 0
    shift = 0
    for code in text.encode() if isinstance(text, str) else text:
        bits = code - 48
        if not 0 <= bits < 64 or shift > 60:  # no count has more than 64 bits
            raise ValueError(f"the string of a run-length mask is damaged: {_short(text)}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = 0
        shift = 0
    if shift:
        raise ValueError(f"the string of a run-length mask ends within a count: {_short(text)}")
    return counts


def mask_of(segmentation, height, width):
    """The "segmentation" of an annotation of a height x width image -> (height, width) bool, or None if it is None or
    empty.

    It may be a list of polygons (polygon_mask) or a dictionary of run lengths (rle_mask). Raises ValueError for
    anything else, or for run lengths of another size.
    """
    if segmentation is None or (isinstance(segmentation, (list, tuple, dict)) and not segmentation):
        return None
    if isinstance(segmentation, dict):
        size = _size(segmentation)
        if size != (height, width):
            raise ValueError(f"a run-length mask of {size[0]} x {size[1]} for an image of {height} x {width}"
                             " (height x width)")
        return rle_mask(segmentation)
    if isinstance(segmentation, (list, tuple)):
        return polygon_mask(segmentation, height, width)
    raise ValueError("a segmentation is a list of polygons or a dictionary of run lengths, "
                     f"not {_short(segmentation)}")


def _short(value):
    """Its repr, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
