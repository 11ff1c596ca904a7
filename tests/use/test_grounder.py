"""Prediction in Python: any image and any words in, the box or one plain line out."""

import copy
import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from makers import calls_of, refusal
from makers_use import BAD_IMAGES, TEXTS, assert_inside, assert_line, assert_same, far, huge_png
from PIL import Image

from hivg import Grounder, weights
from hivg.data.images import ImageError
from hivg.data.transforms import pixel_constants
from hivg.grounder import BATCH, draw_results
from hivg.tokenizer import Tokenizer, learn_merges

# --- results ---


def test_a_result(grounder, image):
    result = grounder.ground(image, TEXTS[0])
    assert_inside(result, 200, 120)
    assert result.expression == TEXTS[0] and result.image.size == (200, 120) and result.image.mode == "RGB"
    assert np.ptp(result.mask) > 1e-4 and np.ptp(result.heatmap) > 1e-4
    assert result.to_dict() == {"label": TEXTS[0], "score": result.score, "box": {
        "xmin": result.box[0], "ymin": result.box[1], "xmax": result.box[2], "ymax": result.box[3]}}
    assert result == grounder.ground(image, TEXTS[0]) and result != grounder.ground(image, TEXTS[1])
    assert repr(result) == f"Result(expression={TEXTS[0]!r}, box={result.box}, score={result.score})"


def test_copies_of_a_result_hold_no_model(grounder, image):
    result = grounder.ground(image, TEXTS[0], attention=True)
    for copied in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert copied == result and copied.words == result.words and copied.again is None
    assert len(pickle.dumps(result)) < 2 * len(image.tobytes())


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


