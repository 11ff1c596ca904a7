"""Evaluation: accuracy of a weights file on a data set, or the comparison of two evaluations.

    python -m hivg.evaluate --weights FILE --dataset NAME --split SPLIT [--data_root DIR]
        [--per_sample FILE.jsonl] [--sheet FILE.png]
    python -m hivg.evaluate --weights FILE --split val --calibrate OUT.safetensors
    python -m hivg.evaluate --compare A.jsonl B.jsonl         two files of --per_sample

Prints Acc@0.5 with its 95 % interval, Acc@0.6 to 0.9, mean IoU, mask IoU where there are masks, and all by expression
length. IoU is of float boxes in the original image's pixels, every sample counted once. For the bundled data set it
also prints the accuracy of guessing the largest or a random object, and of the model with the expressions shuffled
among the images. --calibrate writes the weights with two numbers that make their score the chance that a box is right,
as this split has it; where weights have them, how true the score is on the split is printed as well.
"""

import json
import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from hivg.boxes import iou
from hivg.calibration import calibrated, calibration_of, fit_calibration, reliability_lines
from hivg.compare import compare
from hivg.data.batches import evaluation_batches, open_dataset, to_device
from hivg.data.check import splits_of
from hivg.data.expressions import KINDS
from hivg.data.shapes import EXPRESSIONS_PER_SCENE, boxes_of
from hivg.metrics import accuracy, auroc, by_length, interval, mean
from hivg.utils.cli import Parser, Progress, add_machine_flags, choose_device, choose_dtype, fail, run
from hivg.utils.draw import contact_sheet, draw_boxes
from hivg.utils.quote import quoted, shown
from hivg.weights import build, bundled, load_hivg, need_tokenizer, read, save

DEFAULT_SPLITS = ("test", "testA", "val")  # without --split, the first of these that the data set has
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
    # tokenised here: the texts may be others than the batch's own
    on_device = to_device(batch | {"token_ids": model.tokenizer(texts)}, model.tokenizer, device)
    with_mask = masks and bool(batch["has_mask"].any())
    output = model(on_device["images"], on_device["padding_mask"], on_device["token_ids"], with_mask=with_mask)
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

def report(rows, is_calibrated=False):
    """The text of an evaluation; rows: of `predict`. is_calibrated: whether to tell how true the scores are."""
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
    if is_calibrated:
        lines += reliability_lines([row["score"] for row in rows], [overlap >= 0.5 for overlap in ious])
    return "\n".join(lines)


def sheet(dataset, rows):
    """The SHEET worst samples and as many random others as one PIL image: the box wanted and the box found."""
    order = sorted(range(len(rows)), key=lambda number: rows[number]["iou"])
    worst = order[:SHEET]
    others = order[SHEET:]
    at_random = random.Random(0).sample(others, min(SHEET, len(others)))
    tiles = [sheet_tile(dataset, rows, number) for number in worst + at_random]
    captions = [f"worst: {rows[number]['expression']}" for number in worst]
    captions += [f"random: {rows[number]['expression']}" for number in at_random]
    return contact_sheet(tiles, captions)


def sheet_tile(dataset, rows, number):
    row = rows[number]
    return draw_boxes(dataset.image(number), [row["target"], row["box"]], ["wanted", f"found, IoU {row['iou']:.2f}"])


# ---- the command line

