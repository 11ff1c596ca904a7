"""Interruptions: a resumed run is the uninterrupted one, bit for bit."""

import errno
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from makers import ROOT, python, raising, refusal
from makers_data import write_shapes
from makers_training import Killed, assert_one_line, assert_same_run, flags, ids, kill, log_of, run_script, train_until
from makers_weights import contents

import train
from hivg.training import checkpoint, criterion
from hivg.training.log import Log

MOMENTS = [  # save_minutes, the function that is called for the n-th time when the run is killed, n
    (0, "to_device", 8), (1000, "validate", 3), (0, "torch.save", 6)]  # a step, a validation, the writing of a state
MORE_MOMENTS = [
    (1000, "to_device", 1), (1000, "to_device", 6), (1000, "to_device", 8),  # before a step
    (0, "validate", 1), (0, "weights.save", 3), (0, "Log.draw", 2),  # between two steps
    (0, "begin_stage", 2), (1000, "stage_column", 3), (1000, "training_batches", 2),  # between two stages
    (1000, "torch.save", 3), (0, "os.replace", 4), (1000, "os.replace", 5)]  # writing a file


@pytest.mark.parametrize("save_minutes, name, call", MOMENTS + [
    pytest.param(*moment, marks=pytest.mark.slow) for moment in MORE_MOMENTS])
def test_resumed_is_uninterrupted(whole, world, tiny, monkeypatch, save_minutes, name, call):
    train_until(monkeypatch, replace(tiny, save_minutes=save_minutes), name, call)
    assert (world / "runs/tiny/state.pt").exists()
    train.train(replace(tiny, resume=True))
    assert_same_run(world / "runs/tiny", whole)


@pytest.mark.parametrize("name, call", [("validate", 1), ("weights.save", 1), ("to_device", 1), ("to_device", 3)])
def test_a_resumed_finetuning(whole, world, finetuning, monkeypatch, name, call):
    """The start's scores are those of the uninterrupted run, its mean IoU too, which decides ties."""
    s = replace(finetuning, save_minutes=0)
    train.train(replace(s, name="uninterrupted"))
    train_until(monkeypatch, s, name, call)
    train.train(replace(s, resume=True))
    assert_same_run(world / "runs/tiny", world / "runs/uninterrupted")


@pytest.mark.slow
def test_resumed_after_every_step(whole, world, tiny, monkeypatch):
    """A machine that never lives for more than a step or two."""
    times = 0
    while True:
        try:
            with monkeypatch.context() as patch:
                kill(patch, train, "to_device", 2 + times % 2)
                train.train(replace(tiny, save_minutes=0, resume=times > 0))
            break
        except Killed:
            times += 1
    assert times >= 7
    assert_same_run(world / "runs/tiny", whole)


def test_a_run_is_trained_by_one_process(begun):
    code = "import fcntl; f = open('runs/tiny/lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()  # it holds the lock
    with pytest.raises(ValueError, match="runs/tiny is in use"):
        train.train(replace(begun, resume=True))
    other.kill()  # a lock ends with its process, however that ends
    other.wait()
    train.train(replace(begun, resume=True))


@pytest.mark.slow
def test_resuming_a_finished_run_changes_nothing(whole, world, tiny):
    shutil.copytree(whole, "runs/tiny")
    before = {p: p.stat().st_mtime_ns for p in Path("runs/tiny").glob("*.safetensors")}
    assert train.train(replace(tiny, resume=True)) == Path("runs/tiny/lora3.safetensors")
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert_same_run(world / "runs/tiny", whole)


