"""Captions and phrases of the pre-training: true, and about all objects."""

import re
from collections import Counter

import numpy as np
from listener import ADJECTIVES, NOUNS, Listener, scenes

from hivg.data.drawn.pairs import attribute_ids
from hivg.data.drawn.phrases import caption, object_phrases, relate
from hivg.data.drawn.scenes import SHAPES


def test_captions():
    for scene, _ in scenes("train"):
        text = caption(scene, np.random.default_rng(0))
        assert len(text.split()) <= 60
        counts = Counter(word for word in re.findall(r"[a-z]+", text) if word in SHAPES)
        assert counts == Counter(o.shape for o in scene.objects)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text


def test_long_captions_stay_within_60_words():
    """Eight objects with all their attributes and places would take more."""
    crowded = [scene for scene, _ in scenes("train") if len(scene.objects) == 8]
    lengths = []
    for scene in crowded:
        lengths += [len(caption(scene, np.random.default_rng(seed)).split()) for seed in range(60)]
    assert 50 < max(lengths) <= 60


def test_captions_tell_places_truly():
    places = {"left": (0, 1), "right": (2, 1), "top": (1, 0), "bottom": (1, 2), "middle": (1, 1)}  # column, row
    checked = 0
    for index, (scene, _) in enumerate(scenes("train")):
        text = caption(scene, np.random.default_rng(index))
        shapes = Counter(o.shape for o in scene.objects)
        for o in scene.objects:
            found = re.search(rf"{o.shape} (?:at|on|in) the ([a-z ]+?)(?:,| and|$)", text)
            if not found or "of" in found[1] or shapes[o.shape] > 1:
                continue
            told = [places[word] for word in found[1].split()]
            column = next((x for x, _ in told if x != 1), 1)
            row = next((y for _, y in told if y != 1), 1)
            assert (column, row) == (int(3 * o.x / scene.width), int(3 * o.y / scene.height)), (text, scene)
            checked += 1
    assert checked > 30


def test_captions_tell_relations_truly():
    rng = np.random.default_rng(0)
    for scene, _ in scenes("train"):
        listener = Listener(scene, relate(rng, *scene.objects[:2]))
        name = listener.relation()
        assert listener.along(0, name) > listener.along(1, name) and not listener.rest


def test_captions_name_other_attributes_now_and_then():
    named = Counter()
    for index, (scene, _) in enumerate(scenes("train")):
        words = re.findall(r"[a-z-]+", caption(scene, np.random.default_rng(index)))
        named.update({ADJECTIVES[word][0] for word in words if word in ADJECTIVES})
    assert named.keys() == {"size", "filled", "colour"}
    assert all(0.3 < n / len(scenes("train")) < 0.5 for n in named.values()), named


def test_phrases():
    """Each object of a scene has a phrase, read here by the listener: it is true of the object, and the attributes that
    it names say of which others just as the listener does."""
    named_of = Counter()
    rng = np.random.default_rng(0)
    for scene, _ in scenes("train")[:60]:
        phrases, named = object_phrases(scene, rng)
        assert len(phrases) == len(named) == len(scene.objects)
        ids = [attribute_ids(o) for o in scene.objects]
        for target, (phrase, names) in enumerate(zip(phrases, named)):
            *adjectives, noun = phrase.split()[1:]  # without "a"
            said = dict(ADJECTIVES[word] for word in adjectives) | {"shape": NOUNS[noun]}
            told = attribute_ids(scene.objects[target], names)
            for i, o in enumerate(scene.objects):
                heard = all(getattr(o, key) == value for key, value in said.items())
                assert heard == all(n in (-1, a) for n, a in zip(told, ids[i])), phrase
                assert heard or i != target, phrase
            named_of.update(said.keys())
    assert named_of["shape"] == named_of["colour"] > named_of["filled"] > named_of["size"] > 10
