"""The paper's five data sets and their mixture, as published: names, sizes, image folders, annotation files."""

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
    """One data set. counts: the number of expressions by split, None where it is not published."""

    names: tuple
    image_folder: str
    counts: dict
    refer_files: tuple = ()  # REFER's name for the file, and other places where it may be


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
    # its rows say which folder an image is in
    "mixup": Published(("mixup",), "", {"train": None, "val": None, "test": None}),
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

    dataset: a key of DATASETS. annotations: the file itself, or a folder that holds the files, or a folder for each
    data set, as the lists are published; without it, all published places under data_root are tried. Raises ValueError,
    naming the splits that exist.
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
    """The folders that may hold the annotations, most likely first: the published ones below the data root, or
    `annotations` and the same ones below it."""
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
    """-> the set of splits that have a file of their own, and the path of a file that may hold several splits, or
    None. Arguments as in `find_file`. Raises ValueError for a file whose name is another data set's."""
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
    """The split that a file holds by its name: a set of one, or empty."""
    patterns = file_patterns(dataset)[:-1]  # the last one matches anything
    return set().union(*(split_of(file_name, pattern) for pattern in patterns))


def splits_in(folders, patterns, root):
    """The set of splits that have a file in these folders."""
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
    """The split that a file holds by its name, a set of one; empty if the name does not match, or matches a data set
    with a longer name: gref_umd_val.pth is `val` of gref_umd, not `umd_val` of gref."""
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
