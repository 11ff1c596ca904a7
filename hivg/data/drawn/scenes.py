"""The drawn worlds: images of coloured shapes, and expressions that each mean one of them.

Nothing is stored: item i of a split is drawn on demand, by a random generator seeded with (seed, split, i), so it is
the same on every machine. A scene is a short list of numbers, which can be drawn at any size; boxes and masks are read
off the drawn pixels, so they are exact.

    item = Shapes("train")[0]  # image, labels, expressions, targets, boxes, kinds, caption, ...
"""

import math

import numpy as np

from hivg.data.drawn.drawing import COLOURS, HELD_OUT, REACH, SHAPES, SIZES, Object, Scene, background, boxes_of, draw
from hivg.data.drawn.expressions import Speaker, draw_kinds, express
from hivg.data.drawn.phrases import COLOUR, SHAPE, caption, object_phrases, pick
from hivg.data.drawn.wide_expressions import WideSpeaker
from hivg.data.drawn.wide_scenes import MOST, looks_of, reframed, row_scene, some, wide_scene

EXPRESSIONS_PER_SCENE = 4
MAX_OBJECTS = 8
# How often each kind of expression is drawn. A scene that cannot yield one is replaced, so ordinals, which need three
# of a class, end up a little rarer.
MIXED = {"attribute": 0.35, "superlative": 0.17, "ordinal": 0.10, "relation": 0.25, "conjunction": 0.13}
# For long training: more of what is learned last. "closeness" is part of the relations (expressions.FORMS).
HARD_KINDS = {"attribute": 0.12, "superlative": 0.10, "ordinal": 0.25, "relation": 0.10, "closeness": 0.30,
              "conjunction": 0.13}
SPLITS = {  # number of scenes, kinds of expressions. A split's position is part of its seed: append only.
    "train": (2**40, MIXED),  # endless in practice
    "val": (250, MIXED),
    "test": (1250, MIXED),
    "testA": (500, {"attribute": 1.0}),
    "testB": (500, {"ordinal": 0.4, "relation": 0.6}),
    "compose": (500, MIXED),
    "count": (500, {"counting": 1.0}),
}

# The wider world
WIDE_MIX = {"attribute": 0.25, "superlative": 0.13, "ordinal": 0.2, "relation": 0.18, "conjunction": 0.07,
            "negation": 0.07, "absent": 0.08, "beyond": 0.02}
LONE = 0.06  # share of the scenes without a row that have one object
# More of what is learned last
WIDE_TRAINING = {"attribute": 0.14, "superlative": 0.1, "ordinal": 0.34, "relation": 0.18, "conjunction": 0.06,
                 "negation": 0.07, "absent": 0.09, "beyond": 0.02}
WIDE_HARD_KINDS = {"attribute": 0.08, "superlative": 0.09, "ordinal": 0.12, "late": 0.28, "relation": 0.11,
                   "closeness": 0.08, "conjunction": 0.03, "negation": 0.05, "absent": 0.07, "beyond": 0.03,
                   "medium": 0.06}
ROWS = {  # kinds that need a row, how many it may have
    "ordinal": (2, 3, 4, 5, 6), "counting": (4, 5, 6), "late": (4, 5, 6), "beyond": (2, 3, 4, 5)}
WIDE_SPLITS = {
    "train": (2**40, WIDE_TRAINING),
    "val": (500, WIDE_MIX),
    "test": (1250, WIDE_MIX),
    "testA": (500, {"attribute": 1.0}),
    "testB": (500, {"superlative": 0.4, "relation": 0.6}),
    "compose": (500, {k: share for k, share in WIDE_MIX.items() if k not in ("absent", "beyond")}),
    "ordinal": (500, {"ordinal": 1.0}),
    "count": (500, {"counting": 1.0}),
    "negation": (500, {"negation": 1.0}),
    "absent": (500, {"absent": 0.8, "beyond": 0.2}),
    "framed": (500, WIDE_MIX),
}
# What `--hard_mix` trains on instead, as arguments of Shapes. In the wider world two fifths of the scenes are then the
# narrower one's, so that its own language is not forgotten, and half are framed as people's images may be.
HARD_MIX = {"shapes": {"weights": HARD_KINDS},
            "shapes-wide": {"weights": WIDE_HARD_KINDS, "plain": 0.4, "reframe": 0.5}}
