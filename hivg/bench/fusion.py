"""The fusion kernel on a GPU, against plain PyTorch and torch.compile: python -m hivg.bench fusion --output FOLDER

First whether output and gradients are right, against float64 (an error of more than twice plain PyTorch's ends the
row), then time and memory. Time is measured with launches, as in a program, and as a CUDA graph, without the CPU's work
between kernels and with x in the cache if it fits: at small batch sizes the first is the CPU's time, the second the
GPU's. After LIMIT seconds no new case is begun. FOLDER gets fusion.md, the table, and fusion.png.
"""

import torch
import triton
from triton.testing import do_bench, do_bench_cudagraph

from hivg.bench.compile import DTYPES
from hivg.bench.timing import Report, peak_memory, reset_peak_memory, table_head, table_row
from hivg.fusion import adaptive_fusion_reference
from hivg.fusion_triton import INTERPRETED, adaptive_fusion, count

LIMIT = 270  # seconds: with the case under way, less than five minutes
SIZES = {"ViT-B": (512, 768), "ViT-L": (768, 1024)}  # D_t, D_v
WAYS = ("eager", "compile", "ours")
COLUMNS = ("case", "pass", "way", "error", "20 % ms", "median ms", "80 % ms", "graph ms", "peak MB", "TFLOP/s",
           "of a large product")


# CLIP, text layers K, positions T, batch size B and dtypes: the paper's settings for RefCOCOg first, then the largest,
# ViT-L, short expressions, and one image
SHAPES = (("ViT-B", 12, 77, 64), ("ViT-B", 12, 77, 256), ("ViT-L", 12, 77, 64), ("ViT-B", 2, 16, 64),
          ("ViT-B", 12, 77, 1), ("ViT-B", 1, 16, 1))
CASES = [(*shape, dtypes) for shape in SHAPES for dtypes in ("bfloat16", "autocast")] + [(*SHAPES[0], "float32")]


def label(case):
    return "{} K {} T {} B {} {}".format(*case)


def make_tensors(case, device):
    """The arguments of adaptive_fusion, and dy. Under autocast the arguments are float32, as in training."""
    size, K, T, B, dtypes = case
    D, DV = SIZES[size]
    x, P = DTYPES[dtypes]
    shapes = (K, B, T, D), (K, T, D), (DV, K * D), (DV,), (K, D), (K, D)
    torch.manual_seed(0)
    tensors = [torch.randn(shape, device=device).div_(shape[-1] ** 0.5).to(x).requires_grad_() for shape in shapes]
    return tensors, torch.randn(B, T, DV, device=device).to(P)


def passes_of(way, case, tensors, dy):
    """-> two functions without arguments: the forward, and forward and backward."""
    fuse = adaptive_fusion if way == "ours" else adaptive_fusion_reference
    if way == "compile":
        torch.compiler.reset()  # compiled for this case alone, which takes most of the benchmark's time
        fuse = torch.compile(fuse, dynamic=False)

    def output():
        with torch.autocast(dy.device.type, torch.bfloat16, enabled=case[-1] == "autocast"):
            return fuse(*tensors)

    return torch.no_grad()(output), lambda: torch.autograd.grad(output(), tensors, dy)


def memory_of(function, device):
    """MB that a call needs at its peak, beyond those in use before."""
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
    """TFLOP/s of a large matrix product, timed as the kernel is: the most that it could reach."""
    a = torch.randn(8192, 8192, device=device, dtype=dtype)
    return 2 * 8192**3 / do_bench(lambda: a @ a, return_mode="median") / 1e9


def copy_rate(device):
    """GB/s of a large copy, reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / do_bench(lambda: target.copy_(source), return_mode="median") / 1e6


def measure_case(case, device, rates, report):
    """Report a case -> whether the kernel is right."""
    size, K, T, B, dtypes = case
    tensors, dy = make_tensors(case, device)
    _, P = DTYPES[dtypes]
    doubles = [v.detach().double().requires_grad_() for v in tensors]
    y = adaptive_fusion_reference(*doubles)
    exact = [y.detach(), *torch.autograd.grad(y, doubles, dy.double())]
    operations = count(B, T, K, *SIZES[size])["operations"] / 1e9
    for way in WAYS:
        forward, both = passes_of(way, case, tensors, dy)
        # distances of the output and of each gradient from the exact ones, as shares of their norms
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip([forward(), *both()], exact)]
        if way == "eager":
            plain = errors
        # half a unit of rounding is allowed to all: plain PyTorch can be exact by luck
        elif way == "ours" and any(ours > 2 * own + torch.finfo(P).eps / 2 for ours, own in zip(errors, plain)):
            told = f"WRONG {max(errors):.1e}, plain PyTorch {max(plain):.1e}"
            report.say(table_row([label(case), "", way, told, *[""] * (len(COLUMNS) - 4)]))
            return False  # ours is the last way
        for name, function, share in (("forward", forward, 1), ("both", both, 3)):
            peak = memory_of(function, device)
            times = do_bench(function, warmup=10, rep=50, quantiles=[0.2, 0.5, 0.8])
            graph = time_by_graph(function)
            best = graph or times[1]
            rate = share * operations / best
            report.say(table_row([label(case), name, way, f"{max(errors):.1e}", *(f"{ms:.3f}" for ms in times),
                                  f"{graph:.3f}" if graph else "", f"{peak:.1f}", f"{rate:.0f}",
                                  f"{rate / rates[P]:.2f}"]))
            if size == "ViT-B" and K == 12 and dtypes != "float32":
                report.draw(f"{name}, {dtypes}, ViT-B, K 12, T {T}", "ms", way, B, best)
    return True


def bench_fusion(device, output):
    """All cases: a table on stdout and in the folder `output`, with a chart. Raises ValueError where there is no GPU,
    and at the end if ours is wrong somewhere."""
    if device.type != "cuda":
        raise ValueError("the fusion kernel is measured on a GPU, and PyTorch sees none here; "
                         "`python -m hivg.bench compile` needs none")
    if INTERPRETED:
        raise ValueError("under Triton's interpreter there is nothing to measure; unset TRITON_INTERPRET")
    report = Report(output, "fusion")
    rates = {dtype: product_rate(dtype, device) for dtype in (torch.bfloat16, torch.float32)}
    report.say(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, Triton {triton.__version__}. A large "
               f"copy: {copy_rate(device):.0f} GB/s; a large product: {rates[torch.bfloat16]:.0f} TFLOP/s in bfloat16, "
               f"{rates[torch.float32]:.0f} in float32. Quantiles include launches; TFLOP/s are by graph if possible\n")
    report.say(table_head(COLUMNS))
    wrong = []
    for case in CASES:
        if report.seconds() > LIMIT:
            report.say(f"\n{label(case)}: left out, {LIMIT} seconds had passed.")
            continue
        if not measure_case(case, device, rates, report):
            wrong.append(label(case))
    report.save()
    if wrong:
        raise ValueError("the kernel is further from the exact result than twice plain PyTorch in " + "; ".join(wrong))
