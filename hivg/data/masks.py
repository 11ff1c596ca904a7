"""Segmentation masks as COCO stores them, polygons and run lengths, to arrays of pixels, and back to run lengths.

Polygons are filled by pixel centres. COCO's own program traces the outline on a grid five times as fine, so single
pixels along an outline differ from it; run lengths are exact.
"""

import numpy as np

from hivg.utils.messages import quoted

MAX_POLYGONS = 1000  # of one object
MAX_NUMBERS = 100_000  # in all its polygons
MAX_PIXELS = 1e15  # of a coordinate, to either side
CROSSINGS = 1000  # of a polygon's edges with each row of pixels, on average


def polygon_mask(polygons, height, width):
    """-> (height, width) bool, True where a pixel's centre (x + 0.5, y + 0.5) is inside any of the polygons.

    polygons: flat lists [x0, y0, x1, y1, ..] in pixels, which need not be closed and may reach out of the image. Each
    is filled by the even-odd rule, so it has a hole where it covers itself twice. Left and upper outlines are inside,
    right and lower ones are not. Raises ValueError as check_polygons.
    """
    mask = np.zeros((height, width), dtype=bool)
    for corners in check_polygons(polygons):
        mask |= _fill(corners, height, width)
    return mask


def check_polygons(polygons):
    """-> the corners of each polygon, (n, 2) float64. Raises ValueError for what is no polygon, and as check_size."""
    check_size(polygons)
    return [_corners(polygon) for polygon in polygons]


def check_size(polygons):
    """Raises ValueError for so many polygons or numbers that filling would take forever."""
    total = sum(len(polygon) if isinstance(polygon, (list, tuple)) else 0 for polygon in polygons[: MAX_POLYGONS + 1])
    if len(polygons) > MAX_POLYGONS or total > MAX_NUMBERS:
        raise ValueError(f"an outline of more than {MAX_POLYGONS:,} polygons or {MAX_NUMBERS:,} numbers")


