"""The samples of a split, from the files of any published data set or people's own.

    samples = read_samples("data", "refcoco", "val")

Every row of a file is checked. Rows with a problem are left out, counted and reported.
"""

import gc
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from math import isfinite
from pathlib import Path

from hivg.data.images import ImageError, ImageTooLarge, most_pixels, stored_size, upright_size
from hivg.data.masks import check_polygons, check_size, run_lengths
from hivg.data.published.catalogue import DATA_ROOT, NoSplit, annotation_files, canonical, find_file
from hivg.data.published.formats import USUAL_SPLITS, read_rows
from hivg.data.published.forms import FORMS, SLACK, four_numbers, is_odd, other_form, scale_doubt
from hivg.utils.messages import quoted, shown

MAX_EXPRESSION = 10_000  # characters
DAMAGED = "damaged image"
NO_AREA = "box without area"
OUTSIDE = "box outside the image"


@dataclass(frozen=True)
class Sample:
    """One expression with its image and the box of the region it means."""

    image: Path
    expression: str  # as written
    box: tuple  # (xmin, ymin, xmax, ymax), floats in the image's pixels
    segmentation: list | dict | None  # COCO polygons and RLEs in a list, or an RLE with size and counts
    image_id: str  # the image's file name, shared by the published data sets; in people's own data its path, with the
    # links to its folder resolved
    own: bool  # people's own data: pixels are those of the upright image (EXIF), and outlines are the masks' targets


@dataclass
class Report:
    """Rows that were left out of a file: the number and the first case of each kind of problem. Notes are about rows
    that were kept."""

    source: str = ""
    forms: str = ""  # how the boxes of people's own data were read
    problems: Counter = field(default_factory=Counter)
    first: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)
    damaged: list = field(default_factory=list)  # the images of which not even the size can be read

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
    dataset      a name (`refcoco`, `unc`, ...) or your own .jsonl (.ndjson) or .json file, whose images are looked for
                 below the data root and beside the file. "validation", "valid" and "dev" are `val`, in any case; if no
                 row names a split, one image in ten is `val`, at least one of several, and the rest `train`
    annotations  a file or folder, if not at a published place; REFER's `refs(..).p` needs `instances.json` beside it
    report       a Report to fill; without one its lines are printed on stderr

    Raises ValueError for a file that cannot be read, or whose boxes seem to be in another form (forms.other_form); its
    NoSplit for a missing split, naming those that exist, and for the `train` of a file that would be every other split
    as well.
    """
    path, rows = read_dataset(data_root, dataset, split, annotations)
    if not rows:
        raise ValueError(f"{shown(path, 80)}: it has no rows; there must be one for each expression")
    own = is_own(dataset)
    says_split = own or split != "train" or annotation_files("", canonical(dataset), path)[0][0]
    if not says_split and any(row.split is None and not row.problem for row in rows):
        raise NoSplit(f"{shown(path, 60)}: neither its name nor its rows say which split it is, so `val` would be "
                      f"the same; name it {dataset}_train{path.suffix} and give --annotations the folder with it and "
                      "val")
    if own and all(row.split != split for row in rows):
        split = USUAL_SPLITS.get(split.lower(), split)
    asked = [row for row in rows if row.split in (None, split)]
    if not asked:
        splits = shown(", ".join(sorted({row.split for row in rows if row.split})), 100)
        hint = '; name it as the "split" of some rows' if own else ""
        raise NoSplit(f"{shown(path, 80)}: no split {quoted(split, 40)}; there are {splits}{hint}")

    is_told = report is None
    report = report or Report()
    report.source = f"{path}, {split}"
    forms = {FORMS[row.form][0] for row in asked if row.place and not row.problem}
    report.forms = " and ".join(sorted(forms)) if own else ""
    check = RowCheck(Path(data_root), path, own)
    samples = []
    for index, row in enumerate(asked):
        try:
            samples.append(check.sample(row))
        except Problem as problem:
            report.add(problem.kind, row.place or f"row {index} of {split}", problem.detail)
    if {NO_AREA, OUTSIDE} & report.problems.keys() or any(is_odd(row.bbox, row.form) for row in rows if row.place):
        check.refuse_other_form(rows)
    if rows[0].note and rows[0].split == split:  # once, not for each split
        report.notes.append(rows[0].note)
    report.notes += check.notes()
    if own and (doubt := scale_doubt([(sample.box, check.sizes[sample.image]) for sample in samples])):
        report.notes.append(doubt)
    report.damaged = [image for image, size in check.sizes.items() if size == DAMAGED]
    if is_told and os.environ.get("RANK", "0") == "0":  # the first of several processes tells it for all
        for line in report.lines():
            print(line, file=sys.stderr)
    return samples


def is_own(dataset):
    """Whether a data set is people's own file, not a published one."""
    return str(dataset).lower().endswith((".jsonl", ".json", ".ndjson"))


