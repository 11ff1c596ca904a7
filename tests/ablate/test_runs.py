"""Runs and reports of the ablation, on a small world."""

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import BUNDLED
from makers_data import rows_of
from makers_training import Killed, kill, shrink
from makers_use import assert_fails, call

import train
from hivg import weights
from hivg.ablate import runs
from hivg.ablate.__main__ import main
from hivg.ablate.arms import BY_NAME, Arm
from hivg.ablate.charts import plot_attention, plot_differences
from hivg.ablate.report import comparisons, mixing_table, report, runs_of
from hivg.ablate.runs import RESULTS, Budget, best_lr, code_version, missing, next_lr, pack, read_results, unpack
from hivg.data.drawn.scenes import SPLITS
from hivg.training.optimizers import Diverged


@pytest.fixture
def small(tmp_path, monkeypatch, clip_file):
    """An empty current folder, splits of 8 scenes, and budgets of seconds -> the results file."""
    shrink(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for split in ("test", "compose"):
        monkeypatch.setitem(SPLITS, split, (8, SPLITS[split][1]))
    monkeypatch.setattr(runs, "LEADING", 64)
    monkeypatch.setitem(runs.BUDGETS, "short", Budget(64, (1, 1, 1, 1), (1e-3, 3e-3), (), 5))
    settings = train.Settings
    here = dict(clip=str(clip_file), device="cpu", dtype="float32")
    monkeypatch.setattr(train, "Settings", lambda **given: settings(**(given | here)))
    monkeypatch.setattr(runs, "choose_dtype", lambda name, device: torch.float32)  # bfloat16 may depend on the batch
    monkeypatch.setattr(runs, "code_version", lambda: "abc")
    (tmp_path / "notebooks").mkdir()
    return tmp_path / "notebooks" / "ablations.jsonl"


def test_right_and_wrong_survive_packing():
    flags = np.random.default_rng(0).random(1001) < 0.5
    assert (unpack(pack(flags), 1001) == flags).all()


@pytest.mark.slow
def test_a_run_resumes_and_leaves_a_row(small, monkeypatch):
    """Killed and started again, twice, it ends as one that was not."""
    arm = BY_NAME["lora vanilla"]
    runs.run_one(arm, "short", 3e-3, 1)
    for step in (5, 3):  # the second time past the end of an epoch, so that the state is of a resumed run
        with pytest.raises(Killed), pytest.MonkeyPatch.context() as patch:
            kill(patch, train, "to_device", step)
            runs.run_one(arm, "short", 3e-3, 1)
    assert len(rows_of(small)) == 1
    runs.run_one(arm, "short", 3e-3, 1)
    first, second = rows_of(small)
    assert first.pop("minutes") > 0 and second.pop("minutes") is None
    assert first == second
    assert first["expressions"] == 256 and list(first["val"]) == ["warmup", "lora1"]
    assert first["test"]["accuracy"] == unpack(first["test"]["right"], 32).mean()
    assert first["batch_dependence"]["moved_pixels"] < 1e-3
    assert 0 < first["attention"]["lora1"]["on_target"] < 1
    assert set(first["copying"]) == {"own", "shown"}
    assert not list((small.parent.parent / "runs" / "ablate").glob("*/*.safetensors"))


def test_nothing_is_no_target_of_the_attention(monkeypatch):
    """Expressions that are true of nothing have a box of zeros, which lies in the first patch."""
    model = weights.load_hivg(BUNDLED)
    model.info["dataset"] = "shapes-wide"
    batch = next(iter(runs.batches_of(model, "absent", 8))) | {"present": torch.arange(8) < 4}
    batch["boxes"][:4] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    monkeypatch.setattr(runs, "first_batches", lambda model, batch_size: [batch])
    assert runs.attention(model, torch.device("cpu"))["on_target"] == 1.0


def fake(small, accuracies, seeds=(0, 1, 2)):
    """Results as the runs would write them: {arm: accuracy with the better rate}."""
    rng = np.random.default_rng(0)
    with open(small, "w") as file:
        for name, accuracy in accuracies.items():
            for seed in seeds:
                for lr in (1e-3, 3e-3) if seed == seeds[0] else (3e-3,):
                    right = rng.random(32) < (accuracy if lr == 3e-3 else 0)
                    scores = {"accuracy": float(right.mean()), "mean_iou": 0.5, "right": pack(right)}
                    maps = runs.base64.b64encode(bytes(range(8 * 16))).decode()
                    row = {"arm": name, "budget": "short", "lr": lr, "seed": seed, **BY_NAME[name].definition(),
                           "parameters": {"lora3": 1_500_000}, "val": {"warmup": 0.1, "lora3": float(right.mean())},
                           "attention": dict.fromkeys(("warmup", "lora3"), {"maps": maps, "on_target": 0.25}),
                           "test": scores,
                           "compose": scores, "batch_dependence": {"moved_pixels": 1.5, "answers_changed": 0.125},
                           "expressions": 256, "minutes": 2.0, "version": "abc"}
                    file.write(json.dumps(row) + "\n")


def test_only_what_is_missing_is_run(small):
    names = ["base", "bridge none"]
    first = [("short", name, 1e-3, 0) for name in names]
    assert missing({}, "short", names, [0]) == missing({}, "short", names, [0, 1]) == first  # no rate is chosen yet
    fake(small, {"base": 0.9}, seeds=(0, 1))
    rows = read_results(small)
    assert best_lr(rows, "short", "base") == 3e-3
    assert missing(rows, "short", ["base"], [0, 1, 2]) == [("short", "base", 3e-3, 2)]
    small.write_text(small.read_text().replace('"lr": 0.001', '"lr": 0.002', 1))
    assert missing(read_results(small), "short", ["base"], [0]) == [("short", "base", 1e-3, 0)]


def test_an_arm_has_its_seeds_and_a_budget_its_rates(small):
    names = ["base", "no CLC"]
    fake(small, {"base": 0.9, "no CLC": 0.9})
    rows = read_results(small)
    assert missing(rows, "short", names) == [("short", "base", 3e-3, 3), ("short", "base", 3e-3, 4)]
    assert missing(rows, "long", ["base"]) == [("long", "base", next_lr({}, runs.BUDGETS["long"].lrs), 0)]


def test_a_rate_that_diverges_is_not_chosen_and_the_report_says_so(small, monkeypatch):
    def diverge(settings, hooks):
        (runs.RUNS / settings.name).mkdir(parents=True)
        raise Diverged("the loss is nan")

    fake(small, {"base": 0.1}, seeds=(0,))
    kept = [line for line in small.read_text().splitlines() if '"lr": 0.001' in line]
    small.write_text("\n".join(kept) + "\n")
    monkeypatch.setattr(train, "train", diverge)
    runs.run_one(BY_NAME["base"], "short", 3e-3, 0)
    assert best_lr(read_results(small), "short", "base") == 1e-3
    assert not list(runs.RUNS.glob("ablate/*"))
    text = report(small, small.parent)
    assert "Diverged: base at 0.003 with seed 0." in text and "| base | 1.50 M | 0.001 | 1 |" in text


def test_rates_are_tried_from_the_middle_until_the_best_is_inside():
    def order(accuracy):
        found = {}
        while lr := next_lr(found, (1, 2, 4, 8)):
            found[lr] = accuracy[lr]
        return list(found), max(found, key=found.get)

    assert order({1: 1, 2: 5, 4: 6, 8: 3}) == ([2, 4, 8], 4)
    assert order({1: 1, 2: 5, 4: 4, 8: 9}) == ([2, 4, 1], 2)
    assert order({1: 9, 2: 5, 4: 4, 8: 0}) == ([2, 4, 1], 1)
    assert order({1: 1, 2: 5, 4: 6, 8: 7}) == ([2, 4, 8], 8)
    assert next_lr({3e-3: 0.5}, (3e-3,)) is None


def test_a_line_that_was_cut_costs_one_run(small):
    fake(small, {"base": 0.9})
    whole = small.read_text()
    small.write_text(whole[:-100])
    assert len(read_results(small)) == 3
    runs.append(small, json.loads(whole.splitlines()[-1]))
    assert len(read_results(small)) == 4


def test_results_of_an_arm_that_was_defined_differently_do_not_count(small):
    fake(small, {"base": 0.9, "lora vanilla": 0.9})
    small.write_text(small.read_text().replace('"vanilla"', '"shared"'))
    assert {key[1] for key in read_results(small)} == {"base"}


def test_a_new_loss_leaves_older_results_as_they_are(small):
    """It had no weight in them."""
    fake(small, {"no hints": 0.9})
    rows = rows_of(small)
    for row in rows:
        assert row["settings"]["loss_weights"].pop("reg_attention") == 0
    small.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(read_results(small)) == len(rows)
    small.write_text(small.read_text().replace('"giou": 2.0', '"giou": 1.0'))
    assert not read_results(small)


def test_a_claim_that_no_table_shows_is_refused():
    with pytest.raises(ValueError, match="'mine' is none of CLAIMS"):
        Arm("gated", "mine", "a gate")


def test_a_run_of_an_arm_that_was_defined_differently_is_not_resumed():
    """Its settings of train.py may be the same."""
    arm = BY_NAME["mixed"]
    other = replace(arm, trick="")
    assert runs.settings_of(arm, "short", 1e-3, 0).name == runs.settings_of(replace(arm), "short", 1e-3, 0).name
    assert runs.settings_of(arm, "short", 1e-3, 0).name != runs.settings_of(other, "short", 1e-3, 0).name


def test_the_report_says_what_the_results_say(small):
    fake(small, {"base": 1, "bridge none": 0.2, "lora vanilla": 0.9, "padding seen": 0.9, "mixed": 0.9})
    text = report(small, small.parent)
    assert sorted(path.name for path in small.parent.glob("short/*.png")) == ["attention.png", "differences.png"]
    found = runs_of(read_results(small), "short")
    [d] = [d for arm, d in comparisons(found) if arm.name == "bridge none"]
    assert d.verdict == "worse" and d.high < 0
    assert f"| {d.points:+.1f} | {d.low:+.1f} to {d.high:+.1f} | {d.visible:.1f} | worse |" in text
    assert f"| {d.own[0]:+.1f} to {d.own[1]:+.1f}, {d.own_verdict} | +0.0 | {d.points:+.1f} (" in text  # all alike here
    assert f"| base | 1.50 M | 0.003 | 3 | 0.100, {found['base'].accuracy():.3f} |" in text
    assert "Not run yet: bridge constant" in text and "| mixed | 1.50 | 12.5 % |" in text
    assert "20 runs, 0.7 hours" in text
    chart = plot_differences(comparisons(found))
    assert chart.width == 900 and len(chart.getcolors(10**6)) > 3
    maps = {"end": found["base"].rows[0]["attention"]["lora3"]["maps"]}
    in_rows, in_a_column = plot_attention(maps, [0, 2], 32), plot_attention(maps, [0, 2], 32, across=1)
    assert in_rows.width > 400 > in_a_column.width and in_a_column.height > in_rows.height
    mixing = mixing_table(found)
    assert mixing._repr_markdown_() == repr(mixing) == str(mixing)  # in Jupyter a table


def test_one_seed_alone_gives_no_interval(small):
    fake(small, {"base": 0.9, "bridge none": 0.2})
    lines = small.read_text().splitlines(keepends=True)  # four rows of each arm
    small.write_text("".join(lines[:6]))  # of the second both rates of seed 0
    found = runs_of(read_results(small), "short")
    assert list(found["bridge none"].rows) == [0] and comparisons(found) == []


def test_the_command_line(small, monkeypatch, capfd):
    for args, words in ((("run", "no such arm"), "no such arm"), (("run", "--jobs", "0"), "--jobs"),
                        (("one", "base"), "--lr"), (("report",), "no results"), (("report", "base"), "takes no names")):
        assert_fails(call(main, capfd, monkeypatch, *args), words)
    code, output, _ = call(main, capfd, monkeypatch, "list")
    assert code == 0 and "lora deep first" in output


@pytest.mark.slow
def test_run_chooses_the_rates_and_then_runs_the_seeds(small, monkeypatch, capsys):
    """The processes are replaced by calls in this one."""
    def in_this_process(key):
        budget, arm, lr, seed = key
        runs.run_one(BY_NAME[arm], budget, lr, seed)
        return f"{arm} {lr} {seed}"

    monkeypatch.setattr(runs, "run_in_process", in_this_process)
    runs.run_missing("short", ["lora none"], [0, 1], 1)
    keys = [(row["arm"], row["lr"], row["seed"]) for row in rows_of(small)]
    best = best_lr(read_results(), "short", "lora none")
    assert keys == [("lora none", 1e-3, 0), ("lora none", 3e-3, 0), ("lora none", best, 1)]
    assert "1 of 1" in capsys.readouterr().err
    runs.run_missing("short", ["lora none"], [0, 1], 1)
    assert len(rows_of(small)) == 3  # nothing is run twice


def test_a_run_that_fails_is_reported_and_does_not_stop_the_others(small, monkeypatch, capsys):
    monkeypatch.setattr(runs.sys, "executable", "false")
    assert runs.run_missing("short", ["base", "bridge none"], [0], 1) == 2
    assert "FAILED: base" in capsys.readouterr().err


def test_the_version_of_a_row_is_that_of_the_code(tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *args], check=True, capture_output=True)

    monkeypatch.chdir(tmp_path)
    assert code_version() == "unknown"
    git("init")
    RESULTS.parent.mkdir()
    RESULTS.write_text("{}\n")
    Path("code.py").write_text("1\n")
    git("add", ".")
    git("commit", "-m", "first")
    commit = code_version()
    assert re.fullmatch("[0-9a-f]{7,}", commit)
    RESULTS.write_text("{}\n{}\n")
    assert code_version() == commit  # the results grow with every run
    Path("code.py").write_text("2\n")
    assert code_version() == commit + "+"
