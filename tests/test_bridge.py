"""The bridge: its fusion against a loop, the identity it starts as, and what it may and may not look at."""

import pytest
import torch
import torch.nn as nn
from makers import TEXTS, assert_close, make_batch, make_clip, make_config, make_hivg, randomise

from hivg.bridge import KINDS, Bridge
from hivg.fusion import adaptive_fusion, adaptive_fusion_reference
from hivg.model import HiVG

TEXT_KINDS = ("adaptive", "projected")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fusion_arguments(K, B, T, D_t, D_v, norm=True):
    """Random arguments; the text layers differ in size and centre, as CLIP's do."""
    states = random(K, B, T, D_t) * torch.arange(1, K + 1).view(K, 1, 1, 1) + 0.5
    norms = (random(K, D_t, seed=4), random(K, D_t, seed=5)) if norm else (None, None)
    return states, random(K, T, D_t, seed=1), random(D_v, K * D_t, seed=2), random(D_v, seed=3), *norms


def fusion_loop(states, weights, proj_weight, proj_bias, norm_weight, norm_bias, eps=1e-5):
    """One sample, one position, one text layer at a time."""
    K, B, T, _ = states.shape
    result = torch.zeros(B, T, len(proj_bias), dtype=states.dtype)
    for b in range(B):
        for t in range(T):
            parts = []
            for k in range(K):
                f = states[k, b, t]
                if norm_weight is not None:
                    f = (f - f.mean()) / (f.var(correction=0) + eps).sqrt() * norm_weight[k] + norm_bias[k]
                parts.append(weights[k, t] * f + f)
            result[b, t] = proj_weight @ torch.cat(parts) + proj_bias
    return result


@pytest.mark.parametrize("fusion", [adaptive_fusion_reference, adaptive_fusion])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("K, B, T, D_t, D_v", [(1, 1, 1, 4, 3), (2, 3, 5, 6, 7), (4, 2, 7, 5, 11)])
def test_fusion_is_the_loop(K, B, T, D_t, D_v, norm, fusion):
    arguments = fusion_arguments(K, B, T, D_t, D_v, norm)
    assert_close("fusion", fusion(*arguments), fusion_loop(*arguments), 1e-10)
    assert_close("fusion, eps", fusion(*arguments, eps=0.3), fusion_loop(*arguments, eps=0.3), 1e-10)


def test_fusion_backend_name():
    with pytest.raises(ValueError, match="reference"):
        adaptive_fusion(*fusion_arguments(1, 1, 1, 4, 3), backend="fastest")


@pytest.mark.parametrize("norm", [True, False])
def test_text_norm_takes_the_size_of_a_layer_away(norm):
    states, *rest = fusion_arguments(2, 2, 3, 16, 5, norm)
    larger = states * torch.tensor([1.0, 30.0]).view(2, 1, 1, 1)
    difference = (adaptive_fusion(larger, *rest) - adaptive_fusion(states, *rest)).abs().max()
    assert difference < 1e-3 if norm else difference > 1


# --- one bridge ---


def make_bridge(kind="adaptive", K=2, text_norm=True):
    torch.manual_seed(0)
    return randomise(Bridge(kind, 12, K, 16, 2, context_length=9, text_norm=text_norm)).double().eval()


@pytest.mark.parametrize("kind", KINDS[:3])
def test_fresh_bridge_is_the_identity(kind):
    torch.manual_seed(0)
    bridge, x = Bridge(kind, 12, 2, 16, 2, 9).double(), random(3, 5, 16)
    mask = torch.ones(3, 4, dtype=torch.bool)
    s, key_mask = bridge.keys(random(2, 3, 4, 12), random(3, 4, 16), mask)
    assert torch.equal(bridge(x, s, key_mask), x)
    assert not torch.equal(randomise(bridge)(x, s, key_mask), x)


@pytest.mark.parametrize("text_norm", [True, False])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_bridge_formula(K, text_norm):
    """x + FFN(CrossAttention(LN(x), keys = values = s)), a sample at a time, on its own words alone."""
    bridge, x, states = make_bridge(K=K, text_norm=text_norm), random(3, 5, 16), random(K, 3, 6, 12, seed=1)
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    assert (bridge.norm_weight is not None) == text_norm
    y = bridge(x, *bridge.keys(states, None, mask))
    for b, n in enumerate((6, 2, 4)):
        s = fusion_loop(states[:, b : b + 1, :n], bridge.adaptive_weights[:, :n], bridge.proj.weight, bridge.proj.bias,
                        bridge.norm_weight, bridge.norm_bias)
        attended = bridge.attn(nn.functional.layer_norm(x[b : b + 1], (16,), bridge.ln.weight, bridge.ln.bias), s)
        assert_close(f"sample {b}", y[b], (x[b : b + 1] + bridge.mlp(attended))[0], 1e-10)


