"""The five data sets of the paper, their mixture and people's own, read from the formats they are published in.

    samples = read_samples("data", "refcoco", "val")

Four formats, recognised by what is in the file (DESIGN section 6): REFER (`refs(unc).p` with `instances.json`), the
`.pth` lists of TransVG, CLIP-VG and HiVG, MDETR's JSON, and JSON lines. Pickles are read as plain data
(hivg/utils/pickles.py). What is wrong with a file is counted and left out, never silently: `Report`, printed by
`python -m hivg.data check`.
"""

import json
import os
import re
import sys
import zlib
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from hivg.data.masks import mask_of
from hivg.utils import pickles

COCO, REFERIT, FLICKR = "other/images/mscoco/images/train2014", "referit/images", "Flickr30k/flickr30k-images"
IMAGES = {"coco": COCO, "referit": REFERIT, "flickr": FLICKR}  # under the data root, as published


@dataclass(frozen=True)
class Published:
    """A data set as it is published: its names, REFER's file of it, where its pictures are, expressions by split."""

    names: tuple
    images: str
    counts: dict
    refer: tuple = ()


DATASETS = {
    "refcoco": Published(("refcoco", "unc"), COCO, {"train": 120624, "val": 10834, "testA": 5657, "testB": 5095},
                         ("refs(unc).p",)),
    "refcoco+": Published(("refcoco+", "unc+", "refcocoplus"), COCO,
                          {"train": 120191, "val": 10758, "testA": 5726, "testB": 4889}, ("refs(unc).p",)),
    "refcocog": Published(("refcocog", "gref_umd", "refcocog_umd"), COCO, {"train": 80512, "val": 4896, "test": 9602},
                          ("refs(umd).p",)),
    "refcocog_google": Published(("refcocog_google", "gref"), COCO, {"train": 85474, "val": 9536},
                                 ("refs(google).p", "refcocog/refs(google).p", "refer/refcocog/refs(google).p")),
    "referit": Published(("referit", "refclef"), REFERIT, {"train": 54127, "val": 5842, "test": 60103},
                         ("refs(berkeley).p", "refs(unc).p")),
    "flickr": Published(("flickr", "flickr30k"), FLICKR, {"train": 427193, "val": 14433, "test": 14481}),
    "mixup": Published(("mixup",), "", {"train": None, "val": None}),
}
NAMES = {name: dataset for dataset, published in DATASETS.items() for name in published.names}
SLACK = 1.0  # pixels by which a box may overshoot the picture; annotators' boxes do


@dataclass(frozen=True)
class Sample:
    image: Path
    expression: str  # as written
    box: tuple  # (xmin, ymin, xmax, ymax), floats in the picture's pixels
    segmentation: list | dict | None  # COCO polygons, or an RLE with size and counts
    image_id: str  # the picture's file name


@dataclass
class Report:
    """What was left out of a file, and why: a count and the first case of each kind."""

    source: str = ""
    problems: Counter = field(default_factory=Counter)
    first: dict = field(default_factory=dict)

    def add(self, kind, index, detail):
        self.problems[kind] += 1
        self.first.setdefault(kind, f"index {index}: {detail}")

    def lines(self):
        return [f"{self.source}: {n:,} left out, {kind} (first: {self.first[kind]})"
                for kind, n in self.problems.items()]


def canonical(dataset):
    """One of DATASETS for any of their names. Raises ValueError."""
    if dataset not in NAMES:
        raise ValueError(f"no data set {dataset!r:.60}; there are shapes, {', '.join(DATASETS)} (also as "
                         f"{', '.join(sorted(NAMES.keys() - DATASETS.keys()))}), or a .jsonl file of your own")
    return NAMES[dataset]


