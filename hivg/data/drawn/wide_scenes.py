"""Scenes of the wider world: paper of any lightness, shades of the colours, long shapes, one to ten objects, and rows
of two to six of a class, for ordinals.
"""

import math
from dataclasses import replace
from itertools import product

import numpy as np

from hivg.data.drawn.drawing import ALIKE, COLOURS, HELD_OUT, LONG, REACH, SIZES, Object, Scene, background
from hivg.data.drawn.expressions import MARGIN
from hivg.data.drawn.phrases import COLOUR, SHAPE, pick
from hivg.data.drawn.wide_expressions import WIDE_SHAPES, Row

MOST = 10  # objects of a scene
LEAST = 0.09  # diameter of the small ones of a row, in units of the image's long side
LEAST_REFRAMED = 0.05  # diameter of the smallest in another frame, in its long side
LONGEST = 3  # of a frame: its long side / its short one
CONTRAST = 80  # of a shade to the paper, at least: the distance of two points in RGB
SIZE_MIXES = (("small",), ("medium",), ("large",), ("small", "large"), ("small", "medium", "large"),
              ("small", "small", "medium", "large"))


def shades_on(rng, paper):
    """{colour: RGB} of the colours that stand out on the paper, each in a shade of its own."""
    shades = {}
    for colour, rgb in COLOURS.items():
        shade = np.clip(rgb + 50 * (rng.random(3) - 0.5), 0, 255).astype(int)
        if all(np.linalg.norm(shade - other) >= CONTRAST for other in paper.colours):
            shades[colour] = tuple(shade.tolist())
    return shades


def page(rng):
    """(width, height, background, shades) of a new scene."""
    aspect = 2 ** (rng.random() + rng.random() - 1)  # width / height from 1:2 to 2:1, mostly near 1:1
    paper = background(rng, 8, 40, 0)
    return min(1.0, aspect), min(1.0, 1 / aspect), paper, shades_on(rng, paper)


def form(rng, look, size, filled, unit, shades):
    """An object of this (colour, shape), not placed yet. unit: the length that SIZES are shares of."""
    colour, shape = look
    stretch, rotation = 1.0, 20 * rng.random() - 10
    if shape in LONG:
        stretch = 1.6 * (6 / 1.6) ** rng.random()
        if rng.random() < 0.5:
            stretch = 1 / stretch
        if rng.random() < 0.2:
            rotation = 180 * rng.random()
    elif shape not in LONG.values() and filled and rng.random() < 0.3:
        stretch = 2 ** (0.8 * rng.random() - 0.4)
    if shape == "arrow":  # to all four sides
        rotation += 90 * int(4 * rng.random())
    diameter = SIZES[size] * unit * (0.95 + 0.1 * rng.random())
    return Object(shape, colour, size, filled, 0.0, 0.0, diameter, rotation, stretch, shades[colour])


def reaches(obj):
    """How far it reaches to the side and up and down, with some room left."""
    share = 0.52 if obj.shape in LONG else REACH
    return share * obj.extents[0], share * obj.extents[1]


def overlap(a, b):
    """Whether more than a corner of one may hide the other."""
    if a.stretch == b.stretch == 1:
        return math.hypot(a.x - b.x, a.y - b.y) <= 0.49 * (a.diameter + b.diameter)
    (aw, ah), (bw, bh) = a.extents, b.extents
    return abs(a.x - b.x) < 0.5 * (aw + bw) and abs(a.y - b.y) < 0.5 * (ah + bh)


def place(rng, objects, width, height, placed=()):
    """Those placed and these, the largest first; one that finds no room in 30 tries is left out."""
    placed = list(placed)
    for obj in sorted(objects, key=lambda obj: -obj.diameter):
        reach_x, reach_y = reaches(obj)
        if 2 * reach_x >= width or 2 * reach_y >= height:
            continue
        for _ in range(30):
            x = reach_x + rng.random() * (width - 2 * reach_x)
            y = reach_y + rng.random() * (height - 2 * reach_y)
            there = replace(obj, x=x, y=y)
            if not any(overlap(there, other) for other in placed):
                placed.append(there)
                break
    return tuple(placed)


