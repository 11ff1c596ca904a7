"""The formats of annotation files, all to the same rows, not checked yet.

A file's format is recognised by its content. Pickles are read as plain data (hivg/utils/pickles.py), JSON by the names
of its keys (IMAGE_KEYS and the like), whichever program wrote it.
"""

import json
import os
import posixpath
import re
import unicodedata
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass

from hivg.data.published.catalogue import COCO, DATASETS, IMAGE_FOLDERS
from hivg.utils import pickles
from hivg.utils.messages import quoted, shown

# How programs name what a row of JSON says; a row's first name counts. The form of a box goes with the image's name.
IMAGE_KEYS = {"image": "xyxy",  # our own lines, Qwen-VL, InternVL, VLM-R1
              "img_path": "xyxy",  # Shikra
              "file_name": "xywh",  # MDETR
              "img_name": "xywh",  # CRIS
              "img_id": "xywh",  # MiniGPT-v2, without the suffix
              "image_id": "xywh"}  # SeqTR and SimVG, COCO's number
EXPRESSION_KEYS = ("expression", "expressions", "sent", "sents", "sentence", "sentences", "caption",
                   "normal_caption")
BOX_KEYS = ("bbox", "box", "solution")
OUTLINE_KEYS = ("segmentation", "mask")
WHOLE = {"data", "annotations", "rows", "samples", "items", "examples"}  # the name of a list that is all of a file
KEYS = {*IMAGE_KEYS, *EXPRESSION_KEYS, *BOX_KEYS, *OUTLINE_KEYS, "split", "width", "height"}  # that are read

MAX_SIDE = 10**6  # pixels of an image
USUAL_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
                "test": "test"}  # {what people call a split, in lower case: our name for it}


@dataclass(slots=True)
class Row:
    """One expression as a file has it; only `form` and `image_folder` can be trusted."""

    file: object = None
    expression: object = None
    bbox: object = None
    form: str = "xywh"  # a key of forms.FORMS
    image_folder: str | None = COCO  # below the data root; None: `file` is a path of its own
    segmentation: object = None
    split: str | None = None  # None: the file holds one split
    size: tuple | None = None  # (width, height) of the image, where the file says it
    problem: str | None = None  # why the row is incomplete
    place: str | None = None  # in a file of JSON: "line 3", or "row 3" of one list
    note: str | None = None  # of the first row, on the whole file


def read_rows(path, dataset):
    """All rows of an annotation file, a list.

    dataset: a key of catalogue.DATASETS; anything else stands for people's own data, in JSON. Raises ValueError.
    """
    published = DATASETS.get(dataset)
    try:
        with open(path, "rb") as file:
            is_json = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"[")
        if is_json or not published:
            rows = json_rows(read_text(path), published.image_folder if published else None)
            if not published:
                name_splits(rows, path.parent)
            return rows
        data = pickles.read(path)
        if not isinstance(data, list) or not data:
            raise ValueError("it holds no list of rows")
        return refer_rows(path, data, dataset) if isinstance(data[0], dict) else list_rows(data, dataset)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else shown(error, 170)
        raise ValueError(f"{shown(path, 80)}: cannot be read as annotations: {reason}") from None


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
        file = image.get("file_name") or re.sub(r"_\d+(\.\w+)$", r"\1", ref["file_name"])
        problem = None
        if not annotation:
            problem = f"ann_id {quoted(ref['ann_id'])} of ref_id {quoted(ref.get('ref_id'))} is not in {beside.name}"
        bbox = annotation["bbox"] if annotation else None
        segmentation = annotation.get("segmentation")
        size = stated_size(image)
        split = ref["split"]
        if not isinstance(split, str | None):
            raise ValueError(f"the split {quoted(split)} is not a name")
        if len(rows) + len(ref["sentences"]) > most:
            raise ValueError("more sentences than a file of this size can hold")
        for sentence in ref["sentences"]:
            expression = sentence.get("sent") or sentence.get("raw")
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
        file, phrase = (text.decode(errors="replace") if isinstance(text, bytes) else text for text in (file, phrase))
        rows.append(Row(file, phrase, bbox, form, image_folder, fifth, size=stated_size(second)))
    return rows


