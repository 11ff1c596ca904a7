"""The bundled data set: every expression means exactly one object, and boxes and masks are those of the pixels.

The expressions are checked by a parser and an evaluator of their own, which know English words and the numbers of
a scene and nothing of how the expressions were made.
"""
import dataclasses
import math
import re
from collections import Counter
from functools import cache
from itertools import islice

import numpy as np
import pytest

from hivg.data import shapes
from hivg.data.expressions import KINDS, caption, relate
from hivg.data.shapes import COLOURS, HELD_OUT, SHAPES, SIZES, SPLITS, Shapes, boxes_of, draw

EXPRESSED = [split for split in SPLITS if split != "pretrain"]  # those with expressions

COUNTS = {"train": 400, "val": 250, "test": 250, "testA": 150, "testB": 250, "compose": 300}


@cache
def scenes(split):
    """The first scenes of a split with their expressions, made once for all tests."""
    dataset = Shapes(split)
    return [dataset.scene(i) for i in range(COUNTS[split])]


def expressions(split):
    return [(scene, expression) for scene, spoken in scenes(split) for expression in spoken]


# ---- the listener: reads a text, finds what it means

ADJECTIVES = {
    **{w: ("size", "small") for w in ("small", "little", "tiny")},
    **{w: ("size", "medium") for w in ("medium", "medium-sized")},
    **{w: ("size", "large") for w in ("large", "big")},
    **{w: ("filled", True) for w in ("filled", "solid")},
    **{w: ("filled", False) for w in ("outlined", "hollow", "empty")},
    **{w: ("colour", w) for w in "red green blue brown purple orange black pink".split()},
    "violet": ("colour", "purple")}
NOUNS = {**{w: w for w in "circle square triangle star heart diamond cross arrow".split()},
         **{w: None for w in ("shape", "object", "thing", "one")}}
RANKS = {"second": 2, "2nd": 2, "third": 3, "3rd": 3, "fourth": 4, "4th": 4, "fifth": 5, "5th": 5}
SUPERLATIVES = {
    **{w: "left" for w in ("leftmost", "left", "furthest left", "on the left", "on the far left",
                           "furthest to the left")},
    **{w: "right" for w in ("rightmost", "right", "furthest right", "on the right", "on the far right",
                            "furthest to the right")},
    **{w: "above" for w in ("topmost", "top", "highest", "uppermost", "at the top", "at the very top")},
    **{w: "below" for w in ("lowest", "bottom", "bottommost", "at the bottom", "at the very bottom")},
    **{w: "largest" for w in ("largest", "biggest")}, **{w: "smallest" for w in ("smallest", "tiniest")}}
RELATIONS = [  # the first that matches counts
    (r"(?:to the |on the )?(left|right)(?: side)?(?: of)?\b", None),
    (r"(?:above|over|higher(?: than)?)\b", "above"),
    (r"(?:below|under|beneath|lower(?: than)?)\b", "below"),
    (r"(?:closest to|nearest to|next to)\b", "closest"),
    (r"(?:furthest from|farthest from|furthest away from)\b", "furthest"),
    (r"between\b", "between")]


