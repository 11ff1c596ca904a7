"""Where [REG] looks, Result.attention, what the patches read, Result.words, and the heat maps that can be drawn."""

import numpy as np
import pytest
import torch
from makers import make_hivg
from makers_use import TEXTS, assert_same

from hivg import Grounder
from hivg.data.transforms import Letterbox


def attention_of(model, image, text):
    """(h, w): the mean over the heads of what test_hints.py checks, [REG]'s shares in the last layer."""
    letterbox = Letterbox(*image.size, 64)
    output = model(letterbox.image(image)[None], letterbox.padding_mask()[None], model.tokenizer([text]),
                   with_reg_attention=True)
    return output.reg_attention[-1, 0].exp().mean(0).unflatten(0, (4, 4)).detach().numpy()


def test_attention_is_that_of_the_last_layer(model, grounder, image):
    results = grounder.ground(image, TEXTS, attention=True)
    for text, result in zip(TEXTS, results):
        np.testing.assert_allclose(result.attention_map, attention_of(model, image, text), atol=1e-5)
        assert result.attention_map[0].max() == 0 < result.attention_map[1:3].min()  # the first row is padding
        assert result.attention_map.sum() < 1
    assert grounder.ground(image, TEXTS) == results  # it moves no box
    pairs = grounder.ground_pairs([image] * len(TEXTS), TEXTS, attention=True)
    for one, other in zip(results, pairs):
        np.testing.assert_allclose(one.attention_map, other.attention_map, atol=1e-6)


def bridge_attention_by_hand(model, letterbox, image, text):
    """{block, from 1: (h, w, T)}: each bridge's softmax(q k^T / sqrt(d)), the mean over the heads."""
    seen = {}
    hooks = []
    for block, bridge in model.bridges.items():
        def see(attn, args, kwargs, out, block=int(block) + 1):
            q, k = [linear(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                    for linear, x in zip((attn.q_proj, attn.k_proj), args)]
            shares = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)  # (1, heads, N, T): one text has no padding
            seen[block] = shares[0, :, 1:].mean(0).unflatten(0, (4, 4)).detach().numpy()
        hooks.append(bridge.attn.register_forward_hook(see, with_kwargs=True))
    model(letterbox.image(image)[None], letterbox.padding_mask()[None], model.tokenizer([text]))
    for hook in hooks:
        hook.remove()
    return seen


def test_words_are_what_the_bridges_read(model, grounder, image):
    """Of a batch with padding: a word's share is the sum of its tokens', and words, start and end token share all."""
    rows = slice(1, 3)  # those that show the image
    results = grounder.ground(image, TEXTS, attention=True)
    for text, result in zip(TEXTS, results):
        shares = bridge_attention_by_hand(model, result.letterbox, image, text)
        assert list(shares) == [1, 3] and [word.text for word in result.words] == text.split()
        start = 1
        for word in result.words:
            end = start + len(model.tokenizer.encode(word.text))
            assert list(word.bridges) == list(shares)
            for block, share in word.bridges.items():
                assert share.shape == (2, 4) and share.dtype == np.float32 and 0 <= share.min() <= share.max() <= 1
                np.testing.assert_allclose(share, shares[block][rows, :, start:end].sum(-1), atol=1e-5)
            start = end
        for block, share in shares.items():
            whole = sum(word.bridges[block] for word in result.words) + share[rows, :, 0] + share[rows, :, -1]
            np.testing.assert_allclose(whole, 1, atol=1e-5)


def test_words_can_be_asked_for_later(grounder, image):
    """Without attention=True, of one image and of several; the result stays as it is."""
    asked = grounder.ground(image, TEXTS, attention=True)
    for later in (grounder.ground(image, TEXTS), grounder.ground_pairs([image] * len(TEXTS), TEXTS)):
        for result, other in zip(later, asked):
            for word, wanted in zip(result.words, other.words, strict=True):
                assert word.text == wanted.text and word.bridges.keys() == wanted.bridges.keys()
                for block, share in word.bridges.items():
                    np.testing.assert_allclose(share, wanted.bridges[block], atol=1e-5)
            assert result.draw(words=result.words[0].text).width > 200
            assert_same(result, other)


