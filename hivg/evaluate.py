"""Evaluation: accuracy of a weights file on a data set, or the comparison of two evaluations.

    python -m hivg.evaluate --weights FILE --dataset NAME --split SPLIT [--data_root DIR]
        [--per_sample FILE.jsonl] [--sheet FILE.png]
    python -m hivg.evaluate --compare A.jsonl B.jsonl         two files of --per_sample

Prints Acc@0.5 with its 95 % interval, Acc@0.6 to 0.9, mean IoU, mask IoU where there are masks, and all by expression
length. IoU is of float boxes in the original image's pixels, every sample counted once. For the bundled data set it
also prints the accuracy of guessing the largest or a random object, and of the model with the expressions shuffled
among the images.
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
from hivg.data.shapes import EXPRESSIONS_PER_SCENE, SPLITS, boxes_of
from hivg.metrics import accuracy, auroc, by_length, interval, mcnemar, mean
from hivg.utils.cli import Parser, Progress, choose_device, choose_dtype, fail
from hivg.utils.draw import contact_sheet, draw_boxes
from hivg.weights import load_hivg, need_tokenizer

DTYPES = ("auto", "float32", "bfloat16")
FINITE = [split for split, (scenes, _) in SPLITS.items() if scenes < 2**40]  # the others are endless
SHEET = 8  # worst samples on a contact sheet, and as many at random


# ---- predictions

@torch.no_grad()
def predict(model, batches, device="cpu", expressions=None, progress=None, masks=False):
    """Ground every row of the batches: -> list of {"image", "expression", "kind", "image_id", "box", "target", "iou",
    "score"}, boxes (xmin, ymin, xmax, ymax) in the original image's pixels, floats. The model is left in the mode it
    was in.

    expressions: as many texts to use instead of the batches' own, in their order. progress: called with the number of
    rows done. masks: also "mask_iou", for the rows that have a mask, in the model's square. Raises ValueError for a
    model whose boxes are not numbers.
    """
    rows = []
    was_training = model.training
    model.eval()
    for batch in batches:
        texts = batch["expressions"]
        if expressions:
            texts = expressions[len(rows) : len(rows) + len(texts)]
        rows += predict_batch(model, batch, texts, device, masks)
        if progress:
            progress(len(rows))
    model.train(was_training)
    return rows


def predict_batch(model, batch, texts, device, masks):
    """The rows of `predict` for one batch."""
    images = batch["images"].to(device)  # (B, 3, S, S)
    padding = batch["padding_mask"].to(device)  # (B, S, S)
    token_ids = model.tokenizer(texts).to(device)  # (B, T)
    with_mask = masks and bool(batch["has_mask"].any())
    output = model(images, padding, token_ids, with_mask=with_mask)
    boxes, scores = model.boxes_and_scores(output)
    if with_mask:
        overlaps = mask_iou(output.mask_logits.float().cpu(), batch["masks"])  # (B,)
    rows = []
    for i, text in enumerate(texts):
        box = batch["letterboxes"][i].boxes_to_image(boxes[i])  # (4,)
        target = batch["pixel_boxes"][i]
        row = {
            "image": batch["image_names"][i],
            "expression": text,
            "kind": batch["kinds"][i],
            "image_id": int(batch["image_ids"][i]),
            "box": box.tolist(),
            "target": target.tolist(),
            "iou": iou(box, target).item(),
            "score": scores[i],
        }
        if with_mask and batch["has_mask"][i]:
            row["mask_iou"] = overlaps[i].item()
        rows.append(row)
    return rows


def mask_iou(logits, masks):
    """Logits (B, 1, h, w) against masks (B, S, S) bool -> IoU (B,).

    As in the released code: (sigmoid - 0.5), not below 0, is resized to the mask's size; pixels above 0 count."""
    found = (logits.sigmoid() - 0.5).clamp(min=0)
    found = F.interpolate(found, masks.shape[1:], mode="bilinear")[:, 0] > 0  # (B, S, S)
    both = (found & masks).flatten(1).sum(1)  # (B,)
    either = (found | masks).flatten(1).sum(1)
    return both / either.clamp(min=1)


# ---- comparisons that need no grounding