def some(rng, options, low, high):
    """low to high different options."""
    count = low + int(rng.random() * (high - low + 1))
    return [options[i] for i in rng.permutation(len(options))[:count]]


def looks_of(colours, shapes, held_out):
    """All (colour, shape) of these that are not held out. held_out: one that is among them all the same, or None."""
    if held_out:
        colours = [held_out[0], *(colour for colour in colours if colour != held_out[0])]
        shapes = [held_out[1], *(shape for shape in shapes if shape != held_out[1])]
    looks = [look for look in product(colours, shapes) if look not in HELD_OUT]
    if held_out:
        looks += [held_out] * (1 + len(looks) * 2 // 3)  # often several, so that a place or relation is needed
    return looks


def wide_scene(rng, held_out=None, shapes=WIDE_SHAPES, most=MOST):
    """-> (a scene of one to ten objects, no row, shades), or None if a colour needed does not show on its paper.

    held_out: a (colour, shape) that at least one object has, or None. shapes: those that may be drawn. most: objects.
    """
    width, height, paper, shades = page(rng)
    looks = looks_of(some(rng, tuple(shades), 2, 4), some(rng, shapes, 2, 5), held_out)
    if held_out and held_out[0] not in shades:
        return None
    chosen = [pick(rng, looks) for _ in range(1 + int(most * rng.random()))]
    if held_out:
        chosen[0] = held_out
    sizes = pick(rng, SIZE_MIXES)
    filled = pick(rng, ((True,), (True, False), (True, True, False)))
    unit = math.sqrt(width * height) * (0.4 + 0.6 * rng.random())
    objects = [form(rng, look, pick(rng, sizes), pick(rng, filled), unit, shades) for look in chosen]
    return Scene(width, height, paper, place(rng, objects, width, height)), None, shades


def row_scene(rng, n, held_out=None, attributes=0, shapes=WIDE_SHAPES):
    """-> (a scene with a row, Row, shades), or None if that failed.

    n: how many the row has. attributes: what names its class, 0 = any of three. Others as in wide_scene.
    """
    width, height, paper, shades = page(rng)
    axis = int(rng.random() * 2)
    attributes = attributes or pick(rng, (SHAPE, SHAPE, SHAPE | COLOUR, SHAPE | COLOUR, COLOUR))
    if held_out:
        attributes = SHAPE | COLOUR
    colour, shape = held_out or (pick(rng, tuple(shades)), pick(rng, shapes))
    if colour not in shades or (colour, shape) in HELD_OUT and not held_out:
        return None
    if (width, height)[axis] < 0.75:
        width, height = height, width
    lengths = width, height  # of the image, by axis

    def look(is_member):
        """A random (colour, shape), in the class or not."""
        while True:
            pair = (colour if attributes & COLOUR and is_member else pick(rng, tuple(shades)),
                    shape if attributes & SHAPE and is_member else pick(rng, shapes))
            fits = (pair[0] == colour or not attributes & COLOUR) and (pair[1] == shape or not attributes & SHAPE)
            is_clear = is_member or {pair[1], shape} not in ALIKE
            if fits == is_member and (pair not in HELD_OUT or pair == held_out) and is_clear:
                return pair

    is_flat = rng.random() < 0.5
    # in rows of any number the objects are as small as in long ones, or their size would tell the number
    fitting = min(SIZES["small"] * math.sqrt(width * height), (0.9 if is_flat else 1.6) * lengths[axis] / n)
    unit = (LEAST + (fitting - LEAST) * rng.random()) / SIZES["small"]
    mix = ("small",) if n > 3 else pick(rng, (("small",), ("small", "medium"), ("medium",)))
    filled = pick(rng, ((True,), (True, False)))
    members = []
    for _ in range(n):
        obj = form(rng, look(True), pick(rng, mix), pick(rng, filled), unit, shades)
        if is_flat and obj.shape in LONG and (obj.stretch > 1) == (axis == 0):  # they stand side by side
            obj = replace(obj, stretch=1 / obj.stretch)
        members.append(obj)
    members = in_a_row(rng, members, axis, lengths, is_flat)
    if members is None:
        return None
    others = [form(rng, look(False), pick(rng, mix), pick(rng, filled), unit, shades)
              for _ in range(int(rng.random() * min(5, MOST - n + 1)))]
    objects = place(rng, others, width, height, members)
    return Scene(width, height, paper, objects), Row(tuple(range(n)), axis, attributes), shades


def in_a_row(rng, members, axis, lengths, is_flat):
    """The members, placed one after another along an axis, evenly or not, over a part of the image: where "the third"
    is says little then, it must be counted. None if there is no room.

    is_flat: about level, else anywhere on the other axis.
    """
    n = len(members)
    before, after = reaches(members[0])[axis], reaches(members[-1])[axis]
    gaps = [1.15 * MARGIN] * (n - 1)
    if is_flat:
        gaps = [max(1.15 * MARGIN, 0.9 * (reaches(a)[axis] + reaches(b)[axis])) for a, b in zip(members, members[1:])]
    free = lengths[axis] - before - after - sum(gaps)
    if free < 0:
        return None
    spaces = np.linspace(0, 1, n) if rng.random() < 0.5 else np.sort(rng.random(n))
    span = free * rng.random()
    extra = span * spaces + (free - span) * rng.random()
    along = before + extra + np.concatenate([[0], np.cumsum(gaps)])
    level = rng.random()
    placed = []
    for obj, at in zip(members, along.tolist()):
        reach = reaches(obj)[1 - axis]
        share = level + 0.1 * (rng.random() - 0.5) if is_flat else rng.random()
        across = reach + min(max(share, 0.0), 1.0) * (lengths[1 - axis] - 2 * reach)
        placed.append(replace(obj, **dict(zip("xy" if axis == 0 else "yx", (at, across)))))
    fits = all(reaches(obj)[1 - axis] * 2 < lengths[1 - axis] for obj in members)
    inside = all(reaches(obj)[axis] <= at <= lengths[axis] - reaches(obj)[axis] for obj, at in zip(members, along))
    if not (fits and inside) or any(overlap(a, b) for i, a in enumerate(placed) for b in placed[:i]):
        return None
    return placed


def reframed(rng, scene, row):
    """The scene in another frame: cut close around its objects, so that one alone fills the image, or so wide that they
    are tiny, or long and narrow, perhaps with a row along its short side. Half of the time all shrink in place.

    row: the scene's Row, or None."""
    shrink = (LEAST_REFRAMED / min(obj.diameter for obj in scene.objects)) ** max(0.0, 2 * rng.random() - 1)
    objects = [replace(obj, diameter=shrink * obj.diameter) for obj in scene.objects]
    starts, spans = [], []  # of the box around all objects, by axis
    for axis in (0, 1):  # a little more than half of an object to each side, as corners reach further
        ends = [((obj.x, obj.y)[axis] + sign * 0.53 * obj.extents[axis]) for obj in objects for sign in (-1, 1)]
        starts.append(min(ends))
        spans.append(max(ends) - min(ends))
    widest = min(obj.diameter for obj in objects) / LEAST_REFRAMED
    if row:  # its members stay a margin apart
        along = [(objects[i].x, objects[i].y)[row.axis] for i in row.members]
        widest = min(widest, float(min(np.diff(along))) / MARGIN)
    zoom = max(0.0, 1.4 * rng.random() - 0.4)  # 0: close, as often as 2 in 7 times, to 1: wide
    long_side = max(spans) * max(1.0, widest / max(spans)) ** zoom
    sides = [long_side, long_side]
    axis = row.axis if row and rng.random() < 0.6 else int(2 * rng.random())  # the short one
    least = max(spans[axis], long_side / LONGEST)
    sides[axis] = least + rng.random() * (long_side - least)
    x, y = (start - rng.random() * (side - span) for start, side, span in zip(starts, sides, spans))
    framed = [replace(obj, x=(obj.x - x) / long_side, y=(obj.y - y) / long_side, diameter=obj.diameter / long_side)
              for obj in objects]
    return replace(scene, width=sides[0] / long_side, height=sides[1] / long_side, objects=tuple(framed))
