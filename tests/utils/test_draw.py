"""The inside of a box stays visible when boxes and labels are drawn, and odd input is drawn or explained."""

import time

import numpy as np
import pytest
from makers import calls_of
from PIL import Image, ImageColor

from hivg.utils import draw
from hivg.utils.draw import (
    COLOURS,
    PAPER,
    TILE,
    colour_of,
    contact_sheet,
    draw_boxes,
    heat_range_of,
    overlay_heatmap,
    overlay_mask,
)
from hivg.utils.fonts import drawable, font_for, fonts_of_size, text_block, text_lines

WORDS = "the giraffe left of the fence zebra man in a red shirt umbrella second person from right".split()
BOX = [200, 150, 400, 350]


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def plain(width, height, colour="white"):
    return Image.new("RGB", (width, height), colour)


def where(image, colour):
    """(rows, columns) of the pixels of a colour."""
    return np.nonzero((np.asarray(image) == colour).all(axis=2))


def random_boxes(rng, n, width, height):
    corners = rng.uniform(0, 1, (n, 2, 2)) * [width, height]
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)


def inside(boxes, width, height, inset=0.0):
    """(H, W) bool: pixels inside any box; sides within `inset` of the image's border are moved in by it."""
    mask = np.zeros((height, width), dtype=bool)
    for x0, y0, x1, y1 in boxes:
        x0 += inset if x0 < inset else 0
        y0 += inset if y0 < inset else 0
        x1 -= inset if width - x1 < inset else 0
        y1 -= inset if height - y1 < inset else 0
        rows = slice(max(0, int(np.floor(y0))), max(0, int(np.ceil(y1))))
        columns = slice(max(0, int(np.floor(x0))), max(0, int(np.ceil(x1))))
        mask[rows, columns] = True
    return mask


def contrast(a, b):
    """WCAG's contrast ratio of colours (..., 3) in 0..255, from 1 to 21."""
    light = [np.where(np.array(c) <= 10, np.array(c) / 3295, ((np.array(c) / 255 + 0.055) / 1.055) ** 2.4)
             @ [0.2126, 0.7152, 0.0722] + 0.05 for c in (a, b)]
    return np.maximum(*light) / np.minimum(*light)


@pytest.fixture
def said(monkeypatch):
    """[(text, size, ...)] of what is written from now on."""
    return calls_of(monkeypatch, draw, "text_block")


SIZES = [*np.random.default_rng(1).integers(50, 400, (40, 2)).tolist(),
         (50, 50), (50, 700), (700, 50), (1333, 800), (5000, 60)]


# --- boxes and labels ---


@pytest.mark.parametrize("width, height", SIZES)
def test_nothing_is_drawn_inside_a_box(width, height):
    rng = np.random.default_rng(width * height)
    before = noise(width, height)
    box = random_boxes(rng, 1, width, height)
    label = " ".join(rng.choice(WORDS, rng.integers(1, 12)))
    after = np.asarray(draw_boxes(before, box, [label]))
    assert after.shape[0] >= height and after.shape[1] >= width
    changed = (after[:height, :width] != np.asarray(before)).any(axis=2)
    assert changed.any()
    widest = 3 + np.sqrt(width * height) / 100  # of a line with its halo
    assert not changed[inside(box, width, height, inset=widest)].any()


@pytest.mark.parametrize("width, height", SIZES)
def test_labels_cover_no_inside_and_not_each_other(width, height):
    rng = np.random.default_rng(width + height)
    boxes = random_boxes(rng, 4, width, height)
    boxes[:, 2:] = boxes[:, :2] + (boxes[:, 2:] - boxes[:, :2]) / 2  # smaller, so that there is room for some labels
    labels = [" ".join(rng.choice(WORDS, 4)) for _ in boxes]
    image = noise(width, height)
    lines = np.asarray(draw_boxes(image, boxes))
    assert lines.shape == (height, width, 3)
    before = lines
    covered = np.zeros((height, width), dtype=bool)
    for n in range(1, 5):  # one label more each time; those before it stay where they are
        drawn = np.asarray(draw_boxes(image, boxes, labels[:n] + [None] * (4 - n)))[:height, :width]
        added = (drawn != before).any(axis=2)
        assert not (added & inside(boxes, width, height)).any()
        assert not (added & covered).any()
        covered |= added
        before = drawn


