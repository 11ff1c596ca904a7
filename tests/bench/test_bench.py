"""The benchmarks measure real work, and what they count follows the formulas."""

import sys
from types import SimpleNamespace

import pytest
import torch
from makers import BUNDLED, ROOT, refusal
from makers_use import call
from PIL import Image

from hivg import weights
from hivg.bench import __main__ as bench
from hivg.bench import efficiency, timing, training, use
from hivg.clip import CLIP, CLIP_SIZES, CLIPConfig
from hivg.data.published.reading import read_samples
from hivg.model import HiVG, HiVGConfig

SMALL = CLIPConfig(image_size=64, patch_size=16, vision_width=64, vision_layers=12, vision_heads=1, text_width=64,
                   text_layers=12, text_heads=1, embed_dim=32, vocab_size=600)
TINY = CLIPConfig(image_size=32, patch_size=8, vision_width=32, vision_layers=6, vision_heads=2, text_width=24,
                  text_layers=4, text_heads=2, embed_dim=16, vocab_size=600)
N = 17  # visual tokens of TINY
T = 20  # text positions


def test_measure_warms_up():
    calls = []
    low, median, high = timing.measure(lambda: calls.append(1), 5)
    assert len(calls) == 8 and 0 < low <= median <= high


def test_peak_memory_counts_from_the_reset():
    timing.reset_peak_memory(timing.CPU)
    before = timing.peak_memory(timing.CPU)
    block = bytearray(300_000_000)
    assert timing.peak_memory(timing.CPU) - before > 250e6
    del block
    timing.reset_peak_memory(timing.CPU)
    assert timing.peak_memory(timing.CPU) - before < 100e6


@pytest.mark.slow
def test_memory_is_that_of_the_work_alone():
    (low, median, high), peak = timing.measure_alone("import numpy as np", "a = np.ones(int(sys.argv[1]))", "20000000")
    assert 0 < low <= median <= high and 1.5e8 < peak < 2.5e8


@pytest.mark.parametrize("child, told", [
    ("print('a\\nerror: b.png: no image\\n', file=sys.stderr); sys.exit(2)", "b.png: no image"),
    ("sys.exit(3)", "ended with 3"), ("1 / 0", "ZeroDivisionError: division by zero")])
def test_a_program_that_fails_is_told_in_one_line(child, told):
    assert refusal(timing.measure_alone, "pass", child, "").endswith(told)


def test_the_openai_file_loads_as_one(tmp_path):
    use.write_openai(CLIP(SMALL), tmp_path / "clip.pt")
    loaded = weights.load_clip(tmp_path / "clip.pt")
    assert loaded.config == SMALL and loaded.info == {"source": "OpenAI's CLIP"}


def test_the_refer_files_are_read(tmp_path):
    use.write_refer(tmp_path, objects=20, images=6)
    samples = read_samples(tmp_path, "refcoco", "train")
    assert len(samples) == 60 and len({sample.image for sample in samples}) == 6


def test_a_step_gives_every_trained_parameter_a_gradient(monkeypatch):
    monkeypatch.setitem(CLIP_SIZES, "small", SMALL)
    model = training.preset_model("refcoco-base", "small")
    assert model.config.text_layers == (12,) and model.config.lora_rank == 32 and model.config.stage == 3
    training.forward_backward(model, training.random_batch(2, SMALL, timing.CPU), torch.float32)
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def blocks(layers, tokens, width):
    """Operations of transformer blocks: q, k, v, out and an MLP four times as wide; q k^T and the mean of v."""
    return layers * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)


def test_operations_follow_the_formulas():
    counts = efficiency.operations(HiVGConfig.for_clip(TINY))
    patches = 2 * 16 * (3 * 8 * 8) * 32
    assert counts["ViT"] == patches + blocks(6, N, 32)
    assert counts["text tower"] == blocks(4, T, 24) + 2 * T * 24 * 16
    fusion = 2 * T * (2 * 24) * 32  # two text layers
    attention = 2 * (2 * N + 2 * T) * 32**2 + 2 * 2 * N * T * 32
    ffn = 2 * N * 8 * 32**2
    assert counts["bridges"] == 3 * (fusion + attention + ffn)
    assert all(count > 0 for count in counts.values())


