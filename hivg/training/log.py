"""What a training run writes of its progress: log.jsonl, lines on stderr, curves.png."""

import json
import sys
import time

from hivg.utils.charts import plot_panels


class Log:
    """log.jsonl: a line every 50 steps (means since the last) and one for every epoch; the same on stderr; and
    curves.png, drawn from it."""

    def __init__(self, run, n_bytes):
        run.mkdir(parents=True, exist_ok=True)
        self.run, self.file = run, open(run / "log.jsonl", "r+" if n_bytes else "w")
        self.file.truncate(n_bytes)  # what a killed run logged after its last state will be run again
        self.file.seek(n_bytes)
        self.restart()

    def restart(self, sums=None, n=0):
        self.sums, self.n, self.start, self.timed = sums or {}, n, time.monotonic(), 0

    def state(self):
        """What a resumed run needs to log the same lines."""
        return {"bytes": self.file.tell(), "sums": self.sums, "n": self.n}

    def write(self, row):
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()

    def step(self, stage, step, steps, lr, values):
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.item()
        self.n, self.timed = self.n + 1, self.timed + 1
        if step % 50 == 0 or step == steps:
            means = {k: round(v / self.n, 5) for k, v in self.sums.items()}
            self.write({"stage": stage, "step": step, "lr": lr, **means})
            seconds = (time.monotonic() - self.start) / self.timed
            print(f"{stage} step {step}/{steps}, loss {means['loss']:.3f}, {seconds:.2f} s a step, "
                  f"{(steps - step) * seconds / 60:.0f} min left in the stage", file=sys.stderr)
            self.restart()

    def epoch(self, stage, step, epoch, scores, best):
        self.write({"stage": stage, "step": step, "epoch": epoch, **scores, "best": best})
        print(f"{stage} epoch {epoch}: " + ", ".join(f"{k} {v:.4f}" for k, v in scores.items()), file=sys.stderr)
        self.draw()
        self.start, self.timed = time.monotonic(), 0  # the validation is not part of a step's time

    def draw(self):
        panels, boundaries, offset, stage, last = {}, [], 0, None, 0
        for line in (self.run / "log.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["stage"] != stage:
                offset, stage = offset + last, row["stage"]
                boundaries.append((offset, stage))
            last = row["step"]
            for name in ("loss", "accuracy", "lr"):
                if name in row:
                    panels.setdefault(name, []).append((offset + last, row[name]))
        titles = {"loss": "Training loss", "accuracy": "Accuracy on val", "lr": "Learning rate"}
        plot_panels([{"curves": {name: points}, "title": titles[name], "x_label": "step", "boundaries": boundaries}
                     for name, points in panels.items()], self.run / "curves.png")
