"""What people say about a picture of `hivg.data.shapes`: referring expressions and captions.

An expression is made by choosing its meaning first: a class of objects ("red circles"), then a condition that
exactly one of them meets. The condition is tested twice, strictly for the target (it must meet it with a clear
margin) and loosely for all others (none may come near), so that nobody has to guess. Then it is put into words.

Objects are those of `hivg.data.shapes`; x and y are in units of the picture's long side, y points down.
"""
import math
from dataclasses import dataclass
from itertools import accumulate

KINDS = ("attribute", "superlative", "ordinal", "relation", "conjunction")
MAX_WORDS = 15
MARGIN = 0.06          # by how much a target must be further left, higher, ... in long sides
CLEAR_RATIO = 1.25     # closest: the runner-up is this much further away; furthest: this much nearer

# Attributes are bits, so that a set of them is an integer; a class of objects is given by an example and such a set:
# all objects that agree with the example in these attributes.
SIZE, FILL, COLOUR, SHAPE = 1, 2, 4, 8
ALL = SIZE | FILL | COLOUR | SHAPE
# The sets of attributes people use for a class, repeated by how natural they are. 0 is "any object".
CLASSES = (SHAPE,) * 5 + (SHAPE | COLOUR,) * 4 + (COLOUR,) * 2 + (0,) * 2 + (
    SIZE, FILL, SHAPE | SIZE, SHAPE | FILL, COLOUR | SIZE, COLOUR | FILL, SHAPE | COLOUR | SIZE, SHAPE | COLOUR | FILL)

SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "medium": ("medium", "medium-sized"),
              "large": ("large", "big")}
FILL_WORDS = {True: ("filled", "solid"), False: ("outlined", "hollow", "empty")}
COLOUR_WORDS = {"purple": ("purple", "purple", "violet")}  # the other colours have one name
ANY_WORDS = ("shape", "object", "thing", "one")

# A direction is (axis, sign): an object is the further left, the larger -x is.
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1)}
RELATION_WORDS = {
    "left": ("left of", "to the left of", "on the left side of"),
    "right": ("right of", "to the right of", "on the right side of"),
    "above": ("above", "above", "over", "higher than"),
    "below": ("below", "below", "under", "beneath", "lower than"),
    "closest": ("closest to", "nearest to", "next to"),
    "furthest": ("furthest from", "farthest from", "furthest away from"),
    "between": ("between",)}
# Short forms for two directions from one thing: "to the left and above the star", "above and left of the star"
FIRST_WORDS = {"left": ("left", "to the left"), "right": ("right", "to the right"), "above": ("above",),
               "below": ("below",)}
SECOND_WORDS = {"left": ("left of", "to the left of"), "right": ("right of", "to the right of"),
                "above": ("above",), "below": ("below",)}
BEFORE = {  # superlatives that stand before the noun ...
    "left": ("leftmost", "left", "furthest left"), "right": ("rightmost", "right", "furthest right"),
    "above": ("topmost", "top", "highest", "uppermost"), "below": ("lowest", "bottom", "bottommost"),
    "large": ("largest", "biggest"), "small": ("smallest", "tiniest")}
AFTER = {   # ... and after it
    "left": ("on the left", "on the far left", "furthest to the left"),
    "right": ("on the right", "on the far right", "furthest to the right"),
    "above": ("at the top", "at the very top"), "below": ("at the bottom", "at the very bottom")}
SIDES = {"left": "left", "right": "right", "above": "top", "below": "bottom"}  # "second from the ..."
ORDINALS = {2: ("second", "second", "2nd"), 3: ("third", "third", "3rd"), 4: ("fourth", "4th"), 5: ("fifth", "5th")}
SIZE_RANK = {"small": 0, "medium": 1, "large": 2}
FORMS = {  # what each kind can be about, repeated by how often it is wished for
    "attribute": (None,),
    "superlative": tuple(BEFORE),
    "ordinal": tuple(SIDES),
    "relation": ("left", "right", "above", "below") * 3 + ("closest", "furthest") * 2 + ("between",),
    "conjunction": ("two attributes", "attribute and relation", "two relations", "two relations", "two sides")}


