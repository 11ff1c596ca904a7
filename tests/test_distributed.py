"""Data parallelism: two processes train as one does, on the same global batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def log_of(folder, processes, *flags):
    """Run train.py in `folder` -> the lines of its log. With AdamW: Muon's products, in bfloat16, would make 1e-5 of
    the last bit in which the sums of one and of two processes differ."""
    start = [] if processes == 1 else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}",
                                       "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    done = subprocess.run([sys.executable, *start, ROOT / "train.py", "--name", "run", "--device", "cpu", "--dtype",
                           "float32", "--optimizer", "adamw", "--workers", "0", *map(str, flags)],
                          cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in (folder / "runs/run/log.jsonl").read_text().splitlines()]


def logs_of_one_and_two(tmp_path, *flags):
    """The same run with one process and with two -> their logs."""
    for processes in (1, 2):
        (tmp_path / str(processes)).mkdir()
    return [log_of(tmp_path / str(processes), processes, *flags) for processes in (1, 2)]


def test_two_processes_train_as_one(tmp_path, clip_file):
    """Losses, gradient norms and validation of warm-up and a first LoRA stage, to 1e-5 of their size; the contrastive
    loss among them, which sees the features of both processes."""
    flags = ["--clip", clip_file, "--epoch_samples", 48, "--batch_size", 16, "--epochs", 1, 1, "--lr", 1e-3, 1e-3,
             "--lora", "vanilla", "--warmup_steps", 2, "--loss_weights", 2, 2, 1, 20, 2, 20, 2]  # the paper's CLC
    one, two = logs_of_one_and_two(tmp_path, *flags)
    assert len(one) == len(two) == 4 and {"clc", "box", "mask_dice"} <= one[0].keys()
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        for name, value in a.items():
            assert b[name] == (pytest.approx(value, rel=1e-5, abs=2e-5) if isinstance(value, float) else value), name


def test_two_processes_pretrain_as_one(tmp_path):
    """The contrasts see the pictures, captions and phrases of both processes."""
    flags = ["--pretrain", "--epoch_samples", 16, "--pretrain_batch_size", 8, "--pretrain_epochs", 1, "--lora", "none",
             "--epochs", 1, "--batch_size", 8, "--warmup_steps", 2]
    one, two = logs_of_one_and_two(tmp_path, *flags)
    assert len(one) == len(two) == 4 and {"clc", "phrases"} <= one[0].keys()
    for name, value in one[0].items():
        assert two[0][name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name


def test_batch_that_does_not_divide(tmp_path, clip_file):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--device", "cpu", "--clip", clip_file, "--batch_size",
                           "6"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: the batch size must be a multiple")
