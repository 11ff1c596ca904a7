"""Files that cannot be used: each gets one line that names it, and nothing in it is ever run."""

import argparse
import os
import pickle
import re
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import make_clip, make_hivg
from makers_weights import (
    WRITERS,
    Payload,
    make_published_clip,
    make_released,
    message_of,
    save_bare,
    save_legacy,
    scripted,
    to_huggingface,
    to_openai,
    to_released,
)
from PIL import Image
from safetensors.torch import save_file

from hivg import weights
from hivg.utils import pickles
from hivg.weights.reading import tensors_of as tensors_in


@pytest.fixture(scope="module")
def released():
    """A released checkpoint; do not change it."""
    return to_released(make_released())


# --- nothing is run ---


def save_zip(data, path):
    """As PyTorch writes around a pickle of `data`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(data))
        archive.writestr("archive/version", b"3\n")


def save_like_torchscript(data, path):
    save_zip(data, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/constants.pkl", pickle.dumps(()))
        archive.writestr("archive/code/__torch__.py", b"class Part(Module):\n  pass\n")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("save", [torch.save, save_legacy, save_bare, partial(save_bare, protocol=2), save_zip,
                                  save_like_torchscript])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a checkpoint"])
def test_a_command_is_refused_and_not_run(tmp_path, suffix, save, inside):
    path = tmp_path / f"file{suffix}"
    touched = tmp_path / "touched"
    data = Payload(touched)
    if inside:
        data = {"model": {"w": data}, "args": argparse.Namespace(x=data)}
    save(data, path)
    assert re.search(r"(posix|nt|os)\.system", message_of(path))
    assert not touched.exists()
    os.system(f"touch {touched}")
    assert touched.exists()  # as it would have been


@pytest.mark.parametrize("module, name", [
    ("builtins", "eval"), ("builtins", "getattr"), ("torch", "load"), ("torch.storage", "_load_from_bytes"),
    ("numpy", "fromfile"), ("hivg.weights", "save"), ("hivg.utils.pickles", "read"), ("collections", "namedtuple"),
    ("torch.jit._pickle", "build_boollist.__globals__"),
])
def test_only_listed_names_can_be_called(tmp_path, module, name):
    data = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X\x01\x00\x00\x001\x85R."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", data)
    assert f"{module}.{name}" in message_of(tmp_path / "x.pt")


# --- files of something else ---


def save_text(text):
    return lambda path: path.write_text(text)


def save_other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")


def save_data(data):
    return lambda path: torch.save(data, path)


OTHER_FILES = {  # name: (writer, part of the message)
    "missing": (lambda path: None, "no such weights file"), "a folder": (Path.mkdir, "is a folder"),
    "empty": (Path.touch, "empty"),
    "web page": (save_text("\n<!DOCTYPE html><html>404</html>"), "web page"),
    "LFS": (save_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"), "git lfs pull"),
    "text": (save_text("hello there"), "not a file that PyTorch saved"),
    "an image": (lambda path: Image.new("RGB", (3, 3)).save(path, "PNG"), "not a file that PyTorch saved"),
    "another zip": (save_other_zip, "not of PyTorch"),
    "a list": (save_data([torch.zeros(3)]), "its weights are no state dict"),
    "a tensor": (save_data(torch.zeros(3)), "its weights are no state dict"),
    "arrays": (save_data({"conv.weight": np.zeros(3)}), "its weights are no state dict"),
    "another wrapper": (save_data({"loss": torch.ones(1), "optimizer": {"state": [{"w": torch.ones(1)}]},
                                   "ema": {"visual.conv1.weight": torch.ones(1), "b": torch.ones(1)}}),
                        "its weights are under ema; save that part alone"),
    "two wrappers": (save_data({"model": {"a": torch.ones(1)}, "state_dict": {"a": torch.ones(1)}}),
                     "weights under model and under state_dict; save one of them alone"),
    "a wrapper in a wrapper": (save_data([{"model": {"net": {"a": torch.ones(1)}}}]), "under 0.model.net; save"),
    "a number": (save_data(3), "no weights at all"),
    "safetensors": (lambda path: save_file({"weight": torch.zeros(3)}, path), "neither a CLIP nor a HiVG"),
    "other weights": (save_data({"conv.weight": torch.zeros(3)}), "tensors called conv.weight"),
    "other wrapped weights": (save_data({"model": {"conv.weight": torch.zeros(3)}}), "tensors called conv.weight"),
    "an archive of another model": (lambda path: torch.jit.save(scripted({"a.b.weight": torch.zeros(3)}), path),
                                    "tensors called a.b.weight"),
    "our CLIP without its settings": (save_data(make_clip().state_dict()), "hivg.weights.save(path, model)"),
    "our HiVG without its settings": (save_data({"model": make_hivg().state_dict()}), "hivg.weights.save(path, model)"),
    "the state of a run": (save_data({"trained": {"a": torch.ones(1)}, "frozen": {}, "optimizers": []}),
                           "for train.py --resume; give one of the .safetensors files"),
    "a ResNet CLIP": (save_data({"visual.conv1.weight": torch.zeros(2, 3, 3, 3),
                                 "visual.layer1.0.conv1.weight": torch.zeros(1)}), "ResNet"),
    "a number for a matrix": (save_data({"visual.conv1.weight": torch.zeros(64, 3, 8, 8),
                                         "visual.transformer.resblocks.0.attn.in_proj_weight": torch.tensor(3.0)}),
                              "positional_embedding, which is not in it"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_each_wrong_file_has_its_line(tmp_path, name):
    save, expected = OTHER_FILES[name]
    save(tmp_path / "file.pt")
    assert expected in message_of(tmp_path / "file.pt")


def test_a_name_too_long_for_any_file_has_its_line(tmp_path):
    message_of(tmp_path / ("x" * 300))


@pytest.mark.parametrize("args, expected", [
    (dict(model="RN50"), "model='RN50'"), (dict(imsize=65), "imsize=65"),
    (dict(imsize="64"), "imsize='64'; a released HiVG has a whole number there"), (dict(imsize=True), "imsize=True"),
    (dict(dataset="unc+"), "text layers"),  # which reads two, and the file has one
    (dict(enable_adaptive_weights=False), "adaptive weights off"),  # towers of different width
    (dict(model="ViT-L/14"), "12 vision"),
], ids=str)
def test_args_that_do_not_fit(tmp_path, released, args, expected):
    args = argparse.Namespace(**(vars(released["args"]) | args))
    torch.save({"model": released["model"], "args": args}, tmp_path / "file.pt")
    assert expected in message_of(tmp_path / "file.pt")


def test_released_without_args(tmp_path, released):
    torch.save(released["model"], tmp_path / "file.pt")
    assert "settings" in message_of(tmp_path / "file.pt")


# --- damaged files ---


WHOLE = {kind: WRITERS[kind] for kind in ("openai archive", "openai state dict", "huggingface legacy")}
WHOLE["ours"] = lambda clip, path: weights.save(path, clip)


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.98, 0.9999])
def test_a_file_cut_short(tmp_path, kind, keep):
    path = tmp_path / "file.pt"
    WHOLE[kind](make_published_clip(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    assert "download it again" in message_of(path)


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "file.pt"
    torch.save(to_openai(make_published_clip()), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert "download it again" in message_of(path)


def test_tensors_stay_inside_their_storage(tmp_path):
    """A pickle may say that a tensor is larger than its storage in the file."""
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(4.0)}, path)
    tensor = pickles.read(path)["w"]
    assert torch.equal(tensor.read(), torch.arange(4.0))
    for changes in (dict(shape=(5,)), dict(offset=1), dict(shape=(2, 2), stride=(3, 1))):
        with pytest.raises(ValueError, match="too short"):
            tensor._replace(**changes).read()


def test_older_torch_save_without_a_storage(tmp_path):
    save_legacy({"w": torch.zeros(4)}, tmp_path / "x.pt")
    key = pickles.read(tmp_path / "x.pt")["w"].key
    data = (tmp_path / "x.pt").read_bytes()
    keys = pickle.dumps([key], 2)
    assert data.count(keys) == 1
    (tmp_path / "x.pt").write_bytes(data.replace(keys, pickle.dumps([], 2)))
    with pytest.raises(ValueError, match="numbers of its tensor .* are not in it"):
        pickles.read(tmp_path / "x.pt")["w"].read()


def test_shared_modules_are_not_visited_without_end():
    """Beside more entries than may be visited, too: a module that holds one module twice, 40 levels deep."""
    module = pickles.Attributes()
    for _ in range(40):
        outer = pickles.Attributes()
        outer.__setstate__({"a": module, "b": module})
        module = outer
    for others in (0, 100_001):
        with pytest.raises(ValueError, match="nested too deeply"):
            tensors_in({str(i): i for i in range(others)} | {"module": module}, 10)


@pytest.mark.parametrize("part", ["data.pkl", "data/0"])
def test_nothing_compressed_is_unpacked(tmp_path, part):
    """PyTorch stores, so a compressed entry may be a bomb."""
    torch.save({"w": torch.rand(10**5)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as source, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name), zipfile.ZIP_DEFLATED if name.endswith(part) else None)
    assert f"{part} is compressed" in message_of(tmp_path / "bomb.pt")


# --- names and shapes must be exact ---


def tensors_of(kind, released):
    if kind == "openai":
        return to_openai(make_published_clip())
    if kind == "huggingface":
        return to_huggingface(make_published_clip())
    return dict(released["model"])


@pytest.mark.parametrize("kind, name, ours", [
    ("openai", "visual.ln_post.bias", "visual.ln_post.bias"),
    ("openai", "transformer.resblocks.1.attn.in_proj_bias", "text.blocks.1.attn.k_proj.bias"),
    ("huggingface", "vision_model.post_layernorm.bias", "visual.ln_post.bias"),
    ("released", "bbox_embed.layers.1.bias", "box_head.2.bias"),
    ("released", "clip.base_model.model.vision_model.encoder.layers.3.cross_norm.bias", "bridges.3.ln.bias"),
])
def test_keys_and_shapes_must_be_exact(tmp_path, released, kind, name, ours):
    good = tensors_of(kind, released)
    missing = {other: tensor for other, tensor in good.items() if other != name}
    left_over = good | {"extra": torch.zeros(2)}
    reshaped = good | {name: torch.zeros(6)}
    ours = re.escape(ours)
    for tensors, expected in (
        (missing, rf"missing: .*{ours}"),
        (left_over, "left over: extra"),
        (reshaped, rf"of another shape: .*{ours} \("),
    ):
        data = {"model": tensors, "args": released["args"]} if kind == "released" else tensors
        torch.save(data, tmp_path / "file")
        message = message_of(tmp_path / "file")
        assert weights.KINDS[kind] in message and re.search(expected, message), message


@pytest.mark.parametrize("kind, ending, other", [
    ("huggingface", "vision_model.pre_layrnorm.bias", "vision_model.pre_layernorm.bias"),
    ("huggingface", "vision_model.post_layernorm.bias", "vision_model.embeddings.ln_post.bias"),
    ("released", "layers.3.cross_norm.bias", "layers.3.cross_ln.bias"),
    ("released", "clip.base_model.model.vision_model.encoder.layers.3.cross_norm.bias",
     "vision_model.encoder.layers.3.cross_norm.bias"),
    ("released", "visu_token_mlp.fc1.bias", "visu_token_mlp.c_fc.bias"),
])
def test_names_that_no_published_file_has(tmp_path, released, kind, ending, other):
    tensors = tensors_of(kind, released)
    (name,) = [name for name in tensors if name.endswith(ending)]
    tensors[name.removesuffix(ending) + other] = tensors.pop(name)
    torch.save({"model": tensors, "args": released["args"]} if kind == "released" else tensors, tmp_path / "file")
    assert "left over" in message_of(tmp_path / "file")


@pytest.mark.parametrize("kind, load, needed", [
    ("clip", weights.load_hivg, "hivg"), ("hivg", weights.load_clip, "clip"), ("released", weights.load_clip, "clip"),
    ("huggingface", weights.load_hivg, "hivg"), ("huggingface", weights.load_released, "released")])
def test_kinds_are_not_confused(tmp_path, released, kind, load, needed):
    path = tmp_path / "file"
    if kind in ("clip", "hivg"):
        weights.save(path, (make_hivg if kind == "hivg" else make_clip)(dtype=torch.float32))
    else:
        torch.save(released if kind == "released" else tensors_of(kind, released), path)
    assert f"holds {weights.KINDS[kind]}; {weights.KINDS[needed]} is needed here" in message_of(path, load)
