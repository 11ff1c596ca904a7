"""The data of training, and a training step: time and memory. `python -m hivg.bench data step`"""

import tempfile
import weakref
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from hivg.bench.timing import measure, peak_memory, reset_peak_memory, show
from hivg.clip import CLIP, CLIP_SIZES
from hivg.data.augment import Augment
from hivg.data.batches import SampleTensors, ShapesTensors
from hivg.data.published.reading import Sample
from hivg.losses import LossWeights
from hivg.model import HiVG, HiVGConfig
from hivg.training.criterion import Criterion
from hivg.training.optimizers import make_optimizers, step_optimizers
from hivg.training.presets import preset_of
from hivg.utils.cli import choose_device, choose_dtype


def bench_data(args):
    """The items that training waits for: drawn images, and photographs, plain and augmented."""
    shapes = ShapesTensors("train", 64)
    numbers = count()
    times = measure(lambda: shapes[next(numbers)], 300)
    show("shapes train, an image with its four expressions", times)

    with tempfile.TemporaryDirectory() as folder:
        samples = [photo_sample(Path(folder, "photo.jpg"))]
        fitted = SampleTensors(samples, 224)
        times = measure(lambda: fitted[0], 100)
        show(f"640 x 480 JPEG read and fitted, {1000 / times[1]:.0f} a second and worker", times)
        augmented = SampleTensors(samples, 224, augment=Augment())
        numbers = count()
        times = measure(lambda: augmented[next(numbers)], 100)
        show(f"640 x 480 JPEG and augmented, {1000 / times[1]:.0f} a second and worker", times)


def photo_sample(path):
    """A JPEG of COCO's usual size with a photograph's worth of detail, and an outlined object in it."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(noise).resize((640, 480), Image.BICUBIC).save(path, quality=90)
    outline = [100.0, 100.0, 400.0, 120.0, 380.0, 300.0, 120.0, 320.0]
    return Sample(path, "the dog", (100.0, 100.0, 400.0, 320.0), [outline], path.name)


def bench_step(args):
    """A training step of a preset at several batch sizes, with random weights and images and expressions of 20 tokens;
    first the memory it would take on one device at the preset's own batch (`count_memory`)."""
    device = choose_device(args.device)
    dtype = choose_dtype("auto", device)
    name = "ViT-L/14" if args.preset.endswith("large") else "ViT-B/16"
    own = preset_of(args.preset)["batch_size"]
    counted = count_memory(args.preset, name, own) / 2**30
    print(f"{args.preset}, {name}, {own} together, bfloat16: {counted:.1f} GiB counted, for a CPU", flush=True)
    model = preset_model(args.preset, name).to(device).train()
    train_step = train_step_of(model, device, dtype)
    for n in args.batch_sizes:
        batch = random_batch(n, model.config.clip, device)
        reset_peak_memory(device)
        times = measure(lambda: train_step(batch), 3, device)
        peak = peak_memory(device)
        precision = str(dtype).removeprefix("torch.")
        show(f"{args.preset}, {name}, {n} together, {precision}, {peak / 2**30:.1f} GiB", times)


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of tensors that come and go while it is active; `most` is the peak."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.most = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        if storage in self.seen:  # several tensors share one
            return
        self.seen[storage] = True
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self.free, storage.nbytes())

    def free(self, n_bytes):
        self.now -= n_bytes


def count_memory(preset, clip_name, n, dtype=torch.bfloat16):
    """Peak bytes of all tensors in the last stage of a preset with n expressions together: weights, AdamW's state,
    gradients, and what a step keeps for its backward.

    Counted on fake tensors, so on any machine, but as a CPU computes, whose attention keeps more for its gradient:
    where 28.9 GiB were counted, an H200 took 18.8.
    """
    cpu = torch.device("cpu")
    with FakeTensorMode():
        model = preset_model(preset, clip_name).train()
        criterion = Criterion(model, LossWeights(), "smooth_l1")
        batch = random_batch(n, model.config.clip, cpu)
        with TensorMemory() as memory:
            for _ in range(2):  # in the second the gradients of the first are there, as after an accumulated part
                step(criterion, batch, cpu, dtype)
    constant = 0  # what was there before, and stays
    for p in model.parameters():
        constant += p.nbytes
        if p.requires_grad:
            constant += 2 * p.nbytes  # AdamW's two averages
    return constant + memory.most


def preset_model(preset, clip_name):
    """A HiVG of random weights as the preset trains it in its last stage."""
    settings = preset_of(preset)
    clip = CLIP(CLIP_SIZES[clip_name])
    fields = {}
    for name in ("bridge", "text_layers", "level_norm", "lora_rank", "lora_alpha"):
        if name in settings:
            fields[name] = settings[name]
    model = HiVG.from_clip(clip, HiVGConfig.for_clip(clip.config, **fields))
    for stage in (1, 2, 3):
        model.add_stage(stage)
    model.clip.visual.recompute = settings.get("recompute", False)
    return model


def random_batch(n, clip, device):
    size = clip.image_size
    token_ids = torch.full((n, 20), 320)  # any word
    token_ids[:, -1] = clip.vocab_size - 1  # the end token
    batch = {
        "images": torch.randn(n, 3, size, size),
        "padding_mask": torch.zeros(n, size, size, dtype=torch.bool),
        "boxes": torch.full((n, 4), 0.5),
        "masks": torch.zeros(n, size, size, dtype=torch.bool),
        "token_ids": token_ids,
        "image_ids": torch.arange(n),
    }
    return {key: value.to(device) for key, value in batch.items()}


def train_step_of(model, device, dtype):
    """-> a function of a batch, that makes a training step: forward, backward and AdamW's update."""
    criterion = Criterion(model, LossWeights(), "smooth_l1")
    optimizers = make_optimizers(model, "adamw", 1e-4)

    def train_step(batch):
        step(criterion, batch, device, dtype)
        step_optimizers(optimizers)

    return train_step


def step(criterion, batch, device, dtype):
    """Forward and backward, without the optimizer's step."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        terms = criterion(batch)
    sum(terms.values()).backward()
