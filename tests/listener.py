"""A listener for the drawn world: reads an expression word by word and finds the objects it may mean. It knows English
words and the geometry of a scene, and nothing of how the expressions are made."""

import math
import re
from functools import cache

import numpy as np

from hivg.data.drawn.scenes import SIZES, SPLITS, Shapes

EXPRESSED = list(SPLITS)
COUNTS = {"train": 400, "val": 250, "test": 250, "testA": 150, "testB": 250, "compose": 300, "count": 250}


@cache
def scenes(split):
    """[(scene, its expressions), ...], the first of a split, made once for all tests."""
    return list(map(Shapes(split).scene, range(COUNTS[split])))


def expressions(split):
    """[(scene, expression), ...] of these scenes."""
    return [(scene, expression) for scene, spoken in scenes(split) for expression in spoken]


def spelled(table):
    """{meaning: "phrase, phrase"} -> {phrase: meaning}."""
    return {phrase: meaning for meaning, phrases in table.items() for phrase in phrases.split(", ")}


ADJECTIVES = spelled({
    ("size", "small"): "small, little, tiny", ("size", "medium"): "medium, medium-sized",
    ("size", "large"): "large, big", ("filled", True): "filled, solid", ("filled", False): "outlined, hollow, empty",
    ("colour", "purple"): "purple, violet"})
ADJECTIVES |= {colour: ("colour", colour) for colour in "red green blue brown orange black pink".split()}
NOUNS = {shape: shape for shape in "circle square triangle star heart diamond cross arrow".split()}
NOUNS |= spelled({None: "shape, object, thing, one"})
RANKS = spelled({2: "second, 2nd", 3: "third, 3rd", 4: "fourth, 4th", 5: "fifth, 5th"})
SUPERLATIVES = spelled({
    "left": "leftmost, left, furthest left, on the left, on the far left, furthest to the left",
    "right": "rightmost, right, furthest right, on the right, on the far right, furthest to the right",
    "above": "topmost, top, highest, uppermost, at the top, at the very top",
    "below": "lowest, bottom, bottommost, at the bottom, at the very bottom",
    "largest": "largest, biggest", "smallest": "smallest, tiniest"})
RELATIONS = [  # the first that matches counts
    (r"(?:to the |on the )?(left|right)(?: side)?(?: of)?\b", None),
    (r"(?:above|over|higher(?: than)?)\b", "above"),
    (r"(?:below|under|beneath|lower(?: than)?)\b", "below"),
    (r"(?:closest to|nearest to|next to)\b", "closest"),
    (r"(?:furthest from|farthest from|furthest away from)\b", "furthest"),
    (r"between\b", "between")]
SIDES = {"left": "left", "right": "right", "top": "above", "bottom": "below"}
ANY_ADJECTIVE = "(" + "|".join(ADJECTIVES) + ")"