def guessers(shapes):
    """Acc@0.5 of guessing without language on a split of `shapes`: -> {"largest object": of the object with the most
    visible pixels, "random object": of any one of the image's objects, in expectation}."""
    largest = []
    at_random = []
    for index in range(len(shapes)):
        item = shapes[index]
        n = int(item["labels"].max())
        boxes = torch.from_numpy(boxes_of(item["labels"], range(n)))  # (n, 4)
        visible = np.bincount(item["labels"].ravel())[1:]  # (n,) pixels; label 0 is the background
        for target in torch.from_numpy(item["boxes"]):
            right = iou(boxes, target) >= 0.5  # (n,)
            largest.append(right[int(visible.argmax())].item())
            at_random.append(right.float().mean().item())
    return {"largest object": mean(largest), "random object": mean(at_random)}


def shuffled(rows):
    """The expressions of the rows of `shapes`, each moved to another image: half the split further."""
    texts = [row["expression"] for row in rows]
    scenes = len(texts) // EXPRESSIONS_PER_SCENE
    shift = scenes // 2 * EXPRESSIONS_PER_SCENE  # by whole images, so that none keeps one of its own
    return texts[shift:] + texts[:shift]


# ---- the report

def report(rows):
    """The text of an evaluation; rows: of `predict`."""
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
    for kind in KINDS:
        group = [row["iou"] for row in rows if row["kind"] == kind]
        groups[kind] = (len(group), accuracy(group), mean(group))
    for name, (count, group_acc, group_iou) in groups.items():
        if count:
            lines.append(f"  {name:<14}{count:>6} expressions, Acc@0.5 {group_acc:.4f}, mean IoU {group_iou:.4f}")
    if 0 < acc < 1:  # else there is nothing to tell apart
        discrimination = auroc([row["score"] for row in rows], [overlap >= 0.5 for overlap in ious])
        lines.append(f"score tells right from wrong boxes: AUROC {discrimination:.3f} (0.5 = not at all)")
    return "\n".join(lines)


def compare(path_a, path_b):
    """The text of --compare: two per-sample files of the same samples. Raises ValueError."""
    a = rows_of(path_a)
    b = rows_of(path_b)
    if not a or samples_of(a) != samples_of(b):
        raise ValueError(f"{path_a} and {path_b} are not of the same samples; evaluate both on one split")
    only_a = []  # pairs of rows that the first alone has right
    only_b = []
    for x, y in zip(a, b):
        x_right = x["iou"] >= 0.5
        y_right = y["iou"] >= 0.5
        if x_right and not y_right:
            only_a.append((x, y))
        if y_right and not x_right:
            only_b.append((x, y))
    chance = mcnemar(len(only_a), len(only_b))
    verdict = "more than chance explains" if chance < 0.05 else "chance explains it"
    lines = [
        f"Acc@0.5 {accuracy(row['iou'] for row in a):.4f} {path_a}",
        f"Acc@0.5 {accuracy(row['iou'] for row in b):.4f} {path_b}",
        f"{len(a)} samples: {len(only_a)} right in the first alone, {len(only_b)} in the second alone; the chance of a "
        f"difference as large between equals is {chance:.3g} (McNemar): {verdict}",
    ]
    for name, pairs in (("first", only_a), ("second", only_b)):
        for x, y in pairs:
            lines.append(f"  right in the {name} alone: {x['image']}: {x['expression']} "
                         f"(IoU {x['iou']:.2f}, {y['iou']:.2f})")
    return "\n".join(lines)


def samples_of(rows):
    return [(row["image"], row["expression"], row["target"]) for row in rows]


