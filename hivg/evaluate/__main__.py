"""Evaluation: accuracy of a weights file on a data set, or a comparison of two evaluations.

    python -m hivg.evaluate --weights FILE --dataset NAME --split SPLIT [--data_root DIR]
        [--per_sample FILE.jsonl] [--sheet FILE.png]
    python -m hivg.evaluate --weights FILE --split val --calibrate OUT.safetensors
    python -m hivg.evaluate --compare A.jsonl B.jsonl         two files written by --per_sample

Prints Acc@0.5 with its 95 % interval, Acc@0.6 to 0.9, mean IoU, mask IoU where there are masks, and accuracy and mean
IoU by expression length. IoU is between float boxes in pixels of the original image; every sample counts once. On the
drawn data sets it also prints the accuracy of guessing the largest or a random object, and of the model with the
expressions shuffled among the images. Expressions that are true of nothing are counted apart: how many are scored below
0.5. --calibrate fits two numbers that turn the score into the probability that a box is right, and writes the weights
file with them; for calibrated weights a reliability table and the mean score of each kind are printed as well.
"""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

from hivg.data.batches import evaluation_batches, open_dataset
from hivg.data.drawn.scenes import DRAWN
from hivg.data.published.catalogue import DATA_ROOT
from hivg.data.published.check import splits_of
from hivg.data.published.reading import images_of, is_own, read_dataset
from hivg.evaluate.calibration import calibrated, calibration_of, fit_calibration
from hivg.evaluate.compare import compare
from hivg.evaluate.known import DRAWN_ONLY, knows_drawn_only, unknown_words
from hivg.evaluate.metrics import accuracy, present
from hivg.evaluate.predict import predict
from hivg.evaluate.report import guessers, report, sheet, shuffled
from hivg.tokenizer import split_words
from hivg.utils.cli import Parser, Progress, add_machine_flags, choose_device, choose_dtype, name_of, run
from hivg.utils.files import file_id, image_format, refuse_to_replace, save_image, write_whole, written
from hivg.utils.messages import quoted, shown
from hivg.weights import build, bundled, load_hivg, located, need_tokenizer, read, save

DEFAULT_SPLITS = ("test", "testA", "val")  # without --split, the first of these that the data set has


def arguments():
    drawn = {dataset: splits_of(dataset) for dataset in DRAWN}
    parser = Parser(description=__doc__)
    parser.add_argument("--weights", default=str(bundled("hivg-tiny.safetensors")), metavar="FILE",
                        help="a HiVG weights file")
    parser.add_argument("--dataset", default="shapes-wide", help="shapes-wide, shapes, a data set of the paper, or "
                        "your own .jsonl or .json file")
    parser.add_argument("--split", help=f"of shapes: {', '.join(drawn['shapes'])}; of shapes-wide: "
                        f"{', '.join(drawn['shapes-wide'])}; default: the first of {', '.join(DEFAULT_SPLITS)} that "
                        "the data set has, with --calibrate val")
    parser.add_argument("--data_root", default=DATA_ROOT, metavar="DIR", help="folder of the data sets; default: data")
    parser.add_argument("--annotations", metavar="FILE", help="a file or folder, if not at its published place")
    parser.add_argument("--per_sample", metavar="FILE.jsonl", help="write a line of JSON for each expression")
    parser.add_argument("--sheet", metavar="FILE.png", help="draw the most confident mistakes and some random samples")
    parser.add_argument("--calibrate", metavar="OUT.safetensors", help="write the weights file with its score "
                        "calibrated on this split")
    parser.add_argument("--compare", nargs=2, metavar=("A.jsonl", "B.jsonl"), help="compare two files of "
                        "--per_sample")
    parser.add_argument("--batch_size", type=int, default=64, help="expressions in one forward pass; default: 64")
    parser.add_argument("--workers", type=int, default=-1, help="processes that read images; default: -1 = automatic")
    add_machine_flags(parser)
    args = parser.parse_args()
    args.outputs = list(filter(None, (args.per_sample, args.sheet, args.calibrate)))
    if not 1 <= args.batch_size <= 4096:
        parser.error(f"--batch_size must be from 1 to 4096, not {quoted(args.batch_size)}")
    if not -1 <= args.workers <= 256:
        parser.error(f"--workers must be from 0 to 256, or -1 = automatic, not {quoted(args.workers)}")
    if args.data_root != parser.get_default("data_root") and not os.path.isdir(args.data_root):
        parser.error(f"--data_root {shown(args.data_root)}: there is no such folder; name the one with the data sets")
    if args.calibrate and not args.calibrate.endswith(".safetensors"):
        parser.error(f"--calibrate {shown(args.calibrate)}: it writes a weights file; name it OUT.safetensors")
    if args.compare and args.outputs:
        parser.error("--compare writes no file; leave out --per_sample, --sheet and --calibrate")
    if args.dataset in DRAWN and args.split and args.split not in drawn[args.dataset]:
        parser.error(f"{args.dataset} has no split {quoted(args.split)} to evaluate on; it has "
                     f"{', '.join(drawn[args.dataset])}")
    check_outputs(args)
    return args


