"""The bundled data set: its splits, its scenes, and images whose boxes and masks are those of the pixels."""

import dataclasses
import math
from itertools import islice

import numpy as np
import pytest
from listener import EXPRESSED, expressions, scenes

from hivg.data.drawn import scenes as shapes
from hivg.data.drawn.pairs import Pairs
from hivg.data.drawn.scenes import COLOURS, HELD_OUT, SHAPES, SIZES, Shapes, boxes_of, draw

# ---- splits


def test_items_depend_on_their_seed_and_index_alone():
    assert Shapes("train", seed=3).scene(5) == Shapes("train", seed=3).scene(5) != Shapes("train", seed=4).scene(5)
    assert Shapes("train").scene(2**40 - 1)
    with_caption, without = Shapes("compose")[5], Shapes("compose", captions=False)[5]
    assert with_caption.keys() - without.keys() == {"caption", "phrases", "attributes", "named"}
    for key, value in without.items():
        assert np.array_equal(value, with_caption[key]), key


def test_same_item_on_every_machine():
    """Change this only together with all published numbers on the data set."""
    assert [e.text for e in Shapes("test").scene(0)[1]] == [
        "orange heart that is filled and above the big black thing", "the black thing under the empty thing",
        "the hollow orange shape", "the orange hollow heart"]
    item = Shapes("train")[0]
    assert item["caption"] == (
        "a tiny filled triangle at the bottom left, a big filled triangle on the left, a big filled triangle at the "
        "bottom right and a medium hollow triangle at the top right")
    pair = Pairs(32)[0]
    assert pair["phrases"][:3] == ["a big brown heart", "a filled blue heart", "an orange star"]
    assert pair["captions"][0] == "a heart to the right of a star and a star"
    assert pair["expressions"][:3] == ["the second heart from right", "tiniest heart",
                                       "the star closest to the medium-sized heart"]
    assert item["image"].size == (240, 256)
    boxes = [[139, 22, 219, 95], [117, 119, 227, 215], [117, 119, 227, 215], [27, 176, 84, 228]]
    assert np.abs(item["boxes"] - boxes).max() <= 1


def test_splits_share_no_scene():
    seen = []
    for split in EXPRESSED:
        seen += [scene.objects for scene, _ in scenes(split)]
    assert len(set(seen)) == len(seen)


def pairs_of(scene):
    return {(o.colour, o.shape) for o in scene.objects}


def test_held_out_pairs_are_in_compose_only():
    assert len(HELD_OUT) == 6
    for split in EXPRESSED:
        pairs = set()
        for scene, _ in scenes(split):
            pairs |= pairs_of(scene)
        if split != "compose":
            assert not pairs & HELD_OUT, split
        if split == "train":
            assert len(pairs) == 64 - 6
            assert {c for c, _ in pairs} == set(COLOURS) and {s for _, s in pairs} == set(SHAPES)


def test_compose_means_and_names_a_held_out_pair():
    meant = set()
    for scene, expression in expressions("compose"):
        target = scene.objects[expression.target]
        words = expression.text.split()
        assert (target.colour, target.shape) in HELD_OUT, expression
        assert target.shape in words and ("violet" if "violet" in words else target.colour) in words, expression
        meant.add((target.colour, target.shape))
    assert meant == HELD_OUT


def test_lengths_and_bad_arguments():
    assert {split: 4 * len(Shapes(split)) for split in EXPRESSED[1:]} == {
        "val": 1000, "test": 5000, "testA": 2000, "testB": 2000, "compose": 2000, "count": 2000}
    assert len(Shapes("train")) >= 2**30
    with pytest.raises(ValueError, match="'dev'.*train, val, test, testA, testB, compose, count"):
        Shapes("dev")
    for index in (-1, 250):
        with pytest.raises(IndexError, match=str(index)):
            Shapes("val")[index]
    assert len(list(islice(Shapes("val"), 3))) == 3


# ---- scenes


def test_scenes_are_as_promised():
    objects = []
    aspects = []
    textures = set()
    for scene, _ in scenes("train"):
        assert max(scene.width, scene.height) == 1 and 0.499 <= scene.width / scene.height <= 2.001
        for o in scene.objects:
            ratio = o.diameter / math.sqrt(scene.width * scene.height) / SIZES[o.size]
            assert 0.95 <= ratio <= 1.05 and abs(o.rotation) <= 10
            assert 0 < o.x < scene.width and 0 < o.y < scene.height
        objects += scene.objects
        aspects.append(scene.width / scene.height)
        textures.add(scene.background.texture)
    assert min(aspects) < 0.6 and max(aspects) > 1.7
    assert {len(scene.objects) for scene, _ in scenes("train")} == set(range(3, 9))
    assert textures == set(shapes.TEXTURES)
    for attribute, values in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES), ("filled", (True, False))):
        assert {getattr(o, attribute) for o in objects} == set(values)


def test_items():
    for index in range(40):
        item = Shapes("train")[index]
        width, height = item["image"].size
        assert item["image"].mode == "RGB" and max(width, height) == 256
        assert item["labels"].shape == (height, width) and item["labels"].dtype == np.uint8
        assert item["boxes"].shape == (4, 4) and item["boxes"].dtype == np.float32
        for target, (xmin, ymin, xmax, ymax) in zip(item["targets"], item["boxes"].astype(int)):
            mask = item["labels"] == target + 1
            inside = mask[ymin:ymax, xmin:xmax]
            assert inside.sum() == mask.sum() > 0  # nothing outside, and no slack
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
        _, spoken = Shapes("train").scene(index)
        assert item["expressions"] == [e.text for e in spoken] and item["targets"] == [e.target for e in spoken]
        assert item["kinds"] == [e.kind for e in spoken]


