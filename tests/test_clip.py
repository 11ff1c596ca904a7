"""The hand-written CLIP against PyTorch's own attention and against formulas."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from makers import assert_close, random, randomise

from hivg.clip import (
    CLIP,
    MLP,
    Attention,
    CLIPConfig,
    QuickGELU,
    VisionTransformer,
    at_end_token,
    bounded_logit_scale,
    end_positions,
    resize_positions,
    similarity,
    sine_positions,
)

# --- the parts ---


@pytest.mark.parametrize("kind", ["self", "causal", "cross", "masked", "value"])
def test_attention_is_pytorchs(kind):
    torch.manual_seed(0)
    attention, reference = randomise(Attention(24, 3)).double(), nn.MultiheadAttention(24, 3, batch_first=True).double()
    qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
    reference.load_state_dict({
        "in_proj_weight": torch.cat([linear.weight for linear in qkv]).detach(),
        "in_proj_bias": torch.cat([linear.bias for linear in qkv]).detach(),
        "out_proj.weight": attention.out_proj.weight.detach(), "out_proj.bias": attention.out_proj.bias.detach()})
    x, y, z = random(2, 5, 24), random(2, 7, 24, seed=1), random(2, 7, 24, seed=2)
    keep = torch.arange(7) < torch.tensor([7, 4])[:, None]  # (B, M)
    ours, theirs = {
        "self": (attention(x), reference(x, x, x)),
        "causal": (attention(x, causal=True), reference(x, x, x, attn_mask=torch.ones(5, 5).triu(1).bool())),
        "cross": (attention(x, y), reference(x, y, y)),
        "masked": (attention(x, y, mask=keep[:, None, None]), reference(x, y, y, key_padding_mask=~keep)),
        "value": (attention(x, y, z), reference(x, y, z)),
    }[kind]
    assert_close(f"attention, {kind}", ours, theirs[0], 1e-10)


def test_attention_dropout_is_for_training_only():
    attention, x = Attention(12, 2).double(), random(1, 4, 12)
    assert torch.equal(attention.eval()(x, dropout=0.5), attention(x))
    assert not torch.equal(attention.train()(x, dropout=0.5), attention(x))


def test_attention_converts_its_input_once_under_autocast():
    attention = Attention(12, 2)
    seen = []
    for name in ("q_proj", "k_proj", "v_proj"):
        getattr(attention, name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        attention(torch.randn(1, 4, 12))
    query, key, value = seen
    assert query.dtype == torch.bfloat16 and query is key is value


def test_quick_gelu():
    x = torch.linspace(-8, 8, 101, dtype=torch.float64)
    assert_close("QuickGELU", QuickGELU()(x), x * torch.sigmoid(1.702 * x), 1e-10)
    mlp, x = randomise(MLP(6, 10)).double(), random(2, 6)
    hidden = mlp.c_fc(x)
    assert_close("MLP", mlp(x), mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden)), 1e-10)


def test_similarity():
    text, image = random(3, 8), 5 * random(2, 8, seed=1)
    for scale, factor in ((2.0, 2.0), (400.0, 100.0)):  # held at 100
        expected = factor * F.cosine_similarity(text[:, None], image[None], dim=-1)
        logit_scale = torch.tensor(scale).double().log()
        assert_close("similarity", similarity(text, image, logit_scale), expected, 1e-10)
        assert bounded_logit_scale(logit_scale).item() == pytest.approx(factor)


# --- the position table ---


def test_positions_of_the_same_grid_and_type():
    table = random(17, 6).float()
    assert resize_positions(table, (4, 4)) is table and resize_positions(table, torch.Size([4, 4])) is table
    assert resize_positions(table.bfloat16(), (2, 3)).dtype == torch.bfloat16


@pytest.mark.parametrize("grid", [(8, 8), (3, 5), (2, 2), (7, 1), (2, 8)])
def test_positions_resized(grid):
    table = random(17, 6).float()
    resized = resize_positions(table, grid)
    assert torch.equal(resized[0], table[0])
    patches = table[1:].unflatten(0, (4, 4)).permute(2, 0, 1)  # row by row -> (6, 4, 4)
    expected = F.interpolate(patches[None], grid, mode="bicubic", antialias=True)[0]  # (6, h, w)
    assert_close("positions", resized[1:], expected.permute(1, 2, 0).flatten(0, 1), 1e-6)


@pytest.mark.parametrize("side, width", [(4, 64), (7, 32)])
def test_sine_positions(side, width):
    """The class token has none; how alike two patches are depends on their distance, and falls with it."""
    table = sine_positions(side, width).double()
    assert table.shape == (1 + side**2, width) and not table[0].any()
    patches = table[1:].unflatten(0, (side, side))
    alike = torch.einsum("ijc,klc->ijkl", patches, patches)
    for y in range(side):
        for x in range(side):
            down = torch.tensor([alike[y, x, k, x] for k in range(y, min(y + 4, side))])
            right = torch.tensor([alike[y, x, y, k] for k in range(x, min(x + 4, side))])
            assert (down.diff() < 0).all() and (right.diff() < 0).all()
            assert_close("downwards", down, alike[0, 0, : len(down), 0], 1e-5)
            assert_close("to the right", right, alike[0, 0, : len(right), 0], 1e-5)


def test_sine_positions_of_any_width():
    assert [sine_positions(3, width).shape for width in (6, 7, 64)] == [(10, 6), (10, 7), (10, 64)]


@pytest.mark.parametrize("height, width", [(64, 64), (32, 96), (128, 16)])
def test_image_sizes(clip, height, width):
    images = random(2, 3, height, width)
    features = clip.encode_image(images)
    assert features.shape == (2, 40) and features.isfinite().all()
    assert [h.shape for h in clip.visual(images)] == [(2, 1 + height * width // 256, 64)] * 3


def test_patches_are_read_row_by_row(clip):
    """The pixels of a patch go into one token alone: number row * width + column, behind [CLS]."""
    visual = randomise(VisionTransformer(clip.config), 1).double()
    images = random(1, 3, 64, 64)
    changed = images.clone()
    changed[:, :, 32:48, 16:32] += 1  # row 2, column 1
    seen = []
    visual.ln_pre.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    visual(images)
    visual(changed)
    moved = (seen[1] - seen[0]).abs().amax(-1)[0]  # (N)
    assert moved.nonzero().flatten().tolist() == [1 + 2 * 4 + 1]


# --- the towers ---


def tokens(*lengths, T=10, vocab=100):
    """Random ids, the largest one at the given end positions, more random ids behind it."""
    ids = torch.randint(0, vocab - 1, (len(lengths), T), generator=torch.Generator().manual_seed(0))
    ids[range(len(lengths)), list(lengths)] = vocab - 1
    return ids


def test_text_is_causal(clip):
    ids = tokens(4, 9, 1)
    features = clip.encode_text(ids)
    states = clip.text(ids)
    for row, end in enumerate((4, 9, 1)):
        changed = ids[row : row + 1].clone()
        changed[:, end + 1 :] = (changed[:, end + 1 :] + 1) % 90
        last = clip.text(changed)[-1]
        assert_close(f"features of row {row}", clip.encode_text(changed)[0], features[row], 1e-10)
        assert_close(f"states of row {row}", last[0, : end + 1], states[-1][row, : end + 1], 1e-10)
        if end < 9:
            assert not torch.allclose(last[0, end + 1 :], states[-1][row, end + 1 :], atol=1e-3)
        cut = clip.encode_text(ids[row : row + 1, : end + 1])  # fewer positions
        assert_close(f"features of row {row}, cut", cut[0], features[row], 1e-10)


def test_every_earlier_token_counts(clip):
    ids = tokens(6)
    features = clip.encode_text(ids)
    for position in range(6):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 1) % 90
        assert (clip.encode_text(changed) - features).abs().max() > 1e-3, f"position {position} has no effect"


def test_the_end_is_the_first_of_the_largest_ids():
    ids = torch.tensor([[1, 9, 3, 9], [9, 0, 0, 0], [1, 0, 0, 9]])  # 0 is a token as others are
    assert end_positions(ids).tolist() == [1, 0, 3]
    x = torch.arange(12.0).view(3, 4, 1)
    assert at_end_token(x, ids).tolist() == [[1.0], [4.0], [11.0]]


def test_hidden_states(clip, batch):
    """One after each block, and the features come from the last."""
    images, _, ids = batch
    states = clip.visual(images)
    assert len(states) == 3
    for number, block in enumerate(clip.visual.blocks[1:]):
        assert_close(f"state {number + 1}", block(states[number]), states[number + 1], 1e-10)
    features = clip.visual.ln_post(states[-1])[:, 0] @ clip.visual.proj
    assert_close("image features", clip.encode_image(images), features, 1e-10)

    states = clip.text(ids)
    assert len(states) == 2
    assert_close("text state 1", clip.text.blocks[1](states[0], causal=True), states[1], 1e-10)
    features = clip.encode_text(ids)
    ends = (ids == clip.config.vocab_size - 1).int().argmax(1)
    for i, end in enumerate(ends):
        expected = clip.text.ln_final(states[1][i, end]) @ clip.text.text_projection
        assert_close(f"text features of row {i}", features[i], expected, 1e-10)


def test_bridge_runs_between_attention_and_mlp(clip, batch):
    """In its own block alone, with its own keys."""
    images = batch[0]
    block = clip.visual.blocks[1]

    def bridge(x, keys, is_key):
        assert is_key == "mask"
        return 2 * x + keys

    without = clip.visual(images)
    states = clip.visual(images, {"1": bridge}, {"0": None, "1": 3.0}, "mask")
    assert torch.equal(states[0], without[0])
    x = 2 * (states[0] + block.attn(block.ln_1(states[0]))) + 3
    assert_close("bridged block", states[1], x + block.mlp(block.ln_2(x)), 1e-10)
    assert_close("the next block", states[2], clip.visual.blocks[2](states[1]), 1e-10)


def test_start():
    """OpenAI's scales: biases zero, and the residual branches of deeper towers start smaller. In the vision tower keys
    start as the queries, so that a patch looks at what is alike."""
    torch.manual_seed(0)
    clip = CLIP(CLIPConfig(64, 16, 256, 8, 4, 128, 2, 2, 64, vocab_size=600))
    for tower, width, layers, std_q in ((clip.visual, 256, 8, 512**-0.5), (clip.text, 128, 2, 128**-0.5)):
        block = tower.blocks[-1]
        stds = {"attn.q_proj": std_q, "attn.k_proj": std_q, "attn.v_proj": width**-0.5,
                "attn.out_proj": width**-0.5 * (2 * layers) ** -0.5, "mlp.c_fc": (2 * width) ** -0.5,
                "mlp.c_proj": width**-0.5 * (2 * layers) ** -0.5}
        for name, std in stds.items():
            linear = block.get_submodule(name)
            assert linear.weight.std().item() == pytest.approx(std, rel=0.03), name
            assert not linear.bias.any(), name
        alike = torch.equal(block.attn.q_proj.weight, block.attn.k_proj.weight)
        assert alike == (tower is clip.visual)
    assert clip.logit_scale.exp().item() == pytest.approx(1 / 0.07)
