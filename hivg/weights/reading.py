"""Any weights file -> `File`: its kind, configuration and tokenizer, and its tensors under our names."""

import json
import os
import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from hivg.clip import CLIPConfig
from hivg.model import HiVGConfig
from hivg.tokenizer import Tokenizer
from hivg.utils import pickles
from hivg.utils.memory import enough_memory, is_out_of_memory
from hivg.utils.messages import quoted, shown
from hivg.weights.check_config import check_config, check_types
from hivg.weights.clip_names import HEAD_WIDTH, NotThisKind, huggingface_clip, openai_clip
from hivg.weights.download import HASHES, TABLE, file_of, spelled
from hivg.weights.released import released_hivg
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
WRAPPERS = ("model", "state_dict", "model_state_dict")  # what training programs call the weights in a checkpoint
PREFIXES = ("module._orig_mod.", "_orig_mod.module.", "module.", "_orig_mod.")  # of a model in DDP, compiled, or both
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


def located(path):
    """The Path of a weights file. weights/NAME, as settings and pages call a file, is found from any folder: if it is
    not below the current one, it is the one beside the program."""
    path = Path(path)
    is_bundled = path.parent == Path("weights") and not os.path.exists(path) and os.path.isfile(bundled(path.name))
    return bundled(path.name) if is_bundled else path


def read(path):
    """Any weights file -> File; see `located`. Raises WeightsError, and MemoryError, one line too, where memory runs
    out."""
    if not isinstance(path, str | os.PathLike):
        raise WeightsError(f"{quoted(path)} is not the path of a weights file; give a string or a Path")
    path = located(path)
    try:
        if not os.path.isfile(path):  # unlike path.is_file(), False for a name that no file can have
            known = spelled(path.name if path.suffix == ".pt" else path.as_posix())
            advice = (f"`python -m hivg.weights fetch {known}` gets it, as weights/{file_of(known)}" if known in HASHES
                      else f"{shown(bundled('README.md'), 80)} says where to get some")
            raise NotThisKind("is a folder; name a weights file in it" if os.path.isdir(path) else
                              f"no such weights file; {advice}")
        with torch.device("cpu"), enough_memory(f"{shown(path)}: ", "close other programs, or use a smaller model"):
            file = read_any(path)  # on the CPU, whatever the caller's default is
            with valid_settings(path, file.kind):
                check_config(file.config, len(file.tensors))
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


