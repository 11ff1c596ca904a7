"""The wider language of the drawn world: what people type beyond `expressions.py`.

Ordinals from the first to the sixth and from the last, "the middle square", "the circle in the top left corner", "the
star that is not red", questions and requests, and expressions that are true of nothing in the image.
"""

import math
from dataclasses import dataclass, replace

from hivg.data.drawn.drawing import ALIKE, COLOURS, HELD_OUT, LONG, SHAPES, SIZES
from hivg.data.drawn.expressions import DIRECTIONS, FORMS, MARGIN, NOTHING, Speaker, includes, shared_attributes, the
from hivg.data.drawn.phrases import ALL, COLOUR, FILL, SHAPE, SIZE, WIDE, indefinite, noun_phrase, pick, with_article

WIDE_SHAPES = (*SHAPES, *LONG)
LOOKS = {SIZE: "size", FILL: "filled", COLOUR: "colour", SHAPE: "shape"}
LAST = {0: ("last", "last", "very last", "final"),
        1: ("second to last", "next to last", "second-last", "penultimate"), 2: ("third to last",)}
NUMBERS = ("one", "two", "three", "four", "five", "six")
FROM = ("from the {}", "from the {}", "from the {}", "from {}", "counting from the {}", "from the {} side",
        "starting from the {}")
CORNER = ("{noun} in the {corner} corner", "{noun} at the {corner}", "{noun} in the {corner}", "{corner} {noun}")
MIDDLE = ("middle {}", "{} in the middle", "central {}", "centre {}", "center {}")
ASKED = ("where is {}?", "where is {}", "where's {}?", "find {}", "find {} please", "please find {}", "click {}",
         "click on {}", "please click on {}", "tap {}", "can you find {}?", "can you see {}?", "could you point at {}?",
         "point to {}", "point at {}", "show me {}", "select {}", "please select {}", "which one is {}?", "locate {}",
         "highlight {}", "look for {}", "pick {}", "i mean {}", "give me {}", "mark {}", "it is {}", "what about {}?",
         "draw a box around {}", "i am looking for {}", "i want {}", "look at {}", "choose {}", "get {}", "identify {}",
         "detect {}", "segment {}")
WIDE_FORMS = FORMS | {
    "superlative": (*FORMS["superlative"], "large", "small", "corner", "corner"),
    "ordinal": (None,), "counting": (None,), "late": (None,), "beyond": (None,),  # of the scene's row
    "medium": (None,), "closeness": (*FORMS["closeness"], "between"),
    "negation": (COLOUR, COLOUR, FILL, SHAPE, SIZE),
    "absent": ("thing", "thing", "thing", "anchor", "anchor", "anchor", "side", "not"),
}


def plural(noun):
    """"stars", "crosses"."""
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


@dataclass(frozen=True)
class Row:
    """A class of objects one after another: their numbers from the left, or from the top."""

    members: tuple
    axis: int  # 0: from left to right, 1: from top to bottom
    attributes: int  # that name the class