def read_samples(data_root, dataset, split, annotations=None, report=None):
    """All samples of a split -> list of Sample, in the order of the file.

    data_root: the folder with the published layout (README). dataset: a name (`refcoco`, `unc`, ..) or a `.jsonl` file
    of one's own, whose pictures are looked for below the data root and beside the file; where its rows name no `split`,
    one picture in ten is `val` and the rest `train`. annotations: a file, or a folder, where they are not at a
    published place; REFER's `refs(..).p` needs `instances.json` beside it. report: a Report to fill; without one its
    lines go to stderr. Raises ValueError for what cannot be read, and for a split that is not there, naming those that
    are.
    """
    own, root, quiet, report = str(dataset).endswith(".jsonl"), Path(data_root), report is not None, report or Report()
    if own:
        path = Path(dataset)
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file; give --dataset a .jsonl file or a name")
    else:
        dataset = canonical(dataset)
        path = find_file(root, dataset, split, annotations)
    rows, samples, sizes, names = rows_of(path, dataset), [], cache(picture_size), cache(names_in)
    chosen = [row for row in rows if row.split in (None, split)]
    if not chosen:
        there = sorted({row.split for row in rows if row.split}) or ["none"]
        raise ValueError(f"{path}: no split {split!r:.40}; there are {', '.join(there)}")
    report.source = f"{path}, {split}"
    for index, row in enumerate(chosen):
        try:
            samples.append(sample_of(row, root, path, sizes, names))
        except Problem as problem:
            report.add(problem.kind, index, problem.detail)
    if not quiet:
        for line in report.lines():
            print(line, file=sys.stderr)
    return samples


class Problem(Exception):
    """What is wrong with one row."""

    def __init__(self, kind, detail):
        super().__init__(kind)
        self.kind, self.detail = kind, detail


@dataclass(slots=True)
class Row:
    """One row as a format says it, not checked yet. `bbox` in `form` xyxy or xywh; `folder` of the picture below the
    data root, or None for a path of its own."""

    file: object
    expression: object
    bbox: object
    form: str = "xywh"
    folder: str | None = COCO
    segmentation: object = None
    split: str | None = None  # None: the file holds one split alone
    size: tuple | None = None  # (width, height) of the picture, where the file says it
    missing: str | None = None  # what the row could not be joined with, or what else is wrong with it


def picture_size(path):
    with Image.open(path) as image:  # reads the header alone
        return image.size


def names_in(folder):
    """The files of a folder, asked for once: a hundred thousand questions take seconds."""
    return {entry.name for entry in os.scandir(folder) if entry.is_file()} if os.path.isdir(folder) else set()


def sample_of(row, root, source, sizes, names):
    """A checked Sample. Raises Problem."""
    if row.missing:
        raise Problem("incomplete row", row.missing)
    file, expression = (pickles.plain_text(value) for value in (row.file, row.expression))
    if not isinstance(file, str) or not file:
        raise Problem("no picture named", repr(file)[:80])
    if not isinstance(expression, str) or not expression.strip():
        raise Problem("empty expression", file)
    file = file.replace("\\", "/")  # as Windows writes paths
    if row.folder is not None:
        image = root / row.folder / file
    else:  # our own file: relative to the data root, or else to the file itself
        image = next((p for p in (root / file, source.parent / file) if p.is_file()), root / file)
    folder, name = os.path.split(image)
    if name not in names(folder):
        raise Problem("missing picture", image)
    try:
        width, height = row.size or sizes(image)
    except Exception:  # Pillow's decoders raise nearly anything
        raise Problem("damaged picture", image) from None
    try:
        a, b, c, d = (float(v) for v in row.bbox)
    except (TypeError, ValueError):
        raise Problem("box that is not four numbers", f"{file}: {row.bbox!r:.60}") from None
    box = (a, b, c, d) if row.form == "xyxy" else (a, b, a + c, b + d)
    if not (box[2] > box[0] and box[3] > box[1]):  # also for nan
        raise Problem("box without area", f"{file}: {box}")
    if min(box[:2]) < -SLACK or box[2] > width + SLACK or box[3] > height + SLACK:
        raise Problem("box outside the picture", f"{file} ({width} x {height}): {box}")
    try:
        segmentation = segmentation_of(row.segmentation)
        if isinstance(segmentation, dict):  # polygons cannot be wrong in a way that hurts
            mask_of(segmentation, height, width)
    except (TypeError, ValueError, UnicodeDecodeError) as error:
        raise Problem("damaged segmentation", f"{file}: {error}") from None
    return Sample(image, expression, box, segmentation, name)


