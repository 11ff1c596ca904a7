"""HiVG as a whole: a prediction depends on its own sample only, and each output is what its description says."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from makers import TEXTS, assert_close, make_batch, make_clip, make_config, make_hivg, randomise

from hivg.bridge import KINDS
from hivg.clip import CLIP_SIZES
from hivg.lora import MODES
from hivg.model import EncoderLayer, HiVG, HiVGConfig, HiVGOutput

PER_SAMPLE = ("boxes", "token_similarity", "mask_logits", "text_features", "image_features")


def assert_same(a, b, tol=1e-10, names=(*PER_SAMPLE, "logits_per_text")):
    for name in names:
        assert_close(name, getattr(a, name), getattr(b, name), tol)


def rows(output, index):
    """The output of some samples of a batch."""
    return HiVGOutput(**{name: getattr(output, name)[index] for name in PER_SAMPLE},
                      logits_per_text=output.logits_per_text[index][:, index])


# --- one sample's prediction is its own ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_batch_changes_nothing(kind, dtype, tol):
    """Batch size, order, neighbours, and neighbours with a longer text, by which the rows are padded."""
    model = make_hivg(bridge=kind, stage=1, dtype=dtype)
    images, padding_mask, token_ids = batch = make_batch(dtype=dtype)
    together = model(*batch)
    for i, length in enumerate(token_ids.argmax(1) + 1):
        alone = model(images[i : i + 1], padding_mask[i : i + 1], token_ids[i : i + 1, :length])
        assert_same(rows(together, [i]), alone, tol, ("boxes",) if dtype == torch.float32 else PER_SAMPLE)
    order = [2, 0, 3, 1]
    assert_same(model(*(x[order] for x in batch)), rows(together, order), tol)
    assert_same(model(*(x[[0, 0, 2]] for x in batch)), rows(together, [0, 0, 2]), tol)
    assert (together.boxes[0] - together.boxes[1]).abs().max() > 1e-3  # else nothing was tested


@pytest.mark.parametrize("kind", KINDS)
def test_padding_of_the_text_changes_nothing(kind, batch):
    model = make_hivg(bridge=kind)
    images, padding_mask, token_ids = batch
    padded = model.tokenizer(TEXTS, pad_to="context")
    assert padded.shape[1] == 77 > token_ids.shape[1]
    assert_same(model(images, padding_mask, padded), model(*batch))


def watch(model, name, run, batch):
    """The arguments that a method of the model is called with while it runs on a batch."""
    method, calls = getattr(model, name), []
    model.__dict__[name] = lambda *args: (calls.append(args), method(*args))[1]
    try:
        run(*batch)
    finally:
        del model.__dict__[name]
    assert len(calls) == 1
    return calls[0]


def test_what_counts_as_padding(hivg, batch):
    """A patch is padding when more than half of it is; [CLS] never is; the text ends with its end token."""
    _, _, is_visual, is_text = watch(hivg, "encode", hivg, batch)
    landscape = [[0] * 4, [1] * 4, [1] * 4, [0] * 4]  # padded up to pixel row 20 and from 44 on
    portrait = [[1, 1, 1, 0]] * 4  # padded up to column 5 and from 40 on, the middle of patch 2
    grids = torch.tensor([landscape, portrait, [[1] * 4] * 4, landscape]).bool()
    assert torch.equal(is_visual[:, 1:].view(4, 4, 4), grids)
    assert is_visual[:, 0].all()
    assert is_text.sum(1).tolist() == [len(hivg.tokenizer.encode(text)) + 2 for text in TEXTS]
    assert is_text[:, 0].all() and (is_text.int().diff(dim=1) <= 0).all()


def test_padding_is_masked_in_the_encoder(hivg, batch):
    """What padded tokens hold reaches no other token; what the others hold does."""
    visual, text, is_visual, is_text = watch(hivg, "encode", hivg, batch)
    before = hivg.encode(visual, text, is_visual, is_text)
    noise = torch.randn(visual.shape[2], dtype=torch.float64)
    padded_visual, padded_text = ~is_visual[..., None], ~is_text[..., None]
    assert padded_visual.any() and padded_text.any()
    changed = hivg.encode(visual + noise * padded_visual, text + noise * padded_text, is_visual, is_text)
    for name, a, b, keep in zip(("[REG]", "patches", "words"), changed, before, (..., is_visual[:, 1:], is_text)):
        assert_close(name, a[keep], b[keep], 1e-10)
    reg = hivg.encode(visual + noise * is_visual[..., None], text, is_visual, is_text)[0]
    assert (reg - before[0]).abs().max() > 1e-3
    reg = hivg.encode(visual, text + noise * is_text[..., None], is_visual, is_text)[0]
    assert (reg - before[0]).abs().max() > 1e-3


def test_encoder_layer_is_pytorchs():
    """But for the position embedding, which joins the queries and keys only."""
    torch.manual_seed(0)
    ours = randomise(EncoderLayer(24, 3, 40, 0.1)).double().eval()
    theirs = nn.TransformerEncoderLayer(24, 3, 40, activation="relu", norm_first=True, batch_first=True).double().eval()
    a = ours.attn
    attention = {"in_proj_weight": torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight]),
                 "in_proj_bias": torch.cat([a.q_proj.bias, a.k_proj.bias, a.v_proj.bias]),
                 "out_proj.weight": a.out_proj.weight, "out_proj.bias": a.out_proj.bias}
    state = {"self_attn." + name: p for name, p in attention.items()}
    theirs.load_state_dict(state | {k: p for k, p in ours.state_dict().items() if not k.startswith("attn.")})
    x, position = torch.randn(2, 6, 24).double(), torch.randn(6, 24).double()
    keep = torch.arange(6) < torch.tensor([6, 4])[:, None]
    expected = theirs(x, src_key_padding_mask=~keep)
    assert_close("no position", ours(x, torch.zeros(6, 24).double(), keep[:, None, None]), expected, 1e-10)

    y = ours.norm1(x)
    attended, _ = theirs.self_attn(y + position, y + position, y, key_padding_mask=~keep)
    expected = x + attended
    expected = expected + ours.linear2(ours.linear1(ours.norm2(expected)).relu())
    assert_close("position", ours(x, position, keep[:, None, None]), expected, 1e-10)


def test_encoder_order(hivg, batch):
    """[REG], visual, text, with the position table in that order, and the parts handed back from where they were."""
    visual, text, is_visual, is_text = watch(hivg, "encode", hivg, batch)
    x = torch.cat([hivg.reg_token.expand(4, 1, -1), visual, text], 1)
    mask = torch.cat([torch.ones(4, 1).bool(), is_visual, is_text], 1)[:, None, None]
    for layer in hivg.encoder:
        x = layer(x, hivg.position[: x.shape[1]], mask)
    x = F.layer_norm(x, (32,), hivg.encoder_norm.weight, hivg.encoder_norm.bias)
    parts = hivg.encode(visual, text, is_visual, is_text)
    for name, ours, expected in zip(("[REG]", "patches", "words"), parts, (x[:, 0], x[:, 2:18], x[:, 18:])):
        assert_close(name, ours, expected, 1e-10)


def test_dropout_is_for_training_only(batch):
    model = make_hivg(stage=1)
    assert_same(model(*batch), model(*batch), 0)
    model.train()
    assert not torch.allclose(model(*batch).boxes, model(*batch).boxes, atol=1e-4)


def test_encoder_drops_out_attention_too():
    torch.manual_seed(0)
    layer, x = randomise(EncoderLayer(8, 2, 16, 0.5)), torch.randn(1, 5, 8)
    layer.dropout = nn.Identity()  # leaves the attention's
    arguments = x, torch.zeros(5, 8), torch.ones(1, 1, 1, 5, dtype=torch.bool)
    assert not torch.equal(layer.train()(*arguments), layer(*arguments))
    assert torch.equal(layer.eval()(*arguments), layer(*arguments))


# --- the heads ---


@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (1, 5)])
def test_mask_head_is_three_convolutions(hivg, grid):
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(3, grid[0] * grid[1], 32, generator=generator, dtype=torch.float64)
    end = F.normalize(torch.randn(3, 32, generator=generator, dtype=torch.float64), dim=-1)
    x = patches.transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
    for conv in hivg.mask_convs:
        x = conv(x)
    expected = torch.einsum("bdyx,bd->byx", x, end)[:, None]
    assert expected.shape == (3, 1, 8 * grid[0], 8 * grid[1])
    assert_close("mask_logits", hivg.mask_head(patches, end, grid), expected, 1e-10)


def test_token_map(hivg, batch):
    patches, end = watch(hivg, "rtcc", hivg, batch)
    assert_close("length of the end token", end.norm(dim=-1), torch.ones(4).double(), 1e-10)
    logits = hivg.rtcc(patches, end)
    for b in range(4):
        for p in range(16):
            expected = hivg.rtcc_mlp(hivg.rtcc_norm(patches[b, p])) @ end[b]
            assert_close(f"token map at {b}, {p}", logits[b, p], expected, 1e-10)


def test_end_token_is_the_texts_own(hivg, batch):
    """The heads get the encoder's output at each row's end token."""
    images, padding_mask, token_ids = batch
    _, _, words = hivg.encode(*watch(hivg, "encode", hivg, batch))
    _, end = watch(hivg, "rtcc", hivg, batch)
    ends = (token_ids == hivg.tokenizer.eot_id).int().argmax(1)
    assert_close("end token", end, F.normalize(words[range(4), ends], dim=-1), 1e-10)


@pytest.mark.parametrize("level_norm", [True, False])
def test_levels_are_the_blocks_of_the_config(batch, level_norm):
    """Hidden states after these vision blocks, counted from 1, in this order, each normalised or not, projected
    twice."""
    model = make_hivg(bridge="none", visual_levels=(3, 1), level_norm=level_norm)
    visual, text, _, _ = watch(model, "encode", model, batch)
    _, states = model.clip.encode_image(batch[0], return_hidden_states=True)
    levels = [states[2], states[0]]
    if level_norm:
        levels = [(x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() for x in levels]
    expected = model.visual_proj(model.levels_proj(torch.cat(levels, -1)))
    assert_close("visual tokens", visual, expected, 1e-10)
    _, states = model.clip.encode_text(batch[2], return_hidden_states=True)
    assert_close("text tokens", text, model.text_proj(model.clip.text.project(states[-1])), 1e-10)


def test_box_is_a_sigmoid_of_the_reg_token(hivg, batch):
    reg, _, _ = hivg.encode(*watch(hivg, "encode", hivg, batch))
    a, b, c = (layer for layer in hivg.box_head if isinstance(layer, nn.Linear))
    assert_close("boxes", hivg(*batch).boxes, torch.sigmoid(c(b(a(reg).relu()).relu())), 1e-10)


@pytest.mark.parametrize("n", [1, 4])
def test_shapes(hivg, n):
    output = hivg(*(x[:n] for x in make_batch()))
    shapes = {"boxes": (n, 4), "token_similarity": (n, 16), "mask_logits": (n, 1, 32, 32), "logits_per_text": (n, n),
              "text_features": (n, 40), "image_features": (n, 40)}
    assert {name: tuple(tensor.shape) for name, tensor in vars(output).items()} == shapes
    assert ((output.boxes > 0) & (output.boxes < 1)).all()


def test_logits_per_text(hivg, batch):
    output = hivg(*batch)
    cosine = F.cosine_similarity(output.text_features[:, None], output.image_features[None], dim=-1)
    assert_close("logits_per_text", output.logits_per_text, hivg.clip.logit_scale.exp() * cosine, 1e-10)


@pytest.mark.parametrize("off", ["with_rtcc", "with_mask"])
def test_heads_can_be_left_out(hivg, batch, off):
    output, whole = hivg(*batch, **{off: False}), hivg(*batch)
    left_out = {"with_rtcc": "token_similarity", "with_mask": "mask_logits"}[off]
    assert getattr(output, left_out) is None
    assert_same(output, whole, 0, [name for name in vars(whole) if name != left_out])


# --- the score ---


def score(boxes, token_similarity, grid):
    output = HiVGOutput(boxes, token_similarity, None, None, None, None)
    return HiVG.score(output, grid)


def test_score_of_perfect_agreement():
    """A box of whole patches and a map that is sure of exactly these; on a grid that is not square."""
    boxes = torch.tensor([[2 / 5, 0.5, 2 / 5, 1.0], [0.5, 0.5, 1.0, 1.0], [0.9, 0.25, 0.2, 0.5]])
    maps = torch.tensor([[[0, 1, 1, 0, 0], [0, 1, 1, 0, 0]], [[1] * 5, [1] * 5], [[0, 0, 0, 0, 1], [0] * 5]])
    logits = (maps.flatten(1) * 2 - 1) * 40.0
    assert_close("score", score(boxes, logits, (2, 5)), torch.ones(3), 1e-5)
    assert_close("score of the opposite", score(boxes, -logits, (2, 5)), torch.zeros(3), 1e-5)


def test_score_on_paper():
    """Grid 2 x 2, box over the left column and half of the right: shares 1, 0.5; everywhere p = 0.75.
    sum min = 2 (0.75 + 0.5), sum max = 2 (1 + 0.75)."""
    logits, boxes = torch.full((1, 4), 0.75).logit(), torch.tensor([[0.375, 0.5, 0.75, 1.0]])
    assert_close("score", score(boxes, logits, (2, 2)), torch.tensor([2.5 / 3.5]), 1e-6)


def test_score_is_in_0_to_1(hivg, batch):
    generator = torch.Generator().manual_seed(0)
    boxes, logits = torch.rand(200, 4, generator=generator), 9 * torch.randn(200, 12, generator=generator)
    scores = score(boxes, logits, (3, 4))
    assert scores.shape == (200,) and (scores >= 0).all() and (scores <= 1).all() and scores.std() > 0.01
    assert hivg.score(hivg(*batch), (4, 4)).shape == (4,)


# --- the configuration and the whole ---


@pytest.mark.parametrize("mode, stage", [("hierarchical", 3), ("hierarchical", 1), ("shared", 2), ("vanilla", 1)])
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_merged(mode, stage, dtype, tol):
    model, batch = make_hivg(lora=mode, stage=stage, dtype=dtype), make_batch(dtype=dtype)
    merged, output = model.merged(), model(*batch)
    assert_same(merged(*batch), output, tol, ("boxes",) if dtype == torch.float32 else PER_SAMPLE)
    assert (merged.config.lora, merged.config.stage, model.config.stage) == ("none", 0, stage)
    assert HiVG(merged.config).state_dict().keys() == merged.state_dict().keys()
    assert_same(model(*batch), output, 0)


def test_config_survives_json(hivg):
    tiny = HiVGConfig.for_clip(CLIP_SIZES["tiny"], bridge="constant", lora="shared")
    for config in (HiVGConfig(), hivg.config, tiny):
        assert HiVGConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_config_and_weights_are_the_model(kind, mode, batch):
    """What a weights file holds, the configuration and the tensors, is all there is to a model."""
    model = make_hivg(bridge=kind, lora=mode, stage=2)
    again = HiVG(HiVGConfig.from_dict(json.loads(json.dumps(model.config.to_dict())))).double().eval()
    again.load_state_dict(model.state_dict())
    assert_same(again(*batch), model(*batch), 0)
    trained = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert trained[0] == trained[1]


def test_levels_start_as_clips_projection():
    clip = make_clip(dtype=torch.float32)
    model = HiVG.from_clip(clip, make_config(clip, visual_levels=(1, 2, 3)))
    x = torch.randn(3, 5, 64)
    expected = sum(level @ clip.visual.proj for level in x)
    assert_close("levels_proj", model.levels_proj(torch.cat([*x], -1)), expected, 1e-5)
    assert all(torch.equal(p, model.clip.state_dict()[name]) for name, p in clip.state_dict().items())


@pytest.mark.parametrize("size, blocks, levels, text", [
    ("ViT-B/16", (0, 3, 7, 11), (1, 4, 8, 12), (12,)), ("ViT-L/14", (4, 10, 16, 22), (6, 12, 18, 24), (12,)),
    ("tiny", (1, 3, 5), (1, 2, 4, 6), (2, 4))])
def test_layers_for_a_clip(size, blocks, levels, text):
    config = HiVGConfig.for_clip(CLIP_SIZES[size])
    assert (config.bridge_blocks, config.visual_levels, config.text_layers) == (blocks, levels, text)
    assert config.clip == CLIP_SIZES[size]
    changes = dict(text_layers=(1, 2), width=8)
    assert HiVGConfig.for_clip(CLIP_SIZES[size], **changes) == replace(config, **changes)


@pytest.mark.parametrize("wrong, message", [
    (dict(bridge="Adaptive"), "adaptive, projected, constant, none"),
    (dict(lora="lora"), "hierarchical, shared, vanilla, none")])
def test_unknown_names(wrong, message):
    with pytest.raises(ValueError, match=message):
        HiVGConfig(**wrong)


def test_unknown_depth():
    with pytest.raises(ValueError, match="ViT of 5 layers; known: 6, 12, 24"):
        HiVGConfig.for_clip(replace(CLIP_SIZES["tiny"], vision_layers=5))
