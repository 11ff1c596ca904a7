"""The notebooks run as they stand, and what is kept in them is what they print."""

import ast
import base64
import io
import json
import re
import sys

import pytest
import torch
from makers import ROOT
from PIL import Image

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"[-+]?\d[\d,.]*(e[-+]?\d+)?%?")
MACHINE_PATH = re.compile(r"(?<![\w.:])(/(home|root|Users|tmp|usr|opt|var|mnt|work|content)\b|[A-Za-z]:\\)")
AGAIN = "open it in Jupyter, restart the kernel and run all cells"
SHORTER = {"STEPS, BATCH = 150, 16": "STEPS, BATCH = 30, 16",  # here, where only words are compared, not numbers
           "wide=True)[i] for i in range(60)]": "wide=True)[i] for i in range(20)]"}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def code_cells(path):
    return [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def without_numbers(text):
    """The words of a text alone, as another machine may round its numbers otherwise."""
    return " ".join(NUMBER.sub("#", text).split())


def run(source, namespace, where):
    """Run a cell -> the value of its last line, which Jupyter would show, or None."""
    tree = ast.parse(source, where)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, where, "exec"), namespace)
    return eval(compile(last, where, "eval"), namespace) if last else None


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 5


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_its_outputs_are_kept(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    namespace = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        for number, cell in enumerate(code_cells(path), start=1):
            where = f"{path.name}, code cell {number}"
            source = "".join(cell["source"])
            for longer, shorter in SHORTER.items():
                source = source.replace(longer, shorter)
            shown = run(source, namespace, where)
            printed = capsys.readouterr().out
            kept = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
            results = [output for output in cell["outputs"] if output["output_type"] == "execute_result"]
            assert without_numbers(kept) == without_numbers(printed), f"{where} prints something else now; {AGAIN}"
            assert len(results) == (shown is not None), f"{where} shows something else now; {AGAIN}"


def strings(value):
    """All strings in what JSON can hold."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in strings(part)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_of_one_clean_run_easy_to_follow_small_and_of_no_machine(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), f"{path.name}: {AGAIN}"
    for cell in cells:
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "execute_result") and output.get("name") != "stderr"
    first = next(cell["outputs"] for cell in cells if cell["outputs"])
    assert any("image/png" in output.get("data", ()) for output in first), f"{path.name} does not open with a picture"
    assert len(cells[0]["source"]) <= 8 and max(len(cell["source"]) for cell in cells) <= 25
    notebook = read(path)
    end = "".join(notebook["cells"][-1]["source"])
    assert "## Exercises" in end and "**What next:**" in end
    assert path.stat().st_size < 400 * 1024 and notebook["metadata"]["kernelspec"]["name"] == "python3"
    images = [output["data"].pop("image/png") for cell in notebook["cells"] for output in cell.get("outputs", ())
                if "image/png" in output.get("data", ())]
    for image in images:
        assert Image.open(io.BytesIO(base64.b64decode("".join(image)))).width <= 1500
    for text in strings(notebook):
        assert not MACHINE_PATH.search(text), f"{path.name} holds a path of one machine: {text}"
