"""Pictures of what the patches read: the maps of a word, and the word that each patch reads most."""

from dataclasses import replace

import numpy as np
import pytest
from makers import calls_of
from PIL import Image

from hivg.data.transforms import Letterbox
from hivg.grounder import Result, Word
from hivg.utils import words
from hivg.utils.draw import colour_of
from hivg.utils.words import SIDE

SIZES = [(400, 400), (300, 200), (128, 200), (60, 640), (5, 5)]
TEXTS = ["The", "star", "left", "of", "the", "square"]


def make_result(size, side=8, blocks=(2, 6), texts=TEXTS, seed=0):
    """A Result on a white image, whose words have random shares."""
    letterbox = Letterbox(*size, 64)
    token_map = np.zeros((side, side), np.float32)
    result = Result(" ".join(texts), (0.0, 0.0, 1.0, 1.0), 0.9, Image.new("RGB", size, "white"), letterbox, token_map,
                    token_map)
    shape = token_map[result.patches].shape
    shares = np.random.default_rng(seed).dirichlet(np.ones(len(texts)), (len(blocks), *shape)).astype(np.float32)
    maps = [{block: of_block[..., i] for block, of_block in zip(blocks, shares)} for i in range(len(texts))]
    return replace(result, word_maps=[Word(text, bridges) for text, bridges in zip(texts, maps)])


@pytest.fixture
def tiles(monkeypatch):
    """[(tiles, captions, ...)] of the sheets that are drawn from now on."""
    return calls_of(monkeypatch, words.draw, "contact_sheet")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_maps_of_a_word_lie_on_their_patches(size, tiles, monkeypatch):
    """One patch that reads it all is all that is coloured."""
    monkeypatch.setattr(words.draw, "draw_boxes", lambda image, boxes: image)
    result = make_result(size)
    for row, column in np.ndindex(result.words[2].bridges[2].shape):
        for block, shares in result.words[2].bridges.items():
            shares[:] = 0
        shares[row, column] = 0.5
        tiles.clear()
        result.draw(words="left")
        (plain, image), captions, *_ = tiles[0]
        assert captions == ["bridge of block 2", "bridge of block 6"] and max(image.size) == SIDE
        assert (np.asarray(plain) == 255).all()
        rows, columns = np.nonzero((np.asarray(image) != 255).any(2))
        for found, inside, patches, at, length in zip((rows, columns), result.letterbox.window, result.patches,
                                                      (row, column), (image.height, image.width)):
            start, end = ((8 * (patches.start + at + n) - inside.start) / (inside.stop - inside.start) for n in (0, 1))
            assert found.min() == pytest.approx(max(0, start * length), abs=1)
            assert found.max() + 1 == pytest.approx(min(1, end) * length, abs=1)


def test_maps_of_a_word_share_their_colours(tiles, monkeypatch):
    """Bridge by bridge, and of a word that occurs twice, in whatever case."""
    ranges = []
    overlay = words.draw.overlay_heatmap
    monkeypatch.setattr(words.draw, "overlay_heatmap", lambda image, heat, heat_range=None: ranges.append(heat_range) or
                        overlay(image, heat, heat_range=heat_range))
    result = make_result((300, 200))
    result.draw(words="the")
    values = [shares for i in (0, 4) for shares in result.words[i].bridges.values()]
    low, high = min(map(np.min, values)), max(map(np.max, values))
    assert ranges[:4] == [(low, high)] * 4
    del ranges[:]
    result.draw(words="the", heat_range=(0, 0.5))
    assert ranges[:4] == [(0, 0.5)] * 4
    assert tiles[0][1] == ["bridge of block 2, word 1", "bridge of block 6, word 1", "bridge of block 2, word 5",
                           "bridge of block 6, word 5"]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("side", [4, 8, 16])
def test_the_word_that_each_patch_reads_most(size, side, tiles):
    """In its colour in the middle of a patch's left side, where no text is."""
    result = make_result(size, side)
    image = result.draw(heatmap="words")
    assert image.mode == "RGB" and len(tiles[0][0]) == 2
    colours = {text: np.array(colour_of(i)) for i, text in enumerate(["the", "star", "left", "of", "square"])}
    for tile, block in zip(tiles[0][0], (2, 6)):
        drawn = np.asarray(tile).astype(float)
        shares = np.stack([word.bridges[block] for word in result.words])
        (_, ys, xs) = words._picture(result)
        for (row, column), which in np.ndenumerate(shares.argmax(0)):
            if ys[row + 1] - ys[row] < 6 or xs[column + 1] - xs[column] < 6:
                continue  # hardly in the image
            tint = 255 - drawn[ys[row] + 1, xs[column] + 1]  # of white
            own = 255 - colours[TEXTS[which].lower()]
            assert tint @ own / np.linalg.norm(tint) / np.linalg.norm(own) > 0.99


@pytest.mark.parametrize("ask, message", [
    (dict(words="dog"), "'dog' is no word of the expression; choose one of: The, star, left, of, the, square$"),
    (dict(words=""), "'' is no word"), (dict(words=7), "7 is no word"),
    (dict(heatmap="words", mask=True), "two drawings"),
])
def test_what_cannot_be_drawn(ask, message):
    with pytest.raises(ValueError, match=message):
        make_result((30, 20)).draw(**ask)


@pytest.mark.parametrize("ask", [dict(words="star"), dict(heatmap="words")], ids=str)
def test_bridges_that_read_no_words(ask):
    with pytest.raises(ValueError, match="no bridge that reads words"):
        make_result((30, 20), blocks=()).draw(**ask)
    with pytest.raises(ValueError, match="attention=True"):
        replace(make_result((30, 20)), word_maps=None).draw(**ask)


def test_long_expressions_and_narrow_images():
    result = make_result((3, 900), 16, (1, 4, 8, 12), [f"word{i}" for i in range(60)] + ["x" * 500, "星"])
    for image in (result.draw(heatmap="words"), result.draw(words="word3"), result.draw(words="x" * 500)):
        assert 4 * 240 < image.width < 4 * 500 and image.height < 1500
