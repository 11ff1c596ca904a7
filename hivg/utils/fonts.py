"""Text on images: a font that has the characters, lines that fit a width."""

import math
import re
from contextlib import suppress
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

FALLBACK_FONTS = ["DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msgothic.ttc", "arial.ttf"]


@lru_cache(maxsize=64)
def fonts_of_size(size):
    """Pillow's own font (little more than ASCII), then those of FALLBACK_FONTS that are installed."""
    fonts = [ImageFont.load_default(size=size)]
    for name in FALLBACK_FONTS:
        with suppress(OSError):  # not installed
            fonts.append(ImageFont.truetype(name, size))
    return fonts


@lru_cache(maxsize=8192)
def _lacks(which, character):
    """Whether font number `which` draws `character` as its sign for a missing one, mostly a hollow box."""
    font = fonts_of_size(16)[which]
    glyph = font.getmask(character)
    missing = font.getmask("\U0010ffff")
    return glyph.size == missing.size and bytes(glyph) == bytes(missing)


def _lacking(text):
    """For each font the characters of `text` that it lacks."""
    return [{c for c in set(text) if _lacks(which, c)} for which in range(len(fonts_of_size(16)))]


def font_for(text, size):
    """The font that has the most characters of `text`, the first of several."""
    return min(zip(fonts_of_size(size), _lacking(text)), key=lambda pair: len(pair[1]))[0]


def drawable(text, instead="?"):
    """The text with "?" for what no font has; `instead` where that leaves no letter or digit."""
    lacking = "".join(min(_lacking(text), key=len))
    drawn = re.sub(f"[{re.escape(lacking)}]+", "?", text) if lacking else text
    return drawn if drawn == text or any(map(str.isalnum, drawn)) else instead


def clean_text(text, limit=300):
    """One line of at most `limit` printable characters; a longer text ends in an ellipsis."""
    text = "".join(c for c in str(text)[:4 * limit] if c.isprintable() or c.isspace())
    text = " ".join(text.split())
    return text if len(text) <= limit else text[:limit - 1].rstrip() + "…"


def _wrap(text, font, width):
    """Lines of at most `width` pixels."""
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines.append("")
        for part in [word] if font.getlength(word) <= width else word:  # e.g. Japanese has no spaces to break at
            if font.getlength(lines[-1] + part) > width:
                lines.append("")
            lines[-1] += part
    return list(filter(None, lines)) or [""]


def text_lines(text, font, width):
    """Text wrapped to at most `width` pixels, in lines of similar length."""
    lines = _wrap(text, font, width)
    longest = max((word for word in map(font.getlength, text.split(" ")) if word <= width), default=0.0)
    for percent in range(95, 55, -5):  # narrower, as long as it needs no further line and breaks no word
        narrower = _wrap(text, font, max(longest, width * percent / 100))
        if len(narrower) > len(lines):
            break
        lines = narrower
    return lines


def text_block(text, size, width=math.inf):
    """Text in a font of `size`, wrapped to at most `width` pixels -> grey image, white on black, for ImageDraw.bitmap:
    drawn at twice the size and then reduced, as small letters drawn at their own size are uneven."""
    text = drawable(text)
    font = font_for(text, 2 * size)
    lines = text_lines(text, font, 2 * width)
    height = 2 * math.ceil(sum(font.getmetrics()) / 2)  # of a line
    block = Image.new("L", (2 * math.ceil(max(map(font.getlength, lines)) / 2) + 4, height * len(lines)))
    for i, line in enumerate(lines):
        ImageDraw.Draw(block).text((2, i * height), line, 255, font)  # 2: some letters reach beyond their width
    return block.reduce(2)
