"""The same image in every form that files have: all of them are grounded alike."""

import sys

import numpy as np
import pytest
import torch
from makers import make_hivg
from makers_use import TEXTS, assert_inside, make_image
from PIL import Image

from hivg import Grounder
from hivg.data.images import ImageError, open_image


@pytest.fixture(scope="module")
def grounder():
    return Grounder(make_hivg(dtype=torch.float32, stage=1), "cpu", "float32")


# Each function gets the RGB image and returns the odd one, the image it must be grounded like, and options of save.


def cmyk(rgb):
    return rgb.convert("CMYK"), rgb, {}


def cmyk_red(rgb):
    return Image.new("CMYK", (40, 30), (0, 255, 255, 0)), Image.new("RGB", (40, 30), "red"), {}


def palette(rgb):
    return rgb.quantize(16, dither=Image.Dither.NONE), rgb, {}


def with_alpha(rgb):
    """The image on a transparent ground: transparent pixels count as white, whatever colour they have."""
    colours = np.asarray(rgb)
    background = (colours == colours[0, 0]).all(2)
    alpha = np.where(background, 0, 255).astype(np.uint8)
    on_white = Image.fromarray(np.where(background[..., None], 255, colours).astype(np.uint8))
    return Image.fromarray(np.dstack([colours, alpha])), on_white


def rgba(rgb):
    image, on_white = with_alpha(rgb)
    return image, on_white, {}


def transparent_colour(rgb):
    return rgb, with_alpha(rgb)[1], {"transparency": rgb.getpixel((0, 0))}


def transparent_palette(rgb):
    indexed = rgb.quantize(16, dither=Image.Dither.NONE)
    return indexed, with_alpha(rgb)[1], {"transparency": indexed.getpixel((0, 0))}


def grey_with_alpha(rgb):
    image, on_white = with_alpha(rgb)
    return Image.merge("LA", [rgb.convert("L"), image.getchannel("A")]), on_white.convert("L"), {}


def grey(rgb):
    return rgb.convert("L"), rgb.convert("L"), {}


def one_bit(rgb):
    return rgb.convert("1"), rgb.convert("1"), {}


def grey_array(rgb, dtype, factor):
    values = np.asarray(rgb.convert("L")).astype(dtype) * dtype(factor)
    return Image.fromarray(values), rgb.convert("L"), {}


def grey_16_bit(rgb):
    return grey_array(rgb, np.uint16, 257)


def grey_32_bit(rgb):
    return grey_array(rgb, np.int32, 257)


def grey_float(rgb):
    return grey_array(rgb, np.float32, 1 / 255)


def grey_float_255(rgb):
    return grey_array(rgb, np.float32, 1)


def animation(rgb):
    frames = [Image.new("RGB", rgb.size, colour) for colour in ("black", "white")]
    return rgb, rgb, {"save_all": True, "append_images": frames}


FORMS = [
    ("cmyk.tif", cmyk),
    ("cmyk.jpg", cmyk_red),
    ("palette.png", palette),
    ("palette-transparent.png", transparent_palette),
    ("rgba.png", rgba),
    ("rgb-transparent.png", transparent_colour),
    ("la.png", grey_with_alpha),
    ("grey.png", grey),
    ("bit.png", one_bit),
    ("16 bit.png", grey_16_bit),
    ("16 bit.tif", grey_16_bit),
    ("32 bit.tif", grey_32_bit),
    ("float.tif", grey_float),
    ("float 255.tif", grey_float_255),
    ("animated.gif", animation),
    ("animated.png", animation),
]


@pytest.mark.parametrize("name, form", FORMS, ids=[name for name, _ in FORMS])
def test_the_same_image_in_another_form(grounder, tmp_path, name, form):
    odd, plain, options = form(make_image())
    odd.save(tmp_path / name, **options)
    result = grounder.ground(tmp_path / name, TEXTS[1])
    expected = grounder.ground(plain.convert("RGB"), TEXTS[1])
    assert_inside(result, *plain.size)
    if name.endswith(".jpg"):
        np.testing.assert_allclose(result.box, expected.box, atol=0.5)
    else:
        np.testing.assert_array_equal(np.asarray(result.image), np.asarray(expected.image))
        assert result.box == expected.box


UNDO = {  # EXIF orientation -> how the stored image comes from the upright one
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("orientation", UNDO)
def test_an_image_that_exif_turns(grounder, tmp_path, orientation):
    upright = make_image()
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright.transpose(UNDO[orientation]).save(tmp_path / "turned.png", exif=exif)
    result = grounder.ground(tmp_path / "turned.png", TEXTS[1])
    assert_inside(result, *upright.size)
    np.testing.assert_array_equal(np.asarray(result.image), np.asarray(upright))
    assert result.box == grounder.ground(upright, TEXTS[1]).box


@pytest.mark.parametrize("mode", [mode for mode in Image.MODES if mode != "La"])  # no file opens as La
def test_every_mode_of_pillow(grounder, mode):
    assert_inside(grounder.ground(Image.new(mode, (30, 20)), TEXTS[0]), 30, 20)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere libtiff may not be found")
def test_a_damaged_tiff_gives_one_line(tmp_path, capfd):
    """libtiff's own lines, which do not pass through Python, are not shown."""
    path = tmp_path / "cut.tif"
    Image.effect_noise((64, 64), 50).save(path, compression="tiff_lzw")
    data = bytearray(path.read_bytes())
    data[1000:3000] = bytes(2000)
    path.write_bytes(data)
    with pytest.raises(ImageError):
        open_image(path)
    assert capfd.readouterr().err == ""
