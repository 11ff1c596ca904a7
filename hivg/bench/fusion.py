"""The fusion kernel on a GPU, beside plain PyTorch and torch.compile: python -m hivg.bench fusion --output FOLDER

Before a case is timed, its output and gradients are compared with float64's: the kernel's error may be at most twice
plain PyTorch's. Times are measured twice: with launches, as a program makes them, and in a CUDA graph, which leaves out
the CPU's work between kernels (and finds x in the cache if it fits). At small batch sizes the first is the CPU's time,
the second the GPU's. After LIMIT seconds the remaining cases are left out. FOLDER gets fusion.md and fusion.png.
"""

import time
from collections import namedtuple
from pathlib import Path

import torch
import triton
from triton.testing import do_bench, do_bench_cudagraph

from hivg.bench.timing import Report, peak_memory, product_rate, reset_peak_memory
from hivg.fusion import adaptive_fusion_reference
from hivg.fusion_triton import INTERPRETED, adaptive_fusion, count
from hivg.utils.cli import check_compile, choose_device

LIMIT = 270  # seconds
WAYS = ("eager", "compile", "ours")
SIZES = {"ViT-B": (512, 768), "ViT-L": (768, 1024)}  # D_t, D_v
# dtypes of x, w, g, c and of P, p, y
TYPES = {"bfloat16": (torch.bfloat16, torch.bfloat16), "autocast": (torch.float32, torch.bfloat16),
         "float32": (torch.float32, torch.float32)}
Case = namedtuple("Case", "size K T B types")
# the paper's settings for RefCOCOg first, then the largest, ViT-L, short expressions, and one image
CASES = [Case(*sizes, types) for sizes in (("ViT-B", 12, 77, 64), ("ViT-B", 12, 77, 256), ("ViT-L", 12, 77, 64),
                                           ("ViT-B", 2, 16, 64), ("ViT-B", 12, 77, 1), ("ViT-B", 1, 16, 1))
         for types in ("bfloat16", "autocast")] + [Case("ViT-B", 12, 77, 64, "float32")]


def make_tensors(case, device):
    """The arguments of adaptive_fusion, and dy. Under autocast all arguments are float32, as in training."""
    size, K, T, B, types = case
    D, DV = SIZES[size]
    x, P = TYPES[types]
    shapes = (K, B, T, D), (K, T, D), (DV, K * D), (DV,), (K, D), (K, D)
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=device).div_(shape[-1] ** 0.5).to(x).requires_grad_() for shape in shapes]
    return tensors, torch.randn(B, T, DV, device=device).to(P)


def passes_of(way, autocast, tensors, dy):
    """-> {pass: function}: "forward" gives the output, "both" the gradients of all tensors. autocast: to bfloat16?"""
    fuse = adaptive_fusion if way == "ours" else adaptive_fusion_reference
    if way == "compile":
        torch.compiler.reset()  # every case is compiled on its own, which takes most of the time
        fuse = torch.compile(fuse, dynamic=False)

    def output():
        with torch.autocast(dy.device.type, torch.bfloat16, enabled=autocast):
            return fuse(*tensors)

    return {"forward": torch.no_grad()(output), "both": lambda: torch.autograd.grad(output(), tensors, dy)}


def results(passes):
    """The output and all gradients."""
    return [passes["forward"](), *passes["both"]()]


def memory_of(function, device):
    """Peak MB of a call, beyond what is allocated before."""
    function()
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    reset_peak_memory(device)
    function()
    return (peak_memory(device) - before) / 1e6


def time_by_graph(function):
    """Median ms in a CUDA graph, or None if it cannot be captured."""
    try:
        return do_bench_cudagraph(function, rep=20, return_mode="median")
    except RuntimeError as error:
        print(f"no CUDA graph: {str(error).splitlines()[0]}", flush=True)
        return None


def measure_case(case, device, rates):
    """Yields the rows of the table, without the case's name. A wrong kernel is not timed."""
    size, K, T, B, types = case
    tensors, dy = make_tensors(case, device)
    _, P = TYPES[types]
    doubles = [v.detach().double().requires_grad_() for v in tensors]
    exact = results(passes_of("eager", False, doubles, dy.double()))
    operations = count(B, T, K, *SIZES[size])["operations"]
    for way in WAYS:
        passes = passes_of(way, types == "autocast", tensors, dy)
        errors = [((found - right).norm() / right.norm()).item() for found, right in zip(results(passes), exact)]
        if way == "eager":
            # half a unit of rounding is allowed in any case: plain PyTorch can be exact by luck
            allowed = [2 * error + torch.finfo(P).eps / 2 for error in errors]
        if way == "ours" and any(error > most for error, most in zip(errors, allowed)):
            yield "", way, f"WRONG: {max(errors):.1e}, allowed {max(allowed):.1e}", *[""] * 7
            return
        for name, function in passes.items():
            peak = memory_of(function, device)
            low, median, high = do_bench(function, warmup=10, rep=50, quantiles=[0.2, 0.5, 0.8])
            graph = time_by_graph(function)
            rate = operations * (3 if name == "both" else 1) / ((graph or median) / 1000)
            yield (name, way, f"{max(errors):.1e}", f"{low:.3f}", f"{median:.3f}", f"{high:.3f}",
                   f"{graph:.3f}" if graph else "", f"{peak:.1f}", f"{rate / 1e12:.0f}", f"{rate / rates[P]:.2f}")


def bench_fusion(args):
    """All cases: a table on stdout and in args.output, with charts. Raises ValueError where there is no GPU, and at the
    end if the kernel is wrong somewhere."""
    device = choose_device(args.device)
    if device.type != "cuda":
        raise ValueError("fusion needs a GPU, and PyTorch sees none; `python -m hivg.bench compile` works without")
    if INTERPRETED:
        raise ValueError("fusion cannot measure Triton's interpreter; unset TRITON_INTERPRET")
    check_compile(device, "leave this benchmark out")
    start = time.perf_counter()
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    rates = {dtype: product_rate(dtype, device) for dtype in (torch.bfloat16, torch.float32)}
    report = Report()
    report.say(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, Triton {triton.__version__}; a large "
               f"product: {rates[torch.bfloat16] / 1e12:.0f} TFLOP/s in bfloat16, {rates[torch.float32] / 1e12:.0f} in "
               "float32. TFLOP/s are those in the graph where there is one.")
    report.header("case", "pass", "way", "error", "20 % ms", "median ms", "80 % ms", "in a graph, ms", "peak MB",
                  "TFLOP/s", "of a large product")
    wrong = []
    for case in CASES:
        case_name = "{} K {} T {} B {} {}".format(*case)
        if time.perf_counter() - start > LIMIT:
            report.say(f"\n{case_name}: left out after {LIMIT} seconds")
            continue
        for row in measure_case(case, device, rates):
            report.row(case_name, *row)
            name, way, error, *times = row
            if error.startswith("WRONG"):
                wrong.append(case_name)
            elif (case.size, case.K) == ("ViT-B", 12) and case.types != "float32":
                curves = report.charts[f"{name}, {case.types}, ViT-B, K 12, T 77", "ms"]
                curves[way].append((case.B, float(times[3] or times[1])))
    report.save(folder, "fusion")
    if wrong:
        raise ValueError(f"the kernel's error is more than twice plain PyTorch's in {'; '.join(wrong)}")
