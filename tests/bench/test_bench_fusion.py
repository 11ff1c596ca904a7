"""The fusion's benchmarks: the search for hazards, the kernels compiled for GPUs that are not there, the table."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from makers import python

triton = pytest.importorskip("triton")
from hivg import fusion_triton  # noqa: E402  after the check that Triton is there
from hivg.bench import compile, fusion  # noqa: E402

SAFE = """
        /*0000*/                   MOV R4, R90 ;
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*0020*/                   MOV R8, R91 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/                   MOV R4, R92 ;
        /*0050*/              @P0  BRA 0x0 ;
        /*0060*/                   EXIT ;
"""


def hazards_with(instruction):
    """The hazards of SAFE with another instruction between the product and the wait."""
    return compile.unwaited_writes(SAFE.replace("MOV R8, R91", instruction))


@pytest.mark.parametrize("write", ["MOV R4, R90", "MOV R7, R90", "LDS.64 R6, [R2]", "LDSM.16.M88.4 R4, [R2]",
                                   "SHFL.BFLY PT, R4, R9, 0x1, 0x1f", "LOP3.LUT P0, R4, R9, R8, RZ, 0xc0, !PT",
                                   "HMMA.16816.F32.BF16 R4, R8, R9, R90", "CS2R R6, SRZ", "DFMA R6, R8, R8, R90"])
def test_a_write_before_the_wait_is_a_hazard(write):
    assert hazards_with(write) == {0x20}


@pytest.mark.parametrize("instruction", [
    "MOV R8, R91", "IMAD.WIDE.U32 R2, R9, R9, RZ", "STS.128 [R4], R8", "FADD R8, R4, R5", "R2P PR, R4, 0x7e",
    "HGMMA.64x256x16 R24, gdesc[UR4], R24", "ISETP.GE.AND P0, PT, R4, R5, PT", "R2UR UR4, R4",
    "LOP3.LUT P0, RZ, R4, R5, RZ, 0xc0, !PT"])
def test_other_instructions_are_none(instruction):
    assert hazards_with(instruction) == set()


def test_a_write_in_the_next_turn_of_a_loop_is_found():
    """The wait leaves one group in flight: this turn's product is still running when the next turn begins."""
    assert compile.unwaited_writes(SAFE.replace("gsb0, 0x0", "gsb0, 0x1").replace("MOV R4, R92", "NOP")) == {0x00}


def test_a_way_around_the_wait_is_followed():
    assert hazards_with("@!P1 BRA 0x40") == {0x00, 0x40}


COMPILED = """
import json
from hivg.bench import compile
rows = []
for types in ("bfloat16", "autocast"):
    kernels = compile.compile_kernels(types, 90)
    others = compile.compile_kernels(types, 90, B=16, T=1)
    for name, kernel in kernels.items():
        registers, spilled, hazards, sass = compile.inspect(kernel)
        rows.append([name, spilled, len(hazards), kernel.metadata.shared, "HGMMA" in sass,
                     "DEPBAR.LE gsb0, 0x1" in sass, others.get(name, kernel) is kernel])
print(json.dumps(rows))
"""


@pytest.mark.slow
@pytest.mark.skipif(not compile.CUOBJDUMP.exists(), reason="this Triton comes without cuobjdump")
def test_compiled_for_hopper():
    """In a process without the interpreter. triton-lang/triton issue 9433: the installed Triton overwrites no operand
    too early."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = python("-c", COMPILED, env=environment)
    assert run.returncode == 0, run.stderr
    rows = json.loads(run.stdout)
    assert len(rows) == 2 * 5
    for name, spilled, hazards, shared, is_asynchronous, leaves_one_in_flight, is_shared in rows:
        assert (spilled, hazards) == (0, 0) and shared <= 232_448, name
        large = name.startswith(("forward 64", "forward 128"))
        assert is_asynchronous == large, name
        assert leaves_one_in_flight == (large and fusion_triton.SAFE_OVERLAP), name
        assert is_shared, name  # another batch size or length of expression does not compile again


def test_where_it_cannot_run_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="needs a GPU.*bench compile"):
        fusion.bench_fusion(SimpleNamespace(device="cpu", output=tmp_path))
    if fusion_triton.INTERPRETED:
        with pytest.raises(ValueError, match="TRITON_INTERPRET unset"):
            compile.bench_compile(None)


@pytest.fixture
def small_bench(monkeypatch, tmp_path):
    """The benchmark on tiny cases, with fixed numbers for all that needs a GPU -> its arguments."""
    if torch.cuda.is_available():
        pytest.skip("computes on the CPU, in the interpreter")
    make_tensors = fusion.make_tensors
    stand_ins = dict(
        CASES=[fusion.Case("ViT-B", 12, 1, 2, "bfloat16"), fusion.Case("ViT-B", 12, 1, 4, "autocast")],
        SIZES={"ViT-B": (8, 6)}, INTERPRETED=False, choose_device=lambda name: torch.device("cuda"),
        do_bench=lambda function, **options: (1.0, 2.0, 3.0), time_by_graph=lambda function: 1.5,
        memory_of=lambda function, device: 0.1, check_compile=lambda *_: None, product_rate=lambda dtype, device: 1e14,
        make_tensors=lambda case, device: make_tensors(case, "cpu"))
    for name, value in stand_ins.items():
        monkeypatch.setattr(fusion, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    return SimpleNamespace(device="auto", output=tmp_path / "out")


def test_table_and_charts(small_bench):
    fusion.bench_fusion(small_bench)
    lines = (small_bench.output / "fusion.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ViT-B")]
    assert len(rows) == 2 * 3 * 2  # cases, ways, passes
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert rows[-1].startswith("| ViT-B K 12 T 1 B 4 autocast | both | ours |")
    assert "| 1.000 | 2.000 | 3.000 | 1.500 | 0.1 |" in rows[-1]
    assert (small_bench.output / "fusion.png").stat().st_size > 1000


def test_a_wrong_kernel_is_not_timed(small_bench, monkeypatch):
    right = fusion.adaptive_fusion
    monkeypatch.setattr(fusion, "adaptive_fusion", lambda *tensors: 1.1 * right(*tensors))
    with pytest.raises(ValueError, match="more than twice plain PyTorch's in ViT-B K 12 T 1 B 2 bfloat16; ViT-B"):
        fusion.bench_fusion(small_bench)
    rows = [line for line in (small_bench.output / "fusion.md").read_text().splitlines() if "| ours |" in line]
    assert len(rows) == 2 and all("WRONG" in row for row in rows)


def test_it_stops_in_time(small_bench, monkeypatch, capsys):
    monkeypatch.setattr(fusion, "time", SimpleNamespace(perf_counter=iter([0, 0, fusion.LIMIT + 1]).__next__))
    fusion.bench_fusion(small_bench)
    out = capsys.readouterr().out
    assert out.count("left out after") == 1 and "B 2 bfloat16 | both | ours" in out
