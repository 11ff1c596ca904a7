"""The fusion kernel on a GPU, beside plain PyTorch and torch.compile: python -m hivg.bench fusion --output FOLDER

For each of CASES and each way to compute it: is it right (output and gradients, against float64; an error of more than
twice plain PyTorch's ends the row), and how long does it take? Times come in two kinds: with launches, as a program
makes them, and by CUDA graphs, without what the CPU does in between. At a small batch the first is the CPU's time, the
second the GPU's. It stops after LIMIT seconds and says what is left out. FOLDER gets fusion.md, the table, and
fusion.png.
"""

import time
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.testing import do_bench, do_bench_cudagraph

from hivg.bench.compile import TYPES
from hivg.bench.timing import peak_memory, reset_peak_memory
from hivg.fusion import adaptive_fusion_reference
from hivg.fusion_triton import INTERPRETED, adaptive_fusion, count
from hivg.utils.charts import plot_panels

LIMIT = 270  # seconds, less than five minutes with what is under way
WAYS = ("eager", "compile", "ours")
COLUMNS = ("case", "pass", "way", "error", "20 % ms", "median ms", "80 % ms", "by graph, ms", "peak MB", "TFLOP/s",
           "of the product rate")
SIZES = {"ViT-B": (512, 768), "ViT-L": (768, 1024)}  # D_t, D_v


class Case(NamedTuple):
    size: str
    K: int
    T: int
    B: int
    types: str

    def __str__(self):
        return f"{self.size} K {self.K} T {self.T} B {self.B} {self.types}"


# the paper's settings for RefCOCOg first, then the largest, ViT-L, short expressions, and one image
CASES = [Case(*sizes, types) for sizes in (("ViT-B", 12, 77, 64), ("ViT-B", 12, 77, 256), ("ViT-L", 12, 77, 64),
                                           ("ViT-B", 2, 16, 64), ("ViT-B", 12, 77, 1), ("ViT-B", 1, 16, 1))
         for types in ("bfloat16", "autocast")] + [Case("ViT-B", 12, 77, 64, "float32")]


def make_tensors(case, device):
    """The arguments of adaptive_fusion, and dy. Under autocast all are float32, as in training."""
    D, DV = SIZES[case.size]
    x, P = TYPES[case.types]
    K = case.K
    B = case.B
    T = case.T
    shapes = (K, B, T, D), (K, T, D), (DV, K * D), (DV,), (K, D), (K, D)
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=device).div_(shape[-1] ** 0.5).to(x).requires_grad_() for shape in shapes]
    return tensors, torch.randn(B, T, DV, device=device).to(P)


class Run:
    """One way to compute a case."""

    def __init__(self, way, case, tensors, dy):
        self.function = adaptive_fusion if way == "ours" else adaptive_fusion_reference
        if way == "compile":
            torch.compiler.reset()  # each case compiled for itself, which takes most of the benchmark's time
            self.function = torch.compile(self.function, dynamic=False)
        self.autocast = case.types == "autocast"
        self.tensors = tensors
        self.dy = dy

    def output(self):
        with torch.autocast(self.dy.device.type, torch.bfloat16, enabled=self.autocast):
            return self.function(*self.tensors)

    def forward(self):
        with torch.no_grad():
            return self.output()

    def both(self):
        return torch.autograd.grad(self.output(), self.tensors, self.dy)


def distances(run, exact):
    """Of the output and each gradient from the exact ones, as shares of their norms."""
    found = [run.forward(), *run.both()]
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact)]


def exact_results(tensors, dy):
    tensors = [v.detach().double().requires_grad_() for v in tensors]
    y = adaptive_fusion_reference(*tensors)
    return [y.detach(), *torch.autograd.grad(y, tensors, dy.double())]


def memory_of(function, device):
    """MB that a call needs at most, beside what is there before it."""
    function()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    reset_peak_memory(device)
    function()
    return (peak_memory(device) - before) / 1e6


def time_by_graph(function):
    """Median ms in a CUDA graph, or None where it cannot be captured."""
    try:
        return do_bench_cudagraph(function, rep=20, return_mode="median")
    except RuntimeError as error:
        print(f"no CUDA graph: {str(error).splitlines()[0]}", flush=True)
        return None


def product_rate(dtype, device):
    """TFLOP/s of a large plain product, timed as the kernel is: what it could reach at best."""
    a = torch.randn(8192, 8192, device=device, dtype=dtype)
    return 2 * 8192**3 / do_bench(lambda: a @ a, return_mode="median") / 1e9


