"""Train HiVG: warm-up, then Hi LoRA stage by stage, on one GPU or a laptop.

    python train.py                        all stages on the bundled data set, from the bundled tiny CLIP
    python train.py --plan                 print the table of the stages and exit; works with all other flags
    python train.py --name NAME --resume   resume after an interruption, on a CPU bit for bit
    python train.py --finetune FILE        train an existing HiVG further, in a single stage

Writes runs/NAME/: the best weights of each stage, state.pt (to resume), log.jsonl, curves.png. Read this file from top
to bottom: the settings, the stages as rows of a table, the start of a stage, and `train`, one loop for all stages.
"""

import time
from dataclasses import astuple, dataclass
from functools import partial

import torch

from hivg import weights
from hivg.bridge import KINDS as BRIDGE_KINDS
from hivg.data.batches import MASKS, STAGE_ITEMS, evaluation_batches, open_dataset, to_device, training_batches
from hivg.evaluate.metrics import accuracy, mean
from hivg.evaluate.predict import predict
from hivg.fusion import choose_backend
from hivg.lora import MODES as LORA_MODES
from hivg.losses import LossWeights
from hivg.model import HiVG, HiVGConfig
from hivg.training import distributed
from hivg.training.checkpoint import open_run, restore, save_state
from hivg.training.criterion import Criterion
from hivg.training.log import LOG_STEPS, Log
from hivg.training.optimizers import check_finite, learning_rate, make_optimizers, set_learning_rate, step_optimizers
from hivg.training.presets import preset_of
from hivg.training.settings import RUNS, check_settings, setting, settings_from_flags
from hivg.training.stages import Stage, clip_config, columns_text, grow, hivg_config, print_plan, stage_column
from hivg.utils.cli import DTYPES, choose_device, choose_dtype, run

HINTED = astuple(LossWeights(clc=0.1, patch_box=2.0, reg_attention=0.5))  # the paper's but for CLC, and two hints
SHAPES_EPOCH = 8192  # expressions