def test_every_text_layer_counts():
    bridge, x, states = make_bridge(K=3), random(1, 5, 16), random(3, 1, 4, 12, seed=1)
    mask = torch.ones(1, 4, dtype=torch.bool)
    before = bridge(x, *bridge.keys(states, None, mask))
    for k in range(3):
        changed = states.clone()
        changed[k] += random(1, 4, 12, seed=k + 2)
        assert (bridge(x, *bridge.keys(changed, None, mask)) - before).abs().max() > 1e-3, f"layer {k} has no effect"


# --- in the model ---


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_from_clip(kind, batch):
    clip = make_clip()
    torch.manual_seed(0)
    model = HiVG.from_clip(clip, make_config(clip, bridge=kind)).double().eval()
    images, _, token_ids = batch
    output = model(*batch)
    assert torch.equal(output.image_features, clip.encode_image(images))
    assert_close("text_features", output.text_features, clip.encode_text(token_ids), 1e-10)
    assert_close("logits_per_text", output.logits_per_text, clip.logits_per_text(images, token_ids), 1e-10)
    for bridge in model.bridges.values():
        randomise(bridge)
    changed = (model(*batch).image_features - output.image_features).abs().max() > 1e-3
    assert changed == (kind != "none")


@pytest.mark.parametrize("kind", KINDS)
def test_text_steers_the_picture(kind):
    """Another expression gives other picture features, unless the bridge looks at a constant or is not there."""
    model = make_hivg(bridge=kind)
    images, padding_mask, token_ids = make_batch()
    first = model(images, padding_mask, token_ids)
    second = model(images, padding_mask, token_ids.roll(1, 0))
    difference = (first.image_features - second.image_features).abs().max().item()
    if kind in TEXT_KINDS:
        assert difference > 1e-3
    else:
        assert difference == 0
    assert (first.boxes - second.boxes).abs().max() > 1e-4  # the grounding encoder reads the text in any case


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_the_end_token_changes_nothing(kind):
    model = make_hivg(bridge=kind, stage=1)
    images, padding_mask, token_ids = make_batch()
    before = model(images, padding_mask, token_ids)
    ends = token_ids.argmax(1, keepdim=True)
    behind = torch.arange(token_ids.shape[1]) > ends
    noise = torch.randint(0, 500, token_ids.shape, generator=torch.Generator().manual_seed(0))
    after = model(images, padding_mask, torch.where(behind, noise, token_ids))
    for name in vars(before):
        assert_close(name, getattr(after, name), getattr(before, name), 1e-10)

    inside = token_ids.clone()
    inside[:, 1] = 0  # a real token, "!", although padding is written so too
    assert (model(images, padding_mask, inside).boxes - before.boxes).abs().max() > 1e-4


@pytest.mark.parametrize("text_layers", [(2,), (1,), (1, 2), (2, 1)])
def test_text_layers(text_layers):
    """The bridge gets the outputs of exactly these text blocks, counted from 1, in this order."""
    model = make_hivg(text_layers=text_layers)
    images, padding_mask, token_ids = make_batch(TEXTS[:2])
    _, states = model.clip.encode_text(token_ids, return_hidden_states=True)
    seen = []
    for bridge in model.bridges.values():
        keys = bridge.keys
        bridge.keys = lambda text_states, projected, mask, keys=keys: (
            seen.append(text_states), keys(text_states, projected, mask))[1]
    model(images, padding_mask, token_ids)
    assert len(seen) == 2
    for given in seen:
        assert_close("text states", given, torch.stack([states[i - 1] for i in text_layers]), 1e-10)


def test_projected_text():
    """The projected final text feature, the same for every bridge, each position by itself."""
    model = make_hivg(bridge="projected")
    images, padding_mask, token_ids = make_batch(TEXTS[3:])
    text = model.clip.text
    _, states = model.clip.encode_text(token_ids, return_hidden_states=True)
    s = model.bridge_text_proj(text.ln_final(states[-1]) @ text.text_projection)
    mask = torch.ones(token_ids.shape, dtype=torch.bool)[:, None, None]
    bridges = {int(l): lambda x, bridge=bridge: bridge(x, s, mask) for l, bridge in model.bridges.items()}
    expected = model.clip.visual.pool(model.clip.visual(images, bridges)[-1])
    assert_close("image_features", model(images, padding_mask, token_ids).image_features, expected, 1e-10)


def test_bridges_stand_in_the_blocks_of_the_config(batch):
    for blocks in ((1,), (0, 2), ()):
        model = make_hivg(bridge_blocks=blocks)
        assert sorted(model.bridges) == sorted(map(str, blocks))
        model(*batch)
    assert len(make_hivg(bridge="none").bridges) == 0
