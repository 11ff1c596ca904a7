"""Text on images: a font that has the characters, lines that fit a width."""

import math
import re
from functools import lru_cache
from typing import NamedTuple

from PIL import ImageFont

FALLBACK_FONTS = ["DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msgothic.ttc", "arial.ttf"]


class Block(NamedTuple):
    """Wrapped text, ready to draw; width and height in pixels."""

    lines: list
    font: ImageFont.FreeTypeFont
    width: int
    height: int


@lru_cache(maxsize=64)
def fonts_of_size(size):
    """Pillow's own font (little more than ASCII), then those of FALLBACK_FONTS that are installed."""
    fonts = [ImageFont.load_default(size=size)]
    for name in FALLBACK_FONTS:
        try:
            fonts.append(ImageFont.truetype(name, size))
        except OSError:  # not installed
            pass
    return fonts


@lru_cache(maxsize=8192)
def _lacks(which, character):
    """Whether font number `which` draws `character` as its sign for a missing one, mostly a hollow box."""
    font = fonts_of_size(16)[which]
    glyph = font.getmask(character)
    missing = font.getmask("\U0010ffff")
    return glyph.size == missing.size and bytes(glyph) == bytes(missing)


def _best_font(text):
    """(which font lacks the fewest characters of `text`, the first of several; the characters it lacks)."""
    lacking = [{c for c in set(text) if _lacks(which, c)} for which in range(len(fonts_of_size(16)))]
    which = min(range(len(lacking)), key=lambda i: len(lacking[i]))
    return which, "".join(lacking[which])


def font_for(text, size):
    """The font that has the most characters of `text`."""
    return fonts_of_size(size)[_best_font(text)[0]]


def drawable(text, instead="?"):
    """The text with "?" for what no font has; `instead` where that leaves no letter or digit."""
    _, lacking = _best_font(text)
    drawn = re.sub(f"[{re.escape(lacking)}]+", "?", text) if lacking else text
    return drawn if drawn == text or any(map(str.isalnum, drawn)) else instead


def clean_text(text, limit=300):
    """One line of at most `limit` printable characters; a longer text ends in an ellipsis."""
    text = "".join(c for c in str(text)[:4 * limit] if c.isprintable() or c.isspace())
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit - 1].rstrip() + "…"


def _wrap(text, font, width):
    """Lines of at most `width` pixels."""
    lines = []
    line = ""
    for word in text.split(" "):
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        while len(word) > 1 and font.getlength(word) > width:  # e.g. Japanese, which has no spaces to break at
            cut = 1
            while font.getlength(word[:cut + 1]) <= width:
                cut += 1
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    return lines + [line]


def text_block(text, size, width=math.inf):
    """Text in a font of `size`, wrapped to at most `width` pixels in lines of similar length."""
    text = drawable(text)
    font = font_for(text, size)
    lines = _wrap(text, font, width)
    if len(lines) > 1:  # narrow the block as long as it needs no further line: no short last one
        for share in (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6):
            narrower = _wrap(text, font, share * width)
            if len(narrower) > len(lines):
                break
            lines = narrower
    ascent, descent = font.getmetrics()
    return Block(lines, font, math.ceil(max(map(font.getlength, lines))), (ascent + descent) * len(lines))


def write_block(draw, corner, block, colour):
    """Write a Block with its top left at `corner`, (x, y)."""
    x, y = corner
    for i, line in enumerate(block.lines):
        draw.text((x, y + i * block.height // len(block.lines)), line, colour, block.font)
