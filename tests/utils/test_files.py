"""Files are written whole or not at all; a full disk gets one line."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from makers import make_hivg
from PIL import Image

from hivg import weights
from hivg.utils.files import save_image, write_whole

WRITTEN = r"x.pt: cannot be written \(.*(No space left on device|the disk may be full)\); buy a disk"


def fill_disk(path, data):
    with open(path, "wb") as file:
        file.write(data[:10])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fails_as_torch_does(message):
    def write(path):
        path.write_bytes(b"half")
        raise RuntimeError(message)

    return write


@pytest.mark.parametrize("write", [
    lambda part: fill_disk(part, bytes(100)),
    fails_as_torch_does("PytorchStreamWriter failed writing file data/1: file write failed\n more"),
    fails_as_torch_does("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    fails_as_torch_does("basic_ios::clear: iostream error"),
])
def test_a_full_disk_leaves_the_old_file_alone(tmp_path, write):
    path = tmp_path / "x.pt"
    path.write_text("old")
    with pytest.raises(OSError, match=WRITTEN) as caught:
        write_whole(path, write, advice="buy a disk")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"] and path.read_text() == "old"


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """Else a power cut may keep the name alone."""
    calls = []
    for name in ("fsync", "replace"):
        function = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, f=function, name=name: calls.append(name) or f(*args))
    write_whole(tmp_path / "a", lambda part: part.write_text("new"))
    assert calls == ["fsync", "replace"]


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


def test_errors_that_are_not_the_disks_are_told(tmp_path):
    with pytest.raises(OSError, match=r"x.pt: cannot be written \(CUDA error: unspecified\)"):
        write_whole(tmp_path / "x.pt", fails_as_torch_does("CUDA error: unspecified"))


def test_an_image_in_the_format_of_its_suffix(tmp_path):
    for suffix, kind in ((".png", "PNG"), (".JPG", "JPEG"), (".gif", "GIF")):
        save_image(Image.new("RGB", (4, 3)), tmp_path / f"a{suffix}")
        assert Image.open(tmp_path / f"a{suffix}").format == kind
    before = sorted(tmp_path.iterdir())
    for name in ("a", "a.xyz", "a.psd"):  # Pillow reads the last format, but does not write it
        with pytest.raises(ValueError, match=f"{name}: its suffix is not that of an image .* end the name in .png"):
            save_image(Image.new("RGB", (4, 3)), tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


def test_weights_on_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "hivg.safetensors"
    model = make_hivg(dtype=torch.float32)
    weights.save(path, model)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "write_bytes", fill_disk)
    with pytest.raises(OSError, match=re.escape(f"{path}: cannot be written (No space left on device); make room")):
        weights.save(path, model)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and path.read_bytes() == before
