"""The words of the drawn world: noun phrases for its objects, captions of whole scenes.

The captions, and a phrase for each object, are the texts of the tiny CLIP's pre-training. Referring expressions are
made in data/drawn/expressions.py.
"""

# Attributes are bits, so a set of them is an integer.
SIZE = 1
FILL = 2
COLOUR = 4
SHAPE = 8
ALL = SIZE | FILL | COLOUR | SHAPE

SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "medium": ("medium", "medium-sized"),
              "large": ("large", "big")}
FILL_WORDS = {True: ("filled", "solid"), False: ("outlined", "hollow", "empty")}
COLOUR_WORDS = {"purple": ("purple", "purple", "violet")}  # the other colours have one name
ANY_WORDS = ("shape", "object", "thing", "one")
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

PLACES = (("at the top left", "at the top", "at the top right"),
          ("on the left", "in the middle", "on the right"),
          ("at the bottom left", "at the bottom", "at the bottom right"))
MAX_CAPTION_WORDS = 60
NAMED = {SHAPE: 1, COLOUR: 1, FILL: 0.3, SIZE: 0.15}  # how often a phrase names each attribute


def pick(rng, options):
    """One of the options, all equally likely; much faster than rng.choice."""
    return options[int(rng.random() * len(options))]


def attribute_words(rng, obj, attributes):
    """The adjectives for a set of attributes, in the order of English: ["large", "outlined", "red"]."""
    words = []
    if attributes & SIZE:
        words.append(pick(rng, SIZE_WORDS[obj.size]))
    pair = []
    if attributes & FILL:
        pair.append(pick(rng, FILL_WORDS[obj.filled]))
    if attributes & COLOUR:
        pair.append(pick(rng, COLOUR_WORDS.get(obj.colour, (obj.colour,))))
    return words + (pair[::-1] if rng.random() < 0.3 else pair)  # less often "red outlined"


def noun_phrase(rng, obj, attributes, before=(), any_words=ANY_WORDS):
    """"red circle"; before: a superlative or ordinal, as in "leftmost red circle"."""
    noun = obj.shape if attributes & SHAPE else pick(rng, any_words)
    return " ".join([*before, *attribute_words(rng, obj, attributes), noun])


def indefinite(rng, obj, attributes):
    """"a large red circle", with these attributes."""
    phrase = noun_phrase(rng, obj, attributes)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def place(scene, obj):
    """The ninth of the image that an object is in, in words."""
    return PLACES[int(3 * obj.y / scene.height)][int(3 * obj.x / scene.width)]


def relate(rng, a, b):
    """Where a is seen from b, in words: the one of four directions that fits best."""
    dx = a.x - b.x
    dy = a.y - b.y
    if abs(dx) > abs(dy):
        return pick(rng, RELATION_WORDS["left" if dx < 0 else "right"])
    return pick(rng, RELATION_WORDS["above" if dy < 0 else "below"])


def caption(scene, rng):
    """A caption that names all objects of the scene in random order, in at most MAX_CAPTION_WORDS words.

    A quarter of the captions say where in the image the objects are, a quarter where they are seen from each other. All
    name the shapes; size, fill and colour are each named by two in five: where one attribute gives the scene away, as
    colours nearly always do, the caption teaches nothing about the others.
    """
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    attributes = SHAPE
    for attribute in (SIZE, FILL, COLOUR):
        if rng.random() < 0.4:
            attributes |= attribute
    style = pick(rng, ("plain", "plain", "places", "relative"))
    names = [indefinite(rng, obj, attributes) for obj in objects]
    parts = names
    if style == "places":
        parts = [f"{name} {place(scene, obj)}" for name, obj in zip(names, objects)]
    elif style == "relative":
        parts = []
        for i in range(0, len(names) - 1, 2):
            parts.append(f"{names[i]} {relate(rng, objects[i], objects[i + 1])} {names[i + 1]}")
        parts += names[len(names) // 2 * 2:]  # the last of an odd number
    if sum(len(part.split()) for part in parts) >= MAX_CAPTION_WORDS:  # too many objects to say where they are
        parts = names
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def object_phrases(scene, rng):
    """A phrase for each object, "a red star", true of it and perhaps of others -> (phrases, the set of attributes that
    each names)."""
    named = []
    for _ in scene.objects:
        named.append(sum(attribute for attribute, chance in NAMED.items() if rng.random() < chance))
    return [indefinite(rng, obj, attributes) for obj, attributes in zip(scene.objects, named)], named