def read_dataset(data_root, dataset, split, annotations=None):
    """(path, rows) of the annotation file of a split, which may hold other splits too. Raises ValueError."""
    if is_own(dataset):
        refuse_annotations(dataset, annotations)
        path = Path(dataset)
        if not os.path.isfile(path):  # unlike path.is_file(), False for a name that no file can have
            raise ValueError(f"{shown(path)}: there is no such file; give a .jsonl or .json file, or the name of a "
                             "data set")
    else:
        dataset = canonical(dataset)
        path = find_file(data_root, dataset, split, annotations)
    return path, read_rows(path, dataset)


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
    """Rows of one file to samples. What many rows share is looked at once."""

    def __init__(self, data_root, source, own):
        self.data_root = data_root
        self.source = source
        self.own = own
        self.realpath = cache(os.path.realpath)
        self.images = {}  # {(folder, file): (path, what stands for the image in all spellings of its path)}
        self.paths = {}  # {the latter: path}
        self.sizes = {}  # {path: (width, height), or in words why it has none}
        self.outlines = {}  # {(id, size of the image): (segmentation, checked)}; sentences about an object share it
        self.dropped = defaultdict(list)  # {what is said of them: rows with outlines that cannot be used, or in part}

    def sample(self, row):
        """A Row -> Sample. Raises Problem."""
        image, image_id = self.image(row)
        check_expression(row.expression, row.file)
        size = self.size_of(image, row.size)
        if row.size and row.size != size:  # its box is one of another image: a smaller copy, say, or a turned one
            raise Problem("image of another size than its annotation says", row.file,
                          "{} x {}, annotated as {} x {}".format(*size, *row.size))
        box = checked_box(row.bbox, row.form, *size, row.file, self.own)
        segmentation = self.segmentation(row.segmentation, size, row.file)
        if self.own and row.segmentation and not segmentation:
            self.dropped["outlines dropped, neither polygons nor run lengths"].append(row)
        elif isinstance(segmentation, list) and len(segmentation) < len(row.segmentation):
            self.dropped["outlines without their damaged parts"].append(row)
        return Sample(image, row.expression, box, segmentation, image_id if self.own else image.name, self.own)

    def image(self, row):
        """The path of an image that exists, and what stands for it in all spellings. Raises Problem."""
        if row.problem:
            raise Problem("incomplete row", row.problem)
        if not isinstance(row.file, str) or not row.file:
            raise Problem("no image named", quoted(row.file))
        key = row.image_folder, row.file
        if key not in self.images:
            self.images[key] = self.find(row.image_folder, row.file.replace("\\", "/"))  # Windows writes \
        return self.images[key]

    def find(self, folder, file):
        """-> the path and the id of a file below a folder. Raises Problem."""
        if folder is None:  # people's own: a folder that was named comes before the one beside the file
            root = self.source.parent
            folders = [root, self.data_root] if str(self.data_root) == DATA_ROOT else [self.data_root, root]
            names = [file] if os.path.splitext(file)[1] else [file, f"{file}.jpg"]  # MiniGPT-v2 leaves it out
            places = [folder / name for folder in folders for name in names]
        else:
            root = self.data_root / folder
            places = [root / name for name in published_names(file)]
        for place in places:
            parent, name = os.path.split(place)
            normal = unicodedata.normalize("NFC", name)
            for spelling in dict.fromkeys([name, normal, unicodedata.normalize("NFD", name)]):  # an accent has two
                path = Path(parent, spelling)
                if os.path.isfile(path):
                    image_id = os.path.join(self.realpath(parent), normal)
                    return self.paths.setdefault(image_id, path), image_id
        raise Problem("missing image", root / file)

    def size_of(self, image, stated):
        """(width, height) of an image. Of a damaged one of a published data set it is the stated one: it stays, and to
        open it will name it."""
        if image not in self.sizes:
            try:
                self.sizes[image] = upright_size(image) if self.own else stored_size(image)
            except ImageTooLarge:
                self.sizes[image] = f"image of more than {most_pixels()}"
            except ImageError:
                self.sizes[image] = DAMAGED
        size = self.sizes[image]
        if not isinstance(size, str):
            return size
        if stated and not self.own:
            return stated
        raise Problem(size, image)

    def refuse_other_form(self, rows):
        """Raises ValueError if the boxes of a file of JSON seem to be in another form than they should be."""
        boxes = []
        for row in rows:
            try:
                if row.place and all(map(isfinite, box := four_numbers(row.bbox, own=True))):
                    boxes.append((box, row.form, row.size or self.size_of(self.image(row)[0], None)))
            except (Problem, TypeError, ValueError, OverflowError):  # told where the row is read
                continue
        if found := other_form(boxes):
            form, first = found
            # the key that names the image says which form it is
            key = {FORMS["xyxy"][0]: "image", FORMS["xywh"][0]: "file_name"}.get(form)
            hint = f', or name the image as "{key}"' if key else ""
            if form == FORMS["yxyx"][0]:
                form += " (or of images that EXIF turns)"
            raise ValueError(f"{shown(self.source, 80)}: its boxes look like {form}, for instance {quoted(first, 50)}; "
                             f"write {FORMS[boxes[0][1]][0]}, in pixels{hint}")

    def notes(self):
        """Lines on rows that were kept."""
        return [f"{len(rows):,} {kind} (first: {rows[0].place or 'a row'}: {shown(rows[0].file, 60)}: "
                f"{quoted(rows[0].segmentation, 40)})" for kind, rows in self.dropped.items()]

    def segmentation(self, value, size, file):
        key = id(value), size
        if key not in self.outlines:
            # the value too, so that its id is not reused
            self.outlines[key] = value, checked_segmentation(value, *size, file)
        return self.outlines[key][1]


