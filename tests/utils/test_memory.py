"""Where memory runs out, one line says so and what to lower; no file is called damaged for it."""

import sys

import numpy as np
import pytest
import torch
from makers import ended, python, raising
from makers_limits import LIMIT
from makers_weights import save_legacy
from PIL import Image
from safetensors.torch import save_file

from hivg.training.checkpoint import load_state
from hivg.utils.cli import run
from hivg.utils.files import write_whole

WORKS = {
    "torch": lambda: torch.empty(2**50, dtype=torch.uint8), "numpy": lambda: np.empty(2**50, dtype=np.uint8),
    "pillow": lambda: Image.new("RGB", (2**30, 2**20)), "python": lambda: bytearray(2**60),
    "the system": raising(OSError(12, "Cannot allocate memory")),
    "a worker": raising(MemoryError("Caught MemoryError in DataLoader worker process 0.\nTraceback..")),
    "GPU": raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nIt has 9 MiB free.")),
    "GPU, a library": raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")),
}


@pytest.mark.parametrize("name", WORKS)
def test_a_command_says_what_to_lower(capfd, name):
    place = " on the GPU" if "GPU" in name else ""
    result = ended(capfd, run, WORKS[name], lower="lower --batch_size")
    assert result == (2, "", f"error: not enough memory{place}; lower --batch_size\n")


def write_large(folder):
    """-> files that are fine, and take 80 MB or more to read."""
    Image.new("L", (10_000, 10_000)).save(folder / "large.png")
    tensors = {"visual.conv1.weight": torch.zeros(64, 3, 8, 8), "large": torch.zeros(20 * 2**20)}
    torch.save(tensors, folder / "clip.pt")
    save_legacy(tensors, folder / "legacy.pt")
    save_file(tensors, folder / "clip.safetensors")
    return [folder / name for name in ("large.png", "clip.pt", "legacy.pt", "clip.safetensors")]


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
def test_a_good_file_that_memory_is_short_for(tmp_path):
    small = tmp_path / "small.png"
    Image.new("RGB", (9, 9)).save(small)
    code = f"""
from hivg.data.images import open_image, open_published
from hivg.weights import load
open_image({str(small)!r})
load("weights/hivg-tiny.safetensors")
limit(int(sys.argv[1]))
for path in sys.argv[2:]:
    for read in (open_image, open_published) if path.endswith("png") else [load]:
        try:
            read(path)
        except MemoryError as error:
            print(error)
"""
    paths = write_large(tmp_path)
    done = python("-c", LIMIT + code, 40, *paths)
    lines = done.stdout.splitlines()
    for path, line in zip([paths[0], *paths], lines, strict=True):
        assert line.startswith(f"{path}: not enough memory; ") and "lower" not in line and len(line) < 290, line
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory as Linux does")
def test_the_other_images_of_a_folder_are_grounded(tmp_path):
    Image.new("L", (10_000, 10_000)).save(tmp_path / "large.png")
    Image.new("RGB", (40, 30)).save(tmp_path / "small.png")
    code = f"""
from hivg.__main__ import start
from hivg.grounder import Grounder
Grounder.from_pretrained().ground({str(tmp_path / "small.png")!r}, "star")
limit(int(sys.argv[1]))
sys.argv[1:] = sys.argv[2:]
start()
"""
    done = python("-c", LIMIT + code, 200, tmp_path, "-e", "the star", "--json")
    assert done.returncode == 1 and done.stdout.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"error: {tmp_path / 'large.png'}: not enough memory; make the image smaller")


def test_nothing_else_is_blamed(tmp_path, monkeypatch):
    told = "[enforce fail at alloc_cpu.cpp:124] data. DefaultCPUAllocator: can't allocate memory: you tried to .."
    with pytest.raises(RuntimeError, match="allocate memory"):
        write_whole(tmp_path / "a", raising(RuntimeError(told)))  # not a full disk
    torch.save({"settings": {}}, tmp_path / "state.pt")
    monkeypatch.setattr(torch, "load", raising(RuntimeError(told)))
    with pytest.raises(ValueError, match="not enough memory to read it; nothing of it is lost"):  # not a damaged state
        load_state(tmp_path)
