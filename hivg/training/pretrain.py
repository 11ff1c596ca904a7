"""Make the tiny CLIP that the bundled HiVG starts from: contrastive pre-training on the drawn world.

    python -m hivg.training.pretrain                         runs/clip/clip.safetensors
    python -m hivg.training.pretrain --name NAME --resume    resume after an interruption, bit for bit on a CPU
    python -m hivg.training.pretrain --clip FILE             go on with a tiny CLIP; it learns the words it lacks
    python train.py --clip runs/clip/clip.safetensors        train HiVG on it

This is not in the paper, which starts from OpenAI's CLIP. Three contrasts are learned, without any box:

    clc           CLIP's own, of an image ([CLS]) with a caption
    phrases       of the patches of an image with a phrase about each of its objects, "a red star", as in FILIP (Yao et
                  al. 2022): [CLS] alone would need many more images to tell shapes apart (LOG.md)
    expressions   of the objects of an image with what else is said of them, "the second star from the left". What an
                  object looks like is what the patches look like that its phrase fits best, so that the text "the
                  second star from the left" has to be where the text "a red star" is

The third teaches the text tower all words of the expressions, and the patches what they are about: their place, their
rank, what they are next to.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from hivg import weights
from hivg.clip import CLIP, CLIP_SIZES, at_end_token, bounded_logit_scale, similarity
from hivg.data.batches import to_device, training_batches
from hivg.data.drawn.pairs import NO_PHRASE, NO_TARGET, Pairs
from hivg.data.drawn.scenes import DRAWN, Shapes
from hivg.losses import contrastive_loss
from hivg.tokenizer import Tokenizer, learn_merges
from hivg.training import distributed
from hivg.training.optimizers import check_finite, clip_and_step, learning_rate, make_optimizers, set_learning_rate
from hivg.training.run import Run
from hivg.training.settings import RunSettings, setting, settings_from_flags
from hivg.utils.cli import run
from hivg.utils.messages import shown

N_MERGES = 640  # of the tokenizer, at most: enough to give every word of the drawn worlds a token
SHARPNESS = 20.0  # of the soft maximum over the patches


@dataclass
class Settings(RunSettings):
    """Every setting is a flag of the same name. Those that every training has are in RunSettings."""

    name: str = setting("clip", "the run's folder under runs/", group="The run")
    dataset: str = setting("shapes-wide", "the drawn world", choices=tuple(DRAWN), group="Data")
    reframe: float = setting(0.0, "share of the training's scenes that are seen in another frame, as with train.py's "
                             "--hard_mix", low=0, high=1, group="Data")
    hard_mix: bool = setting(False, "draw more rows, and more of their later ranks by number (shapes-wide only)")
    clip: str = setting("", "weights file of a tiny CLIP to continue, with the words that it lacks", group="Model")
    epochs: int = setting(6, "number of epochs", low=1, high=10**6, group="Optimization")
    epoch_samples: int = setting(8192, "images in an epoch", low=1, high=10**9)
    val_images: int = setting(1984, "images to validate on, in batches of 64", low=64, high=10**9)
    batch_size: int = setting(32, "images in a batch, over all processes; even, for twins", low=2, high=10**6)
    lr: float = setting(3e-3, "peak learning rate", low=0, high=1e30)
    adamw_share: float = setting(1 / 3, "AdamW's learning rate as a share of Muon's", low=0, high=10)

    def __post_init__(self):
        super().__post_init__()
        if self.hard_mix and not self.is_wide:
            raise ValueError("--hard_mix is for shapes-wide; leave it out")

    @property
    def is_wide(self):
        return self.dataset == "shapes-wide"


# ---- data

def phrase_truth(named, attributes):
    """Which phrases are true of which images.

    named (M, 4) int: the attributes (shape, colour, filling, size) that a phrase names, -1 where it names none.
    attributes (B, 8, 4) int: those of the objects of each image -> (M, B) bool.
    """
    named = named[:, None, None]  # (M, 1, 1, 4)
    is_true_of_object = ((named == -1) | (named == attributes)).all(-1)  # (M, B, 8)
    return is_true_of_object.any(-1)


# ---- losses

def patch_similarity(words, patches, sharpness=SHARPNESS):
    """How well each text fits each image by its best patches, as in FILIP with a soft maximum.

    words (M, W, E) of M texts and patches (B, P, E) of B images, of unit length -> (M, B): the cosine of a word with
    the patches, averaged with the weights softmax(sharpness * cosine), then averaged over the words.
    """
    cosine = torch.einsum("mwe,bpe->mwbp", words, patches)
    attention = (sharpness * cosine).softmax(-1)  # (M, W, B, P)
    fit = (cosine * attention).sum(-1)  # (M, W, B)
    return fit.mean(1)


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


def encode_phrases(clip, phrase_ids, is_phrase):
    """The embeddings of the last word and of the end token of each phrase, (8 B, 2, E); zero where there is none.

    phrase_ids (8 B, T) long, is_phrase (8 B) bool.
    """
    ids = phrase_ids[is_phrase]  # (M, T)
    states = clip.text.project(clip.text(ids)[-1])  # (M, T, E)
    row = torch.arange(len(ids), device=ids.device)
    last_word = states[row, ids.argmax(-1) - 1]  # (M, E), the token before the end token
    words = torch.stack([last_word, at_end_token(states, ids)], dim=1)  # (M, 2, E)
    return words.new_zeros(len(phrase_ids), *words.shape[1:]).index_put((is_phrase,), words)


def mean_count(rows):
    """How many rows a rank has on average. A rank's sum divided by it, averaged over the ranks, is the mean over all
    rows."""
    count = torch.tensor([float(len(rows))], device=rows.device)
    return distributed.gather(count).mean()


class ContrastiveCriterion(torch.nn.Module):
    """A CLIP with the three contrasts; clc and phrases are over the images and texts of all ranks."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        """batch: as `to_device` returns it, with caption_ids (B, T), phrase_ids (8 B, T') and, of the expressions,
        token_ids (M, T'') -> {name: weighted scalar}, whose sum is the loss, and "meant": bool (M,), whether each
        expression fits the object it means better than the image's other objects."""
        clip = self.model
        visual = clip.visual.project(clip.visual(batch["images"])[-1])  # (B, N, E), [CLS] first
        caption = clip.encode_text(batch["caption_ids"])  # (B, E)
        is_phrase = batch["named"][..., 0] != NO_PHRASE  # (B, 8): images of fewer objects have fewer phrases
        words = encode_phrases(clip, batch["phrase_ids"], is_phrase.flatten())  # (8 B, 2, E)
        expressions = clip.encode_text(batch["token_ids"])  # (M, E)
        with torch.autocast(visual.device.type, enabled=False):  # in bfloat16 cosines are multiples of 1/256
            texts = distributed.gather(caption.float())  # (n, E)
            images = distributed.gather(visual[:, 0].float())  # (n, E)
            logits = similarity(texts, images, clip.logit_scale)  # (n, n)
            words = F.normalize(words.float(), dim=-1)
            patches = F.normalize(visual[:, 1:].float(), dim=-1)  # (B, P, E)
            expressions = F.normalize(expressions.float(), dim=-1)
            phrases = self.phrases(words, patches, batch)
            scores = self.scores(words, patches, expressions, batch)  # (M, 8)
        target = batch["targets"][batch["targets"] != NO_TARGET]  # (M,)
        expressions = F.cross_entropy(scores, target, reduction="sum") / mean_count(target)
        return {"clc": 0.5 * contrastive_loss(logits), "phrases": phrases, "expressions": 2.0 * expressions,
                "meant": scores.argmax(1) == target}

    def phrases(self, words, patches, batch):
        """The contrast of phrases with images: words (8 B, 2, E), patches (B, P, E) -> scalar."""
        named = distributed.gather(batch["named"])  # (n, 8, 4)
        is_phrase = named[..., 0] != NO_PHRASE  # (n, 8)
        fit = patch_similarity(distributed.gather(words)[is_phrase.flatten()], distributed.gather(patches))  # (M, n)
        own = is_phrase.nonzero()[:, 0]  # the image of each phrase
        is_true = phrase_truth(named[is_phrase], distributed.gather(batch["attributes"]))
        return phrase_loss(bounded_logit_scale(self.model.logit_scale) * fit, is_true, own)

    def scores(self, words, patches, expressions, batch):
        """How well each expression fits each object of its image: words (8 B, 2, E) of the objects' phrases, patches
        (B, P, E), expressions (M, E) -> logits (M, 8), -inf where there is no object."""
        is_phrase = batch["named"][..., 0] != NO_PHRASE  # (B, 8)
        words = words.unflatten(0, is_phrase.shape)  # (B, 8, 2, E)
        cosine = torch.einsum("bowe,bpe->bowp", words, patches)
        attention = (SHARPNESS * cosine).softmax(-1).mean(2)  # (B, 8, P): where each object is
        objects = torch.einsum("bop,bpe->boe", attention, patches)  # (B, 8, E): what is there
        about = (batch["targets"] != NO_TARGET).nonzero()[:, 0]  # (M,) the image of each expression
        logits = torch.einsum("me,moe->mo", expressions, objects[about])  # (M, 8)
        logits = bounded_logit_scale(self.model.logit_scale) * logits
        return logits.masked_fill(~is_phrase[about], float("-inf"))


# ---- training

def new_clip(s: Settings):
    """The tiny CLIP at random, or that of --clip, with a token for every word of the drawn world."""
    old = weights.load_clip(s.clip) if s.clip else None
    if old and not (old.tokenizer and len(old.tokenizer.merges) < N_MERGES):
        raise ValueError(f"--clip: {shown(s.clip)} is no CLIP of the drawn world; give one that this command wrote")
    shapes = Shapes("train", s.seed, wide=s.is_wide)
    texts = []
    for index in range(6000 if s.is_wide else 1500):
        texts += shapes.texts(index)
    tokenizer = Tokenizer(learn_merges(texts, N_MERGES, old.tokenizer.merges if old else ()))
    config = old.config if old else CLIP_SIZES["tiny"]
    clip = CLIP(replace(config, vocab_size=tokenizer.vocab_size))
    clip.tokenizer = tokenizer
    if old:
        state = old.state_dict()
        known = state["text.token_embedding.weight"]  # (V, D), the start and the end token last
        embedding = clip.text.token_embedding.weight.detach().clone()  # (V + new words, D), these at random
        embedding[: len(known) - 2] = known[:-2]
        embedding[-2:] = known[-2:]
        clip.load_state_dict(state | {"text.token_embedding.weight": embedding})
    return clip


@torch.no_grad()
def validate(criterion, s: Settings, device):
    """-> {"accuracy": how often an expression fits its object best, on images that training does not see}."""
    clip = criterion.model
    pairs = Pairs(clip.config.image_size, s.seed + 1, s.is_wide)
    clip.eval()
    meant = []
    batches = training_batches(pairs, 0, 64, s.val_images // 64, workers=s.workers, device=device,
                               tokenizer=clip.tokenizer)
    for batch in batches:
        meant.append(criterion(to_device(batch, clip.tokenizer, device))["meant"])
    clip.train()
    return {"accuracy": torch.cat(meant).float().mean().item()}


def pretrain(s: Settings):
    """The whole pre-training -> the file of the best weights."""
    run = Run(s, "pre-training")
    device, log, saved = run.device, run.log, run.saved
    path = run.folder / "clip.safetensors"

    torch.manual_seed(s.seed)
    model = new_clip(s).to(device).train()
    optimizers = make_optimizers(model, s.optimizer, s.weight_decay)
    for optimizer in optimizers[1:]:  # AdamW beside Muon
        for group in optimizer.param_groups:
            group["rate"] = s.adamw_share
    steps_per_epoch = math.ceil(s.epoch_samples / s.batch_size)
    steps = s.epochs * steps_per_epoch
    first = 0
    best = -1.0
    if saved:
        first, best = run.restore(model, optimizers, steps)
    dataset = Pairs(model.config.image_size, s.seed, s.is_wide, s.reframe, s.hard_mix)
    batches = training_batches(dataset, 0, s.batch_size, steps, first, s.workers, distributed.rank(),
                               distributed.world_size(), device, model.tokenizer)
    if not saved:
        run.save(0, 0, steps, best, model, optimizers)  # so that every run can be resumed
    bare = ContrastiveCriterion(model)
    criterion = distributed.wrap(bare)
    if s.compile:
        model.visual.compile()
        model.text.compile()
    for step in range(first, steps):
        lr = learning_rate(step, steps, s.lr, s.warmup_steps)
        set_learning_rate(optimizers, lr)
        batch = to_device(next(batches), model.tokenizer, device)
        with run.autocast():
            terms = criterion(batch)
        meant = terms.pop("meant")
        meant = meant.sum() / mean_count(meant)
        loss = sum(terms.values())
        loss.backward()
        values = distributed.mean([{"loss": loss, **terms, "meant": meant}])
        values["gradient_norm"] = clip_and_step(model, optimizers, s.clip_grad)
        check_finite(f"step {step + 1} of the pre-training", values)
        log.step("pretrain", step + 1, steps, lr, values)

        end_of_epoch = (step + 1) % steps_per_epoch == 0
        if end_of_epoch:
            with run.autocast():
                scores = validate(bare, s, device)
            if scores["accuracy"] >= best:
                best = scores["accuracy"]
                if distributed.rank() == 0:
                    weights.save(path, model, {"stage": "pretrain", "dataset": s.dataset, **scores})
            log.epoch("pretrain", step + 1, (step + 1) // steps_per_epoch, scores, best)
        if run.save_is_due(end_of_epoch):
            run.save(0, step + 1, steps, best, model, optimizers)
    return path


def main():
    path = pretrain(settings_from_flags(Settings, __doc__))
    if distributed.rank() == 0:
        print(path)
    distributed.destroy()


if __name__ == "__main__":
    run(main, "interrupted; the same command with --resume continues from the last saved state",
        "lower --batch_size or --workers")
