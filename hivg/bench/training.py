"""Time and memory of the training: its data and its steps. `python -m hivg.bench data step`"""

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
from hivg.clip import CLIP_SIZES
from hivg.data.augment import Augment
from hivg.data.batches import SampleTensors, ShapesTensors
from hivg.data.published.reading import Sample
from hivg.losses import LossWeights
from hivg.model import HiVG, HiVGConfig
from hivg.training.criterion import Criterion
from hivg.training.optimizers import make_optimizers, step_optimizers
from hivg.training.presets import preset_of
from hivg.utils.cli import choose_device, choose_dtype

CPU = torch.device("cpu")


def bench_data(args):
    """What a data loader's worker does for an item: draw it, or read a photograph, as it is or augmented."""
    indices = count()
    shapes = ShapesTensors("train", 64)
    times = measure(lambda: shapes[next(indices)], 300)
    show("shapes train, an image with its four expressions", times)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "photo.jpg")  # of COCO's usual size, with a photograph's amount of detail
        noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(noise).resize((640, 480), Image.BICUBIC).save(path, quality=90)
        outline = [100.0, 100.0, 400.0, 120.0, 380.0, 300.0, 120.0, 320.0]
        samples = [Sample(path, "the dog", (100.0, 100.0, 400.0, 320.0), [outline], path.name)] * 200
        for name, augment in (("read and fitted", None), ("read and augmented", Augment())):
            indices = count()
            photos = SampleTensors(samples, 224, augment=augment)
            times = measure(lambda: photos[next(indices)], 100)
            show(f"640 x 480 JPEG {name}, {1000 / times[1]:.0f} a second and worker", times)


def bench_step(args):
    """The peak memory of a training step at the preset's own batch size, counted by `count_memory`; then the time and
    memory of real steps at other sizes. Parameters and images are random, expressions have 20 tokens."""
    device = choose_device(args.device)
    dtype = choose_dtype("auto", device)
    clip_name = "ViT-L/14" if args.preset.endswith("large") else "ViT-B/16"
    n = preset_of(args.preset)["batch_size"]
    gib = count_memory(args.preset, clip_name, n) / 2**30
    print(f"{args.preset}, {clip_name}, {n} together, bfloat16: {gib:.1f} GiB counted, for a CPU", flush=True)
    model = preset_model(args.preset, clip_name).to(device)
    train_step = train_step_of(model, device, dtype)
    for n in args.batch_sizes:
        batch = random_batch(n, model.config.clip, device)
        reset_peak_memory(device)
        times = measure(lambda: train_step(batch), 3, device)
        gib = peak_memory(device) / 2**30
        show(f"{args.preset}, {clip_name}, {n} together, {str(dtype).removeprefix('torch.')}, {gib:.1f} GiB", times)


class TensorMemory(TorchDispatchMode):
    """A context in which the bytes of all new tensors are counted: `now`, and `most`, the peak."""

    def __init__(self):
        super().__init__()
        self.now = 0
        self.most = 0
        self.seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        storages = [tensor.untyped_storage() for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
        for storage in storages:
            if storage not in self.seen:  # several tensors may share one
                self.seen[storage] = True
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, n_bytes):
        self.now -= n_bytes


def count_memory(preset, clip_name, n, dtype=torch.bfloat16):
    """Bytes at the peak of a preset's last stage, n expressions together: parameters, AdamW's state, gradients, and
    what a step keeps for its backward.

    Counted on fake tensors, which hold no data, so any machine can tell. They compute as a CPU does, whose attention
    keeps more for its backward: where 28.9 GiB were counted, an H200 took 18.8.
    """
    with FakeTensorMode():
        model = preset_model(preset, clip_name)
        criterion = Criterion(model, LossWeights(), "smooth_l1")
        batch = random_batch(n, model.config.clip, CPU)
        with TensorMemory() as memory:
            for _ in range(2):  # the second begins with the gradients of the first, as when they are accumulated
                forward_backward(criterion, batch, CPU, dtype)
    # what was there before: parameters, and AdamW's two averages of each that is trained
    return memory.most + sum(p.nbytes * (3 if p.requires_grad else 1) for p in model.parameters())


def preset_model(preset, clip_name):
    """A HiVG as the preset trains it in its last stage, with random parameters."""
    settings = preset_of(preset)
    names = {"bridge", "text_layers", "level_norm", "lora_rank", "lora_alpha"} & settings.keys()
    config = HiVGConfig.for_clip(CLIP_SIZES[clip_name], **{name: settings[name] for name in names})
    model = adapted_model(config)
    model.clip.visual.recompute = settings.get("recompute", False)
    return model


def adapted_model(config):
    """A HiVG of random parameters in Hi LoRA's last stage: all adapters are there, the last ones are trained."""
    model = HiVG(config)
    for stage in (1, 2, 3):
        model.add_stage(stage)
    return model.train()


def random_batch(n, clip, device):
    """n expressions of 20 tokens about n images, with the keys of a training batch. clip: a CLIPConfig."""
    size = clip.image_size
    nothing = torch.zeros(n, size, size, dtype=torch.bool)
    token_ids = torch.full((n, 20), 320)  # any word
    token_ids[:, -1] = clip.vocab_size - 1  # the end token
    batch = {"images": torch.randn(n, 3, size, size), "padding_mask": nothing, "masks": nothing,
             "boxes": torch.full((n, 4), 0.5), "token_ids": token_ids, "image_ids": torch.arange(n)}
    return {key: value.to(device) for key, value in batch.items()}


def train_step_of(model, device, dtype):
    """-> a function of a batch that makes a training step: forward, backward and AdamW's update."""
    criterion = Criterion(model, LossWeights(), "smooth_l1")
    optimizers = make_optimizers(model, "adamw", 1e-4)

    def train_step(batch):
        forward_backward(criterion, batch, device, dtype)
        step_optimizers(optimizers)

    return train_step


def forward_backward(criterion, batch, device=CPU, dtype=torch.float32):
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        terms = criterion(batch)
    sum(terms.values()).backward()
