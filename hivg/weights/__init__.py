"""Weights files in and out: ours, OpenAI's CLIP, Hugging Face's CLIP, released HiVG checkpoints.

Our own file is one `.safetensors`: tensors, configuration and the merge table of the tokenizer (JSON and text in its
metadata), so it loads by itself. What a file is, is seen from what is in it, not from its name. Nothing in any file is
ever executed (utils/pickles.py), every tensor must be there in the right shape, and numbers load as float32.

    python -m hivg.weights fetch ViT-B/16   OpenAI's weights and merge table into weights/
    python -m hivg.weights convert IN OUT   any of the four as our own .safetensors
    python -m hivg.weights show FILE        what a file is
"""

import json
import os
import sys
from argparse import Namespace
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
from hivg.utils.cli import Parser, fail
from hivg.weights import download, foreign

KINDS = {
    "clip": "a CLIP", "hivg": "a HiVG model",  # ours
    "openai": "OpenAI's CLIP", "huggingface": "a CLIP of Hugging Face's", "released": "a released HiVG checkpoint",
}
FOLDER = Path(__file__).parents[2] / "weights"
TABLES = (download.TABLE, "merges.txt", "tokenizer.json")  # merge tables that are looked for beside the weights


class WeightsError(ValueError):
    """A weights file that cannot be used; the message names the file and the mend in one line."""


class File(NamedTuple):
    kind: str  # one of KINDS
    config: CLIPConfig | HiVGConfig
    tokenizer: Tokenizer | None
    tensors: dict  # our names
    info: dict  # plain data kept beside the weights


def save(path, model, info=None, dtype=None):
    """Write a CLIP or a HiVG, with its tokenizer (`model.tokenizer`), to `path`, which appears whole or not at all.

    info: plain data kept beside the weights, e.g. the accuracy. dtype: store the tensors so (they load as float32).
    """
    kind = "hivg" if isinstance(model, HiVG) else "clip"
    tensors = {k: v.detach().to("cpu", dtype or v.dtype).contiguous() for k, v in model.state_dict().items()}
    metadata = {"format": "pt", "kind": kind, "config": json.dumps(asdict(model.config)),
                "info": json.dumps(info or {}), "tokenizer": model.tokenizer.to_text() if model.tokenizer else ""}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    side = path.with_name(path.name + ".part")
    side.write_bytes(save_bytes(tensors, metadata))
    os.replace(side, path)


# ---- reading

def read(path):
    """Any weights file -> File. Raises WeightsError."""
    path = Path(path)
    if not os.path.isfile(path):  # unlike path.is_file(), False for a name that no file can have
        raise WeightsError(f"{path}: there is no such weights file; weights/README.md says where to get some")
    try:
        with open(path, "rb") as file:
            start = file.read(1024)
        if problem := not_weights(start):
            raise WeightsError(f"{path}: {problem}")
        if start[8:9] == b"{":  # the length of a header, then the header, JSON
            return _read_safetensors(path)
        return _read_foreign(path, pickles.read(path))
    except (foreign.NotThisKind, pickles.RefusedError) as error:
        raise WeightsError(f"{path}: {error}") from None
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a whole .safetensors file ({error}); copy or download it again") from None
    except WeightsError:
        raise
    except (ValueError, IndexError, RuntimeError) as error:  # the latter: tensors of other shapes than anyone's
        raise WeightsError(f"{path}: cannot be read: {error}; copy or download it again") from None


def not_weights(start):
    """What a file that begins so is, if it is plainly no weights file, with the mend; else None."""
    text = start.lstrip().lower()
    if not start:
        return "empty; copy or download it again"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights; `git lfs pull` in its folder brings them"
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        return "a web page saved under this name, not the weights; download the file itself"
    return None


def _read_safetensors(path):
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    kind = metadata.get("kind")
    if kind is None:
        return _read_foreign(path, tensors)
    if kind not in ("clip", "hivg"):
        raise WeightsError(f"{path}: a safetensors file of the kind {kind!r:.60}, which is not one of this project's; "
                           "use one that train.py wrote")
    try:
        config, info, table = json.loads(metadata["config"]), json.loads(metadata["info"]), metadata["tokenizer"]
        clip = config["clip"] if kind == "hivg" else config
        tokenizer = Tokenizer.from_text(table, clip["context_length"]) if table else None
        if tokenizer and tokenizer.vocab_size != clip["vocab_size"]:
            raise ValueError(f"a tokenizer of {tokenizer.vocab_size} for a vocabulary of {clip['vocab_size']}")
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: its metadata is damaged ({error}); copy or download it again") from None
    try:
        config = HiVGConfig.from_dict(config) if kind == "hivg" else CLIPConfig(**config)
    except (TypeError, ValueError) as error:
        raise _misconfigured(path, kind, error) from None
    return File(kind, config, tokenizer, tensors, info)


