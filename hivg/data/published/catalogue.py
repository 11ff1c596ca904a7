"""The paper's five data sets and their mixture as they are published: names, sizes, image folders, annotation files."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hivg.utils.messages import quoted, shown

# Image folders, relative to the data root.
COCO = "other/images/mscoco/images/train2014"
REFERIT = "referit/images"
FLICKR = "Flickr30k/flickr30k-images"
IMAGE_FOLDERS = {"coco": COCO, "referit": REFERIT, "flickr": FLICKR}


@dataclass(frozen=True)
class Published:
    """One data set. `counts` is the number of expressions by split, None where it is not published."""

    names: tuple
    image_folder: str
    counts: dict
    refer_files: tuple = ()  # REFER's name of the file, and other places where it is found


DATASETS = {
    "refcoco": Published(
        names=("refcoco", "unc"),
        image_folder=COCO,
        counts={"train": 120624, "val": 10834, "testA": 5657, "testB": 5095},
        refer_files=("refs(unc).p",),
    ),
    "refcoco+": Published(
        names=("refcoco+", "unc+", "refcocoplus"),
        image_folder=COCO,
        counts={"train": 120191, "val": 10758, "testA": 5726, "testB": 4889},
        refer_files=("refs(unc).p",),
    ),
    "refcocog": Published(
        names=("refcocog", "gref_umd", "refcocog_umd"),
        image_folder=COCO,
        counts={"train": 80512, "val": 4896, "test": 9602},
        refer_files=("refs(umd).p",),
    ),
    "refcocog_google": Published(
        names=("refcocog_google", "gref"),
        image_folder=COCO,
        counts={"train": 85474, "val": 9536},
        refer_files=("refs(google).p", "refcocog/refs(google).p", "refer/refcocog/refs(google).p"),
    ),
    "referit": Published(
        names=("referit", "refclef"),
        image_folder=REFERIT,
        counts={"train": 54127, "val": 5842, "test": 60103},
        refer_files=("refs(berkeley).p", "refs(unc).p"),
    ),
    "flickr": Published(
        names=("flickr", "flickr30k"),
        image_folder=FLICKR,
        counts={"train": 427193, "val": 14433, "test": 14481},
    ),
    "mixup": Published(  # its rows say in which folder an image is
        names=("mixup",),
        image_folder="",
        counts={"train": None, "val": None, "test": None},
    ),
}


def canonical(dataset):
    """The name in DATASETS for any name of a data set. Raises ValueError for an unknown one."""
    others = []
    for name, published in DATASETS.items():
        if dataset in published.names:
            return name
        others += published.names[1:]
    raise ValueError(f"no data set {quoted(dataset, 40)}; there are shapes, {', '.join(DATASETS)} (also as "
                     f"{', '.join(sorted(others))}), or a .jsonl file of your own")


def find_file(data_root, dataset, split, annotations=None):
    """The annotation file of a split.

    dataset: a key of DATASETS. annotations: the file itself, or a folder to look in, with the files in it or in a
    folder for each data set, as the lists are published; without it all published places under data_root are tried.
    Raises ValueError, naming the splits that are there.
    """
    if annotations and os.path.isfile(annotations):  # unlike Path.is_file, False for a name that no file can have
        splits, _ = files_of(data_root, dataset, annotations)
        if splits and split not in splits:
            raise ValueError(f"{shown(annotations, 60)}: by its name the split {', '.join(sorted(splits))}, not "
                             f"{quoted(split, 20)}; give the folder with both to --annotations")
        return Path(annotations)
    root = Path(data_root)
    folders = places(root, dataset, annotations)
    patterns = file_patterns(dataset)
    refer_files = DATASETS[dataset].refer_files
    for folder in folders:
        for name in [*(pattern.format(split) for pattern in patterns), *refer_files]:
            if os.path.isfile(folder / name):
                return folder / name

    where = shown(annotations or root, 60)
    splits = splits_in(folders, patterns, root)
    if splits:
        raise ValueError(f"{where}: no split {quoted(split, 20)} of {dataset}; there are "
                         f"{shown(', '.join(sorted(splits)), 100)}")
    files = [patterns[0].format(shown(split, 20)), *refer_files[:1]]
    raise ValueError(f"{where}: no annotations of {dataset}, split {quoted(split, 20)}: no {' or '.join(files)} or the "
                     f"like there or in its {DATASETS[dataset].names[0]}/; give --data_root or --annotations")


def places(root, dataset, annotations=None):
    """The folders that may hold the annotations, likeliest first: those below the data root as they are published, or
    `annotations` and the same below it."""
    top = Path(annotations or root)
    folders = []
    for name in DATASETS[dataset].names:
        folders += [top / name, top / "refer" / name, top / "annotations" / name]
    return [top, *folders] if annotations else [*folders, top]


def file_patterns(dataset):
    """Names of annotation files that hold one split, with {} for the split."""
    patterns = []
    for name in DATASETS[dataset].names:
        patterns += [f"{name}_{{}}.pth", f"finetune_{name}_{{}}.json", f"{name}_{{}}.jsonl"]
    return [*patterns, "{}.jsonl"]


def files_of(data_root, dataset, annotations=None):
    """What files there are of a data set -> the splits that have a file of their own, a set, and the path of a file
    that may hold several splits, or None.

    Arguments as of `find_file`. Raises ValueError for a file that is another data set's by its name."""
    root = Path(data_root)
    if annotations and os.path.isfile(annotations):
        file = Path(annotations)
        splits = splits_by_name(file.name, dataset) or {file.stem} & DATASETS[dataset].counts.keys()
        for other in DATASETS:
            if not splits and splits_by_name(file.name, other):
                raise ValueError(f"{shown(file, 60)}: by its name annotations of {other}, not of {dataset}; name "
                                 f"{other} as the data set, or another file")
        return splits, None if splits else file
    patterns = file_patterns(dataset)
    folders = places(root, dataset, annotations)
    for folder in folders:
        for name in DATASETS[dataset].refer_files:
            if os.path.isfile(folder / name):
                return splits_in(folders, patterns, root), folder / name
    return splits_in(folders, patterns, root), None


def splits_by_name(file_name, dataset):
    """The split of a data set that a file is of by its name, a set of one, or empty."""
    splits = set()
    for pattern in file_patterns(dataset)[:-1]:  # the last fits anything
        splits |= split_of(file_name, pattern)
    return splits


def splits_in(folders, patterns, root):
    """The splits that have a file in these folders, a set."""
    splits = set()
    for folder in folders:
        for pattern in patterns:
            if folder == root and pattern == "{}.jsonl":
                continue  # a .jsonl file in the data root itself may be anything
            with suppress(OSError, ValueError):  # a name that no folder can have
                for path in folder.glob(pattern.format("*")):
                    splits |= split_of(path.name, pattern)
    return splits


def split_of(file_name, pattern):
    """The split that a file is of by its name, a set of one; empty if the name does not fit, or fits a data set with a
    longer name as well: gref_umd_val.pth is `val` of gref_umd, not `umd_val` of gref."""
    head, tail = pattern.split("{}")
    if not (file_name.startswith(head) and file_name.endswith(tail)):
        return set()
    split = file_name[len(head) : -len(tail)]
    start = head.removeprefix("finetune_")  # the name of the data set with its "_"
    for published in DATASETS.values():
        for name in published.names:
            if len(name) >= len(start) and (start + split).startswith(name + "_"):
                return set()
    return {split}
