"""The score as the probability of being right: the fit, its table, and the weights files that carry it."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import make_hivg, raising, refusal
from makers_data import rows_of
from makers_use import TEXTS, assert_fails, call, make_image
from makers_weights import contents

import train
from hivg import Grounder, weights
from hivg.data.drawn.scenes import SPLITS
from hivg.evaluate import __main__ as evaluate
from hivg.evaluate.calibration import calibrated, calibration_of, fit_calibration, reliability, reliability_lines
from hivg.evaluate.metrics import auroc


def make_predictions(n, a, b, seed=0):
    """Scores of n predictions, and whether they are right: with probability sigmoid(a logit(score) + b)."""
    rng = np.random.default_rng(seed)
    scores = rng.beta(2, 1, n)
    chance = 1 / (1 + np.exp(-(a * np.log(scores / (1 - scores)) + b)))
    return scores.tolist(), (rng.random(n) < chance).tolist()


# --- the fit ---


@pytest.mark.parametrize("n, a, b", [(30, 1.0, 0.0), (500, 0.3, 2.0), (500, 4.0, -6.0)])
def test_fit_is_the_minimum(n, a, b):
    """The gradient of the cross-entropy against Platt's targets is 0."""
    scores, right = make_predictions(n, a, b)
    a, b = fit_calibration(scores, right)
    x = np.log(scores) - np.log1p(-np.array(scores))
    targets = np.where(right, (sum(right) + 1) / (sum(right) + 2), 1 / (n - sum(right) + 2))
    excess = 1 / (1 + np.exp(-(a * x + b))) - targets
    assert abs(excess @ x) < 1e-6 * n and abs(excess.sum()) < 1e-6 * n


def test_fit_with_scores_at_the_ends():
    """Float32 scores are often 0 or 1; that far from the middle a full Newton step would overshoot."""
    scores = [0.0] * 50 + [1.0] * 200 + [1e-30, 1 - 2**-24]
    right = [False] * 49 + [True] + [True] * 190 + [False] * 10 + [False, True]
    a, b = fit_calibration(scores, right)
    assert calibrated(0.0, a, b) == pytest.approx(0.03, abs=0.03)
    assert calibrated(1.0, a, b) == pytest.approx(0.95, abs=0.01)
    a, b = fit_calibration([0.1, 0.2, 0.3, 0.7, 0.8, 0.9], [False] * 3 + [True] * 3)  # perfectly separated
    assert a > 0 and math.isfinite(b) and calibrated(0.9, a, b) < 0.95  # Platt's targets are not 0 and 1


@pytest.mark.parametrize("scores, right", [*(([0.1, 0.2, 0.6, 0.9], right) for right in (
    [True] * 4, [False] * 4, [True, True, False, False])), ([1.0] * 4, [True, True, True, False])], ids=str)
def test_what_cannot_be_calibrated(scores, right):
    with pytest.raises(ValueError, match="the score cannot be calibrated on . right and . wrong"):
        fit_calibration(scores, right)


def test_a_calibrated_score_tells_as_well():
    scores, right = make_predictions(500, 1.0, 0.0)
    scores += [0.0, 1.0, 1 - 2**-24]
    right += [False, True, True]
    chances = [calibrated(score, 0.3, -2.0) for score in scores]
    assert auroc(chances, right) == auroc(scores, right) and 0 < min(chances) < max(chances) < 1
    assert all(isinstance(chance, float) for chance in chances)
    assert calibrated(0.5, 3.0, 0.0) == 0.5 and calibrated(0.75, 2.0, 0.0) == pytest.approx(0.9)  # odds 3, squared


def test_reliability():
    """Against values worked out by hand."""
    rows, error = reliability([0.0, 0.05, 0.15, 0.95, 1.0], [False, True, False, True, True])
    assert [count for _, _, count, _, _ in rows] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    assert rows[0] == (0.0, 0.1, 2, pytest.approx(0.025), 0.5) and rows[9][3:] == (pytest.approx(0.975), 1.0)
    assert math.isnan(rows[5][3]) and math.isnan(rows[5][4])
    assert error == pytest.approx((2 * 0.475 + 0.15 + 2 * 0.025) / 5)
    lines = reliability_lines([0.0, 0.05, 0.15, 0.95, 1.0], [False, True, False, True, True])
    assert len(lines) == 11 and lines[0].endswith("expected calibration error 0.2300")
    assert lines[1] == "  0.0 to 0.1         2 expressions, mean score 0.025, Acc@0.5 0.500"
    assert lines[3] == "  0.2 to 0.3         0 expressions"