@contextmanager
def valid_settings(path, kind):
    """Turn what a wrong setting raises, which can be nearly anything, into a WeightsError."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = f"no {shown(error)} in it" if isinstance(error, KeyError) else shown(error)
        source = "that this version of train.py wrote" if kind in ("clip", "hivg") else "as it was published"
        raise WeightsError(f"{shown(path)}: its settings are not valid for {KINDS[kind]} ({reason}); use a file "
                           f"{source}") from None


def read_any(path):
    """Raises one of the errors that `read` knows."""
    with open(path, "rb") as file:
        start = file.read(1024)
    text = start.lstrip().lower()
    if not start:
        raise NotThisKind("the file is empty; copy or download it again")
    if text.startswith(b"version https://git-lfs"):
        raise NotThisKind("a Git LFS pointer, not the weights; run `git lfs pull` in its folder")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        raise NotThisKind("a web page saved under this name, not the weights; download the file itself")
    if start[8:9] != b"{":  # a .safetensors file begins with 8 bytes of length and a JSON header
        return read_foreign(path, pickles.read(path))
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if "kind" in metadata:
        return read_ours(path, metadata, without_prefix(tensors))
    return read_foreign(path, tensors)


def read_ours(path, metadata, tensors):
    kind = metadata["kind"]
    if kind not in ("clip", "hivg"):
        raise NotThisKind(f"a .safetensors file of kind {quoted(kind)}, which this project does not write; use one "
                          "that train.py wrote")
    with valid_settings(path, kind):
        config = json.loads(metadata["config"])
        info = json.loads(metadata["info"])
        if not isinstance(config, dict) or not isinstance(info, dict):
            raise ValueError("its metadata are not JSON objects")
        check_types(HiVGConfig if kind == "hivg" else CLIPConfig, config)
        config = HiVGConfig.from_dict(config) if kind == "hivg" else CLIPConfig(**config)
        clip = config.clip if kind == "hivg" else config
        table = metadata["tokenizer"]
        tokenizer = Tokenizer.from_text(table, clip.context_length) if table else None
        if tokenizer and tokenizer.vocab_size != clip.vocab_size:
            raise ValueError(f"a tokenizer of {tokenizer.vocab_size} tokens for a vocabulary of {clip.vocab_size}")
    return File(kind, config, tokenizer or find_tokenizer(path.parent, clip), tensors, info)


# ---- other programs' files

def read_foreign(path, data):
    """data: what is in the file: a state dict, alone or in a checkpoint, or a TorchScript module."""
    if isinstance(data, dict) and {"trained", "frozen", "optimizers"} <= data.keys():
        raise NotThisKind("the state of a run, for train.py --resume; give one of the .safetensors files beside it")
    most = 4 * os.path.getsize(path)  # bytes of all tensors; a file may name one many times
    tensors = without_prefix(tensors_of(state_dict_of(data), most))
    kind = kind_of(tensors, data)
    info = {"source": KINDS[kind]}
    if kind == "released":
        args = data.get("args") if isinstance(data, dict) else None
        if not isinstance(args, pickles.Attributes):
            raise NotThisKind("a released HiVG's state dict without its settings; use the whole checkpoint, a dict "
                              "with `model` and `args`")
        config, tensors = released_hivg(tensors, args)
        info["args"] = {name: value for name, value in vars(args).items()  # what JSON can hold
                        if isinstance(name, str) and isinstance(value, str | int | float | bool | None)}
        clip = config.clip
    else:
        if kind == "openai":
            config, tensors = openai_clip(tensors)
        else:
            settings = settings_beside(path)
            config, tensors = huggingface_clip(tensors, settings)
            if not {"vision_config", "text_config"} & settings.keys():
                info["heads"] = f"taken to be {HEAD_WIDTH} wide; its config.json, beside it, would say"
        clip = config
    return File(kind, config, find_tokenizer(path.parent, clip), tensors, info)


def settings_beside(path):
    """The config.json that Hugging Face publishes beside a file -> dict; {} if there is none. Raises NotThisKind."""
    beside = path.with_name("config.json")
    if not beside.is_file():
        return {}
    try:
        settings = json.loads(beside.read_bytes())
    except (ValueError, RecursionError):
        raise NotThisKind("the config.json beside it is no JSON; use the one that was published with it") from None
    return settings if isinstance(settings, dict) else {}


def state_dict_of(data):
    """The state dict in what a file holds: what is under one of the WRAPPERS, or all. Raises NotThisKind if several
    have one."""
    if not isinstance(data, dict):
        return vars(data) if isinstance(data, pickles.Attributes) else {}
    wrapped = {name: data[name] for name in WRAPPERS if isinstance(data.get(name), dict)}
    wrapped = {name: inner for name, inner in wrapped.items() if any(map(is_tensor, inner.values()))}
    if len(wrapped) > 1:
        raise NotThisKind(f"holds weights under {' and under '.join(wrapped)}; save one of them alone, as a state dict")
    return next(iter(wrapped.values()), data)


def is_tensor(value):
    return isinstance(value, pickles.TensorOnDisk | torch.Tensor)


def without_prefix(tensors):
    """Tensors whose names all begin with one of PREFIXES, without it; others as they are."""
    prefix = next((prefix for prefix in PREFIXES if all(name.startswith(prefix) for name in tensors)), "")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def kind_of(tensors, data):
    """Whose model the names look like: "openai", "huggingface" or "released". data: all that is in the file. Raises
    NotThisKind if they are no ViT's."""
    def has(pattern):
        return any(re.match(pattern, name) for name in tensors)

    if has(r"clip\..*vision_model\."):
        return "released"
    if has(r"(clip\.)?text\.blocks\."):
        raise NotThisKind("a state dict of this project's own model, without its settings; write the model with "
                          "hivg.weights.save(path, model)")
    if has(r"visual\.layer1\."):
        raise NotThisKind("a CLIP with a ResNet (RN50, RN101, RN50x4, ..); HiVG needs a ViT: use ViT-B/32, "
                          "ViT-B/16, ViT-L/14 or ViT-L/14@336px")
    if has(r"visual\.(conv1|transformer)\."):
        return "openai"
    if has(r"vision_model\.(embeddings|encoder)\."):
        return "huggingface"
    raise NotThisKind(f"neither a CLIP nor a HiVG: {what_is_in(data, tensors)}; the README lists the files that can be "
                      "loaded")


