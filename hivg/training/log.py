"""The progress of a run: log.jsonl, lines on stderr, curves.png."""

import json
import math
import os
import sys
import time
from functools import cached_property

from hivg.training import distributed
from hivg.utils.charts import plot_panels
from hivg.utils.files import write_whole, written

LOG_STEPS = 50  # steps to a line
NO_PARTS = {"stage", "step", "lr", "loss", "gradient_norm", "meant"}  # of a row of steps; the others add up to the loss


class Log:
    """log.jsonl: a line every 50 steps (means since the last line) and one for every epoch; the same on stderr; and
    curves.png, drawn from it. Only the first rank writes; on the others every call does nothing."""

    def __init__(self, run, saved=None):
        """run: the folder of the run. saved: the saved state that the run resumes from, or None."""
        self.run = run
        self.is_writer = distributed.rank() == 0
        self.levels = {}  # {name: the accuracy of guessing so}, drawn beside the model's
        self.clear()
        if self.is_writer:
            run.mkdir(parents=True, exist_ok=True)
            if saved:
                self.sums, self.n = saved["log"]["sums"], saved["log"]["n"]
                self.cut(saved["log"]["bytes"])
        self.mode = "a" if saved else "w"

    @cached_property
    def file(self):
        """log.jsonl, opened for its first row: a command that is refused before leaves an older log as it is."""
        return open(self.run / "log.jsonl", self.mode)

    def cut(self, n_bytes):
        """Keep the rows of the first n_bytes of log.jsonl: the steps after the saved state will be run, and logged,
        again. A row that is lost or damaged is told; the training needs none."""
        path = self.run / "log.jsonl"
        lines = path.read_bytes()[:n_bytes].split(b"\n") if path.exists() else []
        rows = b"".join(line + b"\n" for line in lines if is_row(line))
        if len(rows) != n_bytes:
            self.message(f"{path}: not as the saved state left it; what can be read is kept, {len(rows):,} of "
                         f"{n_bytes:,} bytes, and the training itself continues unchanged")
        write_whole(path, lambda part: part.write_bytes(rows))

    def clear(self):
        """Start the means of the next line."""
        self.sums = {}
        self.n = 0
        self.restart_clock()

    def restart_clock(self):
        self.start = time.monotonic()
        self.timed = 0  # steps since then

    def state(self):
        """All that a resumed run needs to log the same lines."""
        if not self.is_writer:
            return None
        with written(self.run / "log.jsonl"):
            os.fsync(self.file.fileno())  # before the state that counts on it
        sums = {name: float(total) for name, total in self.sums.items()}
        return {"bytes": self.file.tell(), "sums": sums, "n": self.n}

    def message(self, text):
        """A line or several on stderr."""
        if self.is_writer:
            print(text, file=sys.stderr)

    def write(self, row):
        with written(self.run / "log.jsonl"):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def step(self, stage, step, steps, lr, values):
        """Log step `step` (from 1) of `steps`. values: {name: scalar tensor}."""
        if not self.is_writer:
            return
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()  # on its device: nothing waits here
        self.n += 1
        self.timed += 1
        if step % LOG_STEPS == 0 or step == steps:
            means = {name: round(float(total) / self.n, 5) for name, total in self.sums.items()}
            self.write({"stage": stage, "step": step, "lr": lr, **means})
            seconds = (time.monotonic() - self.start) / self.timed
            minutes_left = (steps - step) * seconds / 60
            self.message(f"{stage} step {step}/{steps}, loss {means['loss']:.3f}, {seconds:.2f} s a step, "
                         f"{minutes_left:.0f} min left in the stage")
            self.clear()

    def epoch(self, stage, step, epoch, scores, best):
        """Log the validation after an epoch. scores: {name: number}."""
        if not self.is_writer:
            return
        self.write({"stage": stage, "step": step, "epoch": epoch, **scores, "best": best})
        self.message(f"{stage} epoch {epoch}: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
        self.draw()
        self.restart_clock()  # the validation is not part of a step's time

    def draw(self):
        """curves.png from log.jsonl, the stages one after another and each with lines of its own. A mean of steps is
        drawn in the middle of these."""
        loss, parts, accuracy, lr = {}, {}, {}, {}  # {name: points} of each panel
        boundaries = []  # (step at which it starts, stage)
        start = last = 0  # of the stage: the steps before it, and the last step seen
        for line in (self.run / "log.jsonl").read_text().splitlines():
            row = json.loads(line)
            if not boundaries or row["stage"] != boundaries[-1][1]:
                start += last
                averaged = 0  # steps of the stage whose means are drawn
                boundaries.append((start, row["stage"]))
                for points in [*loss.values(), *parts.values(), *accuracy.values(), *lr.values()]:
                    points.append((start, math.nan))  # a gap
            last = row["step"]
            for name, curves in (("accuracy", accuracy), ("lr", lr)):
                if name in row:
                    curves.setdefault(name, []).append((start + last, row[name]))
            if "loss" in row:
                middle = start + (averaged + last) / 2
                averaged = last
                loss.setdefault("loss", []).append((middle, row["loss"]))
                for name, value in row.items():
                    if name not in NO_PARTS:
                        parts.setdefault(name, []).append((middle, value))
        parts = dict(sorted(parts.items(), key=lambda item: -item[1][0][1]))  # the largest first
        panels = [
            {"title": "Training loss", "curves": loss},
            {"title": "Its parts, weighted, on a logarithmic axis", "curves": parts, "log": True},
            {"title": "Accuracy on val", "curves": accuracy, "levels": self.levels},
            {"title": "Learning rate", "curves": lr, "x_label": "step, in all"},
        ]
        plot_panels([{"boundaries": boundaries, **panel} for panel in panels if panel["curves"]],
                    self.run / "curves.png")


def is_row(line):
    """Whether a line of log.jsonl, bytes, is a row that can be drawn: a stage, and numbers."""
    try:
        numbers = json.loads(line)
        return isinstance(numbers.pop("stage"), str) and "step" in numbers and all(
            isinstance(number, int | float) for number in numbers.values())
    except (ValueError, TypeError, AttributeError, KeyError):
        return False
