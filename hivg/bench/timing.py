"""How the benchmarks measure and print time and memory."""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
QUANTILES = (0.2, 0.5, 0.8)
WARM_UP = 3  # runs that do not count


def measure(function, repeats, device=torch.device("cpu")):
    """Call the function `repeats` times after WARM_UP -> milliseconds (20 %, median, 80 %)."""
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


def memory(name):
    """A line of /proc/self/status in bytes: VmRSS is the memory in use, VmHWM its peak."""
    return 1024 * int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])


def reset_peak_memory(device):
    """Let peak_memory count from here. For the CPU on Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Peak bytes since reset_peak_memory: of tensors on a GPU, of the whole process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory("VmHWM")


def run_program(command, cwd=None):
    """Run a command -> what it prints. Raises ValueError with the last line of its stderr if it fails."""
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
    """Time and memory of a piece of code, run three times in processes of their own, so that nothing else counts.

    imports, work: Python; only `work` is measured. It finds the argument as sys.argv[1].
    -> milliseconds (20 %, median, 80 %), the peak bytes of all runs.
    """
    command = [sys.executable, "-c", ALONE.format(imports=imports, work=work), argument]
    times = []
    most = 0
    for _ in range(3):
        milliseconds, used = map(float, run_program(command, cwd=ROOT).split())
        times.append(milliseconds)
        most = max(most, used)
    return np.quantile(times, QUANTILES), most
