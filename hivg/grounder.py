"""Prediction: images and expressions in, boxes in the images' own pixels out.

    g = Grounder.from_pretrained("weights/hivg-tiny.safetensors")
    r = g.ground("photo.jpg", "the red circle left of the star")
    r.box, r.score, r.mask, r.heatmap, r.draw()
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from hivg import weights
from hivg.data.images import open_image
from hivg.data.masks import run_lengths_of
from hivg.data.transforms import Letterbox
from hivg.evaluate.calibration import calibrated, calibration_of
from hivg.tokenizer import split_words
from hivg.utils.cli import choose_device, choose_dtype
from hivg.utils.draw import draw_boxes
from hivg.utils.files import save_image
from hivg.utils.fonts import clean_text, drawable
from hivg.utils.messages import quoted

DEFAULT_WEIGHTS = weights.bundled("hivg-tiny.safetensors")
BATCH = 32  # expressions that go through the model at once
DRAWN = 200  # pixels: a drawing is a whole number of times larger than its image, as long as no side exceeds this
HEATMAPS = ("tokens", "attention")  # heat maps that can be drawn: the token map, the attention of [REG]


@dataclass
class Result:
    """One grounded expression. Two are equal if their expressions, boxes and scores are."""

    expression: str
    box: tuple  # (xmin, ymin, xmax, ymax), floats in pixels of the image, which is upright after EXIF rotation
    score: float  # 0..1: how much of the token map lies in the box; if `Grounder.calibration` is there, the chance that
    # the box is right (IoU of 0.5 or more) on data like those it was fitted on
    image: Image.Image = field(repr=False, compare=False)  # the image it was found in, RGB
    letterbox: Letterbox = field(repr=False, compare=False)
    # maps on the patch grid of the padded square
    token_map: np.ndarray = field(repr=False, compare=False)  # (h, w), 0..1
    mask_map: np.ndarray = field(repr=False, compare=False)  # (8 h, 8 w), 0..1
    attention_map: np.ndarray | None = field(default=None, repr=False, compare=False)  # (h, w) shares, if asked for

    @property
    def heatmap(self):
        """(H, W) float32 in 0..1: the token map, how much each pixel belongs to the region meant."""
        return self.letterbox.map_to_image(self._token_square())

    @property
    def mask(self):
        """(H, W) float32 in 0..1: the segmentation head's probability of each pixel."""
        return self.letterbox.map_to_image(self._mask_square())

    @property
    def attention(self):
        """(H, W) float32 in 0..1: where [REG], from which the box comes, looks in the last layer of the grounding
        encoder, mean over the heads, as a share of what the patch has that it looks at most. `attention_map` has the
        shares themselves, of all tokens; text and [CLS] have the rest. Raises ValueError if it was not asked for."""
        return self.letterbox.map_to_image(self._attention_square())

    def _token_square(self):
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
        return self._stretched(self.mask_map)

    def _attention_square(self):
        """(S, S) float32 in 0..1: the attention on the pixels of the model's square."""
        if self.attention_map is None:
            raise ValueError("the attention was not asked for; give ground or ground_pairs attention=True")
        largest = max(self.attention_map.max(), 1e-9)  # all 0 in an image so narrow that it fills half of no patch
        return self._stretched(self.attention_map / largest)

    def _stretched(self, values):
        """(h, w) in 0..1, cells that fill the square -> (S, S), the cells' values at their middles."""
        size = (self.letterbox.size, self.letterbox.size)
        square = F.interpolate(torch.from_numpy(values)[None, None], size, mode="bicubic")  # (1, 1, S, S)
        return square[0, 0].clamp(0, 1).numpy()

    def _heat_square(self, heatmap):
        """(S, S) of the heat map of this name (HEATMAPS)."""
        if heatmap not in HEATMAPS:
            raise ValueError(f"heatmap must be one of {', '.join(HEATMAPS)}, not {heatmap!r:.40}")
        return self._attention_square() if heatmap == "attention" else self._token_square()

    def save_mask(self, path, min_score=0.0):
        """Write the mask as a black image of the same size, white where its probability is above 0.5; all black if the
        result scores less than min_score. Raises ValueError or OSError, one line with the file."""
        found = (self.mask > 0.5) & (self.score >= min_score)
        save_image(Image.fromarray(np.uint8(255) * found), path)

    def mask_rle(self):
        """The mask, where its probability is above 0.5, as COCO's compressed run lengths, as pycocotools reads them:
        {"size": [H, W], "counts": text}."""
        return run_lengths_of(self.mask > 0.5)

    def draw(self, heatmap=False, mask=False):
        """-> PIL RGB image with the box and the expression. heatmap: True or "tokens" to draw it over the token map,
        "attention" over the attention. mask: whether to draw it over the mask."""
        return draw_results([self], heatmap, mask)

    def to_dict(self):
        """The entry of `ground.py --json`."""
        box = dict(zip(("xmin", "ymin", "xmax", "ymax"), self.box))
        return {"label": self.expression, "score": self.score, "box": box}


