"""Boxes, losses and metrics against numbers worked out on paper, PyTorch, and the released program's golden values."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from makers import GOLDEN, assert_close, make_batch, make_hivg, needs_golden
from safetensors.torch import load_file

from hivg.boxes import area, cxcywh_to_xyxy, giou, iou, xyxy_to_cxcywh
from hivg.data.batches import phrase_truth
from hivg.losses import (
    LossWeights,
    box_loss,
    box_on_grid,
    contrastive_loss,
    dice_loss,
    focal_loss,
    giou_loss,
    grounding_losses,
    patch_similarity,
    phrase_loss,
)
from hivg.metrics import accuracy, auroc, by_length, interval, mean


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def random_boxes(n, seed=0):
    """(n, 4) xyxy within 0..1."""
    corners = torch.rand(n, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([corners.amin(1), corners.amax(1)], -1)


# --- boxes ---


def test_formats():
    """A box that is not square: 30 wide, 10 high, its corner at (20, 40)."""
    xyxy, cxcywh = tensor([20, 40, 50, 50]), tensor([35, 45, 30, 10])
    assert torch.equal(cxcywh_to_xyxy(cxcywh), xyxy)
    assert torch.equal(xyxy_to_cxcywh(xyxy), cxcywh)
    assert area(xyxy).tolist() == [300]
    assert area(tensor([50, 40, 20, 50], [20, 50, 50, 40])).tolist() == [0, 0]  # corners swapped
    boxes = random_boxes(60).view(3, 20, 4)
    assert_close("there and back", cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes, 1e-12)


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


# --- box losses ---

PREDICTED = tensor([0.5, 0.5, 0.2, 0.4], [0.3, 0.3, 0.2, 0.2])
TARGET = tensor([0.4, 0.5, 0.2, 0.7], [0.3, 0.3, 0.2, 0.2])


def test_box_loss():
    """|d| = 0.1 and 0.3 in one of two rows; smooth-L1 is d^2 / 2 below 1, |d| - 1/2 above."""
    assert box_loss(PREDICTED, TARGET, "l1").item() == pytest.approx(0.4 / 2)
    assert box_loss(PREDICTED, TARGET).item() == pytest.approx((0.1**2 + 0.3**2) / 2 / 2)
    assert box_loss(tensor([3, 0, 0, 0]), tensor([0, 0, 0, 0.5]), "smooth_l1").item() == pytest.approx(2.5 + 0.125)


def test_giou_loss():
    """Row 0: x 0.4..0.6 against 0.3..0.5, y 0.3..0.7 against 0.15..0.85; row 1 is right."""
    intersection, union, hull = 0.1 * 0.4, 0.2 * 0.4 + 0.2 * 0.7 - 0.04, 0.3 * 0.7
    expected = (1 - (intersection / union - (hull - union) / hull) + 0) / 2
    assert giou_loss(PREDICTED, TARGET).item() == pytest.approx(expected)


# --- contrastive ---


def test_contrastive_loss_is_clips():
    logits, labels = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).double(), torch.arange(5)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    assert_close("contrastive", contrastive_loss(logits), expected, 1e-12)
    assert_close("own picture only", contrastive_loss(logits, torch.eye(5).bool()), expected, 1e-12)


def test_expressions_of_one_picture_are_no_negatives():
    logits, pictures = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double(), [7, 3, 7, 7]
    logits.requires_grad_()
    same = torch.tensor(pictures)[:, None] == torch.tensor(pictures)
    loss = contrastive_loss(logits, same)
    terms = []
    for matrix in (logits, logits.T):
        for i in range(4):
            negatives = [matrix[i, j] for j in range(4) if pictures[j] != pictures[i]]
            terms.append(torch.stack([matrix[i, i], *negatives]).logsumexp(0) - matrix[i, i])
    assert_close("contrastive", loss, sum(terms) / 8, 1e-12)
    loss.backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[same & ~torch.eye(4).bool()].any()
    assert contrastive_loss(logits, torch.ones(4, 4).bool()).item() == 0  # a batch from one picture


# --- phrases ---


def test_patch_similarity():
    """Sharp, it is the cosine of the best patch; blunt, the mean over all; a word's and a patch's length do not matter,
    and the words are averaged."""
    generator = torch.Generator().manual_seed(0)
    words, patches = torch.randn(3, 2, 8, generator=generator), torch.randn(4, 5, 8, generator=generator)
    cosine = F.cosine_similarity(words[:, :, None, None], patches, dim=-1)  # (3, 2, 4, 5)
    assert_close("sharp", patch_similarity(words, patches, 1e4), cosine.amax(-1).mean(1), 1e-6)
    assert_close("blunt", patch_similarity(words, patches, 0.0), cosine.mean((1, 3)), 1e-6)
    assert_close("scaled", patch_similarity(3 * words, 7 * patches), patch_similarity(words, patches), 1e-6)


def test_phrase_loss():
    """Worked out in loops: what is true is no negative."""
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    true = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 1, 0], [1, 1, 1]]).bool()  # the last is true of all pictures
    own = torch.tensor([0, 0, 1, 2])
    terms = []
    for m, b in enumerate(own):
        for negatives in ([logits[m, j] for j in range(3) if not true[m, j]],
                          [logits[k, b] for k in range(4) if not true[k, b]]):
            terms.append(torch.stack([logits[m, b], *negatives]).logsumexp(0) - logits[m, b])
    loss = phrase_loss(logits, true, own)
    assert_close("phrases", loss, sum(terms) / 4, 1e-12)
    loss.backward()
    assert logits.grad.isfinite().all() and not logits.grad[0, 2]


def test_phrase_truth():
    # shape, colour, filling, size; -1 is not named; -2 and -3 are no phrase and no object
    named = torch.tensor([[3, -1, -1, -1], [3, 5, -1, -1], [3, 5, 0, 2], [-2, -2, -2, -2]])
    attributes = torch.tensor([[[3, 1, 0, 2], [2, 5, 0, 2]], [[3, 5, 0, 2], [-3, -3, -3, -3]],
                               [[3, 5, 1, 2], [3, 5, 0, 1]]])
    assert phrase_truth(named, attributes).int().tolist() == [[1, 1, 1], [0, 1, 1], [0, 1, 0], [0, 0, 0]]


# --- focal and dice ---


@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.7, 0.5), (0.5, 0.0)])
def test_focal_loss(alpha, gamma):
    """-alpha_t (1 - p_t)^gamma log p_t, one number at a time."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, generator=generator).double()
    targets = torch.rand(3, 5, generator=generator).round().double()
    terms = []
    for logit, target in zip(logits.flatten().tolist(), targets.flatten().tolist()):
        p = 1 / (1 + math.exp(-logit))
        p_t, alpha_t = (p, alpha) if target else (1 - p, 1 - alpha)
        terms.append(-alpha_t * (1 - p_t) ** gamma * math.log(p_t))
    assert focal_loss(logits, targets, alpha, gamma).item() == pytest.approx(sum(terms) / 15, abs=1e-12)
    bce = F.binary_cross_entropy_with_logits(logits, targets)
    assert_close("half of the cross entropy", focal_loss(logits, targets, 0.5, 0.0), bce / 2, 1e-12)


