"""Prediction in Python: any image and any words in, the box or one plain line out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from makers import make_hivg
from makers_use import BAD_IMAGES, TEXTS, assert_inside, assert_line, assert_same, far, make_image

from hivg import Grounder, weights
from hivg.data.images import ImageError
from hivg.grounder import BATCH


@pytest.fixture(scope="module")
def model():
    return make_hivg(dtype=torch.float32, stage=1)


@pytest.fixture(scope="module")
def grounder(model):
    return Grounder(model, "cpu")


@pytest.fixture(scope="module")
def image():
    return make_image()


# --- results ---


def test_a_result(grounder, image):
    result = grounder.ground(image, TEXTS[0])
    assert_inside(result, 200, 120)
    assert result.expression == TEXTS[0] and result.image.size == (200, 120) and result.image.mode == "RGB"
    assert np.ptp(result.mask) > 1e-4 and np.ptp(result.heatmap) > 1e-4
    assert result.to_dict() == {"label": TEXTS[0], "score": result.score, "box": {
        "xmin": result.box[0], "ymin": result.box[1], "xmax": result.box[2], "ymax": result.box[3]}}


def test_drawings_differ(grounder, image):
    result = grounder.ground(image, TEXTS[0])
    plain = np.asarray(result.draw())[:120, :200]
    with_heatmap = np.asarray(result.draw(heatmap=True))[:120, :200]
    with_mask = np.asarray(result.draw(mask=True))[:120, :200]
    assert (plain != np.asarray(image)).any()
    assert (plain != with_heatmap).any()
    assert (plain != with_mask).any() and (with_heatmap != with_mask).any()
    other = replace(result, mask_map=1 - result.mask_map)  # it is the mask that is drawn as such
    assert (np.asarray(other.draw(mask=True))[:120, :200] != with_mask).any()
    assert (np.asarray(other.draw(heatmap=True))[:120, :200] == with_heatmap).all()


def test_maps_lie_where_their_patches_are(grounder, image):
    """Patch (2, 3) of the 4 x 4 on a square of 64; the image is its rows 13 to 51."""
    token_map = np.zeros((4, 4), np.float32)
    token_map[2, 3] = 1
    mask_map = np.zeros((32, 32), np.float32)
    mask_map[16:24, 24:32] = 1
    result = replace(grounder.ground(image, TEXTS[0]), token_map=token_map, mask_map=mask_map)
    assert_inside(result, 200, 120)  # bicubic resizing would leave 0..1
    for values in (result.heatmap, result.mask):
        y, x = np.unravel_index(values.argmax(), values.shape)
        assert 150 <= x < 200 and (32 - 13) / 0.32 <= y < (48 - 13) / 0.32
        assert values[:, :100].max() < 0.1 and values[:40].max() < 0.1


def test_path_image_and_array_are_the_same(grounder, image, tmp_path):
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    before = image.tobytes()
    reference = grounder.ground(image, TEXTS[0])
    reversed_view = array[:, :, ::-1].copy()[:, :, ::-1]
    for form in (tmp_path / "a.png", str(tmp_path / "a.png"), array, reversed_view):
        result = grounder.ground(form, TEXTS[0])
        assert result.box == reference.box and result.score == reference.score
        np.testing.assert_array_equal(result.token_map, reference.token_map)
        np.testing.assert_array_equal(result.mask_map, reference.mask_map)
    assert image.tobytes() == before
    assert far(grounder.ground(array[:, ::-1], TEXTS[0]), reference)  # else nothing was tested


def test_list_is_singles(grounder, image):
    """More than one batch, of short and long texts."""
    texts = []
    for i in range(BATCH // 3 + 2):
        texts += [f"{text} {i}" for text in TEXTS]
    assert len(texts) > BATCH
    results = grounder.ground(image, texts)
    assert [r.expression for r in results] == texts
    for i in (0, 1, 2, BATCH - 1, BATCH, len(texts) - 1):
        assert_same(grounder.ground(image, texts[i]), results[i])
    assert far(results[0], results[1])
    alone = grounder.ground(image, TEXTS[:1])
    assert isinstance(alone, list) and len(alone) == 1


def test_merging_moves_no_box(model, grounder, image):
    merged = Grounder(model.merged(), "cpu")
    assert_same(merged.ground(image, TEXTS[2]), grounder.ground(image, TEXTS[2]))
    assert any(name.endswith(".A.0") for name in model.state_dict())  # the model given still has its adapters


def test_bfloat16_is_near(model, grounder, image):
    exact = grounder.ground(image, TEXTS)
    rough = Grounder(model, "cpu", "bfloat16").ground(image, TEXTS)
    for a, b in zip(exact, rough):
        assert_inside(b, 200, 120)
        np.testing.assert_allclose(b.box, a.box, atol=4)
    assert [r.box for r in rough] != [r.box for r in exact]  # it was computed in bfloat16
    with pytest.raises(ValueError, match="float16"):
        Grounder(model, "cpu", "float16")


def test_from_pretrained(model, grounder, image, tmp_path):
    path = tmp_path / "random.safetensors"
    weights.save(path, model)
    again = Grounder.from_pretrained(path, device="cpu")
    assert_same(again.ground(image, TEXTS[0]), grounder.ground(image, TEXTS[0]))


# --- odd sizes and expressions (test_odd_images.py has the odd files) ---


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (4000, 8), (8, 4000), (1, 3000), (129, 64)], ids=str)
def test_odd_sizes(grounder, size):
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert_inside(grounder.ground(pixels, TEXTS[0]), width, height)


ODD_EXPRESSIONS = {
    "400 words": "red star " * 200,
    "Japanese": "左の赤い星",
    "Russian": "звезда слева от круга",
    "Arabic": "نجمة حمراء",
    "emoji": "⭐ 🔴",
    "!": "!",
    "control": "\x00",
    "5000 letters": "a" * 5000,
    "special": "<|endoftext|> red <|startoftext|>",
    "blanks": "two\nlines\tand   blanks",
    "entities": "ﬁ &amp; “quotes”",
}


@pytest.mark.parametrize("name", ODD_EXPRESSIONS)
def test_odd_expressions(grounder, image, name):
    text = ODD_EXPRESSIONS[name]
    result = grounder.ground(image, text)
    assert_inside(result, 200, 120)
    assert result.expression == text
    assert_same(grounder.ground(image, [TEXTS[0], text])[1], result)


# --- inputs that cannot be grounded ---


@pytest.mark.parametrize("name", BAD_IMAGES, ids=lambda name: name[:20])
def test_bad_image_files(grounder, tmp_path, name):
    write, word = BAD_IMAGES[name]
    write(tmp_path / name)
    with pytest.raises(ImageError) as caught:
        grounder.ground(tmp_path / name, TEXTS[0])
    assert_line(str(caught.value), name, word)


def test_folder_is_no_image(grounder, tmp_path):
    with pytest.raises(ImageError, match="folder"):
        grounder.ground(tmp_path, TEXTS[0])


@pytest.mark.parametrize("thing", [
    np.zeros((4, 4)),
    np.zeros((4, 4, 3)),
    np.zeros((4, 4, 4), np.uint8),
    np.zeros((0, 4, 3), np.uint8),
    np.zeros((1, 3, 4, 4), np.uint8),
    None,
    7,
    b"bytes",
], ids=lambda thing: str(getattr(thing, "shape", thing)))
def test_things_that_are_no_image(grounder, thing):
    with pytest.raises(ImageError) as caught:
        grounder.ground(thing, TEXTS[0])
    assert_line(str(caught.value), "array")


@pytest.mark.parametrize("expression", ["", "  \n", [], ["star", ""], ["star", None]], ids=repr)
def test_empty_expression(grounder, image, expression):
    with pytest.raises(ValueError, match="the expression is empty"):
        grounder.ground(image, expression)


@pytest.mark.parametrize("device", ["foo", "", "cuda:99", "meta"])
def test_device_that_is_not_there(model, device):
    with pytest.raises(ValueError) as caught:
        Grounder(model, device=device)
    assert_line(str(caught.value), device)
    with pytest.raises(ValueError) as caught:
        Grounder.from_pretrained("missing.safetensors", device=device)  # before the time is spent on loading
    assert_line(str(caught.value), device)
