"""Losses against numbers worked out on paper, PyTorch, and the released program's golden values."""

import math
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from makers import GOLDEN, assert_close, make_batch, make_hivg, needs_golden, random, random_boxes, tensor, to_cxcywh
from makers_data import extent
from safetensors.torch import load_file

from hivg.boxes import box_on_grid, cxcywh_to_xyxy, iou
from hivg.evaluate.metrics import accuracy
from hivg.losses import LossWeights, box_loss, contrastive_loss, dice_loss, focal_loss, giou_loss, grounding_losses

# --- box losses ---

PREDICTED = tensor([0.5, 0.5, 0.2, 0.4], [0.3, 0.3, 0.2, 0.2])
TARGET = tensor([0.4, 0.5, 0.2, 0.7], [0.3, 0.3, 0.2, 0.2])


def test_box_loss():
    """|d| = 0.1 and 0.3 in one of two rows; smooth-L1 is d^2 / 2 below 1, |d| - 1/2 above."""
    assert box_loss(PREDICTED, TARGET, "l1").item() == pytest.approx(0.4 / 2)
    assert box_loss(PREDICTED, TARGET).item() == pytest.approx((0.1**2 + 0.3**2) / 2 / 2)
    assert box_loss(tensor([3, 0, 0, 0]), tensor([0, 0, 0, 0.5]), "smooth_l1").item() == pytest.approx(2.5 + 0.125)
    with pytest.raises(ValueError, match="smooth_l1 or l1, not 'L1'"):
        box_loss(PREDICTED, TARGET, "L1")


def test_giou_loss():
    """Row 0: x 0.4..0.6 against 0.3..0.5, y 0.3..0.7 against 0.15..0.85; row 1 is right."""
    intersection, union, hull = 0.1 * 0.4, 0.2 * 0.4 + 0.2 * 0.7 - 0.04, 0.3 * 0.7
    expected = (1 - (intersection / union - (hull - union) / hull) + 0) / 2
    assert giou_loss(PREDICTED, TARGET).item() == pytest.approx(expected)


# --- contrastive ---


def test_contrastive_loss_is_clips():
    logits = random(5, 5)
    own = torch.arange(5)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    assert_close("contrastive", contrastive_loss(logits), expected, 1e-12)
    assert_close("an image each", contrastive_loss(logits, torch.tensor([4, 8, 2, 9, 0])), expected, 1e-12)


def test_expressions_of_one_image_are_no_negatives():
    logits = random(4, 4).requires_grad_()
    images = [7, 3, 7, 7]
    loss = contrastive_loss(logits, torch.tensor(images))
    terms = []
    for matrix in (logits, logits.T):
        for i in range(4):
            negatives = [matrix[i, j] for j in range(4) if images[j] != images[i]]
            terms.append(torch.stack([matrix[i, i], *negatives]).logsumexp(0) - matrix[i, i])
    assert_close("contrastive", loss, sum(terms) / 8, 1e-12)
    loss.backward()
    assert logits.grad.isfinite().all()
    for i in range(4):
        for j in range(4):
            is_left_out = i != j and images[i] == images[j]
            assert bool(logits.grad[i, j]) != is_left_out, (i, j)
    assert contrastive_loss(logits, torch.zeros(4)).item() == 0  # a batch from one image


# --- focal and dice ---


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.7, 0.5), (0.5, 0.0)])
def test_focal_loss(alpha, gamma):
    """-alpha_t (1 - p_t)^gamma log p_t, one number at a time."""
    logits = random(3, 5)
    targets = (random(3, 5, seed=1) > 0).double()
    terms = []
    for logit, target in zip(logits.flatten().tolist(), targets.flatten().tolist()):
        p = 1 / (1 + math.exp(-logit))
        p_t, alpha_t = (p, alpha) if target else (1 - p, 1 - alpha)
        terms.append(-alpha_t * (1 - p_t) ** gamma * math.log(p_t))
    assert focal_loss(logits, targets, alpha, gamma).item() == pytest.approx(sum(terms) / 15, abs=1e-12)


def test_focal_loss_of_extreme_logits():
    logits = torch.tensor([[-1e4, 1e4, -1e4, 1e4]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([[0.0, 1, 1, 0]]))
    loss.backward()
    assert loss.item() == pytest.approx((0.25 + 0.75) * 1e4 / 4)
    assert logits.grad.isfinite().all()


def test_dice_loss_on_paper():
    """p = 1/2 everywhere: row 0 has 1 - (2 * 1 + 1) / (2 + 2 + 1), row 1, nothing to find, 1 - 1 / (2 + 0 + 1)."""
    targets = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0]])
    assert dice_loss(torch.zeros(2, 4), targets).item() == pytest.approx((2 / 5 + 2 / 3) / 2)
    assert dice_loss((2 * targets - 1) * 50, targets).item() == pytest.approx(0, abs=1e-6)
    assert dice_loss((1 - 2 * targets) * 50, targets).item() == pytest.approx((1 - 1 / 5 + 1 - 1 / 5) / 2)


