"""The paper's five data sets and their mixture, as published: names, sizes, image folders, annotation files."""

import os
from dataclasses import dataclass
from pathlib import Path

from hivg.utils import pickles
from hivg.utils.messages import quoted, shown

DATA_ROOT = "data"  # --data_root where none is given
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
    "refcoco": Published(("refcoco", "unc", "refcoco_unc"), COCO,
                         {"train": 120624, "val": 10834, "testA": 5657, "testB": 5095}, ("refs(unc).p",)),
    "refcoco+": Published(("refcoco+", "unc+", "refcoco+_unc", "refcocoplus", "refcocop"), COCO,
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


class NoSplit(ValueError):
    """The files that there are do not have this split."""


def canonical(dataset):
    """The name in DATASETS for any name of a data set. Raises ValueError for an unknown one."""
    others = []
    for name, published in DATASETS.items():
        if dataset in published.names:
            return name
        others += published.names[1:]
    if os.path.splitext(dataset)[1] or os.path.dirname(dataset.rstrip("/")):
        raise ValueError(f"{shown(dataset)}: your own data must be a .jsonl or .json file, with a line of JSON for "
                         "each expression (hivg/data/README.md)")
    raise ValueError(f"no data set {quoted(dataset, 40)}; there are shapes, {', '.join(DATASETS)} (also as "
                     f"{', '.join(sorted(others))}), shapes-wide, or a JSON file of your own")


def find_file(data_root, dataset, split, annotations=None):
    """The annotation file of a split. Arguments as in `annotation_files`. Raises ValueError, naming the splits that
    exist."""
    files = annotation_files(data_root, dataset, annotations)
    for name, path in files:
        if name in (split, None):
            return path
    in_root = Path(data_root) / f"{split}.jsonl"  # which may be anything, so it is taken only where nothing else is
    if not annotations and os.path.isfile(in_root):
        return in_root
    where = shown(annotations or data_root, 60)
    if splits := ", ".join(sorted(split_names(dataset, files))):
        is_file = annotations and os.path.isfile(annotations)
        advice = "; give --annotations the folder with all splits" if is_file else ""
        raise NoSplit(f"{where}: no split {quoted(split, 20)} of {dataset}; there are {shown(splits, 100)}, by file "
                      f"name{advice}")
    published = DATASETS[dataset]
    names = [f"{published.names[0]}_{shown(split, 20)}.pth", *published.refer_files[:1]]
    raise ValueError(f"{where}: no annotations of {dataset}, split {quoted(split, 20)}: no {' or '.join(names)} or the "
                     f"like there or in its {published.names[0]}/; give --data_root or --annotations")


def split_names(dataset, files):
    """The splits that files (annotation_files) hold by their names, a set. Results and the like may lie among the
    lists, and some lists are published empty: a name that is not published counts only for a list with rows, or alone.
    """
    names = {split for split, path in files if split in DATASETS[dataset].counts
             or split and path.suffix == ".pth" and not is_empty_list(path)}
    return names or {split for split, path in files if named(path.name)[1]}


def is_empty_list(path):
    try:
        return os.path.getsize(path) < 2048 and pickles.read(path) == []
    except (OSError, ValueError):
        return False


def annotation_files(data_root, dataset, annotations=None):
    """The annotation files of a data set, most likely first: a list of (split, path), where the split None stands for
    a file that may hold several.

    dataset: a key of DATASETS. annotations: one file, or a folder that holds the files, or a folder for each data set,
    as the lists are published; without it, all published places under data_root are tried. Raises ValueError for a file
    whose name is another data set's.
    """
    published = DATASETS[dataset]
    if annotations and os.path.isfile(annotations):  # unlike Path.is_file, False for a name that no file can have
        file = Path(annotations)
        other, split = named(file.name)
        if other not in (None, dataset):
            raise ValueError(f"{shown(file, 60)}: by its name annotations of {other}, not of {dataset}; name {other} "
                             "as the data set, or another file")
        return [(file.stem if file.stem in published.counts else split, file)]
    top = Path(annotations or data_root)
    folders = [top / parent / name for name in published.names for parent in ("", "refer", "annotations")]
    files = []
    for folder in [top, *folders] if annotations else [*folders, top]:
        try:
            paths = sorted(folder.iterdir(), key=lambda path: (path.suffix != ".pth", path.name))
        except (OSError, ValueError):  # missing, or a name that no folder can have
            continue
        for path in paths:
            found, split = named(path.name)
            in_root = folder == top and not annotations  # see find_file
            is_split = path.suffix == ".jsonl" or path.suffix == ".json" and path.stem in published.counts
            if not found and is_split and not in_root:
                found, split = dataset, path.stem
            if found == dataset and os.path.isfile(path):
                files.append((split, path))
        files += [(None, folder / name) for name in published.refer_files if os.path.isfile(folder / name)]
    return files


def named(file_name):
    """The data set and the split that a published file is of by its name, or None and None. The longest name of a data
    set counts: gref_umd_val.pth is `val` of gref_umd, not `umd_val` of gref."""
    stem, suffix = os.path.splitext(file_name)
    stem = stem.removeprefix("finetune_").removeprefix("REC_")  # MDETR's, Shikra's
    names = []
    for dataset, published in DATASETS.items():
        names += [(len(name), dataset) for name in published.names if stem.startswith(name + "_")]
    if not names or suffix not in (".pth", ".jsonl", ".json"):
        return None, None
    length, dataset = max(names)
    split = stem[length + 1 :]
    is_other = suffix == ".json" and split not in DATASETS[dataset].counts and not file_name.startswith("finetune_")
    return (None, None) if is_other else (dataset, split)  # results, for instance
