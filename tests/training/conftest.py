"""Runs that the tests of the training share."""

import shutil
from dataclasses import replace

import pytest
from makers_training import ON_CPU, shrink, train_until

import train
from train import Settings


@pytest.fixture
def world(tmp_path, monkeypatch):
    """An empty current folder and a small world -> the folder."""
    shrink(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny(clip_file):
    """A second: 3 steps an epoch, 8 expressions a step, 5 epochs in all."""
    return Settings(name="tiny", clip=str(clip_file), epoch_samples=24, batch_size=8, epochs=(2, 1, 1, 1),
                    warmup_steps=2, save_minutes=1000, **ON_CPU)


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
    """runs/tiny after all stages, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.chdir(folder)
        path = train.train(tiny)
    return (folder / path).parent


@pytest.fixture
def finetuning(tiny, whole):
    """The settings of a run that trains the last weights of `whole` further, for an epoch of 3 steps."""
    return replace(tiny, finetune=str(whole / "lora3.safetensors"), lora="none", epochs=(1,), lr=(1e-3,))


@pytest.fixture(scope="session")
def interrupted(tiny, tmp_path_factory):
    """A folder with runs/tiny, killed in the second epoch."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.chdir(folder)
        train_until(patch, tiny, "to_device", 5)
    return folder


@pytest.fixture
def begun(world, tiny, interrupted):
    """The settings of a run that was killed; it is in the current folder."""
    shutil.copytree(interrupted, world, dirs_exist_ok=True)
    return tiny
