"""A report on the files of a data set, for `python -m hivg.data check`."""

import os
from functools import cache

from hivg.data.drawn.scenes import DRAWN
from hivg.data.images import ImageError, open_image, open_published
from hivg.data.published.catalogue import DATA_ROOT, DATASETS, NoSplit, annotation_files, canonical, split_names
from hivg.data.published.reading import Report, is_own, read_dataset, read_samples, refuse_annotations
from hivg.utils.cli import Progress
from hivg.utils.files import hash_of
from hivg.utils.messages import shown


def check(data_root, dataset, annotations=None, decode=False):
    """The text of the report. Raises ValueError if there is nothing to report on.

    For each split the number of expressions beside the published one, and the rows left out, with the reason; then
    the training images that are in another split too (of the mixture: also in the splits of its parts), and whether
    people's own data lack a `val`.

    decode: also read the pixels of every image and list the damaged ones, minutes for a hundred thousand; and take
    files of the same bytes for one image, whatever they are called.
    """
    if dataset in DRAWN:
        raise ValueError(f"{dataset} is drawn as it is needed; there are no files to check")
    names = [dataset] if is_own(dataset) else [canonical(dataset)]
    if names == ["mixup"] and not (annotations and os.path.isfile(annotations)):  # a single file is the mixture's alone
        names = ["mixup", *(name for name in DATASETS if name != "mixup")]
    digest_once = cache(digest)  # the parts of the mixture share images
    lines = []
    problems = []  # the lines that say why rows are left out
    missing = []  # those on splits that there are not
    images = {}  # (name, split): {the id of an image, with decode its digest: its id}
    for name in names:
        counts = dict.fromkeys(splits_of(name, data_root) or ["train"]) if is_own(name) else DATASETS[name].counts
        for split, count in counts.items():
            report = Report()
            try:
                samples = read_samples(data_root, name, split, annotations, report)
            except ValueError as error:
                if name == names[0] and isinstance(error, NoSplit):
                    missing.append(str(error))
                elif name == names[0]:
                    lines.append(str(error))
                    problems.append(str(error))
                continue
            ids = {sample.image: sample.image_id for sample in samples}
            images[name, split] = {digest_once(path) if decode else name: name for path, name in ids.items()}
            title = f"{shown(name)} {shown(split, 40)}"
            published = f" ({count:,} published)" if count else ""
            read = f", boxes read as {report.forms}" if report.forms else ""
            lines.append(f"{title}: {len(samples):,} expressions{published}, {len(images[name, split]):,} images{read}")
            lines += report.lines()
            problems += report.lines()
            if decode:
                lines += decoded(title, samples, report.damaged)
    if not images or is_own(dataset) and not any(images.values()):
        raise ValueError([*problems, *missing, f"{shown(dataset)}: it has no expressions"][0])
    lines += missing  # after the reasons of the rows that there are
    lines += leakage(names[0], images)
    lacking = [split for split in ("train", "val") if (dataset, split) not in images]
    if is_own(dataset) and lacking:
        advice = 'write "split": "val" in the rows of some images, "train" in the others'
        if sum(map(len, images.values())) == 1:
            advice = "add a second image"
        lines.append(f"{shown(dataset)}: it has no {' and no '.join(lacking)}, which train.py needs; {advice}")
    return "\n".join(lines)


def splits_of(dataset, data_root=DATA_ROOT, annotations=None):
    """The splits that a data set's files have, a list in the published order, others after them.

    dataset: a drawn one (without its endless splits), the name of a data set, or a JSON file. Raises ValueError for a
    file that cannot be read, and if there is none.
    """
    if dataset in DRAWN:
        refuse_annotations(dataset, annotations)
        return [split for split, (scenes, _) in DRAWN[dataset].items() if scenes < 2**40]
    if is_own(dataset):
        _, rows = read_dataset(data_root, dataset, None, annotations)
        return sorted({row.split for row in rows if row.split})
    dataset = canonical(dataset)
    published = list(DATASETS[dataset].counts)
    files = annotation_files(data_root, dataset, annotations)
    splits = split_names(dataset, files)
    if whole := next((path for split, path in files if split is None), None):
        _, rows = read_dataset(data_root, dataset, published[0], whole)
        if any(row.split is None for row in rows):
            return published  # one split, unnamed
        splits |= {row.split for row in rows}
    if not splits:
        read_dataset(data_root, dataset, published[0], annotations)  # raises the error that says what is missing
    return [split for split in published if split in splits] + sorted(splits - set(published))


def decoded(name, samples, damaged):
    """Read every image of the samples, and those known to be damaged -> lines: how many cannot be read, and which."""
    own = {sample.image: sample.own for sample in samples} | dict.fromkeys(damaged, True)
    progress = Progress(f"{name}, images read", len(own))
    problems = []
    for number, (image, is_own_image) in enumerate(own.items(), 1):
        try:
            open_image(image) if is_own_image else open_published(image)
        except ImageError as error:
            problems.append(str(error))
        progress(number)
    if not problems:
        return [f"{name}: all {len(own):,} images can be read"]
    return [f"{name}: {len(problems):,} of {len(own):,} images cannot be read:", *(f"  {text}" for text in problems)]


def digest(path):
    """The sha256 of a file; of one that cannot be read, which `decoded` tells, its path."""
    try:
        return hash_of(path)
    except OSError:
        return path


def leakage(name, images):
    """Lines on the training images that are in other splits too; none without training images. images: as in
    `check`."""
    train = images.get((name, "train"))
    lines = []
    for (other, split), ids in images.items():
        if train and split != "train":
            both = [ids[key] for key in train.keys() & ids.keys()]
            example = f", for instance {shown(min(both), 80)}" if both else ""
            lines.append(f"images of {shown(name)} train that are also in {shown(other)} {shown(split, 40)}: "
                         f"{len(both):,}{example}")
    return lines
