"""Evaluation: accuracy of a weights file on a data set, or the comparison of two evaluations.

    python -m hivg.evaluate --weights FILE --dataset NAME --split SPLIT [--data_root DIR]
        [--per_sample FILE.jsonl] [--sheet FILE.png]
    python -m hivg.evaluate --weights FILE --split val --calibrate OUT.safetensors
    python -m hivg.evaluate --compare A.jsonl B.jsonl         two files of --per_sample

Prints Acc@0.5 with its 95 % interval, Acc@0.6 to 0.9, mean IoU, mask IoU where there are masks, and all by expression
length. IoU is of float boxes in the original image's pixels; every sample counts once. For the drawn data set it also
prints the accuracy of guessing the largest or a random object, and of the model with the expressions shuffled among
the images. --calibrate writes the weights with a calibration, which makes their score the probability that a box is
right, as on this split; with calibrated weights the calibration error on the split is printed too.
"""

import json
import os
import sys
import time
from pathlib import Path

from PIL import Image

from hivg.data.batches import evaluation_batches, open_dataset
from hivg.data.published.check import splits_of
from hivg.evaluate.calibration import calibrated, calibration_of, fit_calibration
from hivg.evaluate.compare import compare
from hivg.evaluate.metrics import accuracy
from hivg.evaluate.predict import predict
from hivg.evaluate.report import guessers, report, sheet, shuffled
from hivg.utils.cli import Parser, Progress, add_machine_flags, choose_device, choose_dtype, fail, run
from hivg.utils.messages import quoted, shown
from hivg.weights import build, bundled, load_hivg, need_tokenizer, read, save

DEFAULT_SPLITS = ("test", "testA", "val")  # without --split, the first of these that the data set has


def arguments():
    parser = Parser(description=__doc__)
    parser.add_argument("--weights", default=str(bundled("hivg-tiny.safetensors")), metavar="FILE", help="a HiVG")
    parser.add_argument("--dataset", default="shapes", help="shapes, a data set of the paper, or a .jsonl file")
    parser.add_argument("--split", help=f"of shapes: {', '.join(splits_of('shapes'))}; default: the first of "
                        f"{', '.join(DEFAULT_SPLITS)} that the data set has, with --calibrate val")
    parser.add_argument("--data_root", metavar="DIR", help="default: data")
    parser.add_argument("--annotations", metavar="FILE", help="a file or folder, if not at a published place")
    parser.add_argument("--per_sample", metavar="FILE.jsonl", help="write a JSON object per expression")
    parser.add_argument("--sheet", metavar="FILE.png", help="draw the worst samples and some random ones")
    parser.add_argument("--calibrate", metavar="OUT.safetensors", help="write the weights, calibrated on this split")
    parser.add_argument("--compare", nargs=2, metavar=("A.jsonl", "B.jsonl"), help="two files of --per_sample")
    parser.add_argument("--batch_size", type=int, default=64, help="expressions per batch; default: 64")
    parser.add_argument("--workers", type=int, default=-1, help="processes that read images (default: automatic)")
    add_machine_flags(parser)
    args = parser.parse_args()
    if not 1 <= args.batch_size <= 4096:
        parser.error(f"--batch_size must be from 1 to 4096, not {quoted(args.batch_size)}")
    if not -1 <= args.workers <= 256:
        parser.error(f"--workers must be from -1 (automatic) to 256, not {quoted(args.workers)}")
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
    """Before any work: exit with one line if an output cannot be written, or is one of the inputs."""
    inputs = [args.dataset, args.annotations, args.weights]
    outputs = [path for path in (args.per_sample, args.sheet, args.calibrate) if path]
    for path in outputs:
        try:
            is_new = not os.path.exists(path)
            open(path, "ab").close()  # keeps the content
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
                continue  # it may replace the weights
            if other and os.path.exists(other) and os.path.exists(path) and os.path.samefile(other, path):
                fail(f"{shown(path)}: would be replaced while it is read; name another file to write")
    if args.sheet and Image.registered_extensions().get(Path(args.sheet).suffix.lower()) not in Image.SAVE:
        fail(f"{shown(args.sheet)}: no kind of image has this suffix; name a .png")


def choose_split(args):
    """The split to evaluate where none is given, told on stderr. Raises ValueError."""
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
    """Write --weights to --calibrate with the calibration, in their stored dtype. Raises ValueError and OSError."""
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
    sys.stdout.reconfigure(errors="backslashreplace")  # for terminals that lack an expression's letters
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