def test_words_that_do_not_fit_are_not_read(model, grounder, image):
    """Nor is the end token, which stands in the place of one, a part of it."""
    text = "red " * 50 + "circle"
    result = grounder.ground(image, text, attention=True)
    assert len(model.tokenizer.encode(text)) > 75 and len(result.words) == 51
    for block, share in bridge_attention_by_hand(model, result.letterbox, image, text).items():
        totals = np.array([word.bridges[block].sum() for word in result.words])
        assert totals[0] > 0 == totals[-1]
        np.testing.assert_allclose(totals.sum(), share[1:3, :, 1:-1].sum(), rtol=1e-5)


@pytest.mark.parametrize("width, height, rows, columns", [
    (200, 120, (1, 3), (0, 4)), (120, 200, (0, 4), (1, 3)), (7, 7, (0, 4), (0, 4)),
    (4000, 8, (1, 2), (0, 4)), (8, 4000, (0, 4), (1, 2)),  # half of no patch
    (64, 8, (1, 3), (0, 4)),  # two halves: 4 pixels of either row
])
def test_words_lie_where_the_model_sees_the_image(grounder, width, height, rows, columns):
    """And [REG] looks at these patches alone."""
    result = grounder.ground(np.zeros((height, width, 3), np.uint8), "star", attention=True)
    assert [(s.start, s.stop) for s in result.patches] == [rows, columns]
    outside = result.attention_map.copy()
    outside[result.patches] = 0
    assert outside.max() == 0
    assert {share.shape for share in result.words[0].bridges.values()} == {result.attention_map[result.patches].shape}


@pytest.mark.parametrize("bridge, blocks", [("projected", [1, 3]), ("constant", []), ("none", [])])
def test_words_of_other_bridges(image, bridge, blocks):
    """A constant is no word."""
    grounder = Grounder(make_hivg(dtype=torch.float32, bridge=bridge), "cpu", "float32")
    assert [list(word.bridges) for word in grounder.ground(image, "star", attention=True).words] == [blocks]


def test_attention_in_the_pixels_of_the_image(grounder, image):
    result = grounder.ground(image, TEXTS[0], attention=True)
    attention = result.attention
    assert attention.shape == (120, 200) and attention.dtype == np.float32
    assert attention.min() >= 0 and 0.5 < attention.max() <= 1
    # on an image as large as the square: highest about the middle of the patch that has most
    square = grounder.ground(np.asarray(image.resize((64, 64))), TEXTS[0], attention=True)
    row, column = np.unravel_index(square.attention_map.argmax(), (4, 4))
    assert square.attention[16 * row + 7 : 16 * row + 9, 16 * column + 7 : 16 * column + 9].min() > 0.95
    thin = grounder.ground(np.zeros((8, 4000, 3), np.uint8), TEXTS[0], attention=True)  # covers half of no patch
    assert np.isfinite(thin.attention).all()


def test_plain_results_have_none(model, grounder, image, monkeypatch):
    """Nor is it computed."""
    monkeypatch.setattr(type(model.encoder[0].attn), "log_shares", None)
    result = grounder.ground(image, TEXTS[0])
    assert result.attention_map is None
    for use in (lambda: result.attention, lambda: result.draw(heatmap="attention")):
        with pytest.raises(ValueError, match="attention=True"):
            use()


def test_drawings(grounder, image):
    result = grounder.ground(image, TEXTS[0], attention=True)
    tokens = np.asarray(result.draw(heatmap="tokens"))
    assert (tokens == np.asarray(result.draw(heatmap=True))).all()
    assert (tokens[:120, :200] != np.asarray(result.draw(heatmap="attention"))[:120, :200]).any()
    with pytest.raises(ValueError, match="tokens, attention, words, not 'rtcc'"):
        result.draw(heatmap="rtcc")
    with pytest.raises(ValueError, match="words is a drawing of its own"):
        result.draw(words=result.words[0].text, mask=True)
