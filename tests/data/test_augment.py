"""Augmentation: whatever is drawn, image, box and mask move together, and the expression stays true.

In the images here each pixel's red says how far right and its green how far down it was before, so a pixel of the
square can be asked where it came from.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from makers import assert_close
from makers_data import extent, filled
from PIL import Image

from hivg.boxes import cxcywh_to_xyxy
from hivg.data.augment import CROP, Augment, crop_around, is_positional
from hivg.data.transforms import NORMALIZATION, Letterbox, normalise

SIZE = 96
PLACES = Augment(jitter_p=0)  # colours as they were
CROPS = Augment(jitter_p=0, crop_p=1)
IMAGES = [(250, 180), (97, 201), (64, 64), (40, 31), (256, 60)]  # shrunk and enlarged
FREE, POSITIONAL = "the dog", "the dog on the left"
SEEDS = range(30)


def coordinates(width, height):
    """The image that tells its places."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


def some_box(rng, width, height):
    """(4,) float32 xyxy, corners at whole pixels, at least a sixth of each side."""
    x0 = rng.integers(0, width * 5 // 6)
    y0 = rng.integers(0, height * 5 // 6)
    x1 = rng.integers(x0 + width // 6, width) + 1
    y1 = rng.integers(y0 + height // 6, height) + 1
    return torch.tensor([x0, y0, x1, y1], dtype=torch.float32)


def augmented(augment, seed, width, height, expression):
    """(a random box, the augmented image with it); checked for all that holds for any."""
    rng = np.random.default_rng([seed, width])
    box = some_box(rng, width, height)
    out = augment(rng, coordinates(width, height), box, filled(box, width, height), expression, SIZE)
    assert [(v.shape, v.dtype) for v in out.values()] == [
        ((3, SIZE, SIZE), torch.uint8), ((SIZE, SIZE), torch.bool), ((4,), torch.float32), ((SIZE, SIZE), torch.bool)]
    assert list(out) == ["pixels", "padding_mask", "box", "mask"]
    assert (out["box"] >= 0).all() and (out["box"] <= 1).all()
    return box, with_image(out)


def with_image(out):
    """What a batch makes of the pixels on the device."""
    return out | {"image": normalise(out["pixels"][None], out["padding_mask"][None])[0]}


def origins(out):
    """Where the pixels of the image are in the square, and where they were: (rows, columns, x, y), (n,) each; x, y of
    their centres, in pixels of the image."""
    mean, std = torch.tensor(NORMALIZATION["clip"])
    rows, columns = (~out["padding_mask"]).nonzero().T
    x, y, _ = ((out["image"][:, rows, columns].T * std + mean) * 255 + 0.5).T
    return rows, columns, x, y


def within(x, y, box, margin):
    """Which points are in a box made smaller by a margin on all sides: (n,) bool."""
    x0, y0, x1, y1 = box
    return (x >= x0 + margin) & (x < x1 - margin) & (y >= y0 + margin) & (y < y1 - margin)


@pytest.mark.parametrize("width, height", IMAGES)
@pytest.mark.parametrize("augment, expression", [(PLACES, POSITIONAL), (CROPS, FREE)], ids=["whole", "cropped"])
def test_image_box_and_mask_move_together(width, height, augment, expression):
    """The moved box holds the pixels that were in the box, and no others, give or take one at its edges."""
    for seed in SEEDS:
        box, out = augmented(augment, seed, width, height, expression)
        moved = cxcywh_to_xyxy(out["box"]) * SIZE
        rows, columns, x, y = origins(out)
        pixel = 1.1 * max((x.max() - x.min()) / (columns.max() - columns.min()),
                          (y.max() - y.min()) / (rows.max() - rows.min()), 1)  # of the square, in the image
        assert within(x, y, box, -pixel)[within(columns + 0.5, rows + 0.5, moved, 0)].all()
        assert within(columns + 0.5, rows + 0.5, moved, -1.1)[within(x, y, box, 0)].all()
        assert within(x, y, (box[:2] + box[2:]).repeat(2) / 2, -pixel).any()  # the centre is still there
        assert_close("mask's extent", extent(out["mask"]), moved, 1)
        assert not (out["mask"] & out["padding_mask"]).any()


@pytest.mark.parametrize("width, height", IMAGES)
def test_nothing_is_flipped_or_turned_and_padding_is_exactly_where_nothing_was_painted(width, height):
    """An image of 0 to 255 is nowhere zero once normalised; padding is, and the image is a rectangle."""
    for seed in SEEDS:
        _, out = augmented(CROPS, seed, width, height, FREE)
        rows, columns, x, y = origins(out)
        for other, was in ((rows, x), (columns, y)):
            for line in (other.min(), other.max()):
                steps = was[other == line].diff()
                assert (steps > -1e-3).all() and was[other == line][-1] > was[other == line][0]
        assert torch.equal((out["image"] == 0).all(0), out["padding_mask"])
        x0, y0, x1, y1 = extent(~out["padding_mask"]).int().tolist()
        assert (~out["padding_mask"]).sum() == (x1 - x0) * (y1 - y0)
        assert round(0.7 * SIZE) <= max(x1 - x0, y1 - y0) <= SIZE


@pytest.mark.parametrize("width, height", IMAGES)
def test_positional_expressions_are_not_cropped(width, height):
    """All of the image is there, and in its shape."""
    for seed in SEEDS:
        rows, columns, x, y = origins(augmented(CROPS, seed, width, height, POSITIONAL)[1])
        w = columns.max() - columns.min() + 1
        h = rows.max() - rows.min() + 1
        assert x.min() < width / w + 1 and x.max() > width - width / w - 1
        assert y.min() < height / h + 1 and y.max() > height - height / h - 1
        assert abs(w - width * max(w, h) / max(width, height)) <= 1
        assert abs(h - height * max(w, h) / max(width, height)) <= 1


def test_all_of_it_happens():
    """Sizes, places and crops differ over the seeds, over all of their range."""
    whole = torch.stack([extent(~augmented(PLACES, s, 250, 180, POSITIONAL)[1]["padding_mask"]) for s in range(100)])
    w = whole[:, 2] - whole[:, 0]
    h = whole[:, 3] - whole[:, 1]
    assert w.min() < 0.73 * SIZE and w.max() > 0.97 * SIZE
    for low, side in ((whole[:, 0], w), (whole[:, 1], h)):
        share = low[side < SIZE] / (SIZE - side[side < SIZE])
        assert share.min() < 0.1 and share.max() > 0.9 and 0.4 < share.mean() < 0.6
    seen = [origins(augmented(PLACES, s, 250, 180, FREE)[1])[2:] for s in range(100)]
    cropped = sum(x.max() - x.min() < 240 or y.max() - y.min() < 170 for x, y in seen)
    assert 30 < cropped < 70  # half of them


@pytest.mark.parametrize("width, height", [(640, 480), (33, 500), (7, 5), (2, 2), (1, 1), (4000, 8)])
def test_crops_keep_the_object(width, height):
    rng = np.random.default_rng(0)
    whole = 0
    for i in range(200):
        low, high = np.sort(rng.uniform(0, [width, height], (2, 2)), axis=0)
        if i % 4 == 0:
            low[0] = high[0]  # no area
        x0, y0, x1, y1 = crop_around(rng, [*low, *high], width, height)
        assert all(isinstance(v, int) for v in (x0, y0, x1, y1))
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        assert x1 - x0 >= CROP * width and y1 - y0 >= CROP * height
        centre = (low + high) / 2
        assert ([x0, y0] <= centre).all() and (centre <= [x1, y1]).all()
        kept = np.minimum(high, [x1, y1]) - np.maximum(low, [x0, y0])
        assert kept.prod() >= (high - low).prod() / 2
        whole += (x0, y0, x1, y1) == (0, 0, width, height)
    assert whole < 20 or min(width, height) < 10


@pytest.mark.parametrize("expression", """\
man on the left; LEFT; the rightmost dog; top; topleft corner; bottom shelf; middle one; mid; the cup in the center;
centre piece; central dish; first from the front; second giraffe; third; last person; 2nd car; 12th; upper shelf;
uppermost; lower bunk; the highest kite; lowest; the one above the sink; below the sign; at the edge; left-hand side;
other side; rt; guy on r; btm; row at the end; under the table; over the bed; donut at 3 o'clock; cut off; umbrella,
right; second""".replace("\n", " ").split("; "))
def test_positional(expression):
    assert is_positional(expression)


@pytest.mark.parametrize("expression", """\
the dog; bright red cup; a brighter one; copyright sign; man beside the car; stopped bus; laptop; desktop; wedge;
blast; plastic; sledge; centipede; upright; friend; bending; the clock; flower; slow; recover; weekend; secondhand;
hedge; smallest star; closest to the camera; 2 dogs; person in the background; between the cups; lefse
""".replace("\n", " ").split("; "))
def test_not_positional(expression):
    assert not is_positional(expression)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("augment", [Augment(), Augment(crop_p=1)])
def test_same_generator_same_bits(augment):
    image = noise(80, 60)
    box = [10, 5, 60, 50]
    mask = np.ones((60, 80), dtype=bool)
    first, second, other = [augment(np.random.default_rng(seed), image, box, mask, FREE, SIZE) for seed in (1, 1, 2)]
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("change", [{"jitter_p": 1}, {"jitter_p": 1, "jitter": 0}])
def test_colours_change_and_places_do_not(change):
    """Jitter of strength 0 is none."""
    image = noise(80, 60)
    box = torch.tensor([10.0, 5, 60, 50])
    mask = filled(box, 80, 60)
    other = dataclasses.replace(PLACES, **change)
    differences = []
    for seed in range(20):
        plain = with_image(PLACES(np.random.default_rng(seed), image, box, mask, FREE, SIZE))
        changed = with_image(other(np.random.default_rng(seed), image, box, mask, FREE, SIZE))
        assert all(torch.equal(plain[key], changed[key]) for key in ("padding_mask", "box", "mask"))
        assert not changed["image"][:, plain["padding_mask"]].any()
        differences.append((plain["image"] - changed["image"]).abs()[:, ~plain["padding_mask"]].mean())
    assert max(differences) < 1e-6 if change.get("jitter") == 0 else 0.1 < np.mean(differences) < 1


def test_how_often_colours_change():
    """On white, which contrast and saturation leave as it is: it darkens in half of the jitters."""
    white = Image.new("RGB", (8, 8), (255, 255, 255))
    rng = np.random.default_rng(0)
    augment = Augment()
    levels = np.array([np.asarray(augment.recolour(rng, white))[0, 0, 0] for _ in range(400)])
    assert 0.33 < (levels < 255).mean() < 0.47 and 153 <= levels.min() < 165  # 0.8 / 2; 0.6 * 255


def test_colours_change_in_any_order():
    results = set()
    for seed in range(30):  # the factors are always the same
        rng = SimpleNamespace(permutation=np.random.default_rng(seed).permutation, random=lambda: 0.5,
                              uniform=lambda low, high: high)
        results.add(Augment(jitter_p=1).recolour(rng, noise(8, 6)).tobytes())
    assert len(results) == 6


@pytest.mark.parametrize("width, height", [(1, 1), (4000, 8), (8, 4000), (2, 3), (500, 333)])
@pytest.mark.parametrize("expression", [FREE, POSITIONAL])
def test_odd_images_and_a_box_of_everything(width, height, expression):
    """Also a box that reaches out of the image; the moved box is the image, and without a mask there is none."""
    augment = Augment(crop_p=1)
    for seed in range(10):
        for box in ([0, 0, width, height], [-5.0, -1, width + 0.5, height * 2]):
            image = Image.new("RGB", (width, height), "red")
            out = augment(np.random.default_rng(seed), image, box, None, expression, SIZE)
            assert out["mask"] is None and out["pixels"][:, ~out["padding_mask"]].any()
            assert_close("box", cxcywh_to_xyxy(out["box"]) * SIZE, extent(~out["padding_mask"]), 1)


def test_all_off_is_the_letterbox():
    image = noise(201, 150)
    box = torch.tensor([10.5, 5, 60, 50])
    letterbox = Letterbox(201, 150, SIZE)
    mask = np.random.default_rng(1).random((150, 201)) > 0.5
    off = Augment(jitter=0, jitter_p=0, scale=(1, 1), crop_p=0, translate=False)
    out = off(np.random.default_rng(0), image, box, mask, FREE, SIZE)
    assert torch.equal(out["pixels"], letterbox.pixels(image))
    assert torch.equal(out["padding_mask"], letterbox.padding_mask())
    assert torch.equal(out["box"], letterbox.boxes_to_square(box)) and torch.equal(out["mask"], letterbox.mask(mask))


def test_a_mask_of_another_image():
    image = Image.new("RGB", (8, 6))
    mask = np.ones((8, 6), dtype=bool)
    with pytest.raises(ValueError, match="a mask of shape .* for an image of 6 x 8"):
        PLACES(np.random.default_rng(0), image, [0, 0, 1, 1], mask, FREE, SIZE)
