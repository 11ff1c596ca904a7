"""Masks against ones worked out on paper: polygons by pixel centres, run lengths plain and in COCO's string."""

import json

import numpy as np
import pytest

from hivg.data.masks import mask_of, polygon_mask, rle_mask, run_lengths_of


def assert_same(mask, text):
    """text: "#.. .#." for a mask of 2 x 3."""
    assert mask.dtype == bool
    assert ["".join(np.where(row, "#", ".")) for row in mask] == text.split()


SQUARE = [1, 1, 4, 1, 4, 4, 1, 4]
RING = [0, 0, 5, 0, 5, 5, 0, 5, 0, 0]  # with a corner again at its end, to continue from


@pytest.mark.parametrize("polygons, expected", [
    ([[1, 1, 4, 1, 4, 3, 1, 3]], "...... .###.. .###.. ...... ......"),
    ([[1, 3, 4, 3, 4, 1, 1, 1]], "...... .###.. .###.. ...... ......"),  # the other way round
    ([[0.5, 0.5, 2.5, 0.5, 2.5, 2.5, 0.5, 2.5]], "##.... ##.... ...... ...... ......"),  # left and upper edge inside
    ([[0, 0, 4, 0, 0, 4]], "###... ##.... #..... ...... ......"),  # x + y < 4; centres on the line are not
    ([[3, 0, 6, 2.5, 3, 5, 0, 2.5]], "..##.. .####. ###### .####. ..##.."),
    ([[2.1, 1.1, 2.4, 1.1, 2.4, 1.4, 2.1, 1.4]], "...... ...... ...... ...... ......"),  # between centres
    ([[*RING, *SQUARE, 1, 1]], "#####. #...#. #...#. #...#. #####."),  # a hole, covered twice
    ([RING, SQUARE], "#####. #####. #####. #####. #####."),  # two polygons: no hole
    ([[-9, -9, 2, -9, 2, 99, -9, 99]], "##.... ##.... ##.... ##.... ##...."),  # out of the image
    ([[4, -9, 1e12, -9, 1e12, 2, 4, 2]], "....## ....## ...... ...... ......"),
    ([[7, 0, 9, 0, 9, 5], [-3, 0, -1, 0, -1, 5], [0, -3, 6, -3, 6, -1]], "...... ...... ...... ...... ......"),
    ([[0, 0, 6, 5], [3, 3], [], np.array(SQUARE)], "...... .###.. .###.. .###.. ......"),  # no area
    ([], "...... ...... ...... ...... ......"),
])
def test_polygons_on_paper(polygons, expected):
    assert_same(polygon_mask(polygons, 5, 6), expected)


@pytest.mark.parametrize("seed", range(5))
def test_polygons_by_another_ray(seed):
    """A random polygon that crosses itself, against rays that go up from each centre instead of left, edge by edge."""
    corners = np.random.default_rng(seed).uniform(-5, 40, (12, 2))
    x, y = np.meshgrid(np.arange(37) + 0.5, np.arange(31) + 0.5)
    inside = np.zeros((31, 37), dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, 1, axis=0)):
        inside ^= ((ax <= x) != (bx <= x)) & (ay + (x - ax) / (bx - ax) * (by - ay) < y)
    assert 0.1 < inside.mean() < 0.9
    assert (polygon_mask([corners.ravel().tolist()], 31, 37) == inside).all()


@pytest.mark.parametrize("polygon", [[0, 0, 1, 0, 1], [[0, 0], [1, 0], [1, 1]], [0, 0, 1, 0, np.nan, 1], ["a", "b"], 3,
                                     "12", None, {"x": 1}, [[0, 0], [1]]])
def test_other_things_are_no_polygon(polygon):
    with pytest.raises(ValueError, match="^a polygon is a flat list of numbers .*, not .*$"):
        polygon_mask([SQUARE, polygon], 5, 6)


@pytest.mark.parametrize("counts, expected", [  # down the columns, starting with zeros
    ([1, 2, 3], ".#. #.."), ([0, 1, 5], "#.. ..."), ([0, 6], "### ###"), ([6], "... ..."),
    ((np.int64(3), 1, 0, 2), "..# .##"),  # a run of no pixels
    ("123", ".#. #.."), (b"123", ".#. #.."),
])
def test_run_lengths_on_paper(counts, expected):
    assert_same(rle_mask({"size": [2, 3], "counts": counts}), expected)


