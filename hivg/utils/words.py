"""Pictures of what the patches read, of a hivg.grounder.Result that has `words`: for each bridge the map of one word,
or the word that each patch reads most."""

import numpy as np
from PIL import Image, ImageDraw

from hivg.utils import draw
from hivg.utils.fonts import clean_text, text_block
from hivg.utils.messages import quoted

SIDE = 440  # of the picture of a bridge, in pixels
SIZE = 15  # of the font


def draw_word(result, word, heat_range=None):
    """For each bridge how much each patch reads a word, in one range of colours -> PIL image. A word that occurs twice
    has two rows of maps. heat_range: (low, high), the shares with the first and the last colour; by default the maps'
    own. Raises ValueError for what is no word of the expression."""
    found = {n: own for n, own in enumerate(result.words, 1) if own.text.casefold() == str(word).casefold()}
    if not found:
        words = ", ".join(dict.fromkeys(own.text for own in result.words))
        raise ValueError(f"{quoted(word, 40)} is no word of the expression; choose one of: {words:.300}")
    image, ys, xs = _picture(result)
    scale = image.width / result.image.width
    if heat_range is None:
        heat_range = draw.heat_range_of(*(shares for own in found.values() for shares in own.bridges.values()))
    tiles = []
    captions = []
    for n, own in found.items():
        for block, shares in own.bridges.items():
            heatmap = np.full((image.height, image.width), np.nan)
            heatmap[ys[0] : ys[-1], xs[0] : xs[-1]] = shares.repeat(np.diff(ys), 0).repeat(np.diff(xs), 1)
            heated = draw.overlay_heatmap(image, heatmap, heat_range=heat_range)
            tiles.append(draw.draw_boxes(heated, [[scale * v for v in result.box]]))
            captions.append(f"bridge of block {block}" + f", word {n}" * (len(found) > 1))
    said = f'how much each patch reads "{own.text}" in "{result.expression}": the share of its attention'
    return _sheet(tiles, captions, len(own.bridges), said, [draw.heat_bar(SIZE, *heat_range)])


def draw_most_read(result):
    """For each bridge the word that each patch reads most, in a colour as strong as its share -> PIL image."""
    image, ys, xs = _picture(result)
    image = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "white"), 0.5)
    texts = [own.text.casefold() for own in result.words]
    colours = {text: draw.colour_of(i) for i, text in enumerate(dict.fromkeys(texts))}
    blocks = list(result.words[0].bridges)
    shares = np.array([[own.bridges[block] for own in result.words] for block in blocks])  # (blocks, words, h, w)
    tiles = []
    for of_block in shares:
        tile = image.copy()
        on_tile = ImageDraw.Draw(tile, "RGBA")
        for (row, column), which in np.ndenumerate(of_block.argmax(0)):  # (h, w)
            x0, y0, x1, y1 = xs[column], ys[row], xs[column + 1], ys[row + 1]
            opacity = round(40 + 180 * float(of_block[which, row, column] / max(shares.max(), 1e-9)))
            on_tile.rectangle((x0, y0, max(x0, x1 - 2), max(y0, y1 - 2)), (*colours[texts[which]], opacity))
            text = text_block(clean_text(result.words[which].text, 40), 13)
            if text.width <= x1 - x0 and text.height <= y1 - y0:  # else its colour tells
                on_tile.bitmap(((x0 + x1 - text.width) // 2, (y0 + y1 - text.height) // 2), text, draw.INK)
        tiles.append(tile)
    said = f'the word of "{result.expression}" that each patch reads most; a stronger colour is a larger share'
    keys = [draw.key_row(clean_text(text, 40), SIZE, SIDE, colour) for text, colour in colours.items()]
    return _sheet(tiles, [f"bridge of block {block}" for block in blocks], len(blocks), said, keys)


def _picture(result):
    """The image with a long side of SIDE, and the pixel rows and columns between which its patches lie."""
    if not result.words[0].bridges:
        raise ValueError("these weights have no bridge that reads words; draw another heat map, or load others")
    scale = SIDE / max(result.image.size)
    image = result.image.resize([max(1, round(scale * side)) for side in result.image.size])
    patch = result.letterbox.size / len(result.token_map)  # pixels of the square
    edges = []
    for patches, window, length in zip(result.patches, result.letterbox.window, (image.height, image.width)):
        places = np.arange(patches.start, patches.stop + 1) * patch - window.start
        edges.append(np.clip(places * length / (window.stop - window.start), 0, length).round().astype(int).tolist())
    return image, *edges


def _sheet(tiles, captions, columns, said, keys):
    """The tiles, what they show in words, and the keys beside each other, in as many rows as they take."""
    sheet = draw.contact_sheet(tiles, captions, columns, SIDE)
    gap = SIDE // 20  # as the sheet's
    width = sheet.width - 2 * gap
    rows = [[]]
    for key in keys:
        if rows[-1] and sum(other.width + gap for other in rows[-1]) + key.width > width:
            rows.append([])
        rows[-1].append(key)
    images = [draw.key_row(clean_text(said, 500), SIZE, width)]
    for row in rows:
        images.append(Image.new("RGB", (width, max(key.height for key in row)), draw.PAPER))
        for i, key in enumerate(row):
            images[-1].paste(key, (sum(other.width + gap for other in row[:i]), 0))
    return draw.with_rows(sheet, images, gap)
