"""Augmentation for training: random crop, size, place and colours; box and mask move along.

It is the released recipe (datasets/transforms.py of linhuixiao/HiVG, from TransVG), but for the differences in
hivg/data/README.md. Images are never flipped: that would turn "left" into "right".
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance

from hivg.data.transforms import Letterbox

# Words that a crop may make wrong: what is on the right may be in the middle of the crop, the third may be its second.
# The first group are beginnings of words, as people write "lefthand", "rightmost" and "topleft".
POSITIONAL = re.compile(r"""\b(
    (left|lft|right|top|upper|bottom|mid|centr|center|corner|beneath|underneath) \w*
    | l | r | rt | btm | high(er|est) | low(er|est) | above | below | over | under
    | sides? | edges? | border | ends? | cut\ off | cropped | o'?\ ?clock
    | first | second | third | fourth | fifth | sixth | seventh | eighth | ninth | tenth | last | \d+(st|nd|rd|th)
)\b""", re.VERBOSE)

CROP = 0.6  # the smallest share of a side that a crop keeps
CROP_TRIES = 20


def is_positional(expression):
    """Whether an expression has a word of position, which a crop could make wrong."""
    return POSITIONAL.search(expression.lower()) is not None


def crop_around(rng, box, width, height):
    """A random part (x0, y0, x1, y1), ints, of a width x height image.

    It contains the centre of the box (4,) xyxy, which lies within the image, and at least half of the box's area; its
    sides are CROP..1 of the image's. The whole image, if none of CROP_TRIES does.
    """
    low, high = np.asarray(box, dtype=float).reshape(2, 2)  # (2,) x, y each
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
    """How an image may change; Augment(0, 0, (1, 1), 0, False) is the plain letterbox."""

    jitter: float = 0.4  # brightness, contrast and saturation by factors of 1 - jitter..1 + jitter; 0..1
    jitter_p: float = 0.8  # how often
    scale: tuple = (0.7, 1.0)  # low and high of the long side, as shares of the square's
    crop_p: float = 0.5  # how often, if the expression allows it
    translate: bool = True  # anywhere in the square, or in the middle

    def __call__(self, rng, image, box, mask, expression, size):
        """An image with one object, augmented -> a dictionary as of Letterbox.fitted, the box clipped to the crop. The
        result depends only on the arguments and the state of `rng`.

        rng         NumPy generator
        image       PIL RGB
        box         (4,) xyxy in the image's pixels
        mask        (H, W) bool array or None
        size        side of the square in pixels

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
        # resized here, so that fewer pixels are recoloured; the letterbox then has nothing to resize
        image = image.resize(letterbox.inner, Image.BILINEAR, box=crop)
        image = self.recolour(rng, image)
        mask = None if mask is None else mask[y0:y1, x0:x1]
        return letterbox.fitted(image, box - torch.tensor([x0, y0, x0, y0]), mask)

    def recolour(self, rng, image):
        """PIL RGB -> the same with random brightness, contrast and saturation, in random order."""
        if rng.random() < self.jitter_p:
            enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
            for i in rng.permutation(3):
                image = enhancers[i](image).enhance(rng.uniform(1 - self.jitter, 1 + self.jitter))
        return image


def clip_box(box, crop):
    """(4,) xyxy -> (4,) float32 tensor, clipped to a part (x0, y0, x1, y1) of the image."""
    return torch.as_tensor(box, dtype=torch.float32).clamp(torch.tensor(crop[:2] * 2), torch.tensor(crop[2:] * 2))
