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
DRAWN = 200  # pixels: a small image is drawn a whole number of times larger, up to this long side
HEATMAPS = ("tokens", "attention")  # the token map, [REG]'s attention


@dataclass
class Result:
    """One grounded expression. Two are equal if their expressions, boxes and scores are."""

    expression: str
    box: tuple  # (xmin, ymin, xmax, ymax), floats in pixels of the image, which is upright after EXIF rotation
    score: float  # 0..1: how much of the token map lies in the box (`HiVG.score`); with `Grounder.calibration`, the
    # probability that the box is right (IoU of 0.5 or more) on data like that it was fitted on
    image: Image.Image = field(repr=False, compare=False)  # RGB, upright
    letterbox: Letterbox = field(repr=False, compare=False)
    # maps on the patch grid of the padded square
    token_map: np.ndarray = field(repr=False, compare=False)  # (h, w), 0..1
    mask_map: np.ndarray = field(repr=False, compare=False)  # (8 h, 8 w), 0..1
    attention_map: np.ndarray | None = field(default=None, repr=False, compare=False)  # (h, w) shares, if asked for

    @property
    def heatmap(self):
        """(H, W) float32 in 0..1: the token map, how much each pixel belongs to the region meant."""
        return self.letterbox.map_to_image(self.square("tokens"))

    @property
    def mask(self):
        """(H, W) float32 in 0..1: the segmentation head's probability of each pixel."""
        return self.letterbox.map_to_image(self.square("mask"))

    @property
    def attention(self):
        """(H, W) float32 in 0..1: where [REG], from which the box comes, looks in the last layer of the grounding
        encoder, mean over the heads, relative to the patch it looks at most. `attention_map` has the shares themselves;
        text and [CLS] have the rest. Raises ValueError if it was not asked for."""
        return self.letterbox.map_to_image(self.square("attention"))

    def square(self, name):
        """A map on the pixels of the model's square, (S, S) float32 in 0..1. name: mask, or one of HEATMAPS."""
        S = self.letterbox.size
        if name == "tokens":
            # RTCC's target says of a patch whether its first pixel is in the box (`box_on_grid`), so that pixel gets
            # the patch's value, and those behind the last patch's first pixel repeat it
            h = len(self.token_map)
            inside = (h - 1) * (S // h) + 1
            square = torch.from_numpy(self.token_map)[None, None]  # (1, 1, h, w)
            square = F.interpolate(square, (inside, inside), mode="bicubic", align_corners=True)
            square = F.pad(square, (0, S - inside, 0, S - inside), mode="replicate")  # (1, 1, S, S)
        elif name == "mask":
            square = F.interpolate(torch.from_numpy(self.mask_map)[None, None], (S, S), mode="bicubic")
        elif name != "attention":
            raise ValueError(f"heatmap must be one of {', '.join(HEATMAPS)}, not {name!r:.40}")
        elif self.attention_map is None:
            raise ValueError("the attention was not asked for; give ground or ground_pairs attention=True")
        else:
            shares = self.attention_map / max(self.attention_map.max(), 1e-9)  # all 0 in a very narrow image
            square = F.interpolate(torch.from_numpy(shares)[None, None], (S, S), mode="bicubic")
        return square[0, 0].clamp(0, 1).numpy()  # bicubic can leave 0..1

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
    """Draw the results of one image together -> PIL RGB image. Heat map and mask (see Result.draw) are the first
    result's. Neither box nor mask of a result that scores less than min_score is drawn.

    An image of at most 100 pixels a side is enlarged (DRAWN). An expression that no font here has the letters for,
    such as Chinese or emoji, is labelled with its number among the results: #1."""
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
        heat = first.square("tokens" if heatmap is True else heatmap)[window]
    return draw_boxes(
        ImageOps.scale(first.image, factor, Image.Resampling.NEAREST),
        boxes,
        labels,
        heatmap=heat,
        mask=first.square("mask")[window] if mask and first.score >= min_score else None,
    )


class Grounder:
    """A HiVG model ready for use: adapters merged, in evaluation mode, on its device."""

    def __init__(self, model, device="auto", dtype="auto"):
        """model: a HiVG with its tokenizer, left unchanged. device: auto, cpu or cuda. dtype of weights and products:
        float32, or bfloat16, which moves boxes by some thousandths of the side; auto = bfloat16 where the hardware has
        it. Boxes and scores are float32. Raises ValueError."""
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.model = model.for_prediction(self.device, self.dtype)
        self.clip = self.model.config.clip
        self.calibration = calibration_of(getattr(model, "info", {}))  # (a, b) of the score; None = not calibrated

    @classmethod
    def from_pretrained(cls, path=DEFAULT_WEIGHTS, device="auto", dtype="auto"):
        """Raises hivg.weights.WeightsError for a file that cannot be used, ValueError for a device that is missing."""
        choose_device(device)  # before time is spent on loading
        model = weights.load_hivg(path)
        weights.need_tokenizer(model, path)
        calibration_of(model.info, path)  # raises the error that names the file
        return cls(model, device, dtype)

    @torch.inference_mode()
    def ground(self, image, expression, attention=False):
        """image: a path, a PIL image, an open file or an array (hivg.data.images.open_image); expression: text ->
        Result, or a list of texts about the image -> list of Result. attention: whether results have `attention`, which
        takes a little longer. Raises hivg.data.images.ImageError for the image, ValueError for an expression that is
        empty or not text, and for a model whose boxes are not finite."""
        texts = texts_of(expression)
        image = open_image(image)
        results = []
        for start in range(0, len(texts), BATCH):
            results += self._ground_batch([image], texts[start : start + BATCH], attention)
        return results[0] if isinstance(expression, str) else results

    @torch.inference_mode()
    def ground_pairs(self, images, expressions, attention=False):
        """n images, each with its expression of a list of n -> list of n Result, in batches of at most BATCH. Raises
        as `ground` does, and ValueError for lists of different lengths."""
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
        """Reasons why the model may misunderstand an expression: a list of lines, usually empty."""
        lines = []
        tokenizer = self.model.tokenizer
        room = tokenizer.context_length - 2  # without the start and the end token
        n = len(tokenizer.encode(expression))
        if n > room:
            lines.append(f"the expression has {n} tokens and is cut to its first {room}; make it shorter")
        for word in dict.fromkeys(split_words(expression)):
            # nearly letter by letter; a known word is one token or two
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
        # pixels (B or 1, 3, S, S): for one image whatever does not depend on the text is computed once
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
    """A text, or an iterable of texts -> list of texts. Raises ValueError."""
    is_one = isinstance(expression, str | bytes) or not hasattr(expression, "__iter__")
    texts = [expression] if is_one else list(expression)
    if not texts:
        raise ValueError("the list of expressions is empty; give one or more")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"the expression {quoted(text)} is not text; give a string or a list of strings")
        if not text.strip():
            raise ValueError("the expression is empty; say in words what to find")
    return texts
