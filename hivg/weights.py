"""Weights files in and out. One `.safetensors` holds the tensors, the configuration and the merge table of the
tokenizer (JSON and text in its metadata), so that it loads by itself and nothing in it is ever executed.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_bytes

from hivg.clip import CLIP, CLIPConfig
from hivg.model import HiVG, HiVGConfig
from hivg.tokenizer import Tokenizer

KINDS = {"clip": "a CLIP", "hivg": "a HiVG model"}


class WeightsError(ValueError):
    """A weights file that cannot be used; the message names the file and the mend in one line."""


def save(path, model, info=None, dtype=None):
    """Write a CLIP or a HiVG, with its tokenizer (`model.tokenizer`), to `path`, which appears whole or not at all.

    info: plain data kept beside the weights, e.g. the accuracy. dtype: store the tensors so (they load as float32).
    """
    kind = "hivg" if isinstance(model, HiVG) else "clip"
    tensors = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in model.state_dict().items()}
    metadata = {"format": "pt", "kind": kind, "config": json.dumps(asdict(model.config)),
                "info": json.dumps(info or {}), "tokenizer": model.tokenizer.to_text()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    side = path.with_name(path.name + ".part")
    side.write_bytes(save_bytes(tensors, metadata))
    os.replace(side, path)


def read(path):
    """Our own file -> (kind, config as a dict, tokenizer, tensors, info). Raises WeightsError."""
    path = Path(path)
    if not os.path.isfile(path):  # unlike path.is_file(), False for a name that no file can have
        raise WeightsError(f"{path}: there is no such weights file; weights/README.md says where to get some")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("kind") not in KINDS:
                raise WeightsError(f"{path}: a safetensors file, but not one of this project's; "
                                   "use one that train.py wrote")
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole .safetensors file ({error}); copy or download it again") from None
    try:
        config = json.loads(metadata["config"])
        clip = config["clip"] if metadata["kind"] == "hivg" else config
        tokenizer = Tokenizer.from_text(metadata["tokenizer"], clip["context_length"])
        if tokenizer.vocab_size != clip["vocab_size"]:
            raise ValueError(f"a tokenizer of {tokenizer.vocab_size} for a vocabulary of {clip['vocab_size']}")
        return metadata["kind"], config, tokenizer, tensors, json.loads(metadata["info"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: its metadata is damaged ({error}); copy or download it again") from None


def _load(path, kind, build):
    found, config, tokenizer, tensors, info = read(path)
    if found != kind:
        raise WeightsError(f"{path}: holds {KINDS[found]}; {KINDS[kind]} is needed here")
    try:
        with torch.device("meta"):  # no time spent on random numbers that are overwritten
            model = build(config)
    except Exception as error:  # a wrong setting can fail anywhere in the model
        raise WeightsError(f"{path}: its configuration is not that of {KINDS[kind]} ({error}); "
                           "use a file that this version of train.py wrote") from None
    check_keys(path, KINDS[kind], tensors, model.state_dict())
    model.load_state_dict(tensors, assign=True)
    model.tokenizer, model.info = tokenizer, info
    return model.eval()


def load_clip(path):
    """-> CLIP in float32 and evaluation mode, with its `tokenizer` and `info`. Raises WeightsError."""
    return _load(path, "clip", lambda config: CLIP(CLIPConfig(**config)))


def load_hivg(path):
    """-> HiVG in float32 and evaluation mode, adapters apart, with its `tokenizer` and `info`. Raises WeightsError."""
    return _load(path, "hivg", lambda config: HiVG(HiVGConfig.from_dict(config)))


def check_keys(path, what, tensors, expected):
    """Raise WeightsError unless the tensors have exactly the expected names and shapes."""
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    shapes = [f"{k} {tuple(tensors[k].shape)} instead of {tuple(expected[k].shape)}"
              for k in expected.keys() & tensors.keys() if tensors[k].shape != expected[k].shape]
    lists = [f"{name}: {', '.join(sorted(rows)[:8])}{' ..' if len(rows) > 8 else ''}"
             for name, rows in (("missing", missing), ("left over", extra), ("of another shape", shapes)) if rows]
    if lists:
        raise WeightsError(f"{path}: taken for {what}, it does not fit its own configuration; {'; '.join(lists)}")
