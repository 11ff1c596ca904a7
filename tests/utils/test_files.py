"""Files are written whole or not at all; a full disk gets one line."""

import errno
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from makers import make_hivg
from PIL import Image

from hivg import weights
from hivg.utils.files import remove_parts, save_image, write_whole

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


def test_the_temporary_name_is_nobody_elses(tmp_path):
    """A file X.part of the user stays, a link too and what it leads to; so does what the target links to."""
    users = {"x.part": "mine", "other": "theirs", "old": "linked"}
    for name, content in users.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "y.part").symlink_to("other")
    (tmp_path / "y").symlink_to("old")
    for name in ("x", "y"):
        write_whole(tmp_path / name, lambda part: part.write_text("new"))
        assert (tmp_path / name).read_text() == "new" and not (tmp_path / name).is_symlink()
    assert {name: (tmp_path / name).read_text() for name in users} == users
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old", "other", "x", "x.part", "y", "y.part"]


def test_of_several_writers_one_leaves_its_whole_file(tmp_path):
    path = tmp_path / "x"

    def write(number):
        def slowly(part):
            with open(part, "w") as file:
                for _ in range(50):
                    file.write(str(number) * 100)
                    file.flush()
        write_whole(path, slowly)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(8)))
    assert len(path.read_text()) == 5000 and len(set(path.read_text())) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_may_be_read_by_whom_the_user_lets(tmp_path):
    """As one that is simply opened: not by its owner alone, as temporary files often."""
    write_whole(tmp_path / "x", lambda part: part.write_text("new"))
    (tmp_path / "y").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "y").stat().st_mode


def test_what_killed_programs_have_left_is_removed(tmp_path):
    def killed(part):
        shutil.copy(__file__, tmp_path / "state.pt.part")  # the user's
        os._exit(1)

    child = os.fork()
    if not child:
        write_whole(tmp_path / "state.pt", killed)
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 2
    remove_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt.part"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_whatever_happens(tmp_path, error):
    def write(part):
        part.write_text("half")
        raise error

    with pytest.raises(error):
        write_whole(tmp_path / "x", write)
    assert not list(tmp_path.iterdir())


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
