"""Other people's weights: OpenAI's CLIP, Hugging Face's CLIP, released HiVG checkpoints, in files made here in the
published formats; the golden files, where they are; what must be refused; fetch, convert and show.

The makers below write our models under their names by rules of their own, so a wrong rule in hivg/weights/foreign.py shows.
"""

import argparse
import collections
import functools
import gzip
import hashlib
import http.server
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from makers import GOLDEN, TEXTS, assert_close, make_clip, make_tokenizer, needs_golden, randomise
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from hivg import Grounder, weights
from hivg.clip import CLIP, CLIPConfig, resize_positions
from hivg.model import HiVG, HiVGConfig
from hivg.utils import pickles
from hivg.weights import WeightsError, download, foreign

ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = make_tokenizer().vocab_size


# --- makers of files ---


def theirs(seed=0, **changes):
    """A CLIP whose heads are 64 wide, as in every CLIP of OpenAI's, in float16 and back, as they are stored."""
    sizes = dict(vision_width=128, vision_heads=2, text_width=64, text_heads=1, context_length=77)
    clip = make_clip(seed, torch.float32, **(sizes | changes))
    return clip.half().float()


def to_openai(clip):
    """The state dict of `clip` under OpenAI's names."""
    out = {}
    for name, value in clip.state_dict().items():
        if name.startswith("text."):
            name = name.removeprefix("text.").replace("blocks.", "transformer.resblocks.")
        name = name.replace("visual.blocks.", "visual.transformer.resblocks.")
        out[name] = value.clone()
    for name in [n for n in out if ".q_proj." in n]:
        parts = [out.pop(name.replace(".q_proj.", f".{x}_proj.")) for x in "qkv"]
        out[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    return out | {"input_resolution": torch.tensor(clip.config.image_size),
                  "context_length": torch.tensor(clip.config.context_length),
                  "vocab_size": torch.tensor(clip.config.vocab_size)}


def to_huggingface(clip, position_ids=False):
    """The state dict of `clip` under Hugging Face's names; the older generation kept its position ids."""
    names = {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm", "ln_final": "final_layer_norm",
             "conv1": "embeddings.patch_embedding", "class_embedding": "embeddings.class_embedding",
             "token_embedding": "embeddings.token_embedding", "blocks": "encoder.layers", "attn": "self_attn",
             "ln_1": "layer_norm1", "ln_2": "layer_norm2", "c_fc": "fc1", "c_proj": "fc2",
             "positional_embedding": "embeddings.position_embedding.weight"}
    special = {"logit_scale": "logit_scale", "visual.proj": "visual_projection.weight",
               "text.text_projection": "text_projection.weight"}
    out = {}
    for name, value in clip.state_dict().items():
        if name in special:
            out[special[name]] = value.T.contiguous() if value.dim() else value
        else:
            tower, *rest = name.split(".")
            tower = {"visual": "vision_model", "text": "text_model"}[tower]
            out[".".join([tower, *(names.get(part, part) for part in rest)])] = value.clone()
    if position_ids:
        for tower in ("vision", "text"):
            n = len(out[f"{tower}_model.embeddings.position_embedding.weight"])
            out[f"{tower}_model.embeddings.position_ids"] = torch.arange(n)[None]
    return out


class Part(nn.Module):
    """A module of any names, for torch.jit.script."""

    def forward(self, x: torch.Tensor):
        return x + 1


def scripted(tensors):
    """The tensors as parameters (whole numbers as buffers) of a scripted module, named by their dots."""
    root = Part()
    for name, value in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, Part())
            module = getattr(module, part)
        if value.is_floating_point():
            module.register_parameter(last, nn.Parameter(value))
        else:
            module.register_buffer(last, value)
    return torch.jit.script(root)


def half(tensors):
    return {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}


def released_config(**changes):
    """The HiVGConfig of a small released model: 12 text blocks, so that every data set's text layers are there."""
    clip = theirs(vision_layers=12, text_layers=12).config
    settings = dict(bridge_blocks=(0, 3, 7, 11), visual_levels=(1, 4, 8, 12), text_layers=(12,), text_norm=False,
                    level_norm=False, text_padding="released", normalization="imagenet", lora="none", width=32,
                    encoder_layers=6, encoder_heads=8, encoder_ffn=48, rtcc_hidden=40)
    return HiVGConfig(clip=changes.pop("clip", clip), **(settings | changes))


def released_model(seed=0, **changes):
    torch.manual_seed(seed)
    return randomise(HiVG(released_config(**changes)), seed).half().float().eval()