def rows_of(path):
    """The rows of a per-sample file. Raises ValueError."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        if not all(row.keys() >= {"image", "expression", "target", "iou"} for row in rows):
            raise ValueError
    except (OSError, ValueError, AttributeError):
        raise ValueError(f"{path}: not a file that --per_sample wrote; name one that it did") from None
    return rows


def sheet(dataset, rows):
    """The SHEET worst and as many random samples as one PIL image: the box wanted and the box found."""
    worst = sorted(range(len(rows)), key=lambda number: rows[number]["iou"])[:SHEET]
    at_random = random.Random(0).sample(range(len(rows)), min(SHEET, len(rows)))
    tiles = [sheet_tile(dataset, rows, number) for number in worst + at_random]
    captions = [f"worst: {rows[number]['expression']}" for number in worst]
    captions += [f"random: {rows[number]['expression']}" for number in at_random]
    return contact_sheet(tiles, captions)


def sheet_tile(dataset, rows, number):
    row = rows[number]
    if isinstance(dataset, ShapesTensors):
        image = dataset.shapes[number // dataset.rows]["image"]
    else:
        with Image.open(row["image"]) as file:
            image = file.convert("RGB")
    return draw_boxes(image, [row["target"], row["box"]], ["wanted", f"found, IoU {row['iou']:.2f}"])


# ---- the command line

def arguments():
    parser = Parser(description=__doc__)
    parser.add_argument("--weights", default="weights/hivg-tiny.safetensors", metavar="FILE", help="a HiVG")
    parser.add_argument("--dataset", default="shapes", help="shapes, a data set of the paper, or a .jsonl file")
    parser.add_argument("--split", default="test", help=f"of shapes: {', '.join(FINITE)}")
    parser.add_argument("--data_root", default="data", metavar="DIR", help="default: data")
    parser.add_argument("--annotations", metavar="FILE", help="a file or folder, if not at a published place")
    parser.add_argument("--per_sample", metavar="FILE.jsonl", help="write a JSON object a line for every expression")
    parser.add_argument("--sheet", metavar="FILE.png", help="draw the worst and some random samples")
    parser.add_argument("--compare", nargs=2, metavar=("A.jsonl", "B.jsonl"), help="two files of --per_sample")
    parser.add_argument("--batch_size", type=int, default=64, help="expressions at once; default: 64")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images; default: 0")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of weights and products; auto: bfloat16 where "
                        "the machine is fast at it")
    args = parser.parse_args()
    if args.dataset == "shapes" and args.split not in FINITE:
        fail(f"shapes has no split {args.split!r} to evaluate on; it has {', '.join(FINITE)}")
    return args


def load(args, device, dtype):
    """-> the model, its adapters merged, and the data set. Raises ValueError."""
    model = load_hivg(args.weights)
    need_tokenizer(model, args.weights)
    model = model.for_prediction(device, dtype)
    dataset = open_dataset(args.dataset, args.split, model.config.clip.image_size, model.config.normalization,
                           data_root=args.data_root, annotations=args.annotations, masks="segmentation")
    return model, dataset


def evaluate(args, model, dataset, device, dtype):
    """Print the report of --weights on --dataset -> its rows. Raises ValueError."""
    total = len(dataset) * dataset.rows
    start = time.monotonic()
    batches = evaluation_batches(dataset, args.batch_size, args.workers)
    rows = predict(model, batches, device, progress=Progress("evaluated", total), masks=True)
    seconds = time.monotonic() - start
    precision = str(dtype).removeprefix("torch.")
    print(f"{args.weights} on {args.dataset} {args.split} in {precision}, {total / seconds:.0f} expressions a second")
    print(report(rows))
    if args.dataset == "shapes":
        batches = evaluation_batches(dataset, args.batch_size, args.workers)
        moved = predict(model, batches, device, shuffled(rows), Progress("evaluated shuffled", total))
        others = {"expressions shuffled": accuracy(row["iou"] for row in moved)}
        others |= guessers(dataset.shapes)
        print("for comparison, Acc@0.5: " + ", ".join(f"{name} {value:.4f}" for name, value in others.items()))
    return rows


def open_for_writing(path):
    try:
        return open(path, "w")
    except OSError as error:
        fail(f"{path}: cannot be written ({error.strerror}); name a file in a folder that is there")


def main():
    args = arguments()
    try:
        if args.compare:
            print(compare(*args.compare))
            return
        device = choose_device(args.device)
        dtype = choose_dtype(args.dtype, device)
        model, dataset = load(args, device, dtype)
        # opened before the work, so that a path that cannot be written is refused at once
        per_sample = open_for_writing(args.per_sample) if args.per_sample else None
        rows = evaluate(args, model, dataset, device, dtype)
    except (ValueError, OSError) as error:
        fail(error)
    if per_sample:
        with per_sample:
            for row in rows:
                per_sample.write(json.dumps(row) + "\n")
    if args.sheet:
        try:
            sheet(dataset, rows).save(args.sheet)
        except (OSError, ValueError) as error:
            fail(f"{args.sheet}: cannot be written ({error}); give a .png in a folder that is there")


if __name__ == "__main__":
    main()
