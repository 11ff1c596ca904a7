"""The contrastive pre-training of the tiny CLIP."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from listener import ALL_ADJECTIVES, ALL_NOUNS, Listener
from makers import assert_close, calls_of, random
from makers_training import ON_CPU, Killed, assert_same_run, kill, log_of

from hivg import weights
from hivg.clip import CLIP, CLIPConfig
from hivg.data.drawn.pairs import MAX_EXPRESSIONS, NO_PHRASE, NO_TARGET, STREAM, Pairs, draw_pair, make_twins
from hivg.data.drawn.phrases import COLOUR
from hivg.data.drawn.scenes import COLOURS, DRAWN, HELD_OUT, MAX_OBJECTS, Shapes
from hivg.tokenizer import Tokenizer, split_words
from hivg.training import optimizers, pretrain
from hivg.training.pretrain import Settings, patch_similarity, phrase_loss, phrase_truth

SMALL = CLIPConfig(32, 16, 32, 6, 2, 32, 4, 2, 32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """runs/clip after a short pre-training."""
    folder = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(pretrain.CLIP_SIZES, "tiny", SMALL)
        pretrain.pretrain(Settings(dataset="shapes-wide", epochs=2, epoch_samples=16, val_images=64, batch_size=8,
                                   warmup_steps=1, **ON_CPU))
    return folder / "runs/clip"


def test_pretraining(run):
    assert [row["step"] for row in log_of(run) if "epoch" in row] == [2, 4]
    row, = (row for row in log_of(run) if "loss" in row)
    assert row["clc"] + row["phrases"] + row["expressions"] == pytest.approx(row["loss"], abs=1e-4)
    assert 0 <= row["meant"] <= 1
    clip = weights.load_clip(run / "clip.safetensors")
    assert 0 <= clip.info["accuracy"] <= 1 and clip.info["stage"] == "pretrain"
    assert clip.info["dataset"] == "shapes-wide"


def test_every_word_is_a_token(run):
    """So a row has as many tokens as its text has words."""
    tokenizer = weights.load_clip(run / "clip.safetensors").tokenizer
    words = set()
    for split in ("val", "testA", "testB", "compose", "ordinal", "negation", "absent"):
        for index in range(60):
            for text in Shapes(split, wide=True).texts(index):
                words.update(split_words(text))
    assert len(words) > 80
    assert {word for word in words if len(tokenizer.encode(word)) != 1} == set()


@pytest.fixture
def folder(run, tmp_path, monkeypatch):
    """An empty current folder, in which the same CLIP is begun with as in `run`."""
    monkeypatch.chdir(tmp_path)
    tokenizer = weights.load_clip(run / "clip.safetensors").tokenizer

    def new_clip(s):  # the same, but for the seconds that learning the words takes
        clip = CLIP(replace(SMALL, vocab_size=tokenizer.vocab_size))
        clip.tokenizer = tokenizer
        return clip

    monkeypatch.setattr(pretrain, "new_clip", new_clip)


def test_a_clip_is_continued_with_the_words_that_it_lacks(run, tmp_path):
    """Old texts keep their features, and each new word is a token."""
    old = weights.load_clip(run / "clip.safetensors")
    merges = old.tokenizer.merges[:300]
    fewer = CLIP(replace(SMALL, vocab_size=512 + len(merges) + 2))
    fewer.tokenizer = Tokenizer(merges)
    weights.save(tmp_path / "fewer.safetensors", fewer)
    new = pretrain.new_clip(Settings(clip=str(tmp_path / "fewer.safetensors")))
    assert new.tokenizer.merges[:300] == merges and new.config.vocab_size > fewer.config.vocab_size
    known = "red"
    assert len(fewer.tokenizer.encode(known)) == 1 and len(fewer.tokenizer.encode("penultimate")) > 1
    assert len(new.tokenizer.encode("penultimate")) == 1
    was, now = (clip.encode_text(clip.tokenizer([known])) for clip in (fewer, new))
    torch.testing.assert_close(was, now, rtol=0, atol=0)


def test_a_clip_of_another_world_is_not_continued(tmp_path):
    weights.save(tmp_path / "other.safetensors", CLIP(SMALL))
    with pytest.raises(ValueError, match="no CLIP of the drawn world"):
        pretrain.new_clip(Settings(clip=str(tmp_path / "other.safetensors")))


def test_resumed_is_uninterrupted(run, folder, monkeypatch):
    s = Settings(**torch.load(run / "state.pt", weights_only=True)["settings"])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, pretrain, "to_device", 4)
        pretrain.pretrain(replace(s, save_minutes=0))
    pretrain.pretrain(replace(s, resume=True))
    assert_same_run(Path("runs/clip"), run)


@pytest.mark.parametrize("optimizer, shares", [("muon", [1, 0.25]), ("adamw", [1])])
def test_adamw_has_its_share_beside_muon_alone(folder, monkeypatch, optimizer, shares):
    steps = calls_of(monkeypatch, optimizers, "step_optimizers")
    pretrain.pretrain(Settings(epochs=1, epoch_samples=8, val_images=64, batch_size=8, optimizer=optimizer,
                               adamw_share=0.25, **ON_CPU))
    [(stepped,)] = steps
    rates = [optimizer.param_groups[0]["lr"] for optimizer in stepped]
    assert rates == [share * log_of("runs/clip")[0]["lr"] for share in shares]


def test_phrase_truth():
    """Rows of (shape, colour, filling, size): a phrase is true of an image if one object has all that it names."""
    named = torch.tensor([[-1, -1, 2, 5], [-1, -1, -1, 7], [-2, -2, -2, -2]])
    attributes = torch.tensor([[[0, 1, 2, 5], [1, 1, 3, 7]], [[0, 0, 2, 7], [-3, -3, -3, -3]]])
    assert phrase_truth(named, attributes).tolist() == [[True, False], [True, True], [False, False]]


# --- the data ---


@pytest.mark.parametrize("wide, reframe, hard_mix", [(False, 0, False), (False, 1, False), (True, 0, False),
                                                     (True, 1, False), (True, 0, True)])
def test_twins_differ_in_one_look_alone(wide, reframe, hard_mix):
    """Every object's own look is unlike all others', and its twin has another shape, or another colour. Both are told
    truly, by expressions that mean the same object."""
    for index in range(40):
        (scene, twin), (said, twin_said) = draw_pair(np.random.default_rng(index), wide, reframe, hard_mix)
        changed = set()
        for a, b in zip(scene.objects, twin.objects):
            assert (a.x, a.y, a.size, a.filled, a.stretch) == (b.x, b.y, b.size, b.filled, b.stretch)
            changed.add((a.colour != b.colour, a.shape != b.shape))
            assert (a.colour, a.shape) not in HELD_OUT and (b.colour, b.shape) not in HELD_OUT
        assert changed in ({(True, False)}, {(False, True)})
        own = "colour" if changed == {(False, True)} else "shape"
        looks = [getattr(obj, own) for obj in scene.objects]
        assert len(set(looks)) == len(looks)
        assert [e.target for e in said] == [e.target for e in twin_said] and said
        assert len(scene.objects) <= MAX_OBJECTS and all(e.target >= 0 for e in said)
        for one, spoken in ((scene, said), (twin, twin_said)):
            for expression in spoken:
                if expression.kind != "place":
                    assert Listener(one, expression.text).referents() == [expression.target], expression
        for expression in said:  # an expression does without the look that gives its object away
            look = getattr(scene.objects[expression.target], own)
            words = [word for word, said in ALL_ADJECTIVES.items() if said == ("colour", look)]
            words += [word for word, shape in ALL_NOUNS.items() if shape == look]
            assert not any(f" {word} " in f" {expression.text} " for word in words)


def test_scenes_without_twins_end():
    """Eight objects of one shape need all colours, and one of them is held out for that shape."""
    rng = np.random.default_rng(0)
    scene = draw_pair(rng, False)[0][0]
    obj = scene.objects[0]
    scene = replace(scene, objects=tuple(replace(obj, shape="star") for _ in range(8)))
    assert make_twins(rng, scene, dict.fromkeys(COLOURS), COLOUR) is None


def test_items_depend_on_their_index_alone():
    pairs = Pairs(32, seed=3)
    first, again = pairs[7], Pairs(32, seed=3)[7]
    assert first["expressions"] == again["expressions"] and torch.equal(first["pixels"], again["pixels"])
    assert pairs[8]["captions"] != first["captions"]
    assert (first["targets"] != NO_TARGET).sum() == len(first["expressions"]) > 0


def test_reframed_pairs_have_other_frames():
    """The wider world's own images are at most twice as long as wide."""
    padded = []
    for reframe in (0.0, 1.0):
        pairs = Pairs(32, wide=True, reframe=reframe)
        padded.append(max(pairs[i]["padding_mask"].float().mean().item() for i in range(16)))
    assert padded[0] <= 0.5 < padded[1]