# --- calibrations in weights files ---


@pytest.mark.parametrize("ab", [
    [1.0], [1.0, 2.0, 3.0], ["1", "2"], [True, 1.0], [0, 1], [-1.0, 0.0], [math.nan, 0.0], [1.0, math.inf],
    [10**400, 1], {"a": 1, "b": 2}, "1 2", 1.0, [[1.0], 2.0], []], ids=lambda ab: str(ab)[:20])
def test_damaged_calibrations_are_refused(tmp_path, ab):
    message = refusal(calibration_of, {"score_calibration": ab}, "mine.safetensors")
    assert re.fullmatch("mine.safetensors: its score calibration .* is not two finite numbers.*", message)
    model = make_hivg(dtype=torch.float32)
    weights.save(tmp_path / "odd.safetensors", model, {"score_calibration": ab})
    with pytest.raises(ValueError, match="odd.safetensors: "):
        Grounder.from_pretrained(tmp_path / "odd.safetensors", device="cpu")


def test_grounder_gives_the_probability(tmp_path):
    assert calibration_of({}) is None and calibration_of({"score_calibration": None}) is None
    assert calibration_of({"score_calibration": [1, -2]}) == (1.0, -2.0)
    model = make_hivg(dtype=torch.float32)
    raw = Grounder(model, "cpu", "float32")
    assert raw.calibration is None
    weights.save(tmp_path / "a.safetensors", model, {"score_calibration": [0.5, -1.0]})
    grounder = Grounder.from_pretrained(tmp_path / "a.safetensors", "cpu", "float32")
    assert grounder.calibration == (0.5, -1.0)
    for before, after in zip(raw.ground(make_image(), TEXTS), grounder.ground(make_image(), TEXTS)):
        assert after.score == pytest.approx(calibrated(before.score, 0.5, -1.0)) and after.box == before.box


# --- the command line ---


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    """python -m hivg.evaluate ARGS on a `val` of six scenes, where good scores are mostly right boxes -> (exit code,
    stdout, stderr)."""
    monkeypatch.setitem(SPLITS, "val", (6, SPLITS["val"][1]))
    monkeypatch.chdir(tmp_path)
    predict = evaluate.predict

    def predict_well(*args, **options):
        rows = predict(*args, **options)
        for rank, row in enumerate(sorted(rows, key=lambda row: row["score"])):
            row["iou"] = 0.9 if rank % 4 <= rank // 8 else 0.1
        return rows

    monkeypatch.setattr(evaluate, "predict", predict_well)

    def run(*args):
        common = ["--device", "cpu", "--dtype", "float32", "--dataset", "shapes", "--split", "val"]
        return call(evaluate.main, capfd, monkeypatch, *common, *args)

    return run


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_calibrate(run, tmp_path, dtype):
    model = make_hivg(dtype=torch.float32, stage=1)
    weights.save("raw.safetensors", model, {"stage": "lora1"}, dtype)
    code, before, _ = run("--weights", "raw.safetensors", "--per_sample", "raw.jsonl")
    assert code == 0 and "calibration error" not in before
    code, out, err = run("--weights", "raw.safetensors", "--calibrate", "new.safetensors")
    assert code == 0 and "new.safetensors written" in err and "calibration error" in out
    tensors, metadata = contents("raw.safetensors")
    written, new = contents("new.safetensors")
    assert tensors.keys() == written.keys() and metadata["config"] == new["config"]
    assert all(written[name].dtype == dtype and torch.equal(written[name], tensor) for name, tensor in tensors.items())
    info = json.loads(new["info"])
    assert info["stage"] == "lora1"
    assert info["score_calibrated_on"] == {"dataset": "shapes", "split": "val", "expressions": 24}
    rows = rows_of(tmp_path / "raw.jsonl")
    expected = fit_calibration([row["score"] for row in rows], [row["iou"] >= 0.5 for row in rows])
    assert info["score_calibration"] == pytest.approx(expected)

    code, after, _ = run("--weights", "new.safetensors", "--per_sample", "new.jsonl")
    table = after.splitlines()[-12:-1]  # before the line of comparison
    assert code == 0 and "expected calibration error" in table[0] and out.splitlines()[1:] == after.splitlines()[1:]
    assert sum(int(re.search(r"(\d+) expressions", line)[1]) for line in table[1:]) == 24
    chances = [row["score"] for row in rows_of(tmp_path / "new.jsonl")]
    assert chances == pytest.approx([calibrated(row["score"], *expected) for row in rows])
    assert re.search("AUROC .*", after)[0] == re.search("AUROC .*", before)[0]

    # again, in place: it is fitted to the raw score, not to the calibrated one
    code, _, _ = run("--weights", "new.safetensors", "--calibrate", "new.safetensors")
    assert code == 0 and json.loads(contents("new.safetensors")[1]["info"]) == info


