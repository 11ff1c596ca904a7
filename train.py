"""Train HiVG: warm-up, then Hi LoRA stage by stage, on one GPU or a laptop.

    python train.py                        all stages on the bundled data set, from the bundled tiny CLIP
    python train.py --pretrain             the same, making the tiny CLIP first
    python train.py --name NAME --resume   go on after an interruption, bit for bit
    python train.py --hivg FILE            go on with a trained HiVG, in one stage of its own

Writes runs/NAME/: the best weights of each stage, state.pt (to resume), log.jsonl, curves.png. Read `train` from top to
bottom: the stages are the rows of a table, and there is one loop for all of them.
"""

import argparse
import math
import os
import sys
import time
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from hivg import weights
from hivg.clip import CLIP, CLIP_SIZES
from hivg.data.annotations import canonical
from hivg.data.batches import ShapesTensors, evaluation_batches, open_dataset, training_batches
from hivg.data.shapes import Shapes
from hivg.evaluate import predict
from hivg.fusion import choose_backend
from hivg.lora import LoRALinear
from hivg.losses import LossWeights
from hivg.metrics import accuracy, mean
from hivg.model import HiVG, HiVGConfig
from hivg.tokenizer import Tokenizer, learn_merges
from hivg.training import distributed
from hivg.training.criterion import Criterion
from hivg.training.log import Log
from hivg.training.presets import preset
from hivg.utils.cli import Parser, choose_device, choose_dtype, fail


@dataclass
class Settings:
    # what
    name: str = "shapes"  # the run's folder under runs/
    preset: str = ""  # a row of hivg/training/presets.py: defaults for a data set and a size of CLIP
    dataset: str = "shapes"  # or refcoco, refcoco+, refcocog, refcocog_google, referit, flickr, mixup, a .jsonl file
    data_root: str = "data"  # where the data sets are, laid out as published
    annotations: str = ""  # a file or folder of annotations that is not at a published place
    hard_mix: bool = False  # train on more of what is learned last: ordinals and relations (shapes)
    clip: str = "weights/clip-tiny.safetensors"  # the CLIP to start from
    hivg: str = ""  # or the HiVG to go on from, with its own settings of the model, in one stage, `tune`
    pretrain: bool = False  # make the tiny CLIP first, by contrastive learning on captions
    resume: bool = False
    seed: int = 0
    # stages: pre-training, warm-up, Hi LoRA 1, 2, 3
    epoch_samples: int = 8192  # expressions (captions in the pre-training) that make an epoch; 0: the whole data set
    pretrain_epochs: int = 12
    epochs: tuple[int, ...] = (1, 1, 1, 18)
    pretrain_lr: float = 1e-3
    lr: tuple[float, ...] = (3e-3, 3e-3, 3e-3, 2e-3)
    # optimisation
    optimizer: str = "muon"  # for the matrices, with AdamW for the rest; or adamw for all, as in the paper
    batch_size: int = 32  # expressions that are in memory at once
    pretrain_batch_size: int = 32  # pictures with their captions
    accumulate: tuple[int, ...] = (1,)  # batches to a step: one number, or one for each stage
    warmup_steps: int = 100  # linear rise of the learning rate at the start of a stage
    weight_decay: float = 1e-4
    clip_grad: float = 1.0  # largest norm of the gradient
    # model
    bridge: str = "adaptive"
    warmup_bridge: bool = True  # False: the warm-up does without the bridge, as the released large models
    text_layers: tuple[int, ...] = ()  # that the bridge fuses, counted from 1; none: the last, for the tiny CLIP two
    text_norm: bool = True
    level_norm: bool = True
    lora: str = "hierarchical"
    lora_rank: int = 16
    lora_alpha: float = 16.0
    box_loss: str = "l1"
    loss_weights: tuple[float, ...] = astuple(LossWeights(clc=0.1))  # the paper's but for CLC; 0 leaves a term out
    # machine
    device: str = "auto"
    dtype: str = "auto"  # of the products: bfloat16 where the machine is fast at it, or float32
    checkpoint: bool = False  # keep less for the gradients and compute it again: less memory, more time
    compile: bool = False
    workers: int = 1
    save_minutes: float = 2.0  # how much an interruption may cost

    def __post_init__(self):
        """Refuses at once what would fail hours later, or be passed over. Raises ValueError."""
        least = {"pretrain_epochs": 1, "batch_size": 1, "pretrain_batch_size": 1, "lora_rank": 1, "seed": 0,
                 "epoch_samples": self.dataset == "shapes"}  # `shapes` has no end, so an epoch needs one
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"--{name} must be {low:d} or more, not {getattr(self, name)}")
        if not self.accumulate or min(self.accumulate) < 1:
            raise ValueError(f"--accumulate must be 1 or more, not {' '.join(map(str, self.accumulate))}")
        if self.optimizer not in ("adamw", "muon"):
            raise ValueError(f"--optimizer must be adamw or muon, not {self.optimizer!r}")
        if self.box_loss not in ("l1", "smooth_l1"):
            raise ValueError(f"--box_loss must be l1 or smooth_l1, not {self.box_loss!r}")
        if self.hard_mix and self.dataset != "shapes":
            raise ValueError("--hard_mix is of the data set shapes alone; leave it out")
        if self.dataset != "shapes" and not self.dataset.endswith(".jsonl"):
            canonical(self.dataset)
        if len(self.loss_weights) != len(fields(LossWeights)):
            raise ValueError(f"--loss_weights needs {len(fields(LossWeights))} numbers, "
                             f"{', '.join(f.name for f in fields(LossWeights))}; not {self.loss_weights}")
        stages(self)


