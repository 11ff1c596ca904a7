"""The paper's five data sets and their mixture as they are published: names, sizes, image folders, annotation files."""

from dataclasses import dataclass
from pathlib import Path

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
        counts={"train": None, "val": None},
    ),
}


def canonical(dataset):
    """The name in DATASETS for any name of a data set. Raises ValueError for an unknown one."""
    others = []
    for name, published in DATASETS.items():
        if dataset in published.names:
            return name
        others += published.names[1:]
    raise ValueError(f"no data set {dataset!r:.60}; there are shapes, {', '.join(DATASETS)} (also as "
                     f"{', '.join(sorted(others))}), or a .jsonl file of your own")


def find_file(data_root, dataset, split, annotations=None):
    """The annotation file of a split.

    dataset: a key of DATASETS. annotations: the file itself, or a folder to look in; without it all published places
    under data_root are tried. Raises ValueError, naming the splits that are there.
    """
    if annotations is not None and Path(annotations).is_file():
        return Path(annotations)
    root = Path(data_root)
    folders = [Path(annotations)] if annotations else published_folders(root, dataset)
    patterns = file_patterns(dataset)
    refer_files = DATASETS[dataset].refer_files
    for folder in folders:
        for name in [*(pattern.format(split) for pattern in patterns), *refer_files]:
            if (folder / name).is_file():
                return folder / name

    where = annotations or root
    splits = splits_in(folders, patterns, root)
    if splits:
        raise ValueError(f"{where}: no split {split!r:.40} of {dataset}; there are {', '.join(sorted(splits))}")
    files = [patterns[0].format(split), patterns[1].format(split), *refer_files[:1]]
    raise ValueError(f"{where}: no annotations of {dataset}, split {split!r:.40}: no {', '.join(files)} or the like in "
                     f"{', '.join(map(str, folders[:2]))} or the like; give --data_root or --annotations")


def published_folders(root, dataset):
    """The folders under the data root that may hold the annotations, likeliest first."""
    folders = []
    for name in DATASETS[dataset].names:
        folders += [root / name, root / "refer" / name, root / "annotations" / name]
    return [*folders, root]


def file_patterns(dataset):
    """Names of annotation files that hold one split, with {} for the split."""
    patterns = []
    for name in DATASETS[dataset].names:
        patterns += [f"{name}_{{}}.pth", f"finetune_{name}_{{}}.json", f"{name}_{{}}.jsonl"]
    return [*patterns, "{}.jsonl"]


def splits_in(folders, patterns, root):
    """The splits that have a file in these folders, a set."""
    splits = set()
    for folder in folders:
        for pattern in patterns:
            if folder == root and pattern == "{}.jsonl":
                continue  # a .jsonl file in the data root itself may be anything
            head = pattern.partition("{")[0]
            splits.update(path.stem.removeprefix(head) for path in folder.glob(pattern.format("*")))
    return splits