@pytest.mark.parametrize("text, counts", [
    # The fourth count on is a difference: 4 = 2 + 2, 2 = 3 - 1. -1 is 11111, its sign bit set: chr(48 + 31) = "O".
    ("1232O", [1, 2, 3, 4, 2]),
    # 100 = 3 * 32 + 4: "T" = 48 + 32 (more follows) + 4, then "3". 16 = 10000 would be read as negative, so another
    # character follows it: "`" = 48 + 32 + 16, "0". 84 = 2 * 32 + 20: "d" = 48 + 32 + 20, "2".
    ("T3`0d2", [100, 16, 84]),
    # 40 = 32 + 8: "X1". 2 - 40 = -38 = -2 * 32 + 26: "j" = 48 + 32 + 26, and -2 is 11110: "N". 13 - 5 = 8.
    ("X1X15jN8", [40, 40, 5, 2, 13]),
])
def test_compressed_run_lengths_on_paper(text, counts):
    size = [2, sum(counts) // 2]
    mask = rle_mask({"size": size, "counts": text})
    assert (mask == rle_mask({"size": size, "counts": counts})).all()
    assert (mask.T.ravel() == np.repeat(np.arange(len(counts)) % 2 == 1, counts)).all()


@pytest.mark.parametrize("counts, message", [
    ([1, 2, 4], "add up to 7, its size is 2 x 3 = 6"), ("", "add up to 0"), ([4, -1, 3], "negative count, -1"),
    ("4O3", "negative count, -1"), ([1.0, 2.0, 3.0], "a list of ints or a string"),
    (None, "a list of ints or a string, not None"), ("12T", "ends within a count"), ("12 3", "damaged"),
    ("12é3", "damaged"), ("o" * 40, "damaged"), ("1" * 9999, "add up to"),
])
def test_damaged_run_lengths(counts, message):
    with pytest.raises(ValueError, match=message) as error:
        rle_mask({"size": [2, 3], "counts": counts})
    assert len(str(error.value)) < 150 and "\n" not in str(error.value)


@pytest.mark.parametrize("rle", [{}, {"counts": [6]}, {"size": [2], "counts": [6]}, {"size": 6, "counts": [6]},
                                 {"size": ["2", "3"], "counts": [6]}, {"size": [-2, -3], "counts": [6]}, [2, 3], None])
def test_run_lengths_without_their_size(rle):
    with pytest.raises(ValueError, match="a run-length mask is"):
        rle_mask(rle)


def test_mask_of():
    for empty in (None, [], (), {}):
        assert mask_of(empty, 2, 3) is None
    assert_same(mask_of([[0, 0, 1, 0, 1, 2, 0, 2]], 2, 3), "#.. #..")
    assert_same(mask_of({"size": [2, 3], "counts": "123"}, 2, 3), ".#. #..")
    assert_same(mask_of([[0, 0, 1, 0, 1, 1, 0, 1], {"size": [2, 3], "counts": "123"}], 2, 3), "##. #..")
    with pytest.raises(ValueError, match="a run-length mask of 2 x 3 for an image of 3 x 2"):
        mask_of({"size": [2, 3], "counts": "123"}, 3, 2)
    for odd in ("mask.png", 7, np.zeros((2, 3))):
        with pytest.raises(ValueError, match="a segmentation is a list of polygons or a dictionary of run lengths"):
            mask_of(odd, 2, 3)
    with pytest.raises(ValueError, match="a polygon is a flat list"):
        mask_of([0, 0, 1, 0, 1, 2], 2, 3)  # a polygon, not a list of them


def test_to_run_lengths_and_back():
    """Empty and full masks, odd sizes, noise."""
    rng = np.random.default_rng(0)
    for share in (0, 0.02, 0.5, 0.98, 1):
        for height, width in ((1, 1), (1, 70), (70, 1), (37, 53), (300, 200)):
            mask = rng.random((height, width)) < share
            rle = run_lengths_of(mask)
            assert rle["size"] == [height, width] and json.loads(json.dumps(rle)) == rle
            np.testing.assert_array_equal(rle_mask(rle), mask)


def test_run_lengths_as_pycocotools_has_them():
    """Its `encode` gave these strings."""
    mask = np.zeros((100, 90), dtype=bool)
    mask[10:70, 5:9] = True
    mask[20:40, 7:] = False
    mask[99, 89] = True
    assert run_lengths_of(mask)["counts"] == "n?l1X100^N\\Od0d0\\O\\Od0]m7SO"
    assert run_lengths_of(np.ones((2000, 3000), dtype=bool))["counts"] == "0P\\Sg5"
