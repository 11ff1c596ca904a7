"""What a model was never taught: words, and photographs where it has seen drawn shapes only.

Both are reported only for weights of the drawn world (`dataset` in the file), which many people try first, on anything.
"""

from difflib import get_close_matches

import numpy as np
from PIL import Image

from hivg.data.drawn.scenes import DRAWN
from hivg.tokenizer import split_words

DRAWN_ONLY = "these weights know drawn shapes, no photographs"
PUBLISHED = 49408  # tokens of the published CLIPs
INITIAL_NORM = 0.02  # of a token's embedding, times the root of its width: where training starts (clip.py)
TRAINED = 1.165  # times as long: 99 in 100 untaught tokens of the tiny CLIP are shorter, all taught ones longer
SIDE = 64  # pixels of the image that is measured


def knows_drawn_only(model):
    """Whether a model of a weights file was trained on the drawn world alone. A published CLIP, which has the large
    vocabulary, never was."""
    return getattr(model, "info", {}).get("dataset") in DRAWN and model.config.clip.vocab_size < PUBLISHED


def trained_tokens(model):
    """(V,) bool: whether the embedding of each token is longer than training began with."""
    embedding = model.clip.text.token_embedding.weight.float()  # (V, D)
    return embedding.norm(dim=1) >= TRAINED * INITIAL_NORM * embedding.shape[1] ** 0.5


def unknown_words(model, text):
    """The words of a text that have a token which was never trained, a list. Empty for weights that know more than the
    drawn world: CLIP's own tokens start and end with other norms."""
    if not knows_drawn_only(model):
        return []
    trained = trained_tokens(model)
    return [word for word in dict.fromkeys(split_words(text))
            if word[-1].isalnum() and not trained[model.tokenizer.encode(word)].all()]


def known_words(model):
    """The trained words that are one token, a list."""
    trained = zip(model.tokenizer.symbols, trained_tokens(model).tolist())
    return [symbol.removesuffix("</w>") for symbol, is_trained in trained if is_trained and symbol.endswith("</w>")]


def similar_word(word, known):
    """The known word that is spelled most like this one, from the same first letter on; "" if none is close."""
    return next(iter(get_close_matches(word, [other for other in known if other[0] == word[0]], 1, 0.75)), "")


def looks_photographed(image):
    """Whether a PIL image is more likely a photograph than a drawing: its colours are many, or change everywhere.

    Of 22 colour photographs it found 19, of seven grey ones two; it took none of 3,000 drawn images for one.
    """
    image = image if image.mode == "RGB" else image.convert("RGB")
    image = image.reduce(max(1, max(image.size) // 256))  # of a large one thumbnail alone would take long
    image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    pixels = np.asarray(image, dtype=np.int16)  # (H, W, 3)
    colours = pixels // 32 @ (64, 8, 1)  # (H, W): one of 512
    counts = np.sort(np.bincount(colours.ravel()))
    other = counts[:-12].sum() / counts.sum()  # of the pixels that have none of the twelve commonest colours
    steps = np.concatenate([np.abs(np.diff(pixels, axis=axis)).max(2).ravel() for axis in (0, 1)])
    changing = np.mean((steps >= 12) & (steps <= 60)) if steps.size else 0  # neither flat nor an edge
    return bool(other > 0.1 or changing > 0.4)