def arguments():
    parser = Parser(description=__doc__)
    parser.add_argument("--weights", default=str(bundled("hivg-tiny.safetensors")), metavar="FILE", help="a HiVG")
    parser.add_argument("--dataset", default="shapes", help="shapes, a data set of the paper, or a .jsonl file")
    parser.add_argument("--split", help=f"of shapes: {', '.join(splits_of('shapes'))}; default: the first of "
                        f"{', '.join(DEFAULT_SPLITS)} that the data set has, with --calibrate val")
    parser.add_argument("--data_root", metavar="DIR", help="default: data")
    parser.add_argument("--annotations", metavar="FILE", help="a file or folder, if not at a published place")
    parser.add_argument("--per_sample", metavar="FILE.jsonl", help="write a JSON object a line for every expression")
    parser.add_argument("--sheet", metavar="FILE.png", help="draw the worst and some random samples")
    parser.add_argument("--calibrate", metavar="OUT.safetensors", help="write the weights with their score calibrated "
                        "on this split")
    parser.add_argument("--compare", nargs=2, metavar=("A.jsonl", "B.jsonl"), help="two files of --per_sample")
    parser.add_argument("--batch_size", type=int, default=64, help="expressions at once; default: 64")
    parser.add_argument("--workers", type=int, default=-1, help="processes that read images; default: by the machine")
    add_machine_flags(parser)
    args = parser.parse_args()
    if not 1 <= args.batch_size <= 4096:
        parser.error(f"--batch_size must be from 1 to 4096, not {quoted(args.batch_size)}")
    if not -1 <= args.workers <= 256:
        parser.error(f"--workers must be from 0 to 256, or -1 to choose by the machine, not {quoted(args.workers)}")
    if args.data_root and not os.path.isdir(args.data_root):
        parser.error(f"--data_root {shown(args.data_root)}: there is no such folder; name the one with the data sets")
    args.data_root = args.data_root or "data"
    if args.calibrate and not args.calibrate.endswith(".safetensors"):
        parser.error(f"--calibrate {shown(args.calibrate)}: a weights file is written; name it OUT.safetensors")
    if args.compare and (args.per_sample or args.sheet or args.calibrate):
        parser.error("--compare writes no file; leave out --per_sample, --sheet and --calibrate")
    drawn = splits_of("shapes")
    if args.dataset == "shapes" and args.split and args.split not in drawn:
        parser.error(f"shapes has no split {quoted(args.split)} to evaluate on; it has {', '.join(drawn)}")
    check_outputs(args)
    return args


def check_outputs(args):
    """End with one line, before any work, if a file cannot be written or is one that is read."""
    inputs = [args.dataset, args.annotations, args.weights]
    outputs = [path for path in (args.per_sample, args.sheet, args.calibrate) if path]
    for path in outputs:
        try:
            is_new = not os.path.exists(path)
            with open(path, "ab"):  # leaves what is in it
                pass
            if is_new:
                os.unlink(path)
        except OSError as error:
            fail(f"{shown(path)}: cannot be written ({error.strerror}); name a file in a folder that is there")
        if outputs.count(path) > 1:
            fail(f"{shown(path)}: two of --per_sample, --sheet and --calibrate name it; give each a file of its own")
        if path == args.calibrate and not is_new and not os.path.samefile(path, args.weights):
            fail(f"{shown(path)}: is there already; name a new file, or that of --weights")
        for other in inputs:
            if other == args.weights and path == args.calibrate:
                continue  # it may take the place of the weights
            if other and os.path.exists(other) and os.path.exists(path) and os.path.samefile(other, path):
                fail(f"{shown(path)}: would be replaced while it is read; name another file to write")
    if args.sheet and Image.registered_extensions().get(Path(args.sheet).suffix.lower()) not in Image.SAVE:
        fail(f"{shown(args.sheet)}: no kind of image has this suffix; name a .png")


def choose_split(args):
    """A split that the data set has, where none is given; it is said on stderr. Raises ValueError."""
    splits = splits_of(args.dataset, args.data_root, args.annotations)
    if not splits:
        raise ValueError(f"{shown(args.dataset, 150)}: no expression in it; `python -m hivg.data check` says why")
    if args.calibrate and "val" not in splits:  # `test` is not for fitting
        raise ValueError(f"{shown(args.dataset, 150)}: no val to calibrate on; give --split, of "
                         f"{shown(', '.join(splits), 80)}")
    wanted = ("val",) if args.calibrate else DEFAULT_SPLITS
    usual = [split for split in wanted if split in splits]
    others = [split for split in splits if split != "train"]
    split = (usual or others or splits)[0]
    print(f"evaluating the split {shown(split, 40)} of {shown(', '.join(splits), 150)}", file=sys.stderr)
    return split


