"""The evaluation: every row is there and true, the comparisons are what they say, and the command line."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import BUNDLED, make_clip, make_hivg

from hivg import evaluate, weights
from hivg.data.batches import ShapesTensors, evaluation_batches
from hivg.data.expressions import KINDS
from hivg.data.shapes import SPLITS, Shapes

ROOT = Path(evaluate.__file__).parents[1]
SCENES = 6


@pytest.fixture(autouse=True)
def small_splits(monkeypatch):
    for name in ("val", "testB"):
        monkeypatch.setitem(SPLITS, name, (SCENES, SPLITS[name][1]))


@pytest.fixture(scope="module")
def model():
    return make_hivg(dtype=torch.float32, stage=1)


@pytest.fixture(scope="module")
def weights_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    weights.save(path, model)
    return path


def batches(batch_size=64, split="val"):
    return evaluation_batches(ShapesTensors(split, 64), batch_size)


def overlap(a, b):
    """IoU of two boxes, by hand."""
    width, height = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(area) - width * height)


# --- predictions ---


@pytest.mark.parametrize("split", ["val", "testB"])
def test_every_expression_has_its_row(model, split):
    rows, items = evaluate.predict(model, batches(split=split)), [Shapes(split)[i] for i in range(SCENES)]
    assert [row["expression"] for row in rows] == [text for item in items for text in item["expressions"]]
    assert [row["kind"] for row in rows] == [kind for item in items for kind in item["kinds"]]
    assert [row["image_id"] for row in rows] == [i for i in range(SCENES) for _ in range(4)]
    np.testing.assert_allclose([row["target"] for row in rows], [box for item in items for box in item["boxes"]])
    for row in rows:
        width, height = items[row["image_id"]]["image"].size
        xmin, ymin, xmax, ymax = row["box"]
        assert row.keys() == {"image", "expression", "kind", "image_id", "box", "target", "iou", "score"}
        assert 0 <= xmin <= xmax <= width and 0 <= ymin <= ymax <= height
        assert row["iou"] == pytest.approx(overlap(row["box"], row["target"]), abs=1e-5)
        assert 0 <= row["score"] <= 1
    assert any(row["iou"] > 0 for row in rows) and json.loads(json.dumps(rows)) == rows


def test_rows_do_not_depend_on_the_batches(model):
    together, apart = evaluate.predict(model, batches()), evaluate.predict(model, batches(4))
    for a, b in zip(together, apart, strict=True):
        np.testing.assert_allclose(a["box"], b["box"], atol=1e-5 * 256)
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_the_model_keeps_its_mode(model):
    assert model.config.dropout > 0
    rows = evaluate.predict(model, batches())
    assert not model.training
    model.train()
    try:
        assert evaluate.predict(model, batches()) == rows and model.training
    finally:
        model.eval()
    assert not torch.is_grad_enabled() or all(p.grad is None for p in model.parameters())


def test_progress_is_told(model):
    told = []
    evaluate.predict(model, batches(8), progress=told.append)
    assert told == [8, 16, 24]


# --- comparisons ---


@pytest.mark.parametrize("scenes", [2, 3, 7, 250])
def test_shuffled_moves_every_expression_to_another_picture(scenes):
    rows = [{"expression": f"{i} {j}", "image_id": i} for i in range(scenes) for j in range(4)]
    moved = evaluate.shuffled(rows)
    assert sorted(moved) == sorted(row["expression"] for row in rows)
    assert all(int(text.split()[0]) != row["image_id"] for text, row in zip(moved, rows, strict=True))


def test_other_expressions_on_the_same_pictures(model):
    rows = evaluate.predict(model, batches(8))
    moved = evaluate.predict(model, batches(8), expressions=evaluate.shuffled(rows))
    assert [row["expression"] for row in moved] == evaluate.shuffled(rows)
    for name in ("target", "image_id", "kind"):
        assert [row[name] for row in moved] == [row[name] for row in rows]
    assert all(a["box"] != b["box"] for a, b in zip(moved, rows) if a["expression"] != b["expression"])


def scene(size, boxes, targets):
    """An item of Shapes as far as the guessers look: rectangles, the later ones in front."""
    labels = np.zeros(size, np.uint8)
    for i, (xmin, ymin, xmax, ymax) in enumerate(boxes):
        labels[ymin:ymax, xmin:xmax] = i + 1
    return {"labels": labels, "boxes": np.array([boxes[t] for t in targets], np.float32)}


def test_guessers():
    """By hand. The largest of the first picture is object 1, meant once of two times; a random guess is right once of
    three. In the second, object 1 shows most though the outline of object 0 is larger; their boxes overlap by more
    than half, so both are right for either."""
    first = scene((20, 30), [(0, 0, 3, 3), (5, 5, 15, 15), (20, 5, 25, 10)], [1, 2])
    second = scene((20, 30), [(0, 0, 10, 10), (1, 1, 10, 10)], [0, 1])
    assert np.bincount(second["labels"].ravel())[1:].tolist() == [19, 81]
    guessed = evaluate.guessers([first, second])
    assert guessed == {"largest object": pytest.approx(3 / 4), "random object": pytest.approx((1 / 3 + 1 / 3 + 2) / 4)}


def test_guessers_on_the_data(monkeypatch):
    """A guesser is right for its own object's expressions at least."""
    monkeypatch.setitem(SPLITS, "val", (40, SPLITS["val"][1]))
    guessed = evaluate.guessers(Shapes("val"))
    assert 1 / 8 < guessed["random object"] < 1 / 3 and 0.05 < guessed["largest object"] < 0.6


