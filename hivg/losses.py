"""The losses of HiVG: box (with GIoU), CLC, RTCC, mask. Each is a scalar without its weight; `grounding_losses`
weights them.

Letters: B batch, P = h w patches of the grid, n numbers of a sample, R the samples of all ranks.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hivg.boxes import box_on_grid, cxcywh_to_xyxy, giou

IGNORED = -100  # the class that a cross entropy leaves out


def box_loss(boxes, targets, kind="smooth_l1"):
    """boxes and targets (B, 4) cxcywh in 0..1: summed over the four numbers, averaged over the batch.
    kind: smooth_l1 (paper) or l1 (released code)."""
    if kind == "smooth_l1":
        loss = F.smooth_l1_loss(boxes, targets, reduction="sum")
    elif kind == "l1":
        loss = F.l1_loss(boxes, targets, reduction="sum")
    else:
        raise ValueError(f"the box loss must be smooth_l1 or l1, not {kind!r}")
    return loss / len(boxes)


def giou_loss(boxes, targets):
    """1 - GIoU of (B, 4) cxcywh with (B, 4) cxcywh, averaged."""
    return (1 - giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets))).mean()


def contrastive_loss(logits_per_text, image_ids=None, present=None):
    """CLC: CLIP's symmetric contrastive loss between the expressions and the images of a batch.

        L = (CE(S) + CE(S^T)) / 2,   S_ij = min(exp(logit_scale), 100) cos(t_i, v_j)

    logits_per_text (B, B) is S: t_i is the text feature at the end token of expression i, v_j the feature of [CLS] of
    image j, both in CLIP's shared space. logit_scale is CLIP's own (`similarity` in clip.py), frozen with the rest of
    CLIP. CE is the cross entropy of each row with its own column as the right one. Under data
    parallelism B is the batch of all GPUs together.

    Where the bridge shows image j its own expression j, copying satisfies this loss: [CLS] repeats the text it was
    shown, and says little about the image (LOG.md, "The contrastive loss copies").

    image_ids (B,): which image each row is of, None if all differ. Expressions of one image are not negatives of each
    other: that image is right for both. The released code takes them for negatives.

    present (B,) bool: false for an expression that is true of nothing in its image. It has no right image, nor its
    image a right expression, but both are negatives of others as ever.
    """
    B = len(logits_per_text)
    own = torch.arange(B, device=logits_per_text.device)  # (B,): expression i was said of image i
    if image_ids is not None:
        same_image = image_ids[:, None] == image_ids  # (B, B)
        itself = torch.eye(B, dtype=torch.bool, device=image_ids.device)
        # exp(-inf) = 0 takes these pairs out of the softmax, for the rows and for the columns alike
        logits_per_text = logits_per_text.masked_fill(same_image & ~itself, float("-inf"))
    count = B
    if present is not None:
        own = own.masked_fill(~present, IGNORED)
        count = present.sum().clamp(min=1)
    text_to_image = F.cross_entropy(logits_per_text, own, ignore_index=IGNORED, reduction="sum")
    image_to_text = F.cross_entropy(logits_per_text.T, own, ignore_index=IGNORED, reduction="sum")
    return (text_to_image + image_to_text) / (2 * count)


def focal_loss(logits, targets, alpha=0.25, gamma=2.0):
    """Focal loss (Lin et al. 2017, eq. 5) of logits (B, n) against targets (B, n) in {0, 1}, averaged over both:

        -alpha_t (1 - p_t)^gamma log p_t,   p_t the probability of the right answer
    """
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")  # -log p_t
    p = logits.sigmoid()
    missed = p * (1 - targets) + (1 - p) * targets  # 1 - p_t: near 0 for the many easy patches of the background
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
    return (alpha_t * missed**gamma * bce).mean()


def dice_loss(logits, targets):
    """1 - (2 sum p t + 1) / (sum p + sum t + 1) of logits (B, n) and targets (B, n) in {0, 1}, averaged over B."""
    p = logits.sigmoid()
    shared = (p * targets).sum(1)  # (B,)
    both = p.sum(1) + targets.sum(1)  # (B,)
    return (1 - (2 * shared + 1) / (both + 1)).mean()  # the 1s: no division by 0 where nothing is to be found


def patch_box_loss(patch_boxes, targets, on_grid):
    """L1 + 1 - GIoU of the box that the box head gives for each patch of the target: patch_boxes (B, P, 4) and targets
    (B, 4) cxcywh in 0..1, on_grid (B, P) of 0. and 1.; averaged over these patches, then over B.

    A hint of ours. [REG] can learn a box only from the patches it looks at, and where to look only from its box; what
    the patches themselves make of the box gives the head, and what is known of places, a gradient from the start. A row
    without such patches adds nothing.
    """
    targets = targets[:, None].expand_as(patch_boxes)  # (B, P, 4)
    l1 = (patch_boxes - targets).abs().sum(-1)  # (B, P)
    loss = l1 + 1 - giou(cxcywh_to_xyxy(patch_boxes), cxcywh_to_xyxy(targets))  # (B, P)
    return ((loss * on_grid).sum(1) / on_grid.sum(1).clamp(min=1)).mean()


def reg_attention_loss(log_shares, on_grid):
    """-log of the share of [REG]'s attention that lies on the target: log_shares (L, B, heads, P) of L layers, on_grid
    (B, P) of 0. and 1.; averaged over layers, samples and heads. The other hint of ours: where [REG] should look. A row
    without a target adds nothing."""
    has_target = on_grid.amax(1, keepdim=True)  # (B, 1) of 0. and 1.
    outside = (on_grid < has_target)[:, None]  # (B, 1, P)
    log_shares = log_shares.clamp(min=-30)  # padding has a share of 0, whose logarithm has no gradient
    share = log_shares.masked_fill(outside, float("-inf")).logsumexp(-1)  # (L, B, heads)
    return -(share * has_target).mean()


@dataclass(frozen=True)
class LossWeights:
    """The weight of each term, by default the paper's; 0 leaves it out."""

    box: float = 2.0
    giou: float = 2.0
    clc: float = 1.0  # contrast of images and expressions
    rtcc_focal: float = 20.0  # similarity of the text with each patch
    rtcc_dice: float = 2.0
    mask_focal: float = 20.0
    mask_dice: float = 2.0
    patch_box: float = 0.0  # ours: two hints for learning from little data
    reg_attention: float = 0.0


