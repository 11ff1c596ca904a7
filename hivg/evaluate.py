"""Evaluation: python -m hivg.evaluate --weights FILE --dataset NAME --split SPLIT [--per-sample FILE.jsonl]

Prints Acc@0.5 with its 95 % interval, mean IoU, and both by expression length; for the bundled data set also what
guessers of the largest and of a random object get, and what is left when the expressions are shuffled among the
pictures.
"""

import json
import time

import numpy as np
import torch

from hivg.boxes import iou
from hivg.cli import Parser, Progress, choose_device, fail
from hivg.data.batches import ShapesTensors, evaluation_batches
from hivg.data.expressions import KINDS
from hivg.data.shapes import SPLITS, boxes_of
from hivg.metrics import accuracy, auroc, by_length, interval, mean
from hivg.weights import load_hivg, need_tokenizer

FINITE = [split for split, (scenes, _) in SPLITS.items() if scenes < 2**40]  # the others are endless

@torch.no_grad()
def predict(model, batches, device="cpu", expressions=None, progress=None):
    """Ground every row of the batches: -> list of {"expression", "box", "target", "iou", "score", ..}, boxes (xmin,
    ymin, xmax, ymax) in the original picture's pixels, floats. The model is left in the mode it was in.

    expressions: as many texts to use instead of the batches' own, in their order.
    """
    rows, was_training = [], model.training
    model.eval()
    for batch in batches:
        texts = expressions[len(rows) : len(rows) + len(batch["boxes"])] if expressions else batch["expressions"]
        images, padding = batch["images"].to(device), batch["padding_mask"].to(device)
        output = model(images, padding, model.tokenizer(texts).to(device), mask=False)
        scores = model.score(output, [side // model.config.clip.patch_size for side in images.shape[-2:]]).tolist()
        boxes = output.boxes.float().cpu()
        for i, letterbox in enumerate(batch["letterboxes"]):
            box, target = letterbox.to_picture(boxes[i]), batch["pixel_boxes"][i]
            rows.append({"expression": texts[i], "kind": batch["kinds"][i], "image_id": int(batch["image_ids"][i]),
                         "box": box.tolist(), "target": target.tolist(), "iou": iou(box, target).item(),
                         "score": scores[i]})
        if progress:
            progress(len(rows))
    model.train(was_training)
    return rows


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
             f"{len(rows)} expressions"]
    groups = by_length([row["expression"] for row in rows], ious)
    for kind in KINDS:
        group = [row["iou"] for row in rows if row["kind"] == kind]
        groups[kind] = len(group), accuracy(group), mean(group)
    lines += [f"  {name:<14}{n:>6} expressions, Acc@0.5 {a:.4f}, mean IoU {m:.4f}"
              for name, (n, a, m) in groups.items() if n]
    tells = auroc([row["score"] for row in rows], [row["iou"] >= 0.5 for row in rows])
    return "\n".join(lines + [f"score tells right from wrong boxes: AUROC {tells:.3f} (0.5 = not at all)"])


def main():
    parser = Parser(description=__doc__)
    parser.add_argument("--weights", default="weights/hivg-tiny.safetensors", metavar="FILE")
    parser.add_argument("--dataset", default="shapes", choices=["shapes"])
    parser.add_argument("--split", default="test", help=", ".join(FINITE))
    parser.add_argument("--per-sample", metavar="FILE.jsonl", help="write a JSON object a line for every expression")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args()
    if args.split not in FINITE:
        fail(f"shapes has no split {args.split!r} to evaluate on; it has {', '.join(FINITE)}")
    try:
        device = choose_device(args.device)
        model = load_hivg(args.weights)
        need_tokenizer(model, args.weights)
        model = model.merged().to(device)
        per_sample = open(args.per_sample, "w") if args.per_sample else None  # refused now, not after the work
    except OSError as error:
        fail(f"{args.per_sample}: cannot be written ({error.strerror}); name a file in a folder that is there")
    except ValueError as error:
        fail(error)
    dataset = ShapesTensors(args.split, model.config.clip.image_size, model.config.normalization)
    total, start = len(dataset) * dataset.rows, time.monotonic()
    rows = predict(model, evaluation_batches(dataset), device, progress=Progress("evaluated", total))
    seconds = time.monotonic() - start
    print(f"{args.weights} on {args.dataset} {args.split}, {total / seconds:.0f} expressions a second\n{report(rows)}")
    moved = predict(model, evaluation_batches(dataset), device, shuffled(rows), Progress("evaluated shuffled", total))
    others = {"expressions shuffled": accuracy(row["iou"] for row in moved), **guessers(dataset.shapes)}
    print("for comparison, Acc@0.5: " + ", ".join(f"{name} {value:.4f}" for name, value in others.items()))
    if per_sample:
        with per_sample:
            per_sample.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
