"""The folder of a run, runs/NAME: its lock, and its state.pt, which `Run` of run.py writes and resumes from."""

import errno
import sys
import zipfile

import torch

from hivg.training import distributed
from hivg.utils.memory import is_out_of_memory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def open_run(run, resume):
    """Take the folder of a run -> (its saved state with `resume`, else None; the lock, to be kept).

    Raises ValueError if another process is training in it, or if `resume` is False and it holds a run, or the weights
    of one.
    """
    if resume:
        lock = lock_run(run) if run.is_dir() else None
        return load_state(run), lock
    if (run / "state.pt").exists():
        raise ValueError(f"{run} holds a run; resume it with --resume, take another --name, or remove the folder")
    if any(run.glob("*.safetensors")):
        raise ValueError(f"{run} holds the weights of a run; take another --name, or remove the folder")
    run.mkdir(parents=True, exist_ok=True)
    return None, lock_run(run)


def lock_run(run):
    """Lock the folder of a run for this process, on rank 0, until the file returned is closed or the process ends. On
    a system or a file system without such locks (Windows; some of clusters) nothing is locked."""
    if fcntl is None or distributed.rank():
        return None
    lock = open(run / "lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # what a lock of another process gives
            raise ValueError(f"{run} is in use by another training; take another --name, or wait for it to "
                             "end") from None
        print(f"{run} cannot be locked ({error.strerror}); see that no other training uses it", file=sys.stderr)
    return lock


def load_state(run):
    """The state of an interrupted run, on the CPU whatever its device was. Raises ValueError."""
    path = run / "state.pt"
    if not path.is_file():
        raise ValueError(f"--resume: there is no {path}; start the run without --resume")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # compares all checksums, which torch.load does not
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        dict(state["settings"])  # fails for a file of another program
        return state
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); nothing of it is lost") from None
    except Exception as error:  # torch.load raises nearly anything
        if is_out_of_memory(error):
            raise ValueError(f"{path}: not enough memory to read it; nothing of it is lost") from None
        raise ValueError(f"{path}: damaged, or not a state of this version of the program; start again under another "
                         "--name") from None