@dataclass(frozen=True)
class Stage:
    """One row of the schedule."""

    name: str
    lora_stage: int | None  # 0 = no adapters; None = contrastive pre-training of CLIP itself
    epochs: int
    lr: float
    batch_size: int
    accumulate: int


def stages(s: Settings):
    pretrain = Stage("pretrain", None, s.pretrain_epochs, s.pretrain_lr, s.pretrain_batch_size, 1)
    names = ["warmup", "lora1", "lora2", "lora3"] if s.lora in ("hierarchical", "shared") else ["warmup", "lora1"]
    names = names[:1] if s.lora == "none" else names
    names = ["tune"] if s.hivg else names
    accumulate = s.accumulate * len(names) if len(s.accumulate) == 1 else s.accumulate
    if min(len(s.epochs), len(s.lr), len(accumulate)) < len(names) or s.epochs[0] < 1:
        raise ValueError(f"--epochs and --lr need a number for each of {', '.join(names)}, --epochs 1 or more for the "
                         f"first, --accumulate one or as many; not {s.epochs}, {s.lr} and {s.accumulate}")
    return [pretrain] * s.pretrain + [
        Stage(name, j, s.epochs[j], s.lr[j], s.batch_size, accumulate[j]) for j, name in enumerate(names)]


def learning_rate(step, steps, peak, warmup_steps):
    """Linear rise to `peak`, then half a cosine down to zero."""
    rise = min(1.0, (step + 1) / max(1, warmup_steps))
    return peak * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def new_clip(s: Settings):
    """The tiny CLIP at random, with a merge table learned from the words of its own world."""
    shapes = Shapes("train", s.seed)
    items = (shapes[i] for i in range(1500))
    texts = [text for item in items for text in [item["caption"], *item["expressions"]]]
    tokenizer = Tokenizer(learn_merges(texts, 512))
    clip = CLIP(replace(CLIP_SIZES["tiny"], vocab_size=tokenizer.vocab_size))
    clip.tokenizer = tokenizer
    return clip