def test_a_large_image():
    image = noise(100, 75).resize((5000, 3750), Image.Resampling.NEAREST)
    before = np.asarray(image)
    after = np.asarray(draw_boxes(image, [[1000.5, 800, 3200, 3000]], ["the giraffe left of the fence"]))
    assert after.shape == before.shape  # there is room for the label
    rows, columns = np.nonzero((after != before).any(axis=2))
    assert not (after != before)[800:3000, 1000:3200].any()
    assert 300 < rows.min() and rows.max() < 3100 and 900 < columns.min() and columns.max() < 3300


def test_label_touches_its_box_and_has_its_colour():
    image = plain(640, 480)
    lines = np.asarray(draw_boxes(image, [BOX]))
    drawn = np.asarray(draw_boxes(image, [BOX], ["zebra"]))
    rows, columns = np.nonzero((lines != drawn).any(axis=2))
    assert rows.max() < 150 <= rows.max() + 8 and abs(columns.min() - 200) < 8
    tag = drawn[rows.min():rows.max() - 2, columns.min():columns.max()]
    assert len(where(tag, colour_of(0))[0]) > tag.size / 3 / 2


@pytest.mark.parametrize("colour, text", [("#f0e442", (0, 0, 0)), ("#0072b2", (255, 255, 255)), ("white", (0, 0, 0))])
def test_text_stands_out_from_its_label(colour, text):
    drawn = draw_boxes(plain(640, 480, "grey"), [BOX], ["zebra"], colours=[ImageColor.getrgb(colour)])
    assert len(where(drawn.crop((203, 120, 240, 145)), text)[0]) > 20


@pytest.mark.parametrize("box", [[0, 0, 640, 480], [-50, -50, 700, 500]])
def test_without_room_the_label_goes_below_the_image(box):
    image = noise(640, 480)
    before = np.asarray(image)
    drawn = draw_boxes(image, [box], ["the whole room"])
    assert drawn.width == 640 and 480 < drawn.height < 560
    after = np.asarray(drawn)[:480]
    strip = np.asarray(drawn)[480:]
    assert (after[10:-10, 10:-10] == before[10:-10, 10:-10]).all()
    assert (strip == colour_of(0)).all(axis=2).any() and (strip.max(axis=2) < 60).any()  # key and text


def test_a_label_that_would_hide_a_sixth_of_the_image_goes_below():
    assert draw_boxes(plain(120, 120), [[0, 0, 30, 30]], ["the giraffe left of the fence"]).height > 120
    assert draw_boxes(plain(300, 300), [[0, 0, 30, 30]], ["the giraffe left of the fence"]).size == (300, 300)


def test_the_key_of_a_narrow_image_has_room_for_its_text():
    drawn = np.asarray(draw_boxes(plain(12, 700, "black"), [[0, 0, 12, 700]], ["umbrella " * 5]))
    strip = drawn[700:]
    assert drawn.shape[1] > 100 and (strip.max(axis=2) < 60).any()  # text
    assert (strip[:, -4:] == PAPER).all()


def test_a_box_beyond_the_image_leaves_a_mark_at_its_border():
    drawn = draw_boxes(plain(100, 80, "black"), [[200, 30, 300, 50]], colours=[(255, 0, 0)])
    rows, columns = where(drawn, (255, 0, 0))
    assert rows.size and columns.min() >= 95 and rows.min() >= 20 and rows.max() < 60


