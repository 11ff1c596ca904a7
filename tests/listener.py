"""A listener for the drawn world: reads an expression word by word and finds the objects it may mean. It knows English
words and the geometry of a scene, and nothing of how the expressions are made."""

import math
import re
from functools import cache

import numpy as np

from hivg.data.drawn.scenes import SIZES, SPLITS, WIDE_SPLITS, Shapes

EXPRESSED = list(SPLITS)
WIDE_EXPRESSED = [f"wide {split}" for split in WIDE_SPLITS]
COUNTS = {"train": 400, "testA": 150, "compose": 300, "wide train": 600, "wide ordinal": 500}  # others 250


@cache
def scenes(split):
    """[(scene, its expressions), ...], the first of a split, made once for all tests. split: "train" is of the plain
    world, "wide train" of the wider one."""
    *wide, name = split.split()
    return list(map(Shapes(name, wide=bool(wide)).scene, range(COUNTS.get(split, 250))))


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
# What the wider world's words add to these
WIDE_ADJECTIVES = spelled({
    ("size", "small"): "mini", ("size", "medium"): "mid-sized, middle-sized", ("size", "large"): "huge, giant",
    ("filled", True): "filled-in", ("filled", False): "unfilled", ("colour", "red"): "crimson, scarlet",
    ("colour", "green"): "emerald", ("colour", "blue"): "cobalt", ("colour", "brown"): "chocolate, chestnut",
    ("colour", "purple"): "plum", ("colour", "orange"): "tangerine", ("colour", "black"): "jet-black, ebony",
    ("colour", "pink"): "rose, hot pink"})
WIDE_ADJECTIVES |= {f"{word}-{ending}": meaning for word, meaning in (ADJECTIVES | WIDE_ADJECTIVES).items()
                    if meaning == ("colour", word) for ending in ("coloured", "colored")}
WIDE_NOUNS = spelled({
    None: "figure, item, symbol", "square": "box, block", "triangle": "wedge, pyramid",
    "star": "star shape, five-pointed star", "heart": "heart shape, love heart",
    "diamond": "rhombus, lozenge", "cross": "plus, plus sign",
    "arrow": "pointer, arrow sign", "bar": "bar, rectangle, strip", "ellipse": "ellipse, oval"})
BOTH = spelled({("circle", True): "disc, disk, dot", ("circle", False): "ring, hoop"})  # a shape and its filling
RANKS = spelled({1: "first, 1st", 2: "second, 2nd", 3: "third, 3rd", 4: "fourth, 4th", 5: "fifth, 5th",
                 6: "sixth, 6th", -1: "last, very last, final",
                 -2: "second to last, next to last, second-last, penultimate", -3: "third to last"})
NUMBERS = spelled({1: "one, 1", 2: "two, 2", 3: "three, 3", 4: "four, 4", 5: "five, 5", 6: "six, 6"})
MIDDLES = "middle, central, centre, center".split(", ")
SUPERLATIVES = spelled({
    "left": "leftmost, left, furthest left, on the left, on the far left, furthest to the left",
    "right": "rightmost, right, furthest right, on the right, on the far right, furthest to the right",
    "above": "topmost, top, highest, uppermost, at the top, at the very top",
    "below": "lowest, bottom, bottommost, at the bottom, at the very bottom",
    "largest": "largest, biggest", "smallest": "smallest, tiniest"})
SUPERLATIVES |= spelled({  # of the wider world
    "left": "left-most, far left, to the left, at the left, on the left side, on the left of the image",
    "right": "right-most, far right, to the right, at the right, on the right side, on the right of the image",
    "above": "upper, top-most, on top, up top, at the top of the image",
    "below": "lower, lowermost, bottom-most, down below, on the bottom, at the bottom of the image",
    "largest": "larger, bigger", "smallest": "littlest, smaller"})
OF_TWO = "larger, bigger, smaller".split(", ")
CORNERS = {f"{up}{side}": (side, direction) for side in ("left", "right") for direction, ups in (
    ("above", ("top ", "top-", "upper ")), ("below", ("bottom ", "bottom-", "lower "))) for up in ups}
RELATIONS = [  # the first that matches counts
    (r"(?:closest to|nearest to|(?:right )?next to|adjacent to|beside|near|close to|by)\b", "closest"),
    (r"(?:to the |on the )?(left|right)(?: side)?(?: of| from)?\b", None),
    (r"(?:(?:just )?above|over|higher(?: than)?|further up than)\b", "above"),
    (r"(?:(?:just )?below|under|beneath|lower(?: than)?|underneath|further down than)\b", "below"),
    (r"(?:furthest from|farthest from|furthest away from|most distant from|far from|far away from)\b", "furthest"),
    (r"(?:in )?between\b", "between")]
