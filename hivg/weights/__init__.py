"""Weights files in and out: ours, OpenAI's CLIP, Hugging Face's CLIP, released HiVG checkpoints.

Our own file is one `.safetensors` with the tensors and, in its metadata, the configuration (JSON) and the tokenizer's
merge table (text), so it loads by itself. The kind of a file is recognised by its content, not by its name. Nothing in
any file is ever executed (utils/pickles.py), every tensor must be there in the right shape, and numbers load as
float32. `clip_names.py` and `released.py` translate the other programs' names; the command line is in `__main__.py`.
"""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_bytes

from hivg.clip import CLIP, CLIPConfig
from hivg.model import HiVG, HiVGConfig
from hivg.tokenizer import Tokenizer
from hivg.utils import pickles
from hivg.utils.files import write_whole
from hivg.utils.messages import quoted, shown
from hivg.weights.check_config import check_config, check_types
from hivg.weights.clip_names import NotThisKind, huggingface_clip, kind_of, openai_clip
from hivg.weights.download import TABLE
from hivg.weights.released import looks_released, released_hivg

KINDS = {
    "clip": "a CLIP",  # ours
    "hivg": "a HiVG model",  # ours
    "openai": "OpenAI's CLIP",
    "huggingface": "a CLIP of Hugging Face's",
    "released": "a released HiVG checkpoint",
}
INSTALLED = Path(__file__).parents[1] / "bundled"  # where an installed package has the bundled files (pyproject.toml)
REPOSITORY = Path(__file__).parents[2] / "weights"
# where downloads go and merge tables are looked for: weights/ of the repository, installed of the current folder
FOLDER = Path("weights") if INSTALLED.is_dir() else REPOSITORY
MAX_NAMES = 100_000  # parts of a TorchScript archive that are looked at; OpenAI's have some 500
MAX_NAME = 300  # characters of a tensor's name
TABLES = (TABLE, "merges.txt", "tokenizer.json")  # merge tables that are looked for beside the weights


class WeightsError(ValueError):
    """A weights file that cannot be used; the message says in one line which file, what is wrong and what to do."""


class File(NamedTuple):
    """A weights file as `read` gives it."""

    kind: str  # one of KINDS
    config: CLIPConfig | HiVGConfig
    tokenizer: Tokenizer | None
    tensors: dict  # {our name: tensor}
    info: dict  # plain data kept beside the weights


def bundled(name):
    """The path of a file that comes with the program: hivg-tiny.safetensors, clip-tiny.safetensors, example.png."""
    return (INSTALLED if INSTALLED.is_dir() else REPOSITORY) / name


# ---- writing

def save(path, model, info=None, dtype=None):
    """Write a CLIP or a HiVG, with its tokenizer (`model.tokenizer`), to `path`. The file appears whole or not at all.

    info: plain data kept beside the weights, e.g. the accuracy. dtype: the type to store the tensors in (they load as
    float32); by default the model's own. Raises OSError, one line with the file, if it cannot be written.
    """
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensors[name] = tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
    metadata = {
        "format": "pt",
        "kind": "hivg" if isinstance(model, HiVG) else "clip",
        "config": json.dumps(asdict(model.config)),
        "info": json.dumps(info or {}),
        "tokenizer": model.tokenizer.to_text() if model.tokenizer else "",
    }
    data = save_bytes(tensors, metadata)
    write_whole(Path(path), lambda part: part.write_bytes(data))


# ---- reading

def read(path):
    """Any weights file -> File. Raises WeightsError."""
    path = Path(path)
    if os.path.isdir(path):
        raise WeightsError(f"{shown(path)}: is a folder; name a weights file in it")
    if not os.path.isfile(path):  # unlike path.is_file(), False for a name that no file can have
        raise WeightsError(f"{shown(path)}: there is no such weights file; {shown(bundled('README.md'), 80)} says "
                           "where to get some")
    try:
        file = _read_any(path)
        try:
            check_config(file.config, len(file.tensors))
        except ValueError as error:
            raise _misconfigured(path, file.kind, error) from None
        return file
    except WeightsError:
        raise
    except (NotThisKind, pickles.RefusedError) as error:
        raise WeightsError(f"{shown(path)}: {error}") from None
    except OSError as error:
        raise WeightsError(f"{shown(path)}: cannot be read ({error.strerror or shown(error)})") from None
    except SafetensorError as error:
        raise WeightsError(f"{shown(path)}: not a whole .safetensors file ({shown(error)}); copy or download it again"
                           ) from None
    except (ValueError, IndexError, RuntimeError, ArithmeticError) as error:  # most: shapes that nobody has
        raise WeightsError(f"{shown(path)}: cannot be read: {shown(error, 150)}; copy or download it again") from None


def _read_any(path):
    """A file that is there, of any kind -> File. Raises one of the errors that `read` knows."""
    with open(path, "rb") as file:
        start = file.read(1024)
    if problem := not_weights(start):
        raise WeightsError(f"{shown(path)}: {problem}")
    if start[8:9] == b"{":  # a safetensors file: 8 bytes of length, then a header in JSON
        return _read_safetensors(path)
    return _read_foreign(path, pickles.read(path))


