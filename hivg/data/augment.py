"""Augmentation for training: a random crop, size, place, colours and sharpness, and box and mask moved along.

The released recipe (datasets/transforms.py of linhuixiao/HiVG, from TransVG) with these differences: a crop keeps the
object's centre and at least half of its box (there the centre is compared with the crop's upper left corner only, its x
with the crop's y); more words forbid a crop, and "bright" does not; sizes are shares of the square (there 32..224 of
224 pixels, steps made for 640, of which 448..640 are the shares 0.7..1 here). Never a flip: it would turn "left" to
"right".
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter

from hivg.data.transforms import Letterbox

# A crop may make them wrong: what was on the right is in the middle of what is left of the picture, the third one is
# the second. Beginnings of words, as people write "lefthand", "rightmost" and "topleft", and their short forms.
_POSITIONAL = re.compile(r"""\b(
    (left|lft|right|top|upper|bottom|mid|centr|center|corner|beneath|underneath) \w*
    | l | r | rt | btm | high(er|est) | low(er|est) | above | below | over | under
    | sides? | edges? | border | ends? | cut\ off | cropped | o'?\ ?clock
    | first | second | third | fourth | fifth | sixth | seventh | eighth | ninth | tenth | last | \d+(st|nd|rd|th)
)\b""", re.VERBOSE)

CROP = 0.6  # the least share of a side that a crop keeps; 384 of 640 pixels
BLUR = (0.1, 2.0)  # standard deviations, in pixels of the square


def is_positional(expression):
    """Whether an expression has a word of position, so that a crop could make it wrong."""
    return _POSITIONAL.search(expression.lower()) is not None


def crop_around(rng, box, width, height):
    """A random part (x0, y0, x1, y1), ints, of a width x height picture, that has the centre of a box (4,) xyxy within
    the picture and at least half of the box's area; the whole picture if 20 tries gave none. The sides are CROP..1 of
    the picture's."""
    low, high = np.asarray(box[:2], dtype=float), np.asarray(box[2:], dtype=float)
    sides, centre = np.array([width, height]), (low + high) / 2
    for _ in range(20):
        kept = rng.integers(np.ceil(CROP * sides), sides + 1)
        corner = rng.integers(np.maximum(np.ceil(centre - kept), 0), np.minimum(np.floor(centre), sides - kept) + 1)
        inside = np.minimum(high, corner + kept) - np.maximum(low, corner)
        if inside.prod() >= (high - low).prod() / 2:
            return *corner.tolist(), *(corner + kept).tolist()
    return 0, 0, width, height


@dataclass(frozen=True)
class Augment:
    """What may happen to a picture; Augment(0, 0, 0, (1, 1), 0, False) is the plain letterbox. Raises ValueError for
    settings out of range."""

    jitter: float = 0.4  # brightness, contrast and saturation by factors of 1 - jitter..1 + jitter; 0..1
    jitter_p: float = 0.8  # how often
    blur_p: float = 0.0
    scale: tuple = (0.7, 1.0)  # the long side, in sides of the square
    crop_p: float = 0.5  # how often where the expression allows it
    translate: bool = True  # anywhere in the square, or in the middle

    def __post_init__(self):
        for name in ("jitter", "jitter_p", "blur_p", "crop_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, not {getattr(self, name)}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be two shares of the square, 0 < low <= high <= 1, not {self.scale}")

    def __call__(self, rng, image, box, mask, expression, size, normalization="clip"):
        """A picture with one object, augmented: a function of the arguments and of the state of `rng` (a NumPy
        generator) alone.

        image PIL RGB; box (4,) xyxy in its pixels; mask (H, W) bool array or None; size in pixels, the square's ->
        {"image": (3, size, size) float32, normalised, zero where padded; "padding_mask": (size, size) bool, True where
        padded; "box": (4,) float32 cxcywh in 0..1 of the square, clipped to the crop; "mask": (size, size) bool or
        None}. Raises ValueError if the mask is not of the picture's size.
        """
        if mask is not None and mask.shape != (image.height, image.width):
            raise ValueError(f"a mask of shape {mask.shape} for a picture of {image.height} x {image.width}")
        x0, y0, x1, y1 = 0, 0, *image.size
        box = _clip(box, x0, y0, x1, y1)
        if rng.random() < self.crop_p and not is_positional(expression):
            x0, y0, x1, y1 = crop_around(rng, box.tolist(), *image.size)
            box = _clip(box, x0, y0, x1, y1)
        long_side = max(1, round(size * rng.uniform(*self.scale)))  # whole pixels, so that its scale is exact
        place = tuple(rng.random(2)) if self.translate else (0.5, 0.5)
        letterbox = Letterbox(x1 - x0, y1 - y0, size, long_side / size, place)
        # resized here, so that colours and blur are of few pixels; the letterbox then has nothing to resize
        image = self.recolour(rng, image.resize(letterbox.inner, Image.BILINEAR, box=(x0, y0, x1, y1)))
        return {
            "image": letterbox.image(image, normalization),
            "padding_mask": letterbox.padding_mask(),
            "box": letterbox.boxes_to_square(box - torch.tensor([x0, y0, x0, y0])),
            "mask": None if mask is None else letterbox.mask(mask[y0:y1, x0:x1]),
        }

    def recolour(self, rng, image):
        """PIL RGB -> the same with random brightness, contrast and saturation, in random order, and blurred."""
        if rng.random() < self.jitter_p:
            enhancers = ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color
            for i in rng.permutation(3):
                image = enhancers[i](image).enhance(rng.uniform(1 - self.jitter, 1 + self.jitter))
        if rng.random() < self.blur_p:
            image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR)))
        return image


def _clip(box, x0, y0, x1, y1):
    """(4,) xyxy -> (4,) float32 tensor, clipped to a part of the picture."""
    box = torch.as_tensor(box, dtype=torch.float32)
    return torch.minimum(torch.maximum(box, torch.tensor([x0, y0, x0, y0])), torch.tensor([x1, y1, x1, y1]))
