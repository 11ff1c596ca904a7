"""Weights files in and out: this project's, OpenAI's CLIP, Hugging Face's CLIP, released HiVG checkpoints.

This project's file is one `.safetensors`: the tensors and, in its metadata, the configuration (JSON) and the
tokenizer's merge table (text), so it loads by itself. Any file is recognized by its content, not its name; nothing in
it is executed (utils/pickles.py), every tensor must be there in the right shape, and all load as float32. A state dict
may lie in a checkpoint (`model`, `state_dict`, `model_state_dict`) and be that of a model in DDP or a compiled one.

`saving.py` writes; `reading.py` reads any file, with the names translated by `clip_names.py` and `released.py`;
`loading.py` builds the model. `python -m hivg.weights` is in `__main__.py`, and `download.py` is its `fetch`.
"""

from hivg.weights.loading import build, load, load_clip, load_hivg, load_released
from hivg.weights.reading import FOLDER, KINDS, File, WeightsError, located, need_tokenizer, read
from hivg.weights.saving import bundled, save

__all__ = ["FOLDER", "KINDS", "File", "WeightsError", "build", "bundled", "load", "load_clip", "load_hivg",
           "load_released", "located", "need_tokenizer", "read", "save"]
