"""A stage of the training: what it adds to the model, and the table that --plan and the start of a stage print."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from hivg import lora, weights
from hivg.clip import CLIP_SIZES, CLIPConfig
from hivg.model import HiVG, HiVGConfig


@dataclass(frozen=True)
class Stage:
    """One row of the schedule (`stages` in train.py)."""

    name: str
    bridge: str | None  # its kind; None = the file's
    lora_stage: int  # j of Hi LoRA's formula; 0 = no adapters
    epochs: int
    lr: float
    batch_size: int
    accumulate: int
    clip_rate: float  # of CLIP's own weights, as a share of lr; 0 = frozen


def grow(model, stage):
    """The model of the stage before plus the bridges and adapters that `stage` adds, with what it trains unfrozen. No
    output changes yet: a new bridge's last layer and a new adapter's B start at zero."""
    if stage.bridge and model.config.bridge != stage.bridge:
        model = model.with_bridge(stage.bridge)
    if stage.lora_stage:
        model.add_stage(stage.lora_stage)
    for p in lora.without_adapters(model.clip) if stage.clip_rate else ():
        p.requires_grad_(True)
    return model


def clip_name(path):
    """The name in CLIP_SIZES of a published CLIP by its file's name, or None."""
    stem = Path(path).stem
    return next((name for name in CLIP_SIZES
                 if name != "tiny" and stem == name.replace("/", "-").replace("@", "-")), None)


def clip_config(path):
    """The sizes of a CLIP: of a published one by its file's name, so that the file is not needed; otherwise from the
    file. Raises WeightsError."""
    name = clip_name(path)
    return CLIP_SIZES[name] if name else config_of(path, CLIPConfig, "a CLIP")


def hivg_config(path):
    """The configuration of the HiVG in a file. Raises WeightsError."""
    return config_of(path, HiVGConfig, "a HiVG")


def config_of(path, kind, wanted):
    config = weights.read(path).config
    if not isinstance(config, kind):
        raise weights.WeightsError(f"{path}: does not hold {wanted}; --clip takes a CLIP, --finetune a HiVG")
    return config


def print_plan(table, config):
    """Print every stage of the table as a column. config: of the first stage's model. The models are built on the meta
    device."""
    columns = []
    with torch.device("meta"):
        model = HiVG(config)
        for stage in table:
            model = grow(model, stage)
            columns.append(stage_column(stage, model))
    sys.stdout.write(columns_text(columns) + "\n")  # in one write: a reader may stop early, as `head` does


def stage_column(stage, model):
    """{row: text} of a stage and the model as it starts with it: schedule, bridge, adapters, trained parameters."""
    config = model.config
    has_bridge = config.bridge != "none"
    vision_layers, text_layers = config.adapted_layers(config.stage)
    column = {
        "stage": stage.name,
        "epochs": str(stage.epochs),
        "learning rate": f"{stage.lr:g}",
        "expressions per step": f"{stage.batch_size * stage.accumulate:,}",
        "  in one batch": f"{stage.batch_size:,}",
        "bridge": config.bridge,
        "  in vision blocks, from 0": spans(config.bridge_blocks) if has_bridge else "-",
        "  of text layers, from 1": spans(config.text_layers) if has_bridge else "-",
        "adapters trained": f"rank {config.lora_rank}" if vision_layers else "none",
        "  on vision layers, from 1": spans(vision_layers),
        "  on text layers, from 1": spans(text_layers),
    }
    modules = [(f"  {name}", child.parameters()) for name, child in model.named_children()]
    modules.append(("  [REG], positions", model.parameters(recurse=False)))
    modules.append(("parameters trained", model.parameters()))
    for name, parameters in modules:
        column[name] = f"{sum(p.numel() for p in parameters if p.requires_grad):,}"
    in_all = sum(p.numel() for p in model.parameters())
    in_adapters = in_all - sum(p.numel() for p in lora.without_adapters(model))
    column["parameters in all"] = f"{in_all:,}"
    column["  in adapters, of all stages"] = f"{in_adapters:,}"
    return column


def spans(layers):
    """Layer numbers in short: (1, 2, 3, 4) -> "1-4", (0, 3, 7) -> "0, 3, 7", () -> "-"."""
    if len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ", ".join(map(str, layers)) or "-"


def columns_text(columns):
    """Columns {row: text} with the same rows, side by side."""
    names = list(columns[0])
    lines = [f"{name:<28}" for name in names]
    for column in columns:
        width = 2 + max(len(text) for text in column.values())
        lines = [line + f"{column[name]:>{width}}" for line, name in zip(lines, names)]
    return "\n".join(lines)
