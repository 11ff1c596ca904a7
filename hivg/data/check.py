"""A report on the files of a data set, for `python -m hivg.data check`."""

from hivg.data.annotations import Report, is_own, read_dataset, read_samples
from hivg.data.published import DATASETS, canonical


def check(data_root, dataset, annotations=None):
    """The text of the report.

    For each split the number of expressions beside the published one, and the rows that are left out, with the reason;
    then the training images that are in another split too, for the mixture also in the splits of its parts.
    """
    names = [dataset] if is_own(dataset) else [canonical(dataset)]
    if names == ["mixup"]:
        names = ["mixup", *(name for name in DATASETS if name != "mixup")]
    lines = []
    images = {}  # (name, split): the names of its images
    for name in names:
        for split, count in counts_by_split(data_root, name).items():
            report = Report()
            try:
                samples = read_samples(data_root, name, split, annotations, report)
            except ValueError as error:
                if name == names[0]:
                    lines.append(str(error))
                continue
            images[name, split] = {sample.image_id for sample in samples}
            published = f" ({count:,} published)" if count else ""
            lines.append(f"{name} {split}: {len(samples):,} expressions{published}, "
                         f"{len(images[name, split]):,} images")
            lines += report.lines()
    return "\n".join(lines + leakage(names[0], images))


def counts_by_split(data_root, name):
    """{split: published number of expressions or None}; the splits of people's own data are those in the file."""
    if not is_own(name):
        return DATASETS[name].counts
    _, rows = read_dataset(data_root, name, None)
    return {row.split: None for row in rows}


def leakage(name, images):
    """Lines on the training images of a data set that are in other splits too. images: {(name, split): file names}."""
    train = images.get((name, "train"), set())
    lines = []
    for (other, split), names in images.items():
        if split == "train":
            continue
        both = train & names
        example = f", for instance {min(both)}" if both else ""
        lines.append(f"images of {name} train in {other} {split}: {len(both):,}{example}")
    return lines
