"""What may import what: imports run downwards from room to room, and the only packages are those that are installed."""

import ast
import sys

import pytest
from makers import ROOT

ROOMS = [  # a file or folder of hivg/, each above all that it may import
    "utils", "boxes", "tokenizer", "data",  # no model
    "evaluate/metrics", "evaluate/calibration", "evaluate/compare", "evaluate/known",
    "clip", "lora", "fusion_triton", "fusion", "bridge", "fast", "model", "losses",  # the paper
    "weights", "grounder", "evaluate", "training", "page",
    "__main__", "bench", "ablate",
]
PACKAGES = {"torch", "numpy", "PIL", "safetensors", "ftfy", "regex", "triton"}
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "hivg").rglob("*.py"))


def imports_of(path):
    """The names of the modules that a file imports, at any place in it."""
    names = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "hivg":
            names += [f"hivg.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module)
    return names


def room_of(parts):
    """parts: of a path or of a module's name, from "hivg" on."""
    names = [part.removesuffix(".py") for part in parts[1:]]
    inner = "/".join(names[:2])
    return ROOMS.index(inner if inner in ROOMS else names[0])


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[1] != "__init__.py"], ids=str)
def test_imports_run_downwards(path):
    room = room_of(path.parts)
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "hivg":
            assert room_of(parts) <= room, f"{path} imports {name}"
        elif parts[0] == "train":
            assert path.parts[1] == "ablate", f"{path} imports train.py"
        else:
            assert parts[0] in PACKAGES | sys.stdlib_module_names, f"{path} imports {name}"


def test_the_files_are_found():
    assert len(FILES) > 40 and "hivg.boxes" in imports_of("hivg/losses.py")
