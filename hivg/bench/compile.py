"""The fusion kernels, compiled for a GPU that need not be there: registers, spills, shared memory, and hazards.

On capability 90 a product (HGMMA) reads registers until the program waits for it; they must not be overwritten before
(SAFE_OVERLAP in hivg/fusion_triton.py). `hazards` finds such writes in the machine code:

    /*0100*/ HGMMA R24, R4, gdesc[UR8], R24, gsb0      reads R4..R7; gsb0 closes a group of products
    /*0110*/ MOV R4, R90                               too early: a hazard
    /*0120*/ WARPGROUP.DEPBAR.LE gsb0, 0x0             waits until 0 groups are in flight
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hivg import fusion_triton as kernels

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
NAMES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
# dtypes of x, w, g, c and of P, p, y
TYPES = {"bfloat16": (torch.bfloat16, torch.bfloat16), "autocast": (torch.float32, torch.bfloat16),
         "float32": (torch.float32, torch.float32)}
# address, predicate, name, operands
LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")


def compile_kernel(name, types, capability, tile=None, K=12, D=512, DV=768):
    """The "forward" kernel with a tile of choose_tile, or the "gradients" with all gradients, for `types` of TYPES."""
    x, P = TYPES[types]
    constants = dict(K=K, D=D, NORM=True)
    if name == "forward":
        kernel = kernels.forward_kernel
        dtypes = dict(zip(("ACC", "MIX", "DOT"), kernels.choose_types(x, x, P)))
        constants |= tile | dict(DV=DV, PRECISION="ieee", STAGES=tile["num_stages"],
                                 OVERLAP=kernels.SAFE_OVERLAP or capability != 90)
        pointers = {"x w g c": x, "P p y": P, "mean rstd": torch.float32}
    else:
        kernel = kernels.gradients_kernel
        dtypes = {"ACC": torch.float32}
        BD = triton.next_power_of_2(D)
        constants |= dict(BB=2048 // BD, BD=BD) | {f"NEED_{which}": True for which in "XWPGC"}
        pointers = {"x w g c dx": x, "da": P, "mean rstd dw dg dc": torch.float32}
    options = {option: constants.pop(option) for option in tile or {} if option.startswith("num_")} | kernels.OPTIONS
    constants |= {constant: kernels.TYPES[dtype] for constant, dtype in dtypes.items()}
    signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    signature |= {argument: NAMES[dtype] for names, dtype in pointers.items() for argument in names.split()}
    known = {}
    aligned = {}
    for place, argument in enumerate(kernel.arg_names):
        if argument in constants:
            known[(place,)] = constants[argument]
        elif signature[argument] != "i32" or argument.startswith("stride"):
            aligned[(place,)] = [["tt.divisibility", 16]]  # as in every CLIP
    source = ASTSource(kernel, signature, known, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def written(name, operands):
    """The registers an instruction writes."""
    register = re.match(r"(?:U?P\w+, )*R(\d+)\b", operands)  # predicates may come before it
    kind = name.split(".")[0]
    # in these the first register is no result: stores, and what writes predicates alone
    if not register or kind.startswith(("ST", "LDGSTS", "RED", "BAR", "SYNCS", "R2", "FCHK")) or "SETP" in kind:
        return set()
    width = 1
    if ".64" in name or ".WIDE" in name or kind in ("CS2R", "DADD", "DMUL", "DFMA") or name.endswith("88.2"):
        width = 2
    if ".128" in name or kind == "HMMA" or name.endswith("88.4"):  # the last: LDSM
        width = 4
    return set(range(int(register[1]), int(register[1]) + width))


def hazards(sass):
    """The output of cuobjdump -sass -> {address of a write to registers that a product in flight may still read:
    addresses of these products}, along all paths through the code."""
    code = [(int(m[1], 16), *m.groups()[1:]) for line in sass.splitlines() if (m := LINE.match(line))]
    places = {address: place for place, (address, *_) in enumerate(code)}
    found = {}
    # a state: the next instruction, and the groups of products in flight before it, the open one last; a group is a set
    # of (address, first of the four registers read)
    waiting = [(0, (frozenset(),))]
    seen = set(waiting)
    while waiting:
        place, groups = waiting.pop()
        address, predicate, name, operands = code[place]
        if name.startswith("HGMMA"):
            if operand := re.match(r"R\d+, R(\d+), gdesc", operands):  # other products read shared memory alone
                groups = groups[:-1] + (groups[-1] | {(address, int(operand[1]))},)
            if "gsb0" in operands:
                groups = groups[-8:] + (frozenset(),)  # more than eight in flight: the oldest are left out
        elif name.startswith("WARPGROUP.DEPBAR"):
            closed = groups[:-1]
            groups = closed[max(0, len(closed) - int(operands.split("0x")[1], 16)):] + groups[-1:]
        for product, first in frozenset().union(*groups):
            if not name.startswith("HGMMA") and written(name, operands) & set(range(first, first + 4)):
                found.setdefault(address, set()).add(product)
        always = predicate is None and not re.match(r"!?U?P\d", operands)  # no condition before it or as first operand
        following = [] if always and name.startswith(("BRA", "EXIT")) else [place + 1]
        if name.startswith("BRA"):
            following.append(places[int(re.search(r"0x([0-9a-f]+)", operands)[1], 16)])
        new = {(place, groups) for place in following if place < len(code)} - seen
        seen |= new
        waiting += new
    return found


def inspect(kernel):
    """A compiled kernel -> {"registers", "spills" in bytes, "shared" bytes, "asynchronous" products, "hazards"}."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, sass = (subprocess.run([TOOL, option, file.name], check=True, capture_output=True, text=True).stdout
                       for option in ("-res-usage", "-sass"))
    used = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    return {"registers": int(used["REG"]), "spills": int(used["STACK"]), "shared": kernel.metadata.shared,
            "asynchronous": sass.count(" HGMMA"), "hazards": len(hazards(sass))}
