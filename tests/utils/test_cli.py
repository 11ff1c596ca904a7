"""How every program ends, and the dtype that it chooses."""

import argparse
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from makers import ROOT, ended, python

from hivg.utils.cli import Parser, choose_dtype, run


def raising(error):
    def main():
        print("begun")
        raise error
    return main


def test_flags_with_hyphens(monkeypatch):
    """Also of parse_intermixed_args, which from Python 3.12.8 on no longer calls parse_known_args."""
    parser = Parser()
    parser.add_argument("--min_score")
    for name in ("parse_known_args", "parse_known_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, lambda self, args, namespace: args)
        assert getattr(parser, name)(["--min-score=1", "--not-ours", "a-b"]) == ["--min_score=1", "--not-ours", "a-b"]


@pytest.mark.parametrize("main, expected", [
    (lambda: None, (0, "", "")), (lambda: 1, (1, "", "")),
    (raising(ValueError("a.png: no\nimage")), (2, "begun\n", "error: a.png: no image\n")),
    (raising(PermissionError("no luck")), (2, "begun\n", "error: no luck\n")),
    (raising(PermissionError(13, "Permission denied", "runs")), (2, "begun\n", "error: runs: Permission denied\n")),
    (raising(KeyboardInterrupt()), (130, "begun\n", "error: interrupted; come again\n")),
    # as PyTorch's signal handler raises it, anywhere in the program, of a worker that the system ends
    (raising(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")), (2, "begun\n", (
        "error: DataLoader worker (pid 7) is killed by signal: Killed; give --workers 0, or free memory\n"))),
], ids=["done", "code", "ValueError", "OSError", "OSError of a file", "Ctrl-C", "worker"])
def test_how_a_program_ends(capfd, main, expected):
    assert ended(capfd, run, main, interrupted="interrupted; come again") == expected


def test_a_character_that_the_terminal_lacks_is_escaped(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict" if name == "stdout" else
                                                        "backslashreplace"))
    with pytest.raises(SystemExit) as stop:
        run(lambda: print("星 \udcff"))
    assert stop.value.code == 0 and sys.stdout.buffer.getvalue() == b"\\u661f \\udcff\n"


COMMANDS = ("train", "ground", "hivg", "hivg.data", "hivg.evaluate", "hivg.bench", "hivg.ablate", "hivg.weights",
            "hivg.training.pretrain")
# a process for each command, forked after what takes its time is imported
FORKED = """
import json, os, runpy, sys
import train, hivg.ablate.runs

def child(command, flag, messages):
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
    os.dup2(os.open(messages, os.O_CREAT | os.O_WRONLY, 0o600), 2)
    sys.argv = [command, flag]
    try:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = stop.code
    try:
        sys.stdout.flush(), sys.stderr.flush()  # as Python does at its end, here without the time of all the rest
    except OSError:
        code = 120
    os._exit(code)

codes = []
for number, (command, flag) in enumerate(json.loads(sys.argv[1])):
    pid = os.fork()
    if not pid:
        child(command, flag, f"{sys.argv[2]}/{number}")
    codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
os.write(1, json.dumps(codes).encode())
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_stdout_that_is_full(tmp_path):
    """Every command alike: one line, and no traceback."""
    cases = [(command, flag) for command in COMMANDS for flag in ("--help", "--nonsense")]
    done = python("-c", FORKED, json.dumps(cases), tmp_path)
    assert done.stderr == ""
    codes = json.loads(done.stdout)
    for number, (case, code) in enumerate(zip(cases, codes, strict=True)):
        told = (tmp_path / str(number)).read_text()
        assert code == 2 and re.fullmatch(r"error: [^\n]+\n", told), (case, told)
        is_lost = case[1] == "--help"
        assert ("stdout: cannot be written (No space left on device)" in told) == is_lost, (case, told)


def test_an_error_of_the_program_keeps_its_traceback():
    for error in (KeyError("x"), RuntimeError("x")):
        with pytest.raises(type(error)):
            run(raising(error))


@pytest.mark.parametrize("capability, wanted", [((7, 5), torch.float32), ((8, 0), torch.bfloat16),
                                                ((10, 0), torch.bfloat16)])
def test_a_gpu_that_does_not_multiply_bfloat16_gets_float32(monkeypatch, capability, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("auto", torch.device("cuda")) == wanted
    assert choose_dtype("bfloat16", torch.device("cuda")) == torch.bfloat16


def test_float32_is_exact_on_a_gpu_in_convolutions_too():
    """By PyTorch's default they round their inputs to TF32, alone of all products."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    try:
        convolutions.fp32_precision = "tf32"
        assert choose_dtype(torch.float32, torch.device("cuda")) == torch.float32
        assert convolutions.fp32_precision == "ieee"
    finally:
        convolutions.fp32_precision = before


@pytest.mark.parametrize("command", ["hivg --json --device cpu", "hivg.ablate list"])
def test_a_reader_that_leaves(command):
    """As `python -m ... | head -0`, found while it works or at its end: no traceback, no message."""
    with subprocess.Popen([sys.executable, "-m", *command.split()], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as program:
        program.stdout.close()
        assert program.stderr.read() == ""
        assert program.wait() == 1
