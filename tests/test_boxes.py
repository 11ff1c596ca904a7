"""Boxes: formats, IoU, GIoU and shares of cells against numbers worked out on paper."""

import pytest
import torch
from makers import assert_close, random_boxes, to_cxcywh

from hivg.boxes import area, cxcywh_to_xyxy, giou, iou, share_of_cells


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_formats():
    """A box that is not square: 30 wide, 10 high, its corner at (20, 40)."""
    xyxy = tensor([20, 40, 50, 50])
    assert torch.equal(cxcywh_to_xyxy(tensor([35, 45, 30, 10])), xyxy)
    assert area(xyxy).tolist() == [300]
    assert area(tensor([50, 40, 20, 50], [20, 50, 50, 40])).tolist() == [0, 0]  # corners swapped
    boxes = random_boxes(60).view(3, 20, 4)
    assert_close("there and back", cxcywh_to_xyxy(to_cxcywh(boxes)), boxes, 1e-12)


@pytest.mark.parametrize("a, b, expected_iou, expected_giou", [
    ([0, 0, 4, 2], [0, 0, 4, 2], 1, 1),  # the same
    ([0, 0, 4, 2], [2, 1, 6, 3], 2 / 14, 2 / 14 - 4 / 18),  # a corner: meet in 2 x 1, hull 6 x 3
    ([0, 0, 4, 2], [1, 0, 2, 2], 2 / 8, 2 / 8),  # one inside the other: the hull is the larger
    ([0, 0, 1, 1], [3, 0, 4, 1], 0, -2 / 4),  # side by side, a gap of 2: hull 4 x 1, covered 2
    ([0, 0, 1, 1], [2, 3, 4, 4], 0, -13 / 16),  # apart in both: hull 4 x 4, covered 1 + 2
    ([0, 0, 2, 3], [2, 0, 4, 3], 0, 0),  # they touch
    ([1, 1, 1, 1], [1, 1, 1, 1], 0, 0),  # both empty
    ([0, 0, 0, 0], [2, 1, 2, 1], 0, -1),  # both empty, apart
])
def test_iou_and_giou_on_paper(a, b, expected_iou, expected_giou):
    for one, other in ((a, b), (b, a)):
        one, other = tensor(one), tensor(other)
        assert_close("iou", iou(one, other), tensor(expected_iou), 1e-12)
        assert_close("giou", giou(one, other), tensor(expected_giou), 1e-12)
        assert_close("giou of larger boxes", giou(700 * one, 700 * other), tensor(expected_giou), 1e-12)


def test_iou_counts_pixels():
    boxes = [[x0, y0, x1, y1] for x0, y0, x1, y1 in [(0, 0, 5, 3), (2, 1, 9, 8), (4, 2, 6, 9), (7, 0, 8, 1)]]

    def pixels(box):
        return {(x, y) for x in range(box[0], box[2]) for y in range(box[1], box[3])}

    for a in boxes:
        for b in boxes:
            expected = len(pixels(a) & pixels(b)) / len(pixels(a) | pixels(b))
            assert iou(tensor(a), tensor(b)).item() == pytest.approx(expected, abs=1e-12)


def test_giou_is_in_range_and_never_above_iou():
    a, b = random_boxes(500), random_boxes(500, seed=1)
    g, i = giou(a, b), iou(a, b)
    assert (g >= -1).all() and (g <= i + 1e-12).all() and (i <= 1).all() and (g < 0).any()
    assert_close("one row at a time", torch.stack([giou(x, y) for x, y in zip(a[:9], b[:9])]), g[:9], 0)


@pytest.mark.parametrize("low, high, n, shares", [
    (0.0, 1.0, 3, [1, 1, 1]),
    (0.25, 0.75, 4, [0, 1, 1, 0]),
    (0.125, 0.625, 4, [0.5, 1, 0.5, 0]),
    (0.3, 0.4, 2, [0.2, 0]),  # inside one cell
    (-0.5, 0.5, 2, [1, 0]),  # what lies outside counts nowhere
    (0.9, 0.1, 2, [0, 0]),  # swapped
])
def test_share_of_cells(low, high, n, shares):
    ours = share_of_cells(tensor(low, 0.0), tensor(high, 1.0), n)
    assert_close("shares", ours, torch.stack([tensor(*shares), tensor(*[1] * n)]), 1e-6)
