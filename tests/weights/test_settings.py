"""Configurations of which no model can be built: each gets its line, before anything is built."""

import json
import re

import pytest
from makers import BUNDLED, make_clip, make_hivg, refusal
from makers_weights import contents, message_of
from safetensors.torch import save_file

from hivg import weights
from hivg.model import HiVGConfig
from hivg.weights.check_config import check_config, n_adapters

WRONG = [  # (setting, value, part of the message); of the CLIP where its name begins with "clip."
    ("clip.vision_heads", 5, "vision_heads 5 does not divide vision_width 64"),
    ("clip.text_heads", 7, "text_heads 7 does not divide text_width 48"),
    ("encoder_heads", 3, "encoder_heads 3 does not divide width 32"),
    ("clip.patch_size", 15, "patch_size 15 does not divide image_size 64"),
    ("clip.vision_heads", 0, "vision_heads must be a whole number in 1.."),
    ("clip.image_size", 64.0, "image_size must be a whole number"),
    ("clip.vision_width", True, "vision_width must be a whole number in 1..10000000, not True"),
    ("clip.embed_dim", "40", "embed_dim must be a whole number in 1..10000000, not '40'"),
    ("clip.vocab_size", None, "vocab"),
    ("clip.vision_layers", 10**6, "vision_layers must be a whole number in 1..1000"),
    ("clip.text_layers", 10**400, "text_layers must be a whole number in 1..1000, not a huge number"),
    ("clip.text_layers", 999, "1004 layers and 4000 adapters, but only"),
    ("encoder_layers", 999, "1004 layers and 12 adapters, but only"),
    ("clip", 3, "settings are not valid for a HiVG model"), ("stage", -1, "stage must be a whole number in 0..100"),
    ("stage", 10**6, "stage must be a whole number in 0..100"),
    ("normalization", "resnet", "normalization must be one of clip, imagenet, not 'resnet'"),
    ("normalization", ["clip"], "normalization must be text, not ['clip']"),
    ("dropout", float("nan"), "dropout must be a number in 0..1, not nan"),
    ("dropout", 10**400, "dropout must be a number in 0..1, not a huge number"),
    ("dropout", 1.5, "dropout must be a number in 0..1"), ("lora_dropout", "0.1", "lora_dropout must be a number"),
    ("lora_alpha", float("inf"), "lora_alpha must be a number in"),
    ("text_norm", 1, "text_norm must be true or false, not 1"), ("bridge", 3, "bridge must be"),
    ("bridge_blocks", [0, 3], "bridge_blocks must be from 0 to 2"),
    ("bridge_blocks", [0, 0], "bridge_blocks must be different numbers"),
    ("bridge_blocks", 0, "bridge_blocks must be whole numbers, not 0"),
    ("bridge_blocks", ["0"], "bridge_blocks must be whole numbers"),
    ("visual_levels", [0, 1], "visual_levels must be from 1 to 3"), ("visual_levels", [], "must name a layer"),
    ("text_layers", [3], "text_layers must be from 1 to 2"),
    ("text_layers", [[1]], "text_layers must be whole numbers"), ("colour", 3, "colour"),
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The tensors and metadata of a HiVG's file."""
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    weights.save(path, make_hivg(stage=1))
    return contents(path)


@pytest.mark.parametrize("setting, value, expected", WRONG, ids=str)
def test_each_wrong_setting_has_its_line(tmp_path, parts, setting, value, expected):
    tensors, metadata = parts
    config = json.loads(metadata["config"])
    if setting.startswith("clip."):
        config["clip"][setting.removeprefix("clip.")] = value
    else:
        config[setting] = value
    save_file(tensors, tmp_path / "x.safetensors", metadata | {"config": json.dumps(config)})
    assert expected in message_of(tmp_path / "x.safetensors")


@pytest.mark.parametrize("info", ["3", "[]", '"a"', "null", "[" * 100_000, ""])
def test_info_is_a_dict(tmp_path, parts, info):
    tensors, metadata = parts
    save_file(tensors, tmp_path / "x.safetensors", metadata | {"info": info})
    assert "settings are not valid for a HiVG model" in message_of(tmp_path / "x.safetensors")


@pytest.mark.parametrize("setting, names", [("bridge", "adaptive, projected, constant, none"),
                                            ("lora", "hierarchical, shared, vanilla, none"), ("text_padding", "")])
def test_messages_about_settings_are_short(setting, names):
    message = refusal(HiVGConfig, **{setting: "x" * 5000})
    assert re.search(f"{setting} must be .*{names}", message) and len(message) < 150


def test_what_we_write_is_right():
    clip = make_clip()
    check_config(clip.config, len(clip.state_dict()))
    for changes in ({}, {"bridge": "none"}, {"dropout": 0, "text_norm": False}, {"lora": "vanilla", "stage": 1},
                    {"lora": "shared", "stage": 3}, {"lora": "hierarchical", "stage": 3}):
        model = make_hivg(**changes)
        check_config(model.config, len(model.state_dict()))
        pairs = sum(".A." in name for name in model.state_dict())
        assert n_adapters(model.config) == pairs, changes
    assert weights.load(BUNDLED).config.stage == weights.read(BUNDLED).config.stage
