"""The letterbox: any picture into a square of the model's size, and boxes there and back.

The long side is resized to the square (PIL bilinear, which smooths when it shrinks), the picture is normalised and
put in the middle; the rest is zero and marked as padding. Training may ask for a smaller picture and another place
(augment.py).
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

NORMALIZATION = {  # mean and standard deviation of R, G, B in 0..1
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class Letterbox:
    """Where a picture of width x height pixels lies in a square of `size` pixels: resized to inner (w, h), its corner
    at (left, top)."""

    width: int
    height: int
    size: int
    fill: float = 1.0  # above 0, at most 1: the long side's share of the square
    place: tuple = (0.5, 0.5)  # shares of the free room that are left of the picture and above it, each 0..1

    @property
    def scale(self):
        return self.size * self.fill / max(self.width, self.height)

    @property
    def inner(self):
        return max(1, round(self.width * self.scale)), max(1, round(self.height * self.scale))

    @property
    def corner(self):
        # (left, top); in the middle as the released code has it
        return tuple(round((self.size - side) * share - 0.1) for side, share in zip(self.inner, self.place))

    def image(self, image, normalization="clip"):
        """PIL RGB picture -> (3, size, size) float32, normalised, zero where padded."""
        (w, h), (left, top) = self.inner, self.corner
        mean, std = (np.array(v, dtype=np.float32) for v in NORMALIZATION[normalization])
        pixels = np.asarray(image.resize((w, h), Image.BILINEAR), dtype=np.float32) / 255  # (h, w, 3)
        square = np.zeros((self.size, self.size, 3), dtype=np.float32)
        square[top : top + h, left : left + w] = (pixels - mean) / std
        return torch.from_numpy(square.transpose(2, 0, 1).copy())

    def padding_mask(self):
        """(size, size) bool, True where there is no picture."""
        (w, h), (left, top) = self.inner, self.corner
        mask = torch.ones(self.size, self.size, dtype=torch.bool)
        mask[top : top + h, left : left + w] = False
        return mask

    def mask(self, mask):
        """(height, width) bool array of the picture -> (size, size) bool, nearest neighbour."""
        return self.labels(mask.astype(np.uint8)).bool()

    def labels(self, labels):
        """(height, width) uint8 array of the picture -> (size, size) uint8, nearest neighbour, 0 where padded."""
        (w, h), (left, top) = self.inner, self.corner
        square = torch.zeros(self.size, self.size, dtype=torch.uint8)
        inner = Image.fromarray(labels).resize((w, h), Image.NEAREST)
        square[top : top + h, left : left + w] = torch.from_numpy(np.array(inner))
        return square

    def boxes_to_square(self, boxes):
        """(n, 4) xyxy in the picture's pixels -> (n, 4) cxcywh in 0..1 of the square."""
        left, top = self.corner
        low_high = boxes.float() * self.scale + torch.tensor([left, top, left, top])
        low, high = low_high[..., :2], low_high[..., 2:]
        return torch.cat([(low + high) / 2, high - low], -1) / self.size

    def boxes_to_image(self, boxes):
        """(n, 4) cxcywh in 0..1 of the square -> (n, 4) xyxy in the picture's pixels, clipped to the picture."""
        left, top = self.corner
        centre, half = boxes[..., :2] * self.size, boxes[..., 2:] * self.size / 2
        low_high = (torch.cat([centre - half, centre + half], -1) - torch.tensor([left, top, left, top])) / self.scale
        limit = torch.tensor([self.width, self.height, self.width, self.height])
        return torch.minimum(low_high.clamp(min=0), limit)

    def map_to_image(self, square):
        """(size, size) float array over the square, e.g. a mask -> (height, width), bilinear."""
        (w, h), (left, top) = self.inner, self.corner
        inner = Image.fromarray(np.asarray(square, dtype=np.float32)[top : top + h, left : left + w])
        return np.asarray(inner.resize((self.width, self.height), Image.BILINEAR))
