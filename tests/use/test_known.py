"""What a model was never taught: unknown words, and photographs to weights of the drawn world."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from makers import make_hivg
from PIL import Image, ImageFilter, ImageOps

from hivg import Grounder
from hivg.data.drawn.scenes import Shapes
from hivg.evaluate.__main__ import doubts
from hivg.evaluate.known import DRAWN_ONLY, knows_drawn_only, looks_photographed, unknown_words
from hivg.tokenizer import Tokenizer, learn_merges


def make_model(dataset):
    """A model whose text tower was trained on the words of "the red cup" alone."""
    model = make_hivg()
    model.info = {"dataset": dataset}
    model.tokenizer = Tokenizer(learn_merges(["the red cup"] * 3, 50))
    embedding = model.clip.text.token_embedding.weight.data
    embedding.copy_(0.02 * torch.randn(embedding.shape).sign())
    embedding[model.tokenizer.encode("the red cup")] *= 1.6
    return model


@pytest.mark.parametrize("dataset, words", [
    ("shapes-wide", ["zebra", "cupp"]), ("shapes", ["zebra", "cupp"]), ("refcoco", []), (None, [])])
def test_unknown_words(dataset, words):
    model = make_model(dataset)
    assert unknown_words(model, "the red cup") == []
    assert unknown_words(model, "The zebra, red CUP zebra cupp") == words


def test_a_published_clip_knows_more_than_drawings():
    """Whatever it was trained on last."""
    model = make_model("shapes-wide")
    model.config = replace(model.config, clip=replace(model.config.clip, vocab_size=49408))
    assert not knows_drawn_only(model) and unknown_words(model, "a zebra") == []


def test_unknown_words_of_bundled_weights():
    grounder = Grounder.from_pretrained(device="cpu")
    wide = grounder.model.info["dataset"] == "shapes-wide"
    for index in range(100):
        for text in Shapes("train", wide=wide)[index]["expressions"]:
            assert unknown_words(grounder.model, text) == [], text
    for word in ("teal", "zebra", "hexagon", "trianlge", "octopus"):
        assert unknown_words(grounder.model, f"the {word} left of the star") == [word]
        (line,) = grounder.warnings(f"the {word} left of the star")
        assert word in line and "\n" not in line
    assert grounder.warnings("the purpel trianlge, a zebra") == [
        "these weights were never taught 'purpel' (did you mean 'purple'?), 'trianlge' (did you mean 'triangle'?), "
        "'zebra'; say it in other words"]


def photograph(seed, size=(160, 120)):
    """Smooth changes of many colours, as most photographs have."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return ImageOps.autocontrast(Image.fromarray(noise).filter(ImageFilter.GaussianBlur(8)))


def test_photographs_are_told_from_drawings():
    for seed in range(20):
        assert looks_photographed(photograph(seed))
    for wide in (False, True):
        for index in range(60):
            assert not looks_photographed(Shapes("val", wide=wide)[index]["image"])
    for size in ((1, 1), (1, 300), (64, 64)):
        for mode in ("RGB", "L", "RGBA", "P", "1"):
            assert not looks_photographed(Image.new(mode, size))


def test_warnings_of_an_image(tmp_path):
    photograph(0).save(tmp_path / "photo.png")
    for dataset, expected in (("shapes-wide", [DRAWN_ONLY]), ("mine.jsonl", [])):
        grounder = Grounder(make_model(dataset), device="cpu")
        assert grounder.warnings("the red cup", tmp_path / "photo.png") == expected
        assert grounder.warnings("the red cup", Image.new("RGB", (64, 64))) == []
        assert grounder.warnings("the red cup") == []


def test_doubts_of_an_evaluation():
    rows = [{"expression": text} for text in ("the red cup", "the zebra", "zebra and yak", "the cup")]
    known, words = doubts(make_model("shapes"), "refcoco", rows)
    assert known == DRAWN_ONLY and words.startswith("2 of 4 expressions ") and "'zebra'" in words and "'yak'" in words
    assert doubts(make_model("shapes"), "shapes-wide", rows[:1]) == []
    assert doubts(make_model("refcoco"), "refcoco", rows) == []
