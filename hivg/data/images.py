"""Images as RGB of 8 bits: any that people have, upright (`open_image`), and those of the published data sets as the
released program reads them (`open_published`)."""

import ctypes
import io
import logging
import mmap
import os
import warnings
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
from PIL import Image

from hivg.data.metadata import STARTS, TURNS, turn_of, without_metadata
from hivg.utils.memory import enough_memory, is_out_of_memory
from hivg.utils.messages import shown

PATH = 150  # characters of a path that messages show
PNG_MARKS = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")  # of chunks that may say how a PNG is turned
SIDEWAYS = [TURNS[orientation] for orientation in (5, 6, 7, 8)]
# info by which Pillow would turn an image again, or make it transparent
TOLD = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp", "transparency")
ADDRESSES = ("http:/", "https:/")  # of one slash, as a Path has them
ROWS = 256  # of an image that are converted at a time

# Pillow logs, and libtiff, which it uses, prints lines of their own about damaged files; our error says it once
logging.getLogger("PIL").addHandler(logging.NullHandler())
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

    EXIF rotation is applied; of an animation's file the first frame is taken; transparency becomes white; 16 bits
    become 8. Raises ImageError, and MemoryError, one line too, where memory runs out: an RGB image takes 4 bytes a
    pixel, 8 while it is turned; one with transparency up to 13.
    """
    if isinstance(image, Image.Image):
        with _decoding("image"):
            upright = _upright(image)
            return upright.copy() if upright.im is image.im else upright  # what is done to one is not to the other
    if isinstance(image, np.ndarray):
        with _decoding("array"):
            return _upright(_of_array(image))
    if isinstance(image, io.TextIOBase):
        raise ImageError('file object: is open for text; open it for reading bytes, mode "rb"')
    if isinstance(image, (str, os.PathLike)) or hasattr(image, "read"):
        return _using(image, _upright)
    ways = {"Tensor": "; of a tensor (3, H, W) in 0..1 give tensor.permute(1, 2, 0).float().numpy(force=True)",
            "bytes": "; of an image file's bytes give io.BytesIO(data)"}
    kind = type(image).__name__
    raise ImageError(f"{kind}: give a path, a PIL image, an open file or an array{ways.get(kind, '')}")


def open_published(path):
    """The file of an image of a published data set -> PIL RGB image as the released program reads it: not rotated,
    transparency and what is more than 8 bits as Pillow converts them. Raises as `open_image` does."""
    def as_rgb(image):
        image.load()
        return _plain(image, image.im if image.mode == "RGB" else image.convert("RGB").im)

    return _using(path, as_rgb)


def stored_size(path):
    """(width, height) from an image file's header. Raises ImageError."""
    return _using(path, lambda image: image.size)


def upright_size(path):
    """(width, height) of what `open_image` makes of a file, mostly without decoding it. Raises as `open_image` does."""
    def size(image):
        if image.format == "PNG":
            with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                marks = [content.rfind(mark) for mark in PNG_MARKS]  # -1: not in it
                is_late = max(marks) > content.find(b"IDAT")
            if max(marks) < 0:
                return image.size
            if is_late or "exif" not in image.info:  # Pillow finds it only while reading the pixels
                return _upright(image).size
        if image.format in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP"):
            return image.size[::-1] if turn_of(image) in SIDEWAYS else image.size
        return _upright(image).size

    return _using(path, size)


@contextmanager
def _decoding(name):
    """Damaged data make Pillow's decoders raise nearly anything: all of it becomes an ImageError that names the image,
    or a MemoryError that does. Pillow's warnings are about oddities in files that it reads all the same."""
    with warnings.catch_warnings(), enough_memory(f"{name}: ", "make the image smaller, or read fewer at once"):
        warnings.simplefilter("ignore")
        try:
            yield
        except ImageError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ImageError(f"{name}: the image is damaged or cut short ({shown(error, 60)}); "
                             "copy or download it again") from None


def _using(file, use):
    """use(the PIL image of a path or file object, its pixels not read yet). A file that fails is tried again without
    what lies beside its pixels. Raises ImageError or MemoryError, which begin with the path."""
    is_path = isinstance(file, (str, os.PathLike))
    name = (shown(file, PATH) or "''") if is_path else "file object"
    try:
        with _decoding(name), _opened(Path(file) if is_path else file, name) as image:
            return use(image)
    except ImageTooLarge:
        raise
    except ImageError:
        if is_path and not os.path.isfile(file):  # a pipe or a device has no end
            raise
        with suppress(ImageError), _decoding(name), open(file, "rb") if is_path else nullcontext(file) as stream:
            stream.seek(0)
            start = stream.read(4)
            data, info = without_metadata(start + stream.read() if start.startswith(STARTS) else start)
            with Image.open(io.BytesIO(data)) as image:
                image.info |= info
                return use(image)
        raise


