"""Referring expressions: each is true of one object of a scene (data/drawn/scenes.py).

The meaning comes first: a class of objects ("red circles"), then a condition that exactly one of them meets. The
target must meet it by a clear margin, and no other object may come near, so that nobody has to guess. Then it is put
into words.
"""

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

from hivg.data.drawn.phrases import ALL, COLOUR, FILL, PLAIN, SHAPE, SIZE, attribute_words, noun_phrase, pick

KINDS = ("attribute", "superlative", "ordinal", "relation", "conjunction")
KIND_OF = {  # of what is asked for, else itself
    "closeness": "relation", "counting": "ordinal", "late": "ordinal", "beyond": "absent rank", "medium": "attribute"}
MAX_WORDS = 15
NOTHING = -1  # the target of an expression that is true of no object
MARGIN = 0.06  # a target is at least this much further left, higher, ..., in units of the image's long side
CLEAR_RATIO = 1.25  # closest: the runner-up is this many times as far away; furthest: the other way round

# A class of objects is given by an example and a set of attributes: all objects that agree with the example in these.
# The sets that people use, repeated by how natural they are. 0 is "any object".
CLASSES = (SHAPE,) * 5 + (SHAPE | COLOUR,) * 4 + (COLOUR,) * 2 + (0,) * 2 + (
    SIZE, FILL, SHAPE | SIZE, SHAPE | FILL, COLOUR | SIZE, COLOUR | FILL, SHAPE | COLOUR | SIZE, SHAPE | COLOUR | FILL)

# A direction is (axis, sign): the larger -x, the further left. y points down.
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
SIZE_RANK = {"small": 0, "medium": 1, "large": 2}
FORMS = {  # of each kind, repeated by how often they are drawn
    "attribute": (None,),
    "superlative": tuple(PLAIN.before),
    "ordinal": tuple(PLAIN.sides),
    "relation": ("left", "right", "above", "below") * 3 + ("closest", "furthest") * 2 + ("between",),
    "conjunction": ("two_attributes", "attribute_and_relation", "two_relations", "two_relations", "two_sides"),
    # The relations and ordinals without a shortcut: "left of" anything is mostly the leftmost, the third of three is
    # the last.
    "closeness": ("closest", "furthest"),
    "counting": tuple(PLAIN.sides)}


@dataclass(frozen=True)
class Expression:
    """A text that is true of one object of its scene, `scene.objects[target]`, or of NOTHING in it."""

    text: str
    target: int
    kind: str  # one of KINDS or of the wider world's, or "place" (data/drawn/pairs.py)
    detail: str = ""  # of an ordinal in a row: its rank and how many there are, "3 of 5"


def the(rng, phrase, chance=0.5):
    """The phrase with or without its article."""
    return "the " + phrase if rng.random() < chance else phrase


def shared_attributes(a, b):
    """The set of attributes on which two objects agree."""
    return (SIZE * (a.size == b.size) | FILL * (a.filled == b.filled) | COLOUR * (a.colour == b.colour)
            | SHAPE * (a.shape == b.shape))


def includes(attributes, needed):
    """Whether one set of attributes includes another."""
    return attributes & needed == needed


@cache
def sets_within(attributes):
    """The sets that a set of attributes includes, as bits of an integer: bit n stands for the set n."""
    return sum(1 << n for n in range(1, ALL + 1) if includes(attributes, n))


@cache
def sets_without(ambiguous, never=0):
    """The sets of attributes, without those of `never`, that are not among these, given as bits: a list of all, and one
    of the minimal ones, which include none of the others."""
    sets = [n for n in range(1, ALL + 1) if not ambiguous >> n & 1 and not n & never]
    return sets, [n for n in sets if not any(other != n and includes(n, other) for other in sets)]