def test_hard_mix_asks_for_later_ranks():
    """Without it about one expression in seven means the third or a later one of four or more."""
    shares = []
    for hard_mix in (False, True):
        said = [e for i in range(60) for e in draw_pair(np.random.default_rng(i), True, hard_mix=hard_mix)[1][0]]
        ranks = [e.detail.split(" of ") for e in said if e.kind == "ordinal"]
        shares.append(sum(int(rank) >= 3 and int(n) >= 4 for rank, n in ranks) / len(said))
    assert shares[1] > 1.8 * shares[0] > 0, shares


def test_hard_mix_is_refused_in_the_narrower_world():
    with pytest.raises(ValueError, match="--hard_mix is for shapes-wide"):
        Settings(dataset="shapes", hard_mix=True)


def test_no_split_draws_from_the_random_numbers_of_the_pairs():
    numbers = [Shapes(split, wide=dataset == "shapes-wide").number for dataset in DRAWN for split in DRAWN[dataset]]
    assert len(set(numbers)) == len(numbers) and not {STREAM, STREAM + 1} & set(numbers)


# --- the contrasts ---


def test_patch_similarity():
    """Sharp, it is the cosine of the best patch; blunt, the mean over all; and the words are averaged."""
    words = F.normalize(random(3, 2, 8), dim=-1)
    patches = F.normalize(random(4, 5, 8, seed=1), dim=-1)
    cosine = F.cosine_similarity(words[:, :, None, None], patches, dim=-1)  # (3, 2, 4, 5)
    assert_close("sharp", patch_similarity(words, patches, 1e6), cosine.amax(-1).mean(1), 1e-10)
    assert_close("blunt", patch_similarity(words, patches, 0.0), cosine.mean((1, 3)), 1e-10)


