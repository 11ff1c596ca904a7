"""Prediction: images and expressions in, boxes in the images' own pixels out.

    g = Grounder.from_pretrained("weights/hivg-tiny.safetensors")
    r = g.ground("drawing.png", "the red circle left of the star")
    r.box, r.score, r.mask, r.heatmap, r.draw()
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from hivg import weights
from hivg.data.images import open_image
from hivg.data.masks import run_lengths_of
from hivg.data.transforms import Letterbox
from hivg.evaluate.calibration import RECOMMENDED, calibrated, calibration_of
from hivg.evaluate.known import (
    DRAWN_ONLY,
    known_words,
    knows_drawn_only,
    looks_photographed,
    similar_word,
    unknown_words,
)
from hivg.model import HiVG
from hivg.tokenizer import split_words
from hivg.utils.cli import choose_device, choose_dtype
from hivg.utils.draw import draw_boxes
from hivg.utils.files import save_image
from hivg.utils.fonts import clean_text, drawable
from hivg.utils.messages import quoted
from hivg.utils.words import draw_most_read, draw_word

DEFAULT_WEIGHTS = weights.bundled("hivg-tiny.safetensors")
BATCH = 32  # expressions in one forward pass
DRAWN = 200  # pixels: small images are drawn enlarged by the largest whole factor that keeps both sides within this
HEATMAPS = {"tokens": "token map", "attention": "relative attention of [REG]", "words": ""}  # {name: in a drawing}
UNREQUESTED = "the attention was not requested; call ground or ground_pairs with attention=True"


@dataclass
class Word:
    """A word of an expression, and what each bridge's patches make of it."""

    text: str  # what is between two spaces
    # {block of the ViT, from 1: (rows, columns) float32 in 0..1 over the patches that show the image: the share of the
    # patch's attention that this word gets in the block's bridge, the mean over the heads}. Start and end token get the
    # rest. A word after the last token that the model reads has 0; a bridge that reads no text is left out
    bridges: dict = field(repr=False, compare=False)


