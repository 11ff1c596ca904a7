"""Small trainings that the tests of the training share: their world, their settings, how to kill and compare them."""

import os
import re
import runpy
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from makers import ROOT, ended
from makers_data import rows_of
from makers_weights import contents

import train
from hivg import weights
from hivg.data.drawn.scenes import DRAWN
from hivg.training import run

NAMES = ["warmup", "lora1", "lora2", "lora3"]
ON_CPU = {"dtype": "float32", "device": "cpu", "workers": 0}


def shrink(monkeypatch, dropout=0.1):
    """A validation split of 4 scenes, and a small grounding encoder with dropout, so that a resumed run must find its
    random numbers again."""
    for splits in DRAWN.values():
        monkeypatch.setitem(splits, "val", (4, splits["val"][1]))
    for_clip = train.HiVGConfig.for_clip
    small = dict(width=32, encoder_layers=2, encoder_ffn=64, rtcc_hidden=64, dropout=dropout, lora_dropout=dropout)
    monkeypatch.setattr(train.HiVGConfig, "for_clip", lambda clip, **changes: for_clip(clip, **(small | changes)))


def log_of(run):
    return rows_of(Path(run) / "log.jsonl")


def assert_same_log(one, two, rel, abs):
    assert len(one) == len(two) > 0
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == (pytest.approx(value, rel=rel, abs=abs) if isinstance(value, float) else value), name


def assert_same_run(run, other):
    """Bit for bit: the best weights of each stage, the last state, the log, the curves."""
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in other.iterdir())
    assert (run / "log.jsonl").read_text() == (other / "log.jsonl").read_text()
    assert (run / "curves.png").read_bytes() == (other / "curves.png").read_bytes()
    for path in run.glob("*.safetensors"):
        assert_same_tree(path.name, contents(path), contents(other / path.name))
    ours = torch.load(run / "state.pt", weights_only=True)
    theirs = torch.load(other / "state.pt", weights_only=True)
    for part in ("trained", "optimizers", "random", "log", "stage", "step", "best"):
        assert_same_tree(part, ours[part], theirs[part])


def assert_same_tree(name, a, b):
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        for key in a:
            assert_same_tree(f"{name}.{key}", a[key], b[key])
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


class Killed(BaseException):
    pass


def kill(monkeypatch, module, name, call):
    """Stop the process, as it were, when module.NAME is called for the call-th time; torch.save stops half way."""
    owner = {"torch": torch, "os": os, "Log": run.Log, "weights": weights}.get(name.split(".")[0], module)
    last = name.split(".")[-1]
    function = getattr(owner, last)
    calls = []

    def wrapper(*args, **kwargs):
        calls.append(name)
        if len(calls) < call:
            return function(*args, **kwargs)
        if name == "torch.save":
            Path(args[1]).write_bytes(b"half a file")
        raise Killed

    monkeypatch.setattr(owner, last, wrapper)


def train_until(monkeypatch, s, name, call):
    """A training that is killed when train.NAME is called for the call-th time."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, train, name, call)
        train.train(s)


def flags(s, **changes):
    """The command line of these settings."""
    words = []
    defaults = asdict(type(s)())
    for name, value in (asdict(s) | changes).items():
        if value == defaults[name]:
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{name}")
        else:
            if isinstance(value, dict):
                value = tuple(f"{key}={number}" for key, number in value.items())
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def run_script(monkeypatch, capfd, *args):
    """python train.py ARGS in this process -> (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    return ended(capfd, runpy.run_path, str(ROOT / "train.py"), run_name="__main__")


def assert_one_line(result, *words):
    code, out, err = result
    assert (code, out) == (2, "") and re.fullmatch(r"error: [^\n]+\n", err.splitlines(keepends=True)[-1]), result
    assert all(str(word) in err for word in words), err
    assert "Traceback" not in err


def ids(x):
    return "_".join(map(str, x)) if isinstance(x, (list, tuple)) else str(x)
