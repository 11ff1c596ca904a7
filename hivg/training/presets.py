"""The paper's training recipes: what differs from train.py's defaults, a row for each data set and size of CLIP.

    python -m hivg.weights fetch ViT-B/16
    python train.py --preset refcoco-base --data_root DIR

The released program steps on global batches of 7 GPUs x 80, 60, 60, 40 (base; the mixture 64) or 7 x 32 (large)
expressions. Here the same batches are accumulated on one GPU, or shared by several. Accumulation adds up gradients, not
negatives: the contrastive loss sees `batch_size` expressions at a time (139 negatives for base, 111 for its mixture, 55
for large, less those of the same image), however many processes there are, where the released program's sees one GPU's
80, 64, 60, 40 or 32. On a GPU with less memory, take a part of --batch_size and as many times the --accumulate.

Every stage starts from the best state of the one before (the released mixture, base, from its last).

Every process takes an equal share of a batch. 1, 2, 4 or 7 divide all of them, 8 those of 112 and 56 but not 140: no
batch size divides both into 8 shares and into the published 420. On 8 GPUs a base preset but the mixture's is refused
until it is given --batch_size 136 or 144, 3 % from the published steps.

Masks are boxes filled (--masks box), as published; the data sets' outlines are for --masks segmentation.

Expect (Acc@0.5, paper, from a CLIP fine-tuned on COCO detection; from OpenAI's a few points less): RefCOCO
87.3 / 89.9 / 83.3, RefCOCO+ 78.1 / 84.8 / 68.1, RefCOCOg 78.3 / 78.8, ReferIt 75.2, Flickr30k 82.1. None of them
has been run.
"""

from dataclasses import fields

from hivg.clip import CLIP_SIZES
from hivg.losses import LossWeights
from hivg.training.stages import hivg_config

# As the released program: no gradient clipping, no warm-up steps, plain L1 (the paper: smooth L1), no level norm.
PAPER = dict(optimizer="adamw", clip_grad=float("inf"), warmup_steps=0, lora_rank=32, lora_alpha=16.0, box_loss="l1",
             level_norm=False, loss_weights=LossWeights())
# stages: warm-up, Hi LoRA 1, 2, 3
BASE = PAPER | dict(clip="weights/ViT-B-16.pt", epochs=(60, 20, 20, 20), lr=(2.5e-4, 1e-4, 5e-5, 2.5e-5),
                    batch_size=140, accumulate=(4, 3, 3, 2))
# stages: without the bridge, warm-up, Hi LoRA 1, 2, 3
LARGE = PAPER | dict(clip="weights/ViT-L-14.pt", bridgeless=True, epochs=(10, 60, 10, 10, 10),
                     lr=(2.5e-4, 2.5e-4, 1e-4, 5e-5, 2.5e-5), batch_size=56, accumulate=(4,), recompute=True)
REFCOCO = dict(dataset="refcoco", text_layers=(12,))
REFCOCO_PLUS = dict(dataset="refcoco+", text_layers=(6, 12))
REFCOCOG = dict(dataset="refcocog", text_layers=tuple(range(1, 13)))
REFERIT = dict(dataset="referit", text_layers=(6, 12))
FLICKR = dict(dataset="flickr", text_layers=(12,))
MIXUP = dict(dataset="mixup", bridge="projected", text_layers=(12,))
PRESETS = {
    "refcoco-base": BASE | REFCOCO,
    "refcoco+-base": BASE | REFCOCO_PLUS,
    "refcocog-base": BASE | REFCOCOG,
    "referit-base": BASE | REFERIT,
    "flickr-base": BASE | FLICKR | dict(epochs=(30, 5, 5, 5), accumulate=(4, 3, 3, 3)),
    "mixup-base": BASE | MIXUP | dict(lr=(2.5e-4, 1e-4, 5e-5, 2e-5), batch_size=112, accumulate=(4,)),
    "refcoco-large": LARGE | REFCOCO,
    "refcoco+-large": LARGE | REFCOCO_PLUS,
    "refcocog-large": LARGE | REFCOCOG,
    "referit-large": LARGE | REFERIT | dict(epochs=(5, 60, 10, 10, 10)),
    "flickr-large": LARGE | FLICKR | dict(epochs=(10, 30, 5, 5, 5)),
    "mixup-large": LARGE | MIXUP | dict(epochs=(10, 30, 10, 10, 10), lr=(2.5e-4, 2.5e-4, 1e-4, 5e-5, 2e-5)),
}


# A first look: one stage, in which CLIP is trained too, in the narrower world, which is learned sooner
QUICK = dict(name="quick", dataset="shapes", clip="weights/clip-shapes.safetensors", lora="none", clip_rate=0.3,
             epochs=(1,), lr=(3e-3,), epoch_samples=10240)


def preset_of(name):
    """{setting: value} of a row, and its name as the run's. Raises ValueError."""
    if name not in PRESETS:
        raise ValueError(f"--preset: {name!r:.40} is none of {', '.join(PRESETS)}")
    return PRESETS[name] | {"name": name}


def finetune_defaults(path, lora):
    """The defaults of --finetune PATH: one stage, or with --lora the stages that add adapters. The tiny model keeps
    train.py's settings, which suit the drawn world, except for the rate; any other model gets the paper's. Raises
    ValueError."""
    config = hivg_config(path)
    if lora != "none" and config.stage:
        raise ValueError(f"--lora {lora}: {path} has adapters ({config.lora}, stage {config.stage}); leave it out")
    n_stages = 3 if lora in ("hierarchical", "shared") else 1
    defaults = {"lora": "none", "epochs": (1,) * n_stages, "lr": (1e-3,) * n_stages}
    if config.clip.vision_layers != CLIP_SIZES["tiny"].vision_layers:
        defaults |= PAPER | {"lr": (2.5e-5,) * n_stages}  # the rate of the paper's last stage
    return defaults


def defaults_of(given, settings):
    """The defaults that --quick, --preset and --finetune bring along. given: {flag: value}. settings: the class of the
    settings. Raises ValueError."""
    defaults = {}
    if given.get("quick"):
        others = [name for name in ("preset", "finetune", "lora") if given.get(name)]
        if others:
            raise ValueError(f"--quick is a recipe of its own; leave out --{others[0]}")
        return QUICK
    if given.get("finetune"):
        of_adapters = ("lora_rank", "lora_alpha") if given.get("lora", "none") == "none" else ()
        new = [f.name for f in fields(settings)
               if f.name in given and (f.metadata["of_model"] or f.name in of_adapters)]
        if new:
            raise ValueError(f"--finetune keeps the model of its file; leave out --{', --'.join(new)}")
        defaults = finetune_defaults(given["finetune"], given.get("lora", "none"))
    if given.get("preset"):
        preset = preset_of(given["preset"])
        own = ("epochs", "lr", "accumulate", "lora") if defaults else ()  # a preset's are for all of its stages
        defaults |= {name: value for name, value in preset.items() if name not in own}
    return defaults
