"""The samples of a split, from the files of any published data set or people's own.

    samples = read_samples("data", "refcoco", "val")

Every row of a file is checked. Rows with a problem are left out, counted and reported.
"""

import gc
import os
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hivg.data.images import ImageError, ImageTooLarge, most_pixels, stored_size, upright_size
from hivg.data.masks import check_polygons, mask_of, run_lengths
from hivg.data.published.catalogue import annotation_files, canonical, find_file
from hivg.data.published.formats import USUAL_SPLITS, read_rows
from hivg.utils.messages import quoted, shown

MAX_EXPRESSION = 10_000  # characters
SLACK = 1.0  # pixels by which a box may reach out of its image; annotators' boxes do


@dataclass(frozen=True)
class Sample:
    """One expression with its image and the box of the region it means."""

    image: Path
    expression: str  # as written
    box: tuple  # (xmin, ymin, xmax, ymax), floats in the image's pixels
    segmentation: list | dict | None  # COCO polygons, or an RLE with size and counts
    image_id: str  # the image's file name, shared by the published data sets; in people's own data its path
    own: bool = False  # people's own data: pixels are those of the upright image (EXIF)

    def mask(self, height, width):
        """(height, width) bool array of the segmentation, or None. Raises ValueError (masks.mask_of)."""
        return mask_of(self.segmentation, height, width)


@dataclass
class Report:
    """Rows that were left out of a file: the number and the first case of each kind of problem. Notes are about rows
    that were kept."""

    source: str = ""
    problems: Counter = field(default_factory=Counter)
    first: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)

    def add(self, kind, place, detail):
        self.problems[kind] += 1
        self.first.setdefault(kind, f"{place}: {shown(detail, 120)}")

    def lines(self):
        texts = [f"{count:,} left out, {kind} (first: {self.first[kind]})" for kind, count in self.problems.items()]
        return [f"{shown(self.source, 90)}: {text}" for text in texts + self.notes]


@contextmanager
def uncollected():
    """Without the garbage collector: millions of objects are made and none is freed, and looking at all of them again
    and again takes a third of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@uncollected()
def read_samples(data_root, dataset, split, annotations=None, report=None):
    """All samples of a split, a list of Sample in the order of the file.

    data_root    the folder with the published layout (hivg/data/README.md)
    dataset      a name (`refcoco`, `unc`, ...) or your own .jsonl file, whose images are looked for below the data root
                 and beside the file. "validation", "valid" and "dev" are `val`, in any case; if no row names a split,
                 one image in ten is `val`, at least one of several, and the rest `train`
    annotations  a file or folder, if not at a published place; REFER's `refs(..).p` needs `instances.json` beside it
    report       a Report to fill; without one its lines are printed on stderr

    Raises ValueError for a file that cannot be read, for a missing split, naming those that exist, and for the `train`
    of a file that would be every other split as well.
    """
    path, rows = read_dataset(data_root, dataset, split, annotations)
    if not rows:
        raise ValueError(f"{shown(path, 80)}: it has no rows; there must be one for each expression")
    own = is_own(dataset)
    says_split = own or split != "train" or annotation_files("", canonical(dataset), path)[0][0]
    if not says_split and any(row.split is None and not row.problem for row in rows):
        raise ValueError(f"{shown(path, 60)}: neither its name nor its rows say which split it is, so `val` would be "
                         f"the same; name it {dataset}_train.pth and give --annotations the folder with it and val")
    if own and all(row.split != split for row in rows):
        split = USUAL_SPLITS.get(split.lower(), split)
    asked = [row for row in rows if row.split in (None, split)]
    if not asked:
        splits = shown(", ".join(sorted({row.split for row in rows if row.split})), 100)
        hint = '; name it as the "split" of some rows' if own else ""
        raise ValueError(f"{shown(path, 80)}: no split {quoted(split, 40)}; there are {splits}{hint}")

    is_told = report is None
    report = report or Report()
    report.source = f"{path}, {split}"
    check = RowCheck(Path(data_root), path, own)
    samples = []
    for index, row in enumerate(asked):
        try:
            samples.append(check.sample(row))
        except Problem as problem:
            report.add(problem.kind, f"line {row.line}" if row.line else f"row {index} of {split}", problem.detail)
    if own:
        report.notes += notes(samples, check.dropped)
    if is_told:
        for line in report.lines():
            print(line, file=sys.stderr)
    return samples


def notes(samples, dropped):
    """Lines on oddities in people's own data. dropped: the rows whose outline cannot be used."""
    lines = []
    if dropped:
        first = f"line {dropped[0].line}: {shown(dropped[0].file, 60)}: {quoted(dropped[0].segmentation, 40)}"
        lines.append(f"{len(dropped):,} outlines dropped, neither polygons nor run lengths (first: {first})")
    if samples and all(0 <= min(sample.box) and max(sample.box) <= 1 for sample in samples):
        lines.append("all boxes lie in 0..1; boxes are in pixels")
    return lines