# --- the report ---


def test_report():
    rows = [{"expression": "word " * n, "kind": kind, "iou": iou, "score": score} for n, kind, iou, score in [
        (2, "attribute", 0.8, 0.9), (5, "attribute", 0.5, 0.6), (6, "relation", 0.3, 0.7), (12, "ordinal", 0.0, 0.1)]]
    assert evaluate.report(rows).splitlines() == [
        "Acc@0.5 0.5000 (95 % interval 0.1500 to 0.8500), mean IoU 0.4000, 4 expressions",
        "Acc@0.6 0.2500, Acc@0.7 0.2500, Acc@0.8 0.2500, Acc@0.9 0.0000",
        "  1-5 words          2 expressions, Acc@0.5 1.0000, mean IoU 0.6500",
        "  6-7 words          1 expressions, Acc@0.5 0.0000, mean IoU 0.3000",
        "  11+ words          1 expressions, Acc@0.5 0.0000, mean IoU 0.0000",
        "  attribute          2 expressions, Acc@0.5 1.0000, mean IoU 0.6500",
        "  ordinal            1 expressions, Acc@0.5 0.0000, mean IoU 0.0000",
        "  relation           1 expressions, Acc@0.5 0.0000, mean IoU 0.3000",
        "score tells right from wrong boxes: AUROC 0.750 (0.5 = not at all)"]


# --- the command line ---


def run(monkeypatch, capfd, *args):
    """python -m hivg.evaluate ARGS in this process -> (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, args)])
    capfd.readouterr()
    try:
        code = evaluate.main() or 0
    except SystemExit as stop:
        code = stop.code
    return code, *capfd.readouterr()


def test_command(model, weights_file, monkeypatch, capfd, tmp_path):
    code, out, err = run(monkeypatch, capfd, "--weights", weights_file, "--split", "val", "--device", "cpu",
                         "--per-sample", tmp_path / "rows.jsonl")
    assert code == 0 and "error" not in err
    first, *report, last = out.splitlines()
    assert re.fullmatch(rf"{weights_file} on shapes val, \d+ expressions a second", first)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert report == evaluate.report(rows).splitlines()
    for row, own in zip(rows, evaluate.predict(model, batches()), strict=True):  # adapters merged, as good as equal
        assert row["expression"] == own["expression"] and row["kind"] in KINDS
        np.testing.assert_allclose(row["box"], own["box"], atol=1e-5 * 256)
    moved = evaluate.predict(model, batches(), expressions=evaluate.shuffled(rows))
    compared = {"expressions shuffled": np.mean([row["iou"] >= 0.5 for row in moved]),
                **evaluate.guessers(Shapes("val"))}
    assert last == "for comparison, Acc@0.5: " + ", ".join(f"{k} {v:.4f}" for k, v in compared.items())


@pytest.mark.parametrize("args, word", [
    (["--split", "nope"], "nope"), (["--split", "train"], "train"), (["--split", "pretrain"], "pretrain"),
    (["--dataset", "coco"], "coco"),
    (["--device", "foo"], "foo"), (["--device", "cuda:99"], "cuda:99"), (["--fast"], "--fast"), (["extra"], "extra"),
    (["--weights", "missing.safetensors"], "missing.safetensors"), (["--weights", "page.safetensors"], "page.safeten"),
    (["--weights", "clip.safetensors"], "clip.safetensors"), (["--per-sample", "no/folder/rows.jsonl"], "no/folder"),
    (["--per-sample", "."], ".:")], ids=lambda x: x if isinstance(x, str) else "_".join(x))
def test_bad_arguments_get_one_line(weights_file, monkeypatch, capfd, tmp_path, args, word):
    monkeypatch.chdir(tmp_path)
    Path("page.safetensors").write_text("<html>\n</html>\n")
    clip = make_clip(dtype=torch.float32)
    clip.tokenizer = weights.load_hivg(weights_file).tokenizer
    weights.save("clip.safetensors", clip)
    args = args if "--weights" in args else ["--weights", weights_file, *args]
    code, out, err = run(monkeypatch, capfd, *args)
    assert (code, out) == (2, "") and re.fullmatch(r"error: [^\n]+\n", err) and word in err


def test_help(monkeypatch, capfd):
    code, out, err = run(monkeypatch, capfd, "--help")
    assert (code, err) == (0, "") and all(word in out for word in ("--per-sample", "testA", "compose"))


def test_as_a_module(tmp_path):
    """The one that starts a process."""
    done = subprocess.run([sys.executable, "-m", "hivg.evaluate", "--weights", tmp_path / "none.safetensors"], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and re.fullmatch(r"error: .*none.safetensors: .*\n", done.stderr)


# --- the bundled weights ---


def test_bundled_weights(monkeypatch):
    """A sample of the test split; README has all of it."""
    monkeypatch.setitem(SPLITS, "test", (50, SPLITS["test"][1]))
    model = weights.load_hivg(BUNDLED).merged()
    dataset = ShapesTensors("test", model.config.clip.image_size, model.config.normalization)
    rows = evaluate.predict(model, evaluation_batches(dataset))
    moved = evaluate.predict(model, evaluation_batches(dataset), expressions=evaluate.shuffled(rows))
    assert np.mean([row["iou"] >= 0.5 for row in rows]) >= 0.85
    assert np.mean([row["iou"] >= 0.5 for row in moved]) <= 0.35
