"""Released HiVG checkpoints, in files made here in the published format, and the golden files, where they are."""

import dataclasses

import pytest
import torch
from makers import GOLDEN, assert_close, needs_golden
from makers_weights import (
    BASE_MODEL,
    assert_same_weights,
    make_published_clip,
    make_released,
    message_of,
    prefixed,
    save_legacy,
    to_released,
)
from safetensors.torch import load_file

from hivg import weights
from hivg.clip import resize_positions

# fields of our configuration, entries of the checkpoint's `args`
KINDS = {
    "one text layer": ({}, {}), "two": (dict(text_layers=(6, 12)), dict(dataset="unc+")),
    "two, referit": (dict(text_layers=(6, 12)), dict(dataset="referit")),
    "twelve": (dict(text_layers=tuple(range(1, 13))), dict(dataset="gref_umd")),
    "twelve, google": (dict(text_layers=tuple(range(1, 13))), dict(dataset="gref")),
    "warm-up of large": (dict(bridge_blocks=()), dict(warmup=True)),
    "warm-up of large, as its script": (dict(bridge_blocks=()), dict(warmup=True, enable_adaptive_weights=False)),
    "warm-up of large, mixed": (dict(bridge="projected", bridge_blocks=()), dict(
        dataset="mixup", mixup_pretrain=True, enable_adaptive_weights=False, warmup=True)),
    "mixed": (dict(bridge="projected"), dict(dataset="mixup", mixup_pretrain=True, enable_adaptive_weights=False)),
    "mixed, of one data set": (dict(bridge="projected"), dict(dataset="unc+", mixup_pretrain=True)),
    "flickr, dropout 0": (dict(dropout=0.0), dict(dataset="flickr", vl_dropout=0.0)),
}


@pytest.fixture(scope="module")
def plain():
    """Do not change it."""
    return make_released()


@pytest.mark.parametrize("kind", KINDS)
def test_released_loads_exactly(tmp_path, kind):
    fields, args = KINDS[kind]
    model = make_released(**fields)
    torch.save(to_released(model, **args), tmp_path / "best_checkpoint.pth")
    loaded = weights.load_released(tmp_path / "best_checkpoint.pth")
    assert loaded.config == model.config
    assert_same_weights(loaded, model)
    assert loaded.info["args"]["dataset"] == args.get("dataset", "unc")


@pytest.mark.parametrize("wrapped", [0, 4])
def test_released_however_often_it_was_wrapped(tmp_path, plain, wrapped):
    torch.save(to_released(plain, prefix=BASE_MODEL * wrapped), tmp_path / "x.pth")
    assert_same_weights(weights.load_hivg(tmp_path / "x.pth"), plain)


@pytest.mark.parametrize("wrapper, prefix", [
    ("model", "module."), ("state_dict", ""), ("model_state_dict", "_orig_mod.")])
def test_released_as_other_programs_save_it(tmp_path, plain, wrapper, prefix):
    checkpoint = to_released(plain)
    tensors = prefixed(prefix, checkpoint.pop("model"))
    torch.save(checkpoint | {wrapper: tensors}, tmp_path / "x.pth")
    assert_same_weights(weights.load_hivg(tmp_path / "x.pth"), plain)
    torch.save(checkpoint | {wrapper: prefixed("module.module.", tensors)}, tmp_path / "x.pth")
    assert "tensors called module." in message_of(tmp_path / "x.pth")  # one prefix, not any number


@pytest.mark.parametrize("write", [torch.save, save_legacy])
def test_released_adapters_are_folded(tmp_path, plain, write):
    checkpoint = to_released(plain, adapters=True)
    assert sum("lora_A" in name for name in checkpoint["model"]) == 4 * (12 + 12 + 4)  # text, vision, bridges
    write(checkpoint, tmp_path / "x.pth")
    assert_same_weights(weights.load_released(tmp_path / "x.pth"), plain, tol=1e-6)


def test_released_with_the_names_of_later_peft(tmp_path, plain):
    """From 0.6 on PEFT calls the layer under an adapter base_layer."""
    checkpoint = to_released(plain, adapters=True)
    model = {}
    for name, value in checkpoint["model"].items():
        layer, _, kind = name.rpartition(".")
        is_adapted = f"{layer}.lora_A.default.weight" in checkpoint["model"]
        model[f"{layer}.base_layer.{kind}" if is_adapted else name] = value
    assert sum(".base_layer." in name for name in model) == 2 * 4 * (12 + 12 + 4)
    torch.save(checkpoint | {"model": model}, tmp_path / "x.pth")
    assert_same_weights(weights.load_released(tmp_path / "x.pth"), plain, tol=1e-6)


def test_released_with_norms_after_each_part(tmp_path, plain):
    torch.save(to_released(plain, normalize_before=True), tmp_path / "before.pth")
    assert_same_weights(weights.load_released(tmp_path / "before.pth"), plain)
    torch.save(to_released(plain, normalize_before=False), tmp_path / "after.pth")
    assert "normalize_before=False" in message_of(tmp_path / "after.pth")