def json_rows(text, image_folder):
    """JSON: an object a line, a list of objects, a list for each split, or MDETR's images and annotations. Raises
    ValueError where no object has an image, an expression and a box."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        if re.match(r"\s*\[", text):
            raise
        data = None  # lines
    if isinstance(data, dict) and {"images", "annotations"} <= data.keys():
        data = mdetr_records(data, own=image_folder is None)
    if isinstance(data, dict) and len(data) == 1 and data.keys() <= WHOLE:
        data, = data.values()
    if isinstance(data, dict) and data and all(isinstance(part, list) for part in data.values()):
        records = [(f"row {n}", split, record) for split, part in data.items() for n, record in enumerate(part, 1)]
    elif isinstance(data, list):
        records = [(f"row {n}", None, record) for n, record in enumerate(data, 1)]
    elif isinstance(data, dict):
        records = [("line 1", None, data)]
    else:
        lines = enumerate(text.split("\n"), 1)  # splitlines() also splits at U+2028, within a text
        records = [(f"line {n}", None, json_object(line)) for n, line in lines if line.strip()]
    objects = [record for _, _, record in records if isinstance(record, dict)]
    needed = (IMAGE_KEYS, EXPRESSION_KEYS, BOX_KEYS)
    if objects and not any(all(record.keys() & keys for keys in needed) for record in objects):
        raise ValueError(f"its rows have {shown(', '.join(objects[0]) or 'no keys', 60)}; they need image, expression "
                         "and bbox, or other programs' names for these (hivg/data/README.md)")
    if records and not objects:
        raise ValueError(f"{records[0][0]}: not a JSON object: {quoted(records[0][2])}")
    rows = [row for record in records for row in record_rows(*record, image_folder)]
    if not image_folder and (unread := sorted(set().union(*objects) - KEYS)):
        rows[0].note = f"not read: {shown(', '.join(unread), 80)}"
    return rows


def mdetr_records(data, own):
    """MDETR: one record of a COCO image for each expression, with one annotation (the first counts). Others: one for
    each annotation. In people's own data, a caption about several boxes, each of a part of it, is no expression, and
    its record is one that is left out."""
    annotations = defaultdict(list)
    for annotation in data["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    records = []
    for image in data["images"]:
        found = annotations[image["id"]] or [{}]
        if "caption" in image and len(found) > 1:
            found = [{"bbox": f"one caption for {len(found)} boxes"}] if own else found[:1]
        records += [{**annotation, **image} for annotation in found]
    return records


def record_rows(place, split, record, image_folder):
    """A row for each expression of an object of JSON."""
    if not isinstance(record, dict):
        return [Row(problem=f"not a JSON object: {quoted(record)}", place=place)]
    if record.get("split") is not None:
        split = record["split"]
    if split is not None and not (isinstance(split, str) and split.strip()):
        return [Row(problem=f"the split {quoted(split)} is not a name", place=place)]
    image_key = next((key for key in IMAGE_KEYS if record.get(key) is not None), "image")
    file = record.get(image_key)
    if image_key == "image_id" and isinstance(file, int):
        file = str(file)
    texts = value_of(record, EXPRESSION_KEYS)
    if not isinstance(texts, list):
        texts = [texts]
    rows = []
    for text in texts or [None]:
        if isinstance(text, dict):  # REFER's sentences
            text = text.get("sent") or text.get("raw")
        rows.append(Row(file, text, value_of(record, BOX_KEYS), IMAGE_KEYS[image_key], image_folder,
                        value_of(record, OUTLINE_KEYS), split, stated_size(record), place=place))
    return rows


def value_of(record, keys):
    """The first value of these keys that is not None, or None."""
    return next((value for key in keys if (value := record.get(key)) is not None), None)


def name_splits(rows, folder):
    """Give the rows of people's own data our names of their splits; if none names a split, split them by image,
    which images that are moved together do not change, and note it. folder: where relative names of images begin."""
    usual = usual_splits({row.split for row in rows if row.split})
    if not usual:
        files = {row.file: os.path.abspath(folder / one_spelling(row.file)).split(os.sep)
                 for row in rows if isinstance(row.file, str)}
        shared = len(os.path.commonprefix([parts[:-1] for parts in files.values()]))  # folders of all images
        names = {file: "/".join(parts[shared:]) for file, parts in files.items()}
        val = val_images(names.values())
        for row in rows:
            row.split = "val" if isinstance(row.file, str) and names[row.file] in val else "train"
        if rows:
            drawn = f'no row has a "split", so {len(val):,} of {len(set(names.values())):,} images are val'
            rows[0].note = "; ".join(filter(None, (drawn, rows[0].note)))
        return
    for row in rows:
        if row.split:
            row.split = usual[row.split]
        elif not row.problem:
            row.problem = f"no split, where other rows have one: {quoted(row.expression)}"


def usual_splits(names):
    """The splits that a file names, a set -> {name: our name}: "Validation" becomes "val". Names that would become the
    same, such as "val" and "dev", stay as they are, but "Train" and "train" are one."""
    usual = {name: USUAL_SPLITS.get(name.strip().lower(), name) for name in names}
    words = {(name.strip().lower(), split) for name, split in usual.items()}
    count = Counter(split for _, split in words)
    return {name: split if count[split] == 1 else name for name, split in usual.items()}


def one_spelling(file):
    """A file's name as one of its spellings: ./a.png, .\\a.png and a.png are one, as are é and e with an accent."""
    return posixpath.normpath(unicodedata.normalize("NFC", file.replace("\\", "/")))


def val_images(files):
    """File names -> the set of those that are "val": one in ten by their hash, so all expressions of an image stay
    together. If all of two or more images fell into one split, the one with the smallest hash alone is "val"."""
    hashes = {file: zlib.crc32(file.encode(errors="replace")) for file in files}
    val = {file for file, number in hashes.items() if number % 10 == 0}
    if len(hashes) > 1 and len(val) in (0, len(hashes)):
        return {min(hashes, key=hashes.get)}
    return val


def json_object(line):
    """What this line of JSON says, or the line itself if it is none. A comma may end it, as in a list."""
    try:
        return json.loads(line.strip().removesuffix(","))
    except (ValueError, RecursionError):
        return line


def stated_size(record):
    """(width, height) of an image if a record has them, else None."""
    if not isinstance(record, dict):
        return None
    size = record.get("width"), record.get("height")
    return size if all(isinstance(n, int | float) and 0 < n < MAX_SIDE for n in size) else None