class Listener:
    """Reads one expression word by word; `kind` and `open_head` tell what it read."""

    def __init__(self, scene, text):
        self.things, self.rest, self.kind, self.open_head = scene.objects, text, None, None

    def take(self, pattern):
        found = re.match(pattern + r"(?: |$)", self.rest)
        if found:
            self.rest = self.rest[found.end():]
        return found

    def noun_phrase(self):
        """(superlative or rank or None, the objects that the adjectives and the noun fit)."""
        self.take("the")
        special, wanted = None, {}
        while True:
            word = (self.take("furthest (?:left|right)") or self.take(r"\S+"))[0].strip()
            if word in NOUNS:
                if NOUNS[word]:
                    wanted["shape"] = NOUNS[word]
                return special, [i for i, o in enumerate(self.things)
                                 if all(getattr(o, key) == value for key, value in wanted.items())]
            if word in ADJECTIVES:
                key, value = ADJECTIVES[word]
                assert key not in wanted, f"{key} said twice"
                wanted[key] = value
            else:
                assert special is None and not wanted, f"unknown or misplaced word {word!r}"
                special = RANKS.get(word) or SUPERLATIVES[word]

    def anchor(self):
        special, members = self.noun_phrase()
        assert special is None and len(members) == 1, "an anchor must be named by its attributes"
        return members[0]

    def relation(self):
        for pattern, name in RELATIONS:
            found = self.take(pattern)
            if found:
                return name or found[1]
        return None

    def direction(self, i, name):
        o = self.things[i]
        return {"left": -o.x, "right": o.x, "above": -o.y, "below": o.y}[name]

    def extreme(self, members, name):
        """The one that is clearly the furthest; by size, the only one of the outermost size."""
        assert len(members) >= 2, "a superlative among one"
        if name in ("largest", "smallest"):
            sign = 1 if name == "largest" else -1
            measure, margin = (lambda i: sign * SIZES[self.things[i].size]), 1e-6
        else:
            measure, margin = (lambda i: self.direction(i, name)), 0.06 - 1e-9
        first, second = sorted(members, key=measure, reverse=True)[:2]
        assert measure(first) - measure(second) >= margin, "not clear"
        return first

    def related(self, candidates, name, anchors):
        """Those of the candidates that meet the condition, however weakly. Anchors do not count."""
        candidates = [i for i in candidates if i not in anchors]
        if name in ("closest", "furthest"):
            anchor = self.things[anchors[0]]
            distance = {i: math.dist((self.things[i].x, self.things[i].y), (anchor.x, anchor.y)) for i in candidates}
            best = (min if name == "closest" else max)(distance, key=distance.get)
            ratios = [max(distance[i], distance[best]) / min(distance[i], distance[best])
                      for i in candidates if i != best]
            assert min(ratios) >= 1.25 - 1e-9, "not clear"
            return [best]
        if name == "between":
            a, b = (np.array([self.things[i].x, self.things[i].y]) for i in anchors)
            kept = []
            for i in candidates:
                p = np.array([self.things[i].x, self.things[i].y])
                along = (p - a) @ (b - a) / ((b - a) @ (b - a))
                aside = np.linalg.norm(p - a - along * (b - a)) / np.linalg.norm(b - a)
                kept += [i] if 0 < along < 1 and aside < 0.5 else []
            return kept
        start = self.direction(anchors[0], name)
        kept = [i for i in candidates if self.direction(i, name) > start]
        if len(kept) == 1:
            assert self.direction(kept[0], name) >= start + 0.06 - 1e-9, "not clear"
        return kept

    def referents(self):
        """All the objects the text may mean."""
        special, members = self.noun_phrase()
        if isinstance(special, int):
            return self.ordinal(special, members)
        location = next((name for phrase, name in SUPERLATIVES.items() if self.rest == phrase), None)
        if special or location:
            assert not (special and self.rest), "words after a superlative"
            self.kind = "superlative"
            return [self.extreme(members, special or location)]
        if not self.rest:
            self.kind = "attribute"
            return members
        said_that = self.take("that is")
        return self.conditions(members, said_that)

    def ordinal(self, rank, members):
        self.kind = "ordinal"
        assert self.take("from") and len(members) >= 3
        self.take("the")
        side = {"left": "left", "right": "right", "top": "above", "bottom": "below"}[self.rest]
        order = sorted(members, key=lambda i: self.direction(i, side), reverse=True)
        steps = [self.direction(i, side) - self.direction(j, side) for i, j in zip(order, order[1:])]
        assert min(steps) >= 0.06 - 1e-9, "not clear"
        return [order[rank - 1]]

    def conditions(self, members, said_that):
        """What follows the noun: a relation, or two conditions joined by "and"."""
        adjective = said_that and self.take(r"(" + "|".join(ADJECTIVES) + r")")
        if adjective:
            self.kind = "conjunction"
            members = [i for i in members if self.has(i, adjective[1])]
            assert self.take("and")
            other = self.take(r"(" + "|".join(ADJECTIVES) + r")")
            if other:
                assert not self.rest
                return [i for i in members if self.has(i, other[1])]
            name = self.relation()
            members = self.related(members, name, [self.anchor()])
            assert not self.rest
            return members
        name = self.relation()
        if self.take("and"):  # "above and left of the star"
            other = self.relation()
            pairs = [(name, [self.anchor()])]
            pairs.append((other, pairs[0][1]))
        else:
            pairs = [(name, [self.anchor()])]
            if self.take("and"):
                if name == "between":
                    pairs[0][1].append(self.anchor())
                else:
                    pairs.append((self.relation(), [self.anchor()]))
        assert not self.rest, f"left over: {self.rest!r}"
        self.kind = "relation" if len(pairs) == 1 else "conjunction"
        anchors = {i for _, some in pairs for i in some}
        members = [i for i in members if i not in anchors]
        self.open_head = len(members) > 1
        fits = [set(self.related(members, name, some)) for name, some in pairs]
        return sorted(set.intersection(*fits))

    def has(self, i, word):
        key, value = ADJECTIVES[word]
        return getattr(self.things[i], key) == value


