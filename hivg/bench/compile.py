"""Compile the fusion kernels for GPUs that need not be present: python -m hivg.bench compile

On compute capability 90 a product (HGMMA) reads its operand from registers until the program waits for it; a write to
these registers before then is a hazard (SAFE_OVERLAP in hivg/fusion_triton.py). `unwaited_writes` finds them:

    /*0100*/ HGMMA R24, R4, gdesc[UR8], R24, gsb0      reads R4..R7; gsb0 closes a group of products
    /*0110*/ MOV R4, R90                               hazard: the product may not have read R4 yet
    /*0120*/ WARPGROUP.DEPBAR.LE gsb0, 0x0             waits until at most 0 groups are in flight
    /*0130*/ MOV R4, R90                               safe
"""

import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from hivg import fusion_triton as kernels
from hivg.bench.fusion import TYPES
from hivg.bench.timing import Report, run_program

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INSTRUCTION = re.compile(r"^ +/\*([0-9a-f]{4,})\*/ +(?:@(!?U?P\w+) +)?([^\s;]+) *(.*?) *;", re.M)


def compile_kernels(types, capability, K=12, B=64, T=77, D=512, DV=768):
    """The kernels as hivg/fusion_triton.py launches them, the forward with each tile that choose_tile may take ->
    {name: compiled kernel}. types: a key of TYPES."""
    x, P = TYPES[types]
    f32 = torch.float32  # for warmup, a dtype stands for a tensor of it
    acc, mix, product = [kernels.TYPES[dtype] for dtype in kernels.choose_types(x, x, P)]
    strides = B * T * D, T * D, D  # of x
    BD = triton.next_power_of_2(D)  # where a block holds a whole row
    options = dict(grid=(1,), D=D, ACC=acc) | kernels.OPTIONS
    triton.runtime.driver.set_active(SimpleNamespace(  # a GPU that is not there; compiled kernels are cached by device
        get_current_target=lambda: GPUTarget("cuda", capability, 32), get_current_device=lambda: capability,
        get_current_stream=lambda device: 0))
    compiled = {"statistics": kernels.statistics_kernel.warmup(
        x, f32, f32, B * T, T, *strides, 1e-5, BM=4096 // BD, BD=BD, **options)}
    for M in (16, T, B * T):
        tile = kernels.choose_tile(M, DV, x, x, P, capability // 10, 132)
        compiled["forward {BM} x {BN} x {BD}".format(**tile)] = kernels.forward_kernel.warmup(
            x, f32, f32, x, P, P, x, x, P, B, T, *strides, T * D, D, 96, K=K, DV=DV, NORM=True, MIX=mix, DOT=product,
            PRECISION="ieee", OVERLAP=kernels.SAFE_OVERLAP or capability // 10 != 9, STAGES=tile["num_stages"],
            **tile, **options)
    compiled["gradients"] = kernels.gradients_kernel.warmup(
        x, f32, f32, x, x, x, P, x, f32, f32, f32, B, T, *strides, T * D, D, 64, K=K, NORM=True, NEED_X=True,
        NEED_W=True, NEED_P=True, NEED_G=True, NEED_C=True, BB=2048 // BD, BD=BD, **options)
    if torch.cuda.is_available():
        triton.runtime.driver.reset_active()
    return compiled


def written(name, operands):
    """The numbers of the registers that an instruction writes."""
    register = re.match(r"(?:U?P\w+, )*R(\d+)\b", operands)  # predicates may be written before it
    # stores, and instructions that write predicates alone: their first register is read
    if not register or re.match(r"ST|LDGSTS|RED|BAR|SYNCS|R2|FCHK|\w+SETP", name):
        return set()
    width = 1
    if re.search(r"\.64|\.WIDE|^CS2R|^DADD|^DMUL|^DFMA|88\.2$", name):
        width = 2
    if re.search(r"\.128|^HMMA|88\.4$", name):  # the last: LDSM
        width = 4
    return set(range(int(register[1]), int(register[1]) + width))


def unwaited_writes(sass):
    """sass: the output of cuobjdump -sass -> the addresses of writes to registers that a product may still read."""
    code = INSTRUCTION.findall(sass)  # (address, predicate that decides whether it runs, name, operands)
    places = {int(address, 16): place for place, (address, *_) in enumerate(code)}
    found = set()
    for start, (*_, operands) in enumerate(code):
        operand = re.match(r"R\d+, R(\d+), gdesc", operands)
        if not operand:  # no product, or one that reads shared memory alone
            continue
        reached = [(start, -1)]  # place, and groups closed since the product's own: -1 while that is open
        for place, newer in reached:  # grows on the way
            address, predicate, name, operands = code[place]
            following = [place + 1]
            # a condition precedes the instruction or is its first operand
            always = not predicate and not re.match(r"!?U?P\d", operands)
            if name.startswith("HGMMA"):
                newer = min(newer + ("gsb0" in operands), 8)  # bounded, so that loops without a wait end
            elif name.startswith("WARPGROUP.DEPBAR") and newer >= int(operands.split("0x")[1], 16):
                following = []  # the product is done
            elif name.startswith("EXIT") and always:
                following = []
            elif name.startswith("BRA"):
                target = places[int(re.search(r"0x([0-9a-f]+)", operands)[1], 16)]
                following = [target] if always else [place + 1, target]
            elif written(name, operands) & set(range(int(operand[1]), int(operand[1]) + 4)):
                found.add(int(address, 16))
            reached += [(p, newer) for p in following if p < len(code) and (p, newer) not in reached]
    return found


def inspect(kernel):
    """A compiled kernel -> registers, bytes spilled, addresses of hazards, machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin", buffering=0) as file:
        file.write(kernel.asm["cubin"])
        sass = run_program([CUOBJDUMP, "-res-usage", "-sass", file.name])
    registers, spilled = re.search(r"REG:(\d+) STACK:(\d+)", sass).groups()
    return int(registers), int(spilled), unwaited_writes(sass), sass


def bench_compile(args):
    """A table for compute capabilities 80 and 90. Raises ValueError where the kernels cannot be compiled or read."""
    if kernels.INTERPRETED or not CUOBJDUMP.exists():
        raise ValueError("compile needs TRITON_INTERPRET unset, and cuobjdump, which Triton's Linux wheels contain")
    report = Report()
    report.header("capability", "types", "kernel", "registers", "spilled bytes", "shared memory, bytes", "hazards")
    for capability in (80, 90):
        for types in TYPES:
            for name, kernel in compile_kernels(types, capability).items():
                registers, spilled, hazards, _ = inspect(kernel)
                report.row(capability, types, name, registers, spilled, kernel.metadata.shared, len(hazards))
