"""The four formats of annotation files, all to the same rows, not checked yet.

A file's format is recognised by its content. Pickles are read as plain data (hivg/utils/pickles.py).
"""

import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass

from hivg.data.published.catalogue import COCO, DATASETS, IMAGE_FOLDERS
from hivg.utils import pickles
from hivg.utils.messages import quoted, shown

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MAX_SIDE = 10**6  # pixels of an image
USUAL_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
                "test": "test"}  # {what people call a split, in lower case: our name for it}


@dataclass(slots=True)
class Row:
    """One expression as a file has it; only `form` and `image_folder` can be trusted."""

    file: object = None
    expression: object = None
    bbox: object = None
    form: str = "xywh"  # or xyxy
    image_folder: str | None = COCO  # below the data root; None: `file` is a path of its own
    segmentation: object = None
    split: str | None = None  # None: the file holds one split
    size: tuple | None = None  # (width, height) of the image, where the file says it
    problem: str | None = None  # why the row is incomplete
    line: int | None = None  # of a file of lines, from 1


def read_rows(path, dataset):
    """All rows of an annotation file, a list.

    dataset: a key of catalogue.DATASETS; anything else stands for people's own data in JSON lines. Raises ValueError.
    """
    try:
        line = first_line(path)
        if dataset not in DATASETS or "image" in (json_object(line) or {}):
            return lines_rows(path, dataset)
        if line[:1] not in (b"{", b"["):
            data = pickles.read(path)
            if not isinstance(data, list) or not data:
                raise ValueError("it holds no list of rows")
            return refer_rows(path, data, dataset) if isinstance(data[0], dict) else list_rows(data, dataset)
        data = json.loads(read_text(path))
        if isinstance(data, dict) and {"images", "annotations"} <= data.keys():
            return mdetr_rows(data)
        raise ValueError("JSON, but neither MDETR's (images and annotations) nor lines with image, expression and bbox")
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else shown(error, 170)
        raise ValueError(f"{shown(path, 80)}: cannot be read as annotations: {reason}") from None


def first_line(path):
    """The first line that is not blank, as stripped bytes; at most 1 MB of it."""
    with open(path, "rb") as file:
        while line := file.readline(1 << 20):
            if line := line.removeprefix(BYTE_ORDER_MARK).strip():
                return line
    return b""


