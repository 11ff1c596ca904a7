"""Make the tiny CLIP that the bundled HiVG starts from: contrastive pre-training on images and texts of `shapes`.

    python -m hivg.training.pretrain                         runs/clip/clip.safetensors
    python -m hivg.training.pretrain --name NAME --resume    resume after an interruption, bit for bit
    python train.py --clip runs/clip/clip.safetensors        train HiVG on it

This is not in the paper, which starts from OpenAI's CLIP. Two contrasts are learned, without any box:

    clc       CLIP's own, of an image ([CLS]) with a caption of the whole image
    phrases   of the patches of an image with a phrase about each of its objects, as in FILIP (Yao et al. 2022)

The second is there because [CLS] alone would need many more images to tell shapes apart (LOG.md). Images come in pairs,
twins, in which the same phrases with another shape are true.
"""

import time
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from hivg import weights
from hivg.clip import CLIP, CLIP_SIZES, at_end_token, bounded_logit_scale, similarity
from hivg.data.batches import evaluation_batches, training_batches
from hivg.data.shapes import MAX_OBJECTS, Shapes
from hivg.data.transforms import Letterbox
from hivg.losses import contrastive_loss
from hivg.tokenizer import Tokenizer, learn_merges
from hivg.training import distributed
from hivg.training.checkpoint import open_run, restore, save_state
from hivg.training.flags import RUNS, check_settings, setting, settings_from_flags
from hivg.training.log import Log
from hivg.training.optimizers import check_finite, learning_rate, make_optimizers, set_learning_rate, step_optimizers
from hivg.utils.cli import choose_device, choose_dtype, fail

N_MERGES = 512  # of the tokenizer: enough for a token to every word of `shapes`
NO_PHRASE = -2  # fills `named` where an image has fewer objects than MAX_OBJECTS
NO_OBJECT = -3  # fills `attributes` there


@dataclass
class Settings:
    """Every setting is a flag of the same name."""

    name: str = setting("clip", "the run's folder under runs/", group="The run")
    resume: bool = setting(False, "continue an interrupted run from its last state", resumable=True)
    save_minutes: float = setting(2.0, "minutes of work that an interruption may cost", low=0, high=1e4, resumable=True)
    seed: int = setting(0, "seed of all random numbers", low=0, high=2**31)
    workers: int = setting(1, "processes that draw the images", low=0, high=256, resumable=True)

    epochs: int = setting(12, "epochs", low=1, high=10**6, group="Optimization")
    epoch_samples: int = setting(8192, "images in an epoch", low=1, high=10**9)
    batch_size: int = setting(32, "images in a batch, over all processes; even, for twins", low=2, high=10**6)
    optimizer: str = setting("muon", "muon for matrices and adamw for the rest, or adamw for all",
                             choices=("muon", "adamw"))
    lr: float = setting(1e-3, "peak learning rate", low=0, high=1e30)
    warmup_steps: int = setting(100, "steps in which the learning rate rises", low=0, high=10**9)
    weight_decay: float = setting(1e-4, "of both optimizers", low=0, high=1)
    clip_grad: float = setting(1.0, "largest norm of the gradient", low=1e-12, high=float("inf"))

    device: str = setting("auto", "auto, cpu or cuda", group="Machine", resumable=True)
    dtype: str = setting("auto", "type of the matrix products; auto: bfloat16 where the machine is fast at it",
                         choices=("auto", "float32", "bfloat16"))
    compile: bool = setting(False, "speed the model up with torch.compile")

    def __post_init__(self):
        check_settings(self)


# ---- data

class CaptionedShapes(Dataset):
    """Images of `shapes` with a caption of the whole image and a phrase for each of its objects."""

    rows = 1

    def __init__(self, split, image_size, seed):
        """split: "pretrain" (endless, twins side by side) or a finite split."""
        self.shapes = Shapes(split, seed)
        self.image_size = image_size

    def __len__(self):
        return len(self.shapes)

    def __getitem__(self, index):
        item = self.shapes[index]
        letterbox = Letterbox(*item["image"].size, self.image_size)
        absent = MAX_OBJECTS - len(item["phrases"])
        return {
            "images": letterbox.image(item["image"])[None],  # (1, 3, S, S)
            "captions": [item["caption"]],
            "phrases": item["phrases"] + [""] * absent,  # 8 strings
            "named": torch.tensor([item["named"] + [[NO_PHRASE] * 4] * absent]),  # (1, 8, 4)
            "attributes": torch.tensor([item["attributes"] + [[NO_OBJECT] * 4] * absent]),  # (1, 8, 4)
        }


