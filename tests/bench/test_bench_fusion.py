"""The fusion's benchmark, and the kernels compiled for GPUs that are not there."""

import json
import os
import subprocess
import sys

import pytest
import torch
from makers import ROOT

triton = pytest.importorskip("triton")
from hivg.bench import compile, fusion  # noqa: E402
from hivg.bench.compile import hazards  # noqa: E402

SAFE = """
        /*0000*/                   MOV R4, R90 ;
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*0020*/                   MOV R8, R91 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/                   MOV R4, R92 ;
        /*0050*/              @P0  BRA 0x0 ;
        /*0060*/                   EXIT ;
"""


def test_a_write_after_the_wait_is_none():
    assert hazards(SAFE) == {}


@pytest.mark.parametrize("write", ["MOV R4, R90", "MOV R7, R90", "LDS.64 R6, [R2]", "LDSM.16.M88.4 R4, [R2]",
                                   "SHFL.BFLY PT, R4, R9, 0x1, 0x1f", "LOP3.LUT P0, R4, R9, R8, RZ, 0xc0, !PT",
                                   "HMMA.16816.F32.BF16 R4, R8, R9, R90", "CS2R R6, SRZ", "DFMA R6, R8, R8, R90",
                                   "IMAD.WIDE.U32 R2, R9, R9, RZ"])
def test_a_write_before_the_wait_is_found(write):
    found = hazards(SAFE.replace("MOV R8, R91", write))
    assert found == ({} if write.startswith("IMAD") else {0x20: {0x10}})  # R2 and R3 are not the product's


@pytest.mark.parametrize("instruction", [
    "STS.128 [R4], R8", "FADD R8, R4, R5", "HGMMA.64x256x16 R24, gdesc[UR4], R24", "ISETP.GE.AND P0, PT, R4, R5, PT",
    "R2P PR, R4, 0x7e", "R2UR UR4, R4", "LOP3.LUT P0, RZ, R4, R5, RZ, 0xc0, !PT"])
def test_what_is_no_write(instruction):
    assert hazards(SAFE.replace("MOV R8, R91", instruction)) == {}


def test_a_write_in_the_next_turn_of_a_loop_is_found():
    """The wait leaves one group in flight: the product of this turn is still running when the next one begins."""
    assert hazards(SAFE.replace("gsb0, 0x0", "gsb0, 0x1").replace("MOV R4, R92", "NOP")) == {0x00: {0x10}}


def test_a_way_around_the_wait_is_followed():
    assert hazards(SAFE.replace("MOV R8, R91", "@!P1 BRA 0x40")) == {0x00: {0x10}, 0x40: {0x10}}


COMPILED = """
import json
from hivg import fusion_triton
from hivg.bench import compile

def tiles_of(types, capability):
    x, P = compile.TYPES[types]
    tiles = [fusion_triton.choose_tile(M, 768, x, x, P, capability // 10, 132) for M in (16, 77, 4928)]
    return [tile for i, tile in enumerate(tiles) if tile not in tiles[:i]]

found = []
for types in ("bfloat16", "autocast"):
    for tile in tiles_of(types, 90):
        found.append(compile.inspect(compile.compile_kernel("forward", types, 90, tile)) | {"tile": tile})
gradients = compile.inspect(compile.compile_kernel("gradients", "autocast", 90))
ampere = compile.inspect(compile.compile_kernel("forward", "bfloat16", 80, tiles_of("bfloat16", 80)[-1]))
fixed = {}
for name in ("statistics_kernel", "forward_kernel", "gradients_kernel"):
    fixed[name] = [p.name for p in getattr(fusion_triton, name).params if p.do_not_specialize]
print(json.dumps({"forward": found, "others": [gradients, ampere], "fixed": fixed}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not compile.TOOL.exists(), reason="this Triton comes without cuobjdump")
def test_compiled_for_hopper():
    """In a process without the interpreter. triton-lang/triton issue 9433: no operand is overwritten too early, with
    the Triton that is installed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found["forward"]) == 6
    for kernel in found["forward"]:
        assert kernel["hazards"] == 0, kernel
        assert kernel["spills"] == 0, kernel
        assert kernel["shared"] <= 232_448, kernel
        if kernel["tile"]["BM"] >= 64:
            assert kernel["asynchronous"], kernel
    for kernel in found["others"]:
        assert kernel["spills"] == kernel["asynchronous"] == 0 < kernel["registers"] <= 255, kernel
    # a new batch size or length of expression is not compiled anew
    assert found["fixed"] == {"statistics_kernel": ["M", "T"], "forward_kernel": ["B", "T", "steps"],
                              "gradients_kernel": ["B", "T", "samples"]}


def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="on a GPU"):
        fusion.bench_fusion(torch.device("cpu"), tmp_path)


@pytest.fixture
def small_bench(monkeypatch):
    """The benchmark on tiny cases, with all that needs a GPU replaced by fixed numbers."""
    monkeypatch.setattr(fusion, "CASES", [fusion.Case("ViT-B", 12, 1, 2, "bfloat16"),
                                          fusion.Case("ViT-B", 12, 1, 4, "autocast")])
    monkeypatch.setattr(fusion, "SIZES", {"ViT-B": (8, 6)})
    monkeypatch.setattr(fusion, "INTERPRETED", False)
    monkeypatch.setattr(fusion, "do_bench", lambda function, **options: (1.0, 2.0, 3.0))
    monkeypatch.setattr(fusion, "time_by_graph", lambda function: 1.5)
    monkeypatch.setattr(fusion, "memory_of", lambda function, device: 0.1)
    monkeypatch.setattr(fusion, "product_rate", lambda dtype, device: 100.0)
    monkeypatch.setattr(fusion, "copy_rate", lambda device: 1000.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    make_tensors = fusion.make_tensors
    monkeypatch.setattr(fusion, "make_tensors", lambda case, device: make_tensors(case, "cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="computes on the CPU, by the interpreter")
def test_table_and_chart(small_bench, tmp_path):
    fusion.bench_fusion(torch.device("cuda"), tmp_path / "out")
    lines = (tmp_path / "out" / "fusion.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ViT-B")]
    assert len(rows) == 2 * 3 * 2  # cases, ways, passes
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "| ViT-B K 12 T 1 B 4 autocast | both | ours |" in rows[-1]
    assert (tmp_path / "out" / "fusion.png").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="computes on the CPU, by the interpreter")
def test_a_wrong_kernel_is_not_timed(small_bench, monkeypatch, tmp_path):
    right = fusion.adaptive_fusion
    monkeypatch.setattr(fusion, "adaptive_fusion", lambda *tensors: 1.1 * right(*tensors))
    with pytest.raises(ValueError, match="further from the exact result"):
        fusion.bench_fusion(torch.device("cuda"), tmp_path)
    rows = [line for line in (tmp_path / "fusion.md").read_text().splitlines() if "| ours |" in line]
    assert len(rows) == 2 and all("WRONG" in row for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="computes on the CPU, by the interpreter")
def test_it_stops_in_time(small_bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fusion, "LIMIT", -1)
    fusion.bench_fusion(torch.device("cuda"), tmp_path)
    assert capsys.readouterr().out.count("left out") == 2
