"""The report of an evaluation: its text, its sheet of samples, and baselines that do no grounding."""

import random

import numpy as np
import torch

from hivg.boxes import iou
from hivg.data.drawn.drawing import boxes_of
from hivg.data.drawn.expressions import KINDS
from hivg.data.drawn.scenes import EXPRESSIONS_PER_SCENE
from hivg.evaluate.calibration import RECOMMENDED, reliability_lines
from hivg.evaluate.metrics import accuracy, auroc, by_length, interval, mean, present
from hivg.utils.draw import contact_sheet, draw_boxes

SHEET = 8  # worst samples on a contact sheet, and as many random ones


def report(rows, is_calibrated=False):
    """The rows of `predict` -> the text of an evaluation. is_calibrated: whether to include a reliability table, and
    the mean score of each kind, which should be near its accuracy."""
    there = present(rows)
    lines = accuracy_lines(there, is_calibrated) if there else []
    for kind, group in grouped([row for row in rows if row.get("target", ()) is None], "kind").items():
        low = mean(row["score"] < RECOMMENDED for row in group)
        lines.append(f"  {kind:<14}{len(group):>6} expressions true of nothing, {low:.4f} score below 0.5"
                     + mean_score(group) * is_calibrated)
    right = [row["iou"] >= 0.5 for row in rows]  # no box is right where nothing is there
    scores = [row["score"] for row in rows]
    if any(right) and not all(right):  # else there is nothing to tell apart
        lines.append(f"score tells right from wrong boxes: AUROC {auroc(scores, right):.3f} (0.5 = not at all)")
    if is_calibrated:
        kept = []
        for name, wanted in (("right boxes", True), ("wrong boxes", False)):
            if wanted in right:
                share = mean(s >= RECOMMENDED for s, r in zip(scores, right) if r == wanted)
                kept.append(f"{share:.4f} of the {name}")
        lines.append(f"score of {RECOMMENDED} or more: {', '.join(kept)}")
        lines += reliability_lines(scores, right)
    return "\n".join(lines)


def mean_score(rows):
    return f", mean score {mean(row['score'] for row in rows):.3f}"


def accuracy_lines(rows, is_calibrated):
    """How often the boxes are right, of expressions that are true of something: in all, by length, kind and rank."""
    ious = [row["iou"] for row in rows]
    acc = accuracy(ious)
    low, high = interval(acc, len(ious))
    stricter = ", ".join(f"Acc@{t} {accuracy(ious, t):.4f}" for t in (0.6, 0.7, 0.8, 0.9))
    masked = [row["mask_iou"] for row in rows if "mask_iou" in row]
    if masked:
        stricter += f", mask IoU {mean(masked):.4f} of {len(masked)}"
    lines = [
        f"Acc@0.5 {acc:.4f} (95 % interval {low:.4f} to {high:.4f}), mean IoU {mean(ious):.4f}, "
        f"{len(rows)} expressions",
        stricter,
    ]
    groups = by_length([row["expression"] for row in rows], ious)
    kinds = grouped(rows, "kind")
    for kind, group in kinds.items():
        ious = [row["iou"] for row in group]
        groups[kind] = (len(ious), accuracy(ious), mean(ious))
    for name, (count, group_acc, group_iou) in groups.items():
        if count:
            lines.append(f"  {name:<14}{count:>6} expressions, Acc@0.5 {group_acc:.4f}, mean IoU {group_iou:.4f}"
                         + (mean_score(kinds[name]) if is_calibrated and name in kinds else ""))
    ranks = sorted(grouped(rows, "detail").items(), key=lambda item: item[0].split()[::-1])  # "3 of 5": by the 5, the 3
    if ranks:
        lines.append("Acc@0.5 by rank and number: " + ", ".join(
            f"{rank} {accuracy(row['iou'] for row in group):.3f} of {len(group)}" for rank, group in ranks))
    return lines


def grouped(rows, key):
    """{value: its rows}, of the rows that have one; the kinds in the order of KINDS, others in that of the alphabet."""
    groups = {value: [] for value in KINDS}
    for row in sorted(rows, key=lambda row: row.get(key, "")):
        groups.setdefault(row.get(key, ""), []).append(row)
    return {value: group for value, group in groups.items() if value and group}


def sheet(dataset, rows):
    """The SHEET worst samples and as many random others on one PIL image, at most one of an image, each with the box
    wanted and the one found. The worst are the surest mistakes: wrong boxes, and boxes of nothing, by their score."""
    wrong = [number for number, row in enumerate(rows) if row["iou"] < 0.5]  # 0 where nothing is there
    surest = sorted(wrong, key=lambda number: -rows[number]["score"])
    at_random = random.Random(0).sample(range(len(rows)), len(rows))
    picked = {}  # {image: (why, number)}
    for why, numbers in (("worst", surest), ("random", at_random)):
        most = len(picked) + SHEET
        for number in numbers:
            if len(picked) < most:
                picked.setdefault(rows[number]["image_id"], (why, number))
    tiles = [sheet_tile(dataset, rows, number) for _, number in picked.values()]
    return contact_sheet(tiles, [f"{why}: {rows[number]['expression']}" for why, number in picked.values()])


def sheet_tile(dataset, rows, number):
    row = rows[number]
    if not row["target"]:
        return draw_boxes(dataset.image(number), [row["box"]], ["nothing there, score"], scores=[row["score"]])
    labels = ["wanted", f"found, IoU {row['iou']:.2f}, score"]
    return draw_boxes(dataset.image(number), [row["target"], row["box"]], labels, scores=[None, row["score"]])


def guessers(shapes):
    """Acc@0.5 of guessing without language on a drawn split -> {"largest object": of always taking the object
    with the most visible pixels, "random object": expected, of taking any of the image's objects}."""
    largest = []
    at_random = []
    for index in range(len(shapes)):
        item = shapes[index]
        n = int(item["labels"].max())
        boxes = torch.from_numpy(boxes_of(item["labels"], range(n)))  # (n, 4)
        visible = np.bincount(item["labels"].ravel())[1:]  # (n,) pixels; label 0 is the background
        for target in torch.from_numpy(item["boxes"]):
            if not target.any():
                continue  # nothing is meant
            right = iou(boxes, target) >= 0.5  # (n,)
            largest.append(right[int(visible.argmax())].item())
            at_random.append(right.float().mean().item())
    return {"largest object": mean(largest), "random object": mean(at_random)}


def shuffled(rows):
    """The expressions of the rows of a drawn split, each moved to another image, half the split further on."""
    texts = [row["expression"] for row in rows]
    scenes = len(texts) // EXPRESSIONS_PER_SCENE
    shift = scenes // 2 * EXPRESSIONS_PER_SCENE  # whole images: none keeps one of its own expressions
    return texts[shift:] + texts[:shift]
