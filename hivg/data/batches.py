"""Batches: pictures with expressions to tensors, in an order that depends on the step alone."""

from functools import cache

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from hivg.data.annotations import read_samples
from hivg.data.augment import Augment
from hivg.data.masks import mask_of
from hivg.data.shapes import EXPRESSIONS_PER_SCENE, HARD_MIX, MAX_OBJECTS, Shapes
from hivg.data.transforms import Letterbox


class ShapesTensors(Dataset):
    """Scene i of a split of `shapes` as tensors: a row for each of its expressions, or, with `captions` (for the
    contrastive pre-training), one row whose expression is the caption of the whole picture, with a phrase for each of
    its objects."""

    def __init__(self, split, size, normalization="clip", seed=0, captions=False, weights=None):
        self.shapes = Shapes(split, seed, weights)
        self.size, self.normalization, self.captions = size, normalization, captions
        self.rows = 1 if captions else EXPRESSIONS_PER_SCENE

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        item, n = self.shapes[index], self.rows
        letterbox = Letterbox(*item["image"].size, self.size)
        image = letterbox.image(item["image"], self.normalization)
        if self.captions:
            absent = MAX_OBJECTS - len(item["phrases"])
            return {
                "images": image[None],
                "expressions": [item["caption"]],
                "phrases": item["phrases"] + [""] * absent,  # 8
                "named": torch.tensor([item["named"] + [[-2] * 4] * absent]),  # (1, 8, 4), see phrase_truth
                "attributes": torch.tensor([item["attributes"] + [[-3] * 4] * absent]),  # (1, 8, 4)
            }
        boxes, labels = torch.from_numpy(item["boxes"]), letterbox.labels(item["labels"])
        return {
            "images": image.expand(n, -1, -1, -1),  # (n, 3, S, S)
            "padding_mask": letterbox.padding_mask().expand(n, -1, -1),  # (n, S, S) bool
            "boxes": letterbox.boxes_to_square(boxes),  # (n, 4) cxcywh in 0..1
            "masks": labels == torch.tensor(item["targets"])[:, None, None] + 1,  # (n, S, S) bool
            "image_ids": torch.full((n,), index),
            "expressions": item["expressions"],
            "kinds": item["kinds"],
            "image_names": [f"{self.shapes.split} {index}"] * n,
            "has_mask": torch.ones(n, dtype=torch.bool),
            "pixel_boxes": boxes,  # (n, 4) xyxy in the picture's pixels
            "letterboxes": [letterbox] * n,
        }


class SampleTensors(Dataset):
    """Samples of a data set as tensors, one row an item, with the keys of ShapesTensors. With `augment` it is endless,
    for training: every len() items are all samples once, in an order of their own, each augmented anew; without, it is
    the samples in their order. What an item is depends on (seed, index) only."""

    rows = 1

    def __init__(self, samples, size, normalization="clip", seed=0, augment=None):
        self.samples, self.size, self.normalization = samples, size, normalization
        self.seed, self.augment, self.order = seed, augment, (None, None)
        numbers = {name: i for i, name in enumerate(dict.fromkeys(sample.image for sample in samples))}
        self.image_ids = [numbers[sample.image] for sample in samples]

    def __len__(self):
        return len(self.samples)

    def number(self, index):
        """Which sample an item is."""
        if self.augment is None:
            return index
        epoch, at = divmod(index, len(self))
        if self.order[0] != epoch:
            self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return int(self.order[1][at])

    def __getitem__(self, index):
        number = self.number(index)
        sample = self.samples[number]
        with Image.open(sample.image) as image:
            image = image.convert("RGB")
        box = torch.tensor(sample.box)
        mask = mask_of(sample.segmentation, image.height, image.width)
        letterbox = Letterbox(*image.size, self.size)
        if self.augment is None:
            row = {"image": letterbox.image(image, self.normalization), "padding_mask": letterbox.padding_mask(),
                   "box": letterbox.boxes_to_square(box), "mask": None if mask is None else letterbox.mask(mask)}
        else:
            rng = np.random.default_rng([self.seed, number, index])
            row = self.augment(rng, image, box, mask, sample.expression, self.size, self.normalization)
        return {
            "images": row["image"][None],  # (1, 3, S, S)
            "padding_mask": row["padding_mask"][None],  # (1, S, S) bool
            "boxes": row["box"][None],  # (1, 4) cxcywh in 0..1
            "masks": (box_mask(row["box"], self.size) if mask is None else row["mask"])[None],  # (1, S, S) bool
            "image_ids": torch.tensor([self.image_ids[number]]),
            "expressions": [sample.expression],
            "kinds": [""],
            "image_names": [str(sample.image)],
            "has_mask": torch.tensor([mask is not None]),
            "pixel_boxes": box[None],  # (1, 4) xyxy in the picture's pixels
            "letterboxes": [letterbox],
        }


