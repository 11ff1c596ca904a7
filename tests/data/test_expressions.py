"""Every expression of the bundled data set means exactly one object, as a listener of its own finds it."""

import re
from collections import Counter

import pytest
from listener import ADJECTIVES, EXPRESSED, NOUNS, Listener, expressions, scenes

from hivg.data.drawn import scenes as shapes
from hivg.data.drawn.expressions import KINDS
from hivg.data.drawn.scenes import MIXED, SIZES, Shapes


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


# --- the listener itself ---


def look(shape, colour, size, filled, x, y):
    return shapes.Object(shape, colour, size, filled, x, y, SIZES[size], 0.0)


BACKGROUND = shapes.Background("plain", ((200, 200, 200), (210, 210, 210)), 0.1, 0.0, 0)
BY_HAND = shapes.Scene(1.0, 1.0, BACKGROUND, (
    look("circle", "red", "large", True, 0.2, 0.2),
    look("circle", "blue", "small", True, 0.45, 0.3),
    look("circle", "red", "small", False, 0.8, 0.4),
    look("star", "red", "medium", True, 0.52, 0.7),
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
    ("the thing that is small and red", [2]), ("circle that is on the left side of the blue one", [0])])
def test_listener_on_a_scene_by_hand(text, meant):
    """The listener must be able to find several objects or none, or it would prove nothing."""
    assert Listener(BY_HAND, text).referents() == meant


@pytest.mark.parametrize("text", [
    "smallest circle", "leftmost star", "third star from the top", "thing left of the circle", "bottom circle above",
    "circle closest to the star", "the pretty circle", "red red circle", "lowest circle of all"])
def test_listener_refuses_unclear_expressions(text):
    with pytest.raises((AssertionError, KeyError, TypeError)):
        Listener(BY_HAND, text).referents()


# --- their texts ---


@pytest.mark.parametrize("split", EXPRESSED)
def test_expressions_of_a_scene(split):
    for scene, spoken in scenes(split):
        texts = [e.text for e in spoken]
        assert len(set(texts)) == len(texts) == 4
        for text in texts:
            assert re.fullmatch(r"[a-z0-9-]+( [a-z0-9-]+){0,14}", text), text
        assert all(0 <= e.target < len(scene.objects) for e in spoken)


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


def test_closeness_can_be_asked_for_alone():
    dataset = Shapes("train", weights={"closeness": 1.0})
    words = {"closest", "nearest", "next to", "furthest", "farthest"}
    found = set()
    for i in range(20):
        for expression in dataset.scene(i)[1]:
            used = {word for word in words if word in expression.text}
            assert (expression.kind, len(used)) == ("relation", 1), expression.text
            found |= used
    assert found == words


def test_counting_asks_for_ordinals_that_do_not_mean_the_last():
    """A model may hear "the third" as "the last", which is right where there are three."""
    dataset = Shapes("train", weights={"counting": 1.0})
    ranks = set()
    for i in range(20):
        scene, made = dataset.scene(i)
        for expression in made:
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