def test_focal_loss_on_paper():
    """Logit 0: p = 1/2, so (1/2)^2 log 2 times 1/4 where the target is 1, 3/4 where it is 0."""
    assert focal_loss(torch.zeros(1, 1), torch.ones(1, 1)).item() == pytest.approx(math.log(2) / 16)
    assert focal_loss(torch.zeros(1, 1), torch.zeros(1, 1)).item() == pytest.approx(3 * math.log(2) / 16)


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


# --- the box on the grid ---


def drawn(boxes, grid, image_size):
    """Painted as whole pixels, from floor to ceil, then resized by nearest neighbour; its centre's patch set."""
    rows = []
    for box in boxes:
        (xmin, ymin), (xmax, ymax) = (cxcywh_to_xyxy(box) * image_size).view(2, 2).clamp(min=0).tolist()
        picture = torch.zeros(1, 1, image_size, image_size)
        picture[..., math.floor(ymin) : math.ceil(ymax), math.floor(xmin) : math.ceil(xmax)] = 1
        small = F.interpolate(picture, grid, mode="nearest")[0, 0]
        small[min(int(box[1] * grid[0]), grid[0] - 1), min(int(box[0] * grid[1]), grid[1] - 1)] = 1
        rows.append(small.flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("grid, image_size", [((4, 4), 64), ((8, 8), 128), ((14, 14), 224), ((2, 5), 60), ((3, 7), 50)])
def test_box_on_grid(grid, image_size):
    boxes = xyxy_to_cxcywh(random_boxes(300))
    boxes[::3, 2:] /= 20  # some much smaller than a patch
    target = box_on_grid(boxes, grid, image_size)
    assert target.shape == (300, grid[0] * grid[1])
    assert set(target.unique().tolist()) == {0.0, 1.0}
    assert_close("target", target, drawn(boxes, grid, image_size), 0)


@pytest.mark.parametrize("box, rows, columns", [
    ([0.5, 0.5, 1, 1], [0, 1, 2, 3], [0, 1, 2, 3]),  # everything
    ([0.5, 0.25, 1, 0.5], [0, 1], [0, 1, 2, 3]),  # the upper half, x and y not swapped
    ([0.125, 0.5, 0.25, 1], [0, 1, 2, 3], [0]),  # the left column
    ([0.55, 0.9, 0.001, 0.001], [3], [2]),  # tiny: the patch of its centre
    ([0.9999, 0.0001, 1e-9, 1e-9], [0], [3]),
    ([1.0, 1.0, 1e-6, 1e-6], [3], [3]),  # its centre on the far edge
])
def test_box_on_grid_on_paper(box, rows, columns):
    target = box_on_grid(torch.tensor([box]), (4, 4), 64).view(4, 4)
    expected = torch.zeros(4, 4)
    for row in rows:
        expected[row, columns] = 1
    assert_close("target", target, expected, 0)


# --- all together ---


def test_grounding_losses():
    """Each term is its function of the right tensors, times its weight; the contrast may be of a larger batch."""
    images, padding_mask, token_ids = make_batch()
    output = make_hivg()(images, padding_mask, token_ids)
    boxes, ids = xyxy_to_cxcywh(random_boxes(4)), torch.tensor([5, 5, 6, 7, 6, 1])
    masks = torch.rand(4, 24, 24, generator=torch.Generator().manual_seed(0)) > 0.5
    batch = {"images": images, "boxes": boxes, "masks": masks}
    contrast = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double()
    weights = LossWeights(1, 2, 3, 4, 5, 6, 7)
    target, mask = box_on_grid(boxes, (4, 4), 64).double(), masks.flatten(1).double()
    logits = F.interpolate(output.mask_logits, (24, 24), mode="bilinear", align_corners=False).flatten(1)
    expected = {
        "box": 1 * box_loss(output.boxes, boxes, "l1"), "giou": 2 * giou_loss(output.boxes, boxes),
        "clc": 3 * contrastive_loss(contrast, ids[:, None] == ids),
        "rtcc_focal": 4 * focal_loss(output.token_similarity, target),
        "rtcc_dice": 5 * dice_loss(output.token_similarity, target),
        "mask_focal": 6 * focal_loss(logits, mask), "mask_dice": 7 * dice_loss(logits, mask)}
    terms = grounding_losses(output, batch, contrast, ids, weights, "l1")
    assert terms.keys() == expected.keys()
    for name in expected:
        assert_close(name, terms[name], expected[name].to(terms[name].dtype), 1e-6)


def test_weight_zero_leaves_a_term_out():
    """And what only that term needs may be missing."""
    output = SimpleNamespace(boxes=PREDICTED, token_similarity=None, mask_logits=None)
    batch = {"images": torch.zeros(2, 3, 8, 8), "boxes": TARGET}
    weights = LossWeights(rtcc_focal=0, rtcc_dice=0, mask_focal=0, mask_dice=0)
    terms = grounding_losses(output, batch, torch.zeros(2, 2), torch.tensor([0, 1]), weights)
    assert terms.keys() == {"box", "giou", "clc"}
    assert terms["clc"].item() == pytest.approx(math.log(2))
    assert terms["box"].item() == pytest.approx(2 * (0.1**2 + 0.3**2) / 4)  # weight 2, the paper's smooth-L1


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
        _, rows, columns = mask[i].nonzero().T
        edges = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        expected, box = on_grid[i].view(4, 4).clone(), xyxy_to_cxcywh(edges / 64)
        expected[int(box[1] * 4), int(box[0] * 4)] = 1  # the centre's patch, which is our addition
        assert_close("box_on_grid", box_on_grid(box[None], (4, 4), 64)[0], expected.flatten(), 0)
    ious = iou(cxcywh_to_xyxy(boxes).clamp(0, 1), cxcywh_to_xyxy(targets))
    assert_close("box_iou", ious, golden["box_iou"], 1e-4)
    assert accuracy(ious.tolist()) == pytest.approx(golden["acc_at_05"].item(), abs=1e-4)


# --- metrics ---


def test_accuracy_and_mean():
    assert accuracy([0.5, 0.49, 0.9, 0.0]) == 0.5  # 0.5 itself is right
    assert accuracy([0.5, 0.49, 0.9, 0.0], threshold=0.9) == 0.25
    assert accuracy(iter([1.0])) == 1
    assert mean([0.5, 0.25]) == 0.375
    assert math.isnan(accuracy([])) and math.isnan(mean([]))


@pytest.mark.parametrize("k, n, low, high", [  # Newcombe 1998, table I, method 3
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)])
def test_wilson_interval(k, n, low, high):
    assert interval(k / n, n) == pytest.approx((low, high), abs=1e-4)
    assert interval(1 - k / n, n) == pytest.approx((1 - high, 1 - low), abs=1e-4)