def begin_stage(s: Settings, stage, before, run):
    """-> the model at the start of a stage, and the accuracy it comes with: -1 if it can do nothing yet, None if that
    is to be measured. `before` is the stage before it, None for the first."""
    torch.manual_seed(s.seed + 1000 * (0 if stage.lora_stage is None else stage.lora_stage + 1))
    if stage.lora_stage is None:
        return new_clip(s), -1.0
    if s.hivg:  # all that its last stage trained goes on being trained
        model = weights.load_hivg(s.hivg)
        weights.need_tokenizer(model, s.hivg)
        return model, None
    if stage.lora_stage == 0:
        path = run / "pretrain.safetensors" if before else s.clip
        clip = weights.load_clip(path)
        weights.need_tokenizer(clip, path)
        layers = {"text_layers": s.text_layers} if s.text_layers else {}
        config = HiVGConfig.for_clip(clip.config, bridge=s.bridge if s.warmup_bridge else "none", text_norm=s.text_norm,
                                     level_norm=s.level_norm, lora=s.lora, lora_rank=s.lora_rank,
                                     lora_alpha=s.lora_alpha, **layers)
        model = HiVG.from_clip(clip, config)
        model.tokenizer = clip.tokenizer
        return model, -1.0
    model = weights.load_hivg(run / f"{before.name}.safetensors")
    if model.config.bridge != s.bridge:  # the warm-up did without
        bare, model = model, model.with_bridge(s.bridge)
        model.tokenizer, model.info = bare.tokenizer, bare.info
    model.add_stage(stage.lora_stage)  # the new pairs change nothing yet, so the accuracy is still the one before
    return model, model.info["accuracy"]


