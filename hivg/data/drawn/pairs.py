"""The images and texts of the tiny CLIP's pre-training: pairs of scenes with phrases and expressions, no boxes.

In most images no two objects have the same colour, in the others no two have the same shape. Every object has a phrase,
"a red star". Some have expressions that do not name the look that is theirs alone: "the second star from the left", in
the language that HiVG is trained on, or by place, "the star at the top left".

Images come in pairs, twins: in the twin every object has another shape (or another colour), and all else is the same.
The same expressions hold there, with the other words.
"""

from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset

from hivg.data.batches import collate
from hivg.data.drawn.drawing import COLOURS, HELD_OUT, LONG, SHAPES, SIZES, draw
from hivg.data.drawn.expressions import Expression, Speaker, draw_kinds, express, the
from hivg.data.drawn.phrases import ALL, COLOUR, FILL, SHAPE, SIZE, caption, noun_phrase, object_phrases, pick, place
from hivg.data.drawn.scenes import MAX_OBJECTS, ROWS, random_scene, row_length
from hivg.data.drawn.wide_expressions import WIDE_SHAPES, WideSpeaker
from hivg.data.drawn.wide_scenes import reframed, row_scene, wide_scene
from hivg.data.transforms import Letterbox

MIX = {"attribute": 0.1, "superlative": 0.2, "ordinal": 0.3, "relation": 0.28, "conjunction": 0.12}
WIDE_MIX = {"attribute": 0.1, "superlative": 0.3, "relation": 0.32, "conjunction": 0.12, "negation": 0.16}
ROWS_SHARE = 0.5  # of the scenes, of which few have the objects that they need
ROW_MIX = {"ordinal": 0.8, "superlative": 0.1, "relation": 0.1}  # where there is a row
# With `hard_mix`, more of what is learned last: rows, most of them of four or more, and their later ranks
HARD_ROWS_SHARE = 0.6
LATE_SHARE = 0.7  # of these rows
LATE_MIX = {"late": 0.6, "ordinal": 0.2, "superlative": 0.1, "relation": 0.1}
SPOKEN = 5  # most expressions of an image, of the kinds of MIX
PLACES_NAMED = 2  # most expressions by place alone
MAX_EXPRESSIONS = SPOKEN + PLACES_NAMED
CAPTION_OBJECTS = 3  # most objects that a caption names
UNIQUE_SHAPES = 0.3  # share of the pairs in which an object's own look is its shape, not its colour
STREAM = 1000  # of random numbers; the splits use those from 0 on (scenes.SPLITS)
NO_PHRASE = -2  # fills `named` where an image has fewer objects than MAX_OBJECTS
NO_OBJECT = -3  # fills `attributes` there
NO_TARGET = -1  # fills `targets` where an image has fewer expressions than MAX_EXPRESSIONS


def attribute_ids(obj, attributes=ALL):
    """[shape, colour, fill, size] as numbers, -1 for those that are not in `attributes`."""
    return [
        WIDE_SHAPES.index(obj.shape) if attributes & SHAPE else -1,
        list(COLOURS).index(obj.colour) if attributes & COLOUR else -1,
        int(obj.filled) if attributes & FILL else -1,
        list(SIZES).index(obj.size) if attributes & SIZE else -1,
    ]


class Pairs(Dataset):
    """Endless pairs of images with their texts, as tensors and lists. Item i depends on (seed, i) only."""

    rows = 2  # images of an item
    texts = {"caption_ids": "captions", "phrase_ids": "phrases", "token_ids": "expressions"}  # what is tokenised
    normalization = "clip"

    def __init__(self, size, seed=0, wide=False, reframe=0.0, hard_mix=False):
        """size: side of the square in pixels. reframe: share of the scenes that are seen in another frame. hard_mix:
        whether more scenes of the wider world have rows, most of four or more things, and more expressions tell their
        later ranks by number."""
        self.size = size
        self.reframe = reframe
        self.hard_mix = hard_mix
        self.wide = wide
        self.words = (WideSpeaker if wide else Speaker).words
        self.seed = seed

    def __len__(self):
        return 2**40

    def __getitem__(self, index):
        """A dictionary of tensors and lists about two images of S x S pixels."""
        rng = np.random.default_rng([self.seed, STREAM + self.wide, index])
        scenes, expressions = draw_pair(rng, self.wide, self.reframe, self.hard_mix)
        few = rng.permutation(len(scenes[0].objects))[:CAPTION_OBJECTS]
        return collate([self.image_item(rng, *both, few) for both in zip(scenes, expressions)])

    def image_item(self, rng, scene, expressions, few):
        """The part of an item that is about one image. few: the numbers of the objects that the caption names."""
        image, _ = draw(scene)
        letterbox = Letterbox(*image.size, self.size)
        text = caption(replace(scene, objects=tuple(scene.objects[i] for i in few)), rng, self.words)
        phrases, named = object_phrases(scene, rng, self.words)
        named = [attribute_ids(obj, attributes) for obj, attributes in zip(scene.objects, named)]
        attributes = [attribute_ids(obj) for obj in scene.objects]
        targets = [expression.target for expression in expressions]
        absent = MAX_OBJECTS - len(scene.objects)
        return {
            "pixels": letterbox.pixels(image)[None],  # (1, 3, S, S) uint8
            "padding_mask": letterbox.padding_mask()[None],  # (1, S, S) bool
            "captions": [text],
            "phrases": phrases + [""] * absent,  # 8 strings
            "named": torch.tensor([named + [[NO_PHRASE] * 4] * absent]),  # (1, 8, 4), -1: not named
            "attributes": torch.tensor([attributes + [[NO_OBJECT] * 4] * absent]),  # (1, 8, 4)
            "expressions": [expression.text for expression in expressions],
            "kinds": [expression.kind for expression in expressions],
            # (1, MAX_EXPRESSIONS), the object that each expression means
            "targets": torch.tensor([targets + [NO_TARGET] * (MAX_EXPRESSIONS - len(targets))]),
        }