@pytest.mark.slow
def test_killed_by_the_system(tmp_path, tiny):
    """A process of its own, ended by SIGKILL at some moment after its first state, then resumed by command."""
    write_shapes(tmp_path, 4)
    path = write_shapes(tmp_path, 2, split="val", to="val")
    s = replace(tiny, dataset=str(path), lora="none", epochs=(1,), epoch_samples=20 * 8, workers=1)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "train.py", *flags(s), "--save_minutes", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL,
                               start_new_session=True)
    state = tmp_path / "runs/tiny/state.pt"
    deadline = time.monotonic() + 300
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert torch.load(state, weights_only=True)["step"] < 20
    for name, words in (("tiny", [*flags(s), "--resume"]), ("other", flags(replace(s, name="other")))):
        done = python(ROOT / "train.py", *words, cwd=tmp_path, env=environment)
        assert (done.returncode, done.stdout) == (0, f"runs/{name}/warmup.safetensors\n"), done.stderr
    assert_same_run(tmp_path / "runs/tiny", tmp_path / "runs/other")


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_stops_when_not_finite(world, tiny, monkeypatch, bad):
    """In the fifth step: the state after the third is there, finite, and can be resumed."""
    grounding_losses = criterion.grounding_losses
    calls = []

    def spoiled(*args):
        calls.append(1)
        terms = grounding_losses(*args)
        if len(calls) == 5 and bad == "loss":
            terms["box"] = terms["box"] * math.nan
        elif len(calls) == 5:
            terms["box"].register_hook(lambda gradient: gradient * math.nan)
        return terms

    monkeypatch.setattr(criterion, "grounding_losses", spoiled)
    message = refusal(train.train, tiny)
    assert "step 5 of warmup" in message and "nan" in message
    state = torch.load("runs/tiny/state.pt", weights_only=True)
    assert state["step"] == 3 and all(v.isfinite().all() for v in state["trained"].values())
    train.train(replace(tiny, resume=True))


def test_state_holds_no_frozen_weights(whole):
    """The frozen CLIP, most of a model of real size, is not written every few minutes."""
    state = torch.load(whole / "state.pt", weights_only=True)
    assert not [name for name in state["trained"] if name.startswith("clip.") and not re.search(r"\.[AB]\.\d$", name)]


@pytest.mark.parametrize("error, told", [
    (PermissionError(13, "Permission denied"), "cannot be read .Permission denied."),
    (OSError(5, "Input/output error"), "cannot be read .Input/output error."), (MemoryError(), "not enough memory")])
def test_a_state_that_cannot_be_read_is_not_called_damaged(begun, monkeypatch, error, told):
    """The advice for a damaged one is to remove it."""
    monkeypatch.setattr(torch, "load", raising(error))
    message = refusal(train.train, replace(begun, resume=True))
    assert re.search(told, message) and "remove" not in message and Path("runs/tiny/state.pt").exists()