def what_is_in(data, tensors):
    """In words: where most of the tensors of a file are, or what those that were looked at are called."""
    counts = Counter()  # {dotted name of a part: tensors in it}
    to_visit = [("", {"": data})]
    for place, part in to_visit:  # grows
        part = vars(part) if isinstance(part, pickles.Attributes) else part
        for name, value in part.items() if isinstance(part, dict) else enumerate(part):
            if is_tensor(value) or isinstance(value, pickles.Array):
                counts[place] += 1
            elif isinstance(value, dict | list | tuple | pickles.Attributes) and len(to_visit) < MAX_NAMES:
                to_visit.append((shown(f"{place}.{name}".strip("."), MAX_NAME), value))
    place = max(counts, key=counts.get, default="")
    if tensors and (isinstance(data, pickles.Attributes) or place in ("", *WRAPPERS)):
        names = [shown(name, 40) for name in tensors][:2]
        return f"it holds tensors called {', '.join(names)}{' ..' * (len(tensors) > 2)}"
    if place:
        return f"its weights are under {shown(place, 80)}; save that part alone, as a state dict of tensors"
    return "its weights are no state dict, {name: tensor}" if counts else "it holds no weights at all"


def tensors_of(tensors, most):
    """The tensors of a state dict, or of the modules of a TorchScript archive, read from the disk -> {dotted name:
    tensor}; anything else is ignored. most: bytes in total. Raises ValueError."""
    found = {}
    to_visit = [(shown(name, MAX_NAME), value) for name, value in tensors.items()]
    for name, value in to_visit:  # grows: a module may hold one module under many names, at each of many levels
        if isinstance(value, pickles.Attributes):
            for part, inner in vars(value).items():
                if len(to_visit) >= MAX_NAMES or len(name) > MAX_NAME:
                    raise ValueError("modules are nested too deeply")
                if part != "attn_mask":  # the causal mask in OpenAI's archive is not a weight
                    to_visit.append((f"{name}.{shown(part, MAX_NAME)}", inner))
        elif is_tensor(value):
            found[name] = value
    if sum(tensor.nbytes for tensor in found.values()) > most:
        raise ValueError("its tensors are larger than the file")
    return {name: t.read() if isinstance(t, pickles.TensorOnDisk) else t for name, t in found.items()}


def find_tokenizer(folder, config):
    """The first merge table beside the file or in weights/ whose vocabulary fits -> Tokenizer, or None if there is no
    such table. Raises WeightsError if one is damaged, or of another kind, and no other fits."""
    problem = None
    for place in (folder, FOLDER):
        for name in TABLES:
            if (place / name).is_file():
                try:
                    tokenizer = Tokenizer.from_file(place / name, config.context_length)
                except ValueError as error:
                    problem = problem or WeightsError(str(error))
                    continue
                if tokenizer.vocab_size == config.vocab_size:
                    return tokenizer
    if problem:
        raise problem
    return None


def need_tokenizer(model, path):
    """Raises WeightsError if a model that was loaded from `path` has no tokenizer."""
    if model.tokenizer is None:
        raise WeightsError(f"{shown(path)}: no merge table that fits was found; put CLIP's {TABLE}, or the merges.txt "
                           "or tokenizer.json of a Hugging Face CLIP, beside it or into weights/ (`python -m "
                           "hivg.weights fetch table` gets CLIP's)")