def _misconfigured(path, kind, error):
    return WeightsError(f"{path}: its configuration is not that of {KINDS[kind]} ({error}); use a file that this "
                        "version of train.py wrote")


def _read_foreign(path, data):
    """What someone else saved: a state dict, a TorchScript module, or a released checkpoint around a state dict."""
    args = data.get("args") if isinstance(data, dict) else None
    if isinstance(args, Namespace) and isinstance(data.get("model"), dict):
        kind, tensors, info = "released", tensors_of(data["model"]), {"args": plain(vars(args))}
    else:
        tensors = tensors_of(data)
        kind, info = foreign.kind_of(tensors), {}
        if kind is None:
            what = ", ".join(list(tensors)[:4]) + (" .." if len(tensors) > 4 else "")
            raise WeightsError(f"{path}: no CLIP and no HiVG: it holds " + (f"tensors called {what}" if tensors else
                               "no weights at all") + "; the README lists what can be loaded")
        if kind == "released":
            raise WeightsError(f"{path}: the weights of a released HiVG without its settings; take the whole "
                               "checkpoint, a dict with `model` and `args`")
    if kind == "released":
        config, tensors = foreign.released_hivg(tensors, args)
        clip = config.clip
    else:
        config, tensors = (foreign.openai_clip if kind == "openai" else foreign.huggingface_clip)(tensors)
        clip = config
    return File(kind, config, find_tokenizer(path.parent, clip), tensors, {"source": KINDS[kind]} | info)


def tensors_of(data):
    """{dotted name: tensor} of a state dict or of the modules of a TorchScript archive, read from the disk."""
    if isinstance(data, dict) and isinstance(data.get("state_dict"), dict):
        data = data["state_dict"]
    flat = {}

    def walk(prefix, value):
        if isinstance(value, pickles.Module):
            for name, part in vars(value).items():
                if name != "attn_mask":  # made by the program; no weight
                    walk(f"{prefix}.{name}" if prefix else name, part)
        elif isinstance(value, pickles.TensorOnDisk):
            flat[prefix] = value.read()
        elif isinstance(value, torch.Tensor):
            flat[prefix] = value

    if isinstance(data, dict):
        for name, value in data.items():
            walk(str(name), value)
    else:
        walk("", data)
    return flat


def plain(values):
    """What of a dict can be kept as JSON."""
    return {k: v for k, v in values.items() if isinstance(v, str | int | float | bool | None)}


def find_tokenizer(folder, config):
    """The tokenizer of a merge table beside the weights or in weights/, the first whose vocabulary fits; None if there
    is none. Raises ValueError for a table that is damaged."""
    for path in (place / name for place in (folder, FOLDER) for name in TABLES):
        if path.is_file():
            tokenizer = Tokenizer.from_file(path, config.context_length)
            if tokenizer.vocab_size == config.vocab_size:
                return tokenizer
    return None


def need_tokenizer(model, path):
    """Raises WeightsError if there is no tokenizer to a model that was loaded from `path`."""
    if model.tokenizer is None:
        raise WeightsError(f"{path}: no merge table to it; put CLIP's {download.TABLE}, or the merges.txt or "
                           "tokenizer.json of a Hugging Face CLIP, beside it or into weights/ (`python -m hivg.weights "
                           "fetch table`)")


# ---- loading

def load(path):
    """Any weights file -> CLIP or HiVG, in float32 and evaluation mode, with `tokenizer` (None if no merge table was
    found) and `info`. Raises WeightsError."""
    return _build(path, read(path))


def _build(path, file):
    try:
        with torch.device("meta"):  # no time spent on random numbers that are overwritten
            model = CLIP(file.config) if isinstance(file.config, CLIPConfig) else HiVG(file.config)
    except Exception as error:  # a wrong setting can fail anywhere in the model
        raise _misconfigured(path, file.kind, error) from None
    check_keys(path, KINDS[file.kind], file.tensors, model.state_dict())
    tensors = {name: own(file.tensors.pop(name)) for name in list(file.tensors)}  # one by one: half the memory
    model.load_state_dict(tensors, assign=True)
    model.tokenizer, model.info = file.tokenizer, file.info
    return model.eval()