def draw_results(results, heatmap=False, mask=False, min_score=0.0):
    """Draw the results of one image together -> PIL RGB image. Heat map and mask (see Result.draw) are those of the
    first result. A result that scores less than min_score has neither its box nor its mask drawn.

    An image of at most 100 pixels a side is drawn two or more times as large (DRAWN). An expression that no font here
    has the letters for, Chinese or emoji, say, is labelled with its number among the results: #1."""
    first = results[0]
    window = first.letterbox.window  # maps as small as they are: the image may have many more pixels
    factor = max(1, DRAWN // max(first.image.size))
    boxes = []
    labels = []
    for number, result in enumerate(results, 1):
        if result.score >= min_score:
            boxes.append([factor * v for v in result.box])
            labels.append(drawable(clean_text(result.expression), f"#{number}"))
    heat = None
    if heatmap:
        heat = first._heat_square("tokens" if heatmap is True else heatmap)[window]
    return draw_boxes(
        ImageOps.scale(first.image, factor, Image.Resampling.NEAREST),
        boxes,
        labels,
        heatmap=heat,
        mask=first._mask_square()[window] if mask and first.score >= min_score else None,
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
        self.calibration = calibration_of(getattr(model, "info", {}))  # (a, b) of the score, None: not calibrated

    @classmethod
    def from_pretrained(cls, path=DEFAULT_WEIGHTS, device="auto", dtype="auto"):
        """Raises hivg.weights.WeightsError for a file that cannot be used, ValueError for a device that is not
        there."""
        choose_device(device)  # before the time is spent on loading
        model = weights.load_hivg(path)
        weights.need_tokenizer(model, path)
        calibration_of(model.info, path)  # raises the error that names the file
        return cls(model, device, dtype)

    @torch.inference_mode()
    def ground(self, image, expression, attention=False):
        """image: a path, a PIL image, an open file or an array (hivg.data.images.open_image); expression: text ->
        Result, or a list of texts about the image -> list of Result. attention: whether the results have an
        `attention`, which takes a little longer. Raises hivg.data.images.ImageError for the image, ValueError for an
        expression that is empty or no text and for a model that gives no numbers."""
        texts = texts_of(expression)
        image = open_image(image)
        results = []
        for start in range(0, len(texts), BATCH):
            results += self._ground_batch([image], texts[start : start + BATCH], attention)
        return results[0] if isinstance(expression, str) else results

    @torch.inference_mode()
    def ground_pairs(self, images, expressions, attention=False):
        """A list of n images, each with its expression of a list of n -> list of n Result, computed in batches of at
        most BATCH. Raises as `ground` does, and ValueError for lists of different lengths."""
        lists = hasattr(images, "__len__") and hasattr(expressions, "__len__") and not isinstance(expressions, str)
        if not lists or len(images) != len(expressions):
            raise ValueError("ground_pairs needs a list of images and a list of as many expressions")
        expressions = texts_of(expressions)
        results = []
        for start in range(0, len(images), BATCH):
            batch = [open_image(image) for image in images[start : start + BATCH]]
            results += self._ground_batch(batch, expressions[start : start + BATCH], attention)
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

    def _ground_batch(self, images, texts, attention):
        """B PIL images, or one for all, and B texts -> list of B Result."""
        letterboxes = [Letterbox(*image.size, self.clip.image_size) for image in images]
        normalization = self.model.config.normalization
        pixels = torch.stack([box.image(image, normalization) for box, image in zip(letterboxes, images)])
        padding = torch.stack([box.padding_mask() for box in letterboxes])  # (B or 1, S, S)
        token_ids = self.model.tokenizer(texts)  # (B, T)
        # pixels (B or 1, 3, S, S): of one image what does not depend on the text is computed once
        output = self.model(pixels.to(self.device), padding.to(self.device), token_ids.to(self.device),
                            with_reg_attention=attention)

        boxes, scores = self.model.boxes_and_scores(output)
        if self.calibration:
            scores = [calibrated(score, *self.calibration) for score in scores]
        grid = (self.model.side, self.model.side)
        token_maps = output.token_similarity.float().sigmoid().unflatten(1, grid).cpu().numpy()  # (B, h, w)
        mask_maps = output.mask_logits.float().sigmoid()[:, 0].cpu().numpy()  # (B, 8 h, 8 w)
        attention_maps = [None] * len(texts)
        if attention:
            shares = output.reg_attention[-1].exp().mean(1)  # (B, heads, P) of the last layer -> (B, P)
            attention_maps = shares.unflatten(1, grid).cpu().numpy()  # (B, h, w)
        results = []
        for i, text in enumerate(texts):
            own = i if len(images) > 1 else 0
            box = letterboxes[own].boxes_to_image(boxes[i]).tolist()  # xmin, ymin, xmax, ymax
            results.append(Result(text, tuple(box), scores[i], images[own], letterboxes[own], token_maps[i],
                                  mask_maps[i], attention_maps[i]))
        return results


def texts_of(expression):
    """A text, or texts in whatever can be listed -> list of texts. Raises ValueError."""
    is_one = isinstance(expression, str | bytes) or not hasattr(expression, "__iter__")
    texts = [expression] if is_one else list(expression)
    if not texts:
        raise ValueError("the list of expressions is empty; give one or more")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"the expression {quoted(text)} is no text; give a string, or a list of strings")
        if not text.strip():
            raise ValueError("the expression is empty; say in words what to find")
    return texts
