"""Scenes of the drawn world as numbers, and their images.

x, y and lengths are in units of the image's long side, y points down.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from hivg.data.drawn.phrases import pick

# All darker than the narrower world's paper: outlines then look alike in every colour, which a small ViT learns sooner
COLOURS = {"red": (205, 20, 30), "green": (10, 130, 45), "blue": (30, 65, 215), "brown": (125, 75, 30),
           "purple": (115, 25, 155), "orange": (240, 115, 0), "black": (18, 18, 22), "pink": (230, 70, 160)}
SIZES = {"small": 0.22, "medium": 0.31, "large": 0.44}  # diameter / sqrt(image's area)
OUTLINE = 0.36  # the hole of an outlined shape is smaller by this share, so its border is 18 % of the diameter
TEXTURES = ("plain", "gradient", "stripes", "checks", "speckle")


@dataclass(frozen=True)
class Object:
    """x, y and diameter in units of the image's long side, y pointing down; rotation in degrees, clockwise."""

    shape: str
    colour: str
    size: str
    filled: bool
    x: float
    y: float
    diameter: float
    rotation: float
    stretch: float = 1.0  # width / height before it is turned; its area stays the same
    rgb: tuple | None = None  # another shade of its colour

    @property
    def extents(self):
        """Its width and height: those of the box around it if it is long, else the diameter."""
        if self.stretch == 1:
            return self.diameter, self.diameter
        wide, high = self.diameter * self.stretch**0.5, self.diameter / self.stretch**0.5
        cos, sin = abs(math.cos(math.radians(self.rotation))), abs(math.sin(math.radians(self.rotation)))
        return cos * wide + sin * high, sin * wide + cos * high


@dataclass(frozen=True)
class Background:
    """Two RGB colours and how they alternate: period in units of the long side, angle in radians, seed of speckle."""

    texture: str
    colours: tuple
    period: float
    angle: float
    seed: int


@dataclass(frozen=True)
class Scene:
    """width and height in units of the longer one, which is 1; objects from back to front."""

    width: float
    height: float
    background: Background
    objects: tuple


def background(rng, darkest=200, tint=30, floor=180):
    """A random Background: RGB from floor on, around a grey of darkest..245."""
    light = darkest + (245 - darkest) * rng.random()
    first = light + tint * (rng.random(3) - 0.5)  # (3,) RGB
    second = first + (10 + 14 * rng.random()) * (1 if rng.random() < 0.5 else -1)
    colours = np.clip([first, second], floor, 252).astype(int).tolist()
    texture = pick(rng, TEXTURES)
    period = 0.04 + 0.08 * rng.random()
    angle = math.pi * rng.random()
    return Background(texture, tuple(map(tuple, colours)), period, angle, seed=int(rng.random() * 2**32))


def _polar(radii, count):
    """A closed figure of `count` corners, the first at the top; their radii repeat."""
    angles = 2 * np.pi * np.arange(count) / count
    return np.resize(radii, count)[:, None] * np.stack([np.sin(angles), -np.cos(angles)], 1)


def _heart():
    t = 2 * np.pi * np.arange(64) / 64
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], 1) / 32


def _cross(reach, half):
    """Four arms of this reach; half: half of their width."""
    r, h = reach, half
    return np.array([[-h, -r], [h, -r], [h, -h], [r, -h], [r, h], [h, h], [h, r], [-h, r], [-h, h], [-r, h], [-r, -h],
                     [-h, -h]])


def _arrow(tip, barb, neck, half, end):
    """An upward arrow: y of its tip, x of its barbs, y of its neck, half the width of its shaft, y of its end."""
    return np.array([[0, tip], [barb, neck], [half, neck], [half, end], [-half, end], [-half, neck], [-barb, neck]])


# The corners (n, 2) of each shape for diameter 1, y pointing down. Extents differ a little, so that all look equally
# large.
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
# The hole of an outlined shape: the shape itself, shrunk; drawn anew where that would make some sides thin.
HOLES = {shape: corners * (1 - OUTLINE) for shape, corners in CORNERS.items()}
HOLES["cross"] = _cross(0.39, 0.07)
HOLES["arrow"] = _arrow(-0.34, 0.25, -0.03, 0.1, 0.38)
REACH = 0.63  # no corner is further from the middle, with some room left to the image's edge
SHAPES = tuple(CORNERS)
LONG = {"bar": "square", "ellipse": "circle"}  # of the wider world: a stretched square and circle
ALIKE = {frozenset(both) for both in LONG.items()}  # a square may pass for a bar
CORNERS |= {shape: CORNERS[source] for shape, source in LONG.items()}
# Pairs of colour and shape that only the split "compose" shows. No colour or shape is in two of them, so each is well
# known from other pairs.
HELD_OUT = frozenset({("red", "star"), ("green", "heart"), ("blue", "triangle"), ("brown", "cross"),
                      ("purple", "circle"), ("black", "diamond")})


