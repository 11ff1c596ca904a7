"""The letterbox: any image into a square of the model's size, and boxes there and back.

The image is resized so that its long side is the square's (PIL bilinear, which smooths when it shrinks) and placed in
the middle; the rest is marked as padding. Pixels stay bytes until they are on the device that computes, where they are
normalised and padding becomes zero. Training uses smaller images in other places too (data/augment.py).
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image

from hivg.boxes import cxcywh_to_xyxy

NORMALIZATION = {  # mean and standard deviation of R, G, B in 0..1
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def normalise(pixels, padding_mask, normalization="clip"):
    """Pixels (B, 3, S, S) uint8 -> (B, 3, S, S) float32 on their device: (pixel / 255 - mean) / std, and zero where
    padding_mask (B, S, S) is True. normalization: one of NORMALIZATION."""
    full, mean, std = pixel_constants(normalization, pixels.device)  # (3, 1, 1) each
    images = (pixels / full - mean) / std  # (B, 3, S, S)
    return images.masked_fill_(padding_mask[:, None], 0)


@cache  # sending them to a GPU would make it wait
def pixel_constants(normalization, device):
    """(3, 3, 1, 1): 255, mean and standard deviation of R, G, B."""
    mean, std = NORMALIZATION[normalization]
    # 255 is a tensor too: a GPU replaces division by a scalar with multiplication, which rounds differently
    constants = torch.tensor([(255.0,) * 3, mean, std], device="cpu", dtype=torch.float32)
    return constants[..., None, None].to(device)


@dataclass(frozen=True)
class Letterbox:
    """The place of an image of width x height pixels in a square of `size` pixels."""

    width: int
    height: int
    size: int
    fill: float = 1.0  # the long side as a share of the square's: above 0, at most 1
    place: tuple = (0.5, 0.5)  # shares of the free space that are to the left of the image and above it, each 0..1

    @property
    def scale(self):
        """Pixels of the square per pixel of the image."""
        return self.size * self.fill / max(self.width, self.height)

    @property
    def inner(self):
        """(width, height) of the image in the square, in pixels."""
        return max(1, round(self.width * self.scale)), max(1, round(self.height * self.scale))

    @property
    def corner(self):
        """(left, top) of the image in the square, in pixels."""
        # -0.1 so that half a pixel is rounded as in the released code
        return tuple(round((self.size - side) * share - 0.1) for side, share in zip(self.inner, self.place))

    @property
    def window(self):
        """The rows and columns of the square that the image covers, two slices."""
        left, top = self.corner
        width, height = self.inner
        return slice(top, top + height), slice(left, left + width)

    def fitted(self, image, box, mask):
        """PIL RGB image, box (4,) xyxy in its pixels, mask (height, width) bool array or None -> a dictionary:

        pixels        (3, size, size) uint8, zero where padded
        padding_mask  (size, size) bool, True where padded
        box           (4,) float32 cxcywh in 0..1 of the square
        mask          (size, size) bool, or None
        """
        return {
            "pixels": self.pixels(image),
            "padding_mask": self.padding_mask(),
            "box": self.boxes_to_square(box),
            "mask": None if mask is None else self.mask(mask),
        }

    def image(self, image, normalization="clip"):
        """PIL RGB image -> (3, size, size) float32, normalised, zero where padded."""
        return normalise(self.pixels(image)[None], self.padding_mask()[None], normalization)[0]

    def pixels(self, image):
        """PIL RGB image -> (3, size, size) uint8, zero where padded."""
        square = np.zeros((self.size, self.size, 3), dtype=np.uint8)
        square[self.window] = image.resize(self.inner, Image.BILINEAR)
        return torch.from_numpy(square.transpose(2, 0, 1).copy())  # (3, size, size)

    def padding_mask(self):
        """(size, size) bool, True where there is no image."""
        mask = np.ones((self.size, self.size), dtype=bool)  # NumPy fills a small array faster than PyTorch
        mask[self.window] = False
        return torch.from_numpy(mask)

    def mask(self, mask):
        """(height, width) bool array of the image -> (size, size) bool, nearest neighbour."""
        return self.labels(mask.astype(np.uint8)).bool()

    def labels(self, labels):
        """(height, width) uint8 array of the image -> (size, size) uint8, nearest neighbour, 0 where padded."""
        square = np.zeros((self.size, self.size), dtype=np.uint8)
        square[self.window] = Image.fromarray(labels).resize(self.inner, Image.NEAREST)
        return torch.from_numpy(square)

    def boxes_to_square(self, boxes):
        """(..., 4) xyxy in the image's pixels -> (..., 4) cxcywh in 0..1 of the square."""
        offset = torch.tensor(self.corner * 2, device=boxes.device)  # (4,) left, top, left, top
        corners = boxes.float() * self.scale + offset  # (..., 4) xyxy in pixels of the square
        low, high = corners.split(2, -1)  # (..., 2) each
        return torch.cat([(low + high) / 2, high - low], -1) / self.size

    def boxes_to_image(self, boxes):
        """(..., 4) cxcywh in 0..1 of the square -> (..., 4) xyxy in the image's pixels, clipped to the image."""
        corners = cxcywh_to_xyxy(boxes * self.size)  # (..., 4) xyxy in pixels of the square
        offset = torch.tensor(self.corner * 2, device=boxes.device)
        corners = (corners - offset) / self.scale  # in the image's pixels
        limit = torch.tensor([self.width, self.height] * 2, device=boxes.device)
        return torch.minimum(corners.clamp(min=0), limit)

    def map_to_image(self, square):
        """(size, size) floats over the square, e.g. a mask -> (height, width) float32 array, bilinear."""
        inner = Image.fromarray(np.asarray(square, dtype=np.float32)[self.window])
        return np.asarray(inner.resize((self.width, self.height), Image.BILINEAR))