def not_weights(start):
    """The first bytes of a file -> a message if they are plainly not those of weights, else None."""
    text = start.lstrip().lower()
    if not start:
        return "the file is empty; copy or download it again"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        return "a web page saved under this name, not the weights; download the file itself"
    return None


def _read_safetensors(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    kind = metadata.get("kind")
    if kind is None:
        return _read_foreign(path, tensors)
    if kind not in ("clip", "hivg"):
        raise WeightsError(f"{shown(path)}: a safetensors file of the kind {quoted(kind)}, which is not one of this "
                           "project's; use one that train.py wrote")
    try:
        config = json_dict(metadata["config"])
        info = json_dict(metadata["info"])
        tokenizer = _tokenizer_of(metadata["tokenizer"], config["clip"] if kind == "hivg" else config)
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"no {shown(error)} in it" if isinstance(error, KeyError) else shown(error)
        raise WeightsError(f"{shown(path)}: its metadata is damaged ({reason}); copy or download it again") from None
    try:
        check_types(HiVGConfig if kind == "hivg" else CLIPConfig, config)
        config = HiVGConfig.from_dict(config) if kind == "hivg" else CLIPConfig(**config)
    except (TypeError, ValueError) as error:
        raise _misconfigured(path, kind, error) from None
    return File(kind, config, tokenizer, tensors, info)


def json_dict(text):
    """Raises ValueError if the text is not a JSON object."""
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{quoted(text, 40)} is not a JSON object")
    return value


def _tokenizer_of(table, clip):
    """The tokenizer of a merge table's text, None for an empty one; clip: the CLIP's configuration as a dict."""
    if not table:
        return None
    tokenizer = Tokenizer.from_text(table, clip["context_length"])
    if tokenizer.vocab_size != clip["vocab_size"]:
        raise ValueError(f"a tokenizer of {tokenizer.vocab_size} tokens for a vocabulary of {clip['vocab_size']}")
    return tokenizer


def _misconfigured(path, kind, error):
    source = "that this version of train.py wrote" if kind in ("clip", "hivg") else "as it was published"
    return WeightsError(f"{shown(path)}: its configuration is not that of {KINDS[kind]} ({shown(error)}); use a file "
                        f"{source}")


def _read_foreign(path, data):
    """Another program's file, already read: a state dict, a TorchScript module, or a released checkpoint."""
    args = data.get("args") if isinstance(data, dict) else None
    most = 4 * os.path.getsize(path)  # bytes of all tensors; a file may name one many times
    if isinstance(args, pickles.Namespace) and isinstance(data.get("model"), dict):
        config, tensors = released_hivg(tensors_of(data["model"], most), args)
        info = {"source": KINDS["released"], "args": plain(vars(args))}
        return File("released", config, find_tokenizer(path.parent, config.clip), tensors, info)

    tensors = tensors_of(data, most)
    if looks_released(tensors):
        raise WeightsError(f"{shown(path)}: the weights of a released HiVG without its settings; use the whole "
                           "checkpoint, a dict with `model` and `args`")
    kind = kind_of(tensors)
    if kind == "openai":
        config, tensors = openai_clip(tensors)
    elif kind == "huggingface":
        config, tensors = huggingface_clip(tensors)
    else:
        raise WeightsError(f"{shown(path)}: neither a CLIP nor a HiVG: it holds {_some_names(tensors)}; the README "
                           "lists the files that can be loaded")
    return File(kind, config, find_tokenizer(path.parent, config), tensors, {"source": KINDS[kind]})


def _some_names(tensors):
    if not tensors:
        return "no weights at all"
    more = " .." if len(tensors) > 2 else ""
    return "tensors called " + ", ".join(shown(name, 40) for name in list(tensors)[:2]) + more


def tensors_of(data, most):
    """The tensors of a state dict or of the modules of a TorchScript archive, read from the disk -> {dotted name:
    tensor}. most: bytes of all. Raises ValueError."""
    if isinstance(data, pickles.Module):
        data = vars(data)
    elif isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    found = {}
    if isinstance(data, dict):
        looked_at = []
        for name, value in data.items():
            _find_tensors(found, shown(name, MAX_NAME), value, looked_at)
    if sum(tensor.nbytes for tensor in found.values()) > most:
        raise ValueError("its tensors are larger than the file")
    return {name: t.read() if isinstance(t, pickles.TensorOnDisk) else t for name, t in found.items()}


def _find_tensors(found, name, value, looked_at):
    """Put a tensor, or all those of a module under `name`, into `found`; ignore anything else.

    looked_at: grows with every call. A module may hold one module under many names, at each of many levels."""
    looked_at.append(name)
    if len(looked_at) > MAX_NAMES or len(name) > MAX_NAME:
        raise ValueError("modules nested beyond all measure")
    if isinstance(value, pickles.Module):
        for part, inner in vars(value).items():
            if part != "attn_mask":  # the causal mask of OpenAI's archive is no weight
                _find_tensors(found, f"{name}.{part}", inner, looked_at)
    elif isinstance(value, pickles.TensorOnDisk | torch.Tensor):
        found[name] = value


def plain(values):
    """The entries of a dict that JSON can hold."""
    return {name: value for name, value in values.items() if isinstance(value, str | int | float | bool | None)}


# ---- the tokenizer of other programs' files

def find_tokenizer(folder, config):
    """The first merge table beside the weights or in weights/ whose vocabulary fits -> Tokenizer, or None if there is
    no such table. Raises WeightsError for a table that is damaged."""
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
    """Raises WeightsError if there is no tokenizer to a model that was loaded from `path`."""
    if model.tokenizer is None:
        raise WeightsError(f"{shown(path)}: no merge table that fits was found; put CLIP's {TABLE}, or the merges.txt "
                           "or tokenizer.json of a Hugging Face CLIP, beside it or into weights/ (`python -m "
                           "hivg.weights fetch table` gets CLIP's)")


# ---- loading

def load(path):
    """Any weights file -> CLIP or HiVG in float32 and evaluation mode, with `tokenizer` (None if no merge table was
    found) and `info`. Raises WeightsError."""
    return build(path, read(path))


def load_clip(path):
    """-> CLIP from OpenAI's, Hugging Face's or our file. As `load`; raises WeightsError."""
    return _load_kind(path, ("clip", "openai", "huggingface"), KINDS["clip"])


def load_hivg(path):
    """-> HiVG from our file, its adapters apart, or from a released checkpoint, its adapters folded. As `load`; raises
    WeightsError."""
    return _load_kind(path, ("hivg", "released"), KINDS["hivg"])


def load_released(path):
    """-> HiVG from a released HiVG checkpoint, its adapters folded. As `load`; raises WeightsError."""
    return _load_kind(path, ("released",), KINDS["released"])


def _load_kind(path, kinds, wanted):
    file = read(path)
    if file.kind not in kinds:
        raise WeightsError(f"{shown(path)}: holds {KINDS[file.kind]}; {wanted} is needed here")
    return build(path, file)


def build(path, file):
    """The model of a File, which loses its tensors to it; path: for messages. Raises WeightsError."""
    try:
        with torch.device("meta"):  # no time spent on random numbers that are overwritten
            model = CLIP(file.config) if isinstance(file.config, CLIPConfig) else HiVG(file.config)
    except Exception as error:  # a wrong setting can fail anywhere in the model
        raise _misconfigured(path, file.kind, error) from None
    check_keys(path, KINDS[file.kind], file.tensors, model.state_dict())
    tensors = {}
    for name in list(file.tensors):
        tensor = file.tensors.pop(name)  # one by one, which takes half the memory
        if tensor.is_complex():
            raise WeightsError(f"{shown(path)}: its tensor {shown(name, 70)} holds complex numbers; use the file as it "
                               "was published")
        tensors[name] = own(tensor)
        if not is_finite(tensors[name]):
            raise WeightsError(f"{shown(path)}: its tensor {shown(name, 70)} holds NaN or infinite numbers, so the "
                               "weights are damaged; use an earlier file, or copy or download it again")
    model.load_state_dict(tensors, assign=True)
    model.tokenizer = file.tokenizer
    model.info = file.info
    return model.eval()


def own(tensor):
    """The tensor as float32 in a storage of its own: not part of a larger one, not transposed."""
    tensor = tensor.float().contiguous()
    is_part = tensor.untyped_storage().nbytes() > tensor.nbytes
    return tensor.clone() if is_part else tensor


def is_finite(tensor):
    """Whether no number of a tensor is NaN or infinite, told by its smallest and largest, which takes a tenth of the
    time of `isfinite` on each: NaN among the numbers makes both NaN."""
    return tensor.numel() == 0 or all(math.isfinite(number) for number in torch.stack(tensor.aminmax()).tolist())


def check_keys(path, called, tensors, expected):
    """Raises WeightsError unless the tensors have exactly the expected names and shapes. called: the kind, in words."""
    shapes = []
    for name in expected.keys() & tensors.keys():
        found = tuple(tensors[name].shape)
        wanted = tuple(expected[name].shape)
        if found != wanted:
            shapes.append(f"{name} {found} instead of {wanted}")
    differences = [
        ("missing", expected.keys() - tensors.keys()),
        ("left over", tensors.keys() - expected.keys()),
        ("of another shape", shapes),
    ]
    differences = [(title, sorted(names)) for title, names in differences if names][:2]
    lists = []
    for title, names in differences:
        few = names[: 3 - len(differences)]
        more = f" and {len(names) - len(few)} more" if len(names) > len(few) else ""
        lists.append(f"{title}: {', '.join(shown(name, 70) for name in few)}{more}")
    if lists:
        raise WeightsError(f"{shown(path, 80)}: not {called} as its settings say; {'; '.join(lists)}; use the file as "
                           "it was published")