@dataclass
class Settings:
    """Every setting is a flag of the same name; `python train.py --help` prints them by group."""

    name: str = setting("shapes", "the run's folder under runs/", group="The run")
    preset: str = setting("", "a recipe of the paper, for a data set and a size of CLIP: hivg/training/presets.py")
    plan: bool = setting(False, "print the stages and exit; needs no data and no published CLIP's file", resumable=True)
    resume: bool = setting(False, "continue an interrupted run from its last state", resumable=True)
    save_minutes: float = setting(2.0, "minutes, or 50 steps, that a stop may cost", low=0, high=1e4, resumable=True)
    seed: int = setting(0, "seed of all random numbers", low=0, high=2**31)

    dataset: str = setting("shapes", "shapes, a data set of the paper, or your own .jsonl file", group="Data")
    data_root: str = setting("data", "the folder that holds the data sets, laid out as published")
    annotations: str = setting("", "annotation file or folder, if it is not in the published layout")
    hard_mix: bool = setting(False, "ask for more ordinals and distances, which are learned last (shapes)")
    epoch_samples: int = setting(0, "expressions in an epoch; 0: all, of the endless shapes 8192", low=0, high=10**9)
    masks: str = setting("auto", "what the mask head learns; auto: box, in your own data segmentation", choices=MASKS)
    workers: int = setting(-1, "processes that prepare the data; -1: by the machine", low=-1, high=256, resumable=True)

    clip: str = setting("weights/clip-tiny.safetensors", "the CLIP to start from", group="Model", of_model=True)
    finetune: str = setting("", "a HiVG to train further, in one stage, instead of --clip")
    bridge: str = setting("adaptive", "where the keys of the bridge come from", choices=BRIDGE_KINDS, of_model=True)
    bridgeless: bool = setting(False, "begin with a stage without the bridge, as the large models", of_model=True)
    text_layers: tuple[int, ...] = setting((), "text layers that are fused, from 1; without it the last, of tiny 2 4",
                                           low=1, high=99, of_model=True)
    text_norm: bool = setting(True, "a layer norm on each text layer before the fusion", of_model=True)
    level_norm: bool = setting(True, "a layer norm on each level of visual features", of_model=True)
    lora: str = setting("hierarchical", "how adapters are added (hivg/lora.py)", choices=LORA_MODES, of_model=True)
    lora_rank: int = setting(16, "rank r of an adapter", low=1, high=4096, of_model=True)
    lora_alpha: float = setting(16.0, "an adapter is scaled by alpha / r", low=0, high=1e6, of_model=True)

    epochs: tuple[int, ...] = setting((1, 1, 1, 12), "epochs of each stage", group="Optimization", low=0, high=10**6)
    lr: tuple[float, ...] = setting((3e-3, 3e-3, 3e-3, 2e-3), "peak learning rate of each stage", low=0, high=1e30)
    optimizer: str = setting("muon", "muon and adamw together, or adamw alone", choices=("muon", "adamw"))
    batch_size: int = setting(32, "expressions in memory at once, over all processes", low=1, high=10**6)
    accumulate: tuple[int, ...] = setting((1,), "batches added up for a step, one number or more", low=1, high=10**6)
    warmup_steps: int = setting(100, "steps in which the rate rises, at most half of a stage", low=0, high=10**9)
    weight_decay: float = setting(1e-4, "weight decay of all trained parameters", low=0, high=1)
    clip_grad: float = setting(1.0, "largest norm of the gradient", low=1e-12, high=float("inf"))
    box_loss: str = setting("l1", "l1 (released program) or smooth_l1 (paper)", choices=("l1", "smooth_l1"))
    loss_weights: tuple[float, ...] = setting(HINTED, f"of {', '.join(LossWeights.__dataclass_fields__)}; 0 leaves one "
                                              "out", low=0, high=1e6, length=len(HINTED))

    device: str = setting("auto", "auto, cpu or cuda", group="Machine", resumable=True)
    dtype: str = setting("auto", "type of the matrix products; auto: bfloat16 where the machine is fast at it",
                         choices=DTYPES)
    recompute: bool = setting(False, "recompute the vision blocks in the backward to save memory", resumable=True)
    compile: bool = setting(False, "speed the model up with torch.compile")

    def __post_init__(self):
        """Raises ValueError, one line, for settings that do not fit."""
        check_settings(self)
        if self.hard_mix and self.dataset != "shapes":
            raise ValueError("--hard_mix is a mix of the data set shapes; leave it out")
        if self.dataset == "shapes" and (self.masks != "auto" or self.annotations):
            raise ValueError("--masks and --annotations are for data sets from files, shapes is drawn; leave them out")
        if not any(self.loss_weights):
            raise ValueError("--loss_weights are all 0, so nothing would be learned; give one of them a weight")
        stages(self)


def stages(s: Settings):
    """The table of the stages. The bridge, the grounding encoder and the heads are trained in each of them."""
    rows = [  # name, kind of bridge, Hi LoRA stage: the vision layers whose adapters it trains (lora.adapted_layers)
        ("warmup", s.bridge, 0),  # none: CLIP stays as it is
        ("lora1", s.bridge, 1),  # 1 .. L/3, and all text layers from here on
        ("lora2", s.bridge, 2),  # 1 .. 2L/3
        ("lora3", s.bridge, 3),  # 1 .. L
    ]
    if s.lora == "vanilla":
        rows = rows[:2]  # the first brings adapters to all layers
    if s.lora == "none":
        rows = rows[:1]
    if s.bridgeless:
        rows = [("bridgeless", "none", 0), *rows]
    if s.finetune:
        rows = [("finetune", None, 0)]  # the model as it is in its file
    epochs = s.epochs
    if s.lora in ("vanilla", "none"):  # fair: the last stage gets the others' epochs
        epochs = (*epochs[: len(rows) - 1], sum(epochs[len(rows) - 1 :]))
    accumulate = s.accumulate * len(rows) if len(s.accumulate) == 1 else s.accumulate
    numbers = {len(s.epochs), len(s.lr), len(accumulate)}
    if min(numbers) < len(rows) or (max(numbers) > 4 + s.bridgeless and not s.finetune) or s.epochs[0] < 1:
        raise ValueError(f"--epochs and --lr need a number for each of {', '.join(row[0] for row in rows)}, --epochs 1 "
                         f"or more for the first, --accumulate 1 or as many; not {s.epochs}, {s.lr}, {s.accumulate}")
    return [Stage(*row, epochs[i], s.lr[i], s.batch_size, accumulate[i]) for i, row in enumerate(rows)]