def is_own(dataset):
    """Whether a data set is people's own file, not a published one."""
    return str(dataset).endswith(".jsonl")


def read_dataset(data_root, dataset, split, annotations=None):
    """(path, rows) of the annotation file of a split, which may hold other splits too."""
    path = annotation_path(data_root, dataset, split, annotations)
    return path, read_rows(path, dataset if is_own(dataset) else canonical(dataset))


def annotation_path(data_root, dataset, split, annotations=None):
    """The annotation file of a split. Raises ValueError if there is none."""
    if is_own(dataset):
        refuse_annotations(dataset, annotations)
        path = Path(dataset)
        if not os.path.isfile(path):  # unlike path.is_file(), False for a name that no file can have
            raise ValueError(f"{shown(path)}: there is no such file; give a .jsonl file or the name of a data set")
        return path
    return find_file(data_root, canonical(dataset), split, annotations)


def refuse_annotations(dataset, annotations):
    """Raises ValueError for annotations that would be ignored, as the data set is not one of the paper's."""
    if annotations:
        raise ValueError(f"--annotations {shown(annotations, 60)} is for a data set of the paper, and "
                         f"{shown(dataset, 60)} would ignore it; leave it out")


# ---- the checks of a row

class Problem(Exception):
    """Why a row is left out: the kind of problem, which is counted, and the detail of this case."""

    def __init__(self, kind, file, detail=None):
        super().__init__(kind)
        self.kind = kind
        self.detail = f"{shown(file, 60)}: {detail}" if detail else file


class RowCheck:
    """Rows of one file to samples. What many rows share is looked at once: each folder is listed, not asked for each of
    a hundred thousand images."""

    def __init__(self, data_root, source, own):
        self.data_root = data_root
        self.source = source
        self.own = own
        self.names = {}  # {folder: the files in it}
        self.images = {}  # {(folder, file): path}
        self.sizes = {}  # {path: (width, height)}
        self.outlines = {}  # {(id, size of the image): (segmentation, checked)}; sentences about an object share it
        self.dropped = []  # rows whose outline cannot be used

    def sample(self, row):
        """A Row -> Sample. Raises Problem."""
        if row.problem:
            raise Problem("incomplete row", row.problem)
        if not isinstance(row.file, str) or not row.file:
            raise Problem("no image named", quoted(row.file))
        check_expression(row.expression, row.file)
        image = self.image(row.file, row.image_folder)
        size = row.size or self.size_of(image)
        box = checked_box(row.bbox, row.form, *size, row.file, self.own)
        segmentation = self.segmentation(row.segmentation, size, row.file)
        if self.own and row.segmentation and not segmentation:
            self.dropped.append(row)
        return Sample(image, row.expression, box, segmentation, str(image) if self.own else image.name, self.own)

    def image(self, file, folder):
        """The path of an image that exists."""
        if (folder, file) not in self.images:
            image = self.data_root / (folder or "") / file.replace("\\", "/")  # Windows writes \
            if folder is None and not os.path.isfile(image):
                image = self.source.parent / file.replace("\\", "/")
            parent, name = os.path.split(image)
            if name not in self.names_in(parent):
                raise Problem("missing image", image)
            self.images[folder, file] = image
        return self.images[folder, file]

    def names_in(self, folder):
        if folder not in self.names:
            try:
                with os.scandir(folder or ".") as entries:
                    self.names[folder] = {entry.name for entry in entries if entry.is_file()}
            except (OSError, ValueError):  # missing, or a name that no folder can have
                self.names[folder] = set()
        return self.names[folder]

    def size_of(self, image):
        if image not in self.sizes:
            try:
                self.sizes[image] = upright_size(image) if self.own else stored_size(image)
            except ImageTooLarge:
                raise Problem(f"image of more than {most_pixels()}", image) from None
            except ImageError:
                raise Problem("damaged image", image) from None
        return self.sizes[image]

    def segmentation(self, value, size, file):
        key = id(value), size
        if key not in self.outlines:
            # the value too, so that its id is not reused
            self.outlines[key] = value, checked_segmentation(value, *size, file)
        return self.outlines[key][1]