def test_boxes_have_distinct_colours():
    boxes = [[10 + 70 * i, 50, 60 + 70 * i, 100] for i in range(len(COLOURS))]
    colours = {c for _, c in draw_boxes(plain(640, 200, "black"), boxes).getcolors(1000)}
    assert {colour_of(i) for i in range(len(COLOURS))} <= colours
    assert len({colour_of(i) for i in range(3 * len(COLOURS))}) == 3 * len(COLOURS)
    assert where(draw_boxes(plain(99, 99), [[9, 9, 50, 50]], colours=[(1, 2, 3)]), (1, 2, 3))[0].size


# a label's colour, on the image's own or on the two that a photograph has most of
@pytest.mark.parametrize("background", ["black", "white", "#808080", "own"])
@pytest.mark.parametrize("score", [0.1, 0.9])
def test_boxes_and_labels_are_seen_on_any_colour(background, score):
    """Across each side of a box, and of its label, there is a pixel that contrasts with the image."""
    for i in range(3 * len(COLOURS)):
        image = plain(640, 480, colour_of(i) if background == "own" else background)
        drawn = np.asarray(draw_boxes(image, [BOX], ["zebra"], [colour_of(i)], scores=[score])).astype(float)
        seen = contrast(drawn, np.asarray(image).astype(float)) >= 3
        x, y = 300, 250  # lines from the middle of the box to its four sides
        for line in (seen[140:150, x], seen[350:360, x], seen[y, 190:200], seen[y, 400:410]):
            assert line.any()
        assert seen[120:145, 195:210].any() and seen[118:126, 220].any()  # the label's left side and its top


def test_doubtful_boxes_are_dashed():
    """By the score that is asked for; their corners are whole."""
    def gaps(score, **options):
        drawn = np.asarray(draw_boxes(plain(640, 480, "grey"), [BOX], scores=[score], **options))
        own = (drawn == colour_of(0)).all(2)
        assert own[148, 197:204].all() and own[352, 397:402].all()  # corners
        return [(np.diff(side.astype(int)) == 1).sum() for side in (own[148, 198:402], own[148:352, 198])]

    assert gaps(0.5) == gaps(None) == [0, 0] == gaps(0.2, doubtful=0.2)
    assert min(gaps(0.49)) > 2 and gaps(0.49) == gaps(0.0) == gaps(0.7, doubtful=0.9)


def test_scores_are_printed(said):
    draw_boxes(plain(640, 480), [BOX, [9, 9, 99, 99], [450, 9, 500, 99]], ["zebra", None, "dog"],
               scores=[0.934, 0.125, None])
    assert {"zebra 0.93", "0.12", "dog"} <= {text for text, *_ in said}


@pytest.mark.parametrize("size", [(1, 1), (4000, 8), (8, 4000), (2, 3), (50, 50)])
@pytest.mark.parametrize("label", ["", "dog", "犬が左にいる" * 50, "word " * 400, "x" * 5000, None,
                                   "a\n\tb\ud800\u202e🦒\0é"])
def test_odd_sizes_and_labels(size, label):
    w, h = size
    for box in ([0, 0, w, h], [w / 4, h / 4, w / 4, h / 4], [-9, -9, -5, -5], [1e30, 1e30, 1e30, 1e30]):
        image = draw_boxes(plain(w, h), [box], [label])
        assert image.mode == "RGB" and image.width >= w and image.height >= h
        assert image.width <= max(w, 400) and image.height <= h + 600


def test_many_long_labels():
    boxes = random_boxes(np.random.default_rng(0), 30, 640, 480)
    image = draw_boxes(noise(640, 480), boxes, ["word " * 400] * 30)
    assert image.width == 640 and image.height < 480 + 30 * 200


def test_arguments_are_left_alone_and_may_be_lists():
    image = Image.new("L", (60, 60))
    boxes = np.array([[5, 5, 20, 20]])
    draw_boxes(image, boxes, ["a"])
    assert not np.asarray(image).any() and boxes.tolist() == [[5, 5, 20, 20]]
    assert draw_boxes(image, [], []).size == (60, 60)
    assert draw_boxes(image, boxes, mask=np.ones((2, 2), dtype=bool)).size == (60, 60)
    with_bar = draw_boxes(image, boxes, heatmap=np.ones((3, 3)))
    assert with_bar.height > 60 and with_bar.crop((0, 0, 60, 60)) == draw_boxes(image, boxes)  # a flat map is not seen


