"""The arms of the ablation: a model each, what is different in it, and the claim that it tests.

Most arms are settings of train.py or fields of HiVGConfig. A few are tricks, patched in for the time of one run
because nobody should train with them: neither the model nor train.py knows of them.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import train  # the training loop, in the folder that this is run from
from hivg import lora
from hivg.bridge import Bridge
from hivg.data.batches import STAGE_ITEMS
from hivg.losses import LossWeights

CLAIMS = {  # name -> the claim as the paper, its program or a reader makes it
    "bridge": "the cross-modal bridge helps, and because of the text in it",
    "text layers": "fusing several text layers helps, with adaptive weights, and needs a layer norm on each",
    "visual levels": "several visual levels help, and need a layer norm on each",
    "Hi LoRA": "adapters in stages, from shallow to deep, are better than plain ones",
    "losses": "every loss helps",
    "hints": "our two losses help to learn from little",
    "batch mixing": "the released program's mixing of a batch's texts does no harm, and spares the norm on text layers",
    "fine-tuning": "leaving CLIP as it is is better than training all of it",
    "slow fine-tuning": "the same, where CLIP is trained at a lower rate than what is new",
}


@dataclass(frozen=True)
class Arm:
    """A model to train. It is like the arm `against` but for one thing."""

    name: str
    claim: str  # of CLAIMS
    differs: str  # in words
    settings: dict = field(default_factory=dict)  # of train.py
    config: dict = field(default_factory=dict)  # fields of HiVGConfig that train.py has no flag for
    trick: str = ""  # of TRICKS
    against: str = "base"

    @property
    def seeds(self):
        """With how many seeds it is tried, from 0 on: more for the main claims, and where seeds differ most."""
        return 3 if self.claim in ("text layers", "visual levels", "losses", "batch mixing") else 5

    def definition(self):
        """All that makes the arm what it is, for the results file."""
        return {"settings": self.settings, "config": self.config, "trick": self.trick}


def loss_weights(**changes):
    return {"loss_weights": tuple(vars(replace(LossWeights(*train.HINTED), **changes)).values())}


LAST = {"text_layers": (4,)}
LAST_TWO = {"text_layers": (3, 4)}
ALL = {"text_layers": (1, 2, 3, 4)}
NO_NORM = {"text_norm": False}
AS_RELEASED = {"text_padding": "released"}  # 77 positions, which the bridge sees all: padding is not masked
# Hi LoRA ends with 24 pairs in the tiny CLIP, plain LoRA with 10, so 24 / 10 times the rank is as many parameters
VANILLA_WIDE = {"lora": "vanilla", "lora_rank": 38, "lora_alpha": 38.0}

ARMS = [
    Arm("base", "", "the model of train.py: adaptive bridge on text layers 2 and 4 with norm, Hi LoRA"),
    Arm("bridge none", "bridge", "no bridge", {"bridge": "none"}),
    Arm("bridge constant", "bridge", "learned constants instead of the text", {"bridge": "constant"}),
    Arm("bridge none, deeper", "bridge", "no bridge; four more encoder layers, about as many parameters",
        {"bridge": "none"}, {"encoder_layers": 8}),
    Arm("text last", "text layers", "the last text layer alone", LAST),
    Arm("text last two", "text layers", "the last two text layers", LAST_TWO),
    Arm("text all", "text layers", "all four text layers", ALL),
    Arm("text last, no norm", "text layers", "no norm", LAST | NO_NORM, against="text last"),
    Arm("text last two, no norm", "text layers", "no norm", LAST_TWO | NO_NORM, against="text last two"),
    Arm("text all, no norm", "text layers", "no norm", ALL | NO_NORM, against="text all"),
    Arm("weights zero", "text layers", "adaptive weights stay at zero", trick="zero weights"),
    Arm("level last", "visual levels", "the last visual level alone", config={"visual_levels": (6,)}),
    Arm("levels, no norm", "visual levels", "no norm on the levels", {"level_norm": False}),
    Arm("level last, no norm", "visual levels", "no norm", {"level_norm": False}, {"visual_levels": (6,)},
        against="level last"),
    Arm("lora shared", "Hi LoRA", "one pair a layer, added in stages, as released", {"lora": "shared"}),
    Arm("lora vanilla", "Hi LoRA", "all adapters at once, in one stage of as many epochs", {"lora": "vanilla"}),
    Arm("lora at once", "Hi LoRA", "all adapters from the first of the three stages on, through the same stages",
        {"lora": "shared"}, trick="all at once", against="lora shared"),
    Arm("lora vanilla, wide", "Hi LoRA", "all at once, rank 38: as many parameters", VANILLA_WIDE),
    Arm("lora none", "Hi LoRA", "no adapters, one stage of as many epochs", {"lora": "none"}),
    Arm("lora deep first", "Hi LoRA", "stages from deep to shallow", trick="deep first"),
    Arm("no CLC", "losses", "without the contrastive loss", loss_weights(clc=0.0)),
    Arm("no RTCC", "losses", "without the region-text loss", loss_weights(rtcc_focal=0.0, rtcc_dice=0.0)),
    Arm("no mask", "losses", "without the mask losses", loss_weights(mask_focal=0.0, mask_dice=0.0)),
    Arm("no hints", "hints", "without our two hints", loss_weights(patch_box=0.0, reg_attention=0.0)),
    Arm("padding seen", "batch mixing", "77 positions of text, padding not masked in the bridge, as released",
        config=AS_RELEASED),
    Arm("mixed", "batch mixing", "and the texts of the batch mixed in the bridge, as released", config=AS_RELEASED,
        trick="mix the batch", against="padding seen"),
    Arm("mixed, all", "batch mixing", "all four text layers", ALL, AS_RELEASED, trick="mix the batch", against="mixed"),
    Arm("mixed, all, no norm", "batch mixing", "no norm", ALL | NO_NORM, AS_RELEASED, trick="mix the batch",
        against="mixed, all"),
    Arm("CLIP trained", "fine-tuning", "all of CLIP is trained, from the first step", {"lora": "none"},
        trick="train CLIP", against="lora none"),
    Arm("CLIP trained slowly", "slow fine-tuning", "all of CLIP is trained, at a tenth of the rate of what is new",
        {"lora": "none"}, trick="train CLIP slowly", against="lora none"),
]
BY_NAME = {arm.name: arm for arm in ARMS}
COMPARED = [  # every arm but the base with the arm it differs from, and two with another besides
    *ARMS[1:],
    replace(BY_NAME["lora vanilla"], differs="one stage instead of four", against="lora at once"),
    replace(BY_NAME["lora none"], differs="no adapters instead of plain ones", against="lora vanilla"),
]


# ---- tricks

bridge_forward = Bridge.forward
begin_stage = train.begin_stage
first_config = train.first_config
make_optimizers = train.make_optimizers
training_batches = train.training_batches


def mixed_forward(bridge, x, keys, is_key=None):
    """Bridge.forward as released: keys that were made as (T, B, D_v) are read as (B, T, D_v), so with 77 positions and
    32 samples each looks at two or three positions of every text of the batch; there is no mask."""
    B, T, D_v = keys.shape
    return bridge_forward(bridge, x, keys.transpose(0, 1).reshape(B, T, D_v))


def deep_first(stage, n_layers, groups, mode="hierarchical"):
    """`lora.adapted_layers` from the other end: the layers with l > L - j L/G."""
    first = n_layers - min(stage * n_layers // groups, n_layers)
    return list(range(first + 1, n_layers + 1))


def all_at_once(stage, n_layers, groups, mode="hierarchical"):
    """`lora.adapted_layers` without groups: every stage trains the adapters of all layers."""
    return list(range(1, n_layers + 1))


def begin_with_zero_weights(*args):
    model, best = begin_stage(*args)
    for bridge in model.bridges.values():
        bridge.adaptive_weights.requires_grad_(False)  # they start at zero
    return model, best


def begin_with_clip_trained(*args):
    model, best = begin_stage(*args)
    model.clip.requires_grad_(True)
    return model, best


def optimizers_with_slow_clip(model, *args):
    """`make_optimizers`, in each of which CLIP's own weights are a group of their own."""
    optimizers = make_optimizers(model, *args)
    of_clip = set(model.clip.parameters())
    for optimizer in optimizers:
        [group] = optimizer.param_groups
        slow = [p for p in group["params"] if p in of_clip]
        group["params"] = [p for p in group["params"] if p not in of_clip]
        optimizer.add_param_group({"params": slow, "share": 0.1})
    return optimizers