@pytest.mark.parametrize("split", EXPRESSED)
def test_every_expression_means_its_target_and_nothing_else(split):
    for scene, expression in expressions(split):
        listener = Listener(scene, expression.text)
        try:
            referents = listener.referents()
        except Exception as error:
            raise AssertionError(f"{expression.text!r} in {scene}: {error!r}") from error
        assert referents == [expression.target], (expression, referents, scene)
        assert listener.kind == expression.kind, expression


def look(shape, colour, size, filled, x, y):
    return shapes.Object(shape, colour, size, filled, x, y, SIZES[size], 0.0)


BY_HAND = shapes.Scene(1.0, 1.0, shapes.Background("plain", ((200, 200, 200), (210, 210, 210)), 0.1, 0.0, 0), (
    look("circle", "red", "large", True, 0.2, 0.2), look("circle", "blue", "small", True, 0.45, 0.3),
    look("circle", "red", "small", False, 0.8, 0.4), look("star", "red", "medium", True, 0.52, 0.7),
    look("square", "green", "small", True, 0.28, 0.8)))


@pytest.mark.parametrize("text, meant", [
    ("circle", [0, 1, 2]), ("the red circle", [0, 2]), ("hollow one", [2]), ("purple thing", []),
    ("the left circle", [0]), ("lowest thing", [4]), ("red one on the far right", [2]), ("the biggest shape", [0]),
    ("second circle from the right", [1]), ("3rd object from left", [1]), ("fourth thing from the top", [3]),
    ("the thing left of the star", [0, 1, 4]), ("circle under the star", []), ("thing above the star", [0, 1, 2]),
    ("circle next to the hollow thing", [1]), ("the circle furthest from the hollow shape", [0]),
    ("one between the big circle and the empty object", [1]), ("circle left and above the star", [0, 1]),
    ("the circle above the star and left of the hollow thing", [0, 1]), ("one that is red and above the star", [0, 2]),
    ("the thing that is small and red", [2]), ("circle that is on the left side of the blue one", [0])])
def test_listener_on_a_scene_by_hand(text, meant):
    """The listener must be able to find several objects or none, or it would prove nothing."""
    assert Listener(BY_HAND, text).referents() == meant


@pytest.mark.parametrize("text", [
    "smallest circle", "leftmost star", "third star from the top", "thing left of the circle", "bottom circle above",
    "circle closest to the star", "the pretty circle", "red red circle", "lowest circle of all"])
def test_listener_refuses_what_is_unclear(text):
    with pytest.raises((AssertionError, KeyError, TypeError)):
        Listener(BY_HAND, text).referents()


# ---- expressions

@pytest.mark.parametrize("split", EXPRESSED)
def test_expressions_of_a_scene(split):
    for scene, spoken in scenes(split):
        texts = [e.text for e in spoken]
        assert len(set(texts)) == len(texts) == 4
        assert all(1 <= len(text.split()) <= 15 and text == text.lower().strip() for text in texts), texts
        assert all(re.fullmatch(r"[a-z0-9-]+( [a-z0-9-]+)*", text) for text in texts), texts
        assert all(0 <= e.target < len(scene.objects) for e in spoken)


