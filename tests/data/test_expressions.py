"""Every expression of the bundled data set means exactly one object, as a listener of its own finds it."""

import re
from collections import Counter

import pytest
from listener import (
    ADJECTIVES,
    ALL_ADJECTIVES,
    ALL_NOUNS,
    BOTH,
    EXPRESSED,
    NOUNS,
    REQUEST,
    SIDES,
    SPECIAL,
    WIDE_EXPRESSED,
    Listener,
    expressions,
    scenes,
)

from hivg.data.drawn import drawing as shapes
from hivg.data.drawn.expressions import KINDS, NOTHING
from hivg.data.drawn.scenes import MIXED, SIZES, WIDE_MIX, WIDE_TRAINING, Shapes

ABSENT = {f"absent {what}" for what in ("thing", "anchor", "side", "not", "rank")}


@pytest.mark.parametrize("split", EXPRESSED + WIDE_EXPRESSED)
def test_every_expression_means_its_target_and_nothing_else(split):
    """Or nothing at all, if it is of an absent kind."""
    for scene, expression in expressions(split):
        listener = Listener(scene, expression.text)
        try:
            referents = listener.referents()
        except Exception as error:
            raise AssertionError(f"{expression.text!r} in {scene}: {error!r}") from error
        if expression.target == NOTHING:
            assert referents == [] and expression.kind in ABSENT, (expression, referents, scene)
        else:
            assert referents == [expression.target], (expression, referents, scene)
            assert listener.kind == expression.kind, expression
            assert expression.detail == (listener.detail if split in WIDE_EXPRESSED else ""), expression


# --- the listener itself ---


def look(shape, colour, size, filled, x, y):
    return shapes.Object(shape, colour, size, filled, x, y, SIZES[size], 0.0)


BACKGROUND = shapes.Background("plain", ((200, 200, 200), (210, 210, 210)), 0.1, 0.0, 0)
BY_HAND = shapes.Scene(1.0, 1.0, BACKGROUND, (
    look("circle", "red", "large", True, 0.2, 0.2), look("circle", "blue", "small", True, 0.45, 0.3),
    look("circle", "red", "small", False, 0.8, 0.4), look("star", "red", "medium", True, 0.52, 0.7),
    look("square", "green", "small", True, 0.28, 0.8),
))


@pytest.mark.parametrize("text, meant", [
    ("circle", [0, 1, 2]), ("the red circle", [0, 2]), ("hollow one", [2]), ("purple thing", []),
    ("the left circle", [0]), ("lowest thing", [4]), ("red one on the far right", [2]), ("the biggest shape", [0]),
    ("second circle from the right", [1]), ("3rd object from left", [1]), ("fourth thing from the top", [3]),
    ("the thing left of the star", [0, 1, 4]), ("circle under the star", []), ("thing above the star", [0, 1, 2]),
    ("circle next to the hollow thing", [1]), ("the circle furthest from the hollow shape", [0]),
    ("one between the big circle and the empty object", [1]), ("circle left and above the star", [0, 1]),
    ("the circle above the star and left of the hollow thing", [0, 1]), ("one that is red and above the star", [0, 2]),
    ("the thing that is small and red", [2]), ("circle that is on the left side of the blue one", [0]),
    ("where is the first circle from the left?", [0]), ("last of the circles counting from the left side", [2]),
    ("circle that is second to last from the left", [1]), ("the circle number three from right", [0]),
    ("the sixth circle from the left", []), ("the middle circle", [1]), ("circle in the middle", [1]),
    ("the filled circle that isn't red", [1]), ("please click on the not crimson disc please", [1]),
    ("circle not the solid ones", [2]), ("the bigger of the two red circles", [0]),
    ("the red circle in the top-left corner", [0]), ("the smaller red circle", [2]),
    ("second of the three circles from the right", [1]),
    ("hoop", [2]), ("emerald block", [4]), ("the bar", []), ("lowest oval", []),
    ("the dot left of the heart", []), ("the hoop left from the square", []), ("the circle that is not scarlet", [1]),
    ("star nearest to the bar", []), ("small one that is not a circle", [4]), ("the star that is not red", [])])
def test_listener_on_a_scene_by_hand(text, meant):
    """The listener must be able to find several objects or none, or it would prove nothing."""
    assert Listener(BY_HAND, text).referents() == meant