@dataclass(frozen=True)
class Expression:
    """A text that is true of one object of its scene: `scene.objects[target]`. kind is one of KINDS."""
    text: str
    target: int
    kind: str


def pick(rng, options):
    """One of the options, all equally likely. (Much faster than rng.choice.)"""
    return options[int(rng.random() * len(options))]


def attribute_words(rng, thing, attributes):
    """The adjectives for a set of attributes, in the order English wants them: ["large", "red", "outlined"]."""
    words = []
    if attributes & SIZE:
        words.append(pick(rng, SIZE_WORDS[thing.size]))
    pair = []
    if attributes & FILL:
        pair.append(pick(rng, FILL_WORDS[thing.filled]))
    if attributes & COLOUR:
        pair.append(pick(rng, COLOUR_WORDS.get(thing.colour, (thing.colour,))))
    if rng.random() < 0.3:  # "outlined red", less often "red outlined"
        pair.reverse()
    return words + pair


def noun_phrase(rng, thing, attributes, before=(), any_words=ANY_WORDS):
    """"red circle", with a superlative or ordinal before it: "leftmost red circle"."""
    noun = thing.shape if attributes & SHAPE else pick(rng, any_words)
    return " ".join([*before, *attribute_words(rng, thing, attributes), noun])


def the(rng, phrase, chance=0.5):
    """The phrase with or without its article."""
    return "the " + phrase if rng.random() < chance else phrase