# What the drawn world is trained with: the two hints, and a tenth of the paper's CLC, at 1 of which [CLS] learns to
# copy its text (see contrastive_loss)
DRAWN_WORLD = LossWeights(clc=0.1, patch_box=2.0, reg_attention=0.5)


def grounding_losses(output, batch, logits_per_text, image_ids, weights: LossWeights, box_kind="smooth_l1",
                     all_present=None):
    """All terms, weighted: output an HiVGOutput, batch a dict with images (B, 3, S, S), boxes (B, 4) cxcywh in 0..1,
    masks (B, M, M) bool, to whose size the mask logits are resized; logits_per_text (R, R), image_ids and all_present
    (R,) are those of all ranks -> {name: scalar tensor}; their sum is the loss.

    The drawn world may also have present (B,) bool, false for an expression that is true of nothing in its image, whose
    mask is empty. The paper's task has no such thing.
    """
    targets = batch["boxes"]
    # all in float32: in bfloat16 a GIoU is mostly rounding, and the sums of the dice losses lose digits
    boxes = output.boxes.float()
    if "present" in batch:
        absent = ~batch["present"][:, None]  # (B, 1)
        boxes, targets = boxes.masked_fill(absent, 1.0), targets.masked_fill(absent, 1.0)  # equal ones cost nothing
    terms = {}

    if weights.box:
        terms["box"] = weights.box * box_loss(boxes, targets, box_kind)
    if weights.giou:
        terms["giou"] = weights.giou * giou_loss(boxes, targets)
    if weights.clc:
        terms["clc"] = weights.clc * contrastive_loss(logits_per_text, image_ids, all_present)

    # RTCC: each patch should be similar to the text if, and only if, it lies in the box
    if weights.rtcc_focal or weights.rtcc_dice or weights.patch_box or weights.reg_attention:
        side = round(output.token_similarity.shape[1] ** 0.5)  # the grid is square, as the letterbox is
        on_grid = box_on_grid(targets, (side, side), batch["images"].shape[-1])  # (B, P)
        if "present" in batch:
            on_grid = on_grid.masked_fill(absent, 0.0)  # the text is like no patch
    if weights.rtcc_focal:
        terms["rtcc_focal"] = weights.rtcc_focal * focal_loss(output.token_similarity.float(), on_grid)
    if weights.rtcc_dice:
        terms["rtcc_dice"] = weights.rtcc_dice * dice_loss(output.token_similarity.float(), on_grid)

    # Hints (ours)
    if weights.patch_box:
        terms["patch_box"] = weights.patch_box * patch_box_loss(output.patch_boxes.float(), targets, on_grid)
    if weights.reg_attention:
        terms["reg_attention"] = weights.reg_attention * reg_attention_loss(output.reg_attention, on_grid)

    # Mask: the box or, where the data has one, the segmentation
    if weights.mask_focal or weights.mask_dice:
        masks = batch["masks"].flatten(1).float()  # (B, M M)
        logits = F.interpolate(output.mask_logits.float(), batch["masks"].shape[1:], mode="bilinear")  # (B, 1, M, M)
        logits = logits.flatten(1)  # (B, M M)
    if weights.mask_focal:
        terms["mask_focal"] = weights.mask_focal * focal_loss(logits, masks)
    if weights.mask_dice:
        terms["mask_dice"] = weights.mask_dice * dice_loss(logits, masks)
    return terms