def copy_rate(device):
    """GB/s of a large copy, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / do_bench(lambda: target.copy_(source), return_mode="median") / 1e6


def measure_case(case, device, rates):
    """-> rows of the table, one for each way and pass, and whether all were right."""
    tensors, dy = make_tensors(case, device)
    _, P = TYPES[case.types]
    exact = exact_results(tensors, dy)
    operations = count(case.B, case.T, case.K, *SIZES[case.size])["operations"] / 1e9
    rows = []
    right = True
    for way in WAYS:
        run = Run(way, case, tensors, dy)
        found = distances(run, exact)
        if way == "eager":
            plain = found
        # half a unit of rounding is allowed to all: plain PyTorch can be exact by luck
        allowed = [2 * error + torch.finfo(P).eps / 2 for error in plain]
        if way == "ours" and any(error > most for error, most in zip(found, allowed)):
            right = False
            rows.append([str(case), "", way, f"WRONG {max(found):.1e}, plain PyTorch {max(plain):.1e}"])
            continue
        for name, function, share in (("forward", run.forward, 1), ("both", run.both, 3)):
            peak = memory_of(function, device)
            low, median, high = do_bench(function, warmup=10, rep=50, quantiles=[0.2, 0.5, 0.8])
            graph = time_by_graph(function)
            rate = share * operations / (graph or median)
            rows.append([str(case), name, way, f"{max(found):.1e}", low, median, high, graph, f"{peak:.1f}",
                         f"{rate:.0f}", f"{rate / rates[P]:.2f}"])
    return rows, right


def text_of(row):
    cells = ["" if v is None else f"{v:.3f}" if isinstance(v, float) else v for v in row]
    return "| " + " | ".join(cells + [""] * (len(COLUMNS) - len(cells))) + " |"


def draw(rows, path):
    """ms by batch size, ViT-B with 12 layers of 77 positions: a panel for each pass and types."""
    panels = []
    for types in ("bfloat16", "autocast"):
        for name in ("forward", "both"):
            curves = {way: [] for way in WAYS}
            for case in CASES:
                for row in rows:
                    wanted = case.size == "ViT-B" and case.K == 12 and case.types == types
                    if wanted and row[:2] == [str(case), name]:
                        curves[row[2]].append((case.B, row[7] or row[5]))
            panels.append({"title": f"{name}, {types}, ViT-B, K 12, T 77", "x_label": "batch", "y_label": "ms",
                           "curves": {way: sorted(curve) for way, curve in curves.items()}})
    plot_panels(panels, path)


def bench_fusion(device, output):
    """All cases: a table on stdout and in the folder `output`, with a chart. Raises ValueError where there is no GPU,
    and at the end if ours is wrong somewhere."""
    if device.type != "cuda":
        raise ValueError("the fusion kernel is measured on a GPU, and PyTorch sees none here")
    if INTERPRETED:
        raise ValueError("under Triton's interpreter there is nothing to measure; unset TRITON_INTERPRET")
    start = time.perf_counter()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    name = torch.cuda.get_device_name(device)
    rates = {dtype: product_rate(dtype, device) for dtype in (torch.bfloat16, torch.float32)}
    lines = [f"{name}, torch {torch.__version__}, Triton {triton.__version__}; a large copy: {copy_rate(device):.0f} "
             f"GB/s; a large product: {rates[torch.bfloat16]:.0f} TFLOP/s in bfloat16, {rates[torch.float32]:.0f} in "
             "float32. Quantiles with launches; TFLOP/s by graph where there is one.", "",
             "| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
    print("\n".join(lines), flush=True)
    measured = []
    wrong = []
    for case in CASES:
        if time.perf_counter() - start > LIMIT:
            lines.append(f"\n{case}: left out, {LIMIT} seconds had passed.")
            print(lines[-1], flush=True)
            continue
        rows, right = measure_case(case, device, rates)
        if not right:
            wrong.append(str(case))
        measured += rows
        lines += [text_of(row) for row in rows]
        print("\n".join(text_of(row) for row in rows), flush=True)
    (folder / "fusion.md").write_text("\n".join(lines) + "\n")
    draw(measured, folder / "fusion.png")
    print(f"{folder / 'fusion.md'} and {folder / 'fusion.png'}, in {time.perf_counter() - start:.0f} s")
    if wrong:
        raise ValueError("the kernel is further from the exact result than twice plain PyTorch in " + "; ".join(wrong))
