"""OpenAI's and Hugging Face's CLIPs, in files made here in the published formats; the golden files, where they are; the
merge table beside them."""

import json
import zipfile
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from makers import GOLDEN, TEXTS, assert_close, make_tokenizer, needs_golden
from makers_weights import (
    TABLES,
    WRITERS,
    assert_same_weights,
    half,
    make_published_clip,
    save_merges,
    save_table,
    scripted,
    to_huggingface,
    to_openai,
)
from safetensors.torch import load_file, save_file

from hivg import weights
from hivg.clip import similarity
from hivg.weights import WeightsError, download

# --- every kind loads exactly ---


SIZES = {
    "patch 32": dict(image_size=96, patch_size=32, vision_layers=1),
    "wider": dict(vision_width=192, vision_heads=3, embed_dim=24),
    "patch 14": dict(image_size=70, patch_size=14, text_layers=3, text_width=128, text_heads=2, context_length=20),
}


@pytest.mark.parametrize("write", WRITERS)
def test_clip_loads_exactly(tmp_path, write):
    assert_loads_exactly(make_published_clip(), WRITERS[write], tmp_path)


@pytest.mark.parametrize("write", ["openai archive", "huggingface safetensors, older"])
@pytest.mark.parametrize("sizes", SIZES)
def test_clip_of_any_size_loads_exactly(tmp_path, write, sizes):
    assert_loads_exactly(make_published_clip(**SIZES[sizes]), WRITERS[write], tmp_path)


def assert_loads_exactly(clip, write, tmp_path):
    write(clip, tmp_path / "file")
    loaded = weights.load_clip(tmp_path / "file")
    assert loaded.config == clip.config  # every size, the heads too, from the shapes
    assert_same_weights(loaded, clip)
    assert not loaded.training and loaded.tokenizer is None
    for name, tensor in loaded.state_dict().items():  # each in a storage of its own, nothing transposed
        assert tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes, name
    weights.save(tmp_path / "ours.safetensors", loaded)
    assert_same_weights(weights.load_clip(tmp_path / "ours.safetensors"), clip)


def test_archive_runs_nothing_and_needs_no_code(tmp_path):
    """The archive's code may be gone, and its tensors may have been saved from a GPU."""
    clip = make_published_clip()
    WRITERS["openai archive"](clip, tmp_path / "archive.pt")
    with zipfile.ZipFile(tmp_path / "archive.pt") as source, zipfile.ZipFile(tmp_path / "bare.pt", "w") as target:
        for name in source.namelist():
            if "/code/" in name or name.endswith("constants.pkl"):
                continue
            content = source.read(name).replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            target.writestr(name, content)
            if name.endswith("data.pkl"):
                assert b"cuda:0" in content
    assert_same_weights(weights.load_clip(tmp_path / "bare.pt"), clip)


def test_a_mask_beside_the_weights_of_an_archive_is_left_out(tmp_path):
    """OpenAI's archives keep the causal mask as an attribute of every text block."""
    clip = make_published_clip()
    tensors = half(to_openai(clip)) | {"transformer.resblocks.0.attn_mask": torch.zeros(77, 77)}
    torch.jit.save(scripted(tensors), tmp_path / "archive.pt")
    assert_same_weights(weights.load_clip(tmp_path / "archive.pt"), clip)


@pytest.mark.parametrize("told, message", [
    ({"vision_config": {"num_attention_heads": 4}, "text_config": {"hidden_act": "quick_gelu"}}, None),  # heads: 8
    ({"vision_config": {"num_attention_heads": 3}}, "num_attention_heads=3, which do not divide its vision tower's"),
    ({"text_config": {"num_attention_heads": "8"}}, "num_attention_heads='8', which"),
    ({"text_config": {"hidden_act": "gelu"}}, "hidden_act='gelu'; HiVG needs a CLIP with quick_gelu"),  # OpenCLIP's
    ({"model_type": "another"}, None), ([], None), ("{", "the config.json beside it is no JSON"),
], ids=str)
def test_what_no_shape_says_is_in_the_config_beside_a_hugging_face_file(tmp_path, told, message):
    clip = make_published_clip()
    save_file(to_huggingface(clip), tmp_path / "model.safetensors")
    assert "64 wide" in weights.load_clip(tmp_path / "model.safetensors").info["heads"]
    (tmp_path / "config.json").write_text(told if isinstance(told, str) else json.dumps(told))
    if message:
        with pytest.raises(WeightsError, match=message):
            weights.load_clip(tmp_path / "model.safetensors")
        return
    config = replace(clip.config, vision_heads=4, text_heads=8) if "vision_config" in told else clip.config
    assert weights.load_clip(tmp_path / "model.safetensors").config == config


