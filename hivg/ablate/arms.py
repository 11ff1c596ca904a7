"""The arms of the ablation: each is a model to train, what differs in it, and the claim it tests.

An arm is settings of train.py and fields of HiVGConfig. Three things that nobody should train with are neither: they
are TRICKS, done to the model at the start of each stage.
"""

from dataclasses import dataclass, field, replace

from hivg.clip import similarity
from hivg.losses import DRAWN_WORLD

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
    "copying": "the contrastive loss needs its weight, and an image that has read its text",
    "recipe": "with the paper's own recipe, the bridge and the text in it help",
    "small gap": "adapters in stages are better where CLIP comes from a world a little different",
    "large gap": "adapters in stages are better where CLIP comes from a world that lacks most looks and words",
}


@dataclass(frozen=True)
class Arm:
    """A model to train. It is like the arm `against` but for one thing."""

    name: str
    claim: str  # of CLAIMS
    differs: str  # in words
    settings: dict = field(default_factory=dict)  # of train.py
    config: dict = field(default_factory=dict)  # fields of HiVGConfig that train.py has no flag for
    trick: str = ""  # a name in TRICKS
    against: str = "base"

    def __post_init__(self):
        if self.claim and self.claim not in CLAIMS:
            raise ValueError(f"{self.name}: its claim {self.claim!r} is none of CLAIMS, so no table would show it")

    @property
    def seeds(self):
        """With how many seeds it is tried, from 0 on: more for the main claims, and where seeds differ most."""
        return 3 if self.claim in ("text layers", "visual levels", "losses", "batch mixing", "copying") else 5

    def definition(self):
        """All that makes the arm what it is, for the results file."""
        return {"settings": self.settings, "config": self.config, "trick": self.trick}

    def prepare(self, model):
        """Do the arm's trick to a model, in place: at the start of each stage, and again to the trained model that is
        measured. So a trick may freeze parameters and register hooks (see fast.simplify), but not set values."""
        TRICKS[self.trick](model)


def loss_weights(**changes):
    return {"loss_weights": vars(replace(DRAWN_WORLD, **changes))}


LAST = {"text_layers": (4,)}
LAST_TWO = {"text_layers": (3, 4)}
ALL = {"text_layers": (1, 2, 3, 4)}
NO_NORM = {"text_norm": False}
AS_RELEASED = {"text_padding": "released"}  # 77 positions, which the bridge sees all: padding is not masked
# Hi LoRA ends with 24 pairs in the tiny CLIP, plain LoRA with 10, so 24 / 10 times the rank is as many parameters
VANILLA_WIDE = {"lora": "vanilla", "lora_rank": 38, "lora_alpha": 38.0}