def segmentation_of(value):
    """COCO polygons or RLE as plain numbers; None for anything else (mask file names, lists of attributes)."""
    if isinstance(value, dict) and {"counts", "size"} <= value.keys():
        counts = value["counts"]
        return {"size": [int(n) for n in value["size"]],
                "counts": counts if isinstance(counts, str) else counts.decode() if isinstance(counts, bytes) else
                [int(n) for n in counts]}
    if not isinstance(value, list | tuple) or not value:
        return None
    polygons = [part.tolist() if isinstance(part, np.ndarray) else part for part in value]
    right = all(isinstance(part, list | tuple) and len(part) >= 6 and len(part) % 2 == 0
                and all(isinstance(v, int | float) for v in part) for part in polygons)
    return polygons if right else None


# ---- where things are

def find_file(root, dataset, split, annotations=None):
    """The file of annotations of a data set's split: `annotations` itself, or what is in it or under the data root at
    any of the places where it is published. Raises ValueError, naming the splits that are there."""
    published = DATASETS[dataset]
    if annotations is not None and Path(annotations).is_file():
        return Path(annotations)
    folders = [Path(annotations)] if annotations else [
        root / place / name for name in published.names for place in ("", "refer", "annotations")] + [root]
    patterns = [f"{head}{name}_{{}}.{tail}" for name in published.names
                for head, tail in (("", "pth"), ("finetune_", "json"), ("", "jsonl"))] + ["{}.jsonl"]
    for folder in folders:
        for pattern in [*(p.format(split) for p in patterns), *published.refer]:
            if (folder / pattern).is_file():
                return folder / pattern
    there = {path.stem.removeprefix(pattern.partition("{")[0]) for folder in folders for pattern in patterns
             for path in folder.glob(pattern.format("*")) if folder != root or pattern != "{}.jsonl"}
    where = annotations or root
    if there:
        raise ValueError(f"{where}: no split {split!r:.40} of {dataset}; there are {', '.join(sorted(there))}")
    files, places = [p.format(split) for p in patterns[:2]] + list(published.refer[:1]), map(str, folders[:2])
    raise ValueError(f"{where}: no annotations of {dataset}, split {split!r:.40}: no {', '.join(files)} or the like in "
                     f"{', '.join(places)} or the like; give --data_root or --annotations")


# ---- the formats

def rows_of(path, dataset):
    """The rows of a file in any of the formats. Raises ValueError."""
    try:
        with open(path, "rb") as file:
            start = file.readline(1 << 20)
        if start.lstrip()[:1] not in (b"{", b"["):
            data = pickles.read(path)
            if not isinstance(data, list) or not data:
                raise ValueError("no list of rows in it")
            return refer_rows(path, data, dataset) if isinstance(data[0], dict) else list_rows(data, dataset)
        if "image" in (object_of(start) or {}):
            return own_rows(path, dataset)
        data = json.loads(path.read_text("utf-8"))
        if isinstance(data, dict) and {"images", "annotations"} <= data.keys():
            return mdetr_rows(data)
        raise ValueError("JSON, but neither MDETR's (images and annotations) nor a line for each expression with its "
                         "image, expression and bbox")
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"no {error} in it" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: cannot be read as annotations: {reason}") from None


