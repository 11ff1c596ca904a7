"""Boxes: the two formats, intersection over union, generalised IoU.

`xyxy` is (xmin, ymin, xmax, ymax) and `cxcywh` is (centre x, centre y, width, height); x runs right, y runs down.
The functions take any unit (pixels or 0..1) and any leading shape; the last axis holds the four coordinates.
"""

import torch


def cxcywh_to_xyxy(boxes):
    """(..., 4) cxcywh -> (..., 4) xyxy, same unit."""
    cx, cy, w, h = boxes.unbind(-1)  # (...) each
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)


def area(boxes):
    """(..., 4) xyxy -> (...) area; 0 for a box whose corners are swapped."""
    low, high = boxes.chunk(2, -1)  # (..., 2), the upper left and the lower right corner
    w, h = (high - low).clamp(min=0).unbind(-1)  # before the product: two negative sides would make a positive area
    return w * h  # not `prod`, whose backward counts the zeros and so waits for the GPU


def intersection_and_union(a, b):
    """Areas of the intersection and union of boxes a[i] and b[i]: (..., 4) xyxy twice -> (...) twice."""
    low = torch.maximum(a[..., :2], b[..., :2])  # (..., 2), upper left corner of the intersection
    high = torch.minimum(a[..., 2:], b[..., 2:])  # (..., 2), lower right; corners are swapped if the boxes are disjoint
    intersection = area(torch.cat([low, high], -1))
    return intersection, area(a) + area(b) - intersection


def iou(a, b):
    """IoU of boxes a[i] and b[i]: (..., 4) and (..., 4) xyxy -> (...) in 0..1; 0 where both are empty."""
    intersection, union = intersection_and_union(a, b)
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)  # 0 / tiny, not 0 / 0


def giou(a, b):
    """Generalised IoU (Rezatofighi et al. 2019, algorithm 1): (..., 4) xyxy twice -> (...) in -1..1.

    IoU minus the share of the smallest enclosing box that neither box covers, so that it has a gradient for disjoint
    boxes.
    """
    tiny = torch.finfo(a.dtype).tiny
    intersection, union = intersection_and_union(a, b)
    low = torch.minimum(a[..., :2], b[..., :2])  # (..., 2)
    high = torch.maximum(a[..., 2:], b[..., 2:])  # (..., 2)
    hull = area(torch.cat([low, high], -1))  # (...), of the smallest enclosing box
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def box_on_grid(boxes, grid, image_size):
    """The box drawn on the patch grid, the target of RTCC: (B, 4) cxcywh in 0..1 of an image_size square -> (B, h * w)
    of 0. and 1.

    A patch is in the box if its first pixel is, as in the released code's nearest-neighbour resize. A small box can
    miss all first pixels, so the patch of its centre always counts (ours).
    """
    h, w = grid
    xmin, ymin, xmax, ymax = (cxcywh_to_xyxy(boxes) * image_size).unbind(-1)  # pixels, (B,) each
    # first pixel of each patch
    y = torch.arange(h, device=boxes.device) * (image_size / h)  # (h)
    x = torch.arange(w, device=boxes.device) * (image_size / w)  # (w)
    # the box fills every pixel that it touches
    rows = (y >= ymin.floor()[:, None]) & (y < ymax.ceil()[:, None])  # (B, h)
    columns = (x >= xmin.floor()[:, None]) & (x < xmax.ceil()[:, None])  # (B, w)
    target = (rows[:, :, None] & columns[:, None, :]).flatten(1).float()  # (B, P)

    row = (boxes[:, 1] * h).long().clamp(0, h - 1)  # (B,), of the centre
    column = (boxes[:, 0] * w).long().clamp(0, w - 1)  # (B,)
    centre = row * w + column  # (B,), index of its patch
    return target.scatter(1, centre[:, None], 1.0)
