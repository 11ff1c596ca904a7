"""A small model, its weights file and an image, which the tests of prediction share; no test changes them."""

import pytest
import torch
from makers import make_hivg
from makers_use import make_image

from hivg import Grounder, weights


@pytest.fixture(scope="module")
def model():
    return make_hivg(dtype=torch.float32, stage=1)


@pytest.fixture(scope="module")
def grounder(model):
    return Grounder(model, "cpu", "float32")


@pytest.fixture(scope="module")
def weights_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    weights.save(path, model)
    return path


@pytest.fixture(scope="module")
def image():
    return make_image()
