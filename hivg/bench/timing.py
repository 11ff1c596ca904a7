"""Time and memory: how the benchmarks measure and print them."""

import ctypes
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
QUANTILES = (0.2, 0.5, 0.8)
WARM_UP = 3  # runs that are not counted
RAPL = Path("/sys/class/powercap")  # where Linux counts the energy of the processors


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
    """A line of /proc/self/status in bytes: VmRSS is the memory in use, VmHWM the most that was."""
    return 1024 * int(re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())[1])


def reset_peak_memory(device):
    """Let peak_memory count from here. Linux alone, on the CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """The most bytes since reset_peak_memory: those of tensors on a GPU, of the whole process on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else memory("VmHWM")


def energy(device):
    """Joules used so far by the GPU, or by all processors of the machine; None where the machine does not tell."""
    if device.type == "cuda":
        return gpu_energy(torch.cuda.get_device_properties(device).uuid)
    packages = []
    try:
        for domain in RAPL.glob("intel-rapl:?"):
            if (domain / "name").read_text().startswith("package"):  # "psys" has the packages and more
                packages.append(int((domain / "energy_uj").read_text()))
    except OSError:  # many systems show it to root alone
        return None
    return sum(packages) / 1e6 if packages else None


def gpu_energy(uuid):
    """The same of a GPU, from the driver's library (NVML), which counts it from Volta on."""
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
    """Time and memory of a piece of code, run three times in a process of its own, so that nothing else counts.

    imports, work: Python, of which only `work` is measured; it finds the argument as sys.argv[1].
    -> milliseconds (20 %, median, 80 %), the most bytes that any run took.
    """
    command = [sys.executable, "-c", ALONE.format(imports=imports, work=work), argument]
    times = []
    most = 0
    for _ in range(3):
        milliseconds, used = map(float, run_program(command, cwd=ROOT).split())
        times.append(milliseconds)
        most = max(most, used)
    return np.quantile(times, QUANTILES), most
