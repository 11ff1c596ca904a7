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
from hivg.data.drawn.drawing import COLOURS, SHAPES, draw
from hivg.data.drawn.expressions import Expression, express, the
from hivg.data.drawn.phrases import (
    ANY_WORDS,
    COLOUR_WORDS,
    FILL_WORDS,
    SIZE_WORDS,
    caption,
    object_phrases,
    pick,
    place,
)
from hivg.data.drawn.scenes import HELD_OUT, MAX_OBJECTS, attribute_ids, random_scene
from hivg.data.transforms import Letterbox

MIX = {"attribute": 0.1, "superlative": 0.2, "ordinal": 0.3, "relation": 0.28, "conjunction": 0.12}
SPOKEN = 5  # most expressions of an image, of the kinds of MIX
PLACES_NAMED = 2  # most expressions by place alone
MAX_EXPRESSIONS = SPOKEN + PLACES_NAMED
CAPTION_OBJECTS = 3  # most objects that a caption names
UNIQUE_SHAPES = 0.3  # share of the pairs in which an object's own look is its shape, not its colour
STREAM = 1000  # of random numbers; the splits use those from 0 on (scenes.SPLITS)
NO_PHRASE = -2  # fills `named` where an image has fewer objects than MAX_OBJECTS
NO_OBJECT = -3  # fills `attributes` there
NO_TARGET = -1  # fills `targets` where an image has fewer expressions than MAX_EXPRESSIONS

ADJECTIVES = set(COLOURS)
for _words in (*SIZE_WORDS.values(), *FILL_WORDS.values(), *COLOUR_WORDS.values()):
    ADJECTIVES.update(_words)


class Pairs(Dataset):
    """Endless pairs of images with their texts, as tensors and lists. Item i depends on (seed, i) only."""

    rows = 2  # images of an item
    texts = {"caption_ids": "captions", "phrase_ids": "phrases", "token_ids": "expressions"}  # what is tokenised
    normalization = "clip"

    def __init__(self, size, seed=0):
        self.size = size
        self.seed = seed

    def __len__(self):
        return 2**40

    def __getitem__(self, index):
        """A dictionary of tensors and lists about two images of S x S pixels."""
        rng = np.random.default_rng([self.seed, STREAM, index])
        scenes, expressions = draw_pair(rng)
        few = rng.permutation(len(scenes[0].objects))[:CAPTION_OBJECTS]
        return collate([self.image_item(rng, *both, few) for both in zip(scenes, expressions)])

    def image_item(self, rng, scene, expressions, few):
        """The part of an item that is about one image. few: the numbers of the objects that the caption names."""
        image, _ = draw(scene)
        letterbox = Letterbox(*image.size, self.size)
        text = caption(replace(scene, objects=tuple(scene.objects[i] for i in few)), rng)
        phrases, named = object_phrases(scene, rng)
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


def draw_pair(rng):
    """-> (a scene, its twin), (the scene's expressions, the twin's)."""
    own, shared = "colour", "shape"  # the look that is an object's own, and the one in which the twins differ
    if rng.random() < UNIQUE_SHAPES:
        own, shared = shared, own
    while True:  # until a scene yields expressions: about one in eight does
        twins = make_twins(rng, random_scene(rng, None), own, shared)
        if twins is None:
            continue
        scene, twin, after = twins
        said = speak(rng, scene, own, shared)
        twin_said = []
        for expression in said:
            words = [after.get(word, word) for word in expression.text.split()]
            twin_said.append(replace(expression, text=" ".join(words)))
        if said:
            return (scene, twin), (said, twin_said)


def make_twins(rng, scene, own, shared):
    """-> the scene with a different own look for each object, its twin, and {word: the twin's word}. None if every such
    pair shows a held-out colour and shape, for instance if eight objects have one shape."""
    looks = {"colour": tuple(COLOURS), "shape": SHAPES}
    for _ in range(1000):  # until no pair of colour and shape is held out
        order = rng.permutation(MAX_OBJECTS)  # there are as many colours and shapes as there can be objects
        unique = [replace(obj, **{own: looks[own][i]}) for obj, i in zip(scene.objects, order)]
        order = rng.permutation(MAX_OBJECTS)
        after = {looks[shared][i]: looks[shared][j] for i, j in zip(order, np.roll(order, 1))}  # none stays the same
        changed = [replace(obj, **{shared: after[getattr(obj, shared)]}) for obj in unique]
        if any((obj.colour, obj.shape) in HELD_OUT for obj in unique + changed):
            continue
        if shared == "colour":
            after["violet"] = after["purple"]
        return replace(scene, objects=tuple(unique)), replace(scene, objects=tuple(changed)), after
    return None


def speak(rng, scene, own, shared):
    """Expressions that do not name an object's own look; an empty list if the scene has none."""
    groups = {}
    for i, obj in enumerate(scene.objects):
        groups.setdefault(getattr(obj, shared), []).append(i)
    groups = [members for members in groups.values() if len(members) > 1]
    if not groups:
        return []
    objects = list(scene.objects)
    for number, members in enumerate(groups):
        for i in members:  # to the speaker all of a group have the same, nameless look
            objects[i] = replace(objects[i], **{own: f"@{number}"})
    targets = sum(groups, [])
    said = []
    nameless = replace(scene, objects=tuple(objects))
    for expression in express(nameless, rng, MIX, SPOKEN, targets, attempts=12) or ():
        text = without_nameless(rng, expression.text, own)
        if text:
            said.append(replace(expression, text=text))
    if not said:
        return []
    for _ in range(PLACES_NAMED):
        members = pick(rng, groups)
        noun = pick(rng, ANY_WORDS[:3])
        of_all = rng.random() < 0.4  # "the shape at the top", among all objects
        if of_all:
            members = range(len(objects))
        places = [place(scene, objects[i]) for i in members]
        alone = [i for i, where in zip(members, places) if places.count(where) == 1]
        if alone:
            obj = scene.objects[target := pick(rng, alone)]
            if not of_all:
                noun = obj.shape if shared == "shape" else f"{obj.colour} {noun}"
            said.append(Expression(the(rng, f"{noun} {place(scene, obj)}"), target, "place"))
    return said


def without_nameless(rng, text, own):
    """The text without the nameless looks ("@0"); empty if that would change its meaning."""
    words = text.split()
    for at, word in enumerate(words):
        if not word.startswith("@"):
            continue
        if own == "colour":  # "second @0 large star": the noun must name the group's shape
            noun = next((w for w in words[at + 1:] if w not in ADJECTIVES), "")
            if noun not in SHAPES:
                return ""
        else:  # "second large red @0": the adjectives must name the group's colour
            first = at
            while first and words[first - 1] in ADJECTIVES:
                first -= 1
            if not any(w in COLOURS or w == "violet" for w in words[first:at]):
                return ""
            words[at] = pick(rng, ANY_WORDS[:3])  # "second large red thing"
    return " ".join(word for word in words if not word.startswith("@"))