# ---- drawing


@pytest.mark.parametrize("split", ("train", "compose"))
def test_masks_are_the_pixels(split):
    """A pixel has an object's colour exactly where the labels say so; each object shows 75 % of itself or more."""
    for scene, _ in scenes(split)[:60]:
        image, labels = draw(scene)
        pixels = np.asarray(image)
        for name, colour in COLOURS.items():
            own = [i + 1 for i, o in enumerate(scene.objects) if o.colour == name]
            assert np.array_equal((pixels == colour).all(-1), np.isin(labels, own)), name
        for i, o in enumerate(scene.objects):
            alone = draw(dataclasses.replace(scene, objects=(o,)))[1] == 1
            visible = labels == i + 1
            assert not (visible & ~alone).any() and visible.sum() >= 0.75 * alone.sum()
            assert not (alone[0].any() or alone[-1].any() or alone[:, 0].any() or alone[:, -1].any())


def one_object(shape, filled=True, x=0.5, y=0.5, rotation=0.0):
    """A scene of it, large, on plain grey."""
    background = shapes.Background("plain", ((200, 200, 200), (210, 210, 210)), 0.1, 0.0, 0)
    return shapes.Scene(1.0, 1.0, background, (shapes.Object(shape, "red", "large", filled, x, y, 0.8, rotation),))


def test_outlined_shapes_have_a_hole_and_a_thick_border():
    for shape in SHAPES:
        outlined = (draw(one_object(shape, filled=False))[1] > 0).sum()
        filled = (draw(one_object(shape))[1] > 0).sum()
        assert 0.4 < outlined / filled < 0.85, shape


def halves(shape, rotation, axis):
    """A shape's pixels in the first half of its tight box over those in the second; axis 0: upper and lower half."""
    labels = draw(one_object(shape, rotation=rotation))[1]
    x0, y0, x1, y1 = boxes_of(labels, [0])[0].astype(int)
    mask = labels[y0:y1, x0:x1] > 0
    first, second = np.split(mask, [mask.shape[axis] // 2], axis=axis)
    return first.sum() / second.sum()


@pytest.mark.parametrize("shape", ["triangle", "arrow", "star", "heart"])
def test_shapes_stand_upright_and_turn_clockwise(shape):
    """Upright, the left half shows as much as the right one, and the upper half another share than the lower one."""
    assert halves(shape, 0, axis=1) == pytest.approx(1, abs=0.05)
    assert halves(shape, 90, axis=0) == pytest.approx(1, abs=0.05)
    upright = halves(shape, 0, axis=0)
    assert abs(upright - 1) > 0.1  # its top tells from its bottom
    assert halves(shape, 90, axis=1) == pytest.approx(1 / upright, rel=0.1)  # the top is now on the right


def test_objects_are_where_they_are_said_to_be():
    xmin, ymin, xmax, ymax = boxes_of(draw(one_object("circle", x=0.4, y=0.55))[1], [0])[0] / 256
    assert ((xmin + xmax) / 2, (ymin + ymax) / 2) == pytest.approx((0.4, 0.55), abs=0.005)
    assert xmax - xmin == pytest.approx(2 * 0.48 * 0.8, abs=0.01)


@pytest.mark.parametrize("texture", shapes.TEXTURES)
def test_backgrounds(texture):
    """Every texture has both of its colours, or a single one if plain, and stays within them."""
    first = (190, 200, 240)
    second = (210, 180, 250)
    scene = shapes.Scene(1.0, 0.5, shapes.Background(texture, (first, second), 0.1, 0.3, 5), ())
    pixels = np.asarray(draw(scene, 128)[0]).reshape(-1, 3)
    low = np.minimum(first, second)
    high = np.maximum(first, second)
    assert (pixels >= low - 1).all() and (pixels <= high).all()
    spread = pixels.max(0).astype(int) - pixels.min(0)
    assert (spread == 0).all() if texture == "plain" else (spread > 0.6 * (high - low)).all()


def test_checks_are_crossed_stripes():
    colours = ((190, 200, 240), (210, 180, 250))
    drawn = {}
    for texture in ("stripes", "checks"):
        scene = shapes.Scene(1.0, 1.0, shapes.Background(texture, colours, 0.125, 0.0, 0), ())
        drawn[texture] = np.asarray(draw(scene, 64)[0])
    assert (drawn["stripes"] == drawn["stripes"][:1]).all()  # upright
    assert (drawn["checks"][:8] == drawn["stripes"][:8]).all()
    assert (drawn["checks"][8:16] != drawn["checks"][:8]).any(-1).all()


@pytest.mark.parametrize("supersample", [3, 8])
def test_labels_lie_in_the_middle_whatever_the_supersampling(supersample):
    _, labels = draw(one_object("circle"), 64, supersample)
    rows, columns = np.nonzero(labels)
    assert (rows.mean() + 0.5, columns.mean() + 0.5) == pytest.approx((32, 32), abs=0.25)


def test_drawing_at_other_sizes():
    for scene, _ in scenes("val")[:20]:
        scene = dataclasses.replace(scene, objects=scene.objects[:1])  # one that nothing hides
        small = boxes_of(draw(scene, 256)[1], [0])
        large = boxes_of(draw(scene, 1024)[1], [0])
        assert np.abs(4 * small - large).max() <= 8  # two pixels of the small image
        image, labels = draw(scene, 256, supersample=3)
        assert image.size == labels.shape[::-1] == draw(scene, 256)[0].size
        assert np.abs(boxes_of(labels, [0]) - small).max() <= 2