NO_HINTS = loss_weights(patch_box=0.0, reg_attention=0.0)
PAPER = {"optimizer": "adamw", "level_norm": False} | NO_NORM | NO_HINTS
GAPS = {  # between the world that CLIP was pre-trained on and the one it grounds in
    # its rows have the clip-tiny of their version of the code: another one needs rows of its own
    "small gap": {"dataset": "shapes", "clip": "weights/clip-tiny.safetensors"},
    "large gap": {"dataset": "shapes-wide", "clip": "weights/clip-shapes.safetensors"},
}

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
    Arm("lora vanilla", "Hi LoRA", "all adapters at once, in one stage after the warm-up", {"lora": "vanilla"}),
    Arm("lora at once", "Hi LoRA", "all adapters from the first of the three stages on, through the same stages",
        {"lora": "shared"}, {"lora_order": "at_once"}, against="lora shared"),
    Arm("lora vanilla, wide", "Hi LoRA", "all at once, rank 38: as many parameters", VANILLA_WIDE),
    Arm("lora none", "Hi LoRA", "no adapters, a warm-up of as many epochs", {"lora": "none"}),
    Arm("lora deep first", "Hi LoRA", "stages from deep to shallow", config={"lora_order": "deep_first"}),
    Arm("no CLC", "losses", "without the contrastive loss", loss_weights(clc=0.0)),
    Arm("no RTCC", "losses", "without the region-text loss", loss_weights(rtcc_focal=0.0, rtcc_dice=0.0)),
    Arm("no mask", "losses", "without the mask losses", loss_weights(mask_focal=0.0, mask_dice=0.0)),
    Arm("no hints", "hints", "without our two hints", NO_HINTS),
    Arm("padding seen", "batch mixing", "77 positions of text, padding not masked in the bridge, as released",
        config=AS_RELEASED),
    Arm("mixed", "batch mixing", "and the texts of the batch mixed in the bridge, as released", config=AS_RELEASED,
        trick="mix the batch", against="padding seen"),
    Arm("mixed, all", "batch mixing", "all four text layers", ALL, AS_RELEASED, trick="mix the batch", against="mixed"),
    Arm("mixed, all, no norm", "batch mixing", "no norm", ALL | NO_NORM, AS_RELEASED, trick="mix the batch",
        against="mixed, all"),
    Arm("CLIP trained", "fine-tuning", "all of CLIP is trained, from the first step",
        {"lora": "none", "clip_rate": 1.0}, against="lora none"),
    Arm("CLIP trained slowly", "slow fine-tuning", "all of CLIP is trained, at a tenth of the rate of what is new",
        {"lora": "none", "clip_rate": 0.1}, against="lora none"),
    Arm("neither", "bridge", "no bridge, where there are no adapters", {"bridge": "none", "lora": "none"},
        against="lora none"),
    Arm("CLC 1", "copying", "ten times the weight: the paper's", loss_weights(clc=1.0)),
    Arm("CLC of CLIP", "copying", "of an image feature that no bridge touched", trick="CLC without bridges"),
    Arm("recipe", "", "nearer to the paper: AdamW, no hints, no norms of ours", PAPER),
    Arm("recipe, bridge none", "recipe", "no bridge", PAPER | {"bridge": "none"}, against="recipe"),
    Arm("recipe, bridge constant", "recipe", "learned constants instead of the text", PAPER | {"bridge": "constant"},
        against="recipe"),
    Arm("recipe, text norm", "recipe", "the norm on the text layers", PAPER | {"text_norm": True}, against="recipe"),
]
ACROSS = ("lora shared", "lora vanilla", "lora vanilla, wide", "lora none", "lora deep first", "CLIP trained slowly")
for gap, world in GAPS.items():
    ARMS.append(Arm(f"base, {gap}", "", "the base, with another CLIP or another world", world))
    for arm in [arm for arm in ARMS if arm.name in ACROSS]:
        ARMS.append(replace(arm, name=f"{arm.name}, {gap}", claim=gap, settings=arm.settings | world,
                            against=f"base, {gap}"))
BY_NAME = {arm.name: arm for arm in ARMS}
COMPARED = [  # every arm of a claim with the arm it differs from, and three with another besides
    *[arm for arm in ARMS if arm.claim],
    replace(BY_NAME["lora vanilla"], differs="one stage instead of three", against="lora at once"),
    replace(BY_NAME["lora none"], differs="no adapters instead of plain ones", against="lora vanilla"),
    replace(BY_NAME["neither"], claim="Hi LoRA", differs="no adapters, without a bridge", against="bridge none"),
]


# ---- tricks

def mix_the_batch(model):
    """As the released program: keys made as (T, B, D_v) are read as (B, T, D_v), so with 77 positions and 32 samples
    each sample looks at two or three positions of every text of the batch. There is no mask."""

    def mixed(bridge, args):
        x, keys, _ = args  # what Bridge.forward takes
        B, T, D_v = keys.shape
        return x, keys.transpose(0, 1).reshape(B, T, D_v), None

    for bridge in model.bridges.values():
        bridge.register_forward_pre_hook(mixed)


def zero_weights(model):
    for bridge in model.bridges.values():
        bridge.adaptive_weights.requires_grad_(False)  # they start at zero


def clc_without_bridges(model):
    """Image features for CLC from a second pass of the vision tower, which reads no text."""

    def untouched(model, args, output):
        visual = model.clip.visual
        features = visual.pool(visual(args[0])[-1])  # (B, E), or (1, E) for one image
        output.image_features = features.expand_as(output.text_features)
        output.logits_per_text = similarity(output.text_features, output.image_features, model.clip.logit_scale)

    model.register_forward_hook(untouched)


TRICKS = {"": lambda model: None, "mix the batch": mix_the_batch, "zero weights": zero_weights,
          "CLC without bridges": clc_without_bridges}
