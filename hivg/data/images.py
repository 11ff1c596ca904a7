"""Images as RGB of 8 bits: any that people have, upright (`open_image`), and those of the published data sets as the
released program reads them (`open_published`)."""

import ctypes
import io
import os
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from hivg.utils.messages import shown

PATH = 150  # characters of a path that messages show
PNG_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # of chunks that may say how a PNG is turned
ROWS = 256  # of a 16-bit image that are scaled at a time

# libtiff, which Pillow uses, prints its own lines on stderr about damaged files; our error says it once
with suppress(OSError, AttributeError):  # a Pillow without libtiff, or built differently
    ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)


class ImageError(ValueError):
    """An image that cannot be used; the message names it and says in one line what to do."""


class ImageTooLarge(ImageError):
    """An image of more pixels than Pillow reads; it could fill the memory."""


def most_pixels():
    """The largest image that Pillow reads, as text."""
    return f"{2 * Image.MAX_IMAGE_PIXELS // 10**6} megapixels"


def open_image(image):
    """An image in any form -> upright PIL RGB image. Forms: a path, a PIL image of any mode, a file open for reading
    bytes, or an array, (H, W) or (H, W, 1) grey, (H, W, 3) RGB or (H, W, 4) RGBA, of uint8 or of floats in 0..1.

    EXIF rotation is applied; of an animation the first frame is taken; transparency becomes white; 16 bits become 8.
    Raises ImageError.
    """
    if isinstance(image, (str, os.PathLike)):
        name = shown(image, PATH) or "''"
        with _open_file(image, name) as opened:
            return _upright(opened, name)
    if isinstance(image, Image.Image):
        return _upright(image, "image")
    if isinstance(image, np.ndarray):
        return _upright(_of_array(image), "array")
    if isinstance(image, io.TextIOBase):
        raise ImageError('file object: is open for text; open it for reading bytes, mode "rb"')
    if hasattr(image, "read"):
        return _upright(_identified(image, "file object"), "file object")
    raise ImageError(f"{type(image).__name__}: give a path, a PIL image, an open file or an array")


def open_published(path):
    """The file of an image of a published data set -> PIL RGB image as the released program reads it: not rotated,
    transparency and what is more than 8 bits as Pillow converts them. Raises ImageError."""
    name = shown(path, PATH)
    with _decoding(name), _open_file(path, name) as image:
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")  # a copy would take a quarter of the time


def stored_size(path):
    """(width, height) from an image file's header. Raises ImageError."""
    with _open_file(path, shown(path, PATH)) as image:
        return image.size


def upright_size(path):
    """(width, height) of what `open_image` makes of a file, mostly without decoding it. Raises ImageError."""
    name = shown(path, PATH)
    with _decoding(name), _open_file(path, name) as image:
        if image.format == "PNG":
            content = Path(path).read_bytes()  # Pillow finds a chunk after the pixels only while reading them
            late = content[content.find(b"IDAT") :]
            if any(mark in late for mark in PNG_MARKS):
                return open_image(path).size
            if not any(mark in content for mark in PNG_MARKS):
                return image.size  # to ask for its EXIF would read its pixels
        if image.format in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP"):
            is_turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # by 90 degrees
            return image.size[::-1] if is_turned else image.size
    return open_image(path).size


@contextmanager
def _decoding(name):
    """Damaged data make Pillow's decoders raise nearly anything: all of it becomes an ImageError that names the image.
    Pillow's warnings are about oddities in files that it reads all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except ImageError:
            raise
        except Exception as error:
            raise ImageError(f"{name}: the image is damaged or cut short ({shown(error, 60)}); "
                             "copy or download it again") from None


def _upright(image, name):
    """A PIL image of any mode -> upright PIL RGB image. name: for messages. Raises ImageError."""
    with _decoding(name):
        return _to_rgb(ImageOps.exif_transpose(image))


def _open_file(path, name):
    """A file -> PIL image, its pixels not read yet. Raises ImageError."""
    path = Path(path)
    if not os.path.exists(path):  # unlike path.exists(), False for a name that no file can have
        raise ImageError(f"{name}: there is no such file; check the path")
    if path.is_dir():
        raise ImageError(f"{name}: is a folder; name an image in it")
    if path.stat().st_size == 0:
        raise ImageError(f"{name}: the file is empty; copy or download it again")
    return _identified(path, name)


def _identified(file, name):
    """A path or a file object -> PIL image, its pixels not read yet. Raises ImageError."""
    with _decoding(name):
        try:
            image = Image.open(file)
        except Image.UnidentifiedImageError:
            raise ImageError(f"{name}: not an image that can be read; convert it to PNG or JPEG") from None
        except Image.DecompressionBombError:
            raise ImageTooLarge(f"{name}: has more than {most_pixels()}; make it smaller") from None
        except OSError as error:
            problem = getattr(error, "strerror", None) or error  # without the path again
            raise ImageError(f"{name}: cannot be opened ({shown(problem, 80)}); check the file") from None
    if image.format == "EPS":  # a program, which Pillow would run
        raise ImageError(f"{name}: EPS is a program, not pixels; convert it to PNG or JPEG")
    return image


def _of_array(array):
    """An array, (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), of uint8 or of floats in 0..1 -> PIL image. Raises
    ImageError."""
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,), (4,)) or 0 in array.shape:
        raise ImageError(f"array of shape {shown(array.shape, 60)}: give (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA")
    if array.dtype.kind == "f":
        low, high = array.min(), array.max()
        if not 0 <= low <= high <= 1:  # nor with NaN
            raise ImageError(f"array of floats from {low:.4g} to {high:.4g}: give floats in 0..1, or uint8 in 0..255")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(f"array of type {shown(array.dtype, 60)}: give uint8, or floats in 0..1")
    return Image.fromarray(array)


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
    values = np.asarray(image)  # (H, W)
    if values.dtype.kind == "f":
        values = np.nan_to_num(values)
    largest = max(0, values.max())
    whites = {"F": (1, 255, 65535), "I": (255, 65535)}.get(image.mode, (65535,))
    white = next((white for white in whites if largest <= white), largest)
    scaled = np.empty(values.shape, dtype=np.uint8)
    for start in range(0, len(values), ROWS):  # not all at once, in eight times the bytes
        rows = slice(start, start + ROWS)
        scaled[rows] = (values[rows].astype(np.float64).clip(0) / white * 255).round()
    return Image.fromarray(scaled)
