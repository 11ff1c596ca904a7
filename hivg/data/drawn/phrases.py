"""The words of the drawn world: noun phrases for its objects, captions of whole scenes.

The captions, and a phrase for each object, are the texts of the tiny CLIP's pre-training. Referring expressions are
made in data/drawn/expressions.py.
"""

from dataclasses import dataclass

# Attributes are bits, so a set of them is an integer.
SIZE = 1
FILL = 2
COLOUR = 4
SHAPE = 8
ALL = SIZE | FILL | COLOUR | SHAPE


@dataclass(frozen=True)
class Words:
    """The words of a language. Lists are repeated by how often a word is drawn."""

    shape: dict  # the names of each shape; one that is not in here is called what it is
    colour: dict  # likewise
    size: dict
    fill: dict
    implied: dict  # (shape, filled): nouns that say both, as "ring" says outlined circle
    any: tuple  # nouns for any object; the last, "one", names no anchor
    relation: dict
    before: dict  # superlatives that stand before the noun ...
    of_two: dict  # ... and comparatives, where there are two
    after: dict  # ... and after it
    sides: dict  # "second from the ..."
    ordinals: dict


PLAIN = Words(
    shape={},
    colour={"purple": ("purple", "purple", "violet")},
    size={"small": ("small", "small", "little", "tiny"), "medium": ("medium", "medium-sized"),
          "large": ("large", "big")},
    fill={True: ("filled", "solid"), False: ("outlined", "hollow", "empty")},
    implied={},
    any=("shape", "object", "thing", "one"),
    relation={
        "left": ("left of", "to the left of", "on the left side of"),
        "right": ("right of", "to the right of", "on the right side of"),
        "above": ("above", "above", "over", "higher than"),
        "below": ("below", "below", "under", "beneath", "lower than"),
        "closest": ("closest to", "nearest to", "next to"),
        "furthest": ("furthest from", "farthest from", "furthest away from"),
        "between": ("between",)},
    before={
        "left": ("leftmost", "left", "furthest left"), "right": ("rightmost", "right", "furthest right"),
        "above": ("topmost", "top", "highest", "uppermost"), "below": ("lowest", "bottom", "bottommost"),
        "large": ("largest", "biggest"), "small": ("smallest", "tiniest")},
    of_two={},
    after={
        "left": ("on the left", "on the far left", "furthest to the left"),
        "right": ("on the right", "on the far right", "furthest to the right"),
        "above": ("at the top", "at the very top"), "below": ("at the bottom", "at the very bottom")},
    sides={"left": "left", "right": "right", "above": "top", "below": "bottom"},
    ordinals={2: ("second", "second", "2nd"), 3: ("third", "third", "3rd"), 4: ("fourth", "4th"), 5: ("fifth", "5th")},
)
# What people call the colours, repeated as in Words
HUES = {
    "red": ("red", "red", "red", "crimson", "scarlet"), "green": ("green", "green", "green", "emerald"),
    "blue": ("blue", "blue", "blue", "cobalt"),
    "brown": ("brown", "brown", "brown", "chocolate", "chestnut"),
    "purple": ("purple", "purple", "violet", "violet", "plum"),
    "orange": ("orange", "orange", "orange", "tangerine"),
    "black": ("black", "black", "black", "jet-black", "ebony"),
    "pink": ("pink", "pink", "pink", "rose", "hot pink")}
# What people type. No word is in here that could mean another thing of the drawn world: "oval" is never a circle.
WIDE = Words(
    shape={
        "circle": ("circle",), "square": ("square", "square", "box", "block"),
        "triangle": ("triangle", "triangle", "wedge", "pyramid"),
        "star": ("star", "star", "star shape", "five-pointed star"),
        "heart": ("heart", "heart", "heart shape", "love heart"),
        "diamond": ("diamond", "diamond", "rhombus", "lozenge"), "cross": ("cross", "cross", "plus", "plus sign"),
        "arrow": ("arrow", "arrow", "pointer", "arrow sign"), "bar": ("bar", "bar", "rectangle", "strip"),
        "ellipse": ("ellipse", "oval", "oval")},
    colour={colour: (*names * 3, f"{colour}-coloured", f"{colour}-colored") for colour, names in HUES.items()},
    size={"small": ("small", "small", "little", "tiny", "mini"),
          "medium": ("medium", "medium-sized", "mid-sized", "middle-sized"),
          "large": ("large", "large", "big", "big", "huge", "giant")},
    fill={True: ("filled", "solid", "filled-in"), False: ("outlined", "hollow", "empty", "unfilled")},
    implied={("circle", True): ("disc", "disk", "dot"), ("circle", False): ("ring", "ring", "hoop")},
    any=("shape", "object", "thing", "figure", "item", "symbol", "one"),
    relation={
        "left": (*PLAIN.relation["left"], "to the left side of", "left from"),
        "right": (*PLAIN.relation["right"], "to the right side of", "right from"),
        "above": (*PLAIN.relation["above"], "further up than", "just above"),
        "below": (*PLAIN.relation["below"], "underneath", "further down than", "just below"),
        "closest": (*PLAIN.relation["closest"], "beside", "near", "close to", "by", "right next to", "adjacent to"),
        "furthest": (*PLAIN.relation["furthest"], "most distant from", "far from", "far away from"),
        "between": ("between", "in between")},
    before={
        "left": (*PLAIN.before["left"], "left-most", "far left"),
        "right": (*PLAIN.before["right"], "right-most", "far right"),
        "above": (*PLAIN.before["above"], "upper", "top-most"),
        "below": (*PLAIN.before["below"], "lowermost", "lower", "bottom-most"),
        "large": ("largest", "largest", "biggest"), "small": ("smallest", "smallest", "tiniest", "littlest")},
    of_two={"large": ("larger", "bigger"), "small": ("smaller",)},
    after={
        "left": (*PLAIN.after["left"], "to the left", "at the left", "on the left side", "on the left of the image"),
        "right": (*PLAIN.after["right"], "to the right", "at the right", "on the right side",
                  "on the right of the image"),
        "above": (*PLAIN.after["above"], "on top", "up top", "at the top of the image"),
        "below": (*PLAIN.after["below"], "down below", "on the bottom", "at the bottom of the image")},
    sides=PLAIN.sides,
    ordinals={1: ("first", "first", "1st"), **PLAIN.ordinals, 6: ("sixth", "6th")},
)