def _upright(image):
    """A PIL image of any mode -> upright PIL RGB image, of the same memory where that is what it was."""
    if 0 in image.size:
        raise ImageError(f"image of size {image.size}: has no pixels")
    image.load()
    turn = turn_of(image)
    return _plain(image, _to_rgb(image.transpose(turn) if turn is not None else image).im)


def _plain(image, pixels):
    """An opened image -> a PIL image of these pixels, not copied, which nothing turns or makes transparent again."""
    plain = image._new(pixels)
    plain.info = {key: value for key, value in image.info.items() if key not in TOLD}
    return plain


def _opened(file, name):
    """A Path or a file object -> PIL image, its pixels not read yet. Raises ImageError, and anything (_decoding)."""
    if isinstance(file, Path):
        if not os.path.exists(file):  # unlike file.exists(), False for a name that no file can have
            advice = "download it first" if file.as_posix().lower().startswith(ADDRESSES) else "check the path"
            raise ImageError(f"{name}: there is no such file; {advice}")
        if file.is_dir():
            raise ImageError(f"{name}: is a folder; name an image in it")
        if file.is_fifo():  # a program's output, `<(cat image.png)`: Pillow needs a file it can go back in
            file = io.BytesIO(file.read_bytes())
        elif file.stat().st_size == 0:
            raise ImageError(f"{name}: the file is empty; copy or download it again")
    try:
        image = Image.open(file)
    except Image.UnidentifiedImageError:
        raise ImageError(f"{name}: not an image that can be read; convert it to PNG or JPEG") from None
    except Image.DecompressionBombError:
        raise ImageTooLarge(f"{name}: has more than {most_pixels()}; make it smaller") from None
    except OSError as error:
        if is_out_of_memory(error):
            raise
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
        is_turned = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        way = "; if channels come first, array.transpose(1, 2, 0)" if is_turned else ""
        raise ImageError(f"array of shape {shown(array.shape, 60)}: give (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA"
                         f"{way}")
    if array.dtype.kind == "f":
        low, high = array.min(), array.max()
        if not 0 <= low <= high <= 1:  # nor with NaN
            raise ImageError(f"array of floats from {low:.4g} to {high:.4g}: give floats in 0..1, or uint8 in 0..255")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        way = "; of booleans give array.astype(float)" if array.dtype == bool else ""
        raise ImageError(f"array of type {shown(array.dtype, 60)}: give uint8, or floats in 0..1{way}")
    return Image.fromarray(array)


def _to_rgb(image):
    """A PIL image of any mode -> RGB; the same if it is that already."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    is_deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    white = _white(image) if is_deep else None
    rgb = Image.new("RGB", image.size)
    for top, strip in _strips(image):  # not all at once, in several copies
        if is_deep:
            values = _values(strip)
            clear = values == image.info.get("transparency", np.nan)  # a PNG of 16 bits names the value that is clear
            strip = Image.fromarray(np.where(clear, 255, (values.clip(0) / white * 255).round()).astype(np.uint8))
        if strip.mode == "La":  # grey multiplied by its opacity, which Pillow converts to this alone
            strip = strip.convert("LA")
        if strip.has_transparency_data:
            strip = strip.convert("RGBA")
            strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
        rgb.paste(strip.convert("RGB"), (0, top))
    return rgb


def _white(image):
    """What becomes 255 of a grey image of integers or floats: the smallest usual white that no pixel exceeds."""
    largest = max([0, *(_values(strip).max() for _, strip in _strips(image))])
    whites = (255, 1023, 4095, 16383, 65535)  # of 8, 10, 12, 14, 16 bits
    if image.mode == "F":
        whites = (1, *whites)
    return next((white for white in whites if largest <= white), largest)


def _values(image):
    """A grey image of integers or floats -> (H, W) float64, NaN as 0."""
    return np.nan_to_num(np.asarray(image)).astype(np.float64)


def _strips(image):
    """-> (its first row, an image) of each ROWS rows."""
    for top in range(0, image.height, ROWS):
        yield top, image.crop((0, top, image.width, min(top + ROWS, image.height)))