def read_text(path):
    """The whole file as text, without a byte-order mark. Raises ValueError."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("not text in UTF-8; save it with that encoding") from None


def refer_rows(path, refs, dataset):
    """REFER: a list of objects, each with its sentences; their boxes are in instances.json beside it."""
    beside = path.with_name("instances.json")
    if not beside.is_file():
        raise ValueError(f"a REFER file needs {beside.name} beside it, which has the boxes")
    instances = json.loads(read_text(beside))
    annotations = {id_of(annotation, "id"): annotation for annotation in instances["annotations"]}
    images = {id_of(image, "id"): image for image in instances.get("images", [])}
    image_folder = DATASETS[dataset].image_folder
    most = path.stat().st_size  # a pickle may refer to one list of sentences many times
    rows = []
    for ref in refs:
        annotation = annotations.get(id_of(ref, "ann_id"), {})
        image = images.get(id_of(ref, "image_id"), {})
        # REFER's own file names end in _<number of the object>
        file = image.get("file_name") or re.sub(r"_\d+(\.\w+)$", r"\1", pickles.plain_text(ref["file_name"]))
        problem = None
        if not annotation:
            problem = f"ann_id {quoted(ref['ann_id'])} of ref_id {quoted(ref.get('ref_id'))} is not in {beside.name}"
        bbox = annotation["bbox"] if annotation else None
        segmentation = annotation.get("segmentation")
        size = stated_size(image)
        split = pickles.plain_text(ref["split"])
        if not isinstance(split, str | None):
            raise ValueError(f"the split {quoted(split)} is not a name")
        if len(rows) + len(ref["sentences"]) > most:
            raise ValueError("more sentences than a file of this size can hold")
        for sentence in ref["sentences"]:
            expression = pickles.plain_text(sentence.get("sent") or sentence.get("raw"))
            rows.append(Row(file, expression, bbox, "xywh", image_folder, segmentation, split, size, problem))
    return rows


def id_of(record, name):
    """An id as text, as it is a number in one file and text in another. Raises ValueError."""
    value = record[name]
    if not isinstance(value, int | str):
        raise ValueError(f"{name} is {quoted(value)}, not a number")
    return str(value)


def list_rows(data, dataset):
    """The `.pth` lists: (file, bbox, phrase), or (file, second, bbox, phrase, fifth).

    second is a dict with the image's size, a mask's file name or, in the mixture, the image's data set; fifth is a list
    of attributes in one generation of the files, polygons or an RLE in the other.
    """
    rows = []
    for fields in data:
        if not isinstance(fields, list | tuple) or len(fields) not in (3, 5):
            rows.append(Row(problem=f"{quoted(fields)} is not of 3 or 5 fields"))
            continue
        file, second, bbox, phrase, fifth = fields if len(fields) == 5 else (fields[0], None, *fields[1:], None)
        image_folder = DATASETS[dataset].image_folder
        if dataset == "mixup":
            image_folder = IMAGE_FOLDERS.get(second, COCO) if isinstance(second, str) else COCO
        form = "xyxy" if dataset in ("referit", "flickr") else "xywh"
        rows.append(Row(pickles.plain_text(file), pickles.plain_text(phrase), bbox, form, image_folder, fifth,
                        size=stated_size(second)))
    return rows


def mdetr_rows(data):
    """MDETR: one record of a COCO image for each expression, with one annotation."""
    annotations = {}
    for annotation in data["annotations"]:
        annotations.setdefault(annotation["image_id"], annotation)
    rows = []
    for image in data["images"]:
        annotation = annotations.get(image["id"], {})
        problem = None if annotation else f"image {quoted(image['id'])} has no annotation"
        rows.append(Row(image["file_name"], image["caption"], annotation["bbox"] if annotation else None,
                        segmentation=annotation.get("segmentation"), size=stated_size(image), problem=problem))
    return rows


def lines_rows(path, dataset):
    """JSON lines: {"image", "expression", "bbox": [xmin, ymin, xmax, ymax]}, and optionally "segmentation", "split",
    and "width" and "height" of the image."""
    published = DATASETS.get(dataset)
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), 1):  # splitlines() also splits at U+2028, within a text
        if not line.strip():
            continue
        record = json_object(line)
        split = record.get("split") if record else None
        problem = None
        if record is None:
            problem = f"not a JSON object: {quoted(line)}"
        elif split is not None and not (isinstance(split, str) and split.strip()):
            problem = f"the split {quoted(split)} is not a name"
        if problem:
            rows.append(Row(problem=problem, line=number))
            continue
        rows.append(Row(record.get("image"), record.get("expression"), record.get("bbox"), "xyxy",
                        published.image_folder if published else None, record.get("segmentation"), split,
                        stated_size(record), line=number))
    if not published:
        name_splits(rows)
    return rows


def name_splits(rows):
    """Give the rows of people's own data our names of their splits; if none names a split, split them by image."""
    usual = usual_splits({row.split for row in rows if row.split})
    if not usual:
        val = val_images(row.file for row in rows if isinstance(row.file, str))
        for row in rows:
            row.split = "val" if str(row.file) in val else "train"
        return
    for row in rows:
        if row.split:
            row.split = usual[row.split]
        elif not row.problem:
            row.problem = f"no split, where other rows have one: {quoted(row.expression)}"


def usual_splits(names):
    """The splits that a file names, a set -> {name: our name}: "Validation" becomes "val". Names that would become the
    same, such as "val" and "dev", stay as they are."""
    usual = {name: USUAL_SPLITS.get(name.strip().lower(), name) for name in names}
    count = Counter(usual.values())
    return {name: split if count[split] == 1 else name for name, split in usual.items()}


def val_images(files):
    """File names -> the set of those that are "val": one in ten by their hash, so all expressions of an image stay
    together. If all of two or more images fell into one split, the one with the smallest hash alone is "val"."""
    hashes = {file: zlib.crc32(file.encode(errors="replace")) for file in files}
    val = {file for file, number in hashes.items() if number % 10 == 0}
    if len(hashes) > 1 and len(val) in (0, len(hashes)):
        return {min(hashes, key=hashes.get)}
    return val


def json_object(line):
    """The JSON object in this line, or None."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def stated_size(record):
    """(width, height) of an image if a record has them, else None."""
    if not isinstance(record, dict):
        return None
    size = record.get("width"), record.get("height")
    return size if all(isinstance(n, int | float) and 0 < n < MAX_SIDE for n in size) else None