def _corners(polygon):
    """Flat list -> (n, 2) float64."""
    try:
        flat = np.asarray(polygon, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        flat = np.array(np.nan)
    if flat.ndim != 1 or len(flat) % 2 or not (np.abs(flat) < MAX_PIXELS).all():  # also for nan
        raise ValueError(f"a polygon is a flat list of numbers x0, y0, x1, y1, .., not {quoted(polygon)}")
    return flat.reshape(-1, 2)


def _fill(corners, height, width):
    """Scan lines through the middle of each row of pixels: a pixel is inside if an odd number of the polygon's edges
    cross its line at its centre or to the left."""
    x, y = corners.T  # (n,) where each edge starts
    to_x, to_y = np.roll(corners, -1, axis=0).T  # (n,) where it ends
    # an edge's upper end counts as a crossing, its lower end does not, so a corner on a line counts once
    first = _first_centre(np.minimum(y, to_y), height)  # (n,) rows
    end = _first_centre(np.maximum(y, to_y), height)
    crossings = end - first  # (n,) of each edge
    if crossings.sum() > CROSSINGS * (height + 1):
        raise ValueError(f"an outline that crosses the rows of pixels more than {CROSSINGS:,} times on average")
    edge = np.repeat(np.arange(len(corners)), crossings)  # (m,) the edge of each crossing
    number = np.arange(len(edge)) - np.repeat(np.cumsum(crossings) - crossings, crossings)  # (m,) 0, 1, .. of its edge
    row = first[edge] + number
    x_at = x[edge] + (row + 0.5 - y[edge]) * (to_x - x)[edge] / (to_y - y)[edge]
    column = _first_centre(x_at, width)
    odd = np.zeros((height, width + 1), dtype=bool)
    np.logical_xor.at(odd, (row, column), True)
    return np.logical_xor.accumulate(odd[:, :width], axis=1)


def _first_centre(position, limit):
    """The first pixel whose centre is at a position or after it, at most `limit`."""
    return np.ceil(position - 0.5).clip(0, limit).astype(int)


def rle_mask(rle, image_size=None):
    """COCO's run lengths -> (H, W) bool. Raises ValueError (run_lengths)."""
    height, width, counts = run_lengths(rle, image_size)
    return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T


def run_lengths(rle, image_size=None):
    """COCO's run lengths -> H, W and the list of counts.

    rle: {"size": [H, W], "counts": ..}, where counts are the lengths of alternating runs of 0 and 1, starting with 0,
    down one column after another; a list of ints, or COCO's compressed string (str or bytes). Raises ValueError for
    anything else, for counts that are negative or do not add up to H * W, and for H, W other than image_size, if given.
    """
    size = rle.get("size") if isinstance(rle, dict) else None
    if not (isinstance(size, (list, tuple)) and len(size) == 2
            and all(isinstance(side, (int, np.integer)) and side >= 0 for side in size)):
        raise ValueError(f'a run-length mask is {{"size": [height, width], "counts": ..}}, not {quoted(rle)}')
    height, width = size
    if image_size and image_size != (height, width):
        raise ValueError(f"a run-length mask of {quoted(height)} x {quoted(width)} for an image of "
                         f"{quoted(image_size[0])} x {quoted(image_size[1])} (height x width)")
    counts = rle.get("counts")
    if isinstance(counts, (str, bytes)):
        counts = _decompress(counts)
    if not isinstance(counts, (list, tuple)) or not all(isinstance(c, (int, np.integer)) for c in counts):
        raise ValueError(f"the counts of a run-length mask are a list of ints or a string, not {quoted(counts)}")
    if any(c < 0 for c in counts):
        raise ValueError(f"a run-length mask has a negative count, {quoted(min(counts))}")
    if sum(counts) != height * width:
        raise ValueError(f"the counts of a run-length mask add up to {quoted(sum(counts))}, "
                         f"its size is {quoted(height)} x {quoted(width)} = {quoted(height * width)}")
    return height, width, counts


def _decompress(text):
    """COCO's string of counts -> list of ints (pycocotools, maskApi.c, rleFrString).

    Each character minus 48 is six bits: five bits of the count, lowest first, and a sixth that says that more follow.
    The fifth bit of the last character is the sign. From the fourth on, a count is stored as its difference to the one
    two before it.
    """
    counts = []
    value = 0
    shift = 0
    for code in text.encode() if isinstance(text, str) else text:
        bits = code - 48
        if not 0 <= bits < 64 or shift > 60:  # no count has more than 64 bits
            raise ValueError(f"the string of a run-length mask is damaged: {quoted(text)}")
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
        raise ValueError(f"the string of a run-length mask ends within a count: {quoted(text)}")
    return counts


def run_lengths_of(mask):
    """(H, W) bool -> COCO's run lengths, {"size": [H, W], "counts": its compressed string}, the inverse of rle_mask."""
    height, width = mask.shape
    down = np.concatenate([[False], mask.T.ravel()])  # down the columns; the first run is of 0s and may be empty
    ends = np.flatnonzero(down[1:] != down[:-1])  # of all runs but the last
    counts = np.diff(ends, prepend=0, append=mask.size).tolist()
    return {"size": [height, width], "counts": _compress(counts)}


def _compress(counts):
    """Counts -> COCO's string of them, see _decompress."""
    text = ""
    for number, count in enumerate(counts):
        value = count - (counts[number - 2] if number > 2 else 0)
        while not -16 <= value < 16:
            text += chr((value & 31 | 32) + 48)
            value >>= 5
        text += chr((value & 31) + 48)
    return text


def mask_of(segmentation, height, width):
    """The "segmentation" of an annotation of a height x width image -> (height, width) bool, or None if it is None or
    empty.

    segmentation: run lengths (rle_mask), or a list of polygons (polygon_mask) and run lengths, whose union is taken.
    Raises ValueError for anything else, and for run lengths of another size.
    """
    if segmentation is None or (isinstance(segmentation, (list, tuple, dict)) and not segmentation):
        return None
    parts = [segmentation] if isinstance(segmentation, dict) else segmentation
    if not isinstance(parts, (list, tuple)):
        raise ValueError(f"a segmentation is a list of polygons or a dictionary of run lengths, not {quoted(parts)}")
    mask = polygon_mask([part for part in parts if not isinstance(part, dict)], height, width)
    for rle in parts:
        if isinstance(rle, dict):
            mask |= rle_mask(rle, (height, width))
    return mask