def _polygon(obj, pixels):
    """The corners of an object as a flat list of pixel coordinates; if outlined, the path goes around the outside, then
    around the hole."""
    corners = CORNERS[obj.shape] * (obj.stretch**0.5, obj.stretch**-0.5)  # (n, 2)
    if not obj.filled:
        if obj.stretch == 1:
            hole = HOLES[obj.shape]
        else:  # a border as thick on all sides
            half = corners.max(0)  # (2,) half of the width and height
            hole = corners * (1 - min(0.12, 0.45 * half.min()) / half)
        corners = np.concatenate([corners, corners[:1], hole, hole[:1]])
    angle = math.radians(obj.rotation)
    cos, sin = math.cos(angle), math.sin(angle)
    corners = corners @ (np.array([[cos, sin], [-sin, cos]]) * obj.diameter) + (obj.x, obj.y)  # (n, 2) in long sides
    return np.rint(corners * pixels).astype(int).ravel().tolist()


def _texture(background, width, height):
    """The background as a width x height RGB image."""
    first, second = background.colours
    if background.texture == "plain":
        return Image.new("RGB", (width, height), first)
    if background.texture == "gradient":
        # share of the first colour in each of the four corners, (2, 2, 1)
        corner = np.cos(background.angle + np.array([[0, 1], [3, 2]]) * np.pi / 2)[..., None] / 2 + 0.5
        corners = corner * first + (1 - corner) * np.array(second)
        return Image.fromarray(corners.astype(np.uint8)).resize((width, height), Image.BILINEAR, (0.5, 0.5, 1.5, 1.5))
    if background.texture == "speckle":
        grid = np.random.default_rng(background.seed).random((64, 64, 1), np.float32)
        grains = grid * first + (1 - grid) * np.array(second, np.float32)
        return Image.fromarray(grains.astype(np.uint8)).resize((width, height), Image.BILINEAR)
    # stripes or checks
    step = 1 / (background.period * max(width, height))  # periods per pixel
    cos = math.cos(background.angle) * step
    sin = math.sin(background.angle) * step
    x = np.arange(width, dtype=np.float32)  # (W,)
    y = np.arange(height, dtype=np.float32)[:, None]  # (H, 1)
    band = np.floor(cos * x + sin * y).astype(np.int32)  # (H, W)
    if background.texture == "checks":
        band += np.floor(cos * y - sin * x).astype(np.int32)
    bands = Image.fromarray((band & 1).astype(np.uint8))
    bands.putpalette(background.colours[0] + background.colours[1])
    return bands.convert("RGB")


def draw(scene, long_side=256, supersample=1):
    """Draw a scene -> (RGB image, labels). labels (H, W) uint8: 0 background, i + 1 where object i shows.

    long_side: in pixels. supersample: draw this many times as large and shrink, for smooth edges.
    """
    pixels = long_side * supersample
    width = max(round(scene.width * long_side), 1) * supersample
    height = max(round(scene.height * long_side), 1) * supersample
    labels = Image.new("L", (width, height))
    image = _texture(scene.background, width, height)
    label_pencil = ImageDraw.Draw(labels)
    image_pencil = ImageDraw.Draw(image)
    for i, obj in enumerate(scene.objects):
        corners = _polygon(obj, pixels)
        label_pencil.polygon(corners, fill=i + 1)
        image_pencil.polygon(corners, fill=obj.rgb or COLOURS[obj.colour])  # exactly the pixels of its label
    index = np.array(labels)  # (H, W)
    if supersample > 1:
        image = image.reduce(supersample)
        index = index[supersample // 2::supersample, supersample // 2::supersample]
    return image, index


def boxes_of(labels, targets):
    """Tight boxes around the visible pixels of objects: (n, 4) float32, (xmin, ymin, xmax, ymax), whose right and lower
    edges are those of the last pixel. Zeros for a target of -1, nothing."""
    boxes = np.zeros((len(targets), 4), np.float32)
    for row, target in enumerate(targets):
        if target < 0:
            continue
        mask = labels == target + 1
        x = np.flatnonzero(mask.any(0))
        y = np.flatnonzero(mask.any(1))
        boxes[row] = x[0], y[0], x[-1] + 1, y[-1] + 1
    return boxes