DRAWN = {"shapes": SPLITS, "shapes-wide": WIDE_SPLITS}  # the data sets that are drawn


def _looks(rng, held_out):
    """The (shape, colour, size, filled) of 3 to 8 objects, of few colours and shapes, so that objects share attributes
    and expressions need their words. held_out: a (colour, shape) that at least one has, or None."""
    pairs = looks_of(some(rng, tuple(COLOURS), 2, 4), some(rng, SHAPES, 2, 4), held_out)
    sizes = some(rng, ("small", "small", "medium", "medium", "large"), 2, 5)  # large ones are rarer: they need room
    filled = pick(rng, ((True,), (True, False), (True, True, False)))
    chosen = [pick(rng, pairs) for _ in range(3 + int(6 * rng.random()))]
    if held_out:
        chosen[0] = held_out
    return [(shape, colour, pick(rng, sizes), pick(rng, filled)) for colour, shape in chosen]


def _place(rng, looks, width, height):
    """Place the objects, largest first; one that finds no room in 30 tries is left out."""
    objects = []
    for shape, colour, size, filled in sorted(looks, key=lambda look: -SIZES[look[2]]):
        diameter = SIZES[size] * math.sqrt(width * height) * (0.95 + 0.1 * rng.random())
        reach = REACH * diameter
        for _ in range(30):
            x = reach + rng.random() * (width - 2 * reach)
            y = reach + rng.random() * (height - 2 * reach)
            # they may overlap a little: corners reach further than half the diameter
            if all(math.hypot(x - other.x, y - other.y) > 0.49 * (diameter + other.diameter) for other in objects):
                objects.append(Object(shape, colour, size, filled, x, y, diameter, rotation=20 * rng.random() - 10))
                break
    return tuple(objects)


def random_scene(rng, held_out):
    """-> (a scene, no row, {colour: no shade}). held_out: a colour and shape of HELD_OUT that it shows, or None."""
    aspect = 2 ** (rng.random() + rng.random() - 1)  # width / height from 1:2 to 2:1, mostly near 1:1
    width = min(1.0, aspect)
    height = min(1.0, 1 / aspect)
    scene = Scene(width, height, background(rng), _place(rng, _looks(rng, held_out), width, height))
    return scene, None, dict.fromkeys(COLOURS)


def row_length(rng, lengths=ROWS["ordinal"]):
    """How many a row has, each in proportion to itself: then each (rank, number) is drawn equally often."""
    return pick(rng, [n for n in lengths for _ in range(n)])


def meant(scene, held_out):
    """(the objects that may be meant, None if all; the attributes that every expression names) of a split."""
    if not held_out:
        return None, 0
    return [i for i, obj in enumerate(scene.objects) if (obj.colour, obj.shape) == held_out], COLOUR | SHAPE