def images_of(rows, data_root, source, own):
    """The paths of the images of rows, of those that exist; as RowCheck's arguments."""
    check = RowCheck(data_root, source, own)
    for row in rows:
        with suppress(Problem):
            yield check.image(row)[0]


def check_expression(expression, file):
    """Raises Problem for what is not text, or is too long."""
    if expression is None:
        raise Problem("no expression", file)
    if not isinstance(expression, str):
        raise Problem("expression that is not text", file, quoted(expression, 40))
    if not any(letter.isprintable() and not letter.isspace() for letter in expression):
        raise Problem("empty expression", file)
    if len(expression) > MAX_EXPRESSION:
        raise Problem(f"expression of more than {MAX_EXPRESSION:,} characters", file, quoted(expression, 40))


def published_names(file):
    """The names under which an image of a published data set may be in its folder: as it is written, the last part of a
    path on another machine, with the suffix that a row leaves out, and by COCO's number, which may be followed by
    REFER's."""
    base = file.rpartition("/")[2]
    yield from (file, base, f"{base}.jpg")
    if number := re.fullmatch(r"(?:COCO_train2014_)?(\d{1,12})(?:_\d+)?", os.path.splitext(base)[0]):
        yield f"COCO_train2014_{number[1]:0>12}.jpg"


def checked_box(bbox, form, width, height, file, own):
    """A box as a file has it -> (xmin, ymin, xmax, ymax), floats. form: a key of FORMS. Raises Problem."""
    try:
        numbers = four_numbers(bbox, own)
    except (TypeError, ValueError, OverflowError):
        hint = f"; write [{FORMS[form][0].replace(' ', ', ')}], in pixels" if own else ""
        raise Problem("box that is not four numbers", file, f"{quoted(bbox, 40)}{hint}") from None
    box = xmin, ymin, xmax, ymax = FORMS[form][1](*numbers)
    if not (xmax > xmin and ymax > ymin):  # also for nan
        hint = f"; boxes are {FORMS[form][0]}" if own else ""
        raise Problem(NO_AREA, file, f"{quoted(box, 40)}{hint}")
    beyond = xmin < -SLACK or ymin < -SLACK or xmax > width + SLACK or ymax > height + SLACK
    if beyond or xmin >= width or ymin >= height or xmax <= 0 or ymax <= 0:
        raise Problem(OUTSIDE, file, f"{box} in {width} x {height}")
    return box


def checked_segmentation(value, width, height, file):
    """The right parts of COCO polygons and RLEs, as plain numbers, a list; or one RLE. None for anything else (mask
    file names, lists of attributes). Raises Problem where parts are damaged and none is right."""
    is_list = isinstance(value, list | tuple)
    parts = []
    damage = None
    try:
        for part in value if is_list else [value]:
            try:
                parts.append(checked_part(part, width, height))
            except (TypeError, ValueError, OverflowError) as error:
                damage = error
        parts = [part for part in parts if part is not None]
        check_size([part for part in parts if not isinstance(part, dict)])
    except ValueError as error:
        parts, damage = [], error
    if damage and not parts:
        raise Problem("damaged segmentation", file, damage)
    return (parts if is_list else parts[0]) if parts else None


def checked_part(value, width, height):
    """A polygon or an RLE as plain numbers, None for anything else. Raises TypeError, ValueError, OverflowError."""
    if isinstance(value, dict) and {"counts", "size"} <= value.keys():
        counts = value["counts"]
        if isinstance(counts, bytes):
            counts = counts.decode()
        elif not isinstance(counts, str):
            counts = [int(count) for count in counts]
        rle = {"size": [int(side) for side in value["size"]], "counts": counts}
        run_lengths(rle, (height, width))
        return rle
    if not is_polygon(value):
        return None
    check_polygons([value])
    return value


def is_polygon(part):
    """Whether it is a flat list of three or more x, y."""
    return (isinstance(part, list | tuple) and len(part) >= 6 and len(part) % 2 == 0
            and all(issubclass(kind, int | float) for kind in set(map(type, part))))