@pytest.mark.parametrize("text", [
    "smallest circle", "leftmost star", "third star from the top", "thing left of the circle", "bottom circle above",
    "circle closest to the star", "the pretty circle", "red red circle", "lowest circle of all", "the middle star",
    "thing in the middle", "first star from the left", "thing that is not blue", "oval that is not a star",
    "where is circle", "the star below the hollow one from the left"])
def test_listener_refuses_unclear_expressions(text):
    with pytest.raises((AssertionError, KeyError, TypeError)):
        Listener(BY_HAND, text).referents()


# --- their texts ---


@pytest.mark.parametrize("split", EXPRESSED + WIDE_EXPRESSED)
def test_expressions_of_a_scene(split):
    for scene, spoken in scenes(split):
        texts = [e.text for e in spoken]
        assert len(set(texts)) == len(texts) == 4
        for text in texts:
            request = REQUEST.fullmatch(text)
            assert not request or split in WIDE_EXPRESSED
            assert re.fullmatch(r"[a-z0-9-]+( [a-z0-9'-]+){0,15}", request[1] if request else text), text
        assert all(NOTHING <= e.target < len(scene.objects) for e in spoken)


def shares_of_kinds(split):
    counts = Counter(e.kind for _, e in expressions(split))
    return {kind: count / counts.total() for kind, count in counts.items()}


def test_kinds_of_expressions():
    assert shares_of_kinds("testA") == {"attribute": 1}
    test_b = shares_of_kinds("testB")
    assert test_b.keys() == {"ordinal", "relation"} and min(test_b.values()) > 0.3
    for split in ("train", "val", "test", "compose"):
        assert shares_of_kinds(split).keys() == set(KINDS)
    assert shares_of_kinds("train") == pytest.approx(MIXED, abs=0.05)


def test_kinds_of_the_wider_world():
    wide = {"attribute", "superlative", "relation", "conjunction", "negation", "ordinal"}
    for split, kinds in {"testA": {"attribute"}, "testB": {"superlative", "relation"}, "ordinal": {"ordinal"},
                         "count": {"ordinal"}, "negation": {"negation"}, "absent": ABSENT, "train": wide | ABSENT,
                         "val": wide | ABSENT, "test": wide | ABSENT, "compose": wide}.items():
        assert shares_of_kinds(f"wide {split}").keys() == kinds, split
    for split, mix in {"train": WIDE_TRAINING, "val": WIDE_MIX}.items():
        shares = shares_of_kinds(f"wide {split}")
        absent = sum(shares.pop(kind) for kind in ABSENT)
        assert absent == pytest.approx(0.1, abs=0.04)
        assert shares == pytest.approx({kind: mix[kind] for kind in shares}, abs=0.04)


def test_ordinals_of_every_rank_and_number():
    """From the first to the last of two to six, about equally often, from all four sides; "last" of any number."""
    pairs = Counter(e.detail for _, e in expressions("wide ordinal"))
    assert pairs.keys() == {f"{rank} of {n}" for n in range(2, 7) for rank in range(1, n + 1)}
    mean = pairs.total() / len(pairs)
    assert 0.6 * mean < min(pairs.values()) and max(pairs.values()) < 1.6 * mean, pairs
    texts = {e.detail: "" for _, e in expressions("wide ordinal")}
    for _, e in expressions("wide ordinal"):
        texts[e.detail] += f" {e.text} "
    for n in range(2, 7):
        for word in ("first", "last", *SIDES):
            assert any(f" {word} " in texts[f"{rank} of {n}"] for rank in range(1, n + 1)), (word, n)
        for word in ("first", "1st", "last"):  # neither tells the number
            assert f" {word} " in texts[f"{n if word == 'last' else 1} of {n}"], (word, n)
        assert n % 2 == 0 or " middle " in texts[f"{n // 2 + 1} of {n}"]
    for _, e in expressions("wide count"):
        rank, n = map(int, e.detail.split(" of "))
        assert 1 < rank < n >= 4


def asked_for(kind, n, wide=False):
    """[(scene, expression), ...] of the first n scenes where no other kind is asked for."""
    dataset = Shapes("train", wide=wide, weights={kind: 1.0})
    return [(scene, expression) for scene, spoken in map(dataset.scene, range(n)) for expression in spoken]


