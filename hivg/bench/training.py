"""Time and memory of training: `python -m hivg.bench data step`"""

import tempfile
import time
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hivg.bench.timing import measure, peak_memory, reset_peak_memory, show
from hivg.clip import CLIP_SIZES
from hivg.data.augment import Augment
from hivg.data.batches import SampleTensors, ShapesTensors
from hivg.data.published.reading import Sample
from hivg.fast import training_copy
from hivg.losses import DRAWN_WORLD, LossWeights
from hivg.model import HiVG, HiVGConfig
from hivg.training.criterion import Criterion
from hivg.training.optimizers import make_optimizers, step_optimizers
from hivg.training.presets import preset_of
from hivg.training.stages import clip_name
from hivg.utils.cli import choose_device, choose_dtype, name_of


def bench_data(args):
    """The items that training waits for, in CPU time of a worker: drawn images; photographs, with and without
    augmentation, and its parts."""
    def show_time(name, function):
        times = measure(function, 200, clock=time.process_time)
        show(f"{name}, {1000 / times[1]:.0f} per second and worker", times)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as a worker has
    drawn = ShapesTensors("train", 64)
    index = count()
    show_time("shapes, an image, four expressions", lambda: drawn[next(index)])
    with tempfile.TemporaryDirectory() as folder:
        samples = [photo_sample(Path(folder, "photo.jpg"))]
        plain = SampleTensors(samples, 224)
        augmented = SampleTensors(samples, 224, augment=Augment())
        image = plain.image(0)
        small = image.resize((190, 142), Image.BILINEAR)
        jitter = Augment(jitter_p=1.0)
        rng = np.random.default_rng(0)
        show_time("640 x 480 JPEG", lambda: plain[0])
        show_time("augmented", lambda: augmented[next(index)])
        show_time("  decoding", lambda: plain.image(0))
        show_time("  resizing", lambda: image.resize((224, 168), Image.BILINEAR))
        show_time("  resizing a crop", lambda: image.resize((190, 142), Image.BILINEAR, box=(60, 40, 560, 420)))
        show_time("  jitter", lambda: jitter.recolour(rng, small))
    torch.set_num_threads(threads)


def photo_sample(path):
    """A JPEG of COCO's usual size with a photograph's worth of detail."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(noise).resize((640, 480), Image.BICUBIC).save(path, quality=90)
    return Sample(path, "the dog", (100.0, 100.0, 400.0, 320.0), None, path.name, own=False)


def bench_step(args):
    """A training step of a preset's last stage at several batch sizes, on random weights and images and expressions of
    20 tokens."""
    device = choose_device(args.device)
    dtype = choose_dtype("auto", device)
    preset = args.preset or "refcoco-base"
    clip_name = clip_name_of(preset)
    train_step = train_step_of(preset_model(preset, clip_name), device, dtype)
    for n in args.batch_sizes:
        batch = random_batch(n, CLIP_SIZES[clip_name], device)
        reset_peak_memory(device)
        times = measure(lambda: train_step(batch), 3, device)
        peak = peak_memory(device) / 2**30
        show(f"{preset}, {clip_name}, batch {n}, {name_of(dtype)}, {peak:.1f} GiB", times)


# ---- random models and batches, and what training does with them

# what train.py does without a preset
DEFAULT_RUN = dict(optimizer="muon", clip_grad=1.0, batch_size=32, lora_rank=16, lora_alpha=16.0, box_loss="l1",
                   loss_weights=DRAWN_WORLD)


def settings_of(preset):
    return preset_of(preset) if preset else DEFAULT_RUN


def clip_name_of(preset):
    return clip_name(preset_of(preset)["clip"]) if preset else "tiny"


def preset_model(preset, clip_name):
    """The model that a preset, or None for the default run, trains in its last stage, with random weights."""
    settings = settings_of(preset)
    names = ("bridge", "text_layers", "level_norm", "lora_rank", "lora_alpha")
    fields = {name: settings[name] for name in names if name in settings}
    model = last_stage(HiVGConfig.for_clip(CLIP_SIZES[clip_name], **fields))
    model.clip.visual.recompute = settings.get("recompute", False)
    return model


def last_stage(config):
    """A model with random weights and the adapters of all stages, of which the last ones are trained."""
    model = HiVG(config)
    for stage in (1, 2, 3):
        model.add_stage(stage)
    return model.train()


def random_batch(n, clip, device):
    """n random images with an expression of 20 tokens each, a batch as to_device returns it. clip: a CLIPConfig."""
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


def forward_backward(model, batch, dtype):
    """A training step under the paper's losses, up to the gradients."""
    criterion = Criterion(model, LossWeights(), "smooth_l1")
    with torch.autocast(batch["images"].device.type, dtype, enabled=dtype != torch.float32):
        terms = criterion(batch)
    sum(terms.values()).backward()


def train_step_of(model, device, dtype):
    """-> a function that makes a training step on a batch: forward, backward and AdamW's update."""
    optimizers = make_optimizers(model.to(device), "adamw", 1e-4)
    copy = training_copy(model, dtype)

    def train_step(batch):
        forward_backward(copy, batch, dtype)
        step_optimizers(optimizers)

    return train_step
