"""The same image in every form that files and arrays have is opened as the same RGB image."""

import struct
import sys

import numpy as np
import pytest
from makers import python
from makers_use import TEXTS, assert_inside, make_image
from PIL import Image

from hivg.data.images import ImageError, open_image

RGB = make_image()
PIXELS = np.asarray(RGB)
GREY = RGB.convert("L")
# the image on a transparent ground: transparent pixels count as white, whatever colour they have
GROUND = (PIXELS == PIXELS[0, 0]).all(2)  # (H, W)
RGBA = Image.fromarray(np.dstack([PIXELS, np.where(GROUND, 0, 255).astype(np.uint8)]))
ON_WHITE = Image.fromarray(np.where(GROUND[..., None], 255, PIXELS).astype(np.uint8))
INDEXED = RGB.quantize(16, dither=Image.Dither.NONE)
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", RGB.size, colour) for colour in ("black", "white")]}


def grey(dtype, factor):
    return Image.fromarray(np.asarray(GREY).astype(dtype) * dtype(factor))


TWELVE = Image.fromarray(np.round(np.asarray(GREY) * (4095 / 255)).astype(np.uint16))
FILES = {  # name: (the odd image, the image it must be opened as, options of save)
    "cmyk.tif": (RGB.convert("CMYK"), RGB, {}),
    "cmyk.jpg": (Image.new("CMYK", (40, 30), (0, 255, 255, 0)), Image.new("RGB", (40, 30), "red"), {}),
    "palette.png": (INDEXED, RGB, {}),
    "palette-transparent.png": (INDEXED, ON_WHITE, {"transparency": INDEXED.getpixel((0, 0))}),
    "rgba.png": (RGBA, ON_WHITE, {}), "rgb-transparent.png": (RGB, ON_WHITE, {"transparency": RGB.getpixel((0, 0))}),
    "la.png": (Image.merge("LA", [GREY, RGBA.getchannel("A")]), ON_WHITE.convert("L"), {}),
    "grey.png": (GREY, GREY, {}), "bit.png": (RGB.convert("1"), RGB.convert("1"), {}),
    "16 bit.png": (grey(np.uint16, 257), GREY, {}), "16 bit.tif": (grey(np.uint16, 257), GREY, {}),
    "12 bit.png": (TWELVE, GREY, {}), "8 of 16 bit.tif": (grey(np.uint16, 1), GREY, {}),  # microscopes write such
    "32 bit.tif": (grey(np.int32, 257), GREY, {}), "float.tif": (grey(np.float32, 1 / 255), GREY, {}),
    "float 255.tif": (grey(np.float32, 1), GREY, {}), "animated.gif": (RGB, RGB, FRAMES),
    "animated.png": (RGB, RGB, FRAMES),
}


def assert_opens_as(opened, image):
    assert opened.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_forms(tmp_path, name):
    odd, image, options = FILES[name]
    odd.save(tmp_path / name, **options)
    opened = open_image(tmp_path / name)
    if name.endswith(".jpg"):
        assert np.abs(np.asarray(opened).astype(int) - np.asarray(image)).max() <= 2
    else:
        assert_opens_as(opened, image)


def test_a_clear_value_of_16_bits(tmp_path):
    Image.fromarray(np.array([[0, 7, 65535]], np.uint16)).save(tmp_path / "clear.png", transparency=7)
    assert np.asarray(open_image(tmp_path / "clear.png"))[0, :, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize("array, image", [
    (np.asarray(GREY), GREY), (np.asarray(GREY)[:, :, None], GREY), (np.asarray(GREY) / 255, GREY),
    (PIXELS / 255, RGB), ((PIXELS / 255).astype(np.float32), RGB), (np.asarray(RGBA), ON_WHITE)],
    ids=["grey", "grey (H, W, 1)", "grey floats", "float64", "float32", "rgba"])
def test_arrays(array, image):
    assert_opens_as(open_image(array), image)


@pytest.mark.parametrize("orientation, undo", [  # EXIF's value; how the stored image comes from the upright one
    (2, Image.Transpose.FLIP_LEFT_RIGHT), (3, Image.Transpose.ROTATE_180), (5, Image.Transpose.TRANSPOSE),
    (6, Image.Transpose.ROTATE_90), (8, Image.Transpose.ROTATE_270)])
def test_an_image_that_exif_turns(tmp_path, orientation, undo):
    exif = Image.Exif()
    exif[0x0112] = orientation
    RGB.transpose(undo).save(tmp_path / "turned.png", exif=exif)
    assert_opens_as(open_image(tmp_path / "turned.png"), RGB)


@pytest.mark.parametrize("mode", Image.MODES)
def test_every_mode_of_pillow(grounder, mode):
    assert_inside(grounder.ground(Image.new(mode, (30, 20)), TEXTS[0]), 30, 20)


def test_what_pillow_logs_is_not_shown(tmp_path):
    """In a program of its own, as pytest shows no log."""
    path = tmp_path / "many.tif"
    RGB.save(path)
    data = path.read_bytes()
    samples = struct.pack("<HHI", 277, 3, 1)  # the entry of the samples in a pixel
    path.write_bytes(data.replace(samples + b"\3\0", samples + b"\0\4"))
    code = "import sys\nfrom hivg.data.images import upright_size\n"
    code += "try: upright_size(sys.argv[1])\nexcept ValueError: print('no')"
    done = python("-c", code, path)
    assert (done.stdout, done.stderr) == ("no\n", "")


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
