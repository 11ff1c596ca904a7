"""Writing this project's weights file, and where the files that come with the program are."""

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save as save_bytes

from hivg.fast import JoinedAttention
from hivg.lora import LoRALinear
from hivg.model import HiVG
from hivg.utils.files import write_whole
from hivg.utils.messages import shown
from hivg.weights.check_config import check_config

INSTALLED = Path(__file__).parents[1] / "bundled"  # where an installed package has the bundled files (pyproject.toml)
REPOSITORY = Path(__file__).parents[2] / "weights"


def bundled(name):
    """The path of a file that comes with the program: hivg-tiny.safetensors, clip-tiny.safetensors, example.png."""
    return (INSTALLED if INSTALLED.is_dir() else REPOSITORY) / name


def save(path, model, info=None, dtype=None):
    """Write a CLIP or a HiVG, with its tokenizer (`model.tokenizer`), to `path`. The file appears whole or not at all.

    info: plain data kept beside the weights, e.g. the accuracy; by default the model's own (`model.info`). Of a model
    that was trained further, leave out the old `score_calibration`. dtype: the dtype to store the tensors in (they load
    as float32); by default the model's own. Raises OSError, one line with the file, if it cannot be written, and
    ValueError for a model of `HiVG.for_prediction`, whose products are joined, for one with adapters that its
    configuration does not have, and for one whose configuration could not be read again (check_config.py).
    """
    if any(isinstance(module, JoinedAttention) for module in model.modules()):
        raise ValueError(f"{shown(path)}: the model was made for prediction; save the one that it was made from")
    if isinstance(model, HiVG) and not model.config.stage and any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError(f"{shown(path)}: the model has adapters, of which its configuration says nothing (merged() "
                         "keeps those of your own), so the file could not be read; save the one before merged()")
    tensors = {name: t.to("cpu", dtype or t.dtype).contiguous() for name, t in model.state_dict().items()}
    check_config(model.config, len(tensors))
    if info is None:
        info = getattr(model, "info", None)
    metadata = {
        "format": "pt",
        "kind": "hivg" if isinstance(model, HiVG) else "clip",
        "config": json.dumps(asdict(model.config)),
        "info": json.dumps(info or {}),
        "tokenizer": model.tokenizer.to_text() if model.tokenizer else "",
    }
    data = save_bytes(tensors, metadata)
    write_whole(Path(path), lambda part: part.write_bytes(data))