# --- all together ---


def test_grounding_losses():
    """Each term is its function of the right tensors, times its weight; the contrast may be of a larger batch."""
    images, padding_mask, token_ids = make_batch()
    output = make_hivg()(images, padding_mask, token_ids)
    corners = random_boxes(4)
    corners[0] = tensor(0.2, 16.7 / 64, 0.9, 0.8)  # pixel 16, which the box touches, is sampled for row 1 of the grid
    boxes = to_cxcywh(corners)
    ids = torch.tensor([5, 5, 6, 7, 6, 1])
    masks = torch.rand(4, 24, 24, generator=torch.Generator().manual_seed(0)) > 0.5
    batch = {"images": images, "boxes": boxes, "masks": masks}
    contrast = random(6, 6, seed=1)
    weights = LossWeights(1, 2, 3, 4, 5, 6, 7)
    target, mask = box_on_grid(boxes, (4, 4), 64).double(), masks.flatten(1).double()
    logits = F.interpolate(output.mask_logits, (24, 24), mode="bilinear", align_corners=False).flatten(1)
    expected = {
        "box": 1 * box_loss(output.boxes, boxes, "l1"), "giou": 2 * giou_loss(output.boxes, boxes),
        "clc": 3 * contrastive_loss(contrast, ids),
        "rtcc_focal": 4 * focal_loss(output.token_similarity, target),
        "rtcc_dice": 5 * dice_loss(output.token_similarity, target),
        "mask_focal": 6 * focal_loss(logits, mask), "mask_dice": 7 * dice_loss(logits, mask)}
    terms = grounding_losses(output, batch, contrast, ids, weights, "l1")
    assert terms.keys() == expected.keys()
    for name in expected:
        assert_close(name, terms[name], expected[name].to(terms[name].dtype), 1e-6)


def output_and_batch(**options):
    images, padding_mask, token_ids = make_batch()
    output = make_hivg()(images, padding_mask, token_ids, **options)
    batch = {"images": images, "boxes": to_cxcywh(random_boxes(4)), "masks": torch.ones(4, 8, 8, dtype=torch.bool)}
    return output, batch


@pytest.mark.parametrize("name", [field.name for field in fields(LossWeights)])
def test_weight_zero_leaves_a_term_out(name):
    output, batch = output_and_batch()
    ids = torch.arange(4)
    whole = grounding_losses(output, batch, output.logits_per_text, ids, LossWeights())
    terms = grounding_losses(output, batch, output.logits_per_text, ids, LossWeights(**{name: 0}))
    assert list(terms) == [other for other in whole if other != name]
    assert all(torch.equal(terms[other], whole[other]) for other in terms)


def test_heads_without_a_loss_may_be_left_out():
    output = SimpleNamespace(boxes=PREDICTED, token_similarity=None, mask_logits=None)
    batch = {"images": torch.zeros(2, 3, 8, 8), "boxes": TARGET}
    weights = LossWeights(rtcc_focal=0, rtcc_dice=0, mask_focal=0, mask_dice=0)
    terms = grounding_losses(output, batch, torch.zeros(2, 2), torch.tensor([0, 1]), weights)
    assert terms.keys() == {"box", "giou", "clc"}
    assert terms["clc"].item() == pytest.approx(math.log(2))
    assert terms["box"].item() == pytest.approx(2 * (0.1**2 + 0.3**2) / 4)  # weight 2, the paper's smooth-L1


def test_box_losses_of_bfloat16_are_in_float32():
    output = SimpleNamespace(boxes=PREDICTED.bfloat16())
    weights = LossWeights(clc=0, rtcc_focal=0, rtcc_dice=0, mask_focal=0, mask_dice=0)
    terms = grounding_losses(output, {"boxes": TARGET.float()}, None, None, weights)
    assert terms["giou"].dtype == terms["box"].dtype == torch.float32
    expected = 2 * giou_loss(PREDICTED.bfloat16().float(), TARGET.float())
    assert torch.equal(terms["giou"], expected)


# --- rows of which nothing is true ---


def test_contrast_with_expressions_of_nothing():
    """They have no right image, but are negatives of others, not of those of their own image. On paper."""
    logits = random(5, 5).requires_grad_()
    images = torch.tensor([3, 3, 4, 8, 9])
    present = torch.tensor([True, False, True, True, False])
    loss = contrastive_loss(logits, images, present)
    expected = 0
    for i, others in ((0, [2, 3, 4]), (2, [0, 1, 3, 4]), (3, [0, 1, 2, 4])):
        for row in (logits[i], logits[:, i]):
            expected = expected + (row[[i, *others]].logsumexp(0) - row[i]) / 6
    assert_close("on paper", loss, expected, 1e-12)
    loss.backward()
    assert not logits.grad[[1, 4]][:, [1, 4]].any()
    assert_close("all present", contrastive_loss(logits, images, torch.ones(5, dtype=torch.bool)),
                 contrastive_loss(logits, images), 1e-12)
    assert contrastive_loss(logits, images, torch.zeros(5, dtype=torch.bool)).item() == 0


