"""Images and checks for the tests of prediction."""

import re
import struct
import sys
import zlib

import numpy as np
from makers import ended

from hivg.data.drawn.drawing import SIZES, Background, Object, Scene, draw
from hivg.utils.cli import run

TEXTS = ["the red circle", "star", "large blue square left of the green triangle at the very bottom of the picture"]
PLAIN = Background("plain", ((222, 220, 214), (0, 0, 0)), 0.1, 0.0, 0)


def make_scene(width, height, *objects):
    """Objects as (shape, colour, size, x, y), or with a last False for outlined ones."""
    side = (width * height) ** 0.5
    placed = []
    for i, (shape, colour, size, x, y, *filled) in enumerate(objects):
        placed.append(Object(shape, colour, size, filled != [False], x, y, SIZES[size] * side, 4.0 * i - 8))
    return Scene(width, height, PLAIN, tuple(placed))


def make_image():
    """RGB, 200 x 120, of few colours."""
    scene = make_scene(1.0, 0.6, ("circle", "red", "large", 0.25, 0.25), ("star", "blue", "medium", 0.7, 0.35))
    return draw(scene, 200)[0]


def call(main, capfd, monkeypatch, *args):
    """A program with these flags, in this process -> (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, args)])
    return ended(capfd, run, main)


def assert_inside(result, width, height):
    """A Result for an image of this size: types, shapes and ranges."""
    xmin, ymin, xmax, ymax = result.box
    assert all(isinstance(v, float) for v in (*result.box, result.score))
    assert 0 <= xmin <= xmax <= width and 0 <= ymin <= ymax <= height and 0 <= result.score <= 1
    for name, values in (("mask", result.mask), ("heatmap", result.heatmap)):
        assert values.shape == (height, width) and values.dtype == np.float32, name
        assert values.min() >= 0 and values.max() <= 1, name
    drawn = result.draw()
    assert drawn.mode == "RGB" and drawn.width >= width and drawn.height >= height


def assert_same(a, b, tol=1e-5):
    """Boxes within tol of the image's long side, scores and maps within tol."""
    np.testing.assert_allclose(a.box, b.box, atol=tol * max(a.image.size), rtol=0)
    np.testing.assert_allclose(a.score, b.score, atol=tol)
    for name in ("token_map", "mask_map"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), atol=tol, err_msg=name)


def far(a, b):
    return np.abs(np.subtract(a.box, b.box)).max() > 0.1


def assert_line(message, *words):
    """One line that contains all the words."""
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert str(word) in message, message


def assert_fails(result, *words):
    """Of a program: exit code 2, nothing on stdout, and one line on stderr that contains all the words."""
    code, out, err = result
    assert (code, out) == (2, "") and re.fullmatch(r"error: [^\n\x1b]{,300}\n", err), result
    assert_line(err.strip(), *words)


# --- image files that cannot be used ---


def huge_png():
    """The beginning of an image of 60,000 x 60,000 pixels."""
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)), (b"IDAT", b"")):
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data


def write_cut(path):
    make_image().save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_IMAGES = {  # file: (a function that writes it, part of the message)
    "missing.png": (lambda path: None, "no such file"), "empty.png": (lambda path: path.write_bytes(b""), "empty"),
    "cut.png": (write_cut, "damaged or cut short"), "cut.jpg": (write_cut, "damaged or cut short"),
    "cut.bmp": (write_cut, "damaged or cut short"),
    "text.png": (lambda path: path.write_text("these are\nonly words"), "not an image"),
    "page.jpg": (lambda path: path.write_text("<html><body>404</body></html>\n"), "not an image"),
    "huge.png": (lambda path: path.write_bytes(huge_png()), "huge.png"),
    "x" * 300 + ".png": (lambda path: None, "no such file"),
}