class Speaker:
    """Makes expressions for one scene.

    targets are the objects that may be meant; every head phrase names at least the attributes in `must`.
    Each method named like a kind makes one attempt at a form of it: (text, target), or None if it found nothing.
    """

    def __init__(self, scene, rng, targets=None, must=0):
        self.rng, self.things, self.must = rng, scene.objects, must
        self.indices = range(len(self.things))
        self.targets = self.indices if targets is None else targets
        # shared[i][j]: the set of attributes on which objects i and j agree
        self.shared = [[SIZE * (a.size == b.size) | FILL * (a.filled == b.filled) | COLOUR * (a.colour == b.colour)
                        | SHAPE * (a.shape == b.shape) for b in self.things] for a in self.things]
        self._names = {}

    def members(self, example, attributes):
        """The objects that agree with the example in these attributes."""
        shared = self.shared[example]
        return [i for i in self.indices if shared[i] & attributes == attributes]

    def names(self, i):
        """The sets of attributes that single out object i; the minimal ones, then all."""
        if i not in self._names:
            shared = [s for j, s in enumerate(self.shared[i]) if j != i]
            unique = [m for m in range(1, ALL + 1) if all(s & m != m for s in shared)]
            minimal = [m for m in unique if not any(n != m and n & m == n for n in unique)]
            self._names[i] = minimal, unique
        return self._names[i]

    def name(self, i):
        """A noun phrase that singles out object i, an anchor, by its attributes alone."""
        minimal, unique = self.names(i)
        attributes = pick(self.rng, minimal if self.rng.random() < 0.7 else unique)
        # Never "one": "the circle above the red one" is heard as "the red circle".
        return noun_phrase(self.rng, self.things[i], attributes, any_words=ANY_WORDS[:3])

    def head(self):
        """A target and a set of attributes to name its class by."""
        return pick(self.rng, self.targets), pick(self.rng, CLASSES) | self.must

    def offset(self, i, j, direction):
        """How far object i is in this direction from j, and how far off to the side."""
        axis, sign = DIRECTIONS[direction]
        across = self.things[i].x - self.things[j].x, self.things[i].y - self.things[j].y
        return sign * across[axis], abs(across[1 - axis])

    def is_ahead(self, i, j, direction):
        """Whether i is clearly further in this direction than j, by its centre and also by its edge."""
        along = self.offset(i, j, direction)[0]
        return along >= MARGIN and along >= (self.things[j].diameter - self.things[i].diameter) / 2

    def distance(self, i, j):
        """From centre to centre, and from edge to edge, taking both for circles."""
        a, b = self.things[i], self.things[j]
        centres = math.hypot(a.x - b.x, a.y - b.y)
        return centres, centres - (a.diameter + b.diameter) / 2

    # ---- the five kinds

    def attribute(self, _):
        target = pick(self.rng, self.targets)
        minimal, unique = self.names(target)
        options = [m for m in (minimal if self.rng.random() < 0.5 else unique) if m & self.must == self.must]
        if not options:
            return None
        return the(self.rng, noun_phrase(self.rng, self.things[target], pick(self.rng, options))), target

    def superlative(self, which):
        rng = self.rng
        target, attributes = self.head()
        if which in SIZE_RANK:
            attributes &= ~SIZE  # not "the largest small circle"
        others = [i for i in self.members(target, attributes) if i != target]
        if not others or not self.is_extreme(target, others, which):
            return None
        if which in AFTER and rng.random() < 0.4:
            return the(rng, noun_phrase(rng, self.things[target], attributes) + " " + pick(rng, AFTER[which])), target
        return the(rng, noun_phrase(rng, self.things[target], attributes, (pick(rng, BEFORE[which]),))), target

    def is_extreme(self, target, others, which):
        """Whether the target is clearly ahead of all the others; in size, by a whole class."""
        if which in SIZE_RANK:
            sign = 1 if which == "large" else -1
            rank = [sign * SIZE_RANK[self.things[i].size] for i in others]
            return sign * SIZE_RANK[self.things[target].size] > max(rank)
        return all(self.is_ahead(target, i, which) for i in others)

    def ordinal(self, side):
        rng = self.rng
        example, attributes = self.head()
        members = self.members(example, attributes)
        if len(members) < 3:
            return None
        members.sort(key=lambda i: self.offset(i, example, side)[0], reverse=True)
        if not all(self.is_ahead(i, j, side) for i, j in zip(members, members[1:])):
            return None
        rank = 2 + int(rng.random() * (min(len(members), 5) - 1))  # from the second on: the first is a superlative
        target = members[rank - 1]
        if target not in self.targets:
            return None
        noun = noun_phrase(rng, self.things[target], attributes, (pick(rng, ORDINALS[rank]),))
        return the(rng, f"{noun} from {the(rng, SIDES[side], 0.75)}"), target

    def relation(self, which):
        rng = self.rng
        needed = rng.random() < 0.9  # the head alone leaves it open, so that the relation is needed
        target, attributes = self.head()
        anchors = self.anchors(target, 2 if which == "between" else 1)
        if anchors is None:
            return None
        rivals = [i for i in self.members(target, attributes) if i != target and i not in anchors]
        if (needed or which in ("closest", "furthest")) and not rivals:
            return None
        if not self.meets(target, which, anchors, rivals):
            return None
        anchor_names = " and ".join(the(rng, self.name(i), 0.7) for i in anchors)
        link = ("that is " if rng.random() < 0.15 else "") + pick(rng, RELATION_WORDS[which])
        return the(rng, f"{noun_phrase(rng, self.things[target], attributes)} {link} {anchor_names}"), target

    def anchors(self, target, count):
        """Objects that can be named and are not the target; None if there are too few."""
        options = [i for i in self.indices if i != target and self.names(i)[1]]
        if len(options) < count:
            return None
        return [options.pop(int(self.rng.random() * len(options))) for _ in range(count)]

    def meets(self, target, which, anchors, rivals):
        """Whether the target clearly meets the condition and no rival comes near to it."""
        if which == "between":
            return self.is_between(target, *anchors, 0.25, 0.2) and not any(
                self.is_between(i, *anchors, 1.0, 0.0) for i in rivals)
        anchor, = anchors
        if which in DIRECTIONS:
            return self.is_towards(target, anchor, which, 0.5) and not any(
                self.offset(i, anchor, which)[0] > 0 for i in rivals)
        (here, gap), there = self.distance(target, anchor), [self.distance(i, anchor) for i in rivals]
        if which == "closest":
            return all(here * CLEAR_RATIO <= centres and gap <= edges for centres, edges in there)
        return all(here >= centres * CLEAR_RATIO and gap >= edges for centres, edges in there)

    def is_towards(self, i, j, direction, slope):
        """Whether i is clearly in this direction from j: at least MARGIN, and `slope` times what it is to the side."""
        along, aside = self.offset(i, j, direction)
        return along >= MARGIN and along >= slope * aside

    def is_between(self, i, a, b, width, end):
        """Whether i is in the band from a to b, cut short by `end` at both ends. width and end as shares of a to b."""
        o, a, b = self.things[i], self.things[a], self.things[b]
        ux, uy, vx, vy = b.x - a.x, b.y - a.y, o.x - a.x, o.y - a.y
        length2 = ux * ux + uy * uy
        along, aside = (ux * vx + uy * vy) / length2, abs(ux * vy - uy * vx) / length2
        return end < along < 1 - end and aside < width / 2

    def conjunction(self, form):
        if form == "two attributes":
            return self.two_attributes()
        if form == "attribute and relation":
            return self.attribute_and_relation()
        return self.two_relations(1 if form == "two sides" else 2)

    def two_attributes(self):
        """"the shape that is big and red": two attributes moved behind the noun."""
        rng = self.rng
        target = pick(rng, self.targets)
        options = [m for m in self.names(target)[1] if m & self.must == self.must and (m & ~SHAPE).bit_count() >= 2]
        if not options:
            return None
        attributes = pick(rng, options)
        behind = [a for a in (SIZE, FILL, COLOUR) if attributes & a]
        if len(behind) == 3:
            behind.pop(int(rng.random() * 3))
        if rng.random() < 0.5:
            behind.reverse()
        first, second = (attribute_words(rng, self.things[target], a)[0] for a in behind)
        noun = noun_phrase(rng, self.things[target], attributes & ~sum(behind))
        return the(rng, f"{noun} that is {first} and {second}", 0.8), target

    def attribute_and_relation(self):
        """"the circle that is red and left of the star"."""
        rng = self.rng
        target, attributes = self.head()
        behind = pick(rng, (SIZE, FILL, COLOUR))
        which = pick(rng, tuple(DIRECTIONS))
        anchors = self.anchors(target, 1)
        if anchors is None:
            return None
        rivals = [i for i in self.members(target, attributes | behind) if i not in (target, *anchors)]
        if not self.meets(target, which, anchors, rivals):
            return None
        noun = noun_phrase(rng, self.things[target], attributes & ~behind)
        word, = attribute_words(rng, self.things[target], behind)
        where = f"{pick(rng, RELATION_WORDS[which])} {the(rng, self.name(anchors[0]), 0.7)}"
        return the(rng, f"{noun} that is {word} and {where}", 0.8), target

    def two_relations(self, count):
        """"the circle above the square and left of the star", or with one anchor "left and above the star"."""
        rng = self.rng
        target, attributes = self.head()
        anchors = self.anchors(target, count)
        if anchors is None:
            return None
        conditions = self.two_conditions(anchors)
        slope = 0.25 if count == 1 else 0.5  # left AND above one thing: 45 degrees, give or take
        if not all(self.is_towards(target, anchor, which, slope) for which, anchor in conditions):
            return None
        rivals = [i for i in self.members(target, attributes) if i != target and i not in anchors]
        fits = [[self.offset(i, anchor, which)[0] > 0 for which, anchor in conditions] for i in rivals]
        if any(all(fit) for fit in fits):
            return None
        if rng.random() < 0.7 and not (any(f[0] for f in fits) and any(f[1] for f in fits)):
            return None  # mostly neither condition is enough alone
        noun = noun_phrase(rng, self.things[target], attributes)
        link = "that is " if rng.random() < 0.15 else ""
        return the(rng, f"{noun} {link}{self.two_places(conditions)}"), target

    def two_conditions(self, anchors):
        """Two (direction, anchor); from one anchor, to a side and up or down."""
        rng = self.rng
        pair = [pick(rng, ("left", "right")), pick(rng, ("above", "below"))]
        if len(anchors) == 2 and rng.random() < 0.5:
            pair = [pick(rng, tuple(DIRECTIONS)), pick(rng, tuple(DIRECTIONS))]
        conditions = list(zip(pair, anchors if len(anchors) == 2 else anchors * 2))
        if rng.random() < 0.5:
            conditions.reverse()
        return conditions

    def two_places(self, conditions):
        """Two (direction, anchor) in words."""
        rng = self.rng
        (first, one), (second, other) = conditions
        if one == other:
            first, second = pick(rng, FIRST_WORDS[first]), pick(rng, SECOND_WORDS[second])
            return f"{first} and {second} {the(rng, self.name(one), 0.8)}"
        first, second = pick(rng, RELATION_WORDS[first]), pick(rng, RELATION_WORDS[second])
        one, other = the(rng, self.name(one), 0.8), the(rng, self.name(other), 0.8)
        return f"{first} {one} and {second} {other}"