def check_outputs(args):
    """Raises ValueError, before any work, for a file that cannot be written or would replace one that is read."""
    read_from = located(args.weights)
    names = list(map(os.path.realpath, args.outputs))
    for path in args.outputs:
        if Path(path).is_fifo():  # whoever reads it takes the first end for the end of the file
            continue
        is_new = not os.path.exists(path)
        try:
            open(path, "ab").close()  # keeps the content
        except OSError as error:
            raise ValueError(f"{shown(path)}: cannot be written ({error.strerror}); name a file in an existing "
                             "folder") from None
        if is_new:
            os.unlink(os.path.realpath(path))  # of a link that leads nowhere: what was made behind it
        if names.count(os.path.realpath(path)) > 1:
            raise ValueError(f"{shown(path)}: named twice; give --per_sample, --sheet and --calibrate different files")
        if path == args.calibrate and not is_new and file_id(path) != file_id(read_from):
            raise ValueError(f"{shown(path)}: exists already; name a new file, or that of --weights")
        inputs = [args.dataset, args.annotations or ""] + [read_from] * (path != args.calibrate)
        refuse_to_replace(inputs, [path], "name another file to write", "file that is read")
    if args.sheet:
        image_format(args.sheet)


def refuse_to_replace_data(args):
    """Raises ValueError for a file to be written that is an annotation file, or an image of any split that it holds."""
    outputs = list(filter(os.path.exists, args.outputs))
    if not outputs:
        return
    advice = "name another file to write"
    path, rows = read_dataset(args.data_root, args.dataset, args.split, args.annotations)
    refuse_to_replace([path, path.with_name("instances.json")], outputs, advice, "annotations")
    refuse_to_replace(images_of(rows, Path(args.data_root), path, is_own(args.dataset)), outputs, advice)


def choose_split(args):
    """The split to evaluate on where none is given; prints it on stderr. Raises ValueError."""
    splits = splits_of(args.dataset, args.data_root, args.annotations)
    if not splits:
        raise ValueError(f"{shown(args.dataset, 150)}: has no expressions; `python -m hivg.data check` says why")
    if args.calibrate and "val" not in splits:  # `test` is not for fitting
        raise ValueError(f"{shown(args.dataset, 150)}: no val to calibrate on; give --split, of "
                         f"{shown(', '.join(splits), 80)}")
    usual = [split for split in (("val",) if args.calibrate else DEFAULT_SPLITS) if split in splits]
    others = [split for split in splits if split != "train"]
    split = (usual or others or splits)[0]
    others = shown(", ".join(splits), 150)
    print(f"evaluating the split {shown(split, 40)} (the data set has {others})", file=sys.stderr)
    return split