def test_kinds_of_expressions():
    def shares(split):
        counts = Counter(e.kind for _, e in expressions(split))
        return {kind: count / counts.total() for kind, count in counts.items()}

    assert set(shares("testA")) == {"attribute"}
    assert set(shares("testB")) == {"ordinal", "relation"} and min(shares("testB").values()) > 0.3
    for split in ("train", "val", "test", "compose"):
        assert set(shares(split)) == set(KINDS)
    wanted = {"attribute": 0.35, "superlative": 0.17, "ordinal": 0.10, "relation": 0.25, "conjunction": 0.13}
    for kind, share in shares("train").items():
        assert abs(share - wanted[kind]) < 0.05, (kind, share)


def test_expressions_vary():
    texts = [e.text for split in ("train", "val", "test") for _, e in expressions(split)]
    words = Counter(word for text in texts for word in text.split())
    needed = {*ADJECTIVES, *NOUNS, *"""the second 2nd third leftmost left highest biggest smallest of above over below
              under beneath closest nearest next furthest between and that far very side from""".split()}
    assert needed <= set(words), needed - set(words)
    assert 0.35 < sum(text.startswith("the ") for text in texts) / len(texts) < 0.75
    lengths = Counter(len(text.split()) for text in texts)
    assert lengths[1] > 0 and sum(n for length, n in lengths.items() if length >= 11) > 0.02 * len(texts)
    assert len(set(texts)) > 0.7 * len(texts)


def test_most_relations_are_needed():
    listeners = [(Listener(s, e.text), e) for s, e in expressions("train") + expressions("testB")
                 if e.kind == "relation"]
    for listener, _ in listeners:
        listener.referents()
    assert sum(bool(listener.open_head) for listener, _ in listeners) > 0.65 * len(listeners)


# ---- splits

def test_same_seed_same_item():
    for split in ("train", "compose"):
        one, two = Shapes(split, seed=3)[5], Shapes(split, seed=3)[5]
        assert np.array_equal(one["image"], two["image"]) and np.array_equal(one["labels"], two["labels"])
        assert np.array_equal(one["boxes"], two["boxes"])
        assert all(one[key] == two[key] for key in ("expressions", "targets", "kinds", "caption"))
    assert Shapes("train", seed=3).scene(5) != Shapes("train", seed=4).scene(5)
    assert Shapes("train").scene(2**40 - 1)


def test_same_item_on_every_machine():
    """Change this only together with all published numbers on the data set."""
    assert [e.text for e in Shapes("test").scene(0)[1]] == [
        "orange heart that is filled and above the big black thing", "the black thing under the empty thing",
        "the hollow orange shape", "the orange hollow heart"]


def test_splits_share_no_scene():
    seen = [scene.objects for split in EXPRESSED for scene, _ in scenes(split)]
    assert len(set(seen)) == len(seen)


def test_held_out_pairs_are_in_compose_only():
    assert len(HELD_OUT) == 6
    for split in EXPRESSED:
        pairs = {(o.colour, o.shape) for scene, _ in scenes(split) for o in scene.objects}
        if split != "compose":
            assert not pairs & HELD_OUT, split
    assert len(pairs := {(o.colour, o.shape) for s, _ in scenes("train") for o in s.objects}) == 64 - 6
    assert {c for c, _ in pairs} == set(COLOURS) and {s for _, s in pairs} == set(SHAPES)
    meant = set()
    for scene, expression in expressions("compose"):
        target, words = scene.objects[expression.target], expression.text.split()
        assert (target.colour, target.shape) in HELD_OUT, expression
        assert target.shape in words and ("violet" if "violet" in words else target.colour) in words, expression
        meant.add((target.colour, target.shape))
    assert meant == HELD_OUT


