"""Evaluation: python -m hivg.evaluate --weights FILE --dataset NAME --split SPLIT [--data-root DIR]
[--per-sample FILE.jsonl] [--sheet FILE.png], or --compare A.jsonl B.jsonl of two such files.

Prints Acc@0.5 with its 95 % interval, Acc@0.6 to 0.9, mean IoU, mask IoU where there are masks, and all by expression
length. IoU is of float boxes in the original picture's pixels, every sample counted once. For the bundled data set also
what guessers of the largest and of a random object get, and what is left when the expressions are shuffled among the
pictures.
"""

import json
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from hivg.boxes import iou
from hivg.data.batches import ShapesTensors, evaluation_batches, open_dataset
from hivg.data.expressions import KINDS
from hivg.data.shapes import SPLITS, boxes_of
from hivg.metrics import accuracy, auroc, by_length, interval, mcnemar, mean
from hivg.utils.cli import Parser, Progress, choose_device, fail
from hivg.utils.draw import contact_sheet, draw_boxes
from hivg.weights import load_hivg, need_tokenizer

FINITE = [split for split, (scenes, _) in SPLITS.items() if scenes < 2**40]  # the others are endless
SHEET = 8  # worst samples on a contact sheet, and as many at random


@torch.no_grad()
def predict(model, batches, device="cpu", expressions=None, progress=None, masks=False):
    """Ground every row of the batches: -> list of {"image", "expression", "box", "target", "iou", "score", ..}, boxes
    (xmin, ymin, xmax, ymax) in the original picture's pixels, floats. The model is left in the mode it was in.

    expressions: as many texts to use instead of the batches' own, in their order. masks: also "mask_iou", for the rows
    that have a mask, in the model's square.
    """
    rows, was_training = [], model.training
    model.eval()
    for batch in batches:
        texts = expressions[len(rows) : len(rows) + len(batch["boxes"])] if expressions else batch["expressions"]
        images, padding = batch["images"].to(device), batch["padding_mask"].to(device)
        with_masks = masks and bool(batch["has_mask"].any())
        output = model(images, padding, model.tokenizer(texts).to(device), with_mask=with_masks)
        scores = model.score(output, [side // model.config.clip.patch_size for side in images.shape[-2:]]).tolist()
        boxes = output.boxes.float().cpu()
        overlaps = mask_iou(output.mask_logits.float().cpu(), batch["masks"]) if with_masks else None
        for i, letterbox in enumerate(batch["letterboxes"]):
            box, target = letterbox.boxes_to_image(boxes[i]), batch["pixel_boxes"][i]
            rows.append({"image": batch["image_names"][i], "expression": texts[i], "kind": batch["kinds"][i],
                         "image_id": int(batch["image_ids"][i]), "box": box.tolist(), "target": target.tolist(),
                         "iou": iou(box, target).item(), "score": scores[i]})
            if with_masks and batch["has_mask"][i]:
                rows[-1]["mask_iou"] = overlaps[i].item()
        if progress:
            progress(len(rows))
    model.train(was_training)
    return rows


def mask_iou(logits, masks):
    """Logits (B, 1, h, w) against masks (B, S, S) bool -> IoU (B,); as the released code: (sigmoid - 0.5), not below 0,
    is resized to the mask's size, and what is above 0 counts."""
    found = F.interpolate((logits.sigmoid() - 0.5).clamp(min=0), masks.shape[1:], mode="bilinear")[:, 0] > 0
    union = (found | masks).flatten(1).sum(1)
    return (found & masks).flatten(1).sum(1) / union.clamp(min=1)


def guessers(shapes):
    """What needs no language: -> {name: Acc@0.5} of guessing the object that shows most, and, in expectation, any one
    of the picture's objects."""
    largest, random = [], []
    for index in range(len(shapes)):
        item = shapes[index]
        n = int(item["labels"].max())
        boxes, visible = torch.from_numpy(boxes_of(item["labels"], range(n))), np.bincount(item["labels"].ravel())[1:]
        for target in torch.from_numpy(item["boxes"]):
            ious = iou(boxes, target)  # (n,)
            largest.append(ious[int(visible.argmax())].item() >= 0.5)
            random.append((ious >= 0.5).float().mean().item())
    return {"largest object": mean(largest), "random object": mean(random)}


def shuffled(rows):
    """The expressions of the rows, each moved to another picture: half the split further."""
    texts = [row["expression"] for row in rows]
    half = len(texts) // 8 * 4  # whole pictures, of 4 expressions each
    return texts[half:] + texts[:half]


def report(rows):
    """The text of an evaluation."""
    ious = [row["iou"] for row in rows]
    acc = accuracy(ious)
    low, high = interval(acc, len(ious))
    lines = [f"Acc@0.5 {acc:.4f} (95 % interval {low:.4f} to {high:.4f}), mean IoU {mean(ious):.4f}, "
             f"{len(rows)} expressions",
             ", ".join(f"Acc@{t} {accuracy(ious, t):.4f}" for t in (0.6, 0.7, 0.8, 0.9))]
    if masked := [row["mask_iou"] for row in rows if "mask_iou" in row]:
        lines[-1] += f", mask IoU {mean(masked):.4f} of {len(masked)}"
    groups = by_length([row["expression"] for row in rows], ious)
    for kind in KINDS:
        group = [row["iou"] for row in rows if row["kind"] == kind]
        groups[kind] = len(group), accuracy(group), mean(group)
    lines += [f"  {name:<14}{n:>6} expressions, Acc@0.5 {a:.4f}, mean IoU {m:.4f}"
              for name, (n, a, m) in groups.items() if n]
    tells = auroc([row["score"] for row in rows], [row["iou"] >= 0.5 for row in rows])
    return "\n".join(lines + [f"score tells right from wrong boxes: AUROC {tells:.3f} (0.5 = not at all)"])


def compare(a, b):
    """The text of --compare: two per-sample files of the same samples. Raises ValueError."""
    first, second = rows_of(a), rows_of(b)
    samples = [[(row["image"], row["expression"], row["target"]) for row in rows] for rows in (first, second)]
    if not first or samples[0] != samples[1]:
        raise ValueError(f"{a} and {b} are not of the same samples; evaluate both on one split")
    right = [[row["iou"] >= 0.5 for row in rows] for rows in (first, second)]
    only_a = [pair for *pair, x, y in zip(first, second, *right) if x and not y]
    only_b = [pair for *pair, x, y in zip(first, second, *right) if y and not x]
    chance = mcnemar(len(only_a), len(only_b))
    lines = [f"Acc@0.5 {mean(side):.4f} {name}" for side, name in zip(right, (a, b))]
    lines.append(f"{len(first)} samples: {len(only_a)} right in the first alone, {len(only_b)} in the second alone; "
                 f"the chance of a difference as large between equals is {chance:.3g} (McNemar): "
                 + ("more than chance explains" if chance < 0.05 else "chance explains it"))
    for name, group in (("first", only_a), ("second", only_b)):
        lines += [f"  right in the {name} alone: {x['image']}: {x['expression']} (IoU {x['iou']:.2f}, {y['iou']:.2f})"
                  for x, y in group]
    return "\n".join(lines)


def rows_of(path):
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        if not all(row.keys() >= {"image", "expression", "target", "iou"} for row in rows):
            raise ValueError
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"{path}: not a file that --per-sample wrote") from None
    return rows


def sheet(dataset, rows):
    """The SHEET worst and as many random samples as one picture: the box wanted and the box found."""
    def tile(number):
        row = rows[number]
        if isinstance(dataset, ShapesTensors):
            image = dataset.shapes[number // dataset.rows]["image"]
        else:
            with Image.open(row["image"]) as image:
                image = image.convert("RGB")
        return draw_boxes(image, [row["target"], row["box"]], ["wanted", f"found, IoU {row['iou']:.2f}"])

    worst = sorted(range(len(rows)), key=lambda i: rows[i]["iou"])[:SHEET]
    chosen = worst + random.Random(0).sample(range(len(rows)), min(SHEET, len(rows)))
    captions = [f"{'worst' if i < len(worst) else 'random'}: {rows[n]['expression']}" for i, n in enumerate(chosen)]
    return contact_sheet([tile(n) for n in chosen], captions)


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--weights", default="weights/hivg-tiny.safetensors", metavar="FILE")
    parser.add_argument("--dataset", default="shapes", help="shapes, a data set of the paper, or a .jsonl file")
    parser.add_argument("--split", default="test", help=f"of shapes: {', '.join(FINITE)}")
    parser.add_argument("--data-root", "--data_root", default="data", metavar="DIR", help="default: data")
    parser.add_argument("--annotations", metavar="FILE", help="a file or folder, if not at a published place")
    parser.add_argument("--per-sample", metavar="FILE.jsonl", help="write a JSON object a line for every expression")
    parser.add_argument("--sheet", metavar="FILE.png", help="draw the worst and some random samples")
    parser.add_argument("--compare", nargs=2, metavar=("A.jsonl", "B.jsonl"), help="two files of --per-sample")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    if args.dataset == "shapes" and args.split not in FINITE:
        fail(f"shapes has no split {args.split!r} to evaluate on; it has {', '.join(FINITE)}")
    try:
        if args.compare:
            return print(compare(*args.compare))
        device = choose_device(args.device)
        model = load_hivg(args.weights)
        need_tokenizer(model, args.weights)
        model = model.merged().to(device)
        dataset = open_dataset(args.dataset, args.split, model.config.clip.image_size, model.config.normalization,
                               data_root=args.data_root, annotations=args.annotations)
        per_sample = open(args.per_sample, "w") if args.per_sample else None  # refused now, not after the work
    except OSError as error:
        fail(f"{args.per_sample}: cannot be written ({error.strerror}); name a file in a folder that is there")
    except ValueError as error:
        fail(error)
    total, start = len(dataset) * dataset.rows, time.monotonic()

    def batches():
        return evaluation_batches(dataset, args.batch_size, args.workers)

    rows = predict(model, batches(), device, progress=Progress("evaluated", total), masks=True)
    seconds = time.monotonic() - start
    print(f"{args.weights} on {args.dataset} {args.split}, {total / seconds:.0f} expressions a second\n{report(rows)}")
    if args.dataset == "shapes":
        moved = predict(model, batches(), device, shuffled(rows), Progress("evaluated shuffled", total))
        others = {"expressions shuffled": accuracy(row["iou"] for row in moved), **guessers(dataset.shapes)}
        print("for comparison, Acc@0.5: " + ", ".join(f"{name} {value:.4f}" for name, value in others.items()))
    if per_sample:
        with per_sample:
            per_sample.writelines(json.dumps(row) + "\n" for row in rows)
    if args.sheet:
        try:
            sheet(dataset, rows).save(args.sheet)
        except (OSError, ValueError) as error:
            fail(f"{args.sheet}: cannot be written ({error}); give a .png in a folder that is there")


if __name__ == "__main__":
    main()