@pytest.mark.parametrize("name, error", [("fit_calibration", ValueError("cannot be calibrated")),
                                         ("save", OSError(28, "No space left on device"))])
def test_a_calibration_that_fails_does_not_cost_the_report(run, name, error, monkeypatch):
    weights.save("raw.safetensors", make_hivg(dtype=torch.float32))
    _, expected, _ = run("--weights", "raw.safetensors")
    monkeypatch.setattr(evaluate, name, raising(error))
    code, out, err = run("--weights", "raw.safetensors", "--calibrate", "new.safetensors", "--per_sample", "rows.jsonl")
    assert code == 2 and error.args[-1] in err and not Path("new.safetensors").exists()
    assert out.splitlines()[1:] == expected.splitlines()[1:]
    assert len(Path("rows.jsonl").read_text().splitlines()) == 24


def test_damaged_calibration_on_the_command_line(run):
    weights.save("odd.safetensors", make_hivg(dtype=torch.float32), {"score_calibration": [1, "x"]})
    assert_fails(run("--weights", "odd.safetensors"), "error: odd.safetensors: its score calibration")
    code, _, _ = run("--weights", "odd.safetensors", "--calibrate", "good.safetensors")  # the damaged one is not read
    assert code == 0 and calibration_of(weights.load("good.safetensors").info)


@pytest.mark.parametrize("source", ["raw.safetensors", "weights/hivg-tiny.safetensors"], ids=["own", "bundled"])
@pytest.mark.parametrize("target, word", [("weights.pth", "OUT.safetensors"), ("no/folder/a.safetensors", "no/folder"),
                                          ("other.safetensors", "other.safetensors: exists already")])
def test_targets_that_cannot_be(run, source, target, word):
    weights.save("raw.safetensors", make_hivg(dtype=torch.float32))
    Path("other.safetensors").write_text("of somebody")
    assert_fails(run("--weights", source, "--calibrate", target), word)
    assert Path("other.safetensors").read_text() == "of somebody"


@pytest.mark.parametrize("mean_iou, is_kept", [(0.4, False), (0.5, True), (0.6, True)])
def test_of_two_alike_by_accuracy_the_better_boxes_are_kept(mean_iou, is_kept, monkeypatch, tmp_path):
    """And no calibration: a model that is trained further scores differently."""
    path = tmp_path / "finetune.safetensors"
    weights.save(path, make_hivg(dtype=torch.float32), {"accuracy": 0.75, "mean_iou": 0.5})
    monkeypatch.setattr(train, "validate", lambda *args: {"accuracy": 0.75, "mean_iou": mean_iou})
    model = make_hivg(dtype=torch.float32)
    model.info = {"score_calibration": [1.0, 0.0]}
    scores, best = train.keep_best(train.Settings(), None, model, torch.device("cpu"), path, 1, 0.75)
    assert (scores["mean_iou"], best) == (mean_iou, 0.75)
    info = weights.load_hivg(path).info
    assert info["mean_iou"] == max(mean_iou, 0.5) and is_kept == ("stage" in info)
    assert "score_calibration" not in info