def test_pretraining_pictures():
    """A caption, no expressions, no colour twice, and no pair that is kept for compose."""
    pictures = [Shapes("pretrain").scene(i) for i in range(200)]
    assert {3, 4, 5, 6, 7} <= {len(scene.objects) for scene, _ in pictures} <= set(range(1, 9))
    assert not any(expressions for _, expressions in pictures)
    assert not {(o.colour, o.shape) for scene, _ in pictures for o in scene.objects} & HELD_OUT
    assert all(len({o.colour for o in scene.objects}) == len(scene.objects) for scene, _ in pictures)
    item = Shapes("pretrain")[0]
    assert item["expressions"] == [] and item["boxes"].shape == (0, 4) and item["caption"]


def test_twins():
    """Pictures 2k and 2k + 1 differ in the shape of every object, and their captions tell them apart."""
    pretrain = Shapes("pretrain")
    for k in range(0, 60, 2):
        (a, _), (b, _) = pretrain.scene(k), pretrain.scene(k + 1)
        assert dataclasses.replace(a, objects=()) == dataclasses.replace(b, objects=())
        assert len(a.objects) == len(b.objects)
        for o, p in zip(a.objects, b.objects):
            assert o.shape != p.shape and o == dataclasses.replace(p, shape=o.shape)
        assert pretrain[k]["caption"] != pretrain[k + 1]["caption"]


def test_phrases():
    """Each object of a picture has a phrase, read here by the listener: it is true of the object, and of which others
    it is true `named` and `attributes` say just as the listener does."""
    named_of, pretrain = Counter(), Shapes("pretrain")
    for k in range(60):
        item, objects = pretrain[k], pretrain.scene(k)[0].objects
        assert len(item["phrases"]) == len(item["named"]) == len(item["attributes"]) == len(objects)
        for target, (phrase, named) in enumerate(zip(item["phrases"], item["named"])):
            *adjectives, noun = phrase.split()[1:]  # without "a"
            said = dict(ADJECTIVES[word] for word in adjectives) | {"shape": NOUNS[noun]}
            heard = [all(getattr(o, key) == value for key, value in said.items()) for o in objects]
            assert heard == [all(n in (-1, a) for n, a in zip(named, has)) for has in item["attributes"]], phrase
            assert heard[target], phrase
            named_of.update(said.keys())
    assert named_of["shape"] == named_of["colour"] > named_of["filled"] > named_of["size"] > 10


def test_lengths_and_bad_arguments():
    assert {split: 4 * len(Shapes(split)) for split in EXPRESSED[1:]} == {
        "val": 1000, "test": 5000, "testA": 2000, "testB": 2000, "compose": 2000}
    assert len(Shapes("train")) >= 2**30
    with pytest.raises(ValueError, match="'dev'.*train, val, test, testA, testB, compose"):
        Shapes("dev")
    for index in (-1, 250):
        with pytest.raises(IndexError, match=str(index)):
            Shapes("val")[index]
    assert len(list(islice(Shapes("val"), 3))) == 3


# ---- pictures

def test_scenes_are_as_promised():
    objects, aspects, textures = [], [], Counter()
    for scene, _ in scenes("train"):
        assert max(scene.width, scene.height) == 1 and 0.499 <= scene.width / scene.height <= 2.001
        assert 3 <= len(scene.objects) <= 8
        for o in scene.objects:
            ratio = o.diameter / math.sqrt(scene.width * scene.height) / SIZES[o.size]
            assert 0.95 <= ratio <= 1.05 and abs(o.rotation) <= 10
            assert 0 < o.x < scene.width and 0 < o.y < scene.height
        objects += scene.objects
        aspects.append(scene.width / scene.height)
        textures[scene.background.texture] += 1
    assert min(aspects) < 0.6 and max(aspects) > 1.7
    assert {len(scene.objects) for scene, _ in scenes("train")} == set(range(3, 9))
    assert set(textures) == set(shapes.TEXTURES)
    for attribute, values in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES), ("filled", (True, False))):
        assert {getattr(o, attribute) for o in objects} == set(values)


