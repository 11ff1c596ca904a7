"""Boxes: the two formats, intersection over union, generalised IoU.

`xyxy` is (xmin, ymin, xmax, ymax) and `cxcywh` is (centre x, centre y, width, height); x runs to the right, y
down. The functions take any unit (pixels or 0..1) and any leading shape; the last axis holds the four numbers.
"""

import torch


def cxcywh_to_xyxy(boxes):
    """(..., 4) cxcywh -> (..., 4) xyxy, same unit."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)


def xyxy_to_cxcywh(boxes):
    """(..., 4) xyxy -> (..., 4) cxcywh, same unit."""
    xmin, ymin, xmax, ymax = boxes.unbind(-1)
    return torch.stack([(xmin + xmax) / 2, (ymin + ymax) / 2, xmax - xmin, ymax - ymin], -1)


def area(boxes):
    """(..., 4) xyxy -> (...) area; 0 for a box whose corners are swapped."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def _intersection_union(a, b):
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (high - low).clamp(min=0).prod(-1)
    return intersection, area(a) + area(b) - intersection


def iou(a, b):
    """Pairwise IoU of boxes a[i] and b[i]: (..., 4) and (..., 4) xyxy -> (...) in 0..1; 0 where both are empty."""
    intersection, union = _intersection_union(a, b)
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def giou(a, b):
    """Generalised IoU (Rezatofighi et al. 2019, algorithm 1): (..., 4) xyxy twice -> (...) in -1..1.

    IoU minus the share of the smallest enclosing box that neither box covers, so that it has a gradient for boxes
    that do not meet.
    """
    tiny = torch.finfo(a.dtype).tiny
    intersection, union = _intersection_union(a, b)
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)
