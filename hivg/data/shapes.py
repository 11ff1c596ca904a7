"""The bundled data set: pictures of coloured shapes, and expressions that each mean one of them.

Nothing is stored. Item i of a split is drawn when it is asked for, from a random generator seeded with (seed,
split, i), so it is the same on every machine. A scene is a short list of numbers, which can be drawn at any size;
boxes and masks are read off the very pixels that were drawn, so they are exact.

    dataset = Shapes("train")
    item = dataset[0]           # image, labels, expressions, targets, boxes, kinds, caption
"""
import math
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from hivg.data.expressions import ALL, COLOUR, FILL, SHAPE, SIZE, Expression, caption, express, indefinite, pick

__all__ = ["Background", "Expression", "Object", "Scene", "Shapes", "boxes_of", "caption", "draw"]

# All darker than any background: an outline then looks alike in every colour, which a small ViT learns far sooner
COLOURS = {"red": (205, 20, 30), "green": (10, 130, 45), "blue": (30, 65, 215), "brown": (125, 75, 30),
           "purple": (115, 25, 155), "orange": (240, 115, 0), "black": (18, 18, 22), "pink": (230, 70, 160)}
SIZES = {"small": 0.22, "medium": 0.31, "large": 0.44}  # diameter / sqrt(picture's area)
OUTLINE = 0.36  # an outlined shape has a hole of its own form, smaller by this share: 18 % of the diameter a side
TEXTURES = ("plain", "gradient", "stripes", "checks", "speckle")

# Pairs of colour and shape that only the split "compose" shows. No colour and no shape is in two of them, so each
# is well known from other pairs.
HELD_OUT = frozenset({("red", "star"), ("green", "heart"), ("blue", "triangle"), ("brown", "cross"),
                      ("purple", "circle"), ("black", "diamond")})

EXPRESSIONS_PER_SCENE = 4
MAX_OBJECTS = 8
NAMED = {SHAPE: 1, COLOUR: 1, FILL: 0.3, SIZE: 0.15}  # how often a phrase names each attribute
# How often each kind of expression is asked for. A scene that cannot serve a wish is drawn anew, so ordinals, which
# need three of a class, end up a little rarer.
MIXED = {"attribute": 0.35, "superlative": 0.17, "ordinal": 0.10, "relation": 0.25, "conjunction": 0.13}
# For a training that goes on: more of what is learned last.
HARD_MIX = {"attribute": 0.15, "superlative": 0.15, "ordinal": 0.25, "relation": 0.32, "conjunction": 0.13}
SPLITS = {  # number of scenes, kinds of expressions. The order gives each split its seed: append only.
    "train": (2**40, MIXED),  # endless in practice
    "val": (250, MIXED),
    "test": (1250, MIXED),
    "testA": (500, {"attribute": 1.0}),
    "testB": (500, {"ordinal": 0.4, "relation": 0.6}),
    "compose": (500, MIXED),
    "pretrain": (2**40, {}),
}


@dataclass(frozen=True)
class Object:
    """x, y, diameter in long sides of the picture, y pointing down; rotation in degrees, clockwise."""
    shape: str
    colour: str
    size: str
    filled: bool
    x: float
    y: float
    diameter: float
    rotation: float


@dataclass(frozen=True)
class Background:
    """Two RGB colours and how they alternate: period in long sides, angle in radians, seed of the speckle."""
    texture: str
    colours: tuple
    period: float
    angle: float
    seed: int


@dataclass(frozen=True)
class Scene:
    """width and height in long sides (the longer is 1); objects from back to front."""
    width: float
    height: float
    background: Background
    objects: tuple


# ---- drawing

def _polar(radii, count):
    """A closed figure with this many corners, the first at the top, their radii repeating."""
    angles = 2 * np.pi * np.arange(count) / count
    return np.resize(radii, count)[:, None] * np.stack([np.sin(angles), -np.cos(angles)], 1)


def _heart():
    t = 2 * np.pi * np.arange(64) / 64
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], 1) / 32


def _cross(reach, half):
    """Four arms of this reach and half this width."""
    r, h = reach, half
    return np.array([[-h, -r], [h, -r], [h, -h], [r, -h], [r, h], [h, h], [h, r], [-h, r], [-h, h], [-r, h], [-r, -h],
                     [-h, -h]])


