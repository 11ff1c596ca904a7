"""Files are there whole or not at all; a disk that is full gets one line."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from makers import make_hivg

from hivg import weights
from hivg.utils.files import write_whole

WRITTEN = r"x.pt: cannot be written \(.*(No space left on device|file write failed)\); buy a disk"


def fill_disk(path, data):
    with open(path, "wb") as file:
        file.write(data[:10])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_disk_as_torch_does(path):
    path.write_bytes(b"half")
    raise RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed\n more")


@pytest.mark.parametrize("write", [lambda part: fill_disk(part, bytes(100)), fill_disk_as_torch_does])
def test_a_full_disk_leaves_the_old_file_alone(tmp_path, write):
    path = tmp_path / "x.pt"
    path.write_text("old")
    with pytest.raises(OSError, match=WRITTEN) as caught:
        write_whole(path, write, advice="buy a disk")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"] and path.read_text() == "old"


def test_folders_are_made_and_nothing_else_is_left(tmp_path):
    write_whole(tmp_path / "a" / "b.pt", lambda part: part.write_text("new"))
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.pt"]


@pytest.mark.parametrize("path, reason", [("file/x.pt", "File exists|Not a directory"), ("folder", "Is a directory"),
                                          ("x" * 300, "File name too long")])
def test_places_that_hold_no_file(tmp_path, monkeypatch, path, reason):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    with pytest.raises(OSError, match=f"cannot be written .*({reason}).*write elsewhere") as caught:
        write_whole(Path(path), lambda part: part.write_text("new"))
    assert len(str(caught.value)) < 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_weights_on_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "hivg.safetensors"
    model = make_hivg(dtype=torch.float32)
    weights.save(path, model)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with pytest.raises(OSError, match=re.escape(f"{path}: cannot be written (No space left on device); make room")):
        weights.save(path, model)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before
