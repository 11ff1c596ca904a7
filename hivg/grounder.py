"""Prediction: images and expressions in, boxes in the images' own pixels out.

    g = Grounder.from_pretrained("weights/hivg-tiny.safetensors")
    r = g.ground("photo.jpg", "the red circle left of the star")
    r.box, r.score, r.mask, r.heatmap, r.draw()
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from hivg import weights
from hivg.data.images import open_image
from hivg.data.transforms import Letterbox
from hivg.utils.cli import choose_device
from hivg.utils.draw import draw_boxes

DEFAULT_WEIGHTS = Path(__file__).parents[1] / "weights" / "hivg-tiny.safetensors"
DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH = 32  # expressions that go through the model at once


@dataclass
class Result:
    """One grounded expression."""

    expression: str
    box: tuple  # (xmin, ymin, xmax, ymax), floats in pixels of the image, which is upright after EXIF rotation
    score: float  # 0..1: agreement of the box with the token map, not calibrated (see HiVG.score)
    image: Image.Image  # the image it was found in, RGB
    letterbox: Letterbox
    token_map: np.ndarray  # (h, w) on the patch grid of the padded square, 0..1
    mask_map: np.ndarray  # (8 h, 8 w), 0..1

    @property
    def heatmap(self):
        """(H, W) float32 in 0..1: the token map (RTCC), how much each pixel belongs to the region meant."""
        return self._to_image(self.token_map)

    @property
    def mask(self):
        """(H, W) float32 in 0..1: the segmentation head's probability of each pixel."""
        return self._to_image(self.mask_map)

    def _to_image(self, small):
        size = (self.letterbox.size, self.letterbox.size)
        square = F.interpolate(torch.from_numpy(small)[None, None], size, mode="bicubic")  # (1, 1, S, S)
        return self.letterbox.map_to_image(square[0, 0].numpy()).clip(0, 1)  # (H, W); bicubic can leave 0..1

    def draw(self, heatmap=False, mask=False):
        """-> PIL RGB image with the box and the expression; if asked for, over the heat map or the mask."""
        return draw_results([self], heatmap, mask)

    def to_dict(self):
        """The entry of `ground.py --json`."""
        box = dict(zip(("xmin", "ymin", "xmax", "ymax"), self.box))
        return {"label": self.expression, "score": self.score, "box": box}


def draw_results(results, heatmap=False, mask=False):
    """Draw the results of one image together -> PIL RGB image. Heat map and mask are those of the first result."""
    first = results[0]
    return draw_boxes(
        first.image,
        [result.box for result in results],
        [result.expression for result in results],
        heatmap=first.heatmap if heatmap else None,
        mask=first.mask if mask else None,
    )


class Grounder:
    """A HiVG model ready for use: adapters merged, in evaluation mode, on its device."""

    def __init__(self, model, device="auto", dtype="auto"):
        """model: a HiVG with its tokenizer, which stays as it is. device: auto, cpu or cuda. dtype: float32 (auto) or
        bfloat16, which is faster on a GPU and less exact. Raises ValueError."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        self.device = choose_device(device)
        self.dtype = DTYPES[dtype]
        self.model = model.merged().to(self.device).eval()
        self.clip = self.model.config.clip

    @classmethod
    def from_pretrained(cls, path=DEFAULT_WEIGHTS, device="auto", dtype="auto"):
        """Raises hivg.weights.WeightsError for a file that cannot be used, ValueError for a device that is not
        there."""
        choose_device(device)  # before the time is spent on loading
        model = weights.load_hivg(path)
        weights.need_tokenizer(model, path)
        return cls(model, device, dtype)

    @torch.inference_mode()
    def ground(self, image, expression):
        """image: path, PIL image or (H, W, 3) uint8 RGB array; expression: text -> Result, or a list of texts -> list
        of Result, from one batch. Raises hivg.data.images.ImageError for the image, ValueError for an empty
        expression."""
        texts = [expression] if isinstance(expression, str) else list(expression)
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError("the expression is empty; say in words what to find")
        image = open_image(image)
        results = []
        for start in range(0, len(texts), BATCH):
            results += self._ground_batch(image, texts[start : start + BATCH])
        return results[0] if isinstance(expression, str) else results

    def _ground_batch(self, image, texts):
        B = len(texts)
        side = self.clip.image_size // self.clip.patch_size
        grid = [side, side]
        letterbox = Letterbox(*image.size, self.clip.image_size)
        pixels = letterbox.image(image, self.model.config.normalization).to(self.device)  # (3, S, S)
        padding = letterbox.padding_mask().to(self.device)  # (S, S)
        token_ids = self.model.tokenizer(texts).to(self.device)  # (B, T)

        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(pixels.expand(B, -1, -1, -1), padding.expand(B, -1, -1), token_ids)

        boxes = letterbox.boxes_to_image(output.boxes.float().cpu()).tolist()  # B of xmin, ymin, xmax, ymax
        scores = self.model.score(output, grid).tolist()
        token_maps = output.token_similarity.float().sigmoid().unflatten(1, grid).cpu().numpy()  # (B, h, w)
        mask_maps = output.mask_logits.float().sigmoid()[:, 0].cpu().numpy()  # (B, 8 h, 8 w)
        results = []
        for i, text in enumerate(texts):
            results.append(Result(text, tuple(boxes[i]), scores[i], image, letterbox, token_maps[i], mask_maps[i]))
        return results