def evaluate(args, model, dataset, device, dtype):
    """Evaluate --weights on --dataset -> (its rows, the lines of the report, the error of --calibrate or None)."""
    total = len(dataset) * dataset.rows

    def predictions(what, expressions=None):
        batches = evaluation_batches(dataset, args.batch_size, args.workers, device=device)
        return predict(model, batches, device, expressions, Progress(what, total), masks=expressions is None)

    calibration = None if args.calibrate else calibration_of(model.info, args.weights)
    start = time.monotonic()
    rows = predictions("evaluated")
    seconds = time.monotonic() - start
    problem = None
    if args.calibrate:
        try:
            fitted = fit_calibration([row["score"] for row in rows], [row["iou"] >= 0.5 for row in rows])
            save_calibrated(args, fitted, len(rows))
            calibration = fitted
        except (ValueError, OSError) as error:
            problem = error  # raised once the report is printed
    if calibration:
        for row in rows:
            row["score"] = calibrated(row["score"], *calibration)
    for line in doubts(model, args.dataset, rows):
        print(f"warning: {line}", file=sys.stderr)
    lines = [f"{shown(args.weights, 300)} on {shown(args.dataset, 300)} {shown(args.split)} in {name_of(dtype)}, "
             f"{total / seconds:.0f} expressions a second", report(rows, calibration is not None)]
    if args.dataset in DRAWN and present(rows):
        moved = predictions("evaluated shuffled", shuffled(rows))
        others = {"expressions shuffled": accuracy(row["iou"] for row in present(moved))} | guessers(dataset.shapes)
        lines.append("for comparison, Acc@0.5: " + ", ".join(f"{name} {value:.4f}" for name, value in others.items()))
    return rows, lines, problem


def doubts(model, dataset, rows):
    """What the model was never taught of a data set, a list of lines."""
    lines = [DRAWN_ONLY] if knows_drawn_only(model) and dataset not in DRAWN else []
    said = [set(split_words(row["expression"])) for row in rows]
    unknown = set(unknown_words(model, " ".join(sorted(set().union(*said)))))
    counts = Counter(word for words in said for word in words & unknown)
    if counts:
        words = ", ".join(quoted(word) for word, _ in counts.most_common(5))
        lines.append(f"{sum(bool(words & unknown) for words in said)} of {len(rows)} expressions have words that these "
                     f"weights were never taught; most often {words}")
    return lines


def save_calibrated(args, calibration, count):
    """Write --weights to --calibrate with the calibration, in the dtype it is stored in. Raises ValueError, OSError."""
    file = read(args.weights)
    dtypes = {tensor.dtype for tensor in file.tensors.values()}
    model = build(args.weights, file)
    on = {"dataset": Path(args.dataset).name, "split": args.split, "expressions": count}
    info = model.info | {"score_calibration": calibration, "score_calibrated_on": on}
    save(args.calibrate, model, info, dtypes.pop() if len(dtypes) == 1 else None)
    a, b = calibration
    print(f"{shown(args.calibrate)} written, its score s as sigmoid({a:.4f} logit(s) {b:+.4f})", file=sys.stderr)


def save_rows(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device, as /dev/stdout
        with written(path):
            Path(path).write_text(text)
    else:
        target = os.path.realpath(path) if os.path.islink(path) else path
        write_whole(Path(target), lambda part: part.write_text(text))


def main():
    args = arguments()
    if args.compare:
        print(compare(*args.compare))
        return
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    model = load_hivg(args.weights)
    need_tokenizer(model, args.weights)
    model = model.for_prediction(device, dtype)
    args.split = args.split or choose_split(args)
    dataset = open_dataset(args.dataset, args.split, model.config.clip.image_size, model.config.normalization,
                           data_root=args.data_root, annotations=args.annotations, masks="segmentation")
    if args.dataset not in DRAWN:
        refuse_to_replace_data(args)
    rows, lines, problem = evaluate(args, model, dataset, device, dtype)
    try:
        if args.per_sample:  # files first: whoever reads the output may stop
            save_rows(args.per_sample, rows)
        if args.sheet:
            save_image(sheet(dataset, rows), args.sheet)
    finally:  # also where the disk is full
        print("\n".join(lines))
    if problem:
        raise problem


if __name__ == "__main__":
    run(main, lower="lower --batch_size or --workers, or make the largest images smaller")
