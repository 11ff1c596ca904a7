"""Boxes: formats, IoU, GIoU and the box on the patch grid against numbers worked out on paper."""

import math

import pytest
import torch
import torch.nn.functional as F
from makers import assert_close, random_boxes, tensor, to_cxcywh

from hivg.boxes import area, box_on_grid, cxcywh_to_xyxy, giou, iou


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


def test_giou_is_in_range_and_never_above_iou():
    a, b = random_boxes(500), random_boxes(500, seed=1)
    g, i = giou(a, b), iou(a, b)
    assert (g >= -1).all() and (g <= i + 1e-12).all() and (i <= 1).all() and (g < 0).any()
    assert_close("one row at a time", torch.stack([giou(x, y) for x, y in zip(a[:9], b[:9])]), g[:9], 0)


# --- the box on the grid ---


def drawn(boxes, grid, image_size):
    """Painted as whole pixels, from floor to ceil, then resized by nearest neighbour; its centre's patch set."""
    rows = []
    for box in boxes:
        (xmin, ymin), (xmax, ymax) = (cxcywh_to_xyxy(box) * image_size).view(2, 2).clamp(min=0).tolist()
        image = torch.zeros(1, 1, image_size, image_size)
        image[..., math.floor(ymin) : math.ceil(ymax), math.floor(xmin) : math.ceil(xmax)] = 1
        small = F.interpolate(image, grid, mode="nearest")[0, 0]
        small[min(int(box[1] * grid[0]), grid[0] - 1), min(int(box[0] * grid[1]), grid[1] - 1)] = 1
        rows.append(small.flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("grid, image_size", [((4, 4), 64), ((8, 8), 128), ((14, 14), 224), ((2, 5), 60), ((3, 7), 50)])
def test_box_on_grid(grid, image_size):
    boxes = to_cxcywh(random_boxes(300))
    boxes[::3, 2:] /= 20  # some much smaller than a patch
    boxes[:3] = tensor([0.5, 0.5, 1, 1], [1, 1, 1e-6, 1e-6], [0.9999, 0.0001, 1e-9, 1e-9])  # all; at the far edges
    target = box_on_grid(boxes, grid, image_size)
    assert target.shape == (300, grid[0] * grid[1])
    assert set(target.unique().tolist()) == {0.0, 1.0}
    assert_close("target", target, drawn(boxes, grid, image_size), 0)
