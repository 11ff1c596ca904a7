"""What all command lines share: one-line errors, the choice of device and dtype, progress."""

import argparse
import os
import sys
import time

import torch

from hivg.utils.messages import shown

DTYPES = ("auto", "float32", "bfloat16")  # of choose_dtype


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2. Flags are declared with underscores, are accepted
    with hyphens too, and cannot be abbreviated."""

    def __init__(self, **options):
        options.setdefault("prog", program_name())
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        declared = {flag[2:].replace("-", "_"): flag for flag in self._option_string_actions if flag.startswith("--")}
        given = []
        for arg in args:
            name, equals, value = arg.partition("=")
            flag = declared.get(name[2:].replace("-", "_")) if name.startswith("--") else None
            given.append(flag + equals + value if flag else arg)
        return super().parse_known_args(given, namespace)

    def error(self, message):
        fail(f"{message}; --help lists the flags")


def program_name():
    """How the program was called: "python -m hivg.weights", or None for the name of its file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # set by `python -m` only
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec and spec.name.startswith("hivg") else None


def fail(message, code=2):
    """Print one line on stderr, whatever the message holds, and exit."""
    print("error: " + shown(" ".join(str(message).split()), 290), file=sys.stderr)
    raise SystemExit(code)


def run(main, interrupted="interrupted"):
    """Call main() and exit with what it returns. A ValueError or OSError becomes one line and code 2, Ctrl-C the line
    `interrupted` and code 130. If the reader of a pipe has left, as `head` does, the code is 1."""
    try:
        code = main()
        sys.stdout.flush()  # notice here, not at exit, that the reader has left
    except KeyboardInterrupt:
        fail(interrupted, code=130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        code = 1
    except OSError as error:  # without its errno
        fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
    except ValueError as error:
        fail(error)
    sys.exit(code or 0)


def add_machine_flags(parser):
    """--device and --dtype, as choose_device and choose_dtype take them."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="of weights and products; auto = bfloat16 "
                        "where the hardware has it")


def choose_device(name):
    """"auto", "cpu", "cuda" or "cuda:1" -> torch.device. Raises ValueError if it is missing."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; use auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name} is not supported; use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"no device {name}: PyTorch sees {torch.cuda.device_count()} GPUs; use --device cpu")
    return device


def choose_dtype(name, device):
    """"float32", "bfloat16", or "auto" -> the dtype of matrix products, and in prediction of weights.

    auto: bfloat16 on a GPU or CPU that has it in hardware, where a step takes half the time. Raises ValueError.
    """
    if name != "auto":
        if name not in DTYPES:
            raise ValueError(f"dtype must be auto, float32 or bfloat16, not {name!r}")
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        able = getattr(torch.cpu, "get_capabilities", dict)()  # missing in some versions
        fast = able.get("avx512_bf16") or able.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


class Progress:
    """A counter on stderr: a line that rewrites itself on a terminal, a line every 30 s elsewhere."""

    def __init__(self, what, total):
        self.what = what
        self.total = total
        self.start = time.monotonic()
        self.tty = sys.stderr.isatty()
        self.next = 0.5 if self.tty else 30  # seconds after the start

    def __call__(self, done):
        seconds = time.monotonic() - self.start
        if seconds < self.next and not (self.tty and done == self.total):
            return
        self.next = seconds + (0.5 if self.tty else 30)
        left = seconds / max(done, 1) * (self.total - done)
        print(f"{self.what}: {done} of {self.total}, {left:.0f} s left  ", file=sys.stderr, flush=True,
              end="\r" if self.tty and done < self.total else "\n")
