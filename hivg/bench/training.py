"""How long the data of training takes, and a training step: `python -m hivg.bench data step`."""

import tempfile
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hivg.bench.timing import measure, peak_memory, reset_peak_memory, show
from hivg.clip import CLIP, CLIP_SIZES
from hivg.data.annotations import Sample
from hivg.data.augment import Augment
from hivg.data.batches import SampleTensors, ShapesTensors
from hivg.losses import LossWeights
from hivg.model import HiVG, HiVGConfig
from hivg.training.criterion import Criterion
from hivg.training.presets import preset_of
from hivg.utils.cli import choose_device, choose_dtype


def bench_data(args):
    """The items that training waits for: drawn images, and photographs as they are and augmented."""
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
    """A training step of a preset at several batch sizes: random weights and images, expressions of 20 tokens."""
    device = choose_device(args.device)
    dtype = choose_dtype("auto", device)
    name = "ViT-L/14" if args.preset.endswith("large") else "ViT-B/16"
    model = preset_model(args.preset, name).to(device).train()
    criterion = Criterion(model, LossWeights(), "smooth_l1")
    for n in args.batch_sizes:
        batch = random_batch(n, model.config.clip, device)
        reset_peak_memory(device)
        times = measure(lambda: step(criterion, batch, device, dtype), 3, device)
        peak = peak_memory(device)
        precision = str(dtype).removeprefix("torch.")
        show(f"{args.preset}, {name}, {n} together, {precision}, {peak / 2**30:.1f} GiB", times)


def preset_model(preset, clip_name):
    """A HiVG of random weights as the preset trains it in its last stage."""
    settings = preset_of(preset)
    clip = CLIP(CLIP_SIZES[clip_name])
    fields = {}
    for name in ("bridge", "text_layers", "lora_rank", "lora_alpha"):
        if name in settings:
            fields[name] = settings[name]
    model = HiVG.from_clip(clip, HiVGConfig.for_clip(clip.config, **fields))
    for stage in (1, 2, 3):
        model.add_stage(stage)
    model.clip.visual.checkpoint = settings.get("checkpoint", False)
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


def step(criterion, batch, device, dtype, clear=True):
    """Forward and backward, without the optimizer's step. clear: drop the gradients."""
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        terms = criterion(batch)
    sum(terms.values()).backward()
    if clear:
        criterion.zero_grad()