def phrase_truth(named, attributes):
    """Which phrases are true of which images.

    named (M, 4) int: the attributes (shape, colour, filling, size) that a phrase names, -1 where it names none.
    attributes (B, 8, 4) int: those of the objects of each image -> (M, B) bool.
    """
    named = named[:, None, None]  # (M, 1, 1, 4)
    is_true_of_object = ((named == -1) | (named == attributes)).all(-1)  # (M, B, 8)
    return is_true_of_object.any(-1)


def to_device(batch, tokenizer, device):
    """A batch with its tensors on the device, its texts as caption_ids (B, T) and phrase_ids (8 B, T')."""
    return {
        "images": batch["images"].to(device, non_blocking=True),
        "named": batch["named"].to(device, non_blocking=True),
        "attributes": batch["attributes"].to(device, non_blocking=True),
        "caption_ids": tokenizer(batch["captions"]).to(device),
        "phrase_ids": tokenizer(batch["phrases"]).to(device),
    }


# ---- losses

def patch_similarity(words, patches, sharpness=20.0):
    """How well each text fits each image by its best patches, as in FILIP with a soft maximum.

    words (M, W, E) and patches (B, P, E), not normalised -> (M, B): the cosine of a word with the patches, averaged
    with the weights softmax(sharpness * cosine), then averaged over the words.
    """
    cosine = torch.einsum("mwe,bpe->mwbp", F.normalize(words, dim=-1), F.normalize(patches, dim=-1))
    best = (cosine * (sharpness * cosine).softmax(-1)).sum(-1)  # (M, W, B)
    return best.mean(1)  # (M, B)


def phrase_loss(logits, is_true, own):
    """Contrast of phrases with images, a scalar.

    logits (M, B), is_true (M, B) bool: the phrase is true of the image, own (M,): the image it was said about. A phrase
    has to find its own image among those it is not true of, and an image each of its phrases among those that are not
    true of it.
    """
    right = logits[torch.arange(len(own), device=own.device), own]  # (M,)
    wrong = logits.masked_fill(is_true, float("-inf"))  # (M, B)
    finds_image = F.softplus(wrong.logsumexp(1) - right)  # -log softmax of the right one against the wrong ones
    finds_phrase = F.softplus(wrong.logsumexp(0)[own] - right)
    return (finds_image + finds_phrase).mean()


