"""The bridge: its fusion against a loop, the identity it starts as, and what it may and may not look at."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from makers import OUTPUTS, TEXTS, assert_close, assert_same_output, make_batch, make_hivg, raising, random, randomise

from hivg.bridge import KINDS, Bridge
from hivg.clip import similarity
from hivg.fusion import HAS_TRITON, adaptive_fusion, adaptive_fusion_reference, choose_backend, triton_works


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


def test_fusion_backend():
    arguments = fusion_arguments(2, 1, 3, 4, 3)
    with pytest.raises(ValueError, match="auto, reference or triton, not 'fastest'"):
        adaptive_fusion(*arguments, backend="fastest")
    assert choose_backend("cpu") == "reference"
    assert torch.equal(adaptive_fusion(*arguments), adaptive_fusion(*arguments, backend="reference"))


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is for Linux")
def test_fusion_without_a_c_compiler(monkeypatch, capsys):
    """Where Triton cannot compile the C program with which it launches, the model runs in plain PyTorch and says so."""
    import triton.runtime

    failing = raising(RuntimeError("Failed to find C compiler"))
    for utils, backend, said in ((lambda: None, "triton", ""), (failing, "reference", "install gcc")):
        triton_works.cache_clear()
        driver = type("Driver", (), {"utils": property(lambda self, utils=utils: utils())})()
        monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=driver))
        assert [choose_backend("cuda"), choose_backend("cuda")] == [backend, backend]
        printed = capsys.readouterr().err
        assert said in printed and printed.count("\n") == bool(said)
    triton_works.cache_clear()


# --- one bridge ---


def make_bridge(kind="adaptive", K=2, text_norm=True):
    torch.manual_seed(0)
    return randomise(Bridge(kind, 12, K, 16, 2, context_length=9, text_norm=text_norm)).double().eval()


@pytest.mark.parametrize("kind", KINDS[:3])
def test_fresh_bridge_is_the_identity(kind):
    torch.manual_seed(0)
    bridge = Bridge(kind, 12, 2, 16, 2, 9).double()
    x = random(3, 5, 16)
    is_key = torch.ones(3, 4, dtype=torch.bool)
    keys = bridge.keys(random(2, 3, 4, 12), random(3, 4, 16))
    assert torch.equal(bridge(x, keys, is_key), x)
    assert kind != "adaptive" or not bridge.adaptive_weights.any()  # f*^i = f^i
    assert not torch.equal(randomise(bridge)(x, keys, is_key), x)


@pytest.mark.parametrize("text_norm", [True, False])
@pytest.mark.parametrize("K", [1, 2, 3])
def test_bridge_formula(K, text_norm):
    """x + FFN(CrossAttention(LN(x), keys = values = f*^ml)), a sample at a time, on its own words alone."""
    bridge = make_bridge(K=K, text_norm=text_norm)
    x = random(3, 5, 16)
    states = random(K, 3, 6, 12, seed=1)
    lengths = (6, 2, 4)
    is_key = torch.arange(6) < torch.tensor(lengths)[:, None]
    assert (bridge.norm_weight is not None) == text_norm
    y = bridge(x, bridge.keys(states), is_key)
    for b, n in enumerate(lengths):
        fused = fusion_loop(states[:, b : b + 1, :n], bridge.adaptive_weights[:, :n], bridge.proj.weight,
                            bridge.proj.bias, bridge.norm_weight, bridge.norm_bias)
        normed = nn.functional.layer_norm(x[b : b + 1], (16,), bridge.ln.weight, bridge.ln.bias)
        expected = x[b : b + 1] + bridge.mlp(bridge.attn(normed, fused))
        assert_close(f"sample {b}", y[b], expected[0], 1e-10)


def test_no_mask_means_every_position():
    """As the released code has it."""
    bridge = make_bridge()
    x = random(2, 5, 16)
    keys = bridge.keys(random(2, 2, 4, 12, seed=1))
    everything = torch.ones(2, 4, dtype=torch.bool)
    assert torch.equal(bridge(x, keys, None), bridge(x, keys, everything))
    assert not torch.allclose(bridge(x, keys, everything.tril(1)), bridge(x, keys, None), atol=1e-4)


def test_a_constant_has_no_padding():
    """All its rows are looked at, however many words there are."""
    bridge = make_bridge("constant")
    x = random(2, 5, 16)
    keys = bridge.keys(random(2, 2, 4, 12))
    assert keys.shape == (2, 9, 16)
    assert torch.equal(keys[0], bridge.constant) and torch.equal(keys[1], bridge.constant)
    assert torch.equal(bridge(x, keys, torch.ones(2, 4, dtype=torch.bool)), bridge(x, keys, None))


# --- in the model ---


@pytest.mark.parametrize("kind", KINDS)
def test_training_starts_from_clip(kind, batch):
    model = make_hivg(bridge=kind, fresh=True)
    clip = model.clip
    images, _, token_ids = batch
    output = model(*batch)
    assert torch.equal(output.image_features, clip.encode_image(images))
    assert_close("text_features", output.text_features, clip.encode_text(token_ids), 1e-10)
    expected = similarity(clip.encode_text(token_ids), clip.encode_image(images), clip.logit_scale)
    assert_close("logits_per_text", output.logits_per_text, expected, 1e-10)
    for bridge in model.bridges.values():
        randomise(bridge)
    changed = (model(*batch).image_features - output.image_features).abs().max() > 1e-3
    assert changed == (kind != "none")


@pytest.mark.parametrize("kind", KINDS)
def test_text_steers_the_image(kind):
    """Another expression gives other image features, unless the bridge looks at a constant or is not there."""
    model = make_hivg(bridge=kind)
    images, padding_mask, token_ids = make_batch()
    first = model(images, padding_mask, token_ids)
    second = model(images, padding_mask, token_ids.roll(1, 0))
    difference = (first.image_features - second.image_features).abs().max().item()
    assert difference > 1e-3 if kind in ("adaptive", "projected") else difference == 0
    assert (first.boxes - second.boxes).abs().max() > 1e-4  # the grounding encoder reads the text in any case


@pytest.mark.parametrize("kind", KINDS)
def test_what_follows_the_end_token_changes_nothing(kind):
    model = make_hivg(bridge=kind, stage=1)
    images, padding_mask, token_ids = make_batch()
    before = model(images, padding_mask, token_ids, with_patch_boxes=True, with_reg_attention=True)
    ends = token_ids.argmax(1, keepdim=True)
    behind = torch.arange(token_ids.shape[1]) > ends
    noise = torch.randint(0, 500, token_ids.shape, generator=torch.Generator().manual_seed(0))
    token_ids = torch.where(behind, noise, token_ids)
    after = model(images, padding_mask, token_ids, with_patch_boxes=True, with_reg_attention=True)
    assert_same_output(after, before, names=(*OUTPUTS, "patch_boxes"))
    inside = token_ids.clone()
    inside[:, 1] = 0  # a real token, "!", although padding is written so too
    assert (model(images, padding_mask, inside).boxes - before.boxes).abs().max() > 1e-4


@pytest.mark.parametrize("text_layers", [(2,), (1,), (1, 2), (2, 1)])
def test_text_layers(text_layers):
    """Each bridge fuses the outputs of exactly these text blocks, counted from 1, in this order."""
    model = make_hivg(text_layers=text_layers)
    _, _, token_ids = make_batch(TEXTS[:2])
    states = model.clip.text(token_ids)
    keys = model.bridge_keys(states, None)
    used = torch.stack([states[layer - 1] for layer in text_layers])
    assert set(keys) == {"0", "2"}
    for block, bridge in model.bridges.items():
        assert_close(f"keys of block {block}", keys[block], bridge.keys(used), 1e-10)


def test_projected_text():
    """The projected final text feature, the same for every bridge, each position by itself."""
    model = make_hivg(bridge="projected")
    images, padding_mask, token_ids = make_batch(TEXTS[3:])
    text = model.clip.text
    projected = model.bridge_text_proj(text.ln_final(text(token_ids)[-1]) @ text.text_projection)
    states = model.clip.visual(images, model.bridges, {"0": projected, "2": projected})
    output = model(images, padding_mask, token_ids)
    assert_close("image_features", output.image_features, model.clip.visual.pool(states[-1]), 1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_without_bridges_every_parameter_has_a_gradient(kind, batch):
    """Data parallelism stops for a parameter that is in no output, such as a projection for bridges that are not."""
    model = make_hivg(bridge=kind, bridge_blocks=())
    output = model(*batch)
    terms = (output.boxes, output.token_similarity, output.mask_logits, output.image_features)
    sum(term.sum() for term in terms).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(kind):
    """The blocks, bridges and all, run twice and give what they gave at once, dropout included."""
    model = make_hivg(bridge=kind, stage=1).train()
    batch = make_batch()
    runs = []
    for bridge in model.bridges.values():
        bridge.register_forward_hook(lambda module, args, out: runs.append(module))
    gradients = []
    for on in (False, True):
        model.clip.visual.recompute = on
        model.zero_grad()
        runs.clear()
        torch.manual_seed(0)  # dropout
        output = model(*batch)
        (output.boxes.sum() + output.token_similarity.sum() + output.image_features.sum()).backward()
        assert len(runs) == len(model.bridges) * (2 if on else 1)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        assert_close(name, gradients[1][name], gradients[0][name], 1e-10)
