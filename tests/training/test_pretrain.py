"""The contrastive pre-training of the tiny CLIP."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from makers_training import ON_CPU, Killed, assert_same_run, kill, log_of

from hivg import weights
from hivg.clip import CLIP, CLIPConfig
from hivg.data.shapes import SPLITS, Shapes
from hivg.tokenizer import split_words
from hivg.training import pretrain
from hivg.training.pretrain import Settings, phrase_truth

SMALL = CLIPConfig(32, 16, 32, 6, 2, 32, 4, 2, 32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """runs/clip after a short pre-training."""
    folder = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPLITS, "val", (4, SPLITS["val"][1]))
        patch.chdir(folder)
        patch.setitem(pretrain.CLIP_SIZES, "tiny", SMALL)
        pretrain.pretrain(Settings(epochs=2, epoch_samples=16, batch_size=8, warmup_steps=1, **ON_CPU))
    return folder / "runs/clip"


def test_pretraining(run):
    assert [row["step"] for row in log_of(run) if "epoch" in row] == [2, 4]
    row, = (row for row in log_of(run) if "loss" in row)
    assert row["clc"] + row["phrases"] == pytest.approx(row["loss"], abs=1e-4)
    clip = weights.load_clip(run / "clip.safetensors")
    assert 0 <= clip.info["accuracy"] <= 1 and clip.info["stage"] == "pretrain"


def test_every_word_of_shapes_is_a_token(run):
    """So a row has as many tokens as its text has words."""
    tokenizer = weights.load_clip(run / "clip.safetensors").tokenizer
    words = set()
    for split in ("val", "testA", "testB", "compose"):
        for index in range(60):
            item = Shapes(split)[index]
            for text in [item["caption"], *item["expressions"]]:
                words.update(split_words(text))
    assert len(words) > 80
    assert {word for word in words if len(tokenizer.encode(word)) != 1} == set()


def test_resumed_is_uninterrupted(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SPLITS, "val", (4, SPLITS["val"][1]))
    tokenizer = weights.load_clip(run / "clip.safetensors").tokenizer

    def new_clip(seed):  # the same, but for the seconds that learning the words takes
        clip = CLIP(replace(SMALL, vocab_size=tokenizer.vocab_size))
        clip.tokenizer = tokenizer
        return clip

    monkeypatch.setattr(pretrain, "new_clip", new_clip)
    s = Settings(**torch.load(run / "state.pt", weights_only=True)["settings"])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, pretrain, "to_device", 4)
        pretrain.pretrain(replace(s, save_minutes=0))
    pretrain.pretrain(replace(s, resume=True))
    assert_same_run(Path("runs/clip"), run)


def test_phrase_truth():
    """Rows of (shape, colour, filling, size): a phrase is true of an image if one object has all that it names."""
    named = torch.tensor([[-1, -1, 2, 5], [-1, -1, -1, 7], [-2, -2, -2, -2]])
    attributes = torch.tensor([[[0, 1, 2, 5], [1, 1, 3, 7]], [[0, 0, 2, 7], [-3, -3, -3, -3]]])
    assert phrase_truth(named, attributes).tolist() == [[True, False], [True, True], [False, False]]
