"""Augmentation for training: a random crop, size, place and colours; box and mask move along.

The released recipe (datasets/transforms.py of linhuixiao/HiVG, from TransVG), with these differences:
- a crop keeps the object's centre and at least half of its box; there the centre is compared with the crop's upper left
  corner only, its x with the crop's y
- more words forbid a crop, and "bright" does not
- a crop keeps 0.6..1 of each side; there 384..600 pixels of an image whose short side is 400, 500 or 600
- sizes are shares of the square; there they are 32..224 of 224 pixels in steps made for 640, where 448..640 are the
  0.7..1 of here
There is never a flip: it would turn "left" into "right".
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance

from hivg.data.transforms import Letterbox

# A crop may make these words wrong: the object on the right is in the middle of the crop, the third one is the second.
# They are beginnings of words, as people write "lefthand", "rightmost" and "topleft", and their short forms.
POSITIONAL = re.compile(r"""\b(
    (left|lft|right|top|upper|bottom|mid|centr|center|corner|beneath|underneath) \w*
    | l | r | rt | btm | high(er|est) | low(er|est) | above | below | over | under
    | sides? | edges? | border | ends? | cut\ off | cropped | o'?\ ?clock
    | first | second | third | fourth | fifth | sixth | seventh | eighth | ninth | tenth | last | \d+(st|nd|rd|th)
)\b""", re.VERBOSE)

CROP = 0.6  # the least share of a side that a crop keeps
CROP_TRIES = 20


def is_positional(expression):
    """Whether an expression has a word of position, so that a crop could make it wrong."""
    return POSITIONAL.search(expression.lower()) is not None


def crop_around(rng, box, width, height):
    """A random part (x0, y0, x1, y1), ints, of a width x height image.

    It has the centre of the box (4,) xyxy, which lies within the image, and at least half of the box's area; its sides
    are CROP..1 of the image's. If CROP_TRIES give none, it is the whole image.
    """
    low = np.asarray(box[:2], dtype=float)  # (2,) x, y
    high = np.asarray(box[2:], dtype=float)
    centre = (low + high) / 2
    sides = np.array([width, height])
    for _ in range(CROP_TRIES):
        kept = rng.integers(np.ceil(CROP * sides), sides + 1)  # (2,) the sides of the crop
        least = np.maximum(np.ceil(centre - kept), 0)
        most = np.minimum(np.floor(centre), sides - kept)
        corner = rng.integers(least, most + 1)  # (2,)
        inside = np.minimum(high, corner + kept) - np.maximum(low, corner)  # (2,) sides of the box's part in the crop
        if inside.prod() >= (high - low).prod() / 2:
            return *corner.tolist(), *(corner + kept).tolist()
    return 0, 0, width, height


@dataclass(frozen=True)
class Augment:
    """How an image may change; Augment(0, 0, (1, 1), 0, False) is the plain letterbox. Raises ValueError for
    settings out of range."""

    jitter: float = 0.4  # brightness, contrast and saturation by factors of 1 - jitter..1 + jitter; 0..1
    jitter_p: float = 0.8  # how often
    scale: tuple = (0.7, 1.0)  # the long side, in sides of the square
    crop_p: float = 0.5  # how often where the expression allows it
    translate: bool = True  # anywhere in the square, or in the middle

    def __post_init__(self):
        for name in ("jitter", "jitter_p", "crop_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, not {getattr(self, name)}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be two shares of the square, 0 < low <= high <= 1, not {self.scale}")

    def __call__(self, rng, image, box, mask, expression, size):
        """An image with one object, augmented; the result depends on the arguments and the state of `rng` alone.

        rng         NumPy generator
        image       PIL RGB
        box         (4,) xyxy in the image's pixels
        mask        (H, W) bool array or None
        size        side of the square in pixels

        Returns a dictionary:
        pixels        (3, size, size) uint8, zero where padded
        padding_mask  (size, size) bool, True where padded
        box           (4,) float32 cxcywh in 0..1 of the square, clipped to the crop
        mask          (size, size) bool, or None

        Raises ValueError if the mask is not of the image's size.
        """
        if mask is not None and mask.shape != (image.height, image.width):
            raise ValueError(f"a mask of shape {mask.shape} for an image of {image.height} x {image.width}")
        crop = (0, 0, *image.size)
        box = clip_box(box, crop)
        if rng.random() < self.crop_p and not is_positional(expression):
            crop = crop_around(rng, box.tolist(), *image.size)
            box = clip_box(box, crop)
        x0, y0, x1, y1 = crop

        long_side = max(1, round(size * rng.uniform(*self.scale)))  # whole pixels, so that its scale is exact
        place = tuple(rng.random(2)) if self.translate else (0.5, 0.5)
        letterbox = Letterbox(x1 - x0, y1 - y0, size, long_side / size, place)
        # Resized here, so that colours are of few pixels; the letterbox then has nothing to resize.
        image = image.resize(letterbox.inner, Image.BILINEAR, box=crop)
        image = self.recolour(rng, image)
        return {
            "pixels": letterbox.pixels(image),
            "padding_mask": letterbox.padding_mask(),
            "box": letterbox.boxes_to_square(box - torch.tensor([x0, y0, x0, y0])),
            "mask": None if mask is None else letterbox.mask(mask[y0:y1, x0:x1]),
        }

    def recolour(self, rng, image):
        """PIL RGB -> the same with random brightness, contrast and saturation, in random order."""
        if rng.random() < self.jitter_p:
            enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
            for i in rng.permutation(3):
                image = enhancers[i](image).enhance(rng.uniform(1 - self.jitter, 1 + self.jitter))
        return image


def clip_box(box, crop):
    """(4,) xyxy -> (4,) float32 tensor, clipped to a part (x0, y0, x1, y1) of the image."""
    x0, y0, x1, y1 = crop
    box = torch.as_tensor(box, dtype=torch.float32)
    return torch.minimum(torch.maximum(box, torch.tensor([x0, y0, x0, y0])), torch.tensor([x1, y1, x1, y1]))
