"""The fusion kernel: its benchmark, `python -m hivg.bench fusion`, and what it compiles to, `python -m hivg.bench
compile`.
"""

import subprocess
import tempfile
from itertools import product
from pathlib import Path

import torch

from hivg.fusion import adaptive_fusion_reference
from hivg.utils.charts import plot_panels

SIZES = {"ViT-B": (512, 768), "ViT-L": (768, 1024)}  # D_t, D_v
LAYERS, POSITIONS, BATCHES = (1, 2, 12), (16, 77), (1, 16, 64, 256)


def tensors(K, B, T, D, DV, dtype, device):
    shapes = (K, B, T, D), (K, T, D), (DV, K * D), (DV,), (K, D), (K, D)
    return [torch.randn(shape, device=device, dtype=dtype).div_(shape[-1] ** 0.5).requires_grad_() for shape in shapes]


def roofs(dtype, device):
    """What this device does at best, measured now: GB/s of a large copy, TFLOP/s of a large product."""
    from triton.testing import do_bench
    source = torch.empty(2**28, dtype=torch.uint8, device=device)
    target, a = torch.empty_like(source), torch.randn(8192, 8192, device=device, dtype=dtype)
    return 2 * source.nbytes / do_bench(lambda: target.copy_(source)) / 1e6, 2 * 8192**3 / do_bench(lambda: a @ a) / 1e9


def bench_fusion(device):
    """Eager, torch.compile and ours at all sizes: a table on stdout and fusion.png. Raises ValueError where there is no
    GPU."""
    if device.type != "cuda":
        raise ValueError("the fusion kernel is measured on a GPU; this machine has none that PyTorch sees")
    from triton.testing import do_bench

    from hivg.fusion_triton import adaptive_fusion, count
    curves = {"eager": [], "compile": [], "ours": []}
    print("| size | K | T | batch | type | pass | way | 20 % ms | median ms | 80 % ms | peak MB | GB/s | TFLOP/s "
          "| of roof |")
    print("| --- " * 14 + "|")
    for dtype in (torch.bfloat16, torch.float32):
        copy, products = roofs(dtype, device)
        print(f"roof in {dtype}: {copy:.0f} GB/s, {products:.1f} TFLOP/s", flush=True)
        for (name, (D, DV)), K, T, B in product(SIZES.items(), LAYERS, POSITIONS, BATCHES):
            inputs = tensors(K, B, T, D, DV, dtype, device)
            dy = torch.randn(B, T, DV, device=device, dtype=dtype)
            counted = count(B, T, K, D, DV, dy.element_size())
            torch.compiler.reset()  # each size compiled for itself, which takes most of the benchmark's time
            for way, f in (("eager", adaptive_fusion_reference), ("ours", adaptive_fusion),
                           ("compile", torch.compile(adaptive_fusion_reference, dynamic=False))):
                y = f(*inputs)
                passes = {"forward": (lambda: f(*inputs), 1),
                          "backward": (lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True), 2),
                          "both": (lambda: torch.autograd.grad(f(*inputs), inputs, dy), 3)}
                for what, (run, share) in passes.items():
                    with torch.set_grad_enabled(what != "forward"):
                        run()
                        torch.cuda.synchronize(device)
                        before = torch.cuda.memory_allocated(device)
                        torch.cuda.reset_peak_memory_stats(device)
                        run()
                        peak = (torch.cuda.max_memory_allocated(device) - before) / 1e6
                        low, median, high = do_bench(run, quantiles=[0.2, 0.5, 0.8])
                    bytes_ = share * sum(v for k, v in counted.items() if k != "operations") / median / 1e6
                    flops = share * counted["operations"] / median / 1e9
                    best = max(bytes_ / copy, flops / products)
                    print(f"| {name} | {K} | {T} | {B} | {str(dtype)[6:]} | {what} | {way} | {low:.3f} | "
                          f"{median:.3f} | {high:.3f} | {peak:.1f} | {bytes_:.0f} | {flops:.1f} | {best:.2f} |",
                          flush=True)
                    if (name, K, T, dtype, what) == ("ViT-B", 12, 77, torch.bfloat16, "both"):
                        curves[way].append((B, median))
    plot_panels([{"title": "forward and backward, ViT-B, K 12, T 77, bfloat16", "curves": curves, "x_label": "batch",
                  "y_label": "ms"}], "fusion.png")
    print("drawn in fusion.png")


def bench_compile():
    """Registers, shared memory and spills of every kernel with a type and size, for compute capability 80 and 90: needs
    Triton, no GPU."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hivg import fusion_triton as kernels
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    print("| kernel | type | norm | compute capability | registers | stack (spills) | shared memory, bytes |")
    print("| --- " * 7 + "|")
    for name, (kind, triton_type), norm, capability in product(
            ("forward", "statistics", "proj", "weights", "states"), (("bf16", tl.bfloat16), ("fp32", tl.float32)),
            (True, False), (80, 90)):
        if name == "statistics" and not norm:
            continue
        kernel = getattr(kernels, f"{name}_kernel")
        constants = dict(K=12, NORM=norm, ACC=tl.float32, DOT=triton_type, PRECISION="ieee", BB=16, NEED_W=True,
                         NEED_G=norm, NEED_C=norm)
        channels = 1024 if name == "states" else kernels.CHANNELS  # a whole row of ViT-L's 768
        options = {"BM": kernels.ROWS, "BD": channels}
        if name in ("forward", "proj"):
            options = kernels.tiles(torch.bfloat16 if kind == "bf16" else torch.float32)
        constants |= {k: options.pop(k) for k in ("BM", "BN", "BD") if k in options}
        types = {n: "i32" for n in kernel.arg_names}
        types |= {n: f"*{kind}" for n in ("x", "w", "P", "p", "g", "c", "y", "dy", "da", "dP", "dw", "dx")}
        types |= {n: "*fp32" for n in ("mean", "r", "dg", "dc", "mean_out", "r_out")} | {"eps": "fp32"}
        aligned = {n for n in types if types[n][0] == "*"} | {"D", "DV", "KD", "sxk", "sxb", "sxt", "swk", "swt"}
        signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
        places = {n: (i,) for i, n in enumerate(kernel.arg_names)}
        source = ASTSource(kernel, signature, {places[n]: constants[n] for n in places.keys() & constants},
                           {places[n]: [["tt.divisibility", 16]] for n in places.keys() & aligned - constants.keys()})
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = subprocess.run([tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        numbers = dict(part.split(":") for part in usage.stdout.split() if part.count(":") == 1 and part[0] in "RS")
        print(f"| {name} | {kind} | {'yes' if norm else 'no'} | {capability} | {numbers['REG']} | {numbers['STACK']} | "
              f"{compiled.metadata.shared} |", flush=True)
