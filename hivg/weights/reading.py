"""Any weights file -> `File`: its kind, configuration and tokenizer, and its tensors under our names."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from hivg.clip import CLIPConfig
from hivg.model import HiVGConfig
from hivg.tokenizer import Tokenizer
from hivg.utils import pickles
from hivg.utils.messages import quoted, shown
from hivg.weights.check_config import check_config, check_types
from hivg.weights.clip_names import NotThisKind, huggingface_clip, kind_of, openai_clip
from hivg.weights.download import TABLE
from hivg.weights.released import looks_released, released_hivg
from hivg.weights.saving import INSTALLED, REPOSITORY, bundled

KINDS = {
    "clip": "a CLIP",  # ours
    "hivg": "a HiVG model",  # ours
    "openai": "OpenAI's CLIP",
    "huggingface": "a CLIP from Hugging Face",
    "released": "a released HiVG checkpoint",
}
# downloads go here and merge tables are looked for here: weights/ of the repository, or of the current folder if the
# package is installed
FOLDER = Path("weights") if INSTALLED.is_dir() else REPOSITORY
TABLES = (TABLE, "merges.txt", "tokenizer.json")
MAX_NAMES = 100_000  # parts of a TorchScript archive that are visited; OpenAI's have about 500
MAX_NAME = 300  # characters of a tensor's name


class WeightsError(ValueError):
    """A weights file that cannot be used; the message says in one line which file, what is wrong and what to do."""


class File(NamedTuple):
    """A weights file as `read` returns it."""

    kind: str  # a key of KINDS
    config: CLIPConfig | HiVGConfig
    tokenizer: Tokenizer | None
    tensors: dict  # {our name: tensor}
    info: dict  # plain data kept beside the weights


def read(path):
    """Any weights file -> File. Raises WeightsError."""
    path = Path(path)
    if os.path.isdir(path):
        raise WeightsError(f"{shown(path)}: is a folder; name a weights file in it")
    if not os.path.isfile(path):  # unlike path.is_file(), False for a name that no file can have
        raise WeightsError(f"{shown(path)}: no such weights file; {shown(bundled('README.md'), 80)} says where to get "
                           "some")
    try:
        file = read_any(path)
        try:
            check_config(file.config, len(file.tensors))
        except ValueError as error:
            raise misconfigured(path, file.kind, error) from None
        return file
    except WeightsError:
        raise
    except (NotThisKind, pickles.RefusedError) as error:
        reason = str(error)
    except OSError as error:
        reason = f"cannot be read ({error.strerror or shown(error)})"
    except SafetensorError as error:
        reason = f"not a whole .safetensors file ({shown(error)}); copy or download it again"
    except (ValueError, IndexError, RuntimeError, ArithmeticError) as error:  # most: impossible shapes
        reason = f"cannot be read: {shown(error, 150)}; copy or download it again"
    raise WeightsError(f"{shown(path)}: {reason}")


def read_any(path):
    """Raises one of the errors that `read` knows."""
    with open(path, "rb") as file:
        start = file.read(1024)
    text = start.lstrip().lower()
    if not start:
        raise WeightsError(f"{shown(path)}: the file is empty; copy or download it again")
    if text.startswith(b"version https://git-lfs"):
        raise WeightsError(f"{shown(path)}: a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        raise WeightsError(f"{shown(path)}: a web page saved under this name, not the weights; download the file "
                           "itself")
    if start[8:9] != b"{":  # a .safetensors file begins with 8 bytes of length and a JSON header
        return read_foreign(path, pickles.read(path))
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    return read_ours(path, metadata, tensors) if "kind" in metadata else read_foreign(path, tensors)


def read_ours(path, metadata, tensors):
    kind = metadata["kind"]
    if kind not in ("clip", "hivg"):
        raise WeightsError(f"{shown(path)}: a .safetensors file of kind {quoted(kind)}, which this project does not "
                           "write; use one that train.py wrote")
    try:
        config = json_dict(metadata["config"])
        info = json_dict(metadata["info"])
        tokenizer = tokenizer_of(metadata["tokenizer"], config["clip"] if kind == "hivg" else config)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"no {shown(error)} in it" if isinstance(error, KeyError) else shown(error)
        raise WeightsError(f"{shown(path)}: its metadata is damaged ({reason}); copy or download it again") from None
    try:
        check_types(HiVGConfig if kind == "hivg" else CLIPConfig, config)
        config = HiVGConfig.from_dict(config) if kind == "hivg" else CLIPConfig(**config)
    except (TypeError, ValueError) as error:
        raise misconfigured(path, kind, error) from None
    return File(kind, config, tokenizer, tensors, info)


def json_dict(text):
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{quoted(text, 40)} is not a JSON object")
    return value


def tokenizer_of(table, clip):
    """The tokenizer of a merge table's text, None for an empty one. clip: the CLIP's configuration as a dict."""
    if not table:
        return None
    tokenizer = Tokenizer.from_text(table, clip["context_length"])
    if tokenizer.vocab_size != clip["vocab_size"]:
        raise ValueError(f"a tokenizer of {tokenizer.vocab_size} tokens for a vocabulary of {clip['vocab_size']}")
    return tokenizer


def misconfigured(path, kind, error):
    source = "that this version of train.py wrote" if kind in ("clip", "hivg") else "as it was published"
    return WeightsError(f"{shown(path)}: not a valid configuration of {KINDS[kind]} ({shown(error)}); use a file "
                        f"{source}")


# ---- other programs' files

def read_foreign(path, data):
    """data: what is in the file: a state dict, a TorchScript module, or a released checkpoint."""
    args = data.get("args") if isinstance(data, dict) else None
    most = 4 * os.path.getsize(path)  # bytes of all tensors; a file may name one many times
    if isinstance(args, pickles.Attributes) and isinstance(data.get("model"), dict):
        config, tensors = released_hivg(tensors_of(data["model"], most), args)
        settings = {}
        for name, value in vars(args).items():
            if isinstance(name, str) and isinstance(value, str | int | float | bool | None):  # what JSON can hold
                settings[name] = value
        info = {"source": KINDS["released"], "args": settings}
        return File("released", config, find_tokenizer(path.parent, config.clip), tensors, info)

    tensors = tensors_of(data, most)
    if looks_released(tensors):
        raise WeightsError(f"{shown(path)}: a released HiVG's state dict without its settings; use the whole "
                           "checkpoint, a dict with `model` and `args`")
    kind = kind_of(tensors)
    if kind is None:
        raise WeightsError(f"{shown(path)}: neither a CLIP nor a HiVG: it holds {some_names(tensors)}; the README "
                           "lists the files that can be loaded")
    config, tensors = openai_clip(tensors) if kind == "openai" else huggingface_clip(tensors)
    return File(kind, config, find_tokenizer(path.parent, config), tensors, {"source": KINDS[kind]})


def some_names(tensors):
    if not tensors:
        return "no weights at all"
    more = " .." if len(tensors) > 2 else ""
    return "tensors called " + ", ".join(shown(name, 40) for name in list(tensors)[:2]) + more


def tensors_of(data, most):
    """The tensors of a state dict, or of the modules of a TorchScript archive, read from the disk -> {dotted name:
    tensor}. most: bytes in total. Raises ValueError."""
    if isinstance(data, pickles.Attributes):
        data = vars(data)
    elif isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    found = {}
    if isinstance(data, dict):
        visited = []
        for name, value in data.items():
            find_tensors(found, shown(name, MAX_NAME), value, visited)
    if sum(tensor.nbytes for tensor in found.values()) > most:
        raise ValueError("its tensors are larger than the file")
    return {name: t.read() if isinstance(t, pickles.TensorOnDisk) else t for name, t in found.items()}


def find_tensors(found, name, value, visited):
    """Put a tensor, or all those of a module under `name`, into `found`; ignore anything else.

    visited: grows with every call, since a module may hold one module under many names, at each of many levels."""
    visited.append(name)
    if len(visited) > MAX_NAMES or len(name) > MAX_NAME:
        raise ValueError("modules are nested too deeply")
    if isinstance(value, pickles.Attributes):
        for part, inner in vars(value).items():
            if part != "attn_mask":  # the causal mask in OpenAI's archive is not a weight
                find_tensors(found, f"{name}.{part}", inner, visited)
    elif isinstance(value, pickles.TensorOnDisk | torch.Tensor):
        found[name] = value


def find_tokenizer(folder, config):
    """The first merge table beside the file or in weights/ whose vocabulary fits -> Tokenizer, or None if there is no
    such table. Raises WeightsError for a damaged table."""
    for place in (folder, FOLDER):
        for name in TABLES:
            if not (place / name).is_file():
                continue
            try:
                tokenizer = Tokenizer.from_file(place / name, config.context_length)
            except ValueError as error:
                raise WeightsError(str(error)) from None
            if tokenizer.vocab_size == config.vocab_size:
                return tokenizer
    return None


def need_tokenizer(model, path):
    """Raises WeightsError if a model that was loaded from `path` has no tokenizer."""
    if model.tokenizer is None:
        raise WeightsError(f"{shown(path)}: no merge table that fits was found; put CLIP's {TABLE}, or the merges.txt "
                           "or tokenizer.json of a Hugging Face CLIP, beside it or into weights/ (`python -m "
                           "hivg.weights fetch table` gets CLIP's)")
