"""The fusion kernels compiled for a GPU that need not be there: python -m hivg.bench compile

Of each kernel: registers, spills, shared memory, and what a step of its loop is made of. For compute capability 90
also whether the forward is right: a product there (HGMMA) reads its operand from registers long after it was issued,
until the program waits for it, and those registers must not be written before (SAFE_OVERLAP in hivg/fusion_triton.py).
`unwaited_writes` follows all paths through the machine code and finds such writes. Then the model of the time, for all
cases of `bench fusion` (hivg/bench/prediction.py).

    /*0100*/ HGMMA R24, R4, gdesc[UR8], R24, gsb0      reads R4..R7; gsb0 closes a group of products
    /*0110*/ MOV R4, R90                               too early: a write that is found
    /*0120*/ WARPGROUP.DEPBAR.LE gsb0, 0x0             waits until 0 groups are left in flight
    /*0130*/ MOV R4, R90                               now it may
"""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hivg import fusion_triton as kernels

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# of x, w, g, c and of P, p, y
TYPES = {"bfloat16": (torch.bfloat16, torch.bfloat16), "autocast": (torch.float32, torch.bfloat16),
         "float32": (torch.float32, torch.float32)}


# ---- compiling

def compile_kernel(kernel, capability, types, constants, options):
    """types: {argument: Triton's name of its type}, "i32" where none is given; constants: {argument: value}. Sizes that
    change with the batch may be any number, strides are multiples of 16, as those of all CLIPs are."""
    signature = {}
    known = {}
    aligned = {}
    for place, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if name in constants:
            known[(place,)] = constants[name]
        elif signature[name].startswith("*") or name.startswith("stride"):
            aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, known, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options | kernels.OPTIONS)


def pointers(names, dtype):
    return {name: "*" + NAMES[dtype] for name in names.split()}


def compile_forward(types, tile, capability, K=12, D=512, DV=768, norm=True, overlap=None):
    """forward_kernel for `types` of TYPES and a tile of choose_tile. overlap: whether products may run on, by default
    as the installed Triton allows."""
    x, P = TYPES[types]
    sums, mix, product = kernels.choose_types(x, x, P)
    options = dict(tile)
    sizes = {name: options.pop(name) for name in ("BM", "BN", "BD")}
    if overlap is None:
        overlap = kernels.SAFE_OVERLAP or capability // 10 != 9
    constants = sizes | dict(K=K, D=D, DV=DV, NORM=norm, ACC=kernels.TYPES[sums], MIX=kernels.TYPES[mix],
                             DOT=kernels.TYPES[product], PRECISION="ieee", OVERLAP=overlap, STAGES=tile["num_stages"])
    if not norm:
        constants |= dict(mean=None, rstd=None, g=None, c=None)
    types = pointers("x w g c", x) | pointers("P p y", P) | pointers("mean rstd", torch.float32)
    return compile_kernel(kernels.forward_kernel, capability, types, constants, options)


