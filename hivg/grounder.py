"""Prediction: images and expressions in, boxes in the images' own pixels out.

    g = Grounder.from_pretrained("weights/hivg-tiny.safetensors")
    r = g.ground("photo.jpg", "the red circle left of the star")
    r.box, r.score, r.mask, r.heatmap, r.draw()
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from hivg import weights
from hivg.data.images import ImageError, open_image
from hivg.data.transforms import Letterbox
from hivg.tokenizer import split_words
from hivg.utils.cli import choose_device, choose_dtype
from hivg.utils.draw import draw_boxes

DEFAULT_WEIGHTS = Path(__file__).parents[1] / "weights" / "hivg-tiny.safetensors"
DTYPES = ("auto", "float32", "bfloat16")
BATCH = 32  # expressions that go through the model at once


@dataclass
class Result:
    """One grounded expression. Two are equal if their expressions, boxes and scores are."""

    expression: str
    box: tuple  # (xmin, ymin, xmax, ymax), floats in pixels of the image, which is upright after EXIF rotation
    score: float  # 0..1: how much of the token map lies in the box, not calibrated (see HiVG.score)
    image: Image.Image = field(repr=False, compare=False)  # the image it was found in, RGB
    letterbox: Letterbox = field(repr=False, compare=False)
    token_map: np.ndarray = field(repr=False, compare=False)  # (h, w) on the patch grid of the padded square, 0..1
    mask_map: np.ndarray = field(repr=False, compare=False)  # (8 h, 8 w), 0..1

    @property
    def heatmap(self):
        """(H, W) float32 in 0..1: the token map (RTCC), how much each pixel belongs to the region meant."""
        return self.letterbox.map_to_image(self._heat_square())

    @property
    def mask(self):
        """(H, W) float32 in 0..1: the segmentation head's probability of each pixel."""
        return self.letterbox.map_to_image(self._mask_square())

    def _heat_square(self):
        """(S, S) float32 in 0..1: the token map on the pixels of the model's square."""
        h = len(self.token_map)
        patch = self.letterbox.size // h  # pixels
        # RTCC's target says of a patch whether its first pixel is in the box (`box_on_grid`), so that pixel gets the
        # patch's value; the pixels in between are interpolated, those behind the last patch's first pixel repeat
        inside = (h - 1) * patch + 1
        square = torch.from_numpy(self.token_map)[None, None]  # (1, 1, h, w)
        square = F.interpolate(square, (inside, inside), mode="bicubic", align_corners=True)
        square = F.pad(square, (0, patch - 1, 0, patch - 1), mode="replicate")  # (1, 1, S, S)
        return square[0, 0].clamp(0, 1).numpy()  # bicubic can leave 0..1

    def _mask_square(self):
        """(S, S) float32 in 0..1: the mask on the pixels of the model's square."""
        square = torch.from_numpy(self.mask_map)[None, None]  # (1, 1, 8 h, 8 w)
        size = (self.letterbox.size, self.letterbox.size)
        square = F.interpolate(square, size, mode="bicubic")  # (1, 1, S, S)
        return square[0, 0].clamp(0, 1).numpy()

    def save_mask(self, path):
        """Write the mask as a black image of the same size, white where its probability is above 0.5."""
        Image.fromarray(np.uint8(255) * (self.mask > 0.5)).save(path)

    def draw(self, heatmap=False, mask=False):
        """-> PIL RGB image with the box and the expression; if asked for, over the heat map or the mask."""
        return draw_results([self], heatmap, mask)

    def to_dict(self):
        """The entry of `ground.py --json`."""
        box = dict(zip(("xmin", "ymin", "xmax", "ymax"), self.box))
        return {"label": self.expression, "score": self.score, "box": box}


def draw_results(results, heatmap=False, mask=False, min_score=0.0):
    """Draw the results of one image together, without those that score less than min_score -> PIL RGB image. Heat map
    and mask are those of the first result."""
    first = results[0]
    window = first.letterbox.window  # maps as small as they are: the image may have many more pixels
    found = [result for result in results if result.score >= min_score]
    return draw_boxes(
        first.image,
        [result.box for result in found],
        [result.expression for result in found],
        heatmap=first._heat_square()[window] if heatmap else None,
        mask=first._mask_square()[window] if mask else None,
    )