class Listener:
    """Reads one expression; `kind` and `open_head` say what it read. One that is not understood, or not clearly true of
    its object, raises AssertionError, KeyError or TypeError."""

    def __init__(self, scene, text):
        self.objects = scene.objects
        self.rest = text
        self.kind = None  # of the expression
        self.open_head = None  # whether a relation's head alone fits several objects

    def take(self, pattern):
        """The match of a pattern at the start of the rest, which then begins behind it; or None."""
        found = re.match(pattern + r"(?: |$)", self.rest)
        if found:
            self.rest = self.rest[found.end():]
        return found

    def noun_phrase(self):
        """(superlative or rank or None, the objects that the adjectives and the noun fit)."""
        self.take("the")
        special = None
        wanted = {}
        while True:
            word = (self.take("furthest (?:left|right)") or self.take(r"\S+"))[0].strip()
            if word in NOUNS:
                if NOUNS[word]:
                    wanted["shape"] = NOUNS[word]
                return special, [i for i in range(len(self.objects)) if self.fits(i, wanted)]
            if word in ADJECTIVES:
                key, value = ADJECTIVES[word]
                assert key not in wanted, f"{key} said twice"
                wanted[key] = value
            else:
                assert special is None and not wanted, f"unknown or misplaced word {word!r}"
                special = RANKS.get(word) or SUPERLATIVES[word]

    def fits(self, i, wanted):
        return all(getattr(self.objects[i], key) == value for key, value in wanted.items())

    def has(self, i, adjective):
        return self.fits(i, dict([ADJECTIVES[adjective]]))

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

    def place(self, i):
        return np.array([self.objects[i].x, self.objects[i].y])

    def along(self, i, direction):
        """How far an object is in a direction."""
        x, y = self.place(i)
        return {"left": -x, "right": x, "above": -y, "below": y}[direction]

    def extreme(self, members, name):
        """The one that is clearly furthest in a direction, or the only one of the largest or smallest size."""
        assert len(members) >= 2, "a superlative among one"
        if name in ("largest", "smallest"):
            sign = 1 if name == "largest" else -1
            measures = {i: sign * SIZES[self.objects[i].size] for i in members}
            margin = 1e-6
        else:
            measures = {i: self.along(i, name) for i in members}
            margin = 0.06 - 1e-9
        first, second = sorted(members, key=measures.get, reverse=True)[:2]
        assert measures[first] - measures[second] >= margin, "not clear"
        return first

    def related(self, candidates, name, anchors):
        """The candidates that meet the condition, however narrowly; anchors are not among them."""
        candidates = [i for i in candidates if i not in anchors]
        if name in ("closest", "furthest"):
            distances = {i: math.dist(self.place(i), self.place(anchors[0])) for i in candidates}
            best, next_best = sorted(candidates, key=distances.get, reverse=name == "furthest")[:2]
            near, far = sorted([distances[best], distances[next_best]])
            assert far / near >= 1.25 - 1e-9, "not clear"
            return [best]
        if name == "between":
            kept = [i for i in candidates if self.is_between(i, *anchors, end=0, width=1)]
            if len(kept) == 1:
                assert self.is_between(kept[0], *anchors, end=0.2 - 1e-9, width=0.25 + 1e-9), "not clear"
            return kept
        start = self.along(anchors[0], name)
        kept = [i for i in candidates if self.along(i, name) > start]
        if len(kept) == 1:
            assert self.along(kept[0], name) >= start + 0.06 - 1e-9, "not clear"
        return kept

    def is_between(self, i, a, b, end, width):
        """Whether i is in the band from a to b. end, width: what is cut off at each end, and how wide the band is, as
        shares of the distance."""
        way = self.place(b) - self.place(a)
        along = (self.place(i) - self.place(a)) @ way / (way @ way)
        aside = np.linalg.norm(self.place(i) - self.place(a) - along * way) / np.linalg.norm(way)
        return end < along < 1 - end and aside < width / 2

    def referents(self):
        """All objects the text may mean."""
        special, members = self.noun_phrase()
        if isinstance(special, int):
            return self.ordinal(special, members)
        location = SUPERLATIVES.get(self.rest)
        if special or location:
            assert not (special and self.rest), "words after a superlative"
            self.kind = "superlative"
            return [self.extreme(members, special or location)]
        if not self.rest:
            self.kind = "attribute"
            return members
        if self.take("that is"):
            adjective = self.take(ANY_ADJECTIVE)
            if adjective:
                return self.conjunction(members, adjective[1])
        return self.relations(members)

    def ordinal(self, rank, members):
        self.kind = "ordinal"
        assert self.take("from") and len(members) >= 3
        self.take("the")
        side = SIDES[self.rest]
        order = sorted(members, key=lambda i: self.along(i, side), reverse=True)
        steps = -np.diff([self.along(i, side) for i in order])
        assert min(steps) >= 0.06 - 1e-9, "not clear"
        return [order[rank - 1]]

    def conjunction(self, members, adjective):
        """After "that is ADJECTIVE": another adjective, or a relation."""
        self.kind = "conjunction"
        members = [i for i in members if self.has(i, adjective)]
        assert self.take("and")
        other = self.take(ANY_ADJECTIVE)
        if other:
            members = [i for i in members if self.has(i, other[1])]
        else:
            members = self.related(members, self.relation(), [self.anchor()])
        assert not self.rest, f"left over: {self.rest!r}"
        return members

    def relations(self, members):
        """One relation, or two joined by "and"."""
        name = self.relation()
        if self.take("and"):  # "above and left of the star"
            other = self.relation()
            anchor = self.anchor()
            conditions = [(name, [anchor]), (other, [anchor])]
        else:
            conditions = [(name, [self.anchor()])]
            if self.take("and"):
                if name == "between":
                    conditions[0][1].append(self.anchor())
                else:
                    conditions.append((self.relation(), [self.anchor()]))
        assert not self.rest, f"left over: {self.rest!r}"
        self.kind = "relation" if len(conditions) == 1 else "conjunction"
        for _, anchors in conditions:
            members = [i for i in members if i not in anchors]
        self.open_head = len(members) > 1
        kept = members
        for name, anchors in conditions:
            related = self.related(members, name, anchors)
            kept = [i for i in kept if i in related]
        return kept
