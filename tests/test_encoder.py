"""The grounding encoder: its layer against PyTorch's, the order of its tokens, and what it takes for padding."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from makers import TEXTS, assert_close, make_hivg, randomise, watch

from hivg.model import EncoderLayer


def test_what_counts_as_padding(hivg, batch):
    """A patch is padding when more than half of it is; [CLS] never is; the text ends with its end token."""
    _, _, is_visual, is_text, *_ = watch(hivg, "encode", hivg, batch)
    landscape = [[0] * 4, [1] * 4, [1] * 4, [0] * 4]  # padded up to pixel row 20 and from 44 on
    portrait = [[1, 1, 1, 0]] * 4  # padded up to column 5 and from 40 on, the middle of patch 2
    grids = torch.tensor([landscape, portrait, [[1] * 4] * 4, landscape]).bool()
    assert torch.equal(is_visual[:, 1:].view(4, 4, 4), grids)
    assert is_visual[:, 0].all()
    assert is_text.sum(1).tolist() == [len(hivg.tokenizer.encode(text)) + 2 for text in TEXTS]
    assert is_text[:, 0].all() and (is_text.int().diff(dim=1) <= 0).all()


def test_share_of_a_patch_that_is_padding(hivg):
    """As the released code resizes the mask: a triangle filter over each patch and half of its neighbours."""
    padding_mask = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    pixel = torch.arange(64) + 0.5
    centre = (torch.arange(4) + 0.5) * 16
    weights = (1 - (pixel - centre[:, None]).abs() / 16).clamp(min=0)  # (4, 64)
    weights = weights / weights.sum(1, keepdim=True)
    share = weights @ padding_mask.float() @ weights.T  # (3, 4, 4)
    assert torch.equal(hivg.find_visual(padding_mask, (4, 4))[:, 1:], (share <= 0.5).flatten(1))


def test_released_text_padding(batch):
    """All 77 positions are there, the bridge masks none, and the encoder masks id 0, also where it is a real token."""
    model = make_hivg(text_padding="released")
    images, padding_mask, token_ids = batch
    ids, is_text, is_key = model.find_text(token_ids)
    assert ids.shape == (4, 77) and torch.equal(ids[:, : token_ids.shape[1]], token_ids) and is_key is None
    assert torch.equal(is_text, ids != 0)
    _, text, _, mask, *_ = watch(model, "encode", model, batch)
    _, keys, key_mask, *_ = watch(model.bridges["0"], "forward", model, batch)
    assert keys.shape[1] == 77 and key_mask is None
    assert text.shape == (4, 77, 32) and torch.equal(mask, is_text)
    with_zero = token_ids.clone()
    with_zero[3, 2] = 0
    assert not model.find_text(with_zero)[1][3, 2] and make_hivg().find_text(with_zero)[1][3, 2]


def test_padding_of_any_length_is_found(hivg):
    short = hivg.tokenizer(TEXTS)  # (4, T)
    ids = F.pad(short, (0, 77 - short.shape[1]))
    same, is_text, is_key = hivg.find_text(ids)
    assert torch.equal(same, ids) and is_text.shape == (4, 77) and is_key is is_text
    assert is_text.sum(1).tolist() == [len(hivg.tokenizer.encode(text)) + 2 for text in TEXTS]


def test_padding_is_masked_in_the_encoder(hivg, batch):
    """The numbers of padded tokens reach no other token; those of the others do."""
    visual, text, is_visual, is_text, *_ = watch(hivg, "encode", hivg, batch)
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


def test_encoder_starts_as_detrs():
    """Xavier-uniform, as wide as sqrt(6 / (in + out)), and no biases; q, k and v as the one matrix that they are
    in PyTorch's attention. The tables of tokens are N(0, 1)."""
    model = make_hivg(fresh=True, width=64, encoder_ffn=256)
    for layer in model.encoder:
        joined = layer.attn.q_proj, layer.attn.k_proj, layer.attn.v_proj
        for linear in (*joined, layer.attn.out_proj, layer.linear1, layer.linear2):
            outputs = 3 * 64 if linear in joined else linear.out_features
            bound = (6 / (linear.in_features + outputs)) ** 0.5
            assert 0.98 * bound < linear.weight.abs().max() <= bound
            assert not linear.bias.any()
    assert 0.9 < model.position.std() < 1.1 and 0.7 < model.reg_token.std() < 1.3


def test_encoder_order(hivg, batch):
    """[REG], visual, text, with the position table in that order, and the parts handed back from where they were."""
    visual, text, is_visual, is_text, *_ = watch(hivg, "encode", hivg, batch)
    x = torch.cat([hivg.reg_token.expand(4, 1, -1), visual, text], 1)
    mask = torch.cat([torch.ones(4, 1).bool(), is_visual, is_text], 1)[:, None, None]
    for layer in hivg.encoder:
        x = layer(x, hivg.position[: x.shape[1]], mask)
    x = F.layer_norm(x, (32,), hivg.encoder_norm.weight, hivg.encoder_norm.bias)
    parts = hivg.encode(visual, text, is_visual, is_text)
    for name, ours, expected in zip(("[REG]", "patches", "words"), parts, (x[:, 0], x[:, 2:18], x[:, 18:])):
        assert_close(name, ours, expected, 1e-10)


def test_encoder_drops_out_attention_too():
    torch.manual_seed(0)
    layer, x = randomise(EncoderLayer(8, 2, 16, 0.5)), torch.randn(1, 5, 8)
    layer.dropout = nn.Identity()  # leaves the attention's
    arguments = x, torch.zeros(5, 8), torch.ones(1, 1, 1, 5, dtype=torch.bool)
    assert not torch.equal(layer.train()(*arguments), layer(*arguments))
    assert torch.equal(layer.eval()(*arguments), layer(*arguments))


def test_encoder_drops_out_both_branches():
    """And the hidden layer of the FFN; with everything dropped the stream is left."""
    layer = EncoderLayer(8, 2, 16, 1.0)
    seen = []
    layer.dropout.register_forward_hook(lambda module, args, out: seen.append(out.shape[-1]))
    x = torch.randn(1, 5, 8)
    y = layer(x, torch.zeros(5, 8), torch.ones(1, 1, 1, 5, dtype=torch.bool))
    assert torch.equal(y, x) and seen == [8, 16, 8]
