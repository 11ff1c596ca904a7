"""The state of a run, from which it resumes: runs/NAME/state.pt.

On a CPU it resumes bit for bit. On a GPU the data, their order and the random numbers are the same, but sums are not
always added in the same order, above all in the backward of the mask loss's interpolation, so last digits may differ.
"""

import zipfile
from dataclasses import asdict

import torch

from hivg.training import distributed
from hivg.utils.files import write_whole

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def open_run(run, resume):
    """Take the folder of a run -> (its saved state with `resume`, else None; the lock, to be kept).

    Raises ValueError if another process is training in it, or if it holds a run and `resume` is False.
    """
    if resume:
        lock = lock_run(run) if run.is_dir() else None
        return load_state(run), lock
    if (run / "state.pt").exists():
        raise ValueError(f"{run} holds a run; resume it with --resume, take another --name, or remove the folder")
    run.mkdir(parents=True, exist_ok=True)
    return None, lock_run(run)


def lock_run(run):
    """Lock the folder of a run for this process, on rank 0, until the file returned is closed or the process ends. On
    a system without such locks (Windows) nothing is locked."""
    if fcntl is None or distributed.rank():
        return None
    lock = open(run / "lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ValueError(f"{run} is in use by another training; take another --name, or wait for it to end") from None
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
        dict(state["settings"])
        return state
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); nothing of it is lost") from None
    except MemoryError:
        raise ValueError(f"{path}: not enough memory to read it; nothing of it is lost") from None
    except Exception:  # torch.load raises nearly anything
        raise ValueError(f"{path}: damaged, or not a state of this version of the program; "
                         "remove it and start the run without --resume") from None


def save_state(run, settings, stage, step, best, model, optimizers, log):
    """Write the state after `step` steps of a stage. Every rank calls it; rank 0 writes.

    It holds the parameters that this stage trains. The others, above all the frozen CLIP, come from the file that the
    stage started from.
    """
    state = {
        "settings": asdict(settings),
        "stage": stage,
        "step": step,
        "best": best,
        "trained": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "random": distributed.gather_rows([random_state()]),  # each rank has its own
        "log": log.state(),
    }
    if distributed.rank() == 0:
        path = run / "state.pt"
        advice = "make room, then " + ("continue with --resume" if path.exists() else "start again")
        write_whole(path, lambda part: torch.save(state, part), advice)


def restore(state, model, optimizers, log):
    """Restore the trained parameters, optimizers, random states and log -> (steps done, best accuracy).

    model: as its stage starts. Raises ValueError for a state of another number of processes.
    """
    if len(state["random"]) != distributed.world_size():
        raise ValueError(f"this run was trained by {len(state['random'])} process(es) and is resumed by "
                         f"{distributed.world_size()}; resume it with as many as before")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if trained.keys() != state["trained"].keys():
        raise ValueError("the state is of a model with other trained parameters; train again under another --name")
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(state["trained"][name])
    for optimizer, saved in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    set_random_state(state["random"][distributed.rank()])
    log.restore(state["log"])
    return state["step"], state["best"]


def random_state():
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state):
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
