"""Tiny seeded models that the test files share, and how two tensors are compared.

The models are in float64 unless a test asks for float32: what should be equal then agrees to 1e-10, so a wrong term
cannot pass for rounding.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hivg.clip import CLIP, CLIPConfig
from hivg.losses import LossWeights, grounding_losses
from hivg.model import HiVG, HiVGConfig
from hivg.tokenizer import Tokenizer, learn_merges

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT.parent / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no folder ../shared/golden with the golden files here")

BUNDLED = ROOT / "weights" / "hivg-tiny.safetensors"

TEXTS = ["man", "the red cup on the left", "giraffe!", "second small blue box from the right, under the two green cups"]
OUTPUTS = ("boxes", "token_similarity", "mask_logits", "logits_per_text", "text_features", "image_features")


def assert_close(name, a, b, tol):
    """Same shape, and nowhere further apart than `tol`; says which tensor it was, and by how much."""
    assert a.shape == b.shape, f"{name}: shape {tuple(a.shape)} against {tuple(b.shape)}"
    difference = (a.double() - b.double()).abs()
    largest = difference.max().item()
    mean = difference.mean().item()
    assert largest <= tol, f"{name}: largest difference {largest:.2e}, mean {mean:.2e}, tolerance {tol:.0e}"


def assert_same_output(a, b, tol=1e-10, names=OUTPUTS):
    """Two HiVGOutputs have the same in these fields."""
    for name in names:
        assert_close(name, getattr(a, name), getattr(b, name), tol)


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def random(*shape, seed=0):
    """Normal numbers in float64, the same for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_boxes(n, seed=0):
    """(n, 4) xyxy within 0..1, in float64."""
    corners = torch.rand(n, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([corners.amin(1), corners.amax(1)], -1)


def to_cxcywh(boxes):
    """(..., 4) xyxy -> (..., 4) cxcywh."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def randomise(module, seed=0, std=0.05):
    """Shift every parameter by noise, so that nothing that starts at 0 or 1 (new bridges and adapters, biases, norms)
    hides from a test."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(std * torch.randn(p.shape, generator=generator))
    return module


def make_clip(seed=0, dtype=torch.float64, **changes):
    """A CLIP in evaluation mode with its tokenizer: 64 x 64 images, a grid of 4 x 4 patches; every width is another
    number."""
    torch.manual_seed(seed)
    sizes = dict(image_size=64, patch_size=16, vision_width=64, vision_layers=3, vision_heads=4, text_width=48,
                 text_layers=2, text_heads=3, embed_dim=40, vocab_size=make_tokenizer().vocab_size)
    clip = randomise(CLIP(CLIPConfig(**(sizes | changes))), seed).to(dtype).eval()
    clip.tokenizer = make_tokenizer(clip.config.context_length)
    return clip


def make_tokenizer(context_length=77):
    return Tokenizer(learn_merges(TEXTS * 2, 20), context_length)


def make_hivg(seed=0, dtype=torch.float64, fresh=False, **changes):
    """A HiVG in evaluation mode on the tiny CLIP; all its weights are random unless it is to be `fresh`. `changes` are
    fields of HiVGConfig."""
    clip = make_clip(seed, torch.float32)
    torch.manual_seed(seed + 1)
    sizes = dict(bridge_blocks=(0, 2), text_layers=(1, 2), visual_levels=(1, 3), width=32, encoder_layers=2,
                 encoder_heads=4, encoder_ffn=56, rtcc_hidden=72, lora_rank=4)
    model = HiVG.from_clip(clip, HiVGConfig(clip=clip.config, **(sizes | changes | {"stage": 0})))
    for stage in range(1, changes.get("stage", 0) + 1):
        model.add_stage(stage)
    return (model if fresh else randomise(model, seed + 2)).to(dtype).eval()


def make_batch(texts=TEXTS, seed=3, dtype=torch.float64):
    """images (B, 3, 64, 64), padding_mask (B, 64, 64), token_ids (B, T): landscape, portrait and square in turn."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(texts), 3, 64, 64, generator=generator)
    padding = torch.zeros(len(texts), 64, 64, dtype=torch.bool)
    padding[0::3, :20] = True  # landscape: rows 0 and 3 of the patches, and a bit of 1 and 2
    padding[0::3, 44:] = True
    padding[1::3, :, :5] = True  # portrait: column 3, half of column 2, a bit of column 0
    padding[1::3, :, 40:] = True
    images = images.masked_fill(padding[:, None], 0).to(dtype)
    return images, padding, make_tokenizer()(texts)


def make_training_batch(texts=TEXTS, dtype=torch.float32):
    """make_batch's, with the targets of a training step: each text of an image of its own."""
    images, padding_mask, token_ids = make_batch(texts, dtype=dtype)
    n = len(images)
    boxes = torch.tensor([[0.5, 0.4, 0.3, 0.2]] * n, dtype=dtype)
    return {"images": images, "padding_mask": padding_mask, "token_ids": token_ids, "boxes": boxes,
            "masks": torch.ones(n, 64, 64, dtype=torch.bool), "image_ids": torch.arange(n)}


def terms_of(model, batch, weights=LossWeights()):
    """{name: loss} of a model for make_training_batch's."""
    output = model(batch["images"], batch["padding_mask"], batch["token_ids"])
    return grounding_losses(output, batch, output.logits_per_text, batch["image_ids"], weights)


def loss_of(model, weights=LossWeights()):
    """All losses of a training step, in one number. The batch has the model's dtype."""
    return sum(terms_of(model, make_training_batch(dtype=model.position.dtype), weights).values())


def watch(model, name, run, batch):
    """The arguments that a method of the model is called with, once, while `run(*batch)` runs."""
    method = getattr(model, name)
    calls = []
    with pytest.MonkeyPatch.context() as patch:  # in __dict__ it is found before the class's method
        patch.setitem(model.__dict__, name, lambda *args: calls.append(args) or method(*args))
        run(*batch)
    [args] = calls
    return args


def calls_of(monkeypatch, owner, name):
    """The arguments of each call of owner.NAME from now on, without those given by name; it does what it did."""
    function = getattr(owner, name)
    calls = []
    monkeypatch.setattr(owner, name, lambda *args, **options: calls.append(args) or function(*args, **options))
    return calls


def trained(model):
    """The names of the parameters that are trained."""
    return {name for name, p in model.named_parameters() if p.requires_grad}


def raising(error):
    """A function that raises it, whatever it is called with."""
    def work(*_, **__):
        raise error
    return work


def python(*args, cwd=ROOT, **options):
    """Python in a process of its own; `options` are more of subprocess.run's."""
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, text=True, capture_output=True, **options)


def ended(capfd, start, *args, **options):
    """A program in this process -> (exit code, stdout, stderr)."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        start(*args, **options)
    return stop.value.code, *capfd.readouterr()


def refusal(call, *args, error=ValueError, **options):
    """What the error of a call says, in one line."""
    with pytest.raises(error) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300, message
    return message