def optimizers(s: Settings, model):
    """AdamW; or Muon (Jordan et al. 2024), which makes the step of a matrix orthogonal, for the linear layers and their
    adapters, and AdamW for the rest. Muon's steps are scaled to AdamW's size, so both take the same learning rate."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if s.optimizer == "adamw":
        return [torch.optim.AdamW(trained, weight_decay=s.weight_decay, fused=True)]
    linear = {p for m in model.modules() if isinstance(m, (torch.nn.Linear, LoRALinear)) for p in m.parameters()}
    matrices = [p for p in trained if p in linear and p.ndim == 2]
    rest = [p for p in trained if p not in linear or p.ndim != 2]
    return [torch.optim.Muon(matrices, weight_decay=s.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, weight_decay=s.weight_decay, fused=True)]


def data_of(s, model, split):
    """The pictures and expressions of a split for HiVG, the pictures and captions of `shapes` for a CLIP."""
    if isinstance(model, CLIP):
        return ShapesTensors("pretrain", model.config.image_size, seed=s.seed, captions=True)
    return open_dataset(s.dataset, split, model.config.clip.image_size, model.config.normalization, s.seed,
                        s.data_root, s.annotations or None, train=split == "train", hard_mix=s.hard_mix)


@torch.no_grad()
def validate(model, s, device):
    """-> what is logged of the validation; "accuracy" decides which state of a stage is kept: Acc@0.5 of the `val`
    split, or, for the pre-training, how often a caption finds its picture among all of the split."""
    if isinstance(model, CLIP):
        batches = evaluation_batches(ShapesTensors("val", model.config.image_size, captions=True, seed=s.seed))
        model.eval()
        pairs = [model(b["images"].to(device), model.tokenizer(b["expressions"]).to(device)) for b in batches]
        model.train()
        text, image = (torch.nn.functional.normalize(torch.cat(side), dim=-1) for side in zip(*pairs))
        found = (text @ image.T).argmax(1).cpu() == torch.arange(len(text))
        return {"accuracy": found.float().mean().item()}
    share = evaluation_batches(data_of(s, model, "val"), workers=0 if s.dataset == "shapes" else s.workers,
                               rank=distributed.rank(), world=distributed.world())
    rows = distributed.gather_rows(predict(model, share, device))  # every sample once, whatever the number of ranks
    return {"accuracy": accuracy(r["iou"] for r in rows), "mean_iou": mean(r["iou"] for r in rows)}


def to_device(batch, model, device):
    batch = {k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    for texts, ids in (("expressions", "token_ids"), ("phrases", "phrase_ids")):
        if texts in batch:
            batch[ids] = model.tokenizer(batch[texts]).to(device)
    return batch


def save_whole(path, write):
    """Call write(side path), then rename: the file is there whole or not at all, whenever the run is killed."""
    side = path.with_name(path.name + ".part")
    write(side)
    os.replace(side, path)


def describe_trained(model, stage, world, where):
    """What a step is made of, and what is trained in this stage, by module: lines on stderr."""
    print(f"stage {stage.name}: {stage.epochs} epochs, learning rate {stage.lr:g}, a step of {stage.accumulate} x "
          f"{stage.batch_size} expressions over {world} process{'es' * (world > 1)} {where}; the contrast "
          f"sees {stage.batch_size} at a time, so at most {stage.batch_size - 1} negatives, none of the same picture",
          file=sys.stderr)
    rows = [(name, sum(p.numel() for p in child.parameters()), sum(p.numel() for p in child.parameters()
             if p.requires_grad)) for name, child in model.named_children()]
    own = [p for p in model.parameters(recurse=False)]
    rows.append(("(own)", sum(p.numel() for p in own), sum(p.numel() for p in own if p.requires_grad)))
    for name, n, trained in rows + [("in all", *(sum(r[i] for r in rows) for i in (1, 2)))]:
        print(f"  {name:<14}{n:>12,} parameters, {trained:>12,} trained", file=sys.stderr)


def train(s: Settings):
    """The whole training: every stage of the table, every step of the stage."""
    run = Path("runs") / s.name
    device = distributed.start(choose_device(s.device))
    dtype = choose_dtype(s.dtype, device)
    products = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    rank, world = distributed.rank(), distributed.world()
    if (run / "state.pt").exists() and not s.resume:
        raise ValueError(f"{run} holds a run; go on with --resume, take another --name, or remove the folder")
    saved = load_state(run) if s.resume else None
    log = Log(run, saved["log"]["bytes"] if saved else 0) if rank == 0 else None
    table = stages(s)

    for number, stage in enumerate(table):
        if saved and number < saved["stage"]:
            continue
        model, best = begin_stage(s, stage, table[number - 1] if number else None, run)
        model = model.to(device).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        steppers = optimizers(s, model)
        dataset, together = data_of(s, model, "train"), stage.batch_size * stage.accumulate
        per_epoch = max(1, (s.epoch_samples or len(dataset) * dataset.rows) // together)
        steps, first = stage.epochs * per_epoch, 0
        if saved and number == saved["stage"]:
            model.load_state_dict(saved["model"])
            for optimizer, state in zip(steppers, saved["optimizers"]):
                optimizer.load_state_dict(state)
            first, best = saved["step"], saved["best"]
            set_random_state(saved["random"][rank])
        if best is None:
            with products():
                best = validate(model, s, device)["accuracy"]
        if rank == 0:
            describe_trained(model, stage, world, f"on {device}, products in {str(dtype)[6:]}, fusion by "
                                                  f"{choose_backend(device.type)}")
            if first:
                log.restart(saved["log"]["sums"], saved["log"]["n"])
            elif best >= 0:  # a stage that never improves keeps what it started from
                weights.save(run / f"{stage.name}.safetensors", model, {"stage": stage.name, "accuracy": best})

        batches = iter(training_batches(dataset, number * 2**32, stage.batch_size, steps * stage.accumulate,
                                        first * stage.accumulate, s.workers, rank, world))
        objective = Criterion(model, LossWeights(*s.loss_weights), s.box_loss)
        if s.checkpoint:
            (model if isinstance(model, CLIP) else model.clip).visual.checkpoint = True
        if s.compile:
            for part in (model.visual, model.text) if isinstance(model, CLIP) else (model,):
                part.compile()
        if world > 1:
            # a loss of weight 0 leaves its head without gradients
            objective = DistributedDataParallel(objective, find_unused_parameters=0 in s.loss_weights)
        since_save = time.monotonic()
        for step in range(first, steps):
            lr = learning_rate(step, steps, stage.lr, s.warmup_steps)
            for optimizer in steppers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
            for _ in range(stage.accumulate):
                batch = to_device(next(batches), model, device)
                with products():
                    terms = objective(batch)
                loss = sum(terms.values())
                (loss / stage.accumulate).backward()
            values = distributed.mean_of_ranks({"loss": loss, **terms})
            norm = torch.nn.utils.clip_grad_norm_(trained, s.clip_grad)
            if not (values["loss"].isfinite() and norm.isfinite()):
                raise ValueError(f"the loss is {values['loss'].item()} at step {step + 1} of {stage.name} ("
                                 + ", ".join(f"{name} {v.item():g}" for name, v in terms.items())
                                 + f"), the norm of its gradient {norm.item():g}; the last state, from before that, is "
                                 "kept; try a lower --lr")
            for optimizer in steppers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if rank == 0:
                log.step(stage.name, step + 1, steps, lr, values | {"gradient_norm": norm})

            end_of_epoch = (step + 1) % per_epoch == 0
            if end_of_epoch:
                with products():
                    scores = validate(model, s, device)
                better, best = scores["accuracy"] > best, max(best, scores["accuracy"])
                if rank == 0:
                    if better:
                        weights.save(run / f"{stage.name}.safetensors", model, {"stage": stage.name, **scores})
                    log.epoch(stage.name, step + 1, (step + 1) // per_epoch, scores, best)
            if distributed.any_rank(end_of_epoch or time.monotonic() - since_save > 60 * s.save_minutes, device):
                state = {"stage": number, "step": step + 1, "best": best, "settings": asdict(s),
                         "model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in steppers],
                         "random": distributed.gather_rows([random_state()])}
                if rank == 0:
                    save_whole(run / "state.pt", lambda side: torch.save(state | {"log": log.state()}, side))
                since_save = time.monotonic()
        distributed.wait()  # the next stage reads the file that rank 0 wrote
    return run / f"{table[-1].name}.safetensors"


def load_state(run):
    """What an interrupted run left, on the CPU, whatever device it was on. Raises ValueError."""
    path = run / "state.pt"
    if not path.is_file():
        raise ValueError(f"--resume: there is no {path}; start the run without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        Settings(**state["settings"])
        return state
    except Exception:  # torch.load raises nearly anything
        raise ValueError(f"{path}: damaged, or not a state of this version of train.py; "
                         "remove it and start the run without --resume") from None


def random_state():
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


NEW = {"clip", "pretrain", "bridge", "warmup_bridge", "text_layers", "text_norm", "level_norm", "lora", "lora_rank",
       "lora_alpha"}  # settings of a new HiVG, which one that is gone on from brings with it
FREE = {"resume", "device", "workers", "save_minutes", "checkpoint"}  # settings that a resumed run may change


def settings_from_flags():
    """Every setting is a flag of the same name. A resumed run takes its settings from its state, and refuses others."""
    parser = Parser(description=__doc__)
    for f in fields(Settings):
        if f.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif isinstance(f.default, tuple):
            options = {"type": type(f.default[0]) if f.default else int, "nargs": "+"}
        else:
            options = {"type": f.type}
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=f"default: {f.default}", **options)
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args()).items()}
    if given.get("hivg") and (new := sorted(given.keys() & NEW)):
        parser.error(f"--hivg goes on with the model as it is in the file; leave out --{', --'.join(new)}")
    if not given.get("resume"):
        return Settings(**(preset(given.get("preset", "")) | given))
    saved = load_state(Path("runs") / given.get("name", Settings.name))["settings"]
    changed = [f"--{k} {given[k]} (was {saved[k]})" for k in given.keys() - FREE if given[k] != saved[k]]
    if changed:
        parser.error(f"--resume goes on with the settings of the run; it cannot change {', '.join(changed)}")
    return Settings(**(saved | {k: given[k] for k in given.keys() & FREE}))


if __name__ == "__main__":
    try:
        print(train(settings_from_flags()))
    except KeyboardInterrupt:
        fail("interrupted; the same command with --resume goes on", code=130)
    except (ValueError, OSError) as error:
        fail(error)