def first_config(s: Settings, clip):
    """The configuration of the model in the first stage, on a CLIP of these sizes."""
    layers = {"text_layers": s.text_layers} if s.text_layers else {}
    return HiVGConfig.for_clip(clip, bridge=stages(s)[0].bridge, text_norm=s.text_norm, level_norm=s.level_norm,
                               lora=s.lora, lora_rank=s.lora_rank, lora_alpha=s.lora_alpha, **layers)


def begin_stage(s: Settings, number, run):
    """-> the model as stage `number` starts with it, and its accuracy: -1 if it has learned nothing yet, None if that
    is still to be measured."""
    table = stages(s)
    torch.manual_seed(s.seed + 1000 * (number + 1))
    if s.finetune:
        model = weights.load_hivg(s.finetune)
        weights.need_tokenizer(model, s.finetune)
        return model, None
    if number == 0:
        clip = weights.load_clip(s.clip)
        weights.need_tokenizer(clip, s.clip)
        return HiVG.from_clip(clip, first_config(s, clip.config)), -1.0
    before = weights.load_hivg(run / f"{table[number - 1].name}.safetensors")  # the best state of the stage before
    return grow(before, table[number]), before.info["accuracy"]


def open_split(s: Settings, model, split):
    """The data of a split. --seed changes the training data only: `val` is the same for every run."""
    config = model.config
    is_train = split == "train"
    return open_dataset(s.dataset, split, config.clip.image_size, config.normalization, s.seed if is_train else 0,
                        s.data_root, s.annotations or None, is_train, s.hard_mix, s.masks)


