"""Batches: images with expressions to tensors, in an order that depends on the step alone.

Worker processes read, augment and tokenise. Images stay bytes until they are on the device (`to_device`).
"""

import os
import sys
import zlib
from functools import cache, lru_cache
from itertools import chain
from multiprocessing import Queue, queues

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hivg.data.augment import Augment
from hivg.data.drawn.expressions import NOTHING
from hivg.data.drawn.scenes import DRAWN, EXPRESSIONS_PER_SCENE, HARD_MIX, Shapes
from hivg.data.images import ImageError, open_image, open_published
from hivg.data.masks import mask_of
from hivg.data.published.catalogue import DATA_ROOT
from hivg.data.published.reading import read_samples, refuse_annotations
from hivg.data.transforms import Letterbox, normalise
from hivg.utils.messages import shown

CPU = torch.device("cpu")
MASKS = ("auto", "box", "segmentation")
STAGE_ITEMS = 2**32  # the data of stage n begin at item n times this
SHARED_MEMORY = "/dev/shm"  # where Linux keeps what processes share; workers send their batches through it
MORE = "a container gets more by --shm-size=8g"
LOST = (f"the data workers cannot send their batches: too little shared memory ({MORE}), memory, or open files "
        "(ulimit -n); --workers 0 does without them")