@pytest.mark.parametrize("arguments, message", [
    (dict(boxes=[1, 2, 3, 4]), "shape"), (dict(boxes=[[1, 2, 3]]), "shape"),
    (dict(boxes=[[9, 0, 3, 4]]), "xmin"), (dict(boxes=[[0, 0, float("nan"), 4]]), "finite"),
    (dict(boxes=[[0, 0, 3, 4]], labels=["a", "b"]), "labels"), (dict(boxes=[[0, 0, 3, 4]], labels="a"), "labels"),
    (dict(boxes=[[0, 0, 3, 4]], colours=[]), "colours"), (dict(boxes=[[0, 0, 3, 4]], colours="red"), "colours"),
    (dict(boxes=[[0, 0, 3, 4]], scores=0.5), "scores"), (dict(boxes=[[0, 0, 3, 4]], scores=[]), "scores"),
    *((dict(boxes=[], heatmap=np.eye(2), heat_range=bad), "heat_range") for bad in (
        (1, 0), (0, float("nan")), (0, float("inf")), (0, 1, 2), 3)),
])
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_boxes(plain(10, 10), **arguments)


# --- text ---


def test_lines_of_a_label_are_even():
    font = fonts_of_size(20)[0]
    width = font.getlength("word word word word word word")
    assert text_lines(" ".join(["word"] * 7), font, width) == ["word word word word", "word word word"]
    assert len(text_lines(" ".join(["word"] * 6), font, width)) == 1
    assert text_lines("giraffe a", font, font.getlength("giraffe") + 2) == ["giraffe", "a"]  # no word is broken


def test_lines_fit_and_lose_nothing():
    rng = np.random.default_rng(0)
    font = fonts_of_size(20)[0]
    for _ in range(30):
        text = " ".join("x" * n for n in rng.integers(1, 30, rng.integers(1, 12)))
        width = rng.integers(20, 400)
        lines = text_lines(text, font, width)
        assert max(map(font.getlength, lines)) <= width and "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_text_is_drawn_at_twice_its_size():
    """And reduced: as wide as without hinting, and with many greys."""
    block = text_block("illicit hill", 12)
    assert abs(block.width - fonts_of_size(480)[0].getlength("illicit hill") / 40) < 3
    assert len(block.getcolors()) > 30


def test_the_font_that_has_the_characters(monkeypatch):
    monkeypatch.setattr("hivg.utils.fonts.fonts_of_size", lambda size: ["Latin", "all"])
    monkeypatch.setattr("hivg.utils.fonts._lacks", lambda which, character: which == 0 and character > "z")
    assert [font_for(text, 12) for text in ("dog", "a 犬", "犬")] == ["Latin", "all", "all"]


@pytest.mark.skipif(len(fonts_of_size(16)) == 1, reason="no font is installed here, and Pillow's own has no é")
def test_what_an_installed_font_has_is_drawn():
    assert drawable("left of the star, é?") == "left of the star, é?"


def test_what_no_font_has_is_a_question_mark():
    missing = "\U0010ffff"  # in no font
    assert drawable("left of the star?") == "left of the star?"
    assert drawable(f"{missing * 2} [red] {missing}") == "? [red] ?"
    assert drawable(f"{missing}, {missing}") == "?" and drawable(missing, "#2") == "#2"
    assert text_block(f"the {missing}", 20, 900) == text_block("the ?", 20)
    assert drawable("") == "" and drawable("!", "#1") == "!"


# --- heat maps and masks ---


