"""Where [REG] looks: Result.attention, and the heat maps that can be drawn."""

import numpy as np
import pytest
from makers_use import TEXTS

from hivg.data.transforms import Letterbox


def attention_by_hand(model, image, text):
    """(h, w): [REG]'s row of the last layer's softmax(q k^T / sqrt(d)), mean over the heads, its patches."""
    seen = {}
    attn = model.encoder[-1].attn
    hook = attn.register_forward_hook(lambda module, args, kwargs, out: seen.update(args=args, **kwargs),
                                      with_kwargs=True)
    letterbox = Letterbox(*image.size, 64)
    model(letterbox.image(image)[None], letterbox.padding_mask()[None], model.tokenizer([text]))
    hook.remove()
    query, = seen["args"]  # the keys too
    q = attn.q_proj(query).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    k = attn.k_proj(query).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    logits = q @ k.mT / q.shape[-1] ** 0.5  # (1, heads, M, M)
    share = logits.masked_fill(~seen["mask"], float("-inf")).softmax(-1)[0, :, 0].mean(0)  # (M,)
    return share[2 : 2 + 16].unflatten(0, (4, 4)).detach().numpy()


def test_attention_is_that_of_the_last_layer(model, grounder, image):
    results = grounder.ground(image, TEXTS, attention=True)
    for text, result in zip(TEXTS, results):
        np.testing.assert_allclose(result.attention_map, attention_by_hand(model, image, text), atol=1e-5)
        assert result.attention_map[0].max() == 0 < result.attention_map[1:3].min()  # the first row is padding
        assert result.attention_map.sum() < 1
    assert grounder.ground(image, TEXTS) == results  # it moves no box
    pairs = grounder.ground_pairs([image] * len(TEXTS), TEXTS, attention=True)
    for one, other in zip(results, pairs):
        np.testing.assert_allclose(one.attention_map, other.attention_map, atol=1e-6)


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
    monkeypatch.setattr(type(model.encoder[0]), "reg_attention", None)
    result = grounder.ground(image, TEXTS[0])
    assert result.attention_map is None
    for use in (lambda: result.attention, lambda: result.draw(heatmap="attention")):
        with pytest.raises(ValueError, match="attention=True"):
            use()


def test_drawings(grounder, image):
    result = grounder.ground(image, TEXTS[0], attention=True)
    tokens = np.asarray(result.draw(heatmap="tokens"))
    assert (tokens == np.asarray(result.draw(heatmap=True))).all()
    assert (tokens != np.asarray(result.draw(heatmap="attention"))).any()
    with pytest.raises(ValueError, match="tokens, attention, not 'rtcc'"):
        result.draw(heatmap="rtcc")
