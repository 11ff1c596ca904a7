"""What all command lines share: streams, one-line errors, the choice of device and dtype, a progress line."""

import argparse
import errno
import os
import re
import sys
import time
from contextlib import suppress
from difflib import get_close_matches

import torch

from hivg.utils.memory import enough_memory
from hivg.utils.messages import quoted, shown

DTYPES = ("auto", "float32", "bfloat16")
UNWRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)  # of a stream; files name themselves


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit code 2. Flags may be written with underscores or hyphens,
    and cannot be abbreviated."""

    def __init__(self, **options):
        options.setdefault("prog", program_name())
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_known_args(self, args=None, namespace=None):
        return super().parse_known_args(self.as_declared(args), namespace)

    def parse_known_intermixed_args(self, args=None, namespace=None):  # from Python 3.12.8 on without the above
        return super().parse_known_intermixed_args(self.as_declared(args), namespace)

    def as_declared(self, args):
        """The command line, by default the program's own, with each flag spelled as it was declared."""
        declared = {flag.replace("_", "-"): flag for flag in self._option_string_actions}
        given = []
        for arg in sys.argv[1:] if args is None else args:
            name, equals, value = arg.partition("=")
            if name.startswith("--"):
                name = declared.get(name.replace("_", "-"), name)
            given.append(name + equals + value)
        return given

    def print_help(self, file=None):
        print(self.format_help(), end="", file=file)  # argparse's own hides that it cannot be written

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[^ =]+)", message)
        similar = get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else []
        fail(f"{message}; {f'did you mean {similar[0]}? ' if similar else ''}--help lists the flags")


def program_name():
    """How the program was called: "python -m hivg.weights", or None for argparse's default, the name of the file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # set by `python -m` only
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec and spec.name.startswith("hivg") else None


def fail(message, code=2):
    """Print the message as one line on stderr and exit."""
    with suppress(OSError):  # nowhere to say it
        print("error: " + shown(" ".join(str(message).split()), 290), file=sys.stderr)
    raise SystemExit(code)


def run(main, interrupted="interrupted", lower="close other programs, or use a machine with more"):
    """Call main() and exit with the code it returns. A ValueError or OSError is printed as one line, code 2, and where
    memory runs out one that ends with `lower`; Ctrl-C prints `interrupted`, code 130; a reader that closes the output
    early, such as `head`, ends it quietly, code 1."""
    if sys.stdout is None:  # closed, as by >&-
        sys.stdout = open(os.devnull, "w")
    sys.stdout.reconfigure(errors="backslashreplace")  # escapes what a terminal lacks, as stderr does
    failure = None
    try:
        with enough_memory("", lower):
            code = main() or 0
    except SystemExit as stop:  # of --help, or of `fail`
        code = stop.code or 0
    except KeyboardInterrupt:
        code, failure = 130, interrupted
    except BrokenPipeError:
        code = 1
    except (OSError, ValueError, MemoryError) as error:
        code, failure = 2, reason_of(error)
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):  # killed while the model computes, mostly for its memory
            raise
        code, failure = 2, f"{str(error).strip('. ')}; give --workers 0, or free memory"
    unwritten = flush_stdout()
    if unwritten and not code:
        code, failure = (1, None) if isinstance(unwritten, BrokenPipeError) else (2, reason_of(unwritten))
    if failure:
        fail(failure, code)
    sys.exit(code)


def flush_stdout():
    """Write what stdout still holds, here and not at exit, where errors are not caught -> None, or the OSError. What
    could not be written is then dropped."""
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error


def reason_of(error):
    """What a ValueError or OSError says, with the file or stream that it is about."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in UNWRITTEN:
        return f"stdout: cannot be written ({error.strerror}); make room, or send the output elsewhere"
    return error


def add_machine_flags(parser):
    """--device and --dtype, for choose_device and choose_dtype."""
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", default="auto", choices=DTYPES, help="dtype of parameters and matrix products; "
                        "auto: bfloat16 where the hardware is fast at it")


def choose_device(name):
    """"auto", "cpu", "cuda" or "cuda:1" -> torch.device. Raises ValueError for a device that is not available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,2})?", str(name)):
        raise ValueError(f"device must be auto, cpu or cuda, not {quoted(name)}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name} is not available, PyTorch sees {torch.cuda.device_count()} GPUs; "
                         "use --device cpu")
    return device


def check_compile(device, advice="leave --compile out"):
    """Try torch.compile on a sum. Raises ValueError where it fails, mostly for want of a compiler."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # torch.compile raises nearly anything
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ValueError(f"torch.compile does not work here ({shown(lines[0], 100)}); install a C++ compiler (g++), or "
                         f"{advice}") from None


def choose_dtype(name, device):
    """"float32", "bfloat16" or "auto" -> the torch.dtype of matrix products, and in prediction also of parameters.
    auto: bfloat16 on a GPU or x86 CPU that multiplies it in hardware, where a step takes half the time. torch.float32
    is taken as "float32". Raises ValueError."""
    name = name_of(name)
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto, float32 or bfloat16, not {name!r}")
    if name == "float32" and device.type == "cuda":
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # convolutions alone are TF32 by PyTorch's default
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older versions of PyTorch
        fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return torch.bfloat16 if fast else torch.float32


def name_of(dtype):
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


class Progress:
    """Call with the number done: prints it on stderr, in place on a terminal, as a line every 30 s elsewhere."""

    def __init__(self, what, total):
        self.what = what
        self.total = total
        self.start = time.monotonic()
        self.tty = sys.stderr.isatty()
        self.interval = 0.5 if self.tty else 30  # seconds
        self.next = self.interval  # seconds after the start

    def __call__(self, done):
        seconds = time.monotonic() - self.start
        if seconds < self.next and not (self.tty and done == self.total):
            return
        self.next = seconds + self.interval
        left = seconds / max(done, 1) * (self.total - done)
        end = "\r" if self.tty and done < self.total else "\n"
        print(f"{self.what}: {done} of {self.total}, {left:.0f} s left  ", end=end, file=sys.stderr, flush=True)