def express(scene, rng, weights, count=4, targets=None, must=0, forms=3, attempts=40):
    """`count` expressions with distinct texts, their kinds drawn by `weights` (kind -> weight), or None.

    For each, one form of its kind after another is drawn and attempted, so that easy forms do not crowd out hard ones;
    to begin with, only an object that nothing was said about yet is accepted as target.
    None means that the scene does not lend itself to it: draw another scene. targets and must as in Speaker.
    """
    speaker = Speaker(scene, rng, targets, must)
    totals = list(accumulate(weights.values()))
    found, used = {}, set()
    for _ in range(count):
        level = rng.random() * totals[-1]
        kind = next(k for k, total in zip(weights, totals) if level < total)
        make = getattr(speaker, kind)
        for attempt in range(forms * attempts):
            if attempt % attempts == 0:
                form = pick(rng, FORMS[kind])
            made = make(form)
            if made is None or (made[1] in used and attempt < attempts // 2):
                continue
            text, target = made
            if text not in found and len(text.split()) <= MAX_WORDS:
                found[text] = Expression(text, target, kind)
                used.add(target)
                break
        else:
            return None
    return list(found.values())


# ---- captions

PLACES = (("at the top left", "at the top", "at the top right"),
          ("on the left", "in the middle", "on the right"),
          ("at the bottom left", "at the bottom", "at the bottom right"))
MAX_CAPTION_WORDS = 60


def indefinite(rng, thing, attributes):
    """"a large red circle", with these attributes."""
    phrase = noun_phrase(rng, thing, attributes)
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def place(scene, thing):
    """Which ninth of the picture an object is in, in words."""
    row, column = int(3 * thing.y / scene.height), int(3 * thing.x / scene.width)
    return PLACES[row][column]


def relate(rng, a, b):
    """How a is to b: the one of the four directions that fits best, in words."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy):
        return pick(rng, RELATION_WORDS["left" if dx < 0 else "right"])
    return pick(rng, RELATION_WORDS["above" if dy < 0 else "below"])


def caption(scene, rng):
    """A caption that names all the objects of the scene in random order, at most MAX_CAPTION_WORDS words.

    One half says nothing of where they are, a quarter where in the picture, a quarter how they are to each other. Every
    object's shape is named; size, fill and colour only in two captions of five each, for what one attribute gives away
    (colours nearly always do) teaches nothing of the others.
    """
    things = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    attributes = SHAPE | sum(a for a in (SIZE, FILL, COLOUR) if rng.random() < 0.4)
    style = pick(rng, ("plain", "plain", "places", "relative"))
    names = [indefinite(rng, thing, attributes) for thing in things]
    parts = names
    if style == "places":
        parts = [f"{name} {place(scene, thing)}" for name, thing in zip(names, things)]
    elif style == "relative":
        parts = [f"{names[i]} {relate(rng, things[i], things[i + 1])} {names[i + 1]}"
                 for i in range(0, len(names) - 1, 2)]
        parts += names[len(names) // 2 * 2:]  # the last of an odd number
    if sum(len(part.split()) for part in parts) >= MAX_CAPTION_WORDS:  # so many that there is no room for places
        parts = names
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
