"""Boxes: the two formats, intersection over union, generalised IoU.

`xyxy` is (xmin, ymin, xmax, ymax) and `cxcywh` is (centre x, centre y, width, height); x runs to the right, y
down. The functions take any unit (pixels or 0..1) and any leading shape; the last axis holds the four numbers.
"""

import torch


def cxcywh_to_xyxy(boxes):
    """(..., 4) cxcywh -> (..., 4) xyxy, same unit."""
    cx, cy, w, h = boxes.unbind(-1)  # (...) each
    return torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], -1)


def area(boxes):
    """(..., 4) xyxy -> (...) area; 0 for a box whose corners are swapped."""
    sides = boxes[..., 2:] - boxes[..., :2]  # (..., 2)
    return sides.clamp(min=0).prod(-1)  # each side by itself: two negative sides would make a positive area


def intersection_and_union(a, b):
    """Areas that boxes a[i] and b[i] share and cover: (..., 4) xyxy twice -> (...) twice."""
    low = torch.maximum(a[..., :2], b[..., :2])  # (..., 2), the shared box's left upper corner
    high = torch.minimum(a[..., 2:], b[..., 2:])  # (..., 2), swapped with it where the boxes do not meet
    intersection = area(torch.cat([low, high], -1))
    return intersection, area(a) + area(b) - intersection


def iou(a, b):
    """IoU of boxes a[i] and b[i]: (..., 4) and (..., 4) xyxy -> (...) in 0..1; 0 where both are empty."""
    intersection, union = intersection_and_union(a, b)
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)  # 0 / tiny, not 0 / 0


def giou(a, b):
    """Generalised IoU (Rezatofighi et al. 2019, algorithm 1): (..., 4) xyxy twice -> (...) in -1..1.

    IoU minus the share of the smallest enclosing box that neither box covers, so that it has a gradient for boxes
    that do not meet.
    """
    tiny = torch.finfo(a.dtype).tiny
    intersection, union = intersection_and_union(a, b)
    low = torch.minimum(a[..., :2], b[..., :2])  # (..., 2)
    high = torch.maximum(a[..., 2:], b[..., 2:])  # (..., 2)
    hull = area(torch.cat([low, high], -1))  # (...), of the smallest box around both
    return intersection / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def share_of_cells(low, high, n):
    """How much of each of n equal cells of 0..1 lies between low and high: (B,) and (B,) -> (B, n) in 0..1."""
    left = torch.arange(n, device=low.device) / n  # (n), where each cell begins
    right = left + 1 / n
    overlap = torch.minimum(high[:, None], right) - torch.maximum(low[:, None], left)  # (B, n)
    return overlap.clamp(min=0) * n
