"""Weights files: what goes in comes out, a bad file gets one line that names it, an interrupted save costs nothing."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from makers import make_batch, make_clip, make_hivg, make_tokenizer
from safetensors import safe_open
from safetensors.torch import save_file

from hivg import weights
from hivg.tokenizer import Tokenizer
from hivg.weights import WeightsError

LOADERS = {"clip": weights.load_clip, "hivg": weights.load_hivg}


def make(kind, **changes):
    if kind == "hivg":
        return make_hivg(dtype=torch.float32, **changes)
    clip = make_clip(dtype=torch.float32, **changes)
    clip.tokenizer = Tokenizer(make_tokenizer().merges, clip.config.context_length)
    return clip


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def assert_same_model(a, b):
    """Configuration, every tensor bit for bit, what is trained, tokenizer."""
    assert a.config == b.config
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype == torch.float32, name
        assert torch.equal(tensor, theirs[name]), name
    assert trained(a) == trained(b)
    assert a.tokenizer.merges == b.tokenizer.merges
    assert a.tokenizer.context_length == b.tokenizer.context_length


# --- there and back ---


def test_clip_comes_back(tmp_path):
    clip = make("clip", context_length=20)
    weights.save(tmp_path / "new" / "clip.safetensors", clip, {"accuracy": 0.5, "stage": "pretrain"})
    loaded = weights.load_clip(tmp_path / "new" / "clip.safetensors")
    assert_same_model(loaded, clip)
    assert loaded.info == {"accuracy": 0.5, "stage": "pretrain"} and not loaded.training


@pytest.mark.parametrize("changes", [
    *({"lora": mode, "stage": stage} for mode, last in [("hierarchical", 3), ("shared", 3), ("vanilla", 1), ("none", 0)]
      for stage in range(last + 1)),
    *({"bridge": kind} for kind in ("projected", "constant", "none")),
    {"text_norm": False, "normalization": "imagenet", "lora_alpha": 3.5}], ids=str)
def test_hivg_comes_back(tmp_path, changes):
    model = make("hivg", **changes)
    weights.save(tmp_path / "hivg.safetensors", model)
    loaded = weights.load_hivg(str(tmp_path / "hivg.safetensors"))
    assert_same_model(loaded, model)
    assert loaded.info == {} and not loaded.training
    batch = make_batch(dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(*batch).boxes, model(*batch).boxes)
        loaded.add_stage(1 + model.config.stage), model.add_stage(1 + model.config.stage)  # training can go on
    assert trained(loaded) == trained(model)


def test_merged_model_comes_back(tmp_path):
    model = make("hivg", stage=2).merged()
    weights.save(tmp_path / "hivg.safetensors", model)
    assert_same_model(weights.load_hivg(tmp_path / "hivg.safetensors"), model)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_the_bytes_load_as_float32(tmp_path, kind, dtype):
    model = make(kind)
    for name, stored in (("half", dtype), ("full", None)):
        weights.save(tmp_path / name, model, dtype=stored)
    assert (tmp_path / "half").stat().st_size < 0.6 * (tmp_path / "full").stat().st_size
    for name, tensor in LOADERS[kind](tmp_path / "half").state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].to(dtype).float()), name


# --- bad files ---


def rewrite(path, change):
    """Write a good file anew after `change(tensors, metadata)`."""
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def change_config(path, change):
    def edit(tensors, metadata):
        config = json.loads(metadata["config"])
        change(config)
        metadata["config"] = json.dumps(config)
    rewrite(path, edit)


def cut(path, keep):
    path.write_bytes(path.read_bytes()[: keep(path.stat().st_size)])


BIAS = {"clip": "visual.ln_post.bias", "hivg": "levels_proj.bias"}
DAMAGE = {  # name: what makes the good file bad, given its path and kind; a word of the message
    "missing": (lambda path, kind: path.unlink(), "no such"),
    "a folder": (lambda path, kind: (path.unlink(), path.mkdir()), "no such"),
    "empty": (lambda path, kind: path.write_bytes(b""), "empty"),
    "cut in the header": (lambda path, kind: cut(path, lambda size: 100), "not a whole"),
    "cut in the middle": (lambda path, kind: cut(path, lambda size: size // 2), "not a whole"),
    "last byte lost": (lambda path, kind: cut(path, lambda size: size - 1), "not a whole"),
    "a web page": (lambda path, kind: path.write_text("<!DOCTYPE html><html><body>Not\nfound</body>"), "a web page"),
    "a pickle": (lambda path, kind: torch.save({"a": torch.zeros(3)}, path), "tensors called a"),
    "another program's": (lambda path, kind: save_file({"weight": torch.zeros(3)}, path), "no CLIP and no HiVG"),
    "another kind": (lambda path, kind: rewrite(path, lambda t, m: m.update(kind="lora")), "not one of this project's"),
    "no configuration": (lambda path, kind: rewrite(path, lambda t, m: m.pop("config")), "config"),
    "configuration cut": (lambda path, kind: rewrite(path, lambda t, m: m.update(config='{"clip": ')), "metadata"),
    "configuration a list": (lambda path, kind: rewrite(path, lambda t, m: m.update(config="[1]")), "metadata"),
    "unknown setting": (lambda path, kind: change_config(path, lambda c: c.update(colour=3)), "colour"),
    "setting of another type": (lambda path, kind: change_config(path, lambda c: (c.get("clip") or c).update(
        vision_layers="six")), "configuration"),
    "no tokenizer": (lambda path, kind: rewrite(path, lambda t, m: m.pop("tokenizer")), "tokenizer"),
    "tokenizer damaged": (lambda path, kind: rewrite(path, lambda t, m: m.update(tokenizer="a b c")), "metadata"),
    "another tokenizer": (lambda path, kind: rewrite(path, lambda t, m: m.update(tokenizer="a b\n")), "vocabulary"),
    "a key missing": (lambda path, kind: rewrite(path, lambda t, m: t.pop(BIAS[kind])), "missing: {bias}"),
    "a key left over": (lambda path, kind: rewrite(path, lambda t, m: t.update(extra=torch.ones(2))),
                        "left over: extra"),
    "another shape": (lambda path, kind: rewrite(path, lambda t, m: t.update({BIAS[kind]: torch.ones(7)})),
                      "{bias} (7,) instead of"),
    "all keys renamed": (lambda path, kind: rewrite(path, lambda t, m: [t.update({"x." + k: t.pop(k)}) for k in [*t]]),
                         " more"),
}


def message_of(load, path):
    with pytest.raises(WeightsError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 2000
    return message


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("name", DAMAGE)
def test_bad_file_gets_one_line(tmp_path, kind, name):
    path = tmp_path / "weights.safetensors"
    weights.save(path, make(kind))
    LOADERS[kind](path)
    damage, expected = DAMAGE[name]
    damage(path, kind)
    assert expected.format(bias=BIAS[kind]) in message_of(LOADERS[kind], path)


@pytest.mark.parametrize("kind, other", [("clip", "hivg"), ("hivg", "clip")])
def test_the_other_model_is_refused(tmp_path, kind, other):
    path = tmp_path / "weights.safetensors"
    weights.save(path, make(other))
    message = message_of(LOADERS[kind], path)
    assert f"holds {weights.KINDS[other]}" in message and f"{weights.KINDS[kind]} is needed" in message


def test_impossible_path_gets_one_line(tmp_path):
    message_of(weights.load_hivg, tmp_path / ("x" * 300))


class Payload:
    """Unpickling it touches a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("write", [lambda x, path: path.write_bytes(pickle.dumps(x)), torch.save],
                         ids=["pickle", "torch.save"])
def test_nothing_is_executed(tmp_path, kind, write):
    path, touched = tmp_path / "weights.safetensors", tmp_path / "touched"
    write(Payload(touched), path)
    message_of(LOADERS[kind], path)
    assert not touched.exists()
    pickle.loads(pickle.dumps(Payload(touched)))
    assert touched.exists()  # as an unpickling would have done


# --- interrupted saves ---


class Killed(BaseException):
    pass


def killed(*_):
    raise Killed


def half(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    raise Killed


@pytest.mark.parametrize("owner, name, stop", [(Path, "write_bytes", half), (weights.os, "replace", killed)])
def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch, owner, name, stop):
    path, old, new = tmp_path / "clip.safetensors", make("clip", seed=1), make("clip", seed=2)
    weights.save(path, old)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, stop)
        weights.save(path, new)
    assert_same_model(weights.load_clip(path), old)
    weights.save(path, new)
    assert_same_model(weights.load_clip(path), new)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
