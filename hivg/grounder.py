"""Prediction: pictures and expressions in, boxes in the pictures' own pixels out.

    g = Grounder.from_pretrained("weights/hivg-tiny.safetensors")
    r = g.ground("picture.jpg", "the red circle left of the star")
    r.box, r.score, r.mask, r.heatmap, r.draw()
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from hivg import weights
from hivg.data.transforms import Letterbox
from hivg.utils.cli import choose_device
from hivg.utils.draw import draw_boxes

DEFAULT_WEIGHTS = Path(__file__).parents[1] / "weights" / "hivg-tiny.safetensors"
DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH = 32  # expressions that go through the model at once


class ImageError(ValueError):
    """A picture that cannot be used; the message names it and the mend in one line."""


def open_image(image):
    """A path, a PIL image of any mode, or an (H, W, 3) uint8 RGB array -> upright PIL RGB picture.

    EXIF rotation is applied, the first frame of an animation taken, transparency laid on white, 16 bits scaled to 8.
    Raises ImageError.
    """
    if isinstance(image, (str, os.PathLike)):
        name, path = str(image), Path(image)
        if not os.path.exists(path):  # unlike path.exists(), False for a name that no file can have
            raise ImageError(f"{name}: there is no such file; check the path")
        if path.is_dir():
            raise ImageError(f"{name}: is a folder; name a picture in it")
        if path.stat().st_size == 0:
            raise ImageError(f"{name}: the file is empty; copy or download it again")
        try:
            image = Image.open(path)
        except Image.UnidentifiedImageError:
            raise ImageError(f"{name}: not a picture that can be read; convert it to PNG or JPEG") from None
        except (OSError, Image.DecompressionBombError) as error:
            raise ImageError(f"{name}: cannot be opened ({error}); check the file") from None
    elif isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ImageError(f"array of shape {image.shape} and type {image.dtype}: give (H, W, 3) uint8, RGB")
        name, image = "array", Image.fromarray(image)
    elif isinstance(image, Image.Image):
        name = "picture"
    else:
        raise ImageError(f"{type(image).__name__}: give a path, a PIL image or an (H, W, 3) uint8 array")
    try:
        return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # damaged data make Pillow's decoders raise nearly anything
        raise ImageError(f"{name}: the picture is damaged or cut short ({error}); copy or download it again") from None


def _rgb(image):
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # more than 8 bits: scale the brightest kind to 255
        values = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(0)
        tops = (1, 255, 65535) if image.mode == "F" else (65535,) if image.mode != "I" else (255, 65535)
        top = next((t for t in tops if values.max() <= t), values.max())
        image = Image.fromarray((values / top * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


@dataclass
class Result:
    """One grounded expression."""

    expression: str
    box: tuple  # (xmin, ymin, xmax, ymax), floats in pixels of the picture, which is upright after EXIF rotation
    score: float  # 0..1: agreement of the box with the token map, not calibrated (see HiVG.score)
    image: Image.Image  # the picture it was found in, RGB
    letterbox: Letterbox
    token_map: np.ndarray  # (h, w) on the patch grid of the padded square, 0..1
    mask_map: np.ndarray  # (8 h, 8 w), 0..1

    @property
    def heatmap(self):
        """(H, W) float32 in 0..1: the token map (RTCC), how much each place belongs to the region meant."""
        return self._at_picture(self.token_map)

    @property
    def mask(self):
        """(H, W) float32 in 0..1: the segmentation head's probability of each pixel."""
        return self._at_picture(self.mask_map)

    def _at_picture(self, small):
        square = F.interpolate(torch.from_numpy(small)[None, None], (self.letterbox.size,) * 2, mode="bicubic")
        return self.letterbox.map_to_image(square[0, 0].numpy()).clip(0, 1)

    def draw(self, heatmap=False, mask=False):
        """-> PIL RGB picture with the box and the expression; on request over the heat map or the mask."""
        return draw_results([self], heatmap, mask)

    def to_dict(self):
        """The entry of `ground.py --json`."""
        names = ("xmin", "ymin", "xmax", "ymax")
        return {"label": self.expression, "score": self.score, "box": dict(zip(names, self.box))}


def draw_results(results, heatmap=False, mask=False):
    """Draw the results of one picture together; heat map or mask are those of the first."""
    first = results[0]
    return draw_boxes(first.image, [r.box for r in results], [r.expression for r in results],
                      heatmap=first.heatmap if heatmap else None, mask=first.mask if mask else None)


class Grounder:
    """A HiVG model ready for use: adapters merged, in evaluation mode, on its device."""

    def __init__(self, model, device="auto", dtype="auto"):
        """dtype: float32 (auto) or bfloat16, which is faster on a GPU and less exact."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        self.device, self.dtype = choose_device(device), DTYPES[dtype]
        self.model = model.merged().to(self.device).eval()
        self.clip = self.model.config.clip

    @classmethod
    def from_pretrained(cls, path=DEFAULT_WEIGHTS, device="auto", dtype="auto"):
        """Raises hivg.weights.WeightsError for a file that cannot be used, ValueError for a device not there."""
        choose_device(device)  # before the time is spent on loading
        model = weights.load_hivg(path)
        weights.need_tokenizer(model, path)
        return cls(model, device, dtype)

    @torch.inference_mode()
    def ground(self, image, expression):
        """image: path, PIL image or (H, W, 3) uint8 RGB array; expression: text -> Result, or a list of texts -> list
        of Result, in one batch. Raises ImageError for the picture, ValueError for an empty expression."""
        texts = [expression] if isinstance(expression, str) else list(expression)
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError("the expression is empty; say in words what to find")
        picture = open_image(image)
        letterbox = Letterbox(*picture.size, self.clip.image_size)
        pixels = letterbox.image(picture, self.model.config.normalization)[None].to(self.device)
        padding = letterbox.padding_mask()[None].to(self.device)
        results = [result for i in range(0, len(texts), BATCH)
                   for result in self._ground(picture, letterbox, pixels, padding, texts[i : i + BATCH])]
        return results[0] if isinstance(expression, str) else results

    def _ground(self, picture, letterbox, pixels, padding, texts):
        n, grid = len(texts), [self.clip.image_size // self.clip.patch_size] * 2
        token_ids = self.model.tokenizer(texts).to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.model(pixels.expand(n, -1, -1, -1), padding.expand(n, -1, -1), token_ids)
        boxes = letterbox.boxes_to_image(output.boxes.float().cpu()).tolist()
        scores = self.model.score(output, grid).tolist()
        token_maps = output.token_similarity.float().sigmoid().unflatten(1, grid).cpu().numpy()
        mask_maps = output.mask_logits.float().sigmoid()[:, 0].cpu().numpy()
        return [Result(text, tuple(box), score, picture, letterbox, token_map, mask_map) for
                text, box, score, token_map, mask_map in zip(texts, boxes, scores, token_maps, mask_maps)]
