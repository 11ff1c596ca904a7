"""The losses of HiVG: box, CLC, RTCC, mask; and of the tiny CLIP's pre-training. Every function returns a scalar,
without its weight."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hivg.boxes import cxcywh_to_xyxy, giou


def box_loss(boxes, targets, kind="smooth_l1"):
    """boxes and targets (B, 4) cxcywh in 0..1: summed over the four numbers, averaged over the batch.
    kind: smooth_l1 (paper) or l1 (released code)."""
    return {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss}[kind](boxes, targets, reduction="sum") / len(boxes)


def giou_loss(boxes, targets):
    """1 - GIoU of (B, 4) cxcywh with (B, 4) cxcywh, averaged."""
    return (1 - giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))).mean()


def contrastive_loss(logits_per_text, same_image=None):
    """CLIP's symmetric cross entropy of logits (B, B), row i = expression i. same_image (B, B) bool: other expressions
    of the same picture (off the diagonal) are no negatives and are left out of the softmax."""
    n = len(logits_per_text)
    if same_image is not None:
        others = same_image & ~torch.eye(n, dtype=torch.bool, device=same_image.device)
        logits_per_text = logits_per_text.masked_fill(others, float("-inf"))
    labels = torch.arange(n, device=logits_per_text.device)
    return (F.cross_entropy(logits_per_text, labels) + F.cross_entropy(logits_per_text.T, labels)) / 2


def patch_similarity(words, patches, sharpness=20.0):
    """How well each text fits each picture by its best patches, as in FILIP (Yao et al. 2022) with a soft maximum:
    words (M, W, E) and patches (B, P, E), not normalised -> (M, B): the cosine of a word with the patches, averaged
    with the weights softmax(sharpness * cosine), then averaged over the words."""
    cosine = torch.einsum("mwe,bpe->mwbp", F.normalize(words, dim=-1), F.normalize(patches, dim=-1))
    return (cosine * (sharpness * cosine).softmax(-1)).sum(-1).mean(1)


def phrase_loss(logits, true, own):
    """Contrast of phrases with pictures: logits (M, B), true (M, B) bool whether the phrase is true of the picture, own
    (M,) the picture it was said about. A phrase has to find its own picture among those that it is not true of, and a
    picture each of its phrases among those that are not true of it."""
    right = logits[torch.arange(len(own), device=own.device), own]
    wrong = logits.masked_fill(true, float("-inf"))
    return (F.softplus(wrong.logsumexp(1) - right) + F.softplus(wrong.logsumexp(0)[own] - right)).mean()


def focal_loss(logits, targets, alpha=0.25, gamma=2.0):
    """Focal loss (Lin et al. 2017, eq. 5) of logits (B, n) against targets (B, n) in {0, 1}, averaged over both."""
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p = logits.sigmoid()
    missed = p * (1 - targets) + (1 - p) * targets  # 1 - p_t
    return ((alpha * targets + (1 - alpha) * (1 - targets)) * missed**gamma * bce).mean()


def dice_loss(logits, targets):
    """1 - (2 sum p t + 1) / (sum p + sum t + 1) of logits (B, n) and targets (B, n) in {0, 1}, averaged over B."""
    p = logits.sigmoid()
    return (1 - (2 * (p * targets).sum(1) + 1) / (p.sum(1) + targets.sum(1) + 1)).mean()


def box_on_grid(boxes, grid, image_size):
    """The box drawn on the patch grid, the target of the token map: (B, 4) cxcywh in 0..1 of an image_size square ->
    (B, h * w) of 0. and 1. A patch is in the box if its sampled pixel is: that of a nearest-neighbour resize, which is
    what the released code does, so a small box can miss; the patch of the box's centre is set in any case (ours)."""
    (h, w), (xmin, ymin, xmax, ymax) = grid, (cxcywh_to_xyxy(boxes) * image_size).unbind(-1)
    y = torch.arange(h, device=boxes.device) * (image_size / h)
    x = torch.arange(w, device=boxes.device) * (image_size / w)
    rows = (y >= ymin.floor()[:, None]) & (y < ymax.ceil()[:, None])  # (B, h)
    columns = (x >= xmin.floor()[:, None]) & (x < xmax.ceil()[:, None])  # (B, w)
    target = (rows[:, :, None] & columns[:, None, :]).flatten(1).float()
    column, row = (boxes[:, 0] * w).long().clamp(0, w - 1), (boxes[:, 1] * h).long().clamp(0, h - 1)
    return target.scatter(1, (row * w + column)[:, None], 1.0)


@dataclass(frozen=True)
class LossWeights:
    """The weight of each term; 0 leaves it out."""

    box: float = 2.0
    giou: float = 2.0
    clc: float = 1.0  # contrast of pictures and expressions (CLIP's loss)
    rtcc_focal: float = 20.0  # RTCC: the token map
    rtcc_dice: float = 2.0
    mask_focal: float = 20.0
    mask_dice: float = 2.0


def grounding_losses(output, batch, logits_per_text, image_ids, weights: LossWeights, box_kind="smooth_l1"):
    """All terms, weighted: output an HiVGOutput, batch a dict with images (B, 3, S, S), boxes (B, 4) cxcywh in 0..1,
    masks (B, M, M) bool, to whose size the mask logits are resized; logits_per_text (n, n) and image_ids (n,) are those
    of all ranks -> {name: scalar tensor}; their sum is the loss."""
    w, boxes, predicted = weights, batch["boxes"], output.boxes.float()  # in bfloat16 a GIoU is mostly rounding
    terms = {}
    terms["box"] = lambda: box_loss(predicted, boxes, box_kind)
    terms["giou"] = lambda: giou_loss(predicted, boxes)
    terms["clc"] = lambda: contrastive_loss(logits_per_text, image_ids[:, None] == image_ids)
    if w.rtcc_focal or w.rtcc_dice:
        side = round(output.token_similarity.shape[1] ** 0.5)
        target = box_on_grid(boxes, (side, side), batch["images"].shape[-1])
        terms["rtcc_focal"] = lambda: focal_loss(output.token_similarity, target)
        terms["rtcc_dice"] = lambda: dice_loss(output.token_similarity, target)
    if w.mask_focal or w.mask_dice:
        logits = F.interpolate(output.mask_logits, batch["masks"].shape[1:], mode="bilinear").flatten(1)
        mask = batch["masks"].flatten(1).float()
        terms["mask_focal"] = lambda: focal_loss(logits, mask)
        terms["mask_dice"] = lambda: dice_loss(logits, mask)
    return {name: getattr(w, name) * term() for name, term in terms.items() if getattr(w, name)}