def test_items():
    for index in range(40):
        item = Shapes("train")[index]
        width, height = item["image"].size
        assert item["image"].mode == "RGB" and max(width, height) == 256
        assert item["labels"].shape == (height, width) and item["labels"].dtype == np.uint8
        assert item["boxes"].shape == (4, 4) and item["boxes"].dtype == np.float32
        for target, (xmin, ymin, xmax, ymax) in zip(item["targets"], item["boxes"].astype(int)):
            mask = item["labels"] == target + 1
            inside = mask[ymin:ymax, xmin:xmax]
            assert inside.sum() == mask.sum() > 0                                               # nothing outside,
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()  # no slack
        scene, spoken = Shapes("train").scene(index)
        assert item["expressions"] == [e.text for e in spoken] and item["targets"] == [e.target for e in spoken]
        assert item["kinds"] == [e.kind for e in spoken]


@pytest.mark.parametrize("split", ("train", "compose"))
def test_masks_are_the_pixels(split):
    """A pixel has an object's colour exactly where the labels say so; each object shows 75 % of itself or more."""
    for scene, _ in scenes(split)[:60]:
        image, labels = draw(scene)
        pixels = np.asarray(image)
        for name, colour in COLOURS.items():
            own = [i + 1 for i, o in enumerate(scene.objects) if o.colour == name]
            assert np.array_equal((pixels == colour).all(-1), np.isin(labels, own)), name
        for i, thing in enumerate(scene.objects):
            alone = draw(dataclasses.replace(scene, objects=(thing,)))[1] == 1
            visible = labels == i + 1
            assert not (visible & ~alone).any() and visible.sum() >= 0.75 * alone.sum()
            assert not (alone[0].any() or alone[-1].any() or alone[:, 0].any() or alone[:, -1].any())


def test_outlined_shapes_have_a_hole_and_a_thick_border():
    background = shapes.Background("plain", ((200, 200, 200), (210, 210, 210)), 0.1, 0.0, 0)
    for shape in SHAPES:
        area = {}
        for filled in (True, False):
            thing = shapes.Object(shape, "red", "large", filled, 0.5, 0.5, 0.8, 0.0)
            area[filled] = (draw(shapes.Scene(1.0, 1.0, background, (thing,)))[1] > 0).sum()
        assert 0.4 < area[False] / area[True] < 0.85, shape


def test_drawing_at_other_sizes():
    for scene, _ in scenes("val")[:20]:
        scene = dataclasses.replace(scene, objects=scene.objects[:1])  # one that nothing hides
        small, large = boxes_of(draw(scene, 256)[1], [0]), boxes_of(draw(scene, 1024)[1], [0])
        assert np.abs(4 * small - large).max() <= 8  # two pixels of the small picture
        image, labels = draw(scene, 256, supersample=3)
        assert image.size == labels.shape[::-1] == draw(scene, 256)[0].size
        assert np.abs(boxes_of(labels, [0]) - small).max() <= 2


# ---- captions

def test_captions():
    for scene, _ in scenes("train"):
        text = caption(scene, np.random.default_rng(0))
        assert len(text.split()) <= 60
        counts = Counter(word for word in re.findall(r"[a-z]+", text) if word in SHAPES)
        assert counts == Counter(o.shape for o in scene.objects)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
    item = Shapes("train")[0]
    assert isinstance(item["caption"], str) and item["caption"] == Shapes("train")[0]["caption"]


def test_captions_tell_places_truly():
    told_of = {"left": (0, 1), "right": (2, 1), "top": (1, 0), "bottom": (1, 2), "middle": (1, 1)}
    checked = 0
    for index, (scene, _) in enumerate(scenes("train")):
        text = caption(scene, np.random.default_rng(index))
        for o in scene.objects:
            found = re.search(rf"{o.shape} (?:at|on|in) the ([a-z ]+?)(?:,| and|$)", text)
            if not found or "of" in found[1] or sum(p.shape == o.shape for p in scene.objects) > 1:
                continue
            told = [told_of[word] for word in found[1].split()]
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
        assert listener.direction(0, name) > listener.direction(1, name) and not listener.rest