class Shapes:
    """A split of a drawn world; each item is an image with EXPRESSIONS_PER_SCENE expressions.

    train          endless: any index is good
    val, test      1,000 and 5,000 expressions like those of train
    testA, testB   2,000 by attributes alone, 2,000 by relations and ordinals
    compose        2,000 that mean and name a pair of colour and shape that no other split shows (HELD_OUT)
    count          2,000 ordinals among four or more that do not mean the last, so they need counting

    The wider world has these with `wide` (val: 2,000; testB: superlatives and relations), and four more:

    ordinal        2,000 from the first to the last of two to six
    negation       2,000 like "the star that is not red"
    absent         2,000 that are true of nothing in the image
    framed         2,000 like those of test, of scenes in another frame (wide_scenes.reframed)
    """

    def __init__(self, split, seed=0, weights=None, captions=True, wide=False, plain=0.0, reframe=0.0):
        """weights: how often each kind of expression is drawn, instead of the split's own. captions: whether items
        have a caption and phrases; without them they are made faster. plain: share of the wider world's scenes that are
        the narrower one's, of HARD_KINDS. reframe: share of the scenes that are seen in another frame."""
        dataset = "shapes-wide" if wide else "shapes"
        splits = DRAWN[dataset]
        if split not in splits:
            raise ValueError(f"no split {split!r} of {dataset}; there are {', '.join(splits)}")
        self.split = split
        self.seed = seed
        self.captions = captions
        self.wide = wide
        self.speaker = WideSpeaker if wide else Speaker
        self.plain = plain
        self.reframe = 1.0 if split == "framed" else reframe
        self.number = list(splits).index(split) + 100 * wide
        self.size, split_weights = splits[split]
        self.weights = weights or split_weights

    def __len__(self):
        """Number of scenes."""
        return self.size

    def _make(self, index):
        """(scene, expressions, the random generator after them)."""
        if not 0 <= index < self.size:
            raise IndexError(f"index {index} is not in 0..{self.size - 1}")
        rng = np.random.default_rng([self.seed, self.number, index])
        plan = self._plan(rng) if self.wide and not (self.plain and rng.random() < self.plain) else None
        for _ in range(1000):  # until a scene yields its expressions, usually the first or second
            if made := self._attempt(rng, plan):
                return *made, rng
        raise RuntimeError("no scene yields its expressions")

    def _attempt(self, rng, plan):
        """(scene, expressions), or None."""
        held_out = pick(rng, sorted(HELD_OUT)) if self.split == "compose" else None
        if plan:
            n, most, kinds = plan
            made = row_scene(rng, n, held_out) if n else wide_scene(rng, held_out, most=most)
        else:
            weights = HARD_KINDS if self.wide else self.weights
            kinds = draw_kinds(rng, weights, EXPRESSIONS_PER_SCENE)  # one after another, as they are expressed
            made = random_scene(rng, held_out)
        if not made:
            return None
        scene, row, _ = made
        targets, must = meant(scene, held_out)
        if targets == [] or len(scene.objects) < (1 if plan else 3):
            return None
        if self.reframe and rng.random() < self.reframe:
            scene = reframed(rng, scene, row)
        speaker = self.speaker if plan else Speaker
        expressions = express(speaker(scene, rng, targets, must, row=row), kinds)
        return expressions and (scene, expressions)

    def _plan(self, rng):
        """(objects of a row, 0 without one; most objects; the kinds of the expressions) of an item of the wider world.

        Scenes are then drawn until one yields the plan, so what is hard to draw is as frequent as what is easy.
        """
        in_row = {kind: share for kind, share in self.weights.items() if kind in ROWS}
        others = {kind: share for kind, share in self.weights.items() if kind not in ROWS}
        lone = {kind: share for kind, share in others.items() if kind in ("attribute", "absent")}
        n, most, kinds = 0, MOST, others
        if rng.random() * sum(self.weights.values()) < sum(in_row.values()):
            n = row_length(rng, ROWS[next(iter(in_row))])
            kinds = {kind: share for kind, share in in_row.items() if n in ROWS[kind]}
        elif lone and rng.random() < LONE:
            most, kinds = 1, lone
        return n, most, list(draw_kinds(rng, kinds, EXPRESSIONS_PER_SCENE))

    def scene(self, index):
        """(Scene, list of Expression) of an item; depends on (seed, split, index) only."""
        return self._make(index)[:2]

    def texts(self, index):
        """The caption and the expressions of an item, without drawing its image."""
        scene, expressions, rng = self._make(index)
        return [caption(scene, rng, self.speaker.words), *(expression.text for expression in expressions)]

    def __getitem__(self, index):
        """A dictionary:

        image         PIL RGB image, long side 256
        labels        (H, W) uint8: 0 background, i + 1 where object i shows
        expressions   4 strings
        targets       4 object indices, or NOTHING
        boxes         (4, 4) float32, (xmin, ymin, xmax, ymax) in pixels, tight around the visible target, or zeros
        kinds         4 of KINDS or of the wider world's
        details       4 of Expression.detail
        caption       a string about the whole image; this and what follows only if asked for
        phrases       one for each object: a string, "a red star", true of it and perhaps of others
        """
        scene, expressions, rng = self._make(index)
        image, labels = draw(scene)
        targets = [expression.target for expression in expressions]
        item = {
            "image": image,
            "labels": labels,
            "expressions": [expression.text for expression in expressions],
            "targets": targets,
            "boxes": boxes_of(labels, targets),
            "kinds": [expression.kind for expression in expressions],
            "details": [expression.detail for expression in expressions],
        }
        if self.captions:
            item["caption"] = caption(scene, rng, self.speaker.words)
            item["phrases"] = object_phrases(scene, rng, self.speaker.words)[0]
        return item
