"""Time, memory and energy: how the benchmarks measure them, and how they report."""

import ctypes
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from hivg.utils.charts import plot_panels

ROOT = Path(__file__).parents[2]
QUANTILES = (0.2, 0.5, 0.8)
WARM_UP = 3  # runs that do not count
RAPL = Path("/sys/class/powercap")  # Linux's energy counters of the processors


def measure(function, repeats, device=torch.device("cpu")):
    """Call the function `repeats` times after the warm-up -> milliseconds (20 %, median, 80 %)."""
    times = []
    for _ in range(WARM_UP + repeats):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1000 * (time.perf_counter() - start))
    return np.quantile(times[WARM_UP:], QUANTILES)


def show(name, times):
    low, median, high = times
    print(f"{name:<52}{median:9.1f} ms   ({low:.1f} to {high:.1f})", flush=True)


def table_row(cells):
    """A row of a Markdown table."""
    return "| " + " | ".join(map(str, cells)) + " |"


def table_head(columns):
    return table_row(columns) + "\n" + table_row("---" for _ in columns)


class Report:
    """What a long benchmark prints, saved at the end as FOLDER/NAME.md, with a chart, NAME.png."""

    def __init__(self, folder, name):
        self.path = Path(folder, name)
        self.path.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
        self.start = time.perf_counter()
        self.lines = []
        self.panels = {}  # {(y label, title): {curve: [(batch size, y)]}}

    def say(self, line):
        self.lines.append(line)
        print(line, flush=True)

    def draw(self, title, y_label, curve, batch_size, y):
        """Add a point to a curve of a panel."""
        self.panels.setdefault((y_label, title), {}).setdefault(curve, []).append((batch_size, y))

    def seconds(self):
        return time.perf_counter() - self.start

    def save(self):
        table = self.path.with_suffix(".md")
        chart = self.path.with_suffix(".png")
        table.write_text("\n".join(self.lines) + "\n")
        panels = []
        for (y_label, title), curves in self.panels.items():
            curves = {name: sorted(points) for name, points in curves.items()}
            panels.append({"title": title, "x_label": "batch size", "y_label": y_label, "curves": curves})
        plot_panels(sorted(panels, key=lambda panel: panel["y_label"]), chart)
        print(f"{table} and {chart}, in {self.seconds():.0f} s")


def memory(name):
    """A line of /proc/self/status in bytes: VmRSS is the memory in use, VmHWM its peak."""
    return 1024 * int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])


def reset_peak_memory(device):
    """Measure peak_memory from here on. On a CPU this needs Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Bytes at the peak since reset_peak_memory: of tensors on a GPU, of the whole process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory("VmHWM")


def energy(device):
    """Joules used so far by the GPU, or by all processors of the machine; None where that cannot be read."""
    if device.type == "cuda":
        return gpu_energy(torch.cuda.get_device_properties(device).uuid)
    try:
        # "psys" would include the packages
        packages = [d for d in RAPL.glob("intel-rapl:?") if (d / "name").read_text().startswith("package")]
        return sum(int((package / "energy_uj").read_text()) for package in packages) / 1e6 if packages else None
    except OSError:  # on many systems only root may read it
        return None


def gpu_energy(uuid):
    """Joules by the driver's library (NVML), which counts them since Volta."""
    handle = ctypes.c_void_p()
    millijoules = ctypes.c_ulonglong()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    failed = (nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(handle))
              or nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules)))
    return None if failed else millijoules.value / 1e3


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
    """Time and memory of a piece of code, run three times, each in a process of its own.

    imports, work: Python code, of which only `work` is measured; sys.argv[1] is the argument.
    -> milliseconds (20 %, median, 80 %), bytes at the peak of any run, beyond those in use before.
    """
    command = [sys.executable, "-c", ALONE.format(imports=imports, work=work), argument]
    runs = [[float(number) for number in run_program(command, cwd=ROOT).split()] for _ in range(3)]
    return np.quantile([milliseconds for milliseconds, _ in runs], QUANTILES), max(used for _, used in runs)
