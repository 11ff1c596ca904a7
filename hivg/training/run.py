"""A run: what a training needs besides its model and data, whichever training it is."""

import time

import torch

from hivg.training import distributed
from hivg.training.checkpoint import open_run, save_state
from hivg.training.log import Log
from hivg.training.settings import RUNS
from hivg.utils.cli import choose_device, choose_dtype


class Run:
    """Its folder runs/NAME/, device, precision and log, and the state it resumes from, None for a new run."""

    def __init__(self, s, title):
        """s: RunSettings. title: how the first line of the log begins. Raises ValueError if the folder is in use."""
        self.settings = s
        self.folder = RUNS / s.name
        self.device = distributed.init(choose_device(s.device))
        self.dtype = choose_dtype(s.dtype, self.device)
        self.saved, self.lock = open_run(self.folder, s.resume)  # the lock is held as long as the run exists
        self.log = Log(self.folder, self.saved)
        self.log.message(f"{title} on {self.device}, {distributed.world_size()} process(es), matrix products in "
                         f"{self.dtype}")
        self.saved_at = time.monotonic()

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def save(self, stage, step, best, model, optimizers):
        """Write the state after `step` steps of stage number `stage`."""
        save_state(self.folder, self.settings, stage, step, best, model, optimizers, self.log)
        self.saved_at = time.monotonic()

    def save_is_due(self, end_of_epoch):
        """Whether it is time to save the state, the same on all ranks."""
        due = end_of_epoch or time.monotonic() - self.saved_at > 60 * self.settings.save_minutes
        return distributed.any_rank(due, self.device)