@pytest.mark.parametrize("name", ["ViT-B/16", "weights/ViT-B-16.pt", "ViT-B-16"])
def test_a_clip_that_is_not_there_yet(name):
    assert download.spelled("ViT-B-16.pt") == download.spelled("ViT-B-16") == download.spelled("ViT-B/16") == "ViT-B/16"
    with pytest.raises(WeightsError, match="`python -m hivg.weights fetch ViT-B/16` gets it, as weights/ViT-B-16.pt"):
        weights.load_clip(name)


# --- the merge table beside the weights ---


@pytest.mark.parametrize("table", TABLES)
def test_table_beside_the_weights(tmp_path, table):
    save_file(to_huggingface(make_published_clip()), tmp_path / "model.safetensors")
    TABLES[table](tmp_path / table)
    loaded = weights.load_clip(tmp_path / "model.safetensors")
    assert loaded.tokenizer.merges == make_tokenizer().merges
    assert torch.equal(loaded.tokenizer(TEXTS), make_tokenizer()(TEXTS))


def test_table_beside_our_own_file_that_has_none(tmp_path):
    save_file(to_huggingface(make_published_clip()), tmp_path / "model.safetensors")
    clip = weights.load_clip(tmp_path / "model.safetensors")
    weights.save(tmp_path / "ours.safetensors", clip)
    assert weights.load_clip(tmp_path / "ours.safetensors").tokenizer is None
    save_merges(tmp_path / "merges.txt")
    assert weights.load_clip(tmp_path / "ours.safetensors").tokenizer.merges == make_tokenizer().merges


def test_table_of_another_kind_is_passed_over(tmp_path, monkeypatch):
    """A folder of downloads holds other models' tokenizers too. One that cannot be read is told only if none fits, here
    or in weights/."""
    monkeypatch.setattr("hivg.weights.reading.FOLDER", tmp_path / "weights")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {}}}))
    save_file(to_huggingface(make_published_clip()), tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="tokenizer.json: not a merge table"):
        weights.load_clip(tmp_path / "model.safetensors")
    (tmp_path / "weights").mkdir()
    save_table(tmp_path / "weights" / download.TABLE)
    assert weights.load_clip(tmp_path / "model.safetensors").tokenizer.merges == make_tokenizer().merges


def test_table_of_another_vocabulary_is_not_taken(tmp_path):
    clip = make_published_clip(vocab_size=make_tokenizer().vocab_size + 1)
    save_file(to_huggingface(clip), tmp_path / "model.safetensors")
    save_table(tmp_path / download.TABLE)
    loaded = weights.load_clip(tmp_path / "model.safetensors")
    assert loaded.tokenizer is None
    with pytest.raises(WeightsError, match="merge table"):
        weights.need_tokenizer(loaded, "model.safetensors")


# --- the golden files ---


@needs_golden
@pytest.mark.parametrize("kind", ["openai", "hf"])
def test_golden_clip(kind):
    clip = weights.load_clip(GOLDEN / f"{kind}_clip_tiny.checkpoint.safetensors")
    expected = {}
    for name, tensor in load_file(GOLDEN / f"{kind}_clip_tiny.expected.safetensors").items():
        expected[name] = tensor.float() if tensor.is_floating_point() else tensor.long()
    images = expected.pop("image")
    ids = expected.pop("token_ids")
    with torch.no_grad():
        image_features = clip.encode_image(images)
        text_features = clip.encode_text(ids)
        vision = clip.visual(images)  # the hidden states after each block
        text = clip.text(ids)
        logits = similarity(text_features, image_features, clip.logit_scale)
    found = {
        "image_features": image_features, "text_features": text_features,
        "image_embeds": F.normalize(image_features, dim=-1), "text_embeds": F.normalize(text_features, dim=-1),
        "logits_per_text": logits, "logits_per_image": logits.T,
    }
    for tower, states in (("vision", vision), ("text", text)):
        found |= {f"{tower}_hidden_first": states[0], f"{tower}_hidden_2": states[1],
                  f"{tower}_hidden_last": states[-1]}
    assert expected and expected.keys() <= found.keys()
    for name, tensor in expected.items():
        assert_close(name, found[name], tensor, 1e-5)