def count_steps_per_epoch(s: Settings, stage, dataset):
    global_batch = stage.batch_size * stage.accumulate
    whole = SHAPES_EPOCH if s.dataset == "shapes" else len(dataset) * dataset.rows
    return max(1, (s.epoch_samples or whole) // global_batch)


@torch.no_grad()
def validate(s: Settings, dataset, model, device):
    """-> {"accuracy": Acc@0.5 of `val`, which decides the state of a stage that is kept, "mean_iou": ..}."""
    batches = evaluation_batches(dataset, 64, s.workers, *distributed.place(), device)
    rows = distributed.gather_rows(predict(model, batches, device))  # every sample once, however many ranks
    ious = [row["iou"] for row in rows]
    return {"accuracy": accuracy(ious), "mean_iou": mean(ious)}


def keep_best(s: Settings, dataset, model, device, path, best):
    """Validate, and write the model to `path` if none so far was better -> (scores, best)."""
    scores = validate(s, dataset, model, device)
    if scores["accuracy"] >= best and distributed.rank() == 0:
        weights.save(path, model, {"stage": path.stem, **scores})
    return scores, max(best, scores["accuracy"])


def train(s: Settings):
    """The whole training: every stage of the table, every step of a stage -> the file of the last stage's weights."""
    run = RUNS / s.name
    device = distributed.start(choose_device(s.device))
    dtype = choose_dtype(s.dtype, device)
    autocast = partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32)
    saved, lock = open_run(run, s.resume)  # saved is None for a new run; the lock is held as long as it is kept
    log = Log(run, saved)
    log.message(f"training on {device}, products in {dtype}, fusion by {choose_backend(device.type)}")

    for number, stage in enumerate(stages(s)):
        if saved and number < saved["stage"]:
            continue  # done before the interruption
        model, best = begin_stage(s, number, run)
        model = model.to(device).train()
        distributed.seed_rank()
        model.clip.visual.recompute = s.recompute
        optimizers = make_optimizers(model, s.optimizer, s.weight_decay)
        dataset = open_split(s, model, "train")
        val = open_split(s, model, "val")  # here, so that a missing one is noticed before any work
        steps_per_epoch = count_steps_per_epoch(s, stage, dataset)
        steps = stage.epochs * steps_per_epoch
        path = run / f"{stage.name}.safetensors"
        first = 0
        if saved and number == saved["stage"]:
            first, best = restore(saved, model, optimizers, log)
        batches = training_batches(dataset, number * STAGE_ITEMS, stage.batch_size, steps * stage.accumulate,
                                   first * stage.accumulate, s.workers, *distributed.place(), device, model.tokenizer)
        if best is None:
            with autocast():
                scores = validate(s, val, model, device)
            best = scores["accuracy"]
            log.epoch(stage.name, 0, 0, scores, best)
        log.message(columns_text([stage_column(stage, model)]))
        if first == 0 and best >= 0 and distributed.rank() == 0:
            weights.save(path, model, {"stage": stage.name, "accuracy": best})  # kept if the stage never improves it
        if number == 0 and first == 0:
            save_state(run, s, number, 0, best, model, optimizers, log)  # so that every run can be resumed
        loss_weights = LossWeights(*s.loss_weights)
        criterion = distributed.wrap(Criterion(model, loss_weights, s.box_loss), loss_weights.leave_a_head_out)
        if s.compile:
            model.compile_blocks()
        saved_at = time.monotonic()
        for step in range(first, steps):
            end_of_epoch = (step + 1) % steps_per_epoch == 0
            # a GPU runs ahead of the program, which waits for its numbers at these steps only
            may_wait = device.type == "cpu" or end_of_epoch or (step + 1) % LOG_STEPS == 0
            lr = learning_rate(step, steps, stage.lr, s.warmup_steps)
            set_learning_rate(optimizers, lr)

            # accumulate the gradient of the global batch
            parts = []
            for part in range(stage.accumulate):
                batch = to_device(next(batches), model.tokenizer, device)
                with autocast(), distributed.averaged(criterion, is_last=part + 1 == stage.accumulate):
                    terms = criterion(batch)
                loss = sum(terms.values())
                (loss / stage.accumulate).backward()
                parts.append({"loss": loss.detach(), **terms})

            # clip, check and step
            values = distributed.mean_of(parts)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.clip_grad)
            if may_wait:
                check_finite(f"step {step + 1} of {stage.name}", values, norm)
            step_optimizers(optimizers)
            log.step(stage.name, step + 1, steps, lr, values | {"gradient_norm": norm})

            # validate, and keep the best
            if end_of_epoch:
                with autocast():
                    scores, best = keep_best(s, val, model, device, path, best)
                log.epoch(stage.name, step + 1, (step + 1) // steps_per_epoch, scores, best)

            # save the state
            due = end_of_epoch or time.monotonic() - saved_at > 60 * s.save_minutes
            if may_wait and distributed.any_rank(due, device):
                save_state(run, s, number, step + 1, best, model, optimizers, log)
                saved_at = time.monotonic()
        distributed.wait()  # the next stage reads the file that the first rank wrote
    return path


def main():
    s = settings_from_flags(Settings, __doc__, preset_of)
    if s.plan:
        print_plan(stages(s), hivg_config(s.finetune) if s.finetune else first_config(s, clip_config(s.clip)))
    else:
        path = train(s)
        if distributed.rank() == 0:
            print(path)
        distributed.stop()


if __name__ == "__main__":
    run(main, "interrupted; the same command with --resume continues")