def losses_of(present):
    """-> {name: term} of a batch of four, and the gradients of the boxes, the patches' boxes and [REG]'s attention. A
    row that is not present has zeros as its box and an empty mask."""
    output, batch = output_and_batch(with_patch_boxes=True, with_reg_attention=True)
    if present is not None:
        present = torch.tensor(present)
        batch["boxes"] = batch["boxes"] * present[:, None]
        batch["masks"] = batch["masks"] & present[:, None, None]
        batch["present"] = present
    weights = LossWeights(patch_box=1.0, reg_attention=1.0)
    terms = grounding_losses(output, batch, output.logits_per_text, torch.arange(4), weights, all_present=present)
    inputs = output.boxes, output.patch_boxes, output.reg_attention
    return terms, torch.autograd.grad(sum(terms.values()), inputs)


def test_a_batch_of_present_rows_is_one_that_says_nothing_of_it():
    terms, gradients = losses_of([True] * 4)
    others, other_gradients = losses_of(None)
    assert list(terms) == list(others)
    assert all(torch.equal(terms[name], others[name]) for name in terms)
    assert all(map(torch.equal, gradients, other_gradients))


def test_rows_of_nothing_have_no_box_loss():
    """Nor a gradient from there; what other rows add is as ever. Their empty token map and mask count."""
    parts = [losses_of([i in kept for i in range(4)])[0] for kept in ({0}, {1, 3}, {2}, {0, 1, 2, 3})]
    for name in ("box", "giou", "patch_box", "reg_attention"):
        assert_close(name, parts[0][name] + parts[1][name] + parts[2][name], parts[3][name], 1e-5)
        assert parts[0][name] > 0
    terms, (boxes, patch_boxes, attention) = losses_of([True, False, True, False])
    for gradient, rows in ((boxes, boxes), (patch_boxes, patch_boxes), (attention, attention.transpose(0, 1))):
        assert gradient.isfinite().all() and not rows[[1, 3]].any() and rows[[0, 2]].any()
    terms, gradients = losses_of([False] * 4)
    assert not any(gradient.any() for gradient in gradients) and all(term.isfinite() for term in terms.values())
    assert [name for name in terms if terms[name] == 0] == ["box", "giou", "clc", "patch_box", "reg_attention"]
    images, *_ = make_batch()
    logits = torch.zeros(4, 16, requires_grad=True)
    empty = SimpleNamespace(boxes=torch.rand(4, 4), token_similarity=logits, mask_logits=None)
    batch = {"images": images, "boxes": torch.zeros(4, 4), "present": torch.zeros(4, dtype=torch.bool)}
    focal = grounding_losses(empty, batch, None, None, LossWeights(clc=0, mask_focal=0, mask_dice=0))["rtcc_focal"]
    assert focal.item() == pytest.approx(20 * 0.75 * math.log(2) / 4)  # all patches are background
    focal.backward()
    assert (logits.grad > 0).all()


@needs_golden
def test_golden_losses():
    golden = load_file(GOLDEN / "losses.safetensors")
    boxes, targets, mask = golden["pred_boxes"], golden["target_boxes"], golden["target_mask"]
    on_grid, logits = F.interpolate(mask, (4, 4), mode="nearest").flatten(1), golden["token_similarity"]
    seg = F.interpolate(golden["seg_mask"], mask.shape[-2:], mode="bilinear", align_corners=False).flatten(1)
    ours = {
        "loss_bbox": 2 * box_loss(boxes, targets, "l1"), "loss_giou": 2 * giou_loss(boxes, targets),
        "loss_contrastive": contrastive_loss(golden["logits_per_text"]),
        "loss_algin_focal": 20 * focal_loss(logits, on_grid), "loss_align_dice": 2 * dice_loss(logits, on_grid),
        "loss_seg_focal": 20 * focal_loss(seg, mask.flatten(1)), "loss_seg_dice": 2 * dice_loss(seg, mask.flatten(1))}
    for name, value in ours.items():
        assert_close(name, value[None], golden[name], 1e-4)
    for i in range(len(mask)):  # the masks are drawn boxes, other than target_boxes
        expected, box = on_grid[i].view(4, 4).clone(), to_cxcywh(extent(mask[i, 0]) / 64)
        expected[int(box[1] * 4), int(box[0] * 4)] = 1  # the centre's patch, which is our addition
        assert_close("box_on_grid", box_on_grid(box[None], (4, 4), 64)[0], expected.flatten(), 0)
    ious = iou(cxcywh_to_xyxy(boxes).clamp(0, 1), cxcywh_to_xyxy(targets))
    assert_close("box_iou", ious, golden["box_iou"], 1e-4)
    assert accuracy(ious.tolist()) == pytest.approx(golden["acc_at_05"].item(), abs=1e-4)