PLACES = (("at the top left", "at the top", "at the top right"),
          ("on the left", "in the middle", "on the right"),
          ("at the bottom left", "at the bottom", "at the bottom right"))
MAX_CAPTION_WORDS = 60
NAMED = {SHAPE: 1, COLOUR: 1, FILL: 0.3, SIZE: 0.15}  # how often a phrase names each attribute


def pick(rng, options):
    """One of the options, all equally likely; much faster than rng.choice."""
    return options[int(rng.random() * len(options))]


def attribute_words(rng, obj, attributes, words=PLAIN):
    """The adjectives for a set of attributes, in the order of English: ["large", "outlined", "red"]."""
    found = []
    if attributes & SIZE:
        found.append(pick(rng, words.size[obj.size]))
    pair = []
    if attributes & FILL:
        pair.append(pick(rng, words.fill[obj.filled]))
    if attributes & COLOUR:
        pair.append(pick(rng, words.colour.get(obj.colour, (obj.colour,))))
    return found + (pair[::-1] if rng.random() < 0.3 else pair)  # less often "red outlined"


def noun_phrase(rng, obj, attributes, before=(), words=PLAIN, anchor=False):
    """"red circle"; before: a superlative or ordinal, as in "leftmost red circle". anchor: never "red one", as "the
    circle above the red one" sounds like "the red circle"."""
    if not attributes & SHAPE:
        noun = pick(rng, words.any[:-1] if anchor else words.any)
    elif attributes & FILL and words.implied and rng.random() < 0.6 and (obj.shape, obj.filled) in words.implied:
        noun = pick(rng, words.implied[obj.shape, obj.filled])
        attributes &= ~FILL
    elif obj.shape in words.shape:
        noun = pick(rng, words.shape[obj.shape])
    else:
        noun = obj.shape
    return " ".join([*before, *attribute_words(rng, obj, attributes, words), noun])


def with_article(phrase):
    """"a red circle"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def indefinite(rng, obj, attributes, words=PLAIN):
    """"a large red circle", with these attributes."""
    return with_article(noun_phrase(rng, obj, attributes, words=words))


def place(scene, obj):
    """The ninth of the image that an object is in, in words."""
    return PLACES[int(3 * obj.y / scene.height)][int(3 * obj.x / scene.width)]


def relate(rng, a, b, words=PLAIN):
    """Where a is seen from b, in words: the one of four directions that fits best."""
    dx = a.x - b.x
    dy = a.y - b.y
    if abs(dx) > abs(dy):
        return pick(rng, words.relation["left" if dx < 0 else "right"])
    return pick(rng, words.relation["above" if dy < 0 else "below"])


def caption(scene, rng, words=PLAIN):
    """A caption that names all objects of the scene in random order; places and relations only in fewer than
    MAX_CAPTION_WORDS words.

    A quarter of the captions say where in the image the objects are, a quarter where they are seen from each other. All
    name the shapes; size, fill and colour are each named by two in five: where one attribute gives the scene away, as
    colours nearly always do, the caption teaches nothing about the others.
    """
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    attributes = SHAPE | sum(attribute for attribute in (SIZE, FILL, COLOUR) if rng.random() < 0.4)
    style = pick(rng, ("plain", "plain", "places", "relative"))
    names = [indefinite(rng, obj, attributes, words) for obj in objects]
    parts = names
    if style == "places":
        parts = [f"{name} {place(scene, obj)}" for name, obj in zip(names, objects)]
    elif style == "relative":
        parts = []
        for i in range(0, len(names) - 1, 2):
            parts.append(f"{names[i]} {relate(rng, objects[i], objects[i + 1], words)} {names[i + 1]}")
        parts += names[len(names) // 2 * 2:]  # the last of an odd number
    if sum(len(part.split()) for part in parts) >= MAX_CAPTION_WORDS:  # too many objects to say where they are
        parts = names
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def object_phrases(scene, rng, words=PLAIN):
    """A phrase for each object, "a red star", true of it and perhaps of others -> (phrases, the set of attributes that
    each names)."""
    named = [sum(attribute for attribute, chance in NAMED.items() if rng.random() < chance) for _ in scene.objects]
    return [indefinite(rng, obj, names, words) for obj, names in zip(scene.objects, named)], named