def set_shares_of_rate(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("share", 1)


TRAIN_CLIP = (train, "begin_stage", begin_with_clip_trained)
TRICKS = {  # name -> what is replaced: (object, attribute, by what)
    "": (),
    "mix the batch": ((Bridge, "forward", mixed_forward),),
    "deep first": ((lora, "adapted_layers", deep_first),),
    "all at once": ((lora, "adapted_layers", all_at_once),),
    "zero weights": ((train, "begin_stage", begin_with_zero_weights),),
    "train CLIP": (TRAIN_CLIP,),
    "train CLIP slowly": (TRAIN_CLIP, (train, "make_optimizers", optimizers_with_slow_clip),
                          (train, "set_learning_rate", set_shares_of_rate)),
}


@contextmanager
def patched(arm, settings):
    """The time in which train.py and the model are as this arm has them, and every arm sees the same expressions in
    the same order: without this, each stage would start at a place of its own in the endless data."""

    def config_of_arm(*args):
        return replace(first_config(*args), **arm.config)

    def same_order(dataset, first_item, *others, **options):
        number = first_item // STAGE_ITEMS  # of the stage: train.py counts so
        epochs_before = sum(stage.epochs for stage in train.stages(settings)[:number])
        first_item = epochs_before * settings.epoch_samples // dataset.rows
        return training_batches(dataset, first_item, *others, **options)

    with ExitStack() as stack:
        stack.enter_context(patch.object(train, "first_config", config_of_arm))
        stack.enter_context(patch.object(train, "training_batches", same_order))
        for owner, name, replacement in TRICKS[arm.trick]:
            stack.enter_context(patch.object(owner, name, replacement))
        yield
