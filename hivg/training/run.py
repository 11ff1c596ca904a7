"""A run: what a training needs besides its model and data, whichever training it is.

It resumes from runs/NAME/state.pt: on a CPU bit for bit. On a GPU the data, their order and the random numbers are the
same, but sums are not always added in the same order, above all in the backward of the mask loss's interpolation, so
last digits may differ.
"""

import time
from dataclasses import asdict

import torch

from hivg.training import distributed
from hivg.training.checkpoint import open_run
from hivg.training.log import Log
from hivg.training.settings import folder_of
from hivg.utils.cli import check_compile, choose_device, choose_dtype
from hivg.utils.files import remove_parts, write_whole


def first_values(model):
    """{name: its first number} of the parameters that are not trained."""
    return {name: p.flatten()[0].item() for name, p in model.named_parameters() if not p.requires_grad}


def changed_by_training(model):
    """{name: tensor}: the trained parameters, and buffers, if somebody's extension has any."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())


class Run:
    """Its folder runs/NAME/, device, precision and log, and the state it resumes from, None for a new run."""

    def __init__(self, s, title):
        """s: RunSettings. title: how the first line of the log begins. Raises ValueError if the folder is in use."""
        self.settings = s
        self.folder = folder_of(s.name)
        self.device = distributed.init(choose_device(s.device))
        self.dtype = choose_dtype(s.dtype, self.device)
        if s.compile:
            check_compile(self.device)
        self.saved, self.lock = open_run(self.folder, s.resume)  # the lock is held as long as the run exists
        if self.lock:
            remove_parts(self.folder)
        self.log = Log(self.folder, self.saved)
        self.log.message(f"{title} on {self.device}, {distributed.world_size()} process(es), matrix products in "
                         f"{self.dtype}")
        self.data = 0  # tells the data of this run from others; the training sets it
        self.saved_at = time.monotonic()

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def save(self, stage, step, steps, best, model, optimizers):
        """Write the state after `step` of the `steps` of stage number `stage`. Every rank calls it; rank 0 writes.

        It holds the parameters that this stage trains. The others, above all the frozen CLIP, come from the file that
        the stage started from, and a number of each tells whether it is still the same file.
        """
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state()
        state = {
            "settings": asdict(self.settings),
            "stage": stage,
            "step": step,
            "steps": steps,
            "data": self.data,
            "best": best,
            "trained": {name: t.detach() for name, t in changed_by_training(model).items()},
            "frozen": first_values(model),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "random": distributed.gather_rows([random]),  # each rank has its own
            "log": self.log.state(),
        }
        if distributed.rank() == 0:
            path = self.folder / "state.pt"
            advice = "make room, then " + ("continue with --resume" if path.exists() else "start again")
            write_whole(path, lambda part: torch.save(state, part), advice)
        self.saved_at = time.monotonic()

    def restore(self, model, optimizers, steps):
        """Restore the trained parameters, optimizers and random numbers of the saved state -> (steps done, best
        accuracy).

        model: as its stage starts. steps: of the stage. Raises ValueError for a state of another number of processes,
        of other data or another file to start from.
        """
        state = self.saved
        if len(state["random"]) != distributed.world_size():
            raise ValueError(f"this run was trained by {len(state['random'])} process(es) and is resumed by "
                             f"{distributed.world_size()}; resume it with as many as before")
        trained = changed_by_training(model)
        if {name: p.shape for name, p in trained.items()} != {name: p.shape for name, p in state["trained"].items()}:
            raise ValueError("the state is of a model with other trained parameters; train again under another --name")
        if first_values(model) != state["frozen"]:
            raise ValueError("the weights file that this run started from has changed; restore it, or take another "
                             "--name")
        if (steps, self.data) != (state["steps"], state.get("data", self.data)):
            raise ValueError("the data are not those that this run began with; restore them, or take another --name")
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(state["trained"][name])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]  # its numbers are settings
            optimizer.load_state_dict(saved | {"param_groups": groups})
        random = state["random"][distributed.rank()]
        torch.set_rng_state(random["cpu"])
        if "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"])
        self.log.restart_clock()
        state["trained"] = state["optimizers"] = None  # as large as the model and more, and needed no longer
        return state["step"], state["best"]

    def save_is_due(self, end_of_epoch):
        """Whether it is time to save the state, the same on all ranks."""
        due = end_of_epoch or time.monotonic() - self.saved_at > 60 * self.settings.save_minutes
        return distributed.any_rank(due, self.device)