def object_of(line):
    """The JSON object that is this line, or None."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def refer_rows(path, refs, dataset):
    """REFER: a list of dicts, each with its sentences, joined with the boxes of instances.json beside it."""
    beside = path.with_name("instances.json")
    if not beside.is_file():
        raise ValueError(f"a REFER file needs {beside}, which holds its boxes")
    instances = json.loads(beside.read_text("utf-8"))
    boxes = {str(a["id"]): a for a in instances["annotations"]}  # ids are numbers in one file and text in another
    pictures = {str(i["id"]): i for i in instances.get("images", [])}
    rows = []
    for ref in refs:
        box = boxes.get(str(ref["ann_id"]))
        picture = pictures.get(str(ref["image_id"]), {})
        file = picture.get("file_name") or re.sub(r"_\d+(\.\w+)$", r"\1", ref["file_name"])
        missing = None if box else f"ann_id {ref['ann_id']} of ref_id {ref.get('ref_id')} is not in {beside.name}"
        for sentence in ref["sentences"]:
            rows.append(Row(file, sentence.get("sent") or sentence.get("raw"), box and box["bbox"], "xywh",
                            DATASETS[dataset].images, box and box.get("segmentation"), ref["split"],
                            size_of(picture), missing))
    return rows


def list_rows(data, dataset):
    """The published `.pth`: (file, bbox, phrase), or (file, second, bbox, phrase, fifth). The mixture's second says
    where a picture is; the fifth holds attributes in one generation of the files, polygons or an RLE in the other."""
    form = "xyxy" if dataset in ("referit", "flickr") else "xywh"
    rows = []
    for fields in data:
        if not isinstance(fields, list | tuple) or len(fields) not in (3, 5):
            rows.append(Row(None, None, None, missing=f"{fields!r:.60} is not of 3 or 5 fields"))
            continue
        file, second, bbox, phrase, fifth = fields if len(fields) == 5 else (fields[0], None, *fields[1:], None)
        folder = DATASETS[dataset].images
        if dataset == "mixup":
            folder = IMAGES.get(second, COCO) if isinstance(second, str) else COCO
        rows.append(Row(file, phrase, bbox, form, folder, fifth, size=size_of(second)))
    return rows


def size_of(record):
    """(width, height) as a dict of the published files says it, or None."""
    if not isinstance(record, dict):
        return None
    size = record.get("width"), record.get("height")
    return size if all(isinstance(n, int | float) and n > 0 for n in size) else None


def mdetr_rows(data):
    """MDETR: one COCO image record for each expression, with one annotation."""
    boxes = {}
    for annotation in data["annotations"]:
        boxes.setdefault(annotation["image_id"], annotation)
    rows = []
    for record in data["images"]:
        box = boxes.get(record["id"])
        missing = None if box else f"image {record['id']} has no annotation"
        rows.append(Row(record["file_name"], record["caption"], box and box["bbox"], "xywh", COCO,
                        box and box.get("segmentation"), size=size_of(record), missing=missing))
    return rows


def own_rows(path, dataset):
    """JSON lines: {"image", "expression", "bbox": [xmin, ymin, xmax, ymax]}, if wanted "segmentation" and "split"."""
    rows, published = [], DATASETS.get(dataset)
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        row = object_of(line)
        if row is None:
            rows.append(Row(None, None, None, missing=f"line {number} is not a JSON object: {line:.60}"))
            continue
        rows.append(Row(row.get("image"), row.get("expression"), row.get("bbox"), "xyxy",
                        published.images if published else None, row.get("segmentation"), row.get("split")))
    if not published and not any(row.split for row in rows):
        for row in rows:  # by the picture's name, so that no picture is on both sides
            row.split = "val" if zlib.crc32(str(row.file).encode(errors="replace")) % 10 == 0 else "train"
    return rows


# ---- the report of a whole data set

def check(data_root, dataset, annotations=None):
    """What `python -m hivg.data check` prints: by split the expressions beside the published number, what was left out
    and why, and the training pictures that are also in a val or test split, for the mixture those of its parts too."""
    own, lines, pictures = str(dataset).endswith(".jsonl"), [], {}
    names = [dataset] if own else [canonical(dataset)]
    if names == ["mixup"]:
        names += [name for name in DATASETS if name != "mixup"]
    for name in names:
        splits = dict.fromkeys(row.split for row in rows_of(Path(name), name)) if own else DATASETS[name].counts
        for split, published in splits.items():
            report = Report()
            try:
                samples = read_samples(data_root, name, split, annotations, report)
            except ValueError as error:
                if name == names[0]:
                    lines.append(str(error))
                continue
            pictures[name, split] = {s.image_id for s in samples}
            beside = f" ({published:,} published)" if published else ""
            lines.append(f"{name} {split}: {len(samples):,} expressions{beside}, "
                         f"{len(pictures[name, split]):,} pictures")
            lines += report.lines()
    for (name, split), seen in pictures.items():
        if (name, split) != (names[0], "train") and split != "train":
            both = pictures.get((names[0], "train"), set()) & seen
            lines.append(f"pictures of {names[0]} train in {name} {split}: {len(both):,}"
                         + (f", for instance {min(both)}" if both else ""))
    return "\n".join(lines)