def load(args, device, dtype):
    """-> the model, its adapters merged, and the data set. Raises ValueError."""
    model = load_hivg(args.weights)
    need_tokenizer(model, args.weights)
    model = model.for_prediction(device, dtype)
    args.split = args.split or choose_split(args)
    dataset = open_dataset(args.dataset, args.split, model.config.clip.image_size, model.config.normalization,
                           data_root=args.data_root, annotations=args.annotations, masks="segmentation")
    return model, dataset


def evaluate(args, model, dataset, device, dtype):
    """Print the report of --weights on --dataset -> its rows. Raises ValueError."""
    calibration = None if args.calibrate else calibration_of(model.info, args.weights)
    total = len(dataset) * dataset.rows
    start = time.monotonic()
    batches = evaluation_batches(dataset, args.batch_size, args.workers, device=device)
    rows = predict(model, batches, device, progress=Progress("evaluated", total), masks=True)
    seconds = time.monotonic() - start
    if args.calibrate:
        calibration = fit_calibration([row["score"] for row in rows], [row["iou"] >= 0.5 for row in rows])
        save_calibrated(args, calibration, len(rows))
    if calibration:
        for row in rows:
            row["score"] = calibrated(row["score"], *calibration)
    precision = str(dtype).removeprefix("torch.")
    print(f"{shown(args.weights, 300)} on {shown(args.dataset, 300)} {shown(args.split)} in {precision}, "
          f"{total / seconds:.0f} expressions a second")
    print(report(rows, calibration is not None))
    if args.dataset == "shapes":
        batches = evaluation_batches(dataset, args.batch_size, args.workers, device=device)
        moved = predict(model, batches, device, shuffled(rows), Progress("evaluated shuffled", total))
        others = {"expressions shuffled": accuracy(row["iou"] for row in moved)}
        others |= guessers(dataset.shapes)
        print("for comparison, Acc@0.5: " + ", ".join(f"{name} {value:.4f}" for name, value in others.items()))
    return rows


def save_calibrated(args, calibration, count):
    """Write --weights to --calibrate with the two numbers, in the type that they are stored in. Raises ValueError and
    OSError."""
    file = read(args.weights)
    dtypes = {tensor.dtype for tensor in file.tensors.values()}
    model = build(args.weights, file)
    on = {"dataset": Path(args.dataset).name, "split": args.split, "expressions": count}
    info = model.info | {"score_calibration": calibration, "score_calibrated_on": on}
    save(args.calibrate, model, info, dtypes.pop() if len(dtypes) == 1 else None)
    a, b = calibration
    print(f"{shown(args.calibrate)} written, its score s as sigmoid({a:.4f} logit(s) {b:+.4f})", file=sys.stderr)


def save_rows(path, rows):
    try:
        with open(path, "w") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
    except OSError as error:
        fail(f"{shown(path)}: cannot be written ({error.strerror}); make room, or name another file")


def main():
    args = arguments()
    sys.stdout.reconfigure(errors="backslashreplace")  # the terminal may have no letters for an expression
    if args.compare:
        print(compare(*args.compare))
        return
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model, dataset = load(args, device, dtype)
    rows = evaluate(args, model, dataset, device, dtype)
    if args.per_sample:
        save_rows(args.per_sample, rows)
    if args.sheet:
        try:
            sheet(dataset, rows).save(args.sheet)
        except (OSError, ValueError) as error:
            fail(f"{shown(args.sheet)}: cannot be written ({error}); give a .png in a folder that is there")


if __name__ == "__main__":
    run(main)