def compile_statistics(types, capability, D=512):
    x, _ = TYPES[types]
    BD = triton.next_power_of_2(D)
    constants = dict(D=D, ACC=kernels.TYPES[torch.float32], BM=4096 // BD, BD=BD)
    types = pointers("x", x) | pointers("mean rstd", torch.float32) | {"eps": "fp32"}
    return compile_kernel(kernels.statistics_kernel, capability, types, constants, {})


def compile_gradients(types, capability, K=12, D=512):
    """gradients_kernel where every gradient is needed."""
    x, P = TYPES[types]
    BD = triton.next_power_of_2(D)
    needs = dict.fromkeys(("NORM", "NEED_X", "NEED_W", "NEED_P", "NEED_G", "NEED_C"), True)
    constants = needs | dict(K=K, D=D, ACC=kernels.TYPES[torch.float32], BB=2048 // BD, BD=BD)
    types = pointers("x w g c dx", x) | pointers("da", P) | pointers("mean rstd dw dg dc", torch.float32)
    return compile_kernel(kernels.gradients_kernel, capability, types, constants, {})


# ---- reading machine code

class Instruction(NamedTuple):
    address: int
    predicate: str | None  # the register that decides whether it runs
    name: str
    operands: str


LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")


def dump(cubin, *options):
    """The output of cuobjdump, which comes with Triton, for a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOL, *options, file.name], check=True, capture_output=True, text=True).stdout


def instructions(text):
    """The output of cuobjdump -sass -> Instructions in order."""
    found = [match for line in text.splitlines() if (match := LINE.match(line))]
    return [Instruction(int(m[1], 16), m[2], m[3], m[4]) for m in found]


def branch_target(instruction):
    """Where it may jump to, or None."""
    if instruction.name.split(".")[0] != "BRA":
        return None
    return int(re.search(r"0x([0-9a-f]+)", instruction.operands)[1], 16)


def written(instruction):
    """The registers an instruction writes, as numbers."""
    name = instruction.name
    register = re.match(r"(?:U?P\w+, )*R(\d+)\b", instruction.operands)  # predicates may be written before it
    # of these the first register is no result: what stores, and what writes predicates alone
    kind = name.split(".")[0]
    if not register or kind.startswith(("ST", "LDGSTS", "RED", "BAR", "SYNCS", "R2", "FCHK")) or "SETP" in kind:
        return range(0)
    width = 1
    if ".64" in name or ".WIDE" in name or kind in ("CS2R", "DADD", "DMUL", "DFMA") or name.endswith("88.2"):
        width = 2
    if ".128" in name or kind == "HMMA" or name.endswith("88.4"):  # the last: LDSM
        width = 4
    return range(int(register[1]), int(register[1]) + width)


def unwaited_writes(code):
    """Writes to registers that a product in flight may still read: {address of the write: addresses of products}."""
    places = {instruction.address: place for place, instruction in enumerate(code)}
    found = {}
    # a state: the next instruction, and the groups of products in flight before it, the open one last; a group is a set
    # of (address, first of the four registers read)
    waiting = [(0, (frozenset(),))]
    seen = set(waiting)
    while waiting:
        place, groups = waiting.pop()
        instruction = code[place]
        if instruction.name.startswith("HGMMA"):
            operand = re.match(r"R\d+, R(\d+), gdesc", instruction.operands)
            if operand:  # the other products read shared memory alone
                groups = groups[:-1] + (groups[-1] | {(instruction.address, int(operand[1]))},)
            if "gsb0" in instruction.operands:
                groups = groups[-8:] + (frozenset(),)  # more than eight in flight: the oldest are left out
        elif instruction.name.startswith("WARPGROUP.DEPBAR"):
            left = int(re.search(r"gsb0, 0x(\w+)", instruction.operands)[1], 16)
            closed = groups[:-1]
            groups = closed[max(0, len(closed) - left):] + groups[-1:]
        else:
            result = written(instruction)
            for address, first in frozenset().union(*groups):
                if set(result) & set(range(first, first + 4)):
                    found.setdefault(instruction.address, set()).add(address)
        following = [place + 1]
        target = branch_target(instruction)
        # a condition stands before the instruction, or as its first operand
        always = instruction.predicate is None and not re.match(r"!?U?P\d", instruction.operands)
        if target is not None:
            following = [places[target]] if always else [place + 1, places[target]]
        elif instruction.name == "EXIT" and always:
            following = []
        for place in following:
            state = place, groups
            if place < len(code) and state not in seen:
                seen.add(state)
                waiting.append(state)
    return found


def innermost_loop(code):
    """The instructions of the shortest loop that has a product, or else of the longest innermost one: one step."""
    places = {instruction.address: place for place, instruction in enumerate(code)}
    loops = []
    for place, instruction in enumerate(code):
        start = places.get(branch_target(instruction), place)
        if start < place:
            loops.append(code[start:place + 1])
    products = []
    for loop in loops:
        if any(is_product(i) for i in loop):
            products.append(loop)
    if products:
        return min(products, key=len)
    return max(loops, key=lambda loop: sum(i.name.startswith(("FFMA", "FMUL")) for i in loop), default=[])


def is_product(instruction):
    return instruction.name.startswith(("HMMA", "HGMMA", "DMMA"))  # not HFMA2.MMA, which is none


class Report(NamedTuple):
    registers: int
    stack: int  # bytes of spilled registers
    shared: int  # bytes
    step: int  # instructions of a step
    products: str  # the tensor-core instructions of a step, and their number
    in_flight: int  # groups of products that may run on while the next operand is made, of compute capability 90
    hazards: int  # writes to registers of a product in flight


def inspect(kernel):
    """kernel: a compiled one -> Report."""
    usage = dict(re.findall(r"(REG|STACK):(\d+)", dump(kernel.asm["cubin"], "-res-usage")))
    code = instructions(dump(kernel.asm["cubin"], "-sass"))
    step = innermost_loop(code)
    products = [instruction.name for instruction in step if is_product(instruction)]
    waits = [i.operands for i in step if i.name.startswith("WARPGROUP.DEPBAR")]
    return Report(int(usage["REG"]), int(usage["STACK"]), kernel.metadata.shared, len(step),
                  f"{len(products)} {products[0]}" if products else "",
                  min([int(wait.split("0x")[1], 16) for wait in waits], default=0), len(unwaited_writes(code)))


def tiles_of(types, capability):
    """The tiles that choose_tile may take."""
    x, P = TYPES[types]
    chosen = []
    for M in (16, 77, 4928):
        tile = kernels.choose_tile(M, 768, x, x, P, capability // 10, 132)
        if tile not in chosen:
            chosen.append(tile)
    return chosen


def bench_compile():
    """A table on stdout. Needs Triton, no GPU. Raises ValueError under Triton's interpreter, or without cuobjdump."""
    if kernels.INTERPRETED:
        raise ValueError("the kernels cannot be compiled under Triton's interpreter; unset TRITON_INTERPRET")
    if not TOOL.exists():
        raise ValueError(f"{TOOL}, which reads compiled kernels, is missing; Triton's wheels for Linux have it")
    print(f"Triton {triton.__version__}; K 12, D_t 512, D_v 768. Spills and shared memory in bytes; a step: its "
          "instructions; in flight: products that run on during the next step")
    print("| capability | kernel | types | tile | registers | spills | shared memory | step | products a step "
          "| in flight | hazards |")
    print("| --- " * 11 + "|")
    for capability in (80, 90):
        for types in TYPES:
            rows = [("statistics", "", compile_statistics(types, capability))]
            for tile in tiles_of(types, capability):
                size = " x ".join(str(tile[name]) for name in ("BM", "BN", "BD"))
                rows.append(("forward", size, compile_forward(types, tile, capability)))
            rows.append(("forward, no norm", size, compile_forward(types, tile, capability, norm=False)))
            rows.append(("gradients", "", compile_gradients(types, capability)))
            for name, size, kernel in rows:
                found = inspect(kernel)
                print(f"| {capability} | {name} | {types} | {size} | " + " | ".join(str(v) for v in found) + " |",
                      flush=True)