class Speaker:
    """Makes expressions for one scene. Objects are given by their number in it.

    targets: the objects that may be meant. must: attributes that every head phrase names. never: attributes that no
    phrase names. row: the scene's, if it has one (wide_expressions.Row). Each method named like a key of FORMS makes
    one attempt at a form of it -> (text, target), or None if that failed.
    """

    words = PLAIN
    forms = FORMS

    def __init__(self, scene, rng, targets=None, must=0, never=0, row=None):
        self.rng = rng
        self.row = row
        self.objects = scene.objects
        self.must = must
        self.never = never
        self.indices = range(len(self.objects))
        self.targets = self.indices if targets is None else targets
        self.at = [obj.x for obj in self.objects], [obj.y for obj in self.objects]  # by axis
        self.widths = [obj.extents[0] for obj in self.objects], [obj.extents[1] for obj in self.objects]
        self.classes = {}  # of `members`
        self.shared = []  # shared[i][j]: the set of attributes on which objects i and j agree
        self.unique = []  # the sets of attributes that single out each object
        self.minimal = []  # and the minimal ones of them
        for i, a in enumerate(self.objects):
            self.shared.append([shared_attributes(a, b) for b in self.objects])
            ambiguous = 0  # the sets on which another object agrees, as bits
            for j in self.indices:
                if j != i:
                    ambiguous |= sets_within(self.shared[i][j])
            unique, minimal = sets_without(ambiguous, never)
            self.unique.append(unique)
            self.minimal.append(minimal)

    def members(self, example, attributes):
        """The objects that agree with the example in these attributes; do not change the list."""
        if (example, attributes) not in self.classes:
            shared = self.shared[example]
            self.classes[example, attributes] = [i for i in self.indices if includes(shared[i], attributes)]
        return self.classes[example, attributes]

    def rivals(self, target, attributes, anchors=()):
        """The other members of the target's class, without the anchors."""
        return [i for i in self.members(target, attributes) if i != target and i not in anchors]

    def name(self, i):
        """A noun phrase that singles out object i, an anchor, by its attributes alone."""
        attributes = pick(self.rng, self.minimal[i] if self.rng.random() < 0.7 else self.unique[i])
        return noun_phrase(self.rng, self.objects[i], attributes, words=self.words, anchor=True)

    def noun(self, i, attributes, before=()):
        """A noun phrase with these attributes of object i."""
        return noun_phrase(self.rng, self.objects[i], attributes, before, self.words)

    def adjective(self, i, attribute):
        return attribute_words(self.rng, self.objects[i], attribute, self.words)[0]

    def head(self):
        """A target, and a set of attributes that names its class."""
        target = pick(self.rng, self.targets)
        return target, pick(self.rng, CLASSES) & ~self.never | self.must

    def offset(self, i, j, direction):
        """How far object i is from j in this direction, and how far to the side, in long sides of the image."""
        axis, sign = DIRECTIONS[direction]
        along, across = self.at[axis], self.at[1 - axis]
        return sign * (along[i] - along[j]), abs(across[i] - across[j])

    def is_ahead(self, i, j, direction):
        """Whether i is clearly further in this direction than j, by both its centre and its edge."""
        along, _ = self.offset(i, j, direction)
        widths = self.widths[DIRECTIONS[direction][0]]
        return along >= MARGIN and along >= (widths[j] - widths[i]) / 2

    def distance(self, i, j):
        """From centre to centre, and from edge to edge: of circles, or of boxes where one is long."""
        a, b = self.objects[i], self.objects[j]
        centres = math.hypot(a.x - b.x, a.y - b.y)
        if a.stretch == b.stretch == 1:
            return centres, centres - (a.diameter + b.diameter) / 2
        gaps = [max(abs(at[i] - at[j]) - (width[i] + width[j]) / 2, 0) for at, width in zip(self.at, self.widths)]
        return centres, math.hypot(*gaps)

    def asked(self, text):
        """The expression as it is, in the wider language now and then as a question or a request."""
        return text

    # ---- the five kinds, and two that are part of one

    def attribute(self, _):
        rng = self.rng
        target = pick(rng, self.targets)
        names = self.minimal[target] if rng.random() < 0.5 else self.unique[target]
        options = [attributes for attributes in names if includes(attributes, self.must)]
        if not options:
            return None
        return the(rng, self.noun(target, pick(rng, options))), target

    def superlative(self, which):
        rng = self.rng
        target, attributes = self.head()
        if which in SIZE_RANK:
            attributes &= ~SIZE  # not "the largest small circle"
        others = self.rivals(target, attributes)
        if not others or not self.is_extreme(target, others, which):
            return None
        if which in self.words.after and rng.random() < 0.4:
            noun = self.noun(target, attributes)
            return the(rng, f"{noun} {pick(rng, self.words.after[which])}"), target
        words = self.words.before[which]
        if len(others) == 1:
            words += self.words.of_two.get(which, ())
        superlative = pick(rng, words)
        return the(rng, self.noun(target, attributes, (superlative,))), target

    def is_extreme(self, target, others, which):
        """Whether the target is clearly ahead of all others; in size, by a whole class."""
        if which in SIZE_RANK:
            sign = 1 if which == "large" else -1
            ranks = [sign * SIZE_RANK[self.objects[i].size] for i in others]
            return sign * SIZE_RANK[self.objects[target].size] > max(ranks)
        return all(self.is_ahead(target, i, which) for i in others)

    def ordinal(self, side, fewest=3, with_last=True):
        rng = self.rng
        example, attributes = self.head()
        members = self.members(example, attributes)
        if len(members) < fewest:
            return None
        members = sorted(members, key=lambda i: self.offset(i, example, side)[0], reverse=True)
        if not all(self.is_ahead(i, j, side) for i, j in zip(members, members[1:])):
            return None
        highest = min(len(members) if with_last else len(members) - 1, 5)
        rank = 2 + int(rng.random() * (highest - 1))  # from the second on: the first is a superlative
        target = members[rank - 1]
        if target not in self.targets:
            return None
        noun = self.noun(target, attributes, (pick(rng, self.words.ordinals[rank]),))
        return the(rng, f"{noun} from {the(rng, self.words.sides[side], 0.75)}"), target

    def counting(self, side):
        """An ordinal among four or more that does not mean the last."""
        return self.ordinal(side, fewest=4, with_last=False)

    def relation(self, which):
        rng = self.rng
        needed = rng.random() < 0.9  # the head alone fits several objects, so the relation is needed
        target, attributes = self.head()
        anchors = self.anchors(target, 2 if which == "between" else 1)
        if anchors is None:
            return None
        rivals = self.rivals(target, attributes, anchors)
        if (needed or which in ("closest", "furthest")) and not rivals:
            return None
        if not self.meets(target, which, anchors, rivals):
            return None
        anchor_names = " and ".join([the(rng, self.name(i), 0.7) for i in anchors])
        link = "that is " if rng.random() < 0.15 else ""
        link += pick(rng, self.words.relation[which])
        return the(rng, f"{self.noun(target, attributes)} {link} {anchor_names}"), target

    closeness = relation  # with fewer forms

    def anchors(self, target, count):
        """Other objects that can be singled out; None if there are too few."""
        options = [i for i in self.indices if i != target and self.unique[i]]
        if len(options) < count:
            return None
        return [options.pop(int(self.rng.random() * len(options))) for _ in range(count)]

    def meets(self, target, which, anchors, rivals):
        """Whether the target clearly meets the condition and no rival comes near it."""
        if which == "between":
            if not self.is_between(target, *anchors, 0.25, 0.2):
                return False
            return not any(self.is_between(i, *anchors, 1.0, 0.0) for i in rivals)
        anchor = anchors[0]
        if which in DIRECTIONS:
            if not self.is_towards(target, anchor, which, 0.5):
                return False
            return not any(self.offset(i, anchor, which)[0] > 0 for i in rivals)
        here, gap = self.distance(target, anchor)
        others = [self.distance(i, anchor) for i in rivals]
        if which == "closest":
            return all(here * CLEAR_RATIO <= centres and gap <= edges for centres, edges in others)
        return all(here >= centres * CLEAR_RATIO and gap >= edges for centres, edges in others)

    def is_towards(self, i, j, direction, slope):
        """Whether i is clearly in this direction from j: by at least MARGIN and `slope` times the way to the side."""
        along, aside = self.offset(i, j, direction)
        return along >= MARGIN and along >= slope * aside

    def is_between(self, i, a, b, width, end):
        """Whether i is in the band from a to b. width: of the band, end: cut off at both ends, as shares of a to b."""
        a_to_b = self.objects[b].x - self.objects[a].x, self.objects[b].y - self.objects[a].y
        a_to_i = self.objects[i].x - self.objects[a].x, self.objects[i].y - self.objects[a].y
        length2 = a_to_b[0] * a_to_b[0] + a_to_b[1] * a_to_b[1]
        along = (a_to_b[0] * a_to_i[0] + a_to_b[1] * a_to_i[1]) / length2
        aside = abs(a_to_b[0] * a_to_i[1] - a_to_b[1] * a_to_i[0]) / length2
        return end < along < 1 - end and aside < width / 2

    def conjunction(self, form):  # one of the methods below
        return getattr(self, form)()

    def two_attributes(self):
        """"the shape that is big and red": two attributes after the noun."""
        rng = self.rng
        target = pick(rng, self.targets)
        options = [attributes for attributes in self.unique[target]
                   if includes(attributes, self.must) and (attributes & ~SHAPE).bit_count() >= 2]
        if not options:
            return None
        attributes = pick(rng, options)
        behind = [attribute for attribute in (SIZE, FILL, COLOUR) if attributes & attribute]
        if len(behind) == 3:
            behind.pop(int(rng.random() * 3))
        if rng.random() < 0.5:
            behind.reverse()
        words = [self.adjective(target, attribute) for attribute in behind]
        noun = self.noun(target, attributes & ~sum(behind))
        return the(rng, f"{noun} that is {words[0]} and {words[1]}", 0.8), target

    def attribute_and_relation(self):
        """"the circle that is red and left of the star"."""
        rng = self.rng
        target, attributes = self.head()
        behind = pick(rng, (SIZE, FILL, COLOUR))
        if behind & self.never:
            return None
        which = pick(rng, tuple(DIRECTIONS))
        anchors = self.anchors(target, 1)
        if anchors is None:
            return None
        rivals = self.rivals(target, attributes | behind, anchors)
        if not self.meets(target, which, anchors, rivals):
            return None
        noun = self.noun(target, attributes & ~behind)
        word = self.adjective(target, behind)
        where = f"{pick(rng, self.words.relation[which])} {the(rng, self.name(anchors[0]), 0.7)}"
        return the(rng, f"{noun} that is {word} and {where}", 0.8), target

    def two_sides(self):
        """"the circle left and above the star"."""
        return self.two_relations(1)

    def two_relations(self, count=2):
        """"the circle above the square and left of the star", or to two sides of one anchor."""
        rng = self.rng
        target, attributes = self.head()
        anchors = self.anchors(target, count)
        if anchors is None:
            return None
        first, second = self.two_conditions(anchors)
        slope = 0.25 if count == 1 else 0.5  # left and above one thing: 45 degrees, give or take
        if not (self.is_towards(target, *first, slope) and self.is_towards(target, *second, slope)):
            return None
        rivals = self.rivals(target, attributes, anchors)
        fit_first = [self.offset(i, *first)[0] > 0 for i in rivals]
        fit_second = [self.offset(i, *second)[0] > 0 for i in rivals]
        if any(map(all, zip(fit_first, fit_second))):
            return None
        if rng.random() < 0.7 and not (any(fit_first) and any(fit_second)):
            return None  # favours pairs of which neither condition is enough alone
        noun = self.noun(target, attributes)
        link = "that is " if rng.random() < 0.15 else ""
        return the(rng, f"{noun} {link}{self.two_places(first, second)}"), target

    def two_conditions(self, anchors):
        """Two (anchor, direction); of one anchor: to a side, and up or down."""
        rng = self.rng
        first, second = pick(rng, ("left", "right")), pick(rng, ("above", "below"))
        if len(anchors) == 2 and rng.random() < 0.5:
            first, second = pick(rng, tuple(DIRECTIONS)), pick(rng, tuple(DIRECTIONS))
        conditions = [(anchors[0], first), (anchors[-1], second)]
        return conditions if rng.random() >= 0.5 else conditions[::-1]

    def two_places(self, first, second):
        """Two (anchor, direction) in words."""
        rng = self.rng
        if first[0] == second[0]:  # in short, "to the left and above the star"
            words = [pick(rng, PLAIN.relation[direction][:2]) for _, direction in (first, second)]
            return f"{words[0].removesuffix(' of')} and {words[1]} {the(rng, self.name(first[0]), 0.8)}"
        words = [pick(rng, self.words.relation[direction]) for _, direction in (first, second)]
        names = [the(rng, self.name(anchor), 0.8) for anchor, _ in (first, second)]
        return f"{words[0]} {names[0]} and {words[1]} {names[1]}"