def test_phrase_loss():
    """Worked out in loops: what is true is no negative."""
    logits = random(4, 3).requires_grad_()
    is_true = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 1, 0], [1, 1, 1]]).bool()  # the last is true of all images
    own = torch.tensor([0, 0, 1, 2])
    terms = []
    for m, b in enumerate(own):
        other_images = [logits[m, j] for j in range(3) if not is_true[m, j]]
        other_phrases = [logits[k, b] for k in range(4) if not is_true[k, b]]
        for negatives in (other_images, other_phrases):
            terms.append(torch.stack([logits[m, b], *negatives]).logsumexp(0) - logits[m, b])
    loss = phrase_loss(logits, is_true, own)
    assert_close("phrases", loss, sum(terms) / 4, 1e-12)
    loss.backward()
    assert logits.grad.isfinite().all() and not logits.grad[0, 2]


def test_contrast_of_bfloat16_features_is_in_float32(run, monkeypatch):
    """In bfloat16 logits near 100 are multiples of 1/2."""
    seen = calls_of(monkeypatch, pretrain, "contrastive_loss")
    model = weights.load_clip(run / "clip.safetensors")
    batch = next(iter(pretrain.training_batches(Pairs(32), 0, 4, 1, tokenizer=model.tokenizer)))
    with torch.autocast("cpu", torch.bfloat16):
        batch = pretrain.to_device(batch, model.tokenizer, torch.device("cpu"))
        pretrain.ContrastiveCriterion(model)(batch)
    logits, = seen[0]
    assert logits.dtype == torch.float32 and logits.shape == (4, 4)


def test_an_expression_is_contrasted_with_the_objects_of_its_image(run):
    """The right object is the one whose phrase finds the patches that look like the expression."""
    criterion = pretrain.ContrastiveCriterion(CLIP(SMALL))
    E = 4
    eye = torch.eye(E)
    patches = torch.stack([eye, eye])  # (2 images, 4 patches, E), each patch of its own kind
    words = torch.zeros(16, 2, E)
    named = torch.full((2, 8, 4), NO_PHRASE)
    for o in range(3):  # object o of both images is where patch o is
        words[o] = words[8 + o] = eye[o]
        named[:, o] = -1
    targets = torch.full((2, MAX_EXPRESSIONS), NO_TARGET)
    targets[0, 0], targets[1, 0] = 2, 1
    expressions = eye[[2, 1]]  # (2, E)
    scores = criterion.scores(words, patches, expressions, {"named": named, "targets": targets})
    assert scores.shape == (2, 8) and scores.argmax(1).tolist() == [2, 1]
    assert (scores[:, 3:] == float("-inf")).all()