class ContrastiveCriterion(torch.nn.Module):
    """A CLIP with both contrasts, over the images and texts of all ranks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        """batch: as `to_device` returns it -> {name: weighted scalar}, whose sum is the loss."""
        clip = self.model
        visual = clip.visual.project(clip.visual(batch["images"])[-1])  # (B, N, E), [CLS] first
        caption = clip.encode_text(batch["caption_ids"])  # (B, E)
        logits = similarity(distributed.gather(caption), distributed.gather(visual[:, 0]), clip.logit_scale)  # (n, n)

        phrase_ids = batch["phrase_ids"]
        phrases = clip.text.project(clip.text(phrase_ids)[-1])  # (8 B, T', E)
        end = at_end_token(phrases, phrase_ids)  # (8 B, E)
        row = torch.arange(len(phrases), device=phrases.device)
        last_word = phrases[row, phrase_ids.argmax(-1) - 1]  # (8 B, E), the token before the end token
        words = distributed.gather(torch.stack([last_word, end], dim=1))  # (8 n, 2, E)
        patches = distributed.gather(visual[:, 1:])  # (n, P, E)
        attributes = distributed.gather(batch["attributes"])  # (n, 8, 4)
        named = distributed.gather(batch["named"])  # (n, 8, 4)
        is_phrase = named[..., 0] != NO_PHRASE  # (n, 8): images of fewer objects have fewer phrases
        fit = bounded_logit_scale(clip.logit_scale) * patch_similarity(words[is_phrase.flatten()], patches)  # (M, n)
        own = is_phrase.nonzero()[:, 0]  # (M,) the image of each phrase
        return {"clc": 0.5 * contrastive_loss(logits),
                "phrases": phrase_loss(fit, phrase_truth(named[is_phrase], attributes), own)}


# ---- training

def new_clip(seed):
    """The tiny CLIP at random, with a merge table learned from the words of `shapes`."""
    shapes = Shapes("train", seed)
    texts = []
    for index in range(1500):
        item = shapes[index]
        texts += [item["caption"], *item["expressions"]]
    tokenizer = Tokenizer(learn_merges(texts, N_MERGES))
    clip = CLIP(replace(CLIP_SIZES["tiny"], vocab_size=tokenizer.vocab_size))
    clip.tokenizer = tokenizer
    return clip


@torch.no_grad()
def validate(clip, device):
    """-> {"accuracy": how often a caption of `val` finds its image among all of the split}."""
    text = []
    image = []
    clip.eval()
    for batch in evaluation_batches(CaptionedShapes("val", clip.config.image_size, seed=0)):
        text.append(clip.encode_text(clip.tokenizer(batch["captions"]).to(device)))
        image.append(clip.encode_image(batch["images"].to(device)))
    clip.train()
    text = F.normalize(torch.cat(text), dim=-1)  # (n, E)
    image = F.normalize(torch.cat(image), dim=-1)  # (n, E)
    found = (text @ image.T).argmax(1).cpu() == torch.arange(len(text))
    return {"accuracy": found.float().mean().item()}


def pretrain(s: Settings):
    """The whole pre-training -> the file of the best weights."""
    run = RUNS / s.name
    path = run / "clip.safetensors"
    device = distributed.start(choose_device(s.device))
    dtype = choose_dtype(s.dtype, device)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    saved, lock = open_run(run, s.resume)  # the lock is held as long as it is kept
    log = Log(run, saved)
    log.message(f"pre-training on {device}, {distributed.world()} process(es), products in {dtype}")

    torch.manual_seed(s.seed)
    model = new_clip(s.seed).to(device).train()
    optimizers = make_optimizers(model, s.optimizer, s.weight_decay)
    steps_per_epoch = max(1, s.epoch_samples // s.batch_size)
    steps = s.epochs * steps_per_epoch
    first = 0
    best = -1.0
    if saved:
        first, best = restore(saved, model, optimizers, log)
    else:
        save_state(run, s, 0, 0, best, model, optimizers, log)  # so that every run can be resumed
    dataset = CaptionedShapes("pretrain", model.config.image_size, s.seed)
    batches = iter(training_batches(dataset, 0, s.batch_size, steps, first, s.workers, distributed.rank(),
                                    distributed.world()))
    criterion = distributed.wrap(ContrastiveCriterion(model))
    if s.compile:
        model.visual.compile()
        model.text.compile()
    saved_at = time.monotonic()
    for step in range(first, steps):
        lr = learning_rate(step, steps, s.lr, s.warmup_steps)
        set_learning_rate(optimizers, lr)
        batch = to_device(next(batches), model.tokenizer, device)
        with autocast():
            terms = criterion(batch)
        loss = sum(terms.values())
        loss.backward()
        values = distributed.mean_of([{"loss": loss, **terms}])
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip_grad)
        check_finite(f"step {step + 1} of the pre-training", values, norm)
        step_optimizers(optimizers)
        log.step("pretrain", step + 1, steps, lr, values | {"gradient_norm": norm})

        end_of_epoch = (step + 1) % steps_per_epoch == 0
        if end_of_epoch:
            with autocast():
                scores = validate(model, device)
            if scores["accuracy"] > best:
                best = scores["accuracy"]
                if distributed.rank() == 0:
                    weights.save(path, model, {"stage": "pretrain", **scores})
            log.epoch("pretrain", step + 1, (step + 1) // steps_per_epoch, scores, best)
        due = end_of_epoch or time.monotonic() - saved_at > 60 * s.save_minutes
        if distributed.any_rank(due, device):
            save_state(run, s, 0, step + 1, best, model, optimizers, log)
            saved_at = time.monotonic()
    return path


if __name__ == "__main__":
    try:
        print(pretrain(settings_from_flags(Settings, __doc__)))
    except KeyboardInterrupt:
        fail("interrupted; the same command with --resume continues", code=130)
    except (ValueError, OSError) as error:
        fail(error)