class Grounder:
    """A HiVG model ready for use: adapters merged, in evaluation mode, on its device."""

    def __init__(self, model, device="auto", dtype="auto"):
        """model: a HiVG with its tokenizer, which stays as it is. device: auto, cpu or cuda. dtype: of the weights and
        products: float32, or bfloat16, which moves boxes by some thousandths of the side; auto takes it where the
        machine is fast at it. Boxes and scores are in float32. Raises ValueError."""
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.model = model.for_prediction(self.device, self.dtype)
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
        """image: what `as_image` takes, a path, a PIL image, an array or an open file; expression: text -> Result, or a
        list of texts about the image -> list of Result. Raises hivg.data.images.ImageError for the image, ValueError
        for an empty expression and for a model that gives no numbers."""
        texts = [expression] if isinstance(expression, str) else list(expression)
        check_texts(texts)
        image = as_image(image)
        results = []
        for start in range(0, len(texts), BATCH):
            results += self._ground_batch([image], texts[start : start + BATCH])
        return results[0] if isinstance(expression, str) else results

    @torch.inference_mode()
    def ground_pairs(self, images, expressions):
        """A list of n images, each with its expression of a list of n -> list of n Result, computed in batches. Raises
        as `ground` does, and ValueError for lists of different lengths."""
        if isinstance(expressions, str) or len(images) != len(expressions):
            raise ValueError("ground_pairs needs a list of images and a list of as many expressions")
        check_texts(expressions)
        results = []
        for start in range(0, len(images), BATCH):
            batch = [as_image(image) for image in images[start : start + BATCH]]
            results += self._ground_batch(batch, expressions[start : start + BATCH])
        return results

    def warnings(self, expression):
        """Reasons why the model may not understand an expression, a list of lines, mostly empty."""
        lines = []
        tokenizer = self.model.tokenizer
        room = tokenizer.context_length - 2  # beside the start and the end token
        n = len(tokenizer.encode(expression))
        if n > room:
            lines.append(f"the expression has {n} tokens and is cut to its first {room}; make it shorter")
        for word in dict.fromkeys(split_words(expression)):
            # mostly letter by letter, where a word that is known is one token or two
            if len(word) >= 3 and word.isalpha() and 2 * len(tokenizer.encode(word)) > len(word):
                lines.append(f"the tokenizer has no token for {word!r:.40} and spells it; the model may not know it")
        return lines

    def _ground_batch(self, images, texts):
        """B PIL images, or one for all, and B texts -> list of B Result."""
        letterboxes = [Letterbox(*image.size, self.clip.image_size) for image in images]
        normalization = self.model.config.normalization
        pixels = torch.stack([box.image(image, normalization) for box, image in zip(letterboxes, images)])
        padding = torch.stack([box.padding_mask() for box in letterboxes])  # (B or 1, S, S)
        token_ids = self.model.tokenizer(texts)  # (B, T)
        # pixels (B or 1, 3, S, S): of one image what does not depend on the text is computed once
        output = self.model(pixels.to(self.device), padding.to(self.device), token_ids.to(self.device))

        boxes, scores = self.model.boxes_and_scores(output)
        side = self.model.side
        token_maps = output.token_similarity.float().sigmoid().unflatten(1, (side, side)).cpu().numpy()  # (B, h, w)
        mask_maps = output.mask_logits.float().sigmoid()[:, 0].cpu().numpy()  # (B, 8 h, 8 w)
        results = []
        for i, text in enumerate(texts):
            own = i if len(images) > 1 else 0
            box = letterboxes[own].boxes_to_image(boxes[i]).tolist()  # xmin, ymin, xmax, ymax
            results.append(Result(text, tuple(box), scores[i], images[own], letterboxes[own], token_maps[i],
                                  mask_maps[i]))
        return results


def as_image(image):
    """An image in any form -> upright PIL RGB image: what `open_image` takes, an open binary file, or an array, (H, W)
    grey, (H, W, 3) RGB or (H, W, 4) RGBA, of uint8 or of floats in 0..1. Raises ImageError."""
    if hasattr(image, "read"):
        try:
            image = Image.open(image)
        except (OSError, ValueError, TypeError) as error:
            raise ImageError(f"file object: not an image that can be read ({error!s:.60}); give one that is open for "
                             "reading bytes") from None
    if isinstance(image, np.ndarray):
        if image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,), (4,)) or 0 in image.shape:
            raise ImageError(f"array of shape {image.shape}: give (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA")
        if image.dtype.kind == "f" and 0 <= image.min() <= image.max() <= 1:  # not with NaN
            image = (image * 255).round().astype(np.uint8)
        if image.dtype != np.uint8:
            raise ImageError(f"array of type {image.dtype}: give uint8, or floats in 0..1")
        image = Image.fromarray(image)
    return open_image(image)


def check_texts(texts):
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("the expression is empty; say in words what to find")
