"""Whether a model can be built of a configuration: of types, ranges, and sizes that belong together.

`hivg.weights` asks before anything is built, as a file may say anything. The names that a setting may have, and the
layers of the CLIP that there are, are checked where they belong, in HiVGConfig.
"""

import math
from dataclasses import fields

from hivg import lora
from hivg.clip import CLIPConfig
from hivg.utils.messages import quoted

MAX_SIZE = 10**7  # of any width, number of tokens, ..
MAX_LAYERS = 1000
LEAST = {"stage": 0, "lora_alpha": 0, "dropout": 0, "lora_dropout": 0, "context_length": 2}  # others: 1
MOST = {"dropout": 1, "lora_dropout": 1, "lora_alpha": 10**6, "stage": 100, "encoder_layers": MAX_LAYERS,
        "vision_layers": MAX_LAYERS, "text_layers": MAX_LAYERS}  # others: MAX_SIZE


def check_config(config, n_tensors):
    """Raises ValueError for a CLIPConfig or HiVGConfig of which no model can be built, or none of so few tensors."""
    check_types(type(config), vars(config))
    is_clip = isinstance(config, CLIPConfig)
    clip = config if is_clip else config.clip
    check_clip(clip)
    layers = clip.vision_layers + clip.text_layers
    adapters = 0
    if not is_clip:
        check_divides("encoder_heads", config.encoder_heads, "width", config.width)
        layers += config.encoder_layers
        adapters = n_adapters(config)
    if layers + 2 * adapters > n_tensors:  # an adapter is a pair, A and B
        raise ValueError(f"{layers} layers and {adapters} adapters, but only {n_tensors} tensors")


def n_adapters(config):
    """How many pairs of low rank a model of this configuration has."""
    clip = config.clip
    stages = range(1, config.stage + 1)
    if config.lora == "shared":
        stages = stages[-1:]  # the last one trains all there are
    layers = 0
    for stage in stages:
        layers += len(lora.adapted_layers(stage, clip.vision_layers, config.lora_groups, config.lora,
                                          config.lora_order))
        layers += len(lora.adapted_layers(stage, clip.text_layers, lora.TEXT_GROUPS, config.lora))
    return layers * len(lora.TARGETS)


def check_types(kind, settings):
    """Raises ValueError unless each of the settings has the type of its field, and numbers are in their range.

    kind: CLIPConfig or HiVGConfig. settings: {name: value}, of a configuration or of a file, whose tuples are lists;
    those that are not there have their default.
    """
    for field in fields(kind):
        name = field.name
        if name not in settings:
            continue
        value = settings[name]
        if name == "clip":
            check_types(CLIPConfig, vars(value) if isinstance(value, CLIPConfig) else value)
        elif field.type is tuple:
            if not isinstance(value, tuple | list) or not all(type(n) is int for n in value):
                raise ValueError(f"{name} must be whole numbers, not {quoted(value)}")
        elif field.type is float:
            is_number = type(value) is int or (type(value) is float and math.isfinite(value))
            check_range(name, value, "a number", is_number)
        elif field.type is int:
            check_range(name, value, "a whole number", type(value) is int)
        elif not isinstance(value, field.type):
            called = {str: "text", bool: "true or false"}.get(field.type, field.type)
            raise ValueError(f"{name} must be {called}, not {quoted(value)}")


def check_range(name, value, kind, is_kind):
    low = LEAST.get(name, 1)
    high = MOST.get(name, MAX_SIZE)
    if not is_kind or not low <= value <= high:
        raise ValueError(f"{name} must be {kind} in {low}..{high}, not {quoted(value)}")


def check_clip(clip):
    check_divides("patch_size", clip.patch_size, "image_size", clip.image_size)
    check_divides("vision_heads", clip.vision_heads, "vision_width", clip.vision_width)
    check_divides("text_heads", clip.text_heads, "text_width", clip.text_width)


def check_divides(name, part, whole_name, whole):
    if whole % part:
        raise ValueError(f"{name} {part} does not divide {whole_name} {whole}")
