"""Whether a model can be built from a configuration: types, ranges, and sizes that belong together.

`reading.read` asks before anything is built, as a file may say anything. HiVGConfig itself checks the names that a
setting may have, and which layers exist in the CLIP.
"""

from dataclasses import fields

from hivg import lora
from hivg.clip import CLIPConfig
from hivg.utils.messages import quoted

# The range of a new setting that is a number goes in here; otherwise it is 1 to MAX_SIZE.
MAX_SIZE = 10**7  # of any width, number of tokens, ..
MAX_LAYERS = 1000
LEAST = {"stage": 0, "lora_alpha": 0, "dropout": 0, "lora_dropout": 0, "context_length": 2}  # others: 1
MOST = {"dropout": 1, "lora_dropout": 1, "lora_alpha": 10**6, "stage": 100, "encoder_layers": MAX_LAYERS,
        "vision_layers": MAX_LAYERS, "text_layers": MAX_LAYERS}  # others: MAX_SIZE
CALLED = {str: "text", bool: "true or false", int: "a whole number", float: "a number", tuple: "whole numbers"}
DIVIDES = [("patch_size", "image_size"), ("vision_heads", "vision_width"), ("text_heads", "text_width"),
           ("encoder_heads", "width")]


def check_config(config, n_tensors):
    """Raises ValueError for a CLIPConfig or HiVGConfig from which no model can be built, or none of so few tensors."""
    check_types(type(config), vars(config))
    clip = config if isinstance(config, CLIPConfig) else config.clip
    sizes = vars(clip) | vars(config)
    for part, whole in DIVIDES:
        if part in sizes and sizes[whole] % sizes[part]:
            raise ValueError(f"{part} {sizes[part]} does not divide {whole} {sizes[whole]}")
    layers = clip.vision_layers + clip.text_layers + sizes.get("encoder_layers", 0)
    adapters = 0 if config is clip else n_adapters(config)
    if layers + 2 * adapters > n_tensors:  # an adapter is a pair, A and B
        raise ValueError(f"{layers} layers and {adapters} adapters, but only {n_tensors} tensors")


def n_adapters(config):
    """How many adapters (pairs of A and B) a model of this configuration has."""
    stages = range(1, config.stage + 1)
    if config.lora == "shared":
        stages = stages[-1:]  # the last stage trains all of them
    layers = sum(len(layers) for stage in stages for layers in config.adapted_layers(stage))
    return layers * len(lora.TARGETS)


def check_types(kind, settings):
    """Raises ValueError unless each setting has the type of its field, and numbers are in range.

    kind: CLIPConfig or HiVGConfig. settings: {name: value} of a configuration, or of a file, where tuples are lists and
    missing settings have their default.
    """
    for field in fields(kind):
        name = field.name
        if name not in settings:
            continue
        value = settings[name]
        if name == "clip":
            check_types(CLIPConfig, vars(value) if isinstance(value, CLIPConfig) else value)
            continue
        called = CALLED[field.type]
        if field.type is tuple:
            is_right = isinstance(value, tuple | list) and all(type(n) is int for n in value)
        elif field.type in (int, float):
            low, high = LEAST.get(name, 1), MOST.get(name, MAX_SIZE)
            called += f" in {low}..{high}"
            is_right = type(value) in (int, field.type) and low <= value <= high
        else:
            is_right = isinstance(value, field.type)
        if not is_right:
            raise ValueError(f"{name} must be {called}, not {quoted(value)}")