class ShapesTensors(Dataset):
    """A split of the drawn world as tensors: item i is scene i, with a row for each of its expressions."""

    rows = EXPRESSIONS_PER_SCENE  # of an item
    samples = ()  # of files: none
    texts = {"token_ids": "expressions"}  # {name of the token ids: name of their texts}

    def __init__(self, split, size, normalization="clip", seed=0, wide=False, **mix):
        """size: side of the square in pixels. mix: weights, plain and reframe of Shapes."""
        self.shapes = Shapes(split, seed, captions=False, wide=wide, **mix)
        self.size = size
        self.normalization = normalization

    def __len__(self):
        return len(self.shapes)

    def image(self, number):
        """The image of expression `number` of the split, PIL RGB."""
        return self.shapes[number // self.rows]["image"]

    def __getitem__(self, index):
        item = self.shapes[index]
        n = self.rows
        letterbox = Letterbox(*item["image"].size, self.size)
        pixels = letterbox.pixels(item["image"])  # (3, S, S) uint8
        boxes = torch.from_numpy(item["boxes"])  # (n, 4)
        labels = letterbox.labels(item["labels"])  # (S, S), i + 1 where object i shows
        targets = torch.tensor(item["targets"])  # (n,)
        present = targets != NOTHING  # (n,)
        return {
            "pixels": pixels.expand(n, -1, -1, -1),  # (n, 3, S, S) uint8
            "padding_mask": letterbox.padding_mask().expand(n, -1, -1),  # (n, S, S) bool
            "present": present,  # (n,) bool: false for an expression that is true of nothing in the image
            "boxes": letterbox.boxes_to_square(boxes) * present[:, None],  # (n, 4) cxcywh in 0..1, or zeros
            "masks": (labels == targets[:, None, None] + 1) & present[:, None, None],  # (n, S, S) bool
            "image_ids": torch.full((n,), index),
            "expressions": item["expressions"],
            "kinds": item["kinds"],
            "details": item["details"],
            "image_names": [f"{self.shapes.split} {index}"] * n,
            "has_mask": present,
            "pixel_boxes": boxes,  # (n, 4) xyxy in the image's pixels, or zeros
            "letterboxes": [letterbox] * n,
        }


class SampleTensors(Dataset):
    """Samples of a data set as tensors: an item is one sample, a row with the keys of ShapesTensors.

    Without `augment`, the items are the samples in their order. With it, they are endless, for training: from the start
    of a stage, every len() items are all samples once, in a new order, each augmented differently. An item depends on
    (seed, index) only.
    """

    rows = 1  # of an item
    texts = ShapesTensors.texts

    def __init__(self, samples, size, normalization="clip", seed=0, augment=None, masks="auto"):
        """masks: the target of the mask head. "box": the filled box, as in the released program. "segmentation": the
        data set's outline, or the box if a sample has none. "auto": the outline in people's own data, else the box."""
        if masks not in MASKS:
            raise ValueError(f"masks must be one of {', '.join(MASKS)}, not {masks!r:.60}")
        for sample in samples:
            xmin, ymin, xmax, ymax = sample.box
            if not (xmax > xmin and ymax > ymin):
                raise ValueError(f"{shown(sample.image, 150)}: its box {sample.box} has no area; boxes are (xmin, "
                                 "ymin, xmax, ymax)")
        self.samples = samples
        self.masks = masks
        self.size = size
        self.normalization = normalization
        self.seed = seed
        self.augment = augment
        image_ids = {}  # {path: number of the image}
        self.image_ids = [image_ids.setdefault(sample.image, len(image_ids)) for sample in samples]

    def __len__(self):
        return len(self.samples)

    def number(self, index):
        """The sample number of item `index`."""
        if self.augment is None:
            return index
        stage, index = divmod(index, STAGE_ITEMS)
        epoch, position = divmod(index, len(self))
        return int(shuffled(len(self), self.seed, stage, epoch)[position])

    def image(self, number):
        """The image of sample `number`, PIL RGB. Raises ImageError, which names it."""
        sample = self.samples[number]
        try:
            return open_image(sample.image) if sample.own else open_published(sample.image)
        except ImageError as error:
            raise ImageError(f"{shown(error, 230)}; `python -m hivg.data check NAME --decode` lists all") from None

    def outline(self, sample, image):
        """(H, W) bool, or None if the box serves as mask. Raises ValueError, which names the image."""
        if self.masks == "box" or (self.masks == "auto" and not sample.own):
            return None
        try:
            return mask_of(sample.segmentation, image.height, image.width)
        except ValueError as error:
            raise ValueError(f"{shown(sample.image, 150)}: {shown(error, 110)}; correct its annotations") from None

    def __getitem__(self, index):
        """Raises ValueError (ImageError), which names the image."""
        number = self.number(index)
        sample = self.samples[number]
        image = self.image(number)
        box = torch.tensor(sample.box)
        mask = self.outline(sample, image)
        letterbox = Letterbox(*image.size, self.size)
        if self.augment:
            rng = np.random.default_rng([self.seed, number, index])
            row = self.augment(rng, image, box, mask, sample.expression, self.size)
        else:
            row = letterbox.fitted(image, box, mask)
        if mask is None:
            row["mask"] = box_mask(row["box"], self.size)
        return {
            "pixels": row["pixels"][None],  # (1, 3, S, S) uint8
            "padding_mask": row["padding_mask"][None],  # (1, S, S) bool
            "boxes": row["box"][None],  # (1, 4) cxcywh in 0..1
            "masks": row["mask"][None],  # (1, S, S) bool
            "image_ids": torch.tensor([self.image_ids[number]]),
            "expressions": [sample.expression],
            "kinds": [""],
            "details": [""],
            "image_names": [str(sample.image)],
            "has_mask": torch.tensor([mask is not None]),
            "pixel_boxes": box[None],  # (1, 4) xyxy in the image's pixels
            "letterboxes": [letterbox],  # of the whole image, without augmentation
        }


@lru_cache(maxsize=2)
def shuffled(count, *seeds):
    """The numbers below `count` in random order."""
    return np.random.default_rng(seeds).permutation(count)


def box_mask(box, size):
    """A box (4,) cxcywh in 0..1 as a mask (size, size) bool: the pixels whose centre is in it, and the one that its own
    centre is in."""
    centres = (torch.arange(size) + 0.5) / size  # (size,)
    columns = (centres - box[0]).abs() < box[2] / 2  # (size,)
    rows = (centres - box[1]).abs() < box[3] / 2  # (size,)
    mask = rows[:, None] & columns
    x, y = (box[:2] * size).long().clamp(0, size - 1)
    mask[y, x] = True  # of a box that is thinner than a pixel
    return mask


def open_dataset(dataset, split, size, normalization="clip", seed=0, data_root=DATA_ROOT, annotations=None, train=False,
                 hard_mix=False, masks="auto"):
    """A split of a drawn data set, of one of published/catalogue.py, or of a .jsonl or .json file.

    train: endless and augmented. hard_mix: train on more of the expressions that are learned last (drawn data only).
    masks: see SampleTensors; drawn ones are always exact. Raises ValueError.
    """
    if dataset in DRAWN:
        refuse_annotations(dataset, annotations)
        mix = HARD_MIX[dataset] if hard_mix and train else {}
        return ShapesTensors(split, size, normalization, seed, wide=dataset == "shapes-wide", **mix)
    samples = read_samples(data_root, dataset, split, annotations)
    if not samples:
        raise ValueError(f"{shown(dataset)} {shown(split, 30)}: no samples are left; `python -m hivg.data check "
                         f"{shown(dataset, 90)}` says why")
    return SampleTensors(samples, size, normalization, seed, Augment() if train else None, masks)


def fingerprint(*datasets):
    """A number that other samples, in another order or with other boxes, do not have; drawn data have none to tell."""
    samples = [(sample.image.name, sample.expression, sample.box) for dataset in datasets for sample in dataset.samples]
    return zlib.crc32(repr(samples).encode())


def count_cut(dataset, tokenizer):
    """How many expressions of samples from files have more tokens than the tokenizer keeps."""
    texts = [sample.expression for sample in dataset.samples]
    long = [text for text in texts if len(text.encode(errors="replace")) > tokenizer.room]  # a token has a byte or more
    return sum(len(tokenizer.encode(text)) > tokenizer.room for text in long)


def count_shared(dataset, other):
    """How many images two data sets of samples from files share."""
    return len({sample.image for sample in dataset.samples} & {sample.image for sample in other.samples})


def collate(items):
    """Items of a data set -> one batch: tensors concatenated, lists joined."""
    batch = {}
    for key, value in items[0].items():
        values = [item[key] for item in items]
        batch[key] = torch.cat(values) if isinstance(value, torch.Tensor) else list(chain(*values))
    return batch


def training_batches(dataset, first_item, batch_size, batches, start=0, workers=0, rank=0, world_size=1, device=CPU,
                     tokenizer=None):
    """This rank's share of batches `start`..`batches` - 1 of an endless split.

    Batch k always holds the same items, counted from first_item, so a resumed run continues exactly where it was. One's
    own loop takes this in place of a DataLoader, which would repeat the augmentation from epoch to epoch. A `dataset`
    of SampleTensors needs `augment`, which makes it endless.
    workers: number of processes that prepare the batches, -1 = automatic. device: the one they are for. tokenizer: if
    given, the workers tokenise the texts. Raises ValueError unless batch_size is a multiple of the ranks times the rows
    of an item.
    """
    unit = dataset.rows * world_size
    items, rest = divmod(batch_size, unit)  # items in a rank's share of a batch
    if rest or items < 1:
        nearest = [size for size in (items * unit, (items + 1) * unit) if size > 0] or [unit]
        raise ValueError(f"--batch_size: {batch_size}, a multiple of {unit} needed ({dataset.rows} expressions an "
                         f"item, {world_size} process(es)); use {' or '.join(map(str, nearest))}")
    firsts = [first_item + (k * world_size + rank) * items for k in range(start, batches)]
    return make_loader(dataset, [range(first, first + items) for first in firsts], workers, device, tokenizer)


def evaluation_batches(dataset, batch_size=64, workers=0, rank=0, world_size=1, device=CPU):
    """The whole split, every row once, in order; with several ranks every world_size-th batch."""
    items = max(1, batch_size // dataset.rows)
    indices = range(len(dataset))
    order = [indices[first : first + items] for first in indices[rank * items :: world_size * items]]
    return make_loader(dataset, order, workers, device)


def choose_workers(workers, device, batch_bytes=0):
    """The number of processes that prepare this rank's data. -1 = automatic: one for a CPU, whose other cores the model
    needs; up to 8 for a GPU, out of the cores that each rank has to itself; fewer where the shared memory has no room
    for their batches of so many bytes."""
    if workers >= 0:
        return workers
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this machine, from torchrun
    wanted = 1
    if device.type != "cpu":
        cores = os.cpu_count() or 1
        own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
        if own == cores:  # else the launcher has given each rank cores of its own
            own //= ranks
        wanted = min(8, max(1, own - 1))
    shared = os.statvfs(SHARED_MEMORY) if batch_bytes and os.path.isdir(SHARED_MEMORY) else None
    if not (shared and shared.f_blocks):  # unknown, or without a limit
        return wanted
    batches = shared.f_bavail * shared.f_frsize // (batch_bytes * ranks)
    chosen = min(wanted, max(0, batches - 2) // 2)  # two of each worker, and two that the model has or had
    if chosen < wanted and os.environ.get("LOCAL_RANK", "0") == "0":
        tell(f"data workers: {chosen} instead of {wanted}, as {SHARED_MEMORY} has no room for more; {MORE}")
    return chosen


@cache  # each line once, not in every epoch
def tell(line):
    print(line, file=sys.stderr)


def make_loader(dataset, order, workers, device, tokenizer=None):
    """Batches one after another. order: the item indices of each batch. Other arguments as in training_batches.

    Raises an item's ValueError or MemoryError, for instance a damaged image's, with its own message: a DataLoader would
    add the worker's traceback to it. Raises ValueError if a worker is lost."""
    # of a row: 3 bytes a pixel, and two masks
    batch_bytes = max(map(len, order), default=0) * dataset.rows * 5 * dataset.size**2
    workers = choose_workers(workers, device, batch_bytes)
    # a generator of its own: the loader must not draw from the training's random numbers
    loader = DataLoader(Batches(dataset, order, tokenizer), batch_size=None, num_workers=workers,
                        worker_init_fn=end_with_a_lost_batch, generator=torch.Generator(),
                        pin_memory=device.type == "cuda")  # lets a GPU copy in the background
    try:
        if workers:  # as many pipes and semaphores as the loader will make, which prints a traceback if it cannot
            [Queue() for _ in range(2 * workers + 4)]
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        if not workers or str(error).startswith("Caught "):  # raised by an item, not by the loader
            raise
        raise ValueError(LOST) from None


def end_with_a_lost_batch(worker):
    """Make this worker end if a batch cannot be sent: its queue would drop the batch, with a traceback, and the loader
    wait for it for ever. The end of a worker it notices."""
    def end(*error):
        os._exit(0)  # with another code the loader raises in the midst of a step, not where it waits for a batch

    queues.Queue._on_queue_feeder_error = end  # no room in the shared memory
    sys.excepthook = end  # of the thread that hands over open files: no more of them


class Batches(Dataset):
    """Whole batches as items; a batch that cannot be made is returned as its error."""

    def __init__(self, dataset, order, tokenizer):
        self.dataset = dataset
        self.order = order
        self.tokenizer = tokenizer

    def __len__(self):
        return len(self.order)

    def __getitem__(self, number):
        try:
            batch = collate([self.dataset[index] for index in self.order[number]])
        except (ValueError, MemoryError) as error:
            return error
        batch["normalization"] = self.dataset.normalization
        if self.tokenizer:
            for name, texts in self.dataset.texts.items():
                batch[name] = self.tokenizer(batch[texts])  # (B, T)
        return batch


def to_device(batch, tokenizer, device):
    """A batch with its tensors on the device, and images (B, 3, S, S) float32, normalised there, in place of pixels.
    Its expressions become token_ids (B, T), unless a worker has done so."""
    if "token_ids" not in batch:
        batch = batch | {"token_ids": tokenizer(batch["expressions"])}
    tensors = {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}
    moved = batch | {key: value.to(device, non_blocking=True) for key, value in tensors.items()}
    moved["images"] = normalise(moved.pop("pixels"), moved["padding_mask"], moved["normalization"])
    return moved