@dataclass
class Result:
    """One grounded expression. Two results are equal if their expressions, boxes and scores are."""

    expression: str
    box: tuple  # (xmin, ymin, xmax, ymax), floats in pixels of the image, which is upright after EXIF rotation
    score: float  # 0..1: how sure the token map is of the box (`HiVG.score`); if it is calibrated, the
    # probability that the box is right, IoU 0.5 or more, on data like those of the calibration
    image: Image.Image = field(repr=False, compare=False)  # the image it was found in, RGB
    letterbox: Letterbox = field(repr=False, compare=False)
    # maps on the patch grid of the padded square
    token_map: np.ndarray = field(repr=False, compare=False)  # (h, w), 0..1
    mask_map: np.ndarray = field(repr=False, compare=False)  # (8 h, 8 w), 0..1
    attention_map: np.ndarray | None = field(default=None, repr=False, compare=False)  # (h, w) shares, on request
    word_maps: list | None = field(default=None, repr=False, compare=False)  # of Word, on request
    again: Callable | None = field(default=None, repr=False, compare=False)  # -> [this result, with what is on request]

    @property
    def heatmap(self):
        """(H, W) float32 in 0..1: the token map, how much each pixel belongs to the object meant."""
        return self.letterbox.map_to_image(self.on_square("tokens"))

    @property
    def mask(self):
        """(H, W) float32 in 0..1: the segmentation head's probability of each pixel."""
        return self.letterbox.map_to_image(self.on_square("mask"))

    @property
    def attention(self):
        """(H, W) float32 in 0..1: where [REG], from which the box is computed, looks in the last layer of the grounding
        encoder, averaged over the heads, relative to the patch it looks at most. `attention_map` has the shares
        themselves; the rest goes to [REG] itself, text and [CLS]. Raises ValueError if it was not requested."""
        return self.letterbox.map_to_image(self.on_square("attention"))

    @property
    def words(self):
        """The expression's words in order, a list of Word: which patches read which word in each bridge. Unless the
        attention was requested, the first look at them grounds the expression once more."""
        if self.word_maps is None:
            if not self.again:
                raise ValueError(UNREQUESTED)
            self.word_maps = self.again()[0].word_maps
        return self.word_maps

    @property
    def patches(self):
        """Two slices, the rows and columns of the patch grid that show the image: the patches that the model does not
        take for padding. If an image is so narrow that there are none, the patches that it touches."""
        side = len(self.token_map)
        shown = HiVG.find_visual(self.letterbox.padding_mask()[None], (side, side))[0, 1:].view(side, side)
        if not shown.any():
            patch = self.letterbox.size // side  # pixels
            return tuple(slice(s.start // patch, (s.stop - 1) // patch + 1) for s in self.letterbox.window)
        rows, columns = shown.nonzero(as_tuple=True)
        return slice(rows[0].item(), rows[-1].item() + 1), slice(columns[0].item(), columns[-1].item() + 1)

    def on_square(self, name):
        """The map "tokens", "mask" or "attention" on the model's padded square: (S, S) float32 in 0..1. Raises
        ValueError for an attention that was not requested."""
        if name == "tokens":
            # RTCC's target is whether a patch's first pixel is in the box (`box_on_grid`)
            return spread(self.token_map, self.letterbox.size, at="first pixel")
        if name == "mask":
            return spread(self.mask_map, self.letterbox.size)
        if self.attention_map is None:
            raise ValueError(UNREQUESTED)
        largest = max(self.attention_map.max(), 1e-9)  # 0 if the image is so narrow that it covers half of no patch
        return spread(self.attention_map / largest, self.letterbox.size)

    def save_mask(self, path, min_score=0.0):
        """Write the mask as a black image, white where the probability is above 0.5; all black if the score is below
        min_score. Raises ValueError or OSError, one line that names the file."""
        found = (self.mask > 0.5) & (self.score >= min_score)
        save_image(Image.fromarray(np.uint8(255) * found), path)

    def mask_rle(self):
        """The mask, where its probability is above 0.5, as COCO's compressed run lengths for pycocotools:
        {"size": [H, W], "counts": text}."""
        return run_lengths_of(self.mask > 0.5)

    def draw(self, heatmap=False, mask=False, words=None, heat_range=None):
        """-> PIL RGB image with the box, the expression and the score, or of what the patches read. Raises ValueError.

        heatmap:    "tokens" (or True) or "attention" to lay that map over the image; "words" for the word that each
                    patch reads most, bridge by bridge
        mask:       whether to dim what is not in the mask
        words:      a word of the expression, for how much each patch reads it, bridge by bridge
        heat_range: (low, high), the values of the map with the first and the last colour; by default the map's own
        """
        if words is not None:
            if heatmap or mask:
                raise ValueError("words is a drawing of its own; leave out heatmap and mask")
            return draw_word(self, words, heat_range)
        return draw_results([self], heatmap, mask, heat_range=heat_range)

    def __getstate__(self):
        return self.__dict__ | {"again": None}  # so that a copy or a pickle does not hold the model

    def to_dict(self):
        """The entry of `ground.py --json`."""
        box = dict(zip(("xmin", "ymin", "xmax", "ymax"), self.box))
        return {"label": self.expression, "score": self.score, "box": box}


def spread(values, size, at="middle"):
    """(h, w) in 0..1, one value a cell -> (size, size) float32 in 0..1, bicubic. at: the pixel of its cell that a value
    holds for, the "middle" or the "first pixel"; after the last cell's first pixel its value repeats."""
    values = torch.from_numpy(values)[None, None]  # (1, 1, h, w)
    if at == "middle":
        square = F.interpolate(values, (size, size), mode="bicubic")  # (1, 1, S, S)
    else:
        margin = size // values.shape[2] - 1  # pixels of the last cell after its first
        square = F.interpolate(values, (size - margin, size - margin), mode="bicubic", align_corners=True)
        square = F.pad(square, (0, margin, 0, margin), mode="replicate")  # (1, 1, S, S)
    return square[0, 0].clamp(0, 1).numpy()  # bicubic overshoots


def draw_results(results, heatmap=False, mask=False, min_score=0.0, heat_range=None):
    """Draw the results of one image together -> PIL RGB image. Heat map and mask (see Result.draw) are those of the
    first result, which is said below the image. The box and mask of a result that scores below min_score are not drawn.

    An image of at most 100 pixels a side is drawn enlarged (DRAWN). An expression that no installed font can write,
    e.g. Chinese or emoji, is labelled with its number among the results: #1."""
    heatmap = "tokens" if heatmap is True else heatmap
    if heatmap and heatmap not in tuple(HEATMAPS):
        raise ValueError(f"heatmap must be one of {', '.join(HEATMAPS)}, not {heatmap!r:.40}")
    if not results:
        raise ValueError("draw_results was given no result; ground one expression or more first")
    first = results[0]
    if heatmap == "words" and mask:
        raise ValueError("the words that patches read and the mask are two drawings; ask for one of them")
    if heatmap == "words":
        return draw_most_read(first)
    window = first.letterbox.window  # not `first.heatmap`: the image may have many more pixels than the square
    factor = max(1, DRAWN // max(first.image.size))
    found = [(number, result) for number, result in enumerate(results, 1) if result.score >= min_score]
    mask = mask and first.score >= min_score
    maps = [name for name, is_drawn in ((HEATMAPS.get(heatmap), heatmap), ("mask", mask)) if is_drawn]
    return draw_boxes(
        ImageOps.scale(first.image, factor, Image.Resampling.NEAREST) if factor > 1 else first.image,  # it is copied
        [[factor * v for v in result.box] for _, result in found],
        [drawable(clean_text(result.expression), f"#{number}") for number, result in found],
        scores=[result.score for _, result in found],
        doubtful=RECOMMENDED,
        heatmap=first.on_square(heatmap)[window] if heatmap else None,
        heat_range=heat_range,
        mask=first.on_square("mask")[window] if mask else None,
        note=f'{" and ".join(maps)} for "{clean_text(first.expression)}"' if maps else "",
    )


class Grounder:
    """A HiVG model ready for use: adapters merged, in evaluation mode, on its device."""

    def __init__(self, model, device="auto", dtype="auto"):
        """model: a HiVG with its tokenizer; it is copied, not changed, and hooks within attentions and MLPs are lost
        (fast.py; those on blocks are kept). device: auto, cpu or cuda. dtype: of parameters and matrix products,
        float32 or bfloat16, which moves boxes by some thousandths of the image's side; auto is bfloat16 where the
        hardware is fast at it. Boxes and scores are float32. Raises ValueError."""
        if not isinstance(model, HiVG):
            raise ValueError(f"model must be a HiVG, not {quoted(model)}; Grounder.from_pretrained(FILE) loads one")
        weights.need_tokenizer(model, "the model")
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype, self.device)
        self.model = model.for_prediction(self.device, self.dtype)
        self.clip = self.model.config.clip  # CLIPConfig
        self.calibration = calibration_of(getattr(model, "info", {}))  # (a, b), or None if the score is uncalibrated

    @classmethod
    def from_pretrained(cls, path=DEFAULT_WEIGHTS, device="auto", dtype="auto"):
        """The Grounder of a weights file. Raises hivg.weights.WeightsError for a file that cannot be used, ValueError
        for a device that is not available."""
        choose_device(device)  # fails before the file is loaded
        model = weights.load_hivg(path)
        weights.need_tokenizer(model, path)
        calibration_of(model.info, path)  # its error names the file
        return cls(model, device, dtype)

    def ground(self, image, expression, attention=False):
        """Find what an expression means in an image.

        image:      a path, a PIL image, an open file or an array (see hivg.data.images.open_image)
        expression: a text -> Result, or a list of texts about the image -> list of Result
        attention:  whether the results have `attention` and `words`, which takes a little longer

        Raises hivg.data.images.ImageError for the image; ValueError for an expression that is empty or no text, and
        for a model whose output is not finite.
        """
        texts = texts_of(expression)
        image = open_image(image)
        results = []
        for start in range(0, len(texts), BATCH):
            results += self._ground_batch([image], texts[start : start + BATCH], attention)
        return results[0] if isinstance(expression, str) else results

    def ground_pairs(self, images, expressions, attention=False):
        """n images, each with its own expression -> list of n Result, computed BATCH at a time. Raises as `ground`
        does, and ValueError for lists of different lengths."""
        images, texts = in_order(images), in_order(expressions)
        if images is None or texts is None or len(images) != len(texts):
            raise ValueError("ground_pairs needs a list of images and a list of as many expressions")
        texts = texts_of(texts)
        results = []
        for start in range(0, len(images), BATCH):
            batch = [open_image(image) for image in images[start : start + BATCH]]
            results += self._ground_batch(batch, texts[start : start + BATCH], attention)
        return results

    def warnings(self, expression, image=None):
        """Reasons why the model may not understand an expression, or an image: a list of lines, usually empty. Raises
        ValueError for an expression that is empty or no text, and as `ground` does for an image."""
        texts_of([expression])
        lines = []
        tokenizer = self.model.tokenizer
        n = len(tokenizer.encode(expression))
        if n > tokenizer.room:
            lines.append(f"the expression has {n} tokens and is cut to its first {tokenizer.room}; make it shorter")
        unknown = unknown_words(self.model, expression)
        if unknown:
            known = known_words(self.model)
            words = []
            for word in unknown:
                similar = similar_word(word, known)
                words.append(quoted(word, 40) + f" (did you mean {similar!r}?)" * bool(similar))
            lines.append(f"these weights were never taught {', '.join(words)}; say it in other words")
        for word in dict.fromkeys(split_words(expression)):
            # a known word is one token or two, an unknown one is spelled almost letter by letter
            is_spelled = len(word) >= 3 and word.isalpha() and 2 * len(tokenizer.encode(word)) > len(word)
            if is_spelled and word not in unknown:
                lines.append(f"the tokenizer has no token for {quoted(word, 40)} and spells it; "
                             "the model may not know it")
        if image is not None and knows_drawn_only(self.model) and looks_photographed(open_image(image)):
            lines.append(DRAWN_ONLY)
        return lines

    @torch.inference_mode()
    def _ground_batch(self, images, texts, attention):
        """B PIL images, or one for all, and B texts -> list of B Result."""
        letterboxes = [Letterbox(*image.size, self.clip.image_size) for image in images]
        normalization = self.model.config.normalization
        pixels = torch.stack([box.image(image, normalization) for box, image in zip(letterboxes, images)])
        padding = torch.stack([box.padding_mask() for box in letterboxes])  # (B or 1, S, S)
        token_ids = self.model.tokenizer(texts)  # (B, T)
        # pixels (B or 1, 3, S, S): for a single image, what does not depend on the text is computed once
        with torch.autocast(self.device.type, enabled=False):  # the caller's: the dtype was chosen
            output = self.model(pixels.to(self.device), padding.to(self.device), token_ids.to(self.device),
                                with_reg_attention=attention, with_bridge_attention=attention)

        boxes, scores = self.model.boxes_and_scores(output)
        if self.calibration:
            scores = [calibrated(score, *self.calibration) for score in scores]
        grid = (self.model.side, self.model.side)
        token_maps = output.token_similarity.float().sigmoid().unflatten(1, grid).cpu().numpy()  # (B, h, w)
        mask_maps = output.mask_logits.float().sigmoid()[:, 0].cpu().numpy()  # (B, 8 h, 8 w)
        attention_maps = [None] * len(texts)
        bridge_maps = {}
        if attention:
            shares = output.reg_attention[-1].exp().mean(1)  # (B, heads, P) of the last layer -> (B, P)
            attention_maps = shares.unflatten(1, grid).cpu().numpy()  # (B, h, w)
            if self.model.config.bridge != "constant":  # it has no words to read
                for block, shares in output.bridge_attention.items():  # (B, N, T)
                    bridge_maps[int(block) + 1] = shares[:, 1:].unflatten(1, grid).cpu().numpy()  # (B, h, w, T)
        results = []
        for i, text in enumerate(texts):
            own = i if len(images) > 1 else 0
            box = letterboxes[own].boxes_to_image(boxes[i]).tolist()  # xmin, ymin, xmax, ymax
            results.append(Result(text, tuple(box), scores[i], images[own], letterboxes[own], token_maps[i],
                                  mask_maps[i], attention_maps[i],
                                  again=partial(self._ground_batch, [images[own]], [text], True)))
            if attention:
                patches = results[-1].patches
                results[-1].word_maps = self._words(text, {b: maps[i][patches] for b, maps in bridge_maps.items()})
        return results

    def _words(self, text, bridge_maps):
        """{block, from 1: (rows, columns, T) shares of the tokens} -> list of Word."""
        last = self.clip.context_length - 1  # what does not fit before it is cut, and it is the end token
        start = 1  # after the start token
        words = []
        for word, count in self.model.tokenizer.count_by_word(text):
            tokens = slice(min(start, last), min(start + count, last))
            words.append(Word(word, {block: shares[..., tokens].sum(-1) for block, shares in bridge_maps.items()}))
            start += count
        return words


def texts_of(expression):
    """A text, or several in order -> list of texts. Raises ValueError."""
    texts = in_order(expression)
    if texts is None:
        texts = [expression]
    if not texts:
        raise ValueError("the list of expressions is empty; give at least one")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"the expression {quoted(text)} is not text; give a string, or a list of strings")
        if not any(map(str.isprintable, chain(*split_words(text)))):  # also what the tokenizer cleans away
            raise ValueError("the expression is empty; say in words what to find")
    return texts


def in_order(values):
    """Several values in a certain order, as a list; None for anything else, such as a text or a set."""
    if isinstance(values, str | bytes | bytearray | Set | Mapping):
        return None
    try:
        return list(values)
    except TypeError:
        return None
