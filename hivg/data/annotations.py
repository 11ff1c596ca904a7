"""The samples of a split, from the files of any published data set or people's own.

    samples = read_samples("data", "refcoco", "val")

Every row of a file is checked. Those with a problem are left out and counted, never silently.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from hivg.data.formats import read_rows
from hivg.data.masks import mask_of
from hivg.data.published import canonical, find_file

SLACK = 1.0  # pixels by which a box may reach out of its image; annotators' boxes do


@dataclass(frozen=True)
class Sample:
    """One expression with its image and the box of the region it means."""

    image: Path
    expression: str  # as written
    box: tuple  # (xmin, ymin, xmax, ymax), floats in the image's pixels
    segmentation: list | dict | None  # COCO polygons, or an RLE with size and counts
    image_id: str  # the image's file name

    def mask(self, height, width):
        """(height, width) bool array of the segmentation, or None. Raises ValueError (masks.mask_of)."""
        return mask_of(self.segmentation, height, width)


@dataclass
class Report:
    """Rows that were left out of a file, and why: the number and the first case of each kind of problem."""

    source: str = ""
    problems: Counter = field(default_factory=Counter)
    first: dict = field(default_factory=dict)

    def add(self, kind, index, detail):
        self.problems[kind] += 1
        self.first.setdefault(kind, f"index {index}: {detail}")

    def lines(self):
        return [f"{self.source}: {count:,} left out, {kind} (first: {self.first[kind]})"
                for kind, count in self.problems.items()]


def read_samples(data_root, dataset, split, annotations=None, report=None):
    """All samples of a split, a list of Sample in the order of the file.

    data_root    the folder with the published layout (see the README)
    dataset      a name (`refcoco`, `unc`, ...), or a .jsonl file of one's own. Its images are looked for below the data
                 root and beside the file; if its rows name no `split`, one image in ten is `val` and the rest `train`
    annotations  a file or folder, where they are not at a published place; REFER's `refs(..).p` needs `instances.json`
                 beside it
    report       a Report to fill; without one its lines are printed on stderr

    Raises ValueError for a file that cannot be read, and for a split that is not there, naming those that are.
    """
    path, rows = read_dataset(data_root, dataset, split, annotations)
    rows_of_split = [row for row in rows if row.split in (None, split)]
    if not rows_of_split:
        splits = sorted({row.split for row in rows if row.split})
        raise ValueError(f"{path}: no split {split!r:.40}; there are {', '.join(splits or ['none'])}")

    given = report is not None
    report = report if given else Report()
    report.source = f"{path}, {split}"
    check = RowCheck(Path(data_root), path)
    samples = []
    for index, row in enumerate(rows_of_split):
        try:
            samples.append(check.sample(row))
        except Problem as problem:
            report.add(problem.kind, index, problem.detail)
    if not given:
        for line in report.lines():
            print(line, file=sys.stderr)
    return samples


def is_own(dataset):
    """Whether a data set is a file of people's own, not a published one."""
    return str(dataset).endswith(".jsonl")


def read_dataset(data_root, dataset, split, annotations=None):
    """(path, rows) of the annotation file of a split, which may hold other splits as well."""
    if is_own(dataset):
        path = Path(dataset)
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file; give a .jsonl file or the name of a data set")
    else:
        dataset = canonical(dataset)
        path = find_file(data_root, dataset, split, annotations)
    return path, read_rows(path, dataset)


# ---- the checks of a row

class Problem(Exception):
    """A reason to leave a row out: the kind of problem, which is counted, and the detail of this case."""

    def __init__(self, kind, detail):
        super().__init__(kind)
        self.kind = kind
        self.detail = detail


class RowCheck:
    """Rows of one file to samples. It asks once for every folder what is in it: a question for each of a hundred
    thousand images takes seconds."""

    def __init__(self, data_root, source):
        self.data_root = data_root
        self.source = source
        self.names = {}  # folder: the files in it
        self.sizes = {}  # image: (width, height)

    def sample(self, row):
        """A Row -> Sample. Raises Problem."""
        if row.problem:
            raise Problem("incomplete row", row.problem)
        if not isinstance(row.file, str) or not row.file:
            raise Problem("no image named", repr(row.file)[:80])
        if not isinstance(row.expression, str) or not row.expression.strip():
            raise Problem("empty expression", row.file)
        file = row.file.replace("\\", "/")  # as Windows writes paths
        image = self.image_path(file, row.image_folder)
        folder, name = os.path.split(image)
        if name not in self.names_in(folder):
            raise Problem("missing image", image)
        width, height = row.size or self.size_of(image)
        box = checked_box(row.bbox, row.form, width, height, file)
        segmentation = checked_segmentation(row.segmentation, width, height, file)
        return Sample(image, row.expression, box, segmentation, name)

    def image_path(self, file, folder):
        if folder is not None:
            return self.data_root / folder / file
        below_root = self.data_root / file
        beside = self.source.parent / file
        if not below_root.is_file() and beside.is_file():
            return beside
        return below_root

    def names_in(self, folder):
        if folder not in self.names:
            entries = os.scandir(folder) if os.path.isdir(folder) else ()
            self.names[folder] = {entry.name for entry in entries if entry.is_file()}
        return self.names[folder]

    def size_of(self, image):
        if image not in self.sizes:
            try:
                with Image.open(image) as opened:  # reads the header alone
                    self.sizes[image] = opened.size
            except Exception:  # Pillow's decoders raise nearly anything
                raise Problem("damaged image", image) from None
        return self.sizes[image]


def checked_box(bbox, form, width, height, file):
    """Four numbers, xyxy or xywh -> (xmin, ymin, xmax, ymax), floats. Raises Problem."""
    try:
        xmin, ymin, xmax, ymax = (float(value) for value in bbox)
    except (TypeError, ValueError):
        raise Problem("box that is not four numbers", f"{file}: {bbox!r:.60}") from None
    if form == "xywh":
        xmax += xmin
        ymax += ymin
    box = (xmin, ymin, xmax, ymax)
    if not (xmax > xmin and ymax > ymin):  # also for nan
        raise Problem("box without area", f"{file}: {box}")
    if xmin < -SLACK or ymin < -SLACK or xmax > width + SLACK or ymax > height + SLACK:
        raise Problem("box outside the image", f"{file} ({width} x {height}): {box}")
    return box


def checked_segmentation(value, width, height, file):
    """COCO polygons or an RLE as plain numbers; None for anything else (mask file names, lists of attributes).
    Raises Problem."""
    try:
        if isinstance(value, dict) and {"counts", "size"} <= value.keys():
            rle = plain_rle(value)
            mask_of(rle, height, width)
            return rle
    except (TypeError, ValueError) as error:
        raise Problem("damaged segmentation", f"{file}: {error}") from None
    if not isinstance(value, list | tuple) or not value:
        return None
    polygons = [part.tolist() if isinstance(part, np.ndarray) else part for part in value]
    return polygons if all(is_polygon(part) for part in polygons) else None


def plain_rle(rle):
    """An RLE with a size of ints and counts as text or a list of ints. Raises TypeError or ValueError."""
    size = [int(n) for n in rle["size"]]
    counts = rle["counts"]
    if isinstance(counts, bytes):
        counts = counts.decode()
    elif not isinstance(counts, str):
        counts = [int(n) for n in counts]
    return {"size": size, "counts": counts}


def is_polygon(part):
    """Whether it is a flat list of three or more x, y."""
    return (isinstance(part, list | tuple) and len(part) >= 6 and len(part) % 2 == 0
            and all(isinstance(value, int | float) for value in part))