def test_an_adapter_that_does_not_fit_its_layer(tmp_path, plain):
    checkpoint = to_released(plain, adapters=True)
    name = next(name for name in checkpoint["model"] if "lora_A" in name)
    checkpoint["model"][name] = torch.zeros(32, 5)
    torch.save(checkpoint, tmp_path / "x.pth")
    assert "the adapter of" in message_of(tmp_path / "x.pth")


def test_large_and_its_layers(tmp_path):
    clip = make_published_clip(vision_layers=24, text_layers=12, patch_size=32, vision_width=64, vision_heads=1).config
    model = make_released(clip=clip, bridge_blocks=(4, 10, 16, 22), visual_levels=(6, 12, 18, 24))
    torch.save(to_released(model, model="ViT-L/14"), tmp_path / "large.pth")
    loaded = weights.load_released(tmp_path / "large.pth")
    assert loaded.config == model.config
    assert_same_weights(loaded, model)


def test_mixed_file_may_hold_unused_parts_of_the_bridge(tmp_path):
    """The published mixed checkpoints carry a gate and adaptive weights that mixed pre-training never touches."""
    model = make_released(bridge="projected")
    checkpoint = to_released(model, dataset="mixup", mixup_pretrain=True, enable_adaptive_weights=False)
    for block in (0, 3, 7, 11):
        layer = f"clip.{BASE_MODEL}vision_model.encoder.layers.{block}."
        checkpoint["model"][layer + "cross_gate.weight"] = torch.zeros(2, 2)
        checkpoint["model"][layer + "cross_gate.bias"] = torch.zeros(2)
        checkpoint["model"][layer + "cross_adaptive_weights.0.weight"] = torch.zeros(77, 2)
    torch.save(checkpoint, tmp_path / "mixed.pth")
    assert_same_weights(weights.load_released(tmp_path / "mixed.pth"), model)


def test_released_without_adaptive_weights_reads_the_text_itself(tmp_path):
    """The bridge's keys are the last text block's features: adaptive weights of 0 and the identity say so too."""
    clip = make_published_clip(vision_layers=12, text_layers=12, text_width=128, text_heads=2).config
    checkpoint = to_released(make_released(clip=clip), enable_adaptive_weights=False)
    for name in list(checkpoint["model"]):
        if "cross_gate" in name or "cross_adaptive" in name:
            del checkpoint["model"][name]
    torch.save(checkpoint, tmp_path / "raw.pth")
    loaded = weights.load_released(tmp_path / "raw.pth")
    assert loaded.config.text_layers == (12,) and list(loaded.bridges) == ["0", "3", "7", "11"]
    features = torch.randn(1, 2, 77, 128)  # (K, B, T, D_t)
    for bridge in loaded.bridges.values():
        adapted = features * bridge.adaptive_weights[:, None] + features
        assert torch.equal(bridge.proj(adapted[0]), features[0])


def test_released_image_of_another_size(tmp_path, plain):
    """imsize decides; the position table is resized once, as the program does in every forward."""
    wide = make_released(clip=dataclasses.replace(plain.config.clip, image_size=96))
    checkpoint = to_released(wide)
    table = plain.clip.visual.positional_embedding.detach()
    checkpoint["model"][f"clip.{BASE_MODEL}vision_model.embeddings.position_embedding.weight"] = table
    torch.save(checkpoint, tmp_path / "wide.pth")
    loaded = weights.load_released(tmp_path / "wide.pth")
    assert loaded.config == wide.config
    assert torch.equal(loaded.clip.visual.positional_embedding, resize_positions(table, (6, 6)))


# --- the golden files ---


@needs_golden
@pytest.mark.parametrize("name", ["base_unc_stage0", "base_uncplus_stage3", "base_mixup_stage0"])
def test_golden_released(name):
    """In float64, so that the only rounding is the reference's own: ours differs from machine to machine."""
    model = weights.load_released(GOLDEN / f"{name}.pth").double()
    expected = load_file(GOLDEN / f"{name}.expected.safetensors")
    images = expected["image"].double()
    padding = expected["padding_mask"].bool()
    ids = expected["token_ids"].long()
    alone = []
    with torch.no_grad():
        together = model(images, padding, ids)
        for i in range(len(images)):
            alone.append(model(images[i : i + 1], padding[i : i + 1], ids[i : i + 1]))
    assert_close("boxes", together.boxes, expected["pred_box"], 1e-6)
    assert_close("boxes alone", torch.cat([output.boxes for output in alone]), together.boxes, 1e-10)
    # one sample at a time, for the reference's own batch mixes the samples' texts
    logits = torch.cat([output.logits_per_text for output in alone])
    assert_close("logits_per_text", logits, expected["logits_per_text"], 1e-5)
    for field, key in (("token_similarity", "token_similarity"), ("mask_logits", "seg_mask")):
        for found in (getattr(together, field), torch.cat([getattr(output, field) for output in alone])):
            reference = expected[key].reshape(found.shape)
            # random weights make these logits up to 750; float32 itself knows them no better than 3e-6 of that
            largest = reference.abs().max()
            assert_close(field, found / largest, reference / largest, 3e-6)