def check_expression(expression, file):
    """Raises Problem for what is not text, or is too long."""
    if expression is None:
        raise Problem("no expression", file)
    if not isinstance(expression, str):
        raise Problem("expression that is not text", file, quoted(expression, 40))
    if not expression.strip():
        raise Problem("empty expression", file)
    if len(expression) > MAX_EXPRESSION:
        raise Problem(f"expression of more than {MAX_EXPRESSION:,} characters", file, quoted(expression, 40))


def checked_box(bbox, form, width, height, file, own):
    """Four numbers, xyxy or xywh -> (xmin, ymin, xmax, ymax), floats. Raises Problem. Text like "12", or `true`, is not
    a number in people's own data; published lists may have such, as the released program accepts them."""
    try:
        if not isinstance(bbox, list | tuple) or own and any(isinstance(value, str | bool) for value in bbox):
            raise TypeError
        xmin, ymin, xmax, ymax = (float(value) for value in bbox)
    except (TypeError, ValueError, OverflowError):  # the last: an integer beyond all floats
        raise Problem("box that is not four numbers", file, quoted(bbox)) from None
    if form == "xywh":
        xmax += xmin
        ymax += ymin
    box = (xmin, ymin, xmax, ymax)
    if not (xmax > xmin and ymax > ymin):  # also for nan
        hint = "; boxes are xmin ymin xmax ymax" if own else ""
        raise Problem("box without area", file, f"{quoted(box, 40)}{hint}")
    beyond = xmin < -SLACK or ymin < -SLACK or xmax > width + SLACK or ymax > height + SLACK
    if beyond or xmin >= width or ymin >= height or xmax <= 0 or ymax <= 0:
        raise Problem("box outside the image", file, f"{box} in {width} x {height}")
    return box


def checked_segmentation(value, width, height, file):
    """COCO polygons or an RLE as plain numbers; None for anything else (mask file names, lists of attributes).
    Raises Problem."""
    try:
        if isinstance(value, dict) and {"counts", "size"} <= value.keys():
            counts = value["counts"]
            if isinstance(counts, bytes):
                counts = counts.decode()
            elif not isinstance(counts, str):
                counts = [int(count) for count in counts]
            rle = {"size": [int(side) for side in value["size"]], "counts": counts}
            run_lengths(rle, (height, width))
            return rle
        if isinstance(value, list | tuple) and value:
            polygons = [part.tolist() if isinstance(part, np.ndarray) else part for part in value]
            if all(is_polygon(part) for part in polygons):
                check_polygons(polygons)
                return polygons
    except (TypeError, ValueError, OverflowError) as error:
        raise Problem("damaged segmentation", file, error) from None
    return None


def is_polygon(part):
    """Whether it is a flat list of three or more x, y."""
    return (isinstance(part, list | tuple) and len(part) >= 6 and len(part) % 2 == 0
            and all(issubclass(kind, int | float) for kind in set(map(type, part))))
