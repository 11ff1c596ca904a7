"""Train HiVG: warm-up, then Hi LoRA stage by stage, on one GPU or a laptop.

    python train.py --quick                a first look in two to six minutes
    python train.py                        all stages in the drawn world, from the bundled tiny CLIP
    python train.py --plan                 print the table of the stages and exit; works with all other flags
    python train.py --name NAME --resume   resume after an interruption, bit for bit on a CPU
    python train.py --finetune FILE        train an existing HiVG further, in one stage or those of --lora

Writes runs/NAME/: the best weights of each stage, state.pt (to resume), log.jsonl, curves.png. Read this file from top
to bottom: the settings, the stages as rows of a table, the start of a stage, and `train`, one loop for all stages.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hivg import weights
from hivg.bridge import KINDS as BRIDGE_KINDS
from hivg.data.batches import (
    MASKS,
    STAGE_ITEMS,
    count_cut,
    count_shared,
    evaluation_batches,
    fingerprint,
    open_dataset,
    to_device,
    training_batches,
)
from hivg.data.drawn.scenes import DRAWN
from hivg.data.published.catalogue import DATA_ROOT
from hivg.evaluate.metrics import accuracy, mean, present
from hivg.evaluate.predict import predict
from hivg.evaluate.report import guessers
from hivg.fast import training_copy
from hivg.fusion import choose_backend
from hivg.grounder import Grounder, draw_results
from hivg.lora import MODES as LORA_MODES
from hivg.lora import without_adapters
from hivg.losses import DRAWN_WORLD, LossWeights
from hivg.model import HiVG, HiVGConfig
from hivg.training import distributed
from hivg.training.criterion import Criterion
from hivg.training.graph import GraphedStep
from hivg.training.log import LOG_STEPS
from hivg.training.optimizers import check_finite, clip_and_step, learning_rate, make_optimizers, set_learning_rate
from hivg.training.presets import defaults_of
from hivg.training.run import Run
from hivg.training.settings import RunSettings, setting, settings_from_flags
from hivg.training.stages import Stage, clip_config, columns_text, grow, hivg_config, print_plan, stage_column
from hivg.utils.cli import run
from hivg.utils.files import save_image

SHAPES_EPOCH = 8192  # expressions in an epoch of drawn data, which is endless


@dataclass
class Settings(RunSettings):
    """Every setting is a flag of the same name; `python train.py --help` prints them by group. Those that every
    training has are in RunSettings.

    `preset`, `quick` and `finetune` bring other defaults along as flags only (hivg/training/presets.py): in Python,
    write Settings(**PRESETS[name]), and with `finetune` also `lora`, `epochs` and `lr`.
    """

    name: str = setting("drawn", "the run's folder under runs/", group="The run")
    preset: str = setting("", "a recipe of the paper for a data set and a size of CLIP: hivg/training/presets.py",
                          group="The run")
    quick: bool = setting(False, "a first look in two to six minutes: one short stage, then boxes on the example")
    plan: bool = setting(False, "print the stages and exit; needs neither data nor a published CLIP", resumable=True)

    dataset: str = setting("shapes-wide", "shapes-wide, shapes, a data set of the paper, or your own .jsonl or .json "
                           "file", group="Data")
    data_root: str = setting(DATA_ROOT, "the folder with the data sets, laid out as published", resumable=True)
    annotations: str = setting("", "annotation file or folder, if not in the published layout")
    hard_mix: bool = setting(False, "draw more of what is learned last: counting, distances, middle sizes, what is not "
                             "there (drawn data only)")
    epoch_samples: int = setting(0, "expressions in an epoch; 0 = all, or 8192 of the drawn ones, which are endless",
                                 low=0, high=10**9)
    masks: str = setting("auto", "mask head's target; auto = box, but segmentation for your own data", choices=MASKS)

    clip: str = setting("weights/clip-tiny.safetensors", "the CLIP to start from", group="Model", of_model=True)
    finetune: str = setting("", "a HiVG to train further, instead of --clip")
    bridge: str = setting("adaptive", "what the bridge attends to", choices=BRIDGE_KINDS, of_model=True)
    bridgeless: bool = setting(False, "begin with a stage without the bridge, as the paper does for its large models; "
                               "give --epochs a value for it too", of_model=True)
    text_layers: tuple[int, ...] = setting((), "text layers to fuse, counted from 1; default: the last (tiny: 2 4)",
                                           low=1, high=99, of_model=True)
    text_norm: bool = setting(True, "a layer norm on each text layer before the fusion", of_model=True)
    level_norm: bool = setting(True, "a layer norm on each level of visual features", of_model=True)
    lora: str = setting("hierarchical", "how adapters are added (hivg/lora.py); with --finetune the default is none",
                        choices=LORA_MODES)
    lora_rank: int = setting(16, "rank r of an adapter", low=1, high=4096)
    lora_alpha: float = setting(16.0, "adapters are scaled by alpha / r", low=1e-6, high=1e6)
    clip_rate: float = setting(0.0, "train CLIP's own weights at this share of the learning rate; 0 = frozen, as in "
                               "the paper", low=0, high=1)
    recompute: bool = setting(False, "recompute the vision blocks in the backward pass: less memory, more time",
                              resumable=True)

    epochs: tuple[int, ...] = setting((1, 1, 1, 18), "epochs of each stage", group="Optimization", low=0, high=10**6)
    lr: tuple[float, ...] = setting((3e-3, 3e-3, 3e-3, 2e-3), "peak learning rate of each stage, or one for all",
                                    low=0, high=1e30)
    accumulate: tuple[int, ...] = setting((1,), "batches accumulated per step, for each stage or one for all", low=1,
                                          high=10**6)
    box_loss: str = setting("l1", "l1 (released program) or smooth_l1 (paper)", choices=("l1", "smooth_l1"))
    loss_weights: LossWeights = setting(DRAWN_WORLD, "weights of the loss terms; 0 leaves a term out", low=0, high=1e6)

    graph: bool = setting(False, "record the step as a CUDA graph, launched as one; one GPU, up to twice the memory "
                          "(hivg/training/graph.py)",
                          group="Machine", resumable=True)

    def __post_init__(self):
        """Raises ValueError, one line, for settings that do not fit."""
        super().__post_init__()
        if self.hard_mix and self.dataset not in DRAWN:
            raise ValueError(f"--hard_mix is for {' and '.join(DRAWN)}; leave it out")
        if self.dataset in DRAWN and (self.masks != "auto" or self.annotations):
            raise ValueError(f"--masks and --annotations are for data sets from files, {self.dataset} is drawn; leave "
                             "them out")
        if self.graph and self.recompute:
            raise ValueError("--graph cannot record what --recompute does; leave --graph out, or give --no_recompute")
        if not any(vars(self.loss_weights).values()):
            raise ValueError("--loss_weights are all 0, so nothing would be learned; give one of them a weight")
        stages(self)


@dataclass(frozen=True)
class Hooks:
    """What an experiment changes that is not a setting (hivg/ablate/arms.py)."""

    config: dict = field(default_factory=dict)  # fields of HiVGConfig
    prepare: Callable = lambda model: None  # called with the model of each stage before its first step (Arm.prepare)
    one_stream: bool = False  # all stages read one stream of data, so the order does not depend on the stages


# Stages by --lora: the name, and j of Hi LoRA, which trains the adapters of vision layers 1 .. j L/3 (lora_groups = 3)
STAGES = {
    "hierarchical": [("warmup", 0), ("lora1", 1), ("lora2", 2), ("lora3", 3)],
    "shared": [("warmup", 0), ("lora1", 1), ("lora2", 2), ("lora3", 3)],
    "vanilla": [("warmup", 0), ("lora1", 1)],  # all layers at once
    "none": [("warmup", 0)],
}


def stages(s: Settings):
    """The table of the stages -> list of Stage. The bridge, the grounding encoder and the heads are trained in each."""
    rows = [(name, s.bridge, lora_stage) for name, lora_stage in STAGES[s.lora]]
    if s.finetune:  # there is nothing to warm up, and the bridge is the file's
        rows = [(name, None, lora_stage) for name, _, lora_stage in rows[1:]] or [("finetune", None, 0)]
    elif s.bridgeless:
        rows = [("bridgeless", "none", 0), *rows]
    names = [name for name, *_ in rows]
    longest = len(names) if s.finetune else len(STAGES["hierarchical"]) + s.bridgeless
    epochs = values_of("epochs", s.epochs, names, longest)
    if len(names) < len(epochs):  # fair: the last stage gets the epochs of the missing ones, but keeps its own rate
        epochs = (*epochs[: len(names) - 1], sum(epochs[len(names) - 1 :]))
    if epochs[0] < 1:
        raise ValueError(f"--epochs: {epochs[0]} for {names[0]}, 1 or more needed for the first stage")
    lr = values_of("lr", s.lr, names, longest)
    accumulate = values_of("accumulate", s.accumulate, names, longest)
    return [Stage(*row, epochs[i], lr[i], s.batch_size, accumulate[i], s.clip_rate) for i, row in enumerate(rows)]


def values_of(flag, values, names, longest):
    """The values of a flag, if there is one for each of these stages, or for each of the longest schedule. But for
    epochs, one holds for all stages."""
    if len(values) == 1 and flag != "epochs":
        values = values * len(names)
    if len(values) not in (len(names), longest):
        raise ValueError(f"--{flag}: {len(values)} values, {len(names)} needed ({', '.join(names)})")
    return values


def first_config(s: Settings, clip, hooks=Hooks()):
    """The configuration of the model in the first stage, on a CLIP of these sizes."""
    layers = {"text_layers": s.text_layers} if s.text_layers else {}
    return HiVGConfig.for_clip(clip, bridge=stages(s)[0].bridge, text_norm=s.text_norm, level_norm=s.level_norm,
                               lora=s.lora, lora_rank=s.lora_rank, lora_alpha=s.lora_alpha, **(layers | hooks.config))


def begin_stage(s: Settings, number, folder, hooks=Hooks()):
    """-> the model as stage `number` starts with it, and its scores on `val`: an accuracy of -1 if it has learned
    nothing yet, None if it has not been measured."""
    stage = stages(s)[number]
    torch.manual_seed(s.seed + 1000 * (number + 1))  # a stage starts alike however those before it ran
    if number == 0 and not s.finetune:
        clip = weights.load_clip(s.clip)
        weights.need_tokenizer(clip, s.clip)
        model, scores = HiVG.from_clip(clip, first_config(s, clip.config, hooks)), {"accuracy": -1.0}
    elif number == 0:
        if hooks.config:
            raise ValueError(f"--finetune keeps the file's configuration, and cannot change {', '.join(hooks.config)}")
        model, scores = weights.load_hivg(s.finetune), None
        weights.need_tokenizer(model, s.finetune)
        if s.lora != "none":
            model.config = model.config.with_lora(s.lora, s.lora_rank, s.lora_alpha)
    else:
        model = weights.load_hivg(folder / f"{stages(s)[number - 1].name}.safetensors")  # the best of that stage
        scores = {name: model.info[name] for name in ("accuracy", "mean_iou") if name in model.info}
    model = grow(model, stage)
    hooks.prepare(model)
    return model, scores


def open_split(s: Settings, model, split):
    """The data of a split. --seed changes the training data only: `val` is the same for every run."""
    config = model.config
    is_train = split == "train"
    return open_dataset(s.dataset, split, config.clip.image_size, config.normalization, s.seed if is_train else 0,
                        s.data_root, s.annotations or None, is_train, s.hard_mix, s.masks)


def count_steps_per_epoch(s: Settings, stage, dataset):
    whole = SHAPES_EPOCH if s.dataset in DRAWN else len(dataset) * dataset.rows
    return math.ceil((s.epoch_samples or whole) / (stage.batch_size * stage.accumulate))


def first_item_of(s: Settings, table, number, rows, one_stream):
    """The item of the endless data where stage `number` begins. rows: expressions per item. one_stream: see Hooks."""
    if one_stream:
        return sum(stage.epochs for stage in table[:number]) * s.epoch_samples // rows
    return number * STAGE_ITEMS


@torch.no_grad()
def validate(s: Settings, dataset, model, device):
    """-> {"accuracy": Acc@0.5 of `val`, by which the best state of a stage is kept, "mean_iou": .. for ties}."""
    batches = evaluation_batches(dataset, 64, s.workers, distributed.rank(), distributed.world_size(), device)
    rows = distributed.gather_rows(predict(model, batches, device))  # every sample once, however many ranks
    ious = [row["iou"] for row in present(rows)]
    return {"accuracy": accuracy(ious), "mean_iou": mean(ious)}


def info_of(s: Settings, stage, epoch, scores):
    """What a weights file says of its training."""
    return {"stage": stage, "dataset": os.path.basename(s.dataset), "epoch": epoch, **scores}


def keep_best(s: Settings, dataset, model, device, path, epoch, best):
    """Validate after an epoch, and write the model to `path` unless an earlier one was better, of equal accuracy by its
    mean IoU -> (scores, best)."""
    scores = validate(s, dataset, model, device)
    is_better = scores["accuracy"] > best
    if scores["accuracy"] == best and distributed.rank() == 0:  # usual where `val` is small
        is_better = scores["mean_iou"] >= weights.read(path).info.get("mean_iou", 0)
    if is_better and distributed.rank() == 0:
        weights.save(path, model, info_of(s, path.stem, epoch, scores))
    return scores, max(best, scores["accuracy"])


def train(s: Settings, hooks=Hooks()):
    """The whole training: every stage of the table, every step of a stage -> the file of the last stage's weights."""
    run = Run(s, "training")
    device, log, saved = run.device, run.log, run.saved
    if s.graph and distributed.world_size() > 1:
        raise ValueError(f"--graph is for one process, not {distributed.world_size()}; leave it out")
    if s.graph and device.type != "cuda":
        log.message("--graph records the step on a GPU only; on this device it only pads the texts")
    log.message(f"fusion by {choose_backend(device.type)}")
    table = stages(s)

    dataset = val = None
    for number, stage in enumerate(table):
        if saved and number < saved["stage"]:
            continue  # done before the interruption
        model, scores = begin_stage(s, number, run.folder, hooks)
        best = scores and scores["accuracy"]
        model = model.to(device).train()
        distributed.seed_rank()
        model.clip.visual.recompute = s.recompute
        clip_rates = dict.fromkeys(without_adapters(model.clip), s.clip_rate) if s.clip_rate else {}
        optimizers = make_optimizers(model, s.optimizer, s.weight_decay, clip_rates)
        if val is None:  # the same in all stages
            dataset = open_split(s, model, "train")
            val = open_split(s, model, "val")  # here, so that a missing one is noticed before any work
            run.data = fingerprint(dataset, val)
            in_step, in_train = max(row.batch_size * row.accumulate for row in table), len(dataset) * dataset.rows
            if in_step > in_train:
                log.message(f"a step takes {in_step:,} expressions and train has {in_train:,}, so some are in it twice")
            if n_cut := count_cut(dataset, model.tokenizer):
                log.message("expressions that are too long for CLIP, cut to their first "
                            f"{model.tokenizer.room} tokens: {n_cut:,}")
            if n_shared := count_shared(dataset, val):
                log.message(f"images of val that are in train too: {n_shared:,}; so val says less about new images")
        if s.dataset in DRAWN and log.is_writer and not log.levels:
            log.levels = {"guessing the largest object": guessers(val.shapes)["largest object"]}
        steps_per_epoch = count_steps_per_epoch(s, stage, dataset)
        steps = stage.epochs * steps_per_epoch
        path = run.folder / f"{stage.name}.safetensors"
        first = 0
        if saved and number == saved["stage"]:
            first, best = run.restore(model, optimizers, steps)
            if first and best >= 0:  # at step 0 it is written below
                weights.load_hivg(path)  # the next stage starts from it, so that it can be read is known now
        first_item = first_item_of(s, table, number, dataset.rows, hooks.one_stream)
        batches = training_batches(dataset, first_item, stage.batch_size, steps * stage.accumulate,
                                   first * stage.accumulate, s.workers, distributed.rank(), distributed.world_size(),
                                   device, model.tokenizer)
        log.message(columns_text([stage_column(stage, model)]))
        if stage.name == "finetune" and not model.config.stage and not s.clip_rate:
            log.message("CLIP is frozen and has no adapters to train; --lora hierarchical, shared or vanilla adds them")
        if number == 0 and first == 0:
            # before any other file, so that every run can be resumed. -1: --finetune's start is measured below
            run.save(number, 0, steps, -1.0, model, optimizers)
        if first == 0 and scores is None:
            with run.autocast():
                scores = validate(s, val, model, device)
            best = scores["accuracy"]
            log.epoch(stage.name, 0, 0, scores, best)
        if first == 0 and best >= 0 and distributed.rank() == 0:  # kept if the stage never improves it
            known, info = getattr(model, "info", {}), info_of(s, stage.name, 0, scores)
            # its calibration still holds, and it knows no other data set yet
            weights.save(path, model, known | info | {"dataset": known.get("dataset", info["dataset"])})
        trained = training_copy(model, run.dtype, together=distributed.world_size() == 1)
        if s.compile:
            model.compile_blocks()  # to validate
            trained.compile_blocks()
        criterion = Criterion(trained, s.loss_weights, s.box_loss)
        criterion = distributed.wrap(criterion, criterion.has_unused_head())

        def take_step(parts):
            """Accumulate the gradients of the parts, clip and step -> {name: scalar tensor} for the log."""
            values = []
            for part, batch in enumerate(parts, 1):
                with run.autocast(), distributed.no_sync(criterion, is_last=part == stage.accumulate):
                    terms = criterion(batch)
                loss = sum(terms.values())
                (loss / stage.accumulate).backward()
                values.append({"loss": loss.detach(), **terms})
            return distributed.mean(values) | {"gradient_norm": clip_and_step(model, optimizers, s.clip_grad)}

        if s.graph:
            take_step = GraphedStep(take_step, optimizers, model.config.clip.context_length, device)
        for step in range(first, steps):
            end_of_epoch = (step + 1) % steps_per_epoch == 0
            # a GPU runs ahead of the program, which reads its results at these steps only
            may_wait = device.type == "cpu" or end_of_epoch or (step + 1) % LOG_STEPS == 0
            lr = learning_rate(step, steps, stage.lr, s.warmup_steps)
            set_learning_rate(optimizers, lr)

            # take the step on the parts of the global batch, then check it
            parts = (to_device(next(batches), model.tokenizer, device) for _ in range(stage.accumulate))
            values = take_step(parts)
            if may_wait:
                check_finite(f"step {step + 1} of {stage.name}", values)
            log.step(stage.name, step + 1, steps, lr, values)

            # validate, and keep the best
            if end_of_epoch:
                with run.autocast():
                    epoch = (step + 1) // steps_per_epoch
                    scores, best = keep_best(s, val, model, device, path, epoch, best)
                log.epoch(stage.name, step + 1, epoch, scores, best)

            # save the state
            if may_wait and run.save_is_due(end_of_epoch):
                run.save(number, step + 1, steps, best, model, optimizers)
        if steps and distributed.rank() == 0 and weights.read(path).info.get("epoch") == 0:
            log.message(f"{stage.name}: no epoch was better than the start, so {path} is the model it began with")
        distributed.barrier()  # the next stage reads the file that the first rank wrote
    return path


def show(path):
    """Draw what the model of a weights file finds in the example image -> the drawing's path, beside the file."""
    expressions = ["the square", "the pink heart", "the triangle"]
    results = Grounder.from_pretrained(path).ground(weights.bundled("example.png"), expressions)
    drawing = path.with_name("example.png")
    save_image(draw_results(results), drawing)
    return drawing


def main():
    s = settings_from_flags(Settings, __doc__, defaults_of)
    if s.plan:
        config = hivg_config(s.finetune) if s.finetune else first_config(s, clip_config(s.clip))
        if s.finetune and s.lora != "none":
            config = config.with_lora(s.lora, s.lora_rank, s.lora_alpha)
        if os.environ.get("RANK", "0") == "0":
            print_plan(stages(s), config)
    else:
        path = train(s)
        if distributed.rank() == 0:
            print(path)
            if s.quick:
                print(show(path))
        distributed.destroy()


if __name__ == "__main__":
    run(main, "interrupted; the same command with --resume continues from the last saved state",
        "lower --batch_size and raise --accumulate as much, give --no_graph --recompute, or lower --workers")
