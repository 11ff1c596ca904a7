"""Any image that people have, as an upright RGB image of 8 bits."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


class ImageError(ValueError):
    """An image that cannot be used; the message names it and says in one line what to do."""


def open_image(image):
    """A path, a PIL image of any mode, or an (H, W, 3) uint8 RGB array -> upright PIL RGB image.

    EXIF rotation is applied, the first frame of an animation taken, transparency laid on white, 16 bits scaled to 8.
    Raises ImageError.
    """
    if isinstance(image, (str, os.PathLike)):
        name = str(image)
        image = _open_file(Path(image), name)
    elif isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ImageError(f"array of shape {image.shape} and type {image.dtype}: give (H, W, 3) uint8, RGB")
        name = "array"
        image = Image.fromarray(image)
    elif isinstance(image, Image.Image):
        name = "image"
    else:
        raise ImageError(f"{type(image).__name__}: give a path, a PIL image or an (H, W, 3) uint8 array")
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # damaged data make Pillow's decoders raise nearly anything
        raise ImageError(f"{name}: the image is damaged or cut short ({error}); copy or download it again") from None


def _open_file(path, name):
    """A file -> PIL image, its pixels not read yet. Raises ImageError."""
    if not os.path.exists(path):  # unlike path.exists(), False for a name that no file can have
        raise ImageError(f"{name}: there is no such file; check the path")
    if path.is_dir():
        raise ImageError(f"{name}: is a folder; name an image in it")
    if path.stat().st_size == 0:
        raise ImageError(f"{name}: the file is empty; copy or download it again")
    try:
        return Image.open(path)
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not an image that can be read; convert it to PNG or JPEG") from None
    except (OSError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name}: cannot be opened ({error}); check the file") from None


def _to_rgb(image):
    """A PIL image of any mode -> RGB."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(image):
    """A grey image of integers or floats -> mode L. The smallest usual white that no pixel exceeds becomes 255."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64)).clip(0)  # (H, W)
    if image.mode == "F":
        whites = (1, 255, 65535)
    elif image.mode == "I":
        whites = (255, 65535)
    else:
        whites = (65535,)
    white = values.max()  # brighter than all that is usual
    for usual in whites:
        if values.max() <= usual:
            white = usual
            break
    return Image.fromarray((values / white * 255).round().astype(np.uint8))