def box_mask(box, size):
    """A box (4,) cxcywh in 0..1 as a mask (size, size) bool: the pixels whose centre is in it."""
    at = (torch.arange(size) + 0.5) / size
    x, y = ((at - box[i]).abs() < box[i + 2] / 2 for i in (0, 1))
    return y[:, None] & x


_samples = cache(read_samples)  # every stage and validation reads the same


def open_dataset(dataset, split, size, normalization="clip", seed=0, data_root="data", annotations=None, train=False,
                 hard_mix=False):
    """A split of `shapes`, of a data set of annotations.py or of a .jsonl file. harder: train on more of what is
    learned last (shapes). Raises ValueError."""
    if dataset == "shapes":
        return ShapesTensors(split, size, normalization, seed, weights=HARD_MIX if hard_mix and train else None)
    samples = _samples(data_root, dataset, split, annotations)
    if not samples:
        raise ValueError(f"{dataset} {split}: no sample is left; `python -m hivg.data check {dataset}` says why")
    return SampleTensors(samples, size, normalization, seed, Augment() if train else None)


def phrase_truth(named, attributes):
    """Which phrases are true of which pictures: named (M, 4), the attributes a phrase names, -1 where it names none;
    attributes (B, O, 4) of the objects -> (M, B) bool. Rows of -2 and -3, where there is no phrase or object, match
    nothing."""
    named = named[:, None, None]
    return ((named == -1) | (named == attributes)).all(-1).any(-1)


def collate(items):
    """Rows of several scenes -> one batch: tensors concatenated, lists joined."""
    return {key: torch.cat([item[key] for item in items]) if isinstance(value, torch.Tensor)
            else [row for item in items for row in item[key]] for key, value in items[0].items()}


def training_batches(dataset, first_scene, batch_size, batches, start=0, workers=0, rank=0, world=1):
    """Batches `start`..`batches` - 1 of an endless split, of which this rank gets its share of each. Batch k always
    holds the same scenes, those from first_scene + k * scenes per batch on, so a resumed run goes on exactly where it
    was. Raises ValueError unless batch_size is a multiple of the rows of a scene times the ranks."""
    scenes, rest = divmod(batch_size, dataset.rows * world)  # scenes of a rank's share
    if rest or not scenes:
        raise ValueError(f"the batch size must be a multiple of {dataset.rows * world} "
                         f"({dataset.rows} expressions a picture, {world} processes), not {batch_size}")
    starts = [first_scene + (k * world + rank) * scenes for k in range(start, batches)]
    return _loader(dataset, [range(i, i + scenes) for i in starts], workers)


def evaluation_batches(dataset, batch_size=64, workers=0, rank=0, world=1):
    """The whole split, every row once, in order; with several ranks every world-th batch."""
    scenes = max(1, batch_size // dataset.rows)
    starts = range(rank * scenes, len(dataset), world * scenes)
    return _loader(dataset, [range(k, min(k + scenes, len(dataset))) for k in starts], workers)


def _loader(dataset, order, workers):
    # a generator of its own: the loader's seeding must not touch the random numbers of the training
    return DataLoader(dataset, batch_sampler=order, num_workers=workers, collate_fn=collate,
                      generator=torch.Generator())
