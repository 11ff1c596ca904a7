"""Registers, spills and hazards of the fusion kernels, compiled for a GPU that need not be there.

On compute capability 90 a product (HGMMA) keeps reading its operand from registers until the program waits for it.
Nothing may overwrite them before that (SAFE_OVERLAP in hivg/fusion_triton.py); `find_hazards` finds what does:

    /*0100*/ HGMMA R24, R4, gdesc[UR8], R24, gsb0      reads R4..R7; gsb0 closes a group of products
    /*0110*/ MOV R4, R90                               too early: a hazard
    /*0120*/ WARPGROUP.DEPBAR.LE gsb0, 0x0             waits until 0 groups are in flight; safe from here
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
DTYPES = {"bfloat16": (torch.bfloat16, torch.bfloat16),  # of x, w, g, c and of P, p, y
          "autocast": (torch.float32, torch.bfloat16), "float32": (torch.float32, torch.float32)}
INSTRUCTION = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*?)\s*;")


def compile_kernel(kernel, capability, dtypes, constants):
    """For 12 layers of ViT-B/16, any batch size, and strides that are multiples of 16, as they are in every CLIP."""
    x, P = dtypes
    sums, mix, product = [kernels.TYPES[dtype] for dtype in kernels.choose_types(x, x, P)]
    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants} | kernels.OPTIONS
    constants = constants | dict(K=12, D=512, DV=768, ACC=sums, MIX=mix, DOT=product, PRECISION="ieee",
                                 OVERLAP=kernels.SAFE_OVERLAP or capability != 90, STAGES=constants.get("num_stages"))
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    types = {"eps": "fp32"}
    for names, dtype in (("x w g c dx", x), ("P p y da", P), ("mean rstd dw dg dc", torch.float32)):
        types |= dict.fromkeys(names.split(), f"*{kernels.TYPES[dtype].name}")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name].startswith("*") or name.startswith("stride")}
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_all(capability):
    """Every kernel as it is launched, the forward with all tiles -> rows, {column: value}. Raises ValueError."""
    if kernels.INTERPRETED:
        raise ValueError("the kernels cannot be compiled under Triton's interpreter; unset TRITON_INTERPRET")
    if not TOOL.exists():
        raise ValueError(f"{TOOL}, which reads compiled kernels, is missing; Triton's wheels for Linux have it")
    needs = dict.fromkeys(("NORM", "NEED_X", "NEED_W", "NEED_P", "NEED_G", "NEED_C"), True)
    for name, (x, P) in DTYPES.items():
        jobs = {"statistics": (kernels.statistics_kernel, dict(BM=8, BD=512))}
        for M in (16, 77, 4928):
            tile = kernels.choose_tile(M, 768, x, x, P, capability // 10, 132)
            label = f"forward {tile['BM']} x {tile['BN']} x {tile['BD']}"
            jobs[label] = kernels.forward_kernel, tile | dict(NORM=True)
        no_norm = dict(NORM=False, mean=None, rstd=None, g=None, c=None)
        jobs[f"{label}, no norm"] = kernels.forward_kernel, tile | no_norm
        jobs["gradients"] = kernels.gradients_kernel, needs | dict(BB=4, BD=512)
        for label, (kernel, constants) in jobs.items():
            found = inspect(compile_kernel(kernel, capability, (x, P), constants))
            yield {"capability": capability, "kernel": label, "dtypes": name} | found


def written(name, operands):
    """The registers an instruction writes."""
    register = re.match(r"(?:U?P\w+, )*R(\d+)\b", operands)  # predicates may come before it
    kind = name.split(".")[0]
    # in these the first register is no result: stores, and what writes predicates alone
    if not register or kind.startswith(("ST", "LDGSTS", "RED", "BAR", "SYNCS", "R2", "FCHK")) or "SETP" in kind:
        return range(0)
    width = 1
    if ".64" in name or ".WIDE" in name or kind in ("CS2R", "DADD", "DMUL", "DFMA") or name.endswith("88.2"):
        width = 2
    if ".128" in name or kind == "HMMA" or name.endswith("88.4"):  # the last: LDSM
        width = 4
    return range(int(register[1]), int(register[1]) + width)


def find_hazards(sass):
    """What `cuobjdump -sass` prints -> {address of a write: addresses of the products that may still read there}."""
    code = [(int(address, 16), *rest) for address, *rest in INSTRUCTION.findall(sass)]
    places = {address: place for place, (address, *_) in enumerate(code)}
    found = {}
    for start, (product, _, name, operands) in enumerate(code):
        operand = re.match(r"R\d+, R(\d+), gdesc", operands)
        if not name.startswith("HGMMA") or not operand:  # other products read shared memory alone
            continue
        read = range(int(operand[1]), int(operand[1]) + 4)
        paths = [(start, 0)]  # every path from the product to a wait for it: place, groups closed on the way (up to 8)
        for place, closed in paths:  # the list grows
            address, predicate, name, operands = code[place]
            if name.startswith("HGMMA"):
                closed = min(closed + ("gsb0" in operands), 8)
            elif name.startswith("WARPGROUP.DEPBAR"):
                if closed > int(operands.split("0x")[1], 16):
                    continue
            elif set(read) & set(written(name, operands)):
                found.setdefault(address, set()).add(product)
            always = not predicate and not re.match(r"!?U?P\d", operands)  # the condition may be the first operand
            following = [] if always and name in ("BRA", "EXIT") else [place + 1]
            if name.startswith("BRA"):
                following.append(places[int(re.search(r"0x([0-9a-f]+)", operands)[1], 16)])
            paths += [(place, closed) for place in following if (place, closed) not in paths]
    return found


def inspect(kernel):
    """A compiled kernel -> {column: number}. In flight: groups of products that may run during the next step."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.check_output([TOOL, "-sass", "-res-usage", file.name], text=True, stderr=subprocess.DEVNULL)
    used = dict(re.findall(r"(REG|STACK):(\d+)", text))
    in_flight = [int(left, 16) for left in re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)", text)]
    return {"registers": int(used["REG"]), "spills": int(used["STACK"]), "shared": kernel.metadata.shared,
            "HGMMA": text.count(" HGMMA."), "in flight": max(in_flight, default=0), "hazards": len(find_hazards(text))}