def to_released(model, /, adapters=False, prefix="base_model.model.", **changes):
    """A checkpoint as the released program saves it. adapters: split every weight that can have one into W and B A."""
    c, out = model.config, {}
    for name, value in to_huggingface(model.clip, position_ids=True).items():
        out[f"clip.{prefix}{name}"] = value
    bridge = {"ln": "cross_norm", "attn": "cross_attn", "proj": "cross_gate", "mlp": "cross_mlp", "c_fc": "fc1",
              "c_proj": "fc2"}
    other = {"levels_proj": "ml_visual_projection", "visual_proj": "visu_proj", "rtcc_norm": "visu_token_norm",
             "rtcc_mlp": "visu_token_mlp", "bridge_text_proj": "condition_text_proj", "text_proj": "text_proj"}
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("clip.")}
    for name, value in state.items():
        module, *rest = name.split(".")
        if module == "bridges":
            block, *rest = rest
            layer = f"clip.{prefix}vision_model.encoder.layers.{block}."
            if rest == ["adaptive_weights"]:
                out |= {f"{layer}cross_adaptive_weights.{i}.weight": v.clone() for i, v in enumerate(value)}
            else:
                out[layer + ".".join(bridge.get(part, part) for part in rest)] = value
        elif module == "encoder" and rest[1] == "attn":
            if rest[2] == "q_proj":
                parts = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
                out[f"vl_transformer.encoder.layers.{rest[0]}.self_attn.in_proj_{rest[3]}"] = torch.cat(parts)
            elif rest[2] == "out_proj":
                out[f"vl_transformer.encoder.layers.{rest[0]}.self_attn.out_proj.{rest[3]}"] = value
        elif module in ("encoder", "encoder_norm"):
            out["vl_transformer.encoder." + ("norm." if module == "encoder_norm" else "layers.") + ".".join(rest)] = value
        elif module == "box_head":
            out[f"bbox_embed.layers.{int(rest[0]) // 2}.{rest[1]}"] = value
        elif module == "mask_convs":
            out[f"seg_conv{int(rest[0]) + 1}.weight"] = value
        elif name in ("reg_token", "position"):
            out[{"reg_token": "reg_token.weight", "position": "vl_pos_embed.weight"}[name]] = value.reshape(-1, c.width)
        else:
            out[".".join([other[module], *(bridge.get(p, p) if module == "rtcc_mlp" else p for p in rest)])] = value
    for name in ("ml_text_feat_perceiver.weight", "ml_text_feat_perceiver.bias", "reg_pos_embed.weight",
                 "condition_text_pos_embed.weight"):
        out[name] = torch.zeros(3, 3)  # in every file, used by nothing
    if c.bridge != "projected":
        out |= {"condition_text_proj.weight": torch.zeros(3, 3), "condition_text_proj.bias": torch.zeros(3)}
    if adapters:
        generator = torch.Generator().manual_seed(5)
        for name in [n for n in out if re.search(r"\.(self|cross)_attn\.(q|k|v|out)_proj\.weight$", n) and "clip." in n]:
            layer, (rows, columns) = name.removesuffix(".weight"), out[name].shape
            A, B = torch.randn(32, columns, generator=generator) / 32, torch.randn(rows, 32, generator=generator) / 32
            out[f"{layer}.lora_A.default.weight"], out[f"{layer}.lora_B.default.weight"] = A, B
            out[name] = out[name] - 16 / 32 * B @ A
    args = dict(model="ViT-B/16", dataset="unc", imsize=c.clip.image_size, mixup_pretrain=False, warmup=False,
                enable_adaptive_weights=True, hi_lora_stage=3 if adapters else 0, vl_hidden_dim=c.width, vl_dropout=0.1,
                vl_nheads=8, vl_dim_feedforward=c.encoder_ffn, vl_enc_layers=c.encoder_layers, max_query_len=77)
    return {"model": collections.OrderedDict(out), "optimizer": {"state": {0: {"exp_avg": torch.zeros(5)}},
                                                                 "param_groups": [{"lr": 1e-4, "params": [0]}]},
            "lr_scheduler": {"last_epoch": 3, "milestones": collections.Counter([60])}, "epoch": 3,
            "args": argparse.Namespace(**(args | changes)), "val_accu": torch.tensor(0.5)}


def legacy(data, path):
    torch.save(data, path, _use_new_zipfile_serialization=False)


def assert_same_weights(loaded, model):
    a, b = loaded.state_dict(), model.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == torch.float32 and torch.equal(a[name], b[name]), name


def save_table(path):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(make_tokenizer().to_text())


# --- every kind loads exactly ---