def test_another_number_of_processes_is_refused(begun, monkeypatch):
    monkeypatch.setattr(train.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(train.distributed, "gather_rows", lambda rows: rows)
    with pytest.raises(ValueError, match="trained by 1 process.* resumed by 2"):
        train.train(replace(begun, resume=True))


# --- by command ---


def test_a_run_is_not_overwritten(begun, monkeypatch, capfd):
    before = {p: p.read_bytes() for p in Path("runs/tiny").iterdir()}
    assert_one_line(run_script(monkeypatch, capfd, *flags(begun)), "runs/tiny", "--resume")
    Path("runs/tiny/state.pt").rename("state.pt")  # as somebody does who needs the room
    assert_one_line(run_script(monkeypatch, capfd, *flags(begun)), "runs/tiny holds the weights", "another --name")
    Path("state.pt").rename("runs/tiny/state.pt")
    assert before == {p: p.read_bytes() for p in Path("runs/tiny").iterdir()}


def test_a_command_that_is_refused_leaves_an_older_log(begun, monkeypatch, capfd):
    """Of a run whose other files were removed."""
    for path in Path("runs/tiny").iterdir():
        if path.name != "log.jsonl":
            path.unlink()
    before = Path("runs/tiny/log.jsonl").read_bytes()
    assert_one_line(run_script(monkeypatch, capfd, *flags(replace(begun, clip="missing.safetensors"))), "missing")
    assert Path("runs/tiny/log.jsonl").read_bytes() == before != b""


@pytest.mark.parametrize("args, word", [
    (["--batch_size", "16"], "--batch_size 16 (was --batch_size 8)"),
    (["--epochs", "9", "1", "1", "1"], "--epochs 9 1 1 1 (was --epochs 2 1 1 1)"),
    (["--lora", "shared"], "--lora shared (was --lora hierarchical)"),
    (["--no-text_norm"], "--no_text_norm (was --text_norm)"),
    (["--loss_weights", "clc=0.5"], "--loss_weights clc=0.5 (was --loss_weights clc=0.1)"),
    (["--seed", "5", "--lr", "1"], "--seed 5")], ids=ids)
def test_resume_with_other_settings_gets_one_line(begun, monkeypatch, capfd, args, word):
    assert_one_line(run_script(monkeypatch, capfd, "--name", "tiny", "--resume", *args), word)


def test_resume_by_command(begun, whole, monkeypatch, capfd):
    """The name is enough; settings of the machine alone may change."""
    code, out, _ = run_script(monkeypatch, capfd, "--name", "tiny", "--resume", "--workers", "1", "--save_minutes", "3",
                              "--no_compile", "--no_graph", "--data_root", "elsewhere")
    assert (code, out) == (0, "runs/tiny/lora3.safetensors\n")
    assert_same_run(Path("runs/tiny"), whole)


def test_the_same_command_resumes(world, clip_file, monkeypatch, capfd, tiny):
    """Also one that gives some of the loss weights."""
    words = flags(tiny, epochs=(1, 0, 0, 0), loss_weights={"clc": 0.0})
    assert run_script(monkeypatch, capfd, *words)[0] == 0
    code, out, err = run_script(monkeypatch, capfd, *words, "--resume")
    assert (code, out) == (0, "runs/tiny/lora3.safetensors\n"), err


def drop_a_setting(path):
    state = torch.load(path, weights_only=True)
    del state["settings"]["clip_rate"]
    torch.save(state, path)


def flip_a_byte(path):
    """In the middle of the numbers, where only a checksum can tell."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("spoil", [
    lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:1000]), flip_a_byte,
    drop_a_setting, lambda path: path.write_text("<html>"), lambda path: torch.save({"settings": Path("x")}, path),
    lambda path: torch.save({"settings": {"old": 1}}, path)],
    ids=["empty", "cut", "flipped", "older", "html", "objects", "another version"])
def test_damaged_state_gets_one_line(begun, monkeypatch, capfd, spoil):
    spoil(Path("runs/tiny/state.pt"))
    assert_one_line(run_script(monkeypatch, capfd, "--name", "tiny", "--resume"), "runs/tiny/state.pt")


def edit(path, *keys, value):
    """Change one entry of a state: what PyTorch can load is not damaged to it."""
    state = torch.load(path, weights_only=True)
    part = state
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    torch.save(state, path)


@pytest.mark.parametrize("keys, value", [
    (("random",), []), (("trained",), {}), (("trained", "reg_token"), torch.zeros(1)),
    (("settings", "batch_size"), 8.0), (("settings", "lr"), "fast")], ids=ids)
def test_a_state_that_does_not_fit_gets_one_line_before_any_step(begun, monkeypatch, capfd, keys, value):
    state = Path("runs/tiny/state.pt")
    edit(state, *keys, value=value)
    log = log_of("runs/tiny")
    result = run_script(monkeypatch, capfd, "--name", "tiny", "--resume")
    assert_one_line(result, "runs/tiny/state.pt" if keys[0] not in ("trained", "random") else "")
    assert " step " not in result[2] and log_of("runs/tiny") == log


def test_other_data_or_another_start_are_no_damage(begun, monkeypatch, capfd):
    """The state is good, so nobody is told to remove it."""
    state = Path("runs/tiny/state.pt")
    saved = state.read_bytes()
    steps = torch.load(state, weights_only=True)["steps"]
    for keys, value, word in ((("steps",), steps + 1, "data"), (("data",), 1, "data"),
                              (("frozen", "clip.visual.proj"), 0.5, "weights file")):
        edit(state, *keys, value=value)
        _, _, err = result = run_script(monkeypatch, capfd, "--name", "tiny", "--resume")
        assert_one_line(result, word)
        assert "remove" not in err and "damaged" not in err
        state.write_bytes(saved)


def test_hyperparameters_are_those_of_the_settings(begun, whole):
    for number, name in ((0, "weight_decay"), (1, "weight_decay"), (1, "betas")):  # Muon's and AdamW's
        edit("runs/tiny/state.pt", "optimizers", number, "param_groups", 0, name, value="x")
    train.train(replace(begun, resume=True))
    assert_same_run(Path("runs/tiny"), whole)


ROWS = b'{"stage": "warmup", "step": 1, "loss": 2.5}\n{"stage": "warmup", "step": 2, "loss": 1.5}\n'


@pytest.mark.parametrize("data, kept", [
    (None, 0), (b"", 0), (ROWS[:-5], 1), (ROWS[:-5] + bytes(5), 1), (ROWS[:44] + b"[" + ROWS[44:], 1),
    (ROWS.replace(b"2.5", b"[2]"), 1), (ROWS.replace(b'"stage"', b'"Stage"', 1), 1), (b"[]\n" + ROWS[3:], 1),
    (ROWS[:-1], 2), (ROWS, 2), (ROWS + ROWS, 2)],
    ids=["missing", "empty", "cut", "zeros", "no JSON", "no number", "no stage", "a list", "no end", "whole", "more"])
def test_rows_that_the_log_lost_are_told(tmp_path, capsys, data, kept):
    """As after a power cut; what is left can be drawn, and continued."""
    if data is not None:
        (tmp_path / "log.jsonl").write_bytes(data)
    log = Log(tmp_path, {"log": {"bytes": len(ROWS), "sums": {}, "n": 0}})
    err = capsys.readouterr().err
    assert err.count("log.jsonl: not as the saved state left it") == err.count("\n") == (kept < 2)
    log.epoch("warmup", 3, 1, {"accuracy": 0.5}, 0.5)
    rows = log_of(tmp_path)
    assert len(rows) == kept + 1 and rows[-1]["step"] == 3 and (tmp_path / "curves.png").exists()
    assert log.state()["bytes"] == (tmp_path / "log.jsonl").stat().st_size


def test_a_run_whose_log_was_cut_goes_on(begun, whole):
    log = Path("runs/tiny/log.jsonl")
    log.write_bytes(log.read_bytes()[:10])
    train.train(replace(begun, resume=True))
    for path in whole.glob("*.safetensors"):
        (ours, _), (theirs, _) = contents(log.parent / path.name), contents(path)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_weights_that_a_stage_has_written_are_read_again_at_the_start(begun, monkeypatch, capfd):
    """Not only by the next stage."""
    Path("runs/tiny/warmup.safetensors").write_bytes(b"")
    result = run_script(monkeypatch, capfd, "--name", "tiny", "--resume")
    assert_one_line(result, "runs/tiny/warmup.safetensors")
    assert " step " not in result[2]


@pytest.mark.parametrize("code, in_use", [(errno.EAGAIN, True), (errno.EACCES, True), (errno.ENOLCK, False),
                                          (errno.ENOSYS, False), (errno.EOPNOTSUPP, False), (errno.EPERM, False)])
def test_only_a_lock_of_another_process_means_in_use(tmp_path, monkeypatch, capsys, code, in_use):
    monkeypatch.setattr(checkpoint.fcntl, "lockf", raising(OSError(code, os.strerror(code))))
    if in_use:
        with pytest.raises(ValueError, match="is in use by another training"):
            checkpoint.lock_run(tmp_path)
    else:
        assert checkpoint.lock_run(tmp_path)
        err = capsys.readouterr().err
        assert err.startswith(f"{tmp_path} cannot be locked ({os.strerror(code)})") and err.count("\n") == 1