def test_closeness_can_be_asked_for_alone():
    words = {"closest", "nearest", "next to", "furthest", "farthest"}
    found = set()
    for _, expression in asked_for("closeness", 20):
        used = {word for word in words if word in expression.text}
        assert (expression.kind, len(used)) == ("relation", 1), expression.text
        found |= used
    assert found == words


@pytest.mark.parametrize(("kind", "words"), [
    ("medium", ("medium", "medium-sized", "mid-sized", "middle-sized")),
    ("closeness", ("closest", "furthest", "between")), ("late", ("third", "fourth", "fifth", "sixth"))])
def test_what_is_learned_last_can_be_asked_for_alone(kind, words):
    spoken = asked_for(kind, 50, wide=True)
    for scene, expression in spoken:
        assert Listener(scene, expression.text).referents() == [expression.target], expression.text
        if kind == "medium":
            assert any(word in expression.text for word in words), expression.text
            assert len({obj.size for obj in scene.objects}) > 1
        if kind == "late":  # never "the second to last" or "the middle one": these need no counting
            assert re.search(r"third|fourth|fifth|sixth|\d(rd|th)|number ", expression.text), expression.text
    text = " ".join(e.text for _, e in spoken)
    assert all(f"{word} " in text for word in words)


def test_counting_asks_for_ordinals_that_do_not_mean_the_last():
    """A model may hear "the third" as "the last", which is right where there are three."""
    ranks = set()
    for scene, expression in asked_for("counting", 20):
        rank, members = Listener(scene, expression.text).noun_phrase()
        assert 2 <= rank < len(members), expression.text
        assert Listener(scene, expression.text).referents() == [expression.target]
        assert expression.kind == "ordinal"
        ranks.add(rank)
    assert ranks >= {2, 3}


def test_expressions_vary():
    texts = [e.text for split in ("train", "val", "test") for _, e in expressions(split)]
    words = Counter(" ".join(texts).split())
    needed = {*ADJECTIVES, *NOUNS, *"""the second 2nd third leftmost left highest biggest smallest of above over below
              under beneath closest nearest next furthest between and that far very side from""".split()}
    assert needed <= set(words), needed - set(words)
    assert 0.35 < sum(text.startswith("the ") for text in texts) / len(texts) < 0.75
    lengths = Counter(len(text.split()) for text in texts)
    assert lengths[1] > 0 and sum(n for length, n in lengths.items() if length >= 11) > 0.02 * len(texts)
    assert len(set(texts)) > 0.7 * len(texts)


def test_the_wider_language_varies():
    splits = "train", "val", "test", "testB", "ordinal", "count"
    texts = [e.text for split in splits for _, e in expressions(f"wide {split}")]
    text = f" {' '.join(texts)} "
    needed = {*ALL_ADJECTIVES, *ALL_NOUNS, *BOTH, *SPECIAL} - {word for word in ALL_NOUNS if word.endswith("s")}
    assert {word for word in needed if f" {word} " not in text} <= {"third to last"}
    requests = sum(bool(REQUEST.fullmatch(text)) for text in texts)
    assert 0.08 < requests / len(texts) < 0.16
    plural = sum(bool(re.search("(stars|circles|squares|hearts)( |$)", text)) for text in texts)
    assert plural > 0.01 * len(texts)


@pytest.mark.parametrize("split", WIDE_EXPRESSED)
def test_sizes_are_named_beside_others_only(split):
    """Where all are large, nothing shows that they are."""
    for scene, expression in expressions(split):
        named = [word for word, (key, _) in ALL_ADJECTIVES.items() if key == "size"]
        if any(f" {word} " in f" {expression.text} " for word in named):
            assert len({obj.size for obj in scene.objects}) > 1, expression


def test_a_scene_speaks_of_several_objects():
    numbers = [len({e.target for e in spoken}) for _, spoken in scenes("train")]
    assert sum(n >= 3 for n in numbers) > 0.8 * len(numbers)


def test_most_relations_are_needed():
    is_needed = []
    for scene, expression in expressions("train") + expressions("testB"):
        if expression.kind == "relation":
            listener = Listener(scene, expression.text)
            listener.referents()
            is_needed.append(listener.open_head)
    assert sum(is_needed) > 0.65 * len(is_needed)