def draw_pair(rng, wide, reframe=0.0, hard_mix=False):
    """-> (a scene, its twin), (the scene's expressions, the twin's)."""
    own, shared = COLOUR, SHAPE  # the look that is an object's own, and the one in which the twins differ
    if rng.random() < UNIQUE_SHAPES:
        own, shared = shared, own
    n = row_length(rng) if wide and rng.random() < (HARD_ROWS_SHARE if hard_mix else ROWS_SHARE) else 0
    is_late = hard_mix and n and rng.random() < LATE_SHARE
    if is_late:
        n = row_length(rng, ROWS["late"])
    mix = MIX if not wide else LATE_MIX if is_late else ROW_MIX if n else WIDE_MIX
    while True:  # until a scene yields expressions
        made = new_scene(rng, own, shared, wide, n)
        if not made:
            continue
        scene, row, shades = made
        if reframe and rng.random() < reframe:
            scene = reframed(rng, scene, row)
        twins = make_twins(rng, scene, shades, own)
        if not twins:
            continue
        seed = int(rng.random() * 2**53)
        said, twin_said = (speak(np.random.default_rng(seed), scene, own, shared, row, wide, mix) for scene in twins)
        if said and [e.target for e in said] == [e.target for e in twin_said]:
            return twins, (said, twin_said)


def new_scene(rng, own, shared, wide, n):
    """-> (scene, row or None, {colour: RGB, or None}) of at most MAX_OBJECTS objects, or None if that failed. n: how
    many a row has, 0 for a scene without one."""
    if not wide:
        return random_scene(rng, None)
    shapes = SHAPES if own == SHAPE else WIDE_SHAPES
    made = row_scene(rng, n, attributes=shared, shapes=shapes) if n else wide_scene(rng, shapes=shapes)
    if not made:
        return None
    scene, row, shades = made
    most = len(shades) if own == COLOUR else MAX_OBJECTS
    if not 1 < len(scene.objects) <= most or row and any(scene.objects[i].shape in LONG for i in row.members):
        return None
    return made


def make_twins(rng, scene, shades, own):
    """-> the scene with a different own look for each object, and its twin. None if every such pair shows a held-out
    colour and shape, for instance if eight objects have one shape."""
    looks = {COLOUR: tuple(shades), SHAPE: SHAPES}
    shared = (COLOUR | SHAPE) ^ own
    for _ in range(1000):  # until no pair of colour and shape is held out
        order = rng.permutation(len(looks[own]))
        unique = [with_look(obj, own, looks[own][i], shades) for obj, i in zip(scene.objects, order)]
        order = rng.permutation(len(looks[shared]))
        after = {looks[shared][i]: looks[shared][j] for i, j in zip(order, np.roll(order, 1))}  # none stays the same
        after |= {"bar": "ellipse", "ellipse": "bar"}
        changed = [with_look(obj, shared, after[obj.shape if shared == SHAPE else obj.colour], shades)
                   for obj in unique]
        if not any((obj.colour, obj.shape) in HELD_OUT for obj in unique + changed):
            return replace(scene, objects=tuple(unique)), replace(scene, objects=tuple(changed))
    return None


def with_look(obj, attribute, value, shades):
    """The object in another colour or shape."""
    if attribute == COLOUR:
        return replace(obj, colour=value, rgb=shades[value])
    upright = (obj.rotation + 10) % 90 - 10 if obj.shape == "arrow" else obj.rotation  # arrows point to all sides
    return replace(obj, shape=value, rotation=upright)


def speak(rng, scene, own, shared, row, wide, mix):
    """Expressions that do not name an object's own look; an empty list if the scene has none. With the same random
    numbers, they are those of its twin in the twin's words."""
    groups = {}
    for i, obj in enumerate(scene.objects):
        groups.setdefault(obj.shape if shared == SHAPE else obj.colour, []).append(i)
    groups = [members for members in groups.values() if len(members) > 1]
    if not groups:
        return []
    speaker = (WideSpeaker if wide else Speaker)(scene, rng, sum(groups, []), never=own, row=row)
    said = express(speaker, draw_kinds(rng, mix, SPOKEN), attempts=12)
    if not said:
        return []
    for _ in range(PLACES_NAMED):
        members = pick(rng, groups)
        of_all = rng.random() < 0.4  # "the shape at the top", among all objects
        if of_all:
            members = range(len(scene.objects))
        places = [place(scene, scene.objects[i]) for i in members]
        alone = [i for i, where in zip(members, places)
                 if places.count(where) == 1 and not (row and where == "in the middle")]  # or of the row?
        if alone:
            target = pick(rng, alone)
            noun = noun_phrase(rng, scene.objects[target], 0 if of_all else shared, words=speaker.words, anchor=True)
            said.append(Expression(the(rng, f"{noun} {place(scene, scene.objects[target])}"), target, "place"))
    return said