SIDES = {"left": "left", "right": "right", "top": "above", "bottom": "below"}
REQUEST = re.compile(
    r"(?:where is|where's|(?:please |can you )?find|(?:please )?click(?: on)?|tap|can you see|could you point at|"
    r"point (?:to|at)|show me|(?:please )?select|which one is|locate|highlight|look for|pick|i mean|give me|mark|it is|"
    r"what about|draw a box around|i am looking for|i want|look at|choose|get|identify|detect|segment) "
    r"((?:the|an?) .*?)(?: please)?\??")


def any_of(words):
    """A pattern of these words, of which the longest counts."""
    return "(" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


ALL_ADJECTIVES = ADJECTIVES | WIDE_ADJECTIVES
ALL_NOUNS = NOUNS | WIDE_NOUNS
ALL_NOUNS |= {word + ("es" if word[-1] in "sx" else "s"): meaning for word, meaning in ALL_NOUNS.items()}
SPECIAL = SUPERLATIVES | RANKS | CORNERS | {word: word for word in MIDDLES}
ANY_ADJECTIVE = any_of(ALL_ADJECTIVES)


class Listener:
    """Reads one expression; `kind`, `detail` and `open_head` say what it read. One that is not understood, or not
    clearly true of its object, raises AssertionError, KeyError or TypeError."""

    def __init__(self, scene, text):
        self.scene = scene
        self.objects = scene.objects
        request = REQUEST.fullmatch(text)
        self.rest = request[1] if request else text
        self.kind = None  # of the expression
        self.detail = ""  # of an ordinal: "3 of 5"
        self.open_head = None  # whether a relation's head alone fits several objects

    def take(self, pattern):
        """The match of a pattern at the start of the rest, which then begins behind it; or None."""
        found = re.match(pattern + r"(?: |$)", self.rest)
        if found:
            self.rest = self.rest[found.end():]
        return found

    def noun_phrase(self):
        """(superlative or rank or None, the objects that the adjectives and the noun fit)."""
        self.take("(?:the only|the|an?)")
        unwanted = None
        if self.rest.startswith("non-"):
            self.rest = self.rest.replace("-", " ", 1)
        if self.take("(?:not|non)"):  # "the not red star"
            self.kind = "negation"
            unwanted = self.take(ANY_ADJECTIVE)[1]
        special = self.take(any_of(SPECIAL))
        number = None
        if special:
            number = 2 if special[1] in OF_TWO else None
            special = SPECIAL[special[1]]
            if self.take("of the") and (found := self.take(any_of(NUMBERS))):
                number = NUMBERS[found[1]]
            if isinstance(special, int) and re.match("(?:from|counting|starting) ", self.rest):  # of all there are
                return special, list(range(len(self.objects)))
        wanted = {}
        while found := self.take(ANY_ADJECTIVE):
            key, value = ALL_ADJECTIVES[found[1]]
            assert key not in wanted, f"{key} said twice"
            wanted[key] = value
        both = self.take(any_of(BOTH) + "s?")
        if both:
            assert "filled" not in wanted
            wanted["shape"], wanted["filled"] = BOTH[both[1]]
        else:
            shape = ALL_NOUNS[self.take(any_of(ALL_NOUNS))[1]]
            if shape:
                wanted["shape"] = shape
        members = [i for i in range(len(self.objects)) if self.fits(i, wanted)]
        assert number in (None, len(members))
        if unwanted:
            members = self.without(members, unwanted)
        return special, members

    def without(self, members, adjective):
        """Those that are not so; all others are, or "not red" would be a strange thing to say."""
        kept = [i for i in members if not self.has(i, adjective)]
        assert len(kept) <= 1 and (len(members) > 1 or not kept)
        return kept

    def fits(self, i, wanted):
        return all(getattr(self.objects[i], key) == value for key, value in wanted.items())

    def has(self, i, adjective):
        return self.fits(i, dict([ALL_ADJECTIVES[adjective]]))

    def anchor(self):
        """The one object meant; -1 if nothing is."""
        special, members = self.noun_phrase()
        assert special is None and len(members) <= 1, "an anchor must be named by its attributes"
        return members[0] if members else -1

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
        """The one that is clearly furthest in a direction, or the only one of the largest or smallest size, in a list.
        """
        if not members:
            return []
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
        return [first]

    def in_corner(self, members, corner):
        """The one near a corner of the image, of several of which no other is in that quarter."""
        assert len(members) > 1, "a corner for the only one"
        inside = []
        for i in members:
            x, y = self.place(i) / (self.scene.width, self.scene.height)
            shares = [1 - x if corner[0] == "right" else x, 1 - y if corner[1] == "below" else y]
            if max(shares) < 0.5:
                inside.append(i)
                assert max(shares) < 1 / 3 + 0.01, "not clear"
        return inside

    def middle(self, members, of_image):
        """The middle one from left to right and from top to bottom; one of them alone counts where the members stand in
        a line. of_image: it must be the one nearest to the image's middle, too, as "in the middle" may mean that."""
        self.kind = "ordinal"
        assert len(members) % 2 and len(members) > 1
        orders = [sorted(members, key=lambda i: self.along(i, side)) for side in ("right", "below")]
        wide, high = (self.along(order[-1], side) - self.along(order[0], side)
                      for order, side in zip(orders, ("right", "below")))
        across, down = (order[len(members) // 2] for order in orders)
        assert across == down or max(wide, high) > 2 * min(wide, high), "not clear"
        found = across if wide > high else down
        self.detail = f"{len(members) // 2 + 1} of {len(members)}"
        if of_image:
            middle = self.scene.width / 2, self.scene.height / 2
            assert found == min(members, key=lambda i: math.dist(self.place(i), middle)), "not clear"
        return [found]

    def related(self, candidates, name, anchors):
        """The candidates that meet the condition, however narrowly; anchors are not among them."""
        candidates = [i for i in candidates if i not in anchors]
        if not candidates or -1 in anchors:
            return []
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
        nearest = max(candidates, key=lambda i: self.along(i, name))
        if len(kept) < 2:
            assert abs(self.along(nearest, name) - start) >= 0.06 - 1e-9, "not clear"
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
        if special in MIDDLES or self.take("in the middle"):
            assert not self.rest
            return self.middle(members, of_image=special != "middle")
        if found := self.take("(?:number |that is )?" + any_of(NUMBERS | RANKS)):
            special = (NUMBERS | RANKS)[found[1]]
        if isinstance(special, int):
            return self.ordinal(special, members)
        if found := self.take(f"(?:at|in) the {any_of(CORNERS)}(?: corner)?"):
            special = CORNERS[found[1]]
        if isinstance(special, tuple):
            assert not self.rest
            self.kind = "superlative"
            return self.in_corner(members, special)
        location = SUPERLATIVES.get(self.rest)
        if special or location:
            assert not (special and self.rest), "words after a superlative"
            self.kind = "superlative"
            return self.extreme(members, special or location)
        if not self.rest:
            self.kind = self.kind or "attribute"
            return members
        if self.take("(?:that is not|that isn't|which is not)"):
            return self.negation(members)
        if found := self.take(f"(?:not|other than|except) the {ANY_ADJECTIVE} one(s?)"):
            self.kind = "negation"
            assert (len(members) > 2) == bool(found[2])
            return self.without(members, found[1])
        if self.take("that is"):
            adjective = self.take(ANY_ADJECTIVE)
            if adjective:
                return self.conjunction(members, adjective[1])
        return self.relations(members)

    def negation(self, members):
        self.kind = "negation"
        if found := self.take("an? " + any_of(ALL_NOUNS)):
            shape = ALL_NOUNS[found[1]]
            kept = [i for i in members if self.objects[i].shape != shape]
            shapes = {shape, *(self.objects[i].shape for i in kept)}  # a square may pass for a bar
            assert len(members) > 1 and shapes not in ({"square", "bar"}, {"circle", "ellipse"}), "not clear"
        else:
            kept = self.without(members, self.take(ANY_ADJECTIVE)[1])
        assert not self.rest, f"left over: {self.rest!r}"
        return kept

    def ordinal(self, rank, members):
        """Counted from a side; from behind for a rank below 0."""
        self.kind = "ordinal"
        assert self.take("(?:counting |starting )?from") and len(members) >= 2
        self.take("the")
        side = SIDES[self.rest.removesuffix(" side")]
        order = sorted(members, key=lambda i: self.along(i, side), reverse=True)
        steps = -np.diff([self.along(i, side) for i in order])
        assert min(steps) >= 0.06 - 1e-9, "not clear"
        number = rank if rank > 0 else len(order) + 1 + rank
        assert number > 0
        self.detail = f"{number} of {len(order)}"
        return order[number - 1 : number]

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
