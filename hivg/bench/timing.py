"""Time, memory, and the tables that show them: what the benchmarks share."""

import math
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from hivg.utils.charts import plot_panels
from hivg.utils.files import write_whole

ROOT = Path(__file__).parents[2]
QUANTILES = (0.2, 0.5, 0.8)
WARM_UP = 3  # calls before the measured ones
CPU = torch.device("cpu")
STATUS = Path("/proc/self/status")  # on Linux


def measure(function, repeats, device=CPU, clock=time.perf_counter):
    """Call the function `repeats` times after WARM_UP -> milliseconds (20 %, median, 80 %). clock: time.process_time
    for this process's CPU time."""
    times = []
    for _ in range(WARM_UP + repeats):
        start = clock()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (clock() - start))
    return np.quantile(times[WARM_UP:], QUANTILES)


def product_rate(dtype, device):
    """Operations per second of one large matrix product: the most to expect of this machine."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    _, median, _ = measure(lambda: a @ a, 5, device)
    return 2 * n**3 / (median / 1000)


def memory(name):
    """A line of /proc/self/status in bytes: VmRSS is the memory in use, VmHWM its peak; nan where it is not Linux."""
    if not STATUS.exists():
        return math.nan
    return 1024 * int(re.search(name + r":\s+(\d+)", STATUS.read_text())[1])


def reset_peak_memory(device):
    """Start a new peak_memory. On a CPU this needs Linux, as that does."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5")


def peak_memory(device):
    """Peak memory in bytes since reset_peak_memory: of tensors on a GPU, of the whole process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory("VmHWM")


def run_program(command, cwd=None):
    """Run a command -> its stdout. Raises ValueError with the last line of its stderr if it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"{command[0]} ended with {done.returncode}"]
        raise ValueError(lines[-1].removeprefix("error: "))
    return done.stdout


ALONE = """
import sys, time
from hivg.bench.timing import memory
{imports}
before = memory("VmRSS")
start = time.perf_counter()
{work}
print(1000 * (time.perf_counter() - start), memory("VmHWM") - before)
"""


def measure_alone(imports, work, argument):
    """Time and memory of a piece of code in a new process, three times.

    imports, work: Python, of which only `work` is measured; it finds the argument as sys.argv[1].
    -> milliseconds (20 %, median, 80 %), the largest peak in bytes.
    """
    command = [sys.executable, "-c", ALONE.format(imports=imports, work=work), argument]
    runs = [run_program(command, cwd=ROOT).split() for _ in range(3)]
    times, peaks = np.array(runs, float).T
    return np.quantile(times, QUANTILES), peaks.max()


# ---- output

def show(name, times):
    low, median, high = times
    print(f"{name:<52}{median:9.1f} ms   ({low:.1f} to {high:.1f})", flush=True)


class Report:
    """Text and tables in Markdown, printed as they come, and charts of what is in `charts`; `save` writes both."""

    def __init__(self):
        self.lines = []
        self.charts = defaultdict(lambda: defaultdict(list))  # {(title, y label): {curve: [(batch size, y)]}}

    def say(self, line):
        self.lines.append(line)
        print(line, flush=True)

    def row(self, *cells):
        self.say(f"| {' | '.join(map(str, cells))} |")

    def header(self, *columns):
        self.say("")
        self.row(*columns)
        self.say("| --- " * len(columns) + "|")

    def save(self, folder, name):
        """FOLDER/NAME.md and, of the charts, FOLDER/NAME.png."""
        write_whole(folder / f"{name}.md", lambda part: part.write_text("\n".join(self.lines) + "\n"))
        panels = []
        for (title, y_label), curves in self.charts.items():
            curves = {curve: sorted(points) for curve, points in curves.items()}
            panels.append(dict(title=title, x_label="batch size", y_label=y_label, curves=curves))
        plot_panels(panels, folder / f"{name}.png")
        print(f"{folder / name}.md and {folder / name}.png")

