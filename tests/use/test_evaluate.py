"""The evaluation: a correct row for every expression, the baselines, the report, and the command line."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import make_clip, make_hivg
from makers_data import rows_of
from makers_use import assert_fails, call
from typed import overlap

from hivg import weights
from hivg.data.batches import ShapesTensors, evaluation_batches
from hivg.data.drawn.expressions import KINDS
from hivg.data.drawn.scenes import SPLITS, WIDE_SPLITS, Shapes
from hivg.evaluate import __main__ as evaluate
from hivg.evaluate import report as reports
from hivg.evaluate.predict import mask_iou

SCENES = 6


@pytest.fixture(autouse=True)
def small_splits(monkeypatch):
    for name in ("val", "testB"):
        monkeypatch.setitem(SPLITS, name, (SCENES, SPLITS[name][1]))
    for name in ("test", "ordinal", "absent"):
        monkeypatch.setitem(WIDE_SPLITS, name, (SCENES, WIDE_SPLITS[name][1]))


def batches(batch_size=64, split="val"):
    return evaluation_batches(ShapesTensors(split, 64), batch_size)


# --- predictions ---


def test_images_are_normalised_as_the_model_needs_them(model):
    """Whatever the data set was opened with."""
    right = evaluate.predict(model, batches())
    other = evaluation_batches(ShapesTensors("val", 64, "imagenet"), 64)
    assert model.config.normalization == "clip" and evaluate.predict(model, other) == right


@pytest.mark.parametrize("split", ["val", "testB"])
def test_every_expression_has_its_row(model, split):
    rows = evaluate.predict(model, batches(split=split))
    items = [Shapes(split)[image_id] for image_id in range(SCENES)]
    asked = [(image_id, item["image"].size, *of_one) for image_id, item in enumerate(items)
             for of_one in zip(item["expressions"], item["kinds"], item["boxes"])]
    for row, (image_id, (width, height), text, kind, target) in zip(rows, asked, strict=True):
        assert row.keys() == {"image", "expression", "kind", "image_id", "box", "target", "iou", "score"}
        assert (row["expression"], row["kind"], row["image_id"]) == (text, kind, image_id)
        np.testing.assert_allclose(row["target"], target)
        xmin, ymin, xmax, ymax = row["box"]
        assert 0 <= xmin <= xmax <= width and 0 <= ymin <= ymax <= height
        assert row["iou"] == pytest.approx(overlap(row["box"], row["target"]), abs=1e-5)
        assert 0 <= row["score"] <= 1
    assert any(row["iou"] > 0 for row in rows) and json.loads(json.dumps(rows)) == rows


def test_rows_do_not_depend_on_the_batches(model):
    for a, b in zip(evaluate.predict(model, batches()), evaluate.predict(model, batches(4)), strict=True):
        np.testing.assert_allclose(a["box"], b["box"], atol=1e-5 * 256)
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)


def test_the_model_keeps_its_mode(model):
    assert model.config.dropout > 0
    told = []
    rows = evaluate.predict(model, batches(8), progress=told.append)
    assert not model.training and told == [8, 16, 24]
    model.train()
    try:
        assert evaluate.predict(model, batches(8)) == rows and model.training
    finally:
        model.eval()


def test_mask_iou():
    """Logits above 0 are the mask."""
    logits = torch.full((1, 1, 4, 4), -0.1)
    logits[0, 0, :, :2] = 0.1  # the left half
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, :2] = True  # the upper half
    assert mask_iou(logits, masks).tolist() == pytest.approx([4 / 12])
    assert mask_iou(logits, torch.zeros_like(masks)).tolist() == [0]
    assert mask_iou(logits, logits[:, 0] > 0).tolist() == [1]


def test_masks_are_asked_for(model):
    rows = evaluate.predict(model, batches(), masks=True)
    assert all(0 <= row["mask_iou"] <= 1 for row in rows) and any(row["mask_iou"] > 0 for row in rows)


# --- baselines ---


@pytest.mark.parametrize("scenes", [2, 3, 7, 250])
def test_shuffled_moves_every_expression_to_another_image(scenes):
    rows = [{"expression": f"{i} {j}", "image_id": i} for i in range(scenes) for j in range(4)]
    moved = evaluate.shuffled(rows)
    assert sorted(moved) == sorted(row["expression"] for row in rows)
    for text, row in zip(moved, rows, strict=True):
        assert int(text.split()[0]) != row["image_id"]


def test_other_expressions_on_the_same_images(model):
    rows = evaluate.predict(model, batches(8))
    moved = evaluate.predict(model, batches(8), expressions=evaluate.shuffled(rows))
    assert [row["expression"] for row in moved] == evaluate.shuffled(rows)
    for a, b in zip(moved, rows, strict=True):
        assert (a["target"], a["image_id"], a["kind"]) == (b["target"], b["image_id"], b["kind"])
        assert a["box"] != b["box"] or a["expression"] == b["expression"]


def scene(size, boxes, targets):
    """What the guessers read of an item of Shapes: rectangles, later ones in front."""
    labels = np.zeros(size, np.uint8)
    for i, (xmin, ymin, xmax, ymax) in enumerate(boxes):
        labels[ymin:ymax, xmin:xmax] = i + 1
    return {"labels": labels, "boxes": np.array([boxes[t] for t in targets], np.float32)}


def test_guessers():
    """By hand. The largest of the first image is object 1, meant once of two times; a random guess is right once of
    three. In the second, object 1 shows most though the outline of object 0 is larger; their boxes overlap by more
    than half, so both are right for either."""
    first = scene((20, 30), [(0, 0, 3, 3), (5, 5, 15, 15), (20, 5, 25, 10)], [1, 2])
    second = scene((20, 30), [(0, 0, 10, 10), (1, 1, 10, 10)], [0, 1])
    assert np.bincount(second["labels"].ravel())[1:].tolist() == [19, 81]
    guessed = evaluate.guessers([first, second])
    assert guessed == {"largest object": pytest.approx(3 / 4), "random object": pytest.approx((1 / 3 + 1 / 3 + 2) / 4)}


# --- the report ---


def test_report():
    rows = [
        {"expression": "word " * 2, "kind": "attribute", "iou": 0.8, "score": 0.9},
        {"expression": "word " * 5, "kind": "attribute", "iou": 0.5, "score": 0.6},
        {"expression": "word " * 6, "kind": "relation", "iou": 0.3, "score": 0.7},
        {"expression": "word " * 12, "kind": "ordinal", "iou": 0.0, "score": 0.1},
    ]
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
    assert "AUROC" not in evaluate.report(rows[:2])  # both are right, so there is nothing to tell apart
    rows[0]["mask_iou"] = 0.25
    rows[2]["mask_iou"] = 0.75
    assert evaluate.report(rows).splitlines()[1].endswith(", mask IoU 0.5000 of 2")


def test_report_on_the_wider_world():
    """Of nothing there: counted apart by kind, wrong for the score, and in no accuracy. Ordinals by rank and number."""
    rows = []
    for kind, target, iou, score, detail in (
            ("negation", [0, 0, 9, 9], 0.9, 0.8, ""), ("absent thing", None, 0.0, 0.4, ""),
            ("ordinal", [0, 0, 9, 9], 0.9, 0.7, "2 of 3"), ("absent rank", None, 0.0, 0.5, ""),
            ("ordinal", [0, 0, 9, 9], 0.1, 0.7, "1 of 5"), ("absent thing", None, 0.0, 0.6, ""),
            ("ordinal", [0, 0, 9, 9], 0.2, 0.7, "2 of 3"), ("ordinal", [0, 0, 9, 9], 0.8, 0.9, "3 of 3")):
        rows.append({"expression": "red star", "kind": kind, "target": target, "iou": iou, "score": score}
                    | ({"detail": detail} if detail else {}))
    text = evaluate.report(rows, True)
    first, _, *lines = text.splitlines()
    assert first.startswith("Acc@0.5 0.6000 ") and first.endswith(" mean IoU 0.5800, 5 expressions")
    assert lines[:9] == [
        "  1-5 words          5 expressions, Acc@0.5 0.6000, mean IoU 0.5800",
        "  ordinal            4 expressions, Acc@0.5 0.5000, mean IoU 0.5000, mean score 0.750",
        "  negation           1 expressions, Acc@0.5 1.0000, mean IoU 0.9000, mean score 0.800",
        "Acc@0.5 by rank and number: 2 of 3 0.500 of 2, 3 of 3 1.000 of 1, 1 of 5 0.000 of 1",
        "  absent rank        1 expressions true of nothing, 0.0000 score below 0.5, mean score 0.500",
        "  absent thing       2 expressions true of nothing, 0.5000 score below 0.5, mean score 0.500",
        "score tells right from wrong boxes: AUROC 0.933 (0.5 = not at all)",
        "score of 0.5 or more: 1.0000 of the right boxes, 0.8000 of the wrong boxes",
        "score as the chance of being right: expected calibration error 0.3625"]
    assert "  0.4 to 0.5         1 expressions, mean score 0.400, Acc@0.5 0.000" in lines
    nothing = [row for row in rows if row["target"] is None]
    told = evaluate.report(nothing, True).splitlines()
    assert told[:3] == [*lines[4:6], "score of 0.5 or more: 0.6667 of the wrong boxes"]


# --- the command line (test_evaluate_files.py has people's own files) ---


def test_command(model, weights_file, monkeypatch, capfd, tmp_path):
    code, out, err = call(evaluate.main, capfd, monkeypatch, "--weights", weights_file, "--dataset", "shapes",
                          "--split", "val", "--device", "cpu", "--dtype", "float32", "--per_sample",
                          tmp_path / "rows.jsonl", "--sheet", tmp_path / "sheet.png")
    assert code == 0 and "error" not in err
    first, *report, last = out.splitlines()
    assert re.fullmatch(rf"{weights_file} on shapes val in float32, \d+ expressions a second", first)
    rows = rows_of(tmp_path / "rows.jsonl")
    assert report == evaluate.report(rows).splitlines()
    for row, own in zip(rows, evaluate.predict(model, batches()), strict=True):  # the command merges adapters
        assert row["expression"] == own["expression"] and row["kind"] in KINDS
        np.testing.assert_allclose(row["box"], own["box"], atol=1e-5 * 256)
    moved = evaluate.predict(model, batches(), expressions=evaluate.shuffled(rows))
    compared = {"expressions shuffled": np.mean([row["iou"] >= 0.5 for row in moved])}
    compared |= evaluate.guessers(Shapes("val"))
    assert last == "for comparison, Acc@0.5: " + ", ".join(f"{k} {v:.4f}" for k, v in compared.items())
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


@pytest.mark.parametrize("split", ["test", "ordinal", "absent"])
def test_command_on_the_wider_world(weights_file, monkeypatch, capfd, tmp_path, split):
    """To the end, whatever the split has; what it writes can be compared."""
    path = tmp_path / "rows.jsonl"
    code, out, err = call(evaluate.main, capfd, monkeypatch, "--weights", weights_file, "--dataset", "shapes-wide",
                          "--split", split, "--device", "cpu", "--per_sample", path, "--sheet", tmp_path / "sheet.png")
    assert code == 0 and "error" not in err and "nan" not in out
    rows = rows_of(path)
    kinds = {row["kind"] for row in rows}
    for row in rows:
        assert (row["target"] is None) == row["kind"].startswith("absent")
        assert ("detail" in row) == (row["kind"] == "ordinal")
        assert row["target"] is not None or row["iou"] == 0 and "mask_iou" not in row
    for kind in kinds:
        assert f"\n  {kind} " in out
    assert ("for comparison" in out) == ("Acc@0.5 by rank" in out) == (split != "absent")
    if split != "absent":
        code, out, _ = call(evaluate.main, capfd, monkeypatch, "--compare", path, path)
        assert code == 0 and f"{len([row for row in rows if row['target']])} samples" in out


def test_weights_that_are_damaged(monkeypatch, capfd, tmp_path):
    """They load, and give boxes that are not finite: one line, no rows."""
    broken = make_hivg(dtype=torch.float32)
    broken.reg_token.data.fill_(3e38)  # a float32, yet too large to compute with
    weights.save(tmp_path / "nan.safetensors", broken)
    assert_fails(call(evaluate.main, capfd, monkeypatch, "--weights", tmp_path / "nan.safetensors", "--split", "val",
                      "--per_sample", tmp_path / "rows.jsonl"), "weights are damaged")
    assert not (tmp_path / "rows.jsonl").exists()


def test_sheet_shows_the_surest_mistakes_first(monkeypatch):
    """And then random others, each of another image; no mistake is a small or a sure right box."""
    captions = []
    monkeypatch.setattr(reports, "contact_sheet", lambda tiles, names: captions.extend(names))
    monkeypatch.setattr(reports, "sheet_tile", lambda dataset, rows, number: None)
    rng = np.random.default_rng(0)
    for n in (1, 7, 40, 300):
        rows = [{"expression": str(i), "image_id": i // 4, "iou": rng.choice([0.0, 0.3, 0.5, 0.9]),
                 "score": rng.random(), "target": [0, 0, 1, 1] if i % 3 else None} for i in range(n)]
        captions.clear()
        evaluate.sheet(None, rows)
        picked = {why: [rows[int(name.split(": ")[1])] for name in captions if name.startswith(why)]
                  for why in ("worst", "random")}
        images = [row["image_id"] for row in picked["worst"] + picked["random"]]
        assert len(set(images)) == len(images) == len(captions) <= 2 * reports.SHEET
        wrong = [row for row in rows if row["iou"] < 0.5]
        surest = {image: max(row["score"] for row in wrong if row["image_id"] == image)
                  for image in {row["image_id"] for row in wrong}}
        assert [row["score"] for row in picked["worst"]] == sorted(surest.values(), reverse=True)[: reports.SHEET]
        left = len({row["image_id"] for row in rows}) - len(picked["worst"])
        assert len(picked["random"]) == min(left, reports.SHEET)


@pytest.mark.parametrize("args, word", [
    (["--split", "nope"], "nope"), (["--dataset", "shapes-wide", "--split", "nope"], "shapes-wide has no split"),
    (["--split", "train"], "train"), (["--split", "pretrain"], "pretrain"), (["--dataset", "coco"], "coco"),
    (["--device", "foo"], "foo"), (["--device", "cuda:99"], "cuda:99"), (["--fast"], "--fast"), (["extra"], "extra"),
    (["--weights", "missing.safetensors"], "missing.safetensors"),
    (["--weights", "page.safetensors"], "page.safetensors"), (["--weights", "clip.safetensors"], "clip.safetensors"),
    (["--per_sample", "."], ".:"), (["--compare", "a.jsonl", "b.jsonl"], "a.jsonl"),
], ids=lambda value: "_".join(value) if isinstance(value, list) else "")
def test_bad_arguments_get_one_line(weights_file, monkeypatch, capfd, tmp_path, args, word):
    monkeypatch.chdir(tmp_path)
    Path("page.safetensors").write_text("<html>\n</html>\n")
    weights.save("clip.safetensors", make_clip(dtype=torch.float32))
    if "--weights" not in args:
        args = ["--weights", weights_file, *args]
    assert_fails(call(evaluate.main, capfd, monkeypatch, *args), word)