def _arrow(tip, barb, neck, half, end):
    """An arrow upwards: y of its tip, x of its barbs, y of its neck, half the width of its shaft, y of its end."""
    return np.array([[0, tip], [barb, neck], [half, neck], [half, end], [-half, end], [-half, neck], [-barb, neck]])


# The corners (n, 2) of each shape for diameter 1, y pointing down. The extents differ a little, so that all look
# equally large.
CORNERS = {
    "circle": _polar([0.48], 64),
    "square": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.43,
    "triangle": _polar([0.58], 3),
    "star": _polar([0.56, 0.25], 10),
    "heart": _heart(),
    "diamond": np.array([[0, -0.57], [0.38, 0], [0, 0.57], [-0.38, 0]]),
    "cross": _cross(0.5, 0.18),
    "arrow": _arrow(-0.54, 0.5, 0.08, 0.22, 0.5),
}
# The hole of the outlined shape: the same, shrunk towards the middle; where that would leave some sides thin, redrawn.
HOLES = {shape: corners * (1 - OUTLINE) for shape, corners in CORNERS.items()}
HOLES["cross"] = _cross(0.39, 0.07)
HOLES["arrow"] = _arrow(-0.34, 0.25, -0.03, 0.1, 0.38)
REACH = 0.63  # no corner comes further from the middle, with some room to the picture's edge
SHAPES = tuple(CORNERS)


def _polygon(thing, pixels):
    """The corners of an object as a flat list of pixel coordinates. For an outlined one the path goes around the
    outside, then around the hole."""
    corners = CORNERS[thing.shape]
    if not thing.filled:
        hole = HOLES[thing.shape]
        corners = np.concatenate([corners, corners[:1], hole, hole[:1]])
    angle = math.radians(thing.rotation)
    c, s = math.cos(angle), math.sin(angle)
    corners = corners @ (np.array([[c, s], [-s, c]]) * thing.diameter) + (thing.x, thing.y)  # (n, 2) in long sides
    return np.rint(corners * pixels).astype(int).ravel().tolist()


def _texture(background, width, height):
    """The background as an RGB picture of this many pixels."""
    first, second = background.colours
    if background.texture == "plain":
        return Image.new("RGB", (width, height), first)
    if background.texture == "gradient":
        corner = np.cos(background.angle + np.array([[0, 1], [3, 2]]) * np.pi / 2)[..., None] / 2 + 0.5
        corners = corner * first + (1 - corner) * np.array(second)
        return Image.fromarray(corners.astype(np.uint8)).resize((width, height), Image.BILINEAR, (0.5, 0.5, 1.5, 1.5))
    if background.texture == "speckle":
        grid = np.random.default_rng(background.seed).random((64, 64, 1), np.float32)
        grains = grid * first + (1 - grid) * np.array(second, np.float32)
        return Image.fromarray(grains.astype(np.uint8)).resize((width, height), Image.BILINEAR)
    step = 1 / (background.period * max(width, height))
    c, s = math.cos(background.angle) * step, math.sin(background.angle) * step
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    band = np.floor(c * x + s * y).astype(np.int32)
    if background.texture == "checks":
        band += np.floor(c * y - s * x).astype(np.int32)
    bands = Image.fromarray((band & 1).astype(np.uint8))
    bands.putpalette(first + second)
    return bands.convert("RGB")


