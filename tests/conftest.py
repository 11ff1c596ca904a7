"""Fixtures that the test files share; makers.py makes what they hold."""

import os
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: two threads only wait for each other in models this small

import numpy
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton; the kernels then run on the CPU

if find_spec("triton"):
    import triton

    is_numpy_new = numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0"
    if triton.knobs.runtime.interpret and triton.__version__.startswith("3.6.") and is_numpy_new:
        pytest.exit("Triton 3.6 runs a kernel without a GPU, as the tests do here, only with an older NumPy: "
                    "pip install 'numpy<2.4'", returncode=2)

from beside import pytest_collection_modifyitems  # noqa: F401  a hook
from makers import make_batch, make_clip, make_hivg

from hivg import weights
from hivg.data.drawn.scenes import Shapes
from hivg.tokenizer import Tokenizer, learn_merges


@pytest.fixture(scope="module")
def clip():
    return make_clip()


@pytest.fixture(scope="module")
def hivg():
    """With bridges and two stages of adapters; do not change it."""
    return make_hivg(stage=2)


@pytest.fixture(scope="module")
def batch():
    return make_batch()


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    """A file of the smallest CLIP that has bridge blocks of its own, with the words of its world."""
    shapes = Shapes("train")
    texts = [text for i in range(40) for text in shapes[i]["expressions"]]
    tokenizer = Tokenizer(learn_merges(texts, 120), context_length=24)
    clip = make_clip(dtype=torch.float32, image_size=32, vision_width=32, vision_layers=6, vision_heads=2,
                     text_width=32, text_layers=4, text_heads=2, embed_dim=32, context_length=24,
                     vocab_size=tokenizer.vocab_size)
    clip.tokenizer = tokenizer
    path = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    weights.save(path, clip)
    return path
