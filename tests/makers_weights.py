"""Makers of other people's weights files: our models under their names, by rules of their own, so that a wrong rule in
hivg/weights/ shows. And how a file that was read is compared, or its message checked.
"""

import argparse
import collections
import gzip
import json
import os
import pickle
import re

import torch
import torch.nn as nn
from makers import assert_close, make_clip, make_tokenizer, randomise, refusal
from safetensors import safe_open
from safetensors.torch import save_file

from hivg import weights
from hivg.model import HiVG, HiVGConfig
from hivg.utils.messages import shown

BASE_MODEL = "base_model.model."  # in front of a name for every wrapping by PEFT


# --- CLIP ---


def make_published_clip(**changes):
    """A CLIP with heads 64 wide, as every published one has; its numbers are those of float16, as they are stored."""
    sizes = dict(vision_width=128, vision_heads=2, text_width=64, text_heads=1, context_length=77)
    return make_clip(dtype=torch.float32, **(sizes | changes)).half().float()


def to_openai(clip):
    """The state dict of `clip` under OpenAI's names."""
    out = {}
    for name, value in clip.state_dict().items():
        if name.startswith("text."):
            name = name.removeprefix("text.").replace("blocks.", "transformer.resblocks.")
        name = name.replace("visual.blocks.", "visual.transformer.resblocks.")
        out[name] = value.clone()
    for name in list(out):
        if ".q_proj." in name:
            parts = [out.pop(name.replace(".q_proj.", f".{letter}_proj.")) for letter in "qkv"]
            out[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    out["input_resolution"] = torch.tensor(clip.config.image_size)
    out["context_length"] = torch.tensor(clip.config.context_length)
    out["vocab_size"] = torch.tensor(clip.config.vocab_size)
    return out


HUGGING_FACE_PARTS = {
    "visual": "vision_model", "text": "text_model", "ln_pre": "pre_layrnorm", "ln_post": "post_layernorm",
    "ln_final": "final_layer_norm", "conv1": "embeddings.patch_embedding",
    "class_embedding": "embeddings.class_embedding", "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight", "blocks": "encoder.layers", "attn": "self_attn",
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "c_fc": "fc1", "c_proj": "fc2"}
HUGGING_FACE_WHOLE = {"logit_scale": "logit_scale", "visual.proj": "visual_projection.weight",
                      "text.text_projection": "text_projection.weight"}


def to_huggingface(clip, position_ids=False):
    """The state dict of `clip` under Hugging Face's names; the older generation kept its position ids."""
    out = {}
    for name, value in clip.state_dict().items():
        if name in HUGGING_FACE_WHOLE:
            out[HUGGING_FACE_WHOLE[name]] = value.T.contiguous() if value.dim() else value
        else:
            out[".".join(HUGGING_FACE_PARTS.get(part, part) for part in name.split("."))] = value.clone()
    if position_ids:
        for tower in ("vision_model", "text_model"):
            positions = len(out[f"{tower}.embeddings.position_embedding.weight"])
            out[f"{tower}.embeddings.position_ids"] = torch.arange(positions)[None]
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
    return {name: t.half() if t.is_floating_point() else t for name, t in tensors.items()}


def prefixed(prefix, tensors):
    return {prefix + name: t for name, t in tensors.items()}


def save_bare(data, path, protocol=None):
    path.write_bytes(pickle.dumps(data, protocol))


def save_legacy(data, path):
    """As torch.save wrote before it wrote zip archives."""
    torch.save(data, path, _use_new_zipfile_serialization=False)


WRITERS = {  # of a published CLIP; name: a function of the CLIP and the path
    "openai archive": lambda clip, path: torch.jit.save(scripted(half(to_openai(clip))), path),
    "openai state dict": lambda clip, path: torch.save(half(to_openai(clip)), path),
    "openai float32": lambda clip, path: torch.save(to_openai(clip), path),  # q, k and v are parts of one tensor
    "openai wrapped, on several GPUs": lambda clip, path: torch.save(
        {"epoch": 3, "loss": torch.ones(1), "state_dict": prefixed("module.", half(to_openai(clip)))}, path),
    "openai, compiled": lambda clip, path: torch.save(prefixed("_orig_mod.", to_openai(clip)), path),
    "huggingface wrapped": lambda clip, path: torch.save(
        {"model_state_dict": to_huggingface(clip), "optimizer_state_dict": {"state": {0: torch.ones(9)}}}, path),
    "huggingface safetensors, both": lambda clip, path: save_file(
        prefixed("module._orig_mod.", to_huggingface(clip)), path),
    "openai legacy": lambda clip, path: save_legacy(half(to_openai(clip)), path),
    "openai safetensors": lambda clip, path: save_file(half(to_openai(clip)), path),
    "huggingface safetensors": lambda clip, path: save_file(to_huggingface(clip), path, {"format": "pt"}),
    "huggingface safetensors, older": lambda clip, path: save_file(to_huggingface(clip, position_ids=True), path),
    "huggingface bin": lambda clip, path: torch.save(to_huggingface(clip), path),
    "huggingface bin, older": lambda clip, path: torch.save(to_huggingface(clip, position_ids=True), path),
    "huggingface legacy": lambda clip, path: save_legacy(to_huggingface(clip, position_ids=True), path),
}


class Payload:
    """Unpickling it runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


# --- merge tables ---


def save_table(path):
    """The tests' merge table as OpenAI publishes CLIP's."""
    path.write_bytes(gzip.compress(make_tokenizer().to_text().encode()))


def save_merges(path):
    path.write_text(make_tokenizer().to_text())


def save_tokenizer_json(path):
    model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {"a": 1}}
    path.write_text(json.dumps({"version": "1.0", "model": model | {"merges": make_tokenizer().merges}}))


TABLES = {"bpe_simple_vocab_16e6.txt.gz": save_table, "merges.txt": save_merges, "tokenizer.json": save_tokenizer_json}


# --- released HiVG ---


def make_released(**changes):
    """Our model of a small released one, of 12 text blocks, so that every data set's text layers are there; `changes`
    are fields of HiVGConfig."""
    settings = dict(bridge_blocks=(0, 3, 7, 11), visual_levels=(1, 4, 8, 12), text_layers=(12,), text_norm=False,
                    level_norm=False, text_padding="released", normalization="imagenet", lora="none", width=32,
                    encoder_layers=6, encoder_heads=8, encoder_ffn=48, rtcc_hidden=40)
    if "clip" not in changes:
        settings["clip"] = make_published_clip(vision_layers=12, text_layers=12).config
    torch.manual_seed(0)
    return randomise(HiVG(HiVGConfig(**(settings | changes)))).half().float().eval()


def to_released(model, /, adapters=False, prefix=BASE_MODEL, **changes):
    """A checkpoint as the released program saves it.

    adapters: split every weight that can have one into W and B A. prefix: in front of the CLIP's names. changes:
    entries of its `args`.
    """
    out = {}
    for name, value in to_huggingface(model.clip, position_ids=True).items():
        out[f"clip.{prefix}{name}"] = value
    for name, value in model.state_dict().items():
        if name.startswith("bridges."):
            out |= bridge_entry(name, value, prefix)
        elif name.startswith("encoder."):
            out |= encoder_entry(name, value, model)
        elif not name.startswith("clip."):
            out |= head_entry(name, value)
    for name in ("ml_text_feat_perceiver.weight", "ml_text_feat_perceiver.bias", "reg_pos_embed.weight",
                 "condition_text_pos_embed.weight", "condition_text_proj.weight", "condition_text_proj.bias"):
        out.setdefault(name, torch.zeros(3, 3))  # in every file; only mixed ones use the last two
    if adapters:
        add_adapters(out)
    c = model.config
    args = dict(model="ViT-B/16", dataset="unc", imsize=c.clip.image_size, mixup_pretrain=False, warmup=False,
                enable_adaptive_weights=True, hi_lora_stage=3 if adapters else 0, vl_hidden_dim=c.width, vl_dropout=0.1,
                vl_nheads=8, vl_dim_feedforward=c.encoder_ffn, vl_enc_layers=c.encoder_layers, max_query_len=77)
    return {
        "model": collections.OrderedDict(out),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(5)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "lr_scheduler": {"last_epoch": 3, "milestones": collections.Counter([60])},
        "epoch": 3,
        "args": argparse.Namespace(**(args | changes)),
        "val_accu": torch.tensor(0.5),
    }


BRIDGE_PARTS = {"ln": "cross_norm", "attn": "cross_attn", "proj": "cross_gate", "mlp": "cross_mlp", "c_fc": "fc1",
                "c_proj": "fc2"}


def bridge_entry(name, value, prefix):
    _, block, *rest = name.split(".")
    layer = f"clip.{prefix}vision_model.encoder.layers.{block}."
    if rest == ["adaptive_weights"]:  # (K, 77, D_t)
        return {f"{layer}cross_adaptive_weights.{i}.weight": table.clone() for i, table in enumerate(value)}
    return {layer + ".".join(BRIDGE_PARTS.get(part, part) for part in rest): value}


def encoder_entry(name, value, model):
    theirs = name.replace("encoder.", "vl_transformer.encoder.layers.").replace(".attn.", ".self_attn.")
    if ".q_proj." in name:
        state = model.state_dict()
        parts = [state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
        return {theirs.replace("q_proj.", "in_proj_"): torch.cat(parts)}
    return {} if re.search("[kv]_proj", name) else {theirs: value}  # k and v are written with q


HEAD_NAMES = {
    "levels_proj": "ml_visual_projection", "visual_proj": "visu_proj", "text_proj": "text_proj",
    "bridge_text_proj": "condition_text_proj", "encoder_norm": "vl_transformer.encoder.norm",
    "rtcc_norm": "visu_token_norm", "rtcc_mlp.c_fc": "visu_token_mlp.fc1", "rtcc_mlp.c_proj": "visu_token_mlp.fc2",
    "box_head.0": "bbox_embed.layers.0", "box_head.2": "bbox_embed.layers.1", "box_head.4": "bbox_embed.layers.2",
    "mask_convs.0": "seg_conv1", "mask_convs.1": "seg_conv2", "mask_convs.2": "seg_conv3"}


def head_entry(name, value):
    if name == "reg_token":
        return {"reg_token.weight": value[None]}  # (1, D)
    if name == "position":
        return {"vl_pos_embed.weight": value}
    module, last = name.rsplit(".", 1)
    return {f"{HEAD_NAMES[module]}.{last}": value}


def add_adapters(out, rank=32, alpha=16):
    """Take a random B A out of every weight that can have an adapter, and put A and B beside it, in place."""
    generator = torch.Generator().manual_seed(5)
    for name in list(out):
        if not re.search(r"^clip\..*\.(self|cross)_attn\.(q|k|v|out)_proj\.weight$", name):
            continue
        layer = name.removesuffix(".weight")
        rows, columns = out[name].shape
        A = torch.randn(rank, columns, generator=generator) / 32
        B = torch.randn(rows, rank, generator=generator) / 32
        out[f"{layer}.lora_A.default.weight"] = A
        out[f"{layer}.lora_B.default.weight"] = B
        out[name] = out[name] - alpha / rank * B @ A


# --- comparisons ---


def assert_same_weights(loaded, model, tol=0):
    """The same names, all in float32, bit for bit unless there is a tolerance."""
    a = loaded.state_dict()
    b = model.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype == torch.float32, name
        assert_close(name, a[name], b[name], tol)


def contents(path):
    """-> the tensors of a .safetensors file, and its metadata."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def message_of(path, load=weights.load):
    """The WeightsError of a file, one line that begins with its name."""
    message = refusal(load, path, error=weights.WeightsError)
    assert message.startswith(shown(path, 80)[:39]) and message.isprintable(), message
    return message
