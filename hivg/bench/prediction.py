"""How long the fusion should take on a GPU at the least, worked out without one: a model to hold measurements against.

Of each step of the forward's loop (hivg/fusion_triton.py) it knows four costs, in cycles of one processor:

    tensor   2 BM BN BD operations over the rate of the tensor cores (float32: of the FMA units, in `issue` too)
    issue    the instructions of the compiled step, of all warps, over the 4 that a processor issues in a cycle
    cache    the bytes of x, P and w over 64 a cycle. Of w a fourth: a load takes four rows, which are most often one
    memory   all of x, P, w, y and the statistics once, over the GPU's bandwidth; for the whole kernel, not a step

The largest of them is the time, if all else hides behind it; where a product is waited for (Triton before 3.9 on
capability 90), tensor and issue add up unless several programs share the processor. The busiest processor decides: its
programs times their steps. The plain products of the backward, and those of eager and torch.compile, are given 75 % of
the peak rate; everything else is bytes over bandwidth, and 2 us for each launch. Clocks are those at which the makers'
peak rates hold; under load they are lower. So ours is a bound, and the other two are guesses: a ratio of them flatters.
"""

from functools import cache
from typing import NamedTuple

import triton

from hivg import fusion_triton as kernels
from hivg.bench.compile import TYPES, compile_forward, inspect

SIZES = {"ViT-B": (512, 768), "ViT-L": (768, 1024)}  # D_t, D_v
PRODUCT_SHARE = 0.75
LAUNCH = 2.0  # us


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


class GPU(NamedTuple):
    capability: int
    processors: int
    clock: float  # cycles a us
    memory: float  # bytes a us
    tensor: int  # operations a cycle and processor, bfloat16
    fma: int  # the same of float32
    shared: int  # bytes of shared memory a processor


GPUS = {"A100": GPU(80, 108, 1410, 2.04e6, 2048, 128, 167_936), "H100": GPU(90, 132, 1830, 3.35e6, 4096, 256, 233_472),
        "H200": GPU(90, 132, 1830, 4.8e6, 4096, 256, 233_472)}


@cache
def compiled(types, tile, capability, D, DV):
    return inspect(compile_forward(types, dict(tile), capability, D=D, DV=DV))


def predict(case, gpu):
    """-> us: {"tensor", "issue", "cache", "memory": the costs of the forward's main kernel; "statistics"; "forward" and
    "both", with the backward; "eager" and "compile": the forward by plain PyTorch}, and the tile and parts it takes."""
    D, DV = SIZES[case.size]
    K = case.K
    M = case.B * case.T
    x, P = TYPES[case.types]
    tile = kernels.choose_tile(M, DV, x, x, P, gpu.capability // 10, gpu.processors)
    tiles, parts, steps = kernels.split_sum(K, M, D, DV, tile, gpu.processors)
    found = compiled(case.types, tuple(tile.items()), gpu.capability, D, DV)
    BM = tile["BM"]
    BN = tile["BN"]
    BD = tile["BD"]
    rate = gpu.fma if case.types == "float32" else gpu.tensor
    element = x.itemsize  # bytes
    narrow = P.itemsize
    states = K * M * D * element  # x
    weights = DV * K * D * narrow  # P

    # cycles of a step
    tensor = 2 * BM * BN * BD / rate
    issue = found.step * tile["num_warps"] / 4
    loads = (1.25 * BM * BD * element + BN * BD * narrow) / 64
    busiest = triton.cdiv(tiles * parts, gpu.processors)
    by_registers = 65536 // (32 * tile["num_warps"] * found.registers)
    by_shared = gpu.shared // (found.shared + 1024)
    together = max(1, min(busiest, by_registers, by_shared))  # programs that share a processor
    step = max(tensor, issue, loads)
    if gpu.capability == 90 and "HGMMA" in found.products and found.in_flight == 0:
        step = max(step, (tensor + issue) / together)

    # us of the whole
    cycles = busiest * steps / gpu.clock
    output = M * DV * (narrow if parts == 1 else 4 * parts)
    memory = (states + weights + K * case.T * D * element + output + 8 * K * M) / gpu.memory
    statistics = states / gpu.memory + LAUNCH
    forward = statistics + max(cycles * step, memory) + LAUNCH
    if parts > 1:  # the sum of the parts, and a change of type
        forward += (output + 2 * M * DV * 4) / gpu.memory + 2 * LAUNCH
    product = 2 * M * K * D * DV / (rate * gpu.processors * gpu.clock)
    plain = product / PRODUCT_SHARE + LAUNCH
    operand = K * M * D * narrow  # a, and d_a
    gradients = (2 * states + 2 * operand) / gpu.memory + 8 * LAUNCH
    # eager reads or writes x 13 times, and once more each to change its type for the product
    eager = (13 * states + (states + operand if element != narrow else 0)) / gpu.memory + 7 * LAUNCH + plain
    compile_ = (states + operand) / gpu.memory + LAUNCH + plain
    return {"tile": f"{BM} x {BN} x {BD}", "parts": parts, "tensor": cycles * tensor, "issue": cycles * issue,
            "cache": cycles * loads, "memory": memory, "statistics": statistics, "forward": forward,
            "both": forward + 2 * plain + gradients, "eager": eager, "compile": compile_,
            "share": product / forward}


def bench_prediction():
    """The model for all cases and GPUs: a table on stdout."""
    print(f"\nThe least time by the model of hivg/bench/prediction.py, us; Triton {triton.__version__}. "
          "Forward: statistics + the largest of tensor, issue, cache, memory.")
    print("| GPU | case | tile | parts | tensor | issue | cache | memory | statistics | forward | with backward "
          "| eager forward | compile forward | share of peak |")
    print("| --- " * 14 + "|")
    for name, gpu in GPUS.items():
        for case in CASES:
            found = predict(case, gpu)
            share = found.pop("share")
            numbers = [f"{v:.0f}" if isinstance(v, float) else str(v) for v in found.values()]
            print(f"| {name} | {case} | {' | '.join(numbers)} | {share:.2f} |", flush=True)