def draw(scene, long_side=256, supersample=1):
    """Draws a scene: (RGB picture, labels). labels (H, W) uint8: 0 background, i + 1 where object i shows.

    long_side in pixels. supersample=2 or more draws larger and shrinks, for smooth edges.
    """
    # Only the labels are drawn; the picture is the labels with each its object's colour, over the background.
    pixels = long_side * supersample
    width, height = (max(round(side * long_side), 1) * supersample for side in (scene.width, scene.height))
    labels = Image.new("P", (width, height))
    pencil = ImageDraw.Draw(labels)
    palette = [0, 0, 0]
    for i, thing in enumerate(scene.objects):
        pencil.polygon(_polygon(thing, pixels), fill=i + 1)
        palette += COLOURS[thing.colour]
    picture = _texture(scene.background, width, height)
    labels.putpalette(palette)
    index = np.asarray(labels)
    picture.paste(labels.convert("RGB"), mask=Image.fromarray((index > 0).view(np.uint8) * 255))
    if supersample > 1:
        picture = picture.reduce(supersample)
        index = index[supersample // 2::supersample, supersample // 2::supersample]
    return picture, index.copy()  # `index` is a read-only view of the drawing


def boxes_of(labels, targets):
    """The tight boxes (n, 4) float32 (xmin, ymin, xmax, ymax) of the visible pixels of objects; the last pixel's far
    edge is the box's edge."""
    boxes = np.zeros((len(targets), 4), np.float32)
    for row, target in enumerate(targets):
        mask = labels == target + 1
        x, y = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        boxes[row] = x[0], y[0], x[-1] + 1, y[-1] + 1
    return boxes


# ---- making scenes

def _some(rng, options, low, high):
    """low..high different ones of the options."""
    count = low + int(rng.random() * (high - low + 1))
    return [options[i] for i in rng.permutation(len(options))[:count]]


def _background(rng):
    light = 200 + 45 * rng.random()
    first = light + 30 * (rng.random(3) - 0.5)
    second = first + (10 + 14 * rng.random()) * (1 if rng.random() < 0.5 else -1)
    colours = tuple(tuple(int(v) for v in np.clip(colour, 180, 252)) for colour in (first, second))
    return Background(pick(rng, TEXTURES), colours, 0.04 + 0.08 * rng.random(), math.pi * rng.random(),
                      int(rng.random() * 2**32))


def _looks(rng, held_out):
    """The (shape, colour, size, filled) of 3..8 objects, of few colours and shapes, so that objects share attributes
    and an expression needs its words. held_out is a (colour, shape) that at least one must have, or None."""
    colours, shapes = _some(rng, tuple(COLOURS), 2, 4), _some(rng, SHAPES, 2, 4)
    if held_out:
        colour, shape = held_out
        colours, shapes = [colour, *(c for c in colours if c != colour)], [shape, *(s for s in shapes if s != shape)]
    pairs = [(c, s) for c in colours for s in shapes if (c, s) not in HELD_OUT]
    sizes = _some(rng, ("small", "small", "medium", "medium", "large"), 2, 5)  # large ones are rarer: they need room
    filled = pick(rng, ((True,), (True, False), (True, True, False)))
    if held_out:
        pairs += [held_out] * (1 + len(pairs) * 2 // 3)  # often more than one, so that a place or relation is needed
    chosen = [pick(rng, pairs) for _ in range(3 + int(6 * rng.random()))]
    if held_out:
        chosen[0] = held_out
    return [(shape, colour, pick(rng, sizes), pick(rng, filled)) for colour, shape in chosen]


def _place(rng, looks, width, height):
    """Places the objects, the largest first; one that finds no room in 30 tries is left out."""
    objects = []
    for shape, colour, size, filled in sorted(looks, key=lambda look: -SIZES[look[2]]):
        diameter = SIZES[size] * math.sqrt(width * height) * (0.95 + 0.1 * rng.random())
        reach = REACH * diameter
        for _ in range(30):
            x, y = reach + rng.random() * (width - 2 * reach), reach + rng.random() * (height - 2 * reach)
            # They may touch and overlap a little: corners reach further than half the diameter.
            if all(math.hypot(x - o.x, y - o.y) > 0.49 * (diameter + o.diameter) for o in objects):
                objects.append(Object(shape, colour, size, filled, x, y, diameter, 20 * rng.random() - 10))
                break
    return tuple(objects)


def _scene(rng, held_out):
    """A scene without a word said about it."""
    aspect = 2 ** (rng.random() + rng.random() - 1)  # width / height from 1:2 to 2:1, mostly near 1:1
    width, height = min(1.0, aspect), min(1.0, 1 / aspect)
    return Scene(width, height, _background(rng), _place(rng, _looks(rng, held_out), width, height))


def _recolour(rng, scene):
    """The scene with every object in another colour than all the others."""
    colours = _some(rng, tuple(COLOURS), MAX_OBJECTS, MAX_OBJECTS)
    return replace(scene, objects=tuple(
        replace(o, colour=c, shape=o.shape if (c, o.shape) not in HELD_OUT else _other_shape(rng, o.shape, c))
        for o, c in zip(scene.objects, colours)))


def _other_shape(rng, shape, colour):
    return pick(rng, [s for s in SHAPES if s != shape and (colour, s) not in HELD_OUT])


def _twin(rng, scene):
    """The scene with another shape for every object."""
    return replace(scene, objects=tuple(replace(o, shape=_other_shape(rng, o.shape, o.colour)) for o in scene.objects))


def attribute_ids(thing, attributes=ALL):
    """[shape, colour, filling, size] as numbers, -1 for those that are not in `attributes`."""
    ids = (SHAPES.index(thing.shape), list(COLOURS).index(thing.colour), int(thing.filled),
           list(SIZES).index(thing.size))
    return [i if attributes & bit else -1 for i, bit in zip(ids, (SHAPE, COLOUR, FILL, SIZE))]


class Shapes:
    """A split of the bundled data set, one of SPLITS; each item is a picture with EXPRESSIONS_PER_SCENE expressions.

    train          endless: any index is good
    val, test      1,000 and 5,000 expressions like those of train
    testA          2,000 by attributes alone
    testB          2,000 by relations and ordinals
    compose        2,000 that mean and name a pair of colour and shape that no other split shows (HELD_OUT)
    pretrain       endless; pictures with captions and no expressions. No two objects of a picture have the same colour,
                   so a phrase like "a red star" says by its colour where to look and by its shape what is to be learned
                   there. 2k and 2k + 1 are twins that differ in the shape of every object, and so do their captions:
                   next to each other in a batch they make a contrastive loss look at just that
    """

    def __init__(self, split, seed=0, weights=None):
        """weights: how often each kind of expression is asked for, instead of the split's own."""
        if split not in SPLITS:
            raise ValueError(f"no split {split!r} of shapes; there are {', '.join(SPLITS)}")
        self.split, self.seed = split, seed
        self.number = list(SPLITS).index(split)
        self.size, self.weights = SPLITS[split][0], weights or SPLITS[split][1]

    def __len__(self):
        """Number of scenes."""
        return self.size

    def _rng(self, index):
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is not in 0..{self.size - 1}")
        return np.random.default_rng([self.seed, self.number, index])

    def _make(self, rng):
        """Draws scenes until one carries its expressions (mostly the first or second does)."""
        for _ in range(1000):
            held_out = pick(rng, sorted(HELD_OUT)) if self.split == "compose" else None
            scene = _scene(rng, held_out)
            if len(scene.objects) < 3:
                continue
            targets, must = None, 0
            if held_out:
                targets = [i for i, o in enumerate(scene.objects) if (o.colour, o.shape) == held_out]
                must = COLOUR | SHAPE
                if not targets:
                    continue
            expressions = express(scene, rng, self.weights, EXPRESSIONS_PER_SCENE, targets, must)
            if expressions:
                return scene, expressions
        raise RuntimeError("no scene carried its expressions")

    def _twins(self, index):
        """Pictures 2k and 2k + 1 of the pre-training: -> (scene, the generator)."""
        rng = self._rng(index - index % 2)
        scene = _recolour(rng, _scene(rng, None))
        other = _twin(rng, scene)
        return other if index % 2 else scene, rng

    def scene(self, index):
        """Item `index` as numbers and words: (Scene, list of Expression). Depends on (seed, split, index) only."""
        return (self._twins(index)[0], []) if self.split == "pretrain" else self._make(self._rng(index))

    def __getitem__(self, index):
        """A dictionary:

        image         PIL RGB picture, long side 256
        labels        (H, W) uint8: 0 background, i + 1 where object i shows
        expressions   4 strings
        targets       4 object indices
        boxes         (4, 4) float32, (xmin, ymin, xmax, ymax) in pixels, tight around the visible target
        kinds         4 of KINDS
        caption       a string about the whole picture
        phrases       one for each object: a string, "a red star", true of it and perhaps of others
        attributes    the objects' attributes (attribute_ids)
        named         of these, the ones that each phrase names
        """
        if self.split == "pretrain":
            (scene, rng), expressions = self._twins(index), []
        else:
            rng = self._rng(index)
            scene, expressions = self._make(rng)
        image, labels = draw(scene)
        targets = [e.target for e in expressions]
        said = caption(scene, rng)
        naming = [sum(bit for bit, chance in NAMED.items() if rng.random() < chance) for _ in scene.objects]
        return {"image": image, "labels": labels, "expressions": [e.text for e in expressions], "targets": targets,
                "boxes": boxes_of(labels, targets), "kinds": [e.kind for e in expressions], "caption": said,
                "phrases": [indefinite(rng, o, n) for o, n in zip(scene.objects, naming)],
                "attributes": [attribute_ids(o) for o in scene.objects],
                "named": [attribute_ids(o, n) for o, n in zip(scene.objects, naming)]}