CLIP_WRITERS = {
    "OpenAI's archive": lambda clip, path: torch.jit.save(scripted(half(to_openai(clip))), path),
    "OpenAI's state dict": lambda clip, path: torch.save(half(to_openai(clip)), path),
    "OpenAI's state dict, older torch.save": lambda clip, path: legacy(half(to_openai(clip)), path),
    "OpenAI's names in safetensors": lambda clip, path: save_file(half(to_openai(clip)), path),
    "HF safetensors": lambda clip, path: save_file(to_huggingface(clip), path, {"format": "pt"}),
    "HF safetensors, position ids": lambda clip, path: save_file(to_huggingface(clip, True), path, {"format": "pt"}),
    "HF bin": lambda clip, path: torch.save(to_huggingface(clip), path),
    "HF bin, position ids": lambda clip, path: torch.save(to_huggingface(clip, True), path),
    "HF bin, older torch.save": lambda clip, path: legacy(to_huggingface(clip, True), path),
}


@pytest.mark.parametrize("writer", CLIP_WRITERS)
@pytest.mark.parametrize("sizes", [
    {}, dict(image_size=96, patch_size=32, vision_layers=1), dict(vision_width=192, vision_heads=3, embed_dim=24),
    dict(image_size=70, patch_size=14, text_layers=3, text_width=128, text_heads=2, context_length=20),
], ids=["as it is", "patch 32", "wider", "patch 14"])
def test_clip_loads_exactly(tmp_path, writer, sizes):
    clip, path = theirs(**sizes), tmp_path / "file"
    CLIP_WRITERS[writer](clip, path)
    loaded = weights.load_clip(path)
    assert loaded.config == clip.config  # every size, the heads too, from the shapes
    assert_same_weights(loaded, clip)
    assert not loaded.training and loaded.tokenizer is None
    weights.save(tmp_path / "ours.safetensors", loaded)  # no two tensors in one storage, nothing transposed
    assert_same_weights(weights.load_clip(tmp_path / "ours.safetensors"), clip)