def test_heatmap():
    white = plain(40, 20)
    ramp = np.asarray(overlay_heatmap(white, np.linspace(-5, 900, 8)[None])).astype(int)
    assert ramp.shape == (20, 40, 3)
    assert ramp[10, 36, 0] > ramp[10, 36, 2] and ramp[10, 8, 2] > ramp[10, 8, 1]  # yellow high, violet low
    black = np.asarray(overlay_heatmap(plain(40, 20, "black"), np.arange(64).reshape(1, 64)))
    assert (np.diff(black[10].astype(float) @ [0.21, 0.72, 0.07]) > -1).all()  # lightness rises all the way
    for odd in (np.zeros((14, 14)), np.full((3, 5), np.nan), [[np.nan, np.inf], [0, 1]], np.array([[7.0]]),
                np.ones((300, 2), dtype=bool)):
        assert overlay_heatmap(white, odd).size == (40, 20)
    holes = np.asarray(overlay_heatmap(white, [[np.nan, np.nan, 5, 5, 9, 9]]))[10]  # drawn as the lowest
    assert (holes[0] == 255).all() and (holes[-1] != 255).any()


@pytest.mark.parametrize("seed", range(5))
def test_the_colours_of_the_image_stay_where_a_heatmap_is_low(seed):
    """They are covered the more the higher it is."""
    image = noise(64, 64, seed)
    before = np.asarray(image)
    heatmap = np.random.default_rng(seed).normal(0, 100, (8, 8)).cumsum(0).repeat(8, 0).repeat(8, 1)
    drawn = np.asarray(overlay_heatmap(image, heatmap)).astype(int)
    assert (drawn == before)[heatmap == heatmap.min()].all()
    step = [np.abs(drawn - before)[near].mean() for near in (
        heatmap < np.quantile(heatmap, 0.2), heatmap > np.quantile(heatmap, 0.8))]
    assert step[0] < step[1]
    assert np.abs(drawn[heatmap == heatmap.max()] - (246, 239, 32)).mean() < 30  # the last colour, mostly


def test_heat_maps_of_one_range_can_be_compared():
    """What has the same value has the same colour; what is beyond the range that of its end."""
    weak, strong = np.array([[0.0, 0.2]]), np.array([[0.0, 0.2, 1.0]])
    heat_range = heat_range_of(weak, strong, [[np.nan, -np.inf]])
    assert heat_range == (0, 1)
    own, both, alone = (np.asarray(overlay_heatmap(plain(60, 20), heatmap, heat_range=given))[10]
                        for heatmap, given in ((weak, None), (strong, heat_range), (weak, heat_range)))
    assert np.abs(alone[-1] - both[30].astype(int)).max() <= 5 and (own[-1] == both[-1]).all()
    beyond = np.asarray(overlay_heatmap(plain(60, 20), [[-9, 9]], heat_range=heat_range))[10]
    assert (beyond[0] == 255).all() and (beyond[-1] == both[-1]).all()


@pytest.mark.parametrize("heatmap, heat_range, ends", [
    ([[0.031, 0.842]], None, ["0.03", "0.84"]), ([[0.031, 0.842]], (0, 1), ["0.0", "1.0"]),
    ([[-5, 900]], None, ["-5", "900"]), ([[2e-5, 3e-5]], None, ["0.000020", "0.000030"]),
    ([[7, 7]], None, ["7.00", "7.00"])], ids=str)
def test_the_bar_below_a_heat_map(said, heatmap, heat_range, ends):
    """Prints what its ends stand for, and the note what the map is of."""
    image = draw_boxes(plain(640, 480), [], heatmap=heatmap, heat_range=heat_range, note='map of "zebra"')
    assert [text for text, *_ in said] == ['map of "zebra"', *ends]
    assert image.width == 640 and 480 < image.height < 560
    strip = np.asarray(image)[480:].astype(int)
    assert (np.ptp(strip, 2) > 150).any()  # its yellow


def test_a_mask_dims_what_it_leaves_out():
    mask = np.zeros((20, 40), dtype=bool)
    mask[2:16, 20:] = True
    image = noise(400, 200)
    before = np.asarray(image)
    drawn = np.asarray(overlay_mask(image, mask)).astype(int)
    inside, outside = (slice(40, 140), slice(230, 400)), (slice(None), slice(0, 160))
    assert (drawn[inside] == before[inside]).all()
    assert np.abs(drawn[outside] - 0.4 * before[outside]).max() <= 1
    boxes = [[40, 40, 90, 90], [200, 40, 300, 90]]  # with boxes, its outline has the colour of the first
    drawn = draw_boxes(plain(400, 200), boxes, mask=mask)
    assert len(where(drawn.crop((310, 0, 400, 200)), colour_of(0))[0]) > 50