@pytest.mark.parametrize("kind", ["none", "projected", "constant"])
def test_operations_of_every_kind_of_bridge(kind):
    counts = efficiency.operations(HiVGConfig.for_clip(TINY, bridge=kind))
    assert (counts["bridges"] == 0) == (kind == "none") and min(counts.values()) >= 0


def test_a_step_costs_about_three_forwards_less_what_is_frozen():
    config = HiVGConfig.for_clip(TINY, lora_rank=1)
    forward = sum(efficiency.operations(config).values())
    assert 1.5 * forward < efficiency.step_operations(config) < 3.3 * forward


def test_parameters_of_each_stage():
    config = HiVGConfig.for_clip(TINY, lora_rank=2)
    rows = efficiency.parameters(config)
    assert [name for name, _, _ in rows] == ["warm-up", "Hi LoRA 1", "Hi LoRA 2", "Hi LoRA 3"]
    clip = sum(p.numel() for p in HiVG(config).clip.parameters())
    assert rows[0][2] - rows[0][1] == clip
    pair = 2 * 2 * 4  # rank 2, A and B, on four projections; times the width
    assert rows[1][2] - rows[0][2] == pair * (2 * 32 + 4 * 24)
    assert rows[3][1] - rows[0][1] == pair * (6 * 32 + 4 * 24)


@pytest.mark.slow
def test_tables_and_charts(monkeypatch, tmp_path, capsys):
    """Each row is of a process of its own: what this one holds is not in its memory."""
    monkeypatch.setattr(efficiency, "choose_dtype", lambda name, device: torch.float32)
    args = SimpleNamespace(size="tiny", device="cpu", batch_sizes=[1], output=tmp_path / "new" / "folder")
    ballast = b"x" * 500_000_000
    own = timing.memory("VmRSS") / 2**20  # MiB; PyTorch alone takes 300, built for GPUs 500
    efficiency.bench_efficiency(args)
    del ballast
    text = (args.output / "efficiency.md").read_text()
    assert text in capsys.readouterr().out
    for row in ("Hi LoRA 3 |", "grounding encoder |", "forward | float32 | 1 |", "training step | float32 | 1 |"):
        assert f"| {row}" in text
    forward, step = [float(line.split("|")[7]) for line in text.splitlines() if "| float32 |" in line]  # peak MiB
    assert 50 < forward < step < own
    assert Image.open(args.output / "efficiency.png").height > 1000
    args.size = "ViT-H"
    with pytest.raises(ValueError, match="no CLIP is called 'ViT-H'; there are tiny"):
        efficiency.bench_efficiency(args)


def test_forward_is_measured_in_each_dtype(monkeypatch, capsys):
    monkeypatch.setattr(use, "measure", lambda function, repeats, device: function() and [1.0, 2.0, 3.0])
    monkeypatch.setattr(use, "choose_dtype", lambda name, device: torch.bfloat16)
    use.bench_forward(SimpleNamespace(weights=BUNDLED, device="cpu"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[0].startswith("forward, float32, 1 expression  ")
    assert lines[-1].startswith("forward, bfloat16, 32 expressions about one image")


def test_every_benchmark_has_its_function():
    for name, module in bench.BENCHES.items():
        assert f"\ndef bench_{name}(args):" in (ROOT / f"hivg/bench/{module}.py").read_text(), name


@pytest.mark.parametrize("words, told", [
    (["backward"], "no benchmark is called 'backward'; there are forward, data"),
    (["step", "--batch_sizes", "8", "-1"], "--batch_sizes: -1 given, 1 or more needed"),
    (["launches", "--batch_size", "0"], "--batch_size: 0 given, 1 or more needed"),
    (["launches"], "launches needs Triton"), (["fusion"], "fusion needs Triton"), (["compile"], "compile needs Triton"),
    (["start", "--weights", "none.safetensors", "--device", "cpu"], "none.safetensors: no such weights file")])
def test_what_cannot_be_measured_gets_one_line(monkeypatch, capfd, words, told):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    code, _, err = call(bench.main, capfd, monkeypatch, *words)
    assert code == 2 and err.startswith(f"error: {told}") and len(err.splitlines()) == 1