class WideSpeaker(Speaker):
    """Makes expressions of the wider language for one scene."""

    words = WIDE
    forms = WIDE_FORMS

    def __init__(self, scene, rng, targets=None, must=0, never=0, row=None):
        if len({obj.size for obj in scene.objects}) == 1:  # how large is large shows beside others only
            never |= SIZE
        super().__init__(scene, rng, targets, must, never, row)
        self.scene = scene

    def noun(self, i, attributes, before=()):
        """A noun phrase; with a superlative now and then as "the leftmost of the (three) red stars"."""
        if before and before[0].endswith(("st", "nd", "rd", "th", "er")) and self.rng.random() < 0.15:
            members = len(self.members(i, attributes))
            number = NUMBERS[members - 1] + " " if members <= len(NUMBERS) and self.rng.random() < 0.4 else ""
            return f"{' '.join(before)} of the {number}{plural(super().noun(i, attributes))}"
        return super().noun(i, attributes, before)

    def asked(self, text):
        if self.rng.random() > 0.12:
            return text
        return pick(self.rng, ASKED).format(text if text.startswith(("the ", "a ", "an ")) else "the " + text)

    def attribute(self, _):
        made = super().attribute(_)
        if not made:
            return None
        text, target = made
        style = self.rng.random()
        if style < 0.04:
            text = plural(text)
        elif style < 0.07:
            text = f"the only {text.removeprefix('the ')}"
        elif style < 0.1:
            text = with_article(text.removeprefix("the "))
        return text, target

    def medium(self, _):
        """An object that only its middle size singles out, among two or three sizes."""
        options = [(i, attributes) for i in self.targets if self.objects[i].size == "medium"
                   for attributes in self.minimal[i] if includes(attributes, SIZE | self.must)]
        if not options:
            return None
        target, attributes = pick(self.rng, options)
        return the(self.rng, self.noun(target, attributes)), target

    def superlative(self, which):
        return self.corner() if which == "corner" else super().superlative(which)

    def corner(self):
        """"the star in the top left corner", and no other star is in that quarter of the image."""
        rng = self.rng
        target, attributes = self.head()
        is_left = self.at[0][target] < self.scene.width / 2
        is_upper = self.at[1][target] < self.scene.height / 2
        away = []  # from that corner to each object, along the axis on which it is further, as a share of the image
        for x, y in zip(*self.at):
            x, y = x / self.scene.width, y / self.scene.height
            away.append(max(x if is_left else 1 - x, y if is_upper else 1 - y))
        others = self.rivals(target, attributes)
        if not others or away[target] > 0.33 or min(away[i] for i in others) < 0.55:
            return None
        corner = pick(rng, ("top ", "top-", "upper ") if is_upper else ("bottom ", "bottom-", "lower "))
        corner += "left" if is_left else "right"
        return the(rng, pick(rng, CORNER).format(noun=self.noun(target, attributes), corner=corner)), target

    # ---- ordinals, of the scene's row

    def ordinal(self, _):
        """One of its members, by its rank from one of two sides."""
        return self.rank(range(1, len(self.row.members) + 1))

    def counting(self, _):
        """Neither the first nor the last."""
        return self.rank(range(2, len(self.row.members)))

    def late(self, _):
        """The third or a later one, told by its number."""
        return self.rank(range(3, len(self.row.members) + 1), is_counted=True)

    def beyond(self, _):
        """A rank that nothing has: "the fifth" of three."""
        return self.rank(range(len(self.row.members) + 1, 7))

    def rank(self, ranks, is_counted=False):
        rng = self.rng
        side = pick(rng, [side for side, (axis, _) in DIRECTIONS.items() if axis == self.row.axis])
        members = self.row.members[:: -DIRECTIONS[side][1]]  # as seen from this side
        rank = pick(rng, ranks)
        behind = len(members) - rank  # how many come after it
        target = members[rank - 1] if behind >= 0 else NOTHING
        if target not in (NOTHING, *self.targets):
            return None
        text = self.ranked(members[0], target, rank, behind, side, is_counted)
        return text, target, f"{rank} of {len(members)}" if target != NOTHING else ""

    def ranked(self, some, target, rank, behind, side, is_counted):
        """The rank in words. some: a member of the row. behind: how many come after the target. is_counted: by its
        number, never as "the last" or "the middle"."""
        rng = self.rng
        if not is_counted and behind == rank - 1 > 0 and rng.random() < 0.3 and self.is_middle(target):
            words = pick(rng, MIDDLE)
            if not self.is_central(target):  # "in the middle" may mean the image's
                words = MIDDLE[0]
            return the(rng, words.format(self.noun(some, self.row.attributes)))
        counted = pick(rng, self.words.ordinals[rank])
        if not is_counted and behind in LAST and rank > 1 and rng.random() < (0.4, 0.3, 0.15)[behind]:
            counted = pick(rng, LAST[behind])
        where = pick(rng, FROM).format(self.words.sides[side])
        style = rng.random()
        if style < 0.05:
            number = pick(rng, (NUMBERS[rank - 1], str(rank)))
            return the(rng, f"{self.noun(some, self.row.attributes)} number {number} {where}")
        if style < 0.2:
            link = "that is " if style < 0.12 else ""
            return the(rng, f"{self.noun(some, self.row.attributes)} {link}{counted} {where}")
        if style < 0.3 and not self.must and len(self.row.members) == len(self.objects):
            return the(rng, f"{counted} {where}", 0.7)  # without a noun: the row is all there is
        return the(rng, f"{self.noun(some, self.row.attributes, (counted,))} {where}", 0.7)

    def is_middle(self, target):
        """Whether the middle one of the row is in the middle of its other axis too, or the row is flat there."""
        along, across = ([self.at[axis][i] for i in self.row.members] for axis in (self.row.axis, 1 - self.row.axis))
        is_flat = max(across) - min(across) < 0.4 * (max(along) - min(along))
        return is_flat or sorted(across)[len(across) // 2] == self.at[1 - self.row.axis][target]

    def is_central(self, target):
        """Whether no other of the row is nearer to the image's middle."""
        x, y = self.scene.width / 2, self.scene.height / 2
        away = [math.hypot(self.at[0][i] - x, self.at[1][i] - y) for i in self.row.members]
        return away[self.row.members.index(target)] == min(away)

    # ---- negation

    def negation(self, attribute):
        """"the star that is not red": all other stars are red."""
        target, attributes = self.head()
        attributes &= ~attribute
        if attribute & (self.never | self.must):
            return None
        others = self.rivals(target, attributes)
        own, *theirs = [getattr(self.objects[i], LOOKS[attribute]) for i in (target, *others)]
        if len(set(theirs)) != 1 or own in theirs or {own, *theirs} in ALIKE:
            return None
        return self.negated(target, attributes, others[0], attribute), target

    def negated(self, i, attributes, other, attribute):
        """In words: of the class of i by these attributes, the one that has not this attribute of the other."""
        rng = self.rng
        noun = self.noun(i, attributes)
        link = pick(rng, ("that is not", "that is not", "that isn't", "which is not"))
        if attribute == SHAPE:
            return the(rng, f"{noun} {link} {indefinite(rng, self.objects[other], SHAPE, WIDE)}")
        adjective = self.adjective(other, attribute)
        style = rng.random()
        if style < 0.6:
            return the(rng, f"{noun} {link} {adjective}")
        if style < 0.8:
            ones = "one" if len(self.members(i, attributes)) <= 2 else "ones"
            return f"{the(rng, noun)} {pick(rng, ('not', 'other than', 'except'))} the {adjective} {ones}"
        return the(rng, f"{pick(rng, ('not ', 'non ', 'non-'))}{adjective} {noun}")

    # ---- true of nothing

    def absent(self, form):
        text = getattr(self, "no_" + form)()
        return text and (text, NOTHING)

    def ghost(self, attributes):
        """An object that is not there: one of the scene's with another look, such that no object agrees with it in all
        of these attributes; None if that failed."""
        rng = self.rng
        changed = pick(rng, [look for attribute, look in LOOKS.items() if attributes & attribute])
        obj = pick(rng, self.objects)
        looks = {"size": tuple(SIZES), "filled": (True, False), "colour": tuple(COLOURS), "shape": WIDE_SHAPES}
        obj = replace(obj, **{changed: pick(rng, looks[changed])})
        if any(includes(shared_attributes(obj, other), attributes) for other in self.objects):
            return None
        there = {other.shape for other in self.objects}
        if any(obj.shape in pair and there & set(pair) for pair in LONG.items()):  # a square may pass for a rectangle
            return None
        return None if (obj.colour, obj.shape) in HELD_OUT else obj

    def no_thing(self):
        """"the purple star", also "the leftmost purple star"."""
        rng = self.rng
        attributes = pick(rng, (SHAPE, *(SHAPE | COLOUR,) * 3, COLOUR, SHAPE | FILL, ALL & ~SIZE))
        ghost = self.ghost(attributes)
        if not ghost:
            return None
        before = (pick(rng, pick(rng, tuple(self.words.before.values()))),) if rng.random() < 0.2 else ()
        phrase = noun_phrase(rng, ghost, attributes, before, WIDE)
        if not before and rng.random() < 0.25 and (anchors := self.anchors(NOTHING, 1)):
            phrase += f" {pick(rng, self.words.relation[pick(rng, tuple(DIRECTIONS))])} {the(rng, self.name(*anchors))}"
        return the(rng, phrase)

    def no_anchor(self):
        """"the star left of the heart", and no heart is there."""
        rng = self.rng
        target, attributes = self.head()
        named = pick(rng, (SHAPE, SHAPE, SHAPE | COLOUR, SHAPE | COLOUR, COLOUR))
        ghost = self.ghost(named)
        if not ghost:
            return None
        which = pick(rng, (*DIRECTIONS, *DIRECTIONS, "closest"))
        return the(rng, f"{self.noun(target, attributes)} {pick(rng, self.words.relation[which])} "
                        f"{the(rng, noun_phrase(rng, ghost, named, words=WIDE), 0.8)}")

    def no_side(self):
        """"the star left of the square", and all stars are right of it."""
        rng = self.rng
        target, attributes = self.head()
        anchors = self.anchors(target, 1)
        if not anchors:
            return None
        which = pick(rng, tuple(DIRECTIONS))
        members = [target, *self.rivals(target, attributes, anchors)]
        if any(self.offset(i, anchors[0], which)[0] > -MARGIN for i in members):
            return None
        return the(rng, f"{self.noun(target, attributes)} {pick(rng, self.words.relation[which])} "
                        f"{the(rng, self.name(anchors[0]), 0.8)}")

    def no_not(self):
        """"the star that is not red", and all are."""
        target, attributes = self.head()
        attribute = pick(self.rng, (COLOUR, COLOUR, FILL))
        attributes &= ~attribute
        if not all(includes(self.shared[target][i], attribute) for i in self.rivals(target, attributes)):
            return None
        return self.negated(target, attributes, target, attribute)