@pytest.mark.parametrize("colour", ["#ffffff", "#000000", "#808080", "#d55e00", "#0072b2"])
@pytest.mark.parametrize("size", [(60, 40), (900, 600)], ids=str)
def test_outline_of_a_mask_is_seen_on_any_colour(colour, size):
    """Whatever its own colour is, something in it contrasts with the image; away from it nothing is drawn."""
    mask = np.zeros((20, 30))
    mask[5:15, 10:] = 1  # up to the right border
    image = plain(*size, colour)
    scale = size[0] // 30
    for own in ("white", colour):
        drawn = np.asarray(overlay_mask(image, mask, ImageColor.getrgb(own))).astype(float)
        for across in (drawn[10 * scale], drawn[:, 20 * scale]):  # a line over the outline each
            for beside in (across[0], drawn[10 * scale, 18 * scale]):  # without the mask, and in it
                assert (contrast(across, beside) >= 2.9).any()
        assert (drawn[8 * scale : 12 * scale, 13 * scale :] == np.asarray(image)[0, 0]).all()
        assert np.abs(drawn[: 3 * scale] - 0.4 * np.asarray(image)[0, 0]).max() <= 1
    assert np.asarray(image).std(axis=(0, 1)).max() == 0  # the image given is unchanged


def test_masks_without_an_outline():
    for mask, share in ((np.zeros((4, 4)), 0.4), (np.ones((4, 4)), 1), (np.full((3, 5), np.nan), 0.4)):
        assert (np.asarray(overlay_mask(plain(50, 40, "red"), mask)) == (255 * share, 0, 0)).all()


def test_outline_of_an_image_of_many_pixels():
    """Traced at a bounded size."""
    start = time.process_time()
    overlay_mask(plain(4000, 3000), np.eye(64))
    assert time.process_time() - start < 5


# --- contact sheets ---


def test_contact_sheet():
    tiles = [noise(50, 50), plain(300, 20), Image.new("L", (1, 4000)), noise(7, 9), noise(30, 30)]
    sheet = contact_sheet(tiles, ["a", "word " * 100, "犬", "", None], columns=4, tile=300)
    assert 1200 < sheet.width < 1300 and sheet.height > 2 * 300
    for bad in (dict(tiles=[]), dict(tiles=tiles, captions=["a"])):
        with pytest.raises(ValueError):
            contact_sheet(**bad)


@pytest.mark.parametrize("colour", ["white", "black", PAPER], ids=str)
def test_tiles_are_large_enough_and_have_a_border(colour):
    """On any image, whatever smaller size is asked for."""
    sheet = np.asarray(contact_sheet([plain(300, 200, colour)] * 2, columns=1, tile=100)).astype(float)
    rows, columns = np.nonzero((contrast(sheet, np.array(PAPER, float)) > 3) & (contrast(sheet, np.zeros(3)) > 3))
    assert columns.max() - columns.min() == TILE - 1 >= 239
    for x in (columns.min(), columns.max()):
        assert (columns == x).sum() == 2 * 161  # the sides of both


def test_tiles_fit_into_their_cells_and_captions_below():
    red = plain(300, 20, "red")
    sheet = contact_sheet([red, red], columns=1, tile=300)
    rows, columns = where(sheet, (255, 0, 0))
    assert columns.max() - columns.min() == 297 and 30 <= (np.diff(np.unique(rows)) == 1).sum() <= 40
    told = np.asarray(contact_sheet([red, red], ["a caption"] * 2, columns=1, tile=300))
    text = (told.max(axis=2) < 60).any(axis=1)
    assert told.shape[0] > sheet.height + 20
    assert not text[:36].any() and text[36:70].any() and text[-40:].any()