def test_archive_runs_nothing_and_needs_no_code(tmp_path):
    """The archive's code may be gone, and its tensors may have been saved from a GPU."""
    clip, path, bare = theirs(), tmp_path / "archive.pt", tmp_path / "bare.pt"
    torch.jit.save(scripted(half(to_openai(clip))), path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(bare, "w") as target:
        for name in source.namelist():
            if "/code/" not in name and not name.endswith("constants.pkl"):
                target.writestr(name, source.read(name).replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    assert b"cuda:0" in zipfile.ZipFile(bare).read([n for n in source.namelist() if n.endswith("data.pkl")][0])
    assert_same_weights(weights.load_clip(bare), clip)


RELEASED = {
    "one text layer": ({}, {}),
    "two": (dict(text_layers=(6, 12)), dict(dataset="unc+")),
    "two, referit": (dict(text_layers=(6, 12)), dict(dataset="referit")),
    "twelve": (dict(text_layers=tuple(range(1, 13))), dict(dataset="gref_umd")),
    "warm-up of large": (dict(bridge_blocks=()), dict(warmup=True)),
    "mixed": (dict(bridge="projected"), dict(dataset="mixup", mixup_pretrain=True, enable_adaptive_weights=False)),
    "flickr, dropout 0": (dict(dropout=0.0), dict(dataset="flickr", vl_dropout=0.0)),
}


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("prefix", ["", "base_model.model.", "base_model.model." * 4], ids=["plain", "1 deep", "4 deep"])
def test_released_loads_exactly(tmp_path, name, prefix):
    config, args = RELEASED[name]
    model, path = released_model(**config), tmp_path / "best_checkpoint.pth"
    torch.save(to_released(model, prefix=prefix, **args), path)
    loaded = weights.load_released(path)
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    assert loaded.info["args"]["dataset"] == args.get("dataset", "unc")
    assert_same_weights(weights.load_hivg(path), model)


@pytest.mark.parametrize("write", [torch.save, legacy])
def test_released_adapters_are_folded(tmp_path, write):
    model, path = released_model(), tmp_path / "best_checkpoint.pth"
    checkpoint = to_released(model, adapters=True)
    assert sum("lora_A" in name for name in checkpoint["model"]) == 4 * (12 + 12 + 4)  # text, vision, bridges
    write(checkpoint, path)
    loaded = weights.load_released(path).state_dict()
    for name, value in model.state_dict().items():
        assert_close(name, loaded[name], value, 1e-6)


def test_large_and_its_layers(tmp_path):
    clip = theirs(vision_layers=24, text_layers=12, patch_size=32, vision_width=64, vision_heads=1).config
    model = released_model(clip=clip, bridge_blocks=(4, 10, 16, 22), visual_levels=(6, 12, 18, 24))
    torch.save(to_released(model, model="ViT-L/14"), tmp_path / "large.pth")
    loaded = weights.load_released(tmp_path / "large.pth")
    assert loaded.config == model.config
    assert_same_weights(loaded, model)


def test_mixed_file_may_hold_what_it_does_not_use(tmp_path):
    """The published mixed checkpoints carry a gate and adaptive weights that mixed pre-training never touches."""
    model = released_model(bridge="projected")
    checkpoint = to_released(model, dataset="mixup", mixup_pretrain=True, enable_adaptive_weights=False)
    for block in (0, 3, 7, 11):
        layer = f"clip.base_model.model.vision_model.encoder.layers.{block}."
        checkpoint["model"] |= {layer + "cross_gate.weight": torch.zeros(2, 2), layer + "cross_gate.bias": torch.zeros(2),
                                layer + "cross_adaptive_weights.0.weight": torch.zeros(77, 2)}
    torch.save(checkpoint, tmp_path / "mixed.pth")
    assert_same_weights(weights.load_released(tmp_path / "mixed.pth"), model)


def test_released_without_adaptive_weights_reads_the_text_itself(tmp_path):
    """The keys of the bridge are the last text block's features, which a projection by the identity says as well."""
    clip = theirs(vision_layers=12, text_layers=12, text_width=128, text_heads=2).config
    model = released_model(clip=clip)
    checkpoint = to_released(model, enable_adaptive_weights=False)
    for name in [n for n in checkpoint["model"] if "cross_gate" in n or "cross_adaptive" in n]:
        del checkpoint["model"][name]
    torch.save(checkpoint, tmp_path / "raw.pth")
    loaded = weights.load_released(tmp_path / "raw.pth")
    states = [torch.randn(2, 77, 128) for _ in range(12)]
    seen = []
    for bridge in loaded.bridges.values():
        bridge.forward = lambda x, s, mask: seen.append((s, mask))
    for run in loaded.bridge_functions(states, None, None).values():
        run(None)
    assert len(seen) == 4 and all(mask is None and torch.equal(s, states[-1]) for s, mask in seen)


def test_released_picture_of_another_size(tmp_path):
    """imsize decides; the position table is resized once, as the program does in every forward."""
    model = released_model()
    wide = released_model(clip=CLIPConfig(**(vars(model.config.clip) | {"image_size": 96})))
    checkpoint = to_released(wide)
    table = model.clip.visual.positional_embedding
    name = "clip.base_model.model.vision_model.embeddings.position_embedding.weight"
    checkpoint["model"][name] = table.detach()
    torch.save(checkpoint, tmp_path / "wide.pth")
    loaded = weights.load_released(tmp_path / "wide.pth")
    assert loaded.config == wide.config
    assert torch.equal(loaded.clip.visual.positional_embedding, resize_positions(table, (6, 6)))


# --- what a released model computes ---


def test_released_batch_is_as_alone_and_padding_counts_as_it_did():
    model = released_model(text_layers=(6, 12))
    model.tokenizer = make_tokenizer()
    torch.manual_seed(1)
    images, ids = torch.randn(4, 3, 64, 64), model.tokenizer(TEXTS)
    padding = torch.zeros(4, 64, 64).bool()
    padding[1, :16] = True
    with torch.no_grad():
        together = model(images, padding, ids)
        for i in range(4):
            short = ids[i : i + 1, : int(ids[i].argmax()) + 1]  # the 77 positions are filled up inside
            alone = model(images[i : i + 1], padding[i : i + 1], short)
            for field in ("boxes", "token_similarity", "mask_logits", "text_features", "image_features"):
                assert_close(field, getattr(together, field)[i], getattr(alone, field)[0], 1e-5)
        seen = []
        model.bridges["0"].forward = lambda x, s, mask: seen.append((s.shape[1], mask)) or x
        encode, masks = model.encode, []
        model.encode = lambda v, t, is_visual, is_text: masks.append(is_text) or encode(v, t, is_visual, is_text)
        bang = torch.tensor([[VOCABULARY - 2, 300, 0, 301, VOCABULARY - 1]])  # id 0 is "!", a token like others
        model(images[:1], padding[:1], bang)
    assert seen == [(77, None)]  # all positions are keys of the bridge
    assert masks[0][0].tolist() == [True, True, False, True, True] + [False] * 72  # what the released program masks


# --- the merge table beside the weights ---


def write_tokenizer_json(path):
    model = {"type": "BPE", "end_of_word_suffix": "</w>", "merges": [" ".join(p) for p in make_tokenizer().merges]}
    path.write_text(json.dumps({"model": model}))


TABLES = {"bpe_simple_vocab_16e6.txt.gz": save_table, "merges.txt": lambda p: p.write_text(make_tokenizer().to_text()),
          "tokenizer.json": write_tokenizer_json}


@pytest.mark.parametrize("table", TABLES)
def test_table_beside_the_weights(tmp_path, table):
    save_file(to_huggingface(theirs()), tmp_path / "model.safetensors")
    TABLES[table](tmp_path / table)
    loaded = weights.load_clip(tmp_path / "model.safetensors")
    assert loaded.tokenizer.merges == make_tokenizer().merges
    assert torch.equal(loaded.tokenizer(TEXTS), make_tokenizer()(TEXTS))


def test_table_of_another_vocabulary_is_not_taken(tmp_path):
    save_file(to_huggingface(theirs(vocab_size=VOCABULARY + 1)), tmp_path / "model.safetensors")
    save_table(tmp_path / download.TABLE)
    loaded = weights.load_clip(tmp_path / "model.safetensors")
    assert loaded.tokenizer is None
    with pytest.raises(WeightsError, match="merge table"):
        weights.need_tokenizer(loaded, "model.safetensors")


# --- what is refused ---


def message_of(path, load=weights.load):
    with pytest.raises(WeightsError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 1500, message
    return message


class Payload:
    """Unpickling it runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def evil_zip(data, path, extra=()):
    """A zip as PyTorch writes it around a pickle of `data`."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(data))
        for name, content in (("version", b"3\n"), *extra):
            archive.writestr(f"archive/{name}", content)


CODE = (("constants.pkl", pickle.dumps(())), ("code/__torch__.py", b"class Part(Module):\n  pass\n"))
EVIL = {
    "torch.save": lambda data, path: torch.save(data, path),
    "older torch.save": legacy,
    "bare pickle": lambda data, path: path.write_bytes(pickle.dumps(data)),
    "python 2 pickle": lambda data, path: path.write_bytes(pickle.dumps(data, protocol=2)),
    "zip": evil_zip,
    "TorchScript-like zip": functools.partial(evil_zip, extra=CODE),
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("how", EVIL)
@pytest.mark.parametrize("where", [lambda p: p, lambda p: {"model": {"w": p}, "args": argparse.Namespace(x=p)}],
                         ids=["alone", "in a checkpoint"])
def test_a_command_is_refused_and_not_run(tmp_path, suffix, how, where):
    path, touched = tmp_path / f"file{suffix}", tmp_path / "touched"
    EVIL[how](where(Payload(touched)), path)
    assert re.search(r"(posix|nt|os)\.system", message_of(path))
    assert not touched.exists()
    os.system(f"touch {touched}")
    assert touched.exists()  # as it would have been


@pytest.mark.parametrize("module, name", [("builtins", "eval"), ("builtins", "getattr"), ("torch", "load"),
                                          ("torch.storage", "_load_from_bytes"), ("numpy", "fromfile"),
                                          ("hivg.weights", "save"), ("collections", "namedtuple"),
                                          ("torch.jit._pickle", "build_boollist.__globals__")])
def test_only_what_is_listed_can_be_called(tmp_path, module, name):
    data = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X\x01\x00\x00\x001\x85R."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", data)
    assert f"{module}.{name}" in message_of(tmp_path / "x.pt")


def resnet(path):
    torch.save({"visual.conv1.weight": torch.zeros(2, 3, 3, 3), "visual.layer1.0.conv1.weight": torch.zeros(1)}, path)


def wrong_args(**changes):
    return lambda path: torch.save(to_released(released_model(), **changes), path)


NOT_WEIGHTS = {
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "HTML": (lambda p: p.write_text("\n<!DOCTYPE html><html>404</html>"), "web page"),
    "LFS": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n"), "git lfs pull"),
    "text": (lambda p: p.write_text("hello there"), "not a file that PyTorch saved"),
    "a picture": (lambda p: Image.new("RGB", (3, 3)).save(p, "PNG"), "not a file that PyTorch saved"),
    "another zip": (lambda p: zipfile.ZipFile(p, "w").writestr("a.txt", "a"), "not of PyTorch"),
    "a list": (lambda p: torch.save([torch.zeros(3)], p), "no weights at all"),
    "a number": (lambda p: torch.save(3, p), "no weights at all"),
    "other weights": (lambda p: torch.save({"conv.weight": torch.zeros(3)}, p), "tensors called conv.weight"),
    "a ResNet CLIP": (resnet, "ResNet"),
    "a number for a matrix": (lambda p: torch.save({"visual.conv1.weight": torch.zeros(64, 3, 8, 8),
                              "visual.transformer.resblocks.0.attn.in_proj_weight": torch.tensor(3.0)}, p), "cannot be read"),
    "released without args": (lambda p: torch.save(to_released(released_model())["model"], p), "settings"),
    "another backbone": (wrong_args(model="RN50"), "model='RN50'"),
    "imsize of no grid": (wrong_args(imsize=65), "imsize=65"),
    "imsize of text": (wrong_args(imsize="64"), "imsize='64'"),
    "fewer text layers than the data set's": (wrong_args(dataset="unc+"), "text layers"),
    "adaptive weights off": (wrong_args(enable_adaptive_weights=False), "adaptive weights off"),
    "large that is base": (wrong_args(model="ViT-L/14"), "12 vision"),
}


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_each_wrong_file_has_its_line(tmp_path, name):
    make, expected = NOT_WEIGHTS[name]
    make(tmp_path / "file.pt")
    assert expected in message_of(tmp_path / "file.pt")


@pytest.mark.parametrize("write", [CLIP_WRITERS["OpenAI's archive"], CLIP_WRITERS["OpenAI's state dict"],
                                   CLIP_WRITERS["HF safetensors"], CLIP_WRITERS["HF bin, older torch.save"]])
@pytest.mark.parametrize("keep", [0.02, 0.5, 0.98])
def test_a_file_cut_short(tmp_path, write, keep):
    path = tmp_path / "file.pt"
    write(theirs(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    assert "download it again" in message_of(path)


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "file.pt"
    torch.save(to_openai(theirs()), path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    assert "download it again" in message_of(path)


def openai_edited(path, edit):
    tensors = to_openai(theirs())
    edit(tensors)
    torch.save(tensors, path)


def huggingface_edited(path, edit):
    tensors = to_huggingface(theirs())
    edit(tensors)
    save_file(tensors, path)


def released_edited(path, edit):
    checkpoint = to_released(released_model())
    edit(checkpoint["model"])
    torch.save(checkpoint, path)


@pytest.mark.parametrize("write, name, ours, kind", [
    (openai_edited, "visual.ln_post.bias", "visual.ln_post.bias", "openai"),
    (openai_edited, "transformer.resblocks.1.attn.in_proj_bias", "text.blocks.1.attn.k_proj.bias", "openai"),
    (huggingface_edited, "vision_model.post_layernorm.bias", "visual.ln_post.bias", "huggingface"),
    (released_edited, "bbox_embed.layers.1.bias", "box_head.2.bias", "released"),
    (released_edited, "clip.base_model.model.vision_model.encoder.layers.3.cross_norm.bias", "bridges.3.ln.bias",
     "released"),
])
def test_keys_and_shapes_must_be_exact(tmp_path, write, name, ours, kind):
    path = tmp_path / "file"
    for edit, expected in ((lambda t: t.pop(name), f"missing: {ours}" if "in_proj" not in name else ours),
                           (lambda t: t.update(extra=torch.zeros(2)), "left over: extra"),
                           (lambda t: t.update({name: torch.zeros(6)}), f"{ours} (")):
        write(path, edit)
        message = message_of(path)
        assert weights.KINDS[kind] in message and expected in message, message


def test_kinds_are_not_confused(tmp_path):
    save_file(to_huggingface(theirs()), tmp_path / "hf.safetensors")
    torch.save(to_released(released_model()), tmp_path / "released.pth")
    assert "holds a CLIP of Hugging Face's" in message_of(tmp_path / "hf.safetensors", weights.load_hivg)
    assert "holds a CLIP of Hugging Face's" in message_of(tmp_path / "hf.safetensors", weights.load_released)
    assert "holds a released HiVG checkpoint" in message_of(tmp_path / "released.pth", weights.load_clip)


def test_tensors_stay_inside_their_storage(tmp_path):
    """A pickle may say that a tensor is larger than what the file holds of it."""
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(4.0)}, path)
    tensor = pickles.read(path)["w"]
    assert torch.equal(tensor.read(), torch.arange(4.0))
    for changes in (dict(shape=(5,)), dict(offset=1), dict(shape=(2, 2), stride=(3, 1))):
        with pytest.raises(ValueError, match="too short"):
            pickles.TensorOnDisk(**(vars(tensor) | changes)).read()


# --- fetch, convert, show; the programs ---


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine with two files, known to `fetch` as models; it can break off, and skip ranges."""
    class Handler(http.server.BaseHTTPRequestHandler):
        limit, ranges, asked = None, True, []

        def do_GET(self):
            data = files[self.path[1:]]
            self.asked.append(self.headers.get("Range"))
            start = int(self.headers["Range"][6:-1]) if self.ranges and "Range" in self.headers else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : self.limit])

        def log_message(self, *_):
            pass

    files = {"model.pt": bytes(range(256)) * 9000, download.TABLE: b"table"}
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{web.server_port}"
    monkeypatch.setattr(download, "FILES", {
        name: (f"{address}/{file}", hashlib.sha256(files[file]).hexdigest())
        for name, file in (("ViT-B/16", "model.pt"), ("table", download.TABLE))})
    yield Handler, files
    web.shutdown()
    web.server_close()


def test_fetch_resumes_and_checks(server, tmp_path):
    handler, files = server
    folder = tmp_path / "weights"
    handler.limit = 1_500_000
    with pytest.raises(ValueError, match="1,500,000 of 2,304,000 bytes"):
        download.fetch("ViT-B/16", folder)
    assert [p.name for p in folder.iterdir()] == ["model.pt.part"]
    handler.limit = None
    paths = download.fetch("ViT-B/16", folder)
    assert [p.read_bytes() for p in paths] == [files["model.pt"], b"table"]
    assert handler.asked == [None, "bytes=1500000-", None]
    assert download.fetch("ViT-B/16", folder) == paths and len(handler.asked) == 3  # nothing is fetched twice
    assert not list(folder.glob("*.part"))


def test_fetch_from_a_server_without_ranges(server, tmp_path):
    handler, files = server
    (tmp_path / "model.pt.part").write_bytes(files["model.pt"][:1000])
    handler.ranges = False
    assert download.fetch("ViT-B/16", tmp_path)[0].read_bytes() == files["model.pt"]


def test_fetch_begins_anew_after_a_wrong_part(server, tmp_path):
    (tmp_path / "model.pt.part").write_bytes(b"something else")
    assert download.fetch("ViT-B/16", tmp_path)[0].read_bytes() == server[1]["model.pt"]


def test_fetch_refuses_what_is_not_the_published_file(server, tmp_path):
    server[1]["model.pt"] = b"not it"
    with pytest.raises(ValueError, match="sha256"):
        download.fetch("ViT-B/16", tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model.pt").write_bytes(b"mine")
    with pytest.raises(ValueError, match="model.pt: is there, but"):
        download.fetch("ViT-B/16", tmp_path)
    assert (tmp_path / "model.pt").read_bytes() == b"mine"  # nothing of the user's is lost


def test_fetch_without_network_and_unknown_names(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there are ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px, table"):
        download.fetch("RN50", tmp_path)
    monkeypatch.setattr(download, "FILES", {"table": ("http://127.0.0.1:9/x.gz", "0" * 64)})
    with pytest.raises(ValueError, match="no connection"):
        download.fetch("table", tmp_path)


def test_published_addresses_carry_their_hash():
    for name, (address, sha256) in download.FILES.items():
        assert re.fullmatch("[0-9a-f]{64}", sha256) and address.startswith("https://")
        assert name == "table" or address.split("/")[-2] == sha256


def run(*command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)


def test_convert_and_show(tmp_path):
    clip, path = theirs(), tmp_path / "ViT.pt"
    torch.save(half(to_openai(clip)), path)
    save_table(tmp_path / download.TABLE)
    done = run("-m", "hivg.weights", "convert", path, tmp_path / "out.safetensors")
    assert done.returncode == 0, done.stderr
    ours = weights.load_clip(tmp_path / "out.safetensors")
    assert_same_weights(ours, clip)
    assert ours.tokenizer.merges == make_tokenizer().merges and ours.info == {"source": "OpenAI's CLIP"}
    shown = run("-m", "hivg.weights", "show", path)
    assert "OpenAI's CLIP" in shown.stdout and "patches of 16 px" in shown.stdout and "2 heads" in shown.stdout
    refused = run("-m", "hivg.weights", "convert", path, tmp_path / "out.pt")
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1


def test_show_of_a_released_checkpoint(tmp_path):
    torch.save(to_released(released_model(text_layers=(6, 12)), adapters=True, dataset="unc+"), tmp_path / "x.pth")
    text = weights.describe(tmp_path / "x.pth")
    for part in ("a released HiVG checkpoint", "(6, 12)", "imagenet", "unc+", "hi_lora_stage': 3"):
        assert part in text, text


def test_released_checkpoint_grounds_and_survives_convert(tmp_path):
    model, picture = released_model(), Image.new("RGB", (90, 60), "red")
    torch.save(to_released(model, adapters=True), tmp_path / "best_checkpoint.pth")
    with pytest.raises(WeightsError, match="merge table"):
        Grounder.from_pretrained(tmp_path / "best_checkpoint.pth")
    save_table(tmp_path / download.TABLE)
    result = Grounder.from_pretrained(tmp_path / "best_checkpoint.pth", "cpu").ground(picture, TEXTS)
    assert all(len(r.box) == 4 and r.mask.shape == (60, 90) for r in result)
    loaded = weights.load(tmp_path / "best_checkpoint.pth")
    weights.save(tmp_path / "ours.safetensors", loaded, loaded.info)
    again = Grounder.from_pretrained(tmp_path / "ours.safetensors", "cpu").ground(picture, TEXTS)
    assert [r.box for r in again] == [r.box for r in result]


def test_training_starts_from_any_clip(tmp_path):
    clip = theirs(vision_layers=6, text_layers=4)
    torch.save(half(to_openai(clip)), tmp_path / "ViT.pt")
    settings = train.Settings(clip=str(tmp_path / "ViT.pt"))
    with pytest.raises(WeightsError, match="merge table"):
        train.begin_stage(settings, train.stages(settings)[0], None, tmp_path)
    save_table(tmp_path / download.TABLE)
    model, _ = train.begin_stage(settings, train.stages(settings)[0], None, tmp_path)
    assert_same_weights(model.clip, clip)
    assert model.tokenizer.merges == make_tokenizer().merges


# --- the golden files ---


@needs_golden
@pytest.mark.parametrize("kind, first, last", [("openai", "{}_hidden_first", "{}_hidden_last"),
                                               ("hf", None, "{}_hidden_2")])
def test_golden_clip(kind, first, last):
    clip = weights.load_clip(GOLDEN / f"{kind}_clip_tiny.checkpoint.safetensors")
    expected = {k: v.float() if v.is_floating_point() else v
                for k, v in load_file(GOLDEN / f"{kind}_clip_tiny.expected.safetensors").items()}
    images, ids = expected["image"], expected["token_ids"].long()
    with torch.no_grad():
        picture, vision = clip.encode_image(images, return_hidden_states=True)
        words, text = clip.encode_text(ids, return_hidden_states=True)
        logits = clip.logits_per_text(images, ids)
    found = {"image_features": picture, "text_features": words, "image_embeds": nn.functional.normalize(picture, dim=-1),
             "text_embeds": nn.functional.normalize(words, dim=-1), "logits_per_text": logits,
             "logits_per_image": logits.T}
    for tower, states in (("vision", vision), ("text", text)):
        found |= {first.format(tower): states[0]} if first else {}
        found[last.format(tower)] = states[-1] if kind == "openai" else states[1]
    checked = expected.keys() - {"image", "token_ids"}
    assert checked and checked <= found.keys()
    for name in checked:
        assert_close(name, found[name], expected[name], 1e-5)


@needs_golden
@pytest.mark.parametrize("name", ["base_unc_stage0", "base_uncplus_stage3", "base_mixup_stage0"])
def test_golden_released(name):
    model = weights.load_released(GOLDEN / f"{name}.pth")
    expected = load_file(GOLDEN / f"{name}.expected.safetensors")
    images, padding, ids = expected["image"].float(), expected["padding_mask"].bool(), expected["token_ids"].long()
    with torch.no_grad():
        output = model(images, padding, ids)
        alone = [model(images[i : i + 1], padding[i : i + 1], ids[i : i + 1]) for i in range(len(images))]
    scores = torch.cat([o.logits_per_text for o in alone])
    assert_close("boxes", output.boxes, expected["pred_box"], 2e-6)
    assert_close("logits_per_text", scores, expected["logits_per_text"], 1e-4)
    for field, theirs_ in (("token_similarity", "token_similarity"), ("mask_logits", "seg_mask")):
        for outputs in (getattr(output, field), torch.cat([getattr(o, field) for o in alone])):
            reference = expected[theirs_].reshape(outputs.shape)
            # random weights make these logits up to 750; float32 itself knows them no better than 3e-6 of that
            assert_close(field, outputs / reference.abs().max(), reference / reference.abs().max(), 3e-6)
    assert_close("alone", torch.cat([o.boxes for o in alone]), output.boxes, 2e-6)
