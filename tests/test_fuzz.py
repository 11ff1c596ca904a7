"""Some hundred damaged files, in a process of its own. HIVG_FUZZ=5000 reads as many, of another seed every day."""

import datetime
import os

import pytest
from makers import ROOT, python


@pytest.mark.slow
def test_damaged_files(tmp_path):
    inputs = os.environ.get("HIVG_FUZZ")
    args = ["--inputs", 400, "--seconds", 20, "--seed", 6]  # its first forty have good ones of each kind
    if inputs:
        args = ["--inputs", inputs, "--seed", datetime.date.today().toordinal()]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = python("-m", "fuzz", *args, env=environment)
    assert done.returncode == 0 and ", 0 wrong" in done.stdout, f"{done.returncode} {done.stdout} {done.stderr[-3000:]}"
    assert done.stdout.count(" read: ") == 4, done.stdout  # some of each kind are still good