def draw_kinds(rng, weights, count):
    """Yields `count` kinds, drawn by `weights` (key of the speaker's forms -> weight)."""
    totals = list(accumulate(weights.values()))
    for _ in range(count):
        level = rng.random() * totals[-1]
        yield next(kind for kind, total in zip(weights, totals) if level < total)


def express(speaker, kinds, forms=3, attempts=40):
    """Different expressions, a list, one of each of these kinds (keys of the speaker's forms); None if the scene does
    not yield them.

    Each draws a form of its kind, attempts it, then draws another, so that easy forms do not crowd out hard ones; at
    first, only a target about which nothing has been said is accepted.
    """
    rng = speaker.rng
    found = {}  # text: Expression
    used = set()  # targets
    for asked in kinds:
        kind = KIND_OF.get(asked, asked)
        make = getattr(speaker, asked)
        for attempt in range(forms * attempts):
            if attempt % attempts == 0:
                form = pick(rng, speaker.forms[asked])
            text, target, *detail = make(form) or ("", None)
            if not text or target in used and target != NOTHING and attempt < attempts // 2:
                continue
            if text not in found and len(text.split()) <= MAX_WORDS:
                found[text] = Expression(text, target, f"absent {form}" if asked == "absent" else kind, *detail)
                used.add(target)
                break
        else:
            return None
    return [replace(expression, text=speaker.asked(expression.text)) for expression in found.values()]