def own(tensor):
    """The tensor as float32 with a storage of its own: not a part of a larger one, nor transposed."""
    tensor = tensor.float().contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor


def _load(path, kinds, wanted):
    file = read(path)
    if file.kind not in kinds:
        raise WeightsError(f"{path}: holds {KINDS[file.kind]}; {wanted} is needed here")
    return _build(path, file)


def load_clip(path):
    """-> CLIP from OpenAI's, Hugging Face's or our file. As `load`; raises WeightsError."""
    return _load(path, ("clip", "openai", "huggingface"), KINDS["clip"])


def load_hivg(path):
    """-> HiVG from our file, adapters apart, or from a released checkpoint, adapters folded. As `load`; raises
    WeightsError."""
    return _load(path, ("hivg", "released"), KINDS["hivg"])


def load_released(path):
    """-> HiVG from a released HiVG checkpoint, adapters folded. As `load`; raises WeightsError."""
    return _load(path, ("released",), KINDS["released"])


def check_keys(path, what, tensors, expected):
    """Raise WeightsError unless the tensors have exactly the expected names and shapes."""
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    shapes = [f"{k} {tuple(tensors[k].shape)} instead of {tuple(expected[k].shape)}"
              for k in expected.keys() & tensors.keys() if tensors[k].shape != expected[k].shape]
    lists = [f"{name}: {', '.join(sorted(rows)[:8])}{f' and {len(rows) - 8} more' if len(rows) > 8 else ''}"
             for name, rows in (("missing", missing), ("left over", extra), ("of another shape", shapes)) if rows]
    if lists:
        raise WeightsError(f"{path}: taken for {what}, it does not fit its own configuration; {'; '.join(lists)}")


# ---- the command line

def describe(path):
    """What a file is, as lines of text; it is loaded whole, so that what is said is true. Raises WeightsError."""
    file = read(path)
    names = list(file.tensors)
    model = _build(path, file)
    config = model.config if isinstance(model, HiVG) else None
    clip = config.clip if config else model.config
    rows = [("kind", KINDS[file.kind]), ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
            ("tensors", len(names)), ("tokenizer", f"{model.tokenizer.vocab_size} tokens" if model.tokenizer else
                                      "none found; see `fetch`"),
            ("picture", f"{clip.image_size} px, patches of {clip.patch_size} px"),
            ("vision tower", f"{clip.vision_layers} blocks, {clip.vision_width} wide, {clip.vision_heads} heads"),
            ("text tower", f"{clip.text_layers} blocks, {clip.text_width} wide, {clip.text_heads} heads, "
                           f"{clip.context_length} positions, {clip.vocab_size} tokens"),
            ("embedding", clip.embed_dim)]
    if config:
        rows += [("Hi LoRA", "no adapters" if config.lora == "none" else f"{config.lora}, stage {config.stage}")]
        rows += [(k, v) for k, v in asdict(config).items() if k not in ("clip", "lora", "stage")]
    rows += file.info.items()
    return "\n".join(f"{name:<18}{value}" for name, value in rows)


def main():
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="fetch | convert | show")
    for name, *args in (("fetch", "model"), ("convert", "IN", "OUT"), ("show", "FILE")):
        command = commands.add_parser(name)
        for arg in args:
            command.add_argument(arg, help=", ".join(download.FILES) if arg == "model" else None)
    args = parser.parse_args()
    try:
        if args.command == "fetch":
            for path in download.fetch(args.model, FOLDER):
                print(path)
        elif args.command == "show":
            print(describe(args.FILE))
        else:
            if not args.OUT.endswith(".safetensors"):
                raise ValueError(f"{args.OUT}: our files are .safetensors; give OUT that suffix")
            model = load(args.IN)
            save(args.OUT, model, model.info)
            print(args.OUT)
            if model.tokenizer is None:
                print(f"no {download.TABLE} was found beside {args.IN} or in weights/, so the new file has no tokenizer",
                      file=sys.stderr)
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on where it was", code=130)
    except (ValueError, OSError) as error:
        fail(error)