def test_interval_of_nothing():
    assert all(math.isnan(x) for x in interval(math.nan, 0))


def test_by_length():
    words = "w " * 20
    lengths, ious = [1, 5, 6, 7, 8, 10, 11, 20], [1.0, 0.0, 0.6, 0.8, 0.4, 0.2, 0.5, 0.7]
    rows = by_length([words[: 2 * n] for n in lengths], ious)
    assert list(rows) == ["1-5 words", "6-7 words", "8-10 words", "11+ words"]
    assert [count for count, _, _ in rows.values()] == [2, 2, 2, 2]
    assert [acc for _, acc, _ in rows.values()] == [0.5, 1.0, 0.0, 1.0]
    assert [average for _, _, average in rows.values()] == pytest.approx([0.5, 0.7, 0.3, 0.6])
    count, acc, average = by_length(["one word"], [1.0])["11+ words"]
    assert count == 0 and math.isnan(acc) and math.isnan(average)


@pytest.mark.parametrize("scores, right, expected", [
    ([0.1, 0.2, 0.8, 0.9], [False, False, True, True], 1.0),
    ([0.1, 0.2, 0.8, 0.9], [True, True, False, False], 0.0),
    ([0.9, 0.1, 0.5], [True, False, False], 1.0),
    ([0.3, 0.3, 0.3], [True, False, True], 0.5),  # all tie
    ([0.1, 0.4, 0.35, 0.8], [False, False, True, True], 0.75),  # three of four pairs in order
    ([0.5, 0.5, 0.7], [True, False, False], 0.25),  # one tie, one wrong
])
def test_auroc(scores, right, expected):
    assert auroc(scores, right) == pytest.approx(expected)


def test_auroc_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 8, (60,), generator=generator).tolist()  # many ties
    right = (torch.rand(60, generator=generator) < 0.4).tolist()
    pairs = [(a > b) + (a == b) / 2 for a, r in zip(scores, right) if r for b, s in zip(scores, right) if not s]
    assert auroc(scores, right) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(auroc([1, 2], [True, True])) and math.isnan(auroc([1, 2], [False, False]))
