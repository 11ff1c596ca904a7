"""pip install: the package is complete, and grounds with its own weights in an otherwise empty folder."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from makers import ROOT, python

from hivg import weights

SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
LEFT_OUT = {"hivg.ablate"}  # needs train.py
BUNDLED = ["README.md", "clip-tiny.safetensors", "example.png", "hivg-tiny.safetensors"]


def can_build():
    """Whether wheels can be built offline: setuptools needs no `wheel` package from 70.1 on."""
    are_there = importlib.util.find_spec("pip") and importlib.util.find_spec("setuptools")
    return are_there and tuple(map(int, version("setuptools").split(".")[:2])) >= (70, 1)


def test_every_package_is_named():
    packages = {"hivg"}
    for init in (ROOT / "hivg").glob("*/**/__init__.py"):
        packages.add(".".join(init.parent.relative_to(ROOT).parts))
    assert set(SETTINGS["packages"]) == packages - LEFT_OUT | {"hivg.bundled"}


def test_bundled_files_are_there():
    assert all(weights.bundled(name).is_file() for name in BUNDLED)
    assert weights.FOLDER == ROOT / "weights"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with nothing but the package, installed from a wheel."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    shutil.copytree(ROOT / "hivg", source / "hivg", ignore=shutil.ignore_patterns("__pycache__"))
    (source / "weights").mkdir()
    (source / "weights/ViT-B-16.pt").touch()  # a download, which stays where it is
    for name in BUNDLED:
        shutil.copy(ROOT / "weights" / name, source / "weights")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source], check=True)
    wheel, = folder.glob("hivg-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


@pytest.mark.slow
@pytest.mark.skipif(not can_build(), reason="no setuptools of 70.1 or later here")
def test_installed_command(site, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(site)}
    assert sorted(path.name for path in (site / "hivg/bundled").iterdir() if path.is_file()) == BUNDLED
    command = [site / "bin/hivg-ground", "--dtype", "float32", "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "hivg/bundled/example.png" in done.stdout.replace(os.sep, "/")
    assert "star left of the blue square: box" in done.stdout
    assert [path.name for path in Path().iterdir()] == ["grounded.png"]
    clone = python(ROOT / "ground.py", *command[1:], cwd=".")
    assert done.stdout.splitlines()[1:] == clone.stdout.splitlines()[1:]
    code = "import hivg.weights as w; from hivg.weights import __main__ as m; print(w.__file__, w.FOLDER)"
    where = python("-c", code, cwd=".", env=environment)
    assert where.stdout.split() == [str(site / "hivg/weights/__init__.py"), "weights"]
