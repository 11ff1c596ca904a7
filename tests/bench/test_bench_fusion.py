"""The fusion's benchmark, and the kernels compiled for GPUs that are not there."""

import json
import os
import subprocess
import sys

import pytest
import torch
from makers import ROOT

triton = pytest.importorskip("triton")
from hivg import fusion_triton  # noqa: E402  after the check that Triton is there
from hivg.bench import compile, fusion  # noqa: E402
from hivg.bench.compile import find_hazards  # noqa: E402

SAFE = """
        /*0000*/                   MOV R4, R90 ;
        /*0010*/                   HGMMA.64x256x16.F32.BF16 R24, R4, gdesc[UR8], R24, gsb0 ;
        /*0020*/                   MOV R8, R91 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/                   MOV R4, R92 ;
        /*0050*/              @P0  BRA 0x0 ;
        /*0060*/                   EXIT ;
"""


@pytest.mark.parametrize("write", ["MOV R8, R91", "IMAD.WIDE.U32 R2, R9, R9, RZ", "STS.128 [R4], R8",
                                   "FADD R8, R4, R5", "HGMMA.64x256x16 R24, gdesc[UR4], R24", "R2UR UR4, R4",
                                   "ISETP.GE.AND P0, PT, R4, R5, PT", "R2P PR, R4, 0x7e",
                                   "LOP3.LUT P0, RZ, R4, R5, RZ, 0xc0, !PT"])
def test_what_writes_elsewhere_is_safe(write):
    assert find_hazards(SAFE.replace("MOV R8, R91", write)) == {}


@pytest.mark.parametrize("write", ["MOV R4, R90", "MOV R7, R90", "LDS.64 R6, [R2]", "LDSM.16.M88.4 R4, [R2]",
                                   "SHFL.BFLY PT, R4, R9, 0x1, 0x1f", "LOP3.LUT P0, R4, R9, R8, RZ, 0xc0, !PT",
                                   "HMMA.16816.F32.BF16 R4, R8, R9, R90", "CS2R R6, SRZ", "DFMA R6, R8, R8, R90"])
def test_a_write_before_the_wait_is_found(write):
    assert find_hazards(SAFE.replace("MOV R8, R91", write)) == {0x20: {0x10}}


def test_a_write_in_the_next_iteration_is_found():
    """The wait leaves one group in flight, so the product still runs when the next iteration begins."""
    assert find_hazards(SAFE.replace("gsb0, 0x0", "gsb0, 0x1").replace("MOV R4, R92", "NOP")) == {0x00: {0x10}}


def test_a_path_around_the_wait_is_found():
    assert find_hazards(SAFE.replace("MOV R8, R91", "@!P1 BRA 0x40")) == {0x00: {0x10}, 0x40: {0x10}}


COMPILED = """
import json
from hivg import fusion_triton
from hivg.bench.compile import compile_all
fixed = {}
for name in ("statistics_kernel", "forward_kernel", "gradients_kernel"):
    fixed[name] = [p.name for p in getattr(fusion_triton, name).params if p.do_not_specialize]
print(json.dumps({"rows": [*compile_all(80), *compile_all(90)], "fixed": fixed}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not compile.TOOL.exists(), reason="this Triton comes without cuobjdump")
def test_compiled_without_a_gpu():
    """In a process without the interpreter. No kernel spills, and with the installed Triton none overwrites the operand
    of a product too early (triton-lang/triton issue 9433)."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILED], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found["rows"]) == 2 * (6 + 6 + 4)  # capabilities; kernels and tiles of bfloat16, autocast, float32
    for row in found["rows"]:
        hopper = row["capability"] == 90
        assert row["hazards"] == row["spills"] == 0 < row["registers"] <= 255, row
        assert row["shared"] <= (232_448 if hopper else 166_912), row
        # asynchronous products in all but the smallest tile
        has_wgmma = hopper and row["kernel"].startswith(("forward 64", "forward 128"))
        assert (row["HGMMA"] > 0) == has_wgmma, row
        assert (row["in flight"] > 0) == (has_wgmma and fusion_triton.SAFE_OVERLAP), row
    # a new batch size or length of expression needs no new compilation
    assert found["fixed"] == {"statistics_kernel": ["M", "T"], "forward_kernel": ["B", "T", "steps"],
                              "gradients_kernel": ["B", "T", "samples"]}


def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="on a GPU.*bench compile"):
        fusion.bench_fusion(torch.device("cpu"), tmp_path)
    if fusion_triton.INTERPRETED:
        with pytest.raises(ValueError, match="unset TRITON_INTERPRET"):
            next(compile.compile_all(90))


@pytest.fixture
def small_bench(monkeypatch):
    """The benchmark on tiny cases, on the CPU by the interpreter, with fixed figures for whatever needs a GPU."""
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    fixed = {"CASES": [("ViT-B", 12, 1, 2, "bfloat16"), ("ViT-B", 12, 1, 4, "autocast")], "SIZES": {"ViT-B": (8, 6)},
             "INTERPRETED": False, "do_bench": lambda function, **options: (1.0, 2.0, 3.0),
             "time_by_graph": lambda function: 1.5, "memory_of": lambda function, device: 0.1,
             "product_rate": lambda dtype, device: 100.0, "copy_rate": lambda device: 1000.0}
    for name, value in fixed.items():
        monkeypatch.setattr(fusion, name, value)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    make_tensors = fusion.make_tensors
    monkeypatch.setattr(fusion, "make_tensors", lambda case, device: make_tensors(case, "cpu"))


def test_table_and_chart(small_bench, tmp_path):
    fusion.bench_fusion(torch.device("cuda"), tmp_path / "out")
    lines = (tmp_path / "out" / "fusion.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ViT-B")]
    assert len(rows) == 2 * 3 * 2  # cases, ways, passes
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1
    assert "| ViT-B K 12 T 1 B 4 autocast | both | ours |" in rows[-1] and "| 1.500 |" in rows[-1]
    assert (tmp_path / "out" / "fusion.png").stat().st_size > 1000


def test_a_wrong_kernel_is_not_timed(small_bench, monkeypatch, tmp_path):
    right = fusion.adaptive_fusion
    monkeypatch.setattr(fusion, "adaptive_fusion", lambda *tensors: 1.1 * right(*tensors))
    with pytest.raises(ValueError, match="further from the exact result"):
        fusion.bench_fusion(torch.device("cuda"), tmp_path)
    rows = [line for line in (tmp_path / "fusion.md").read_text().splitlines() if "| ours |" in line]
    assert len(rows) == 2 and all("WRONG" in row for row in rows)


def test_it_stops_in_time(small_bench, monkeypatch, tmp_path, capsys):
    seconds = iter([0, 271, 280])
    monkeypatch.setattr(fusion.Report, "seconds", lambda report: next(seconds))
    fusion.bench_fusion(torch.device("cuda"), tmp_path)
    assert "\nViT-B K 12 T 1 B 4 autocast: left out, 270 seconds had passed" in capsys.readouterr().out
