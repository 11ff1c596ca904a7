"""The two hints, losses of ours that are off in the paper's recipes: boxes of the patches, and [REG]'s attention."""

import torch
import torch.nn.functional as F
from makers import assert_close, assert_same_output, make_hivg, random

from hivg.boxes import cxcywh_to_xyxy, giou
from hivg.losses import patch_box_loss, reg_attention_loss


def test_hints_are_extra(hivg, batch):
    """They change no other output, and are not computed unless they are asked for."""
    plain = hivg(*batch)
    hinted = hivg(*batch, with_patch_boxes=True, with_reg_attention=True)
    assert plain.patch_boxes is None and plain.reg_attention is None
    assert_same_output(plain, hinted, 0)
    B, P = hinted.token_similarity.shape
    assert hinted.patch_boxes.shape == (B, P, 4)
    assert hinted.reg_attention.shape == (2, B, hivg.config.encoder_heads, P)


def test_reg_attention_is_that_of_the_layer(batch):
    """Against the attention that makes the layer's output: [REG]'s row of softmax(q k^T / sqrt(d))."""
    model = make_hivg()
    seen = {}
    layer = model.encoder[-1]
    layer.attn.register_forward_hook(lambda module, args, kwargs, out: seen.update(args=args, **kwargs),
                                     with_kwargs=True)
    output = model(*batch, with_patch_boxes=True, with_reg_attention=True)
    query, = seen["args"]  # the keys too
    attn = layer.attn
    q = attn.q_proj(query).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    k = attn.k_proj(query).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    logits = q @ k.mT / q.shape[-1] ** 0.5  # (B, heads, M, M)
    share = logits.masked_fill(~seen["mask"], float("-inf")).softmax(-1)[:, :, 0]  # (B, heads, M)
    P = output.token_similarity.shape[1]
    assert_close("shares", output.reg_attention[-1].exp(), share[:, :, 2 : 2 + P], 1e-5)


def test_reg_attention_is_in_float32_under_autocast():
    """A logarithm of shares in bfloat16 would be off by a percent."""
    model = make_hivg(dtype=torch.float32)
    layer = model.encoder[-1]
    x = random(2, 9, model.config.width).float()
    position = random(9, model.config.width, seed=1).float()
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer.norm1(x) + position
        q = layer.attn.q_proj(y).unflatten(-1, (layer.attn.heads, -1)).transpose(1, 2)  # bfloat16
        k = layer.attn.k_proj(y).unflatten(-1, (layer.attn.heads, -1)).transpose(1, 2)
        found = layer.reg_attention(x, position, mask)
    assert q.dtype == torch.bfloat16 and found.dtype == torch.float32
    expected = (q.double() @ k.double().mT / q.shape[-1] ** 0.5).log_softmax(-1)[:, :, 0]
    assert_close("log shares", found.double(), expected, 1e-5)


def test_patch_box_loss():
    """In loops: the mean over the target's patches, then over the batch."""
    boxes = random(2, 5, 4).sigmoid()
    targets = random(2, 4, seed=1).sigmoid()
    on_grid = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 0, 0]])
    means = []
    for b in range(2):
        losses = []
        for p in on_grid[b].nonzero()[:, 0]:
            overlap = giou(cxcywh_to_xyxy(boxes[b, p]), cxcywh_to_xyxy(targets[b]))
            losses.append((boxes[b, p] - targets[b]).abs().sum() + 1 - overlap)
        means.append(sum(losses) / len(losses))
    assert_close("loss", patch_box_loss(boxes, targets, on_grid), sum(means) / 2, 1e-10)


def test_reg_attention_loss():
    logits = random(2, 3, 4, 6).requires_grad_()  # (layers, B, heads, P)
    on_grid = torch.tensor([[1.0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]])
    share = (logits.softmax(-1) * on_grid[:, None]).sum(-1)
    loss = reg_attention_loss(logits.log_softmax(-1), on_grid)
    assert_close("loss", loss, -share.log().mean(), 1e-10)


def test_reg_attention_of_a_target_that_is_padding():
    """A share of 0 has a finite loss and no gradient that is not a number."""
    logits = torch.zeros(1, 1, 1, 3, requires_grad=True)
    mask = torch.tensor([False, True, True])
    shares = logits.masked_fill(~mask, float("-inf")).log_softmax(-1)
    loss = reg_attention_loss(shares, F.one_hot(torch.tensor([0]), 3).float())
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
