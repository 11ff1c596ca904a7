"""How every program ends, and the dtype that it chooses."""

import subprocess
import sys

import pytest
import torch
from makers import ROOT

from hivg.utils.cli import choose_dtype, run


def ended(capfd, main, **options):
    """-> exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as stop:
        run(main, **options)
    return stop.value.code, *capfd.readouterr()


def raising(error):
    def main():
        print("begun")
        raise error
    return main


def test_exit_code(capfd):
    assert ended(capfd, lambda: None) == (0, "", "")
    assert ended(capfd, lambda: 1) == (1, "", "")


def test_what_went_wrong_is_one_line(capfd):
    assert ended(capfd, raising(ValueError("a.png: no\nimage"))) == (2, "begun\n", "error: a.png: no image\n")
    assert ended(capfd, raising(PermissionError("no luck"))) == (2, "begun\n", "error: no luck\n")
    assert ended(capfd, raising(PermissionError(13, "Permission denied", "runs"))) == (
        2, "begun\n", "error: runs: Permission denied\n")
    code, _, err = ended(capfd, raising(KeyboardInterrupt()), interrupted="interrupted; come again")
    assert (code, err) == (130, "error: interrupted; come again\n")


def test_an_error_of_the_program_keeps_its_traceback():
    for error in (KeyError("x"), RuntimeError("x")):
        with pytest.raises(type(error)):
            run(raising(error))


def test_a_worker_that_the_system_ends_is_one_line(capfd):
    """As PyTorch's signal handler raises it, anywhere in the program."""
    told = "DataLoader worker (pid 7) is killed by signal: Killed"
    assert ended(capfd, raising(RuntimeError(f"{told}. "))) == (
        2, "begun\n", f"error: {told}; give --workers 0, or free memory\n")


@pytest.mark.parametrize("capability, wanted", [((7, 5), torch.float32), ((8, 0), torch.bfloat16),
                                                ((10, 0), torch.bfloat16)])
def test_a_gpu_that_does_not_multiply_bfloat16_gets_float32(monkeypatch, capability, wanted):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_dtype("auto", torch.device("cuda")) == wanted
    assert choose_dtype("bfloat16", torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize("command", ["hivg.weights show weights/clip-tiny.safetensors", "hivg.ablate list"])
def test_a_reader_that_leaves(command):
    """As `python -m ... | head -0`: no traceback, no message."""
    with subprocess.Popen([sys.executable, "-m", *command.split()], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as program:
        program.stdout.close()
        assert program.stderr.read() == ""
        assert program.wait() == 1