@pytest.mark.parametrize("size, factor", [((64, 30), 3), ((100, 100), 2), ((101, 9), 1), ((1, 2), 100)], ids=str)
def test_small_images_are_drawn_larger(grounder, size, factor):
    """With their boxes and maps."""
    width, height = size
    result = grounder.ground(Image.new("RGB", size, "white"), TEXTS[0])
    result = replace(result, expression="", box=(width / 2, 0.0, width, height))
    for drawn in (result.draw(), result.draw(heatmap=True), result.draw(mask=True)):
        assert drawn.width >= factor * width and drawn.height >= factor * height  # or a bar or a note is below
    changed = np.asarray(result.draw())[: factor * height, : factor * width] != 255
    middle = changed[-1].any(1)  # of the last row, which has no label
    assert middle[-1] and (factor == 1 or not middle[: factor * width // 2 - 4].any())


def test_an_expression_without_glyphs_has_its_number(grounder, image, monkeypatch):
    """Among all results, those not found included."""
    asked = []
    monkeypatch.setattr("hivg.utils.fonts._lacks", lambda which, character: character > "z")
    monkeypatch.setattr("hivg.grounder.draw_boxes", lambda image, boxes, labels, **more: asked.append((labels, more)))
    results = grounder.ground(image, ["star", "红色的圆", "red 圆"])
    draw_results([replace(result, score=0.5 * i) for i, result in enumerate(results)], min_score=0.1)
    (labels, more), = asked
    assert labels == ["#2", "red ?"] and more["scores"] == [0.5, 1.0] and more["doubtful"] == 0.5


def test_a_drawing_says_what_its_maps_are_of(grounder, image, monkeypatch):
    """Of which expression, in words below it; maps of one range have one scale."""
    asked = []
    monkeypatch.setattr("hivg.grounder.draw_boxes", lambda *args, **more: asked.append(more))
    results = grounder.ground(image, TEXTS[:2], attention=True)
    asks = [(True, False, "token map"), ("attention", False, "relative attention of [REG]"), (False, True, "mask"),
            ("tokens", True, "token map and mask")]
    for heatmap, mask, note in asks:
        draw_results(results, heatmap, mask, heat_range=(0, 1))
        assert asked[-1]["note"] == f'{note} for "{TEXTS[0]}"' and asked[-1]["heat_range"] == (0, 1)
    draw_results(results)
    draw_results(results, mask=True, min_score=1.0)  # then its mask is not drawn
    assert asked[-1]["note"] == asked[-2]["note"] == ""


def test_maps_lie_where_their_patches_are(grounder, image):
    """Patch (2, 2) of the 4 x 4 on a square of 64, rows and columns 32 to 48; the image is its rows 13 to 51. The mask
    lies on the patch, the heat map about the patch's first pixel, for which alone its value stands."""
    token_map = np.zeros((4, 4), np.float32)
    token_map[2, 2] = 1
    mask_map = np.zeros((32, 32), np.float32)
    mask_map[16:24, 16:24] = 1
    result = replace(grounder.ground(image, TEXTS[0]), token_map=token_map, mask_map=mask_map)
    assert_inside(result, 200, 120)  # bicubic resizing would leave 0..1
    for values, middle in ((result.heatmap, 32.5), (result.mask, 40)):
        weights = values / values.sum()
        x = (weights.sum(0) * (np.arange(200) + 0.5)).sum()
        y = (weights.sum(1) * (np.arange(120) + 0.5)).sum()
        assert x == pytest.approx(middle / 0.32, abs=1.5) and y == pytest.approx((middle - 13) / 0.32, abs=1.5)
        assert values[:, :40].max() < 0.1 and values[:, 190:].max() < 0.1


def test_heat_map_is_the_token_map_at_first_pixels(grounder):
    """On an image as large as the square nothing else is resized."""
    result = grounder.ground(np.zeros((64, 64, 3), np.uint8), TEXTS[0])
    np.testing.assert_allclose(result.heatmap[::16, ::16], result.token_map, atol=1e-6)
    np.testing.assert_array_equal(result.heatmap[48:], np.broadcast_to(result.heatmap[48], (16, 64)))


def test_list_is_singles(grounder, image):
    """More than one batch, of short and long texts."""
    texts = [f"{text} {i}" for i in range(BATCH // 3 + 2) for text in TEXTS]
    assert len(texts) > BATCH
    results = grounder.ground(image, texts)
    assert [r.expression for r in results] == texts
    for i in (0, 1, 2, BATCH - 1, BATCH, len(texts) - 1):
        assert_same(grounder.ground(image, texts[i]), results[i])
    assert far(results[0], results[1])
    alone = grounder.ground(image, TEXTS[:1])
    assert isinstance(alone, list) and len(alone) == 1


def test_many_images_in_one_call(grounder, image):
    """Each with its own expression, over more than one batch, of different sizes: as one by one."""
    images = [image, image.rotate(90, expand=True), np.asarray(image.crop((0, 0, 90, 80)))] * (BATCH // 3 + 1)
    texts = [f"{TEXTS[i % 2]} {i}" for i in range(len(images))]
    results = grounder.ground_pairs(images, texts)
    assert len(results) == len(images) > BATCH and [r.expression for r in results] == texts
    for i in (0, 1, 2, BATCH, len(images) - 1):
        assert_same(grounder.ground(images[i], texts[i]), results[i])
        assert_inside(results[i], *grounder.ground(images[i], texts[i]).image.size)
    assert grounder.ground_pairs([image], TEXTS[:1]) == [grounder.ground(image, TEXTS[0])]


def test_a_batch_is_one_call_of_the_model(grounder, image, monkeypatch):
    """Of many images as of many expressions; of one image, what does not depend on the expression is computed once."""
    calls = calls_of(monkeypatch, grounder.model, "forward")
    grounder.ground_pairs([image] * (BATCH + 3), ["star"] * (BATCH + 3))
    assert [len(images) for images, *_ in calls] == [BATCH, 3]
    grounder.ground(image, ["star"] * BATCH)
    assert [len(images) for images, *_ in calls[2:]] == [1]


def test_bfloat16_is_near(model, grounder, image):
    exact = grounder.ground(image, TEXTS)
    rough = Grounder(model, "cpu", "bfloat16").ground(image, TEXTS)
    for a, b in zip(exact, rough):
        assert_inside(b, 200, 120)
        np.testing.assert_allclose(b.box, a.box, atol=4)
    assert [r.box for r in rough] != [r.box for r in exact]  # it was computed in bfloat16
    with pytest.raises(ValueError, match="float16"):
        Grounder(model, "cpu", "float16")


@pytest.mark.parametrize("able, dtype", [({"avx512_bf16": True}, torch.bfloat16), ({}, torch.float32)])
def test_the_machine_decides_the_type(model, monkeypatch, able, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    grounder = Grounder(model, "cpu")
    assert grounder.dtype == dtype and grounder.model.reg_token.dtype == dtype


def test_path_image_and_array_are_the_same(grounder, image, tmp_path):
    image.save(tmp_path / "a.png")
    array = np.asarray(image)
    before = image.tobytes()
    reference = grounder.ground(image, TEXTS[0])
    reversed_view = array[:, :, ::-1].copy()[:, :, ::-1]
    for form in (tmp_path / "a.png", str(tmp_path / "a.png"), array, reversed_view):
        assert grounder.ground(form, TEXTS[0]) == reference
        assert_same(grounder.ground(form, TEXTS[0]), reference, 0)
    assert image.tobytes() == before
    assert far(grounder.ground(array[:, ::-1], TEXTS[0]), reference)  # else nothing was tested


def test_warnings(grounder, monkeypatch):
    """Of words that are spelled and of what is cut; none of the words that the tokenizer was made of."""
    monkeypatch.setattr(grounder.model, "tokenizer", Tokenizer(learn_merges(["the red cup of"] * 3, 50)))
    assert grounder.warnings("the red cup") == []
    (spelled,) = grounder.warnings("the Zyxwv zyxwv cup of 12345")
    assert_line(spelled, "'zyxwv'", "spells it")
    (cut,) = grounder.warnings("cup " * 100)
    assert_line(cut, "cut to its first 75")


# --- odd sizes and expressions (test_odd_images.py has the odd files) ---


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (4000, 8), (8, 4000), (1, 3000), (129, 64)], ids=str)
def test_odd_sizes(grounder, size):
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert_inside(grounder.ground(pixels, TEXTS[0]), width, height)


@pytest.mark.parametrize("text", [
    "red star " * 200, "左の赤い星", "звезда слева от круга", "نجمة حمراء", "⭐ 🔴", "!", "a" * 5000,
    "<|endoftext|> red <|startoftext|>", "two\nlines\tand   blanks", "ﬁ &amp; “quotes”"], ids=lambda text: text[:15])
def test_odd_expressions(grounder, image, text):
    result = grounder.ground(image, text)
    assert_inside(result, 200, 120)
    assert result.expression == text
    assert_same(grounder.ground(image, [TEXTS[0], text])[1], result)


# --- inputs that cannot be grounded ---


@pytest.mark.parametrize("name", BAD_IMAGES, ids=lambda name: name[:20])
def test_bad_image_files(grounder, tmp_path, name):
    write, word = BAD_IMAGES[name]
    write(tmp_path / name)
    assert_line(refusal(grounder.ground, tmp_path / name, TEXTS[0], error=ImageError), name[:20], word)


def test_open_files(grounder, image, tmp_path):
    image.save(tmp_path / "a.png")
    with open(tmp_path / "a.png", "rb") as file:
        assert grounder.ground(file, TEXTS[0]) == grounder.ground(image, TEXTS[0])
    closed = io.BytesIO(b"closed")
    closed.close()
    for file in (io.BytesIO(b"no image"), io.BytesIO(), io.StringIO("text"), io.BytesIO(huge_png()), closed):
        assert "file object" in refusal(grounder.ground, file, TEXTS[0], error=ImageError)


@pytest.mark.parametrize("thing, message", [
    (np.linspace(0, 255, 48, dtype=np.float32).reshape(4, 4, 3), "array of floats from 0 to 255: give floats in 0..1"),
    (np.full((4, 5), -0.1), "array of floats from -0.1 to -0.1: give"),
    (np.full((4, 4), np.nan), "array of floats from nan to nan: give floats in 0..1"),
    (np.zeros((4, 4), np.int64), "array of type int64: give uint8, or floats in 0..1"),
    (np.zeros((4, 4), bool), "array of type bool: give uint8, or floats in 0..1; of booleans give array.astype(float)"),
    (np.zeros((3, 4, 5), np.uint8), "array of shape (3, 4, 5): give (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA; if "
     "channels come first, array.transpose(1, 2, 0)"),
    (torch.zeros(3, 4, 5), "Tensor: give a path, a PIL image, an open file or an array; of a tensor (3, H, W) in 0..1"),
    ("HTTPS://example.org/a.jpg", "HTTPS://example.org/a.jpg: there is no such file; download it first"),
    (np.zeros((4, 4, 2), np.uint8), "array of shape (4, 4, 2): give"),
    (np.zeros((4,), np.uint8), "array of shape (4,): give"),
    (np.zeros((0, 4, 3), np.uint8), "array of shape (0, 4, 3): give"),
    (np.zeros((1, 3, 4, 4), np.uint8), "array of shape (1, 3, 4, 4): give"),
    (None, "NoneType: give a path"), (7, "int: give a path"), (b"x", "; of an image file's bytes give io"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_things_that_are_no_image(grounder, thing, message):
    assert message in refusal(grounder.ground, thing, TEXTS[0], error=ImageError)


@pytest.mark.parametrize("expression, message", [
    ("", "expression is empty"), ("  \n", "expression is empty"), (["star", ""], "expression is empty"),
    ([], "list of expressions is empty"), (["star", None], "None is not text"), (None, "None is not text"),
    (3, "3 is not text"), (b"x", "b'x' is not text"), ({"star", "cup"}, "a set is not text"),
    ({"star": 1}, "a dict of 1 is not text"), (str, "a type is not text"), (list[str], "is not text"),
    (np.array("star"), "a ndarray is not text"), (torch.tensor(3), "a Tensor is not text"),
    *((text, "expression is empty") for text in ("\x00", "&nbsp;", "\ufeff", "\u200b", "\x1b[31m")),
], ids=repr)
def test_bad_expressions(grounder, image, expression, message):
    assert message in refusal(grounder.ground, image, expression)


def test_bad_pairs(grounder, image):
    for images, expressions in ((None, ["star"]), ([image], None), ([image], 3), (image, "star"), ([image], "s"),
                                ([image], TEXTS[:2]), ({"a.png"}, ["star"]), ([image], {"star"}), (list, ["star"]),
                                ({0: image}, ["star"])):
        with pytest.raises(ValueError, match="ground_pairs needs a list of images and a list of as many expressions"):
            grounder.ground_pairs(images, expressions)
    with pytest.raises(ValueError, match="the list of expressions is empty"):
        grounder.ground_pairs([], [])
    with pytest.raises(ValueError, match="None is not text"):
        grounder.ground_pairs([image], [None])


@pytest.mark.parametrize("thing", [None, 3, b"x.safetensors", str, {"x"}], ids=repr)
def test_things_that_are_no_model_no_file_and_no_expression(grounder, image, thing):
    result = grounder.ground(image, TEXTS[0])
    for call in (Grounder, Grounder.from_pretrained, weights.load_clip, grounder.warnings, result.save_mask,
                 result.draw, lambda thing: Grounder(grounder.model, device=thing),
                 lambda thing: Grounder(grounder.model, dtype=thing)):
        if call == result.draw and thing is None:
            continue  # no heat map
        refusal(call, thing)


@pytest.mark.parametrize("several", [(text for text in TEXTS), tuple(TEXTS), np.array(TEXTS)], ids=type)
def test_texts_in_any_order_that_is_certain(grounder, image, several):
    assert grounder.ground(image, several) == grounder.ground(image, TEXTS)


def test_the_callers_settings_change_nothing(model, image, weights_file):
    """Autocast, a default device and a default dtype."""
    def used():
        grounder = Grounder.from_pretrained(weights_file, "cpu", "float32")
        result = grounder.ground_pairs([image], TEXTS[:1], attention=True)[0]
        return result, result.mask, result.heatmap, result.attention

    result, *maps = used()
    with torch.autocast("cpu", torch.bfloat16):
        autocast = used()
    try:
        torch.set_default_device("meta")
        torch.set_default_dtype(torch.float64)
        pixel_constants.cache_clear()
        elsewhere = used()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        pixel_constants.cache_clear()
    for again, *others in (autocast, elsewhere):
        assert again == result
        for map, other in zip(maps, others, strict=True):
            np.testing.assert_array_equal(map, other)


@pytest.mark.parametrize("device", ["foo", "", "cuda:99", "meta", "cuda:\u0663"])
def test_device_that_is_not_there(model, device):
    assert device in refusal(Grounder, model, device=device)
    # before the time is spent on loading
    assert device in refusal(Grounder.from_pretrained, "missing.safetensors", device=device)
