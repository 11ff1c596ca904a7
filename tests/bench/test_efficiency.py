"""python -m hivg.bench efficiency: its counts against formulas, its tables and chart, memory and energy."""

from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from hivg.bench import efficiency, timing
from hivg.clip import CLIP_SIZES, CLIPConfig
from hivg.model import HiVG, HiVGConfig

SMALL = CLIPConfig(image_size=32, patch_size=8, vision_width=32, vision_layers=6, vision_heads=2, text_width=24,
                   text_layers=4, text_heads=2, embed_dim=16, vocab_size=600)
N = 17  # visual tokens
T = 20  # text positions


def blocks(n, layers, tokens, width):
    """Operations of transformer blocks: q, k, v, out and an MLP of four times the width; q k^T and the sum of v."""
    return layers * n * (2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width)


@pytest.mark.slow
def test_operations_are_those_of_the_formulas():
    config = HiVGConfig.for_clip(SMALL)
    counts = efficiency.operations(config)
    patches = 2 * 16 * (3 * 8 * 8) * 32
    assert counts["ViT"] == patches + blocks(1, 6, N, 32)
    assert counts["text tower"] == blocks(1, 4, T, 24) + 2 * T * 24 * 16
    fusion = 2 * T * (2 * 24) * 32  # two text layers
    attention = 2 * (2 * N + 2 * T) * 32**2 + 2 * 2 * N * T * 32
    ffn = 2 * N * 8 * 32**2
    assert counts["bridges"] == 3 * (fusion + attention + ffn)
    assert all(count > 0 for count in counts.values())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["none", "projected", "constant"])
def test_parts_add_up_with_every_bridge(kind):
    counts = efficiency.operations(HiVGConfig.for_clip(SMALL, bridge=kind))
    assert (counts["bridges"] == 0) == (kind == "none") and min(counts.values()) >= 0


@pytest.mark.slow
def test_a_step_costs_up_to_three_forwards_less_what_is_frozen():
    config = HiVGConfig.for_clip(SMALL, lora_rank=1)
    forward = sum(efficiency.operations(config).values())
    assert 1.5 * forward < efficiency.step_operations(config) < 3.3 * forward


def test_parameters_are_those_of_the_model():
    config = HiVGConfig.for_clip(SMALL, lora_rank=2)
    rows = efficiency.parameters(config)
    assert [name for name, _, _ in rows] == ["warm-up", "Hi LoRA 1", "Hi LoRA 2", "Hi LoRA 3"]
    model = HiVG(config)
    clip = sum(p.numel() for p in model.clip.parameters())
    assert rows[0][2] - rows[0][1] == clip
    pair = 2 * 2 * 4  # rank 2, A and B, four projections; times the width
    assert rows[1][2] - rows[0][2] == pair * (2 * 32 + 4 * 24)
    assert rows[3][1] - rows[0][1] == pair * (6 * 32 + 4 * 24)


@pytest.mark.slow
def test_tables_and_chart(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(CLIP_SIZES, "small", SMALL)
    monkeypatch.setattr(efficiency, "REPEATS", 1)
    monkeypatch.setattr(timing, "WARM_UP", 0)
    args = SimpleNamespace(size="small", device="cpu", batch_sizes=[1, 2], output=tmp_path / "new" / "folder")
    efficiency.bench_efficiency(args)
    text = (args.output / "efficiency.md").read_text()
    assert text in capsys.readouterr().out
    for row in ("Hi LoRA 3 |", "grounding encoder |", "forward | float32 | 2 |", "training step | float32 | 1 |"):
        assert f"| {row}" in text
    assert Image.open(args.output / "efficiency.png").height > 1000
    args.size = "ViT-H"
    with pytest.raises(ValueError, match="no CLIP is called 'ViT-H'; there are tiny"):
        efficiency.bench_efficiency(args)


def test_energy_of_the_processors(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "RAPL", tmp_path / "none")
    assert timing.energy(torch.device("cpu")) is None
    # a part of a package and the whole machine do not count again
    for folder, name, microjoules in (("0", "package-0", 3_000_000), ("1", "package-1", 500_000), ("0:0", "core", 7),
                                      ("2", "psys", 9_000_000)):
        domain = tmp_path / f"intel-rapl:{folder}"
        domain.mkdir()
        (domain / "name").write_text(f"{name}\n")
        (domain / "energy_uj").write_text(f"{microjoules}\n")
    monkeypatch.setattr(timing, "RAPL", tmp_path)
    assert timing.energy(torch.device("cpu")) == 3.5
    (tmp_path / "intel-rapl:1/energy_uj").unlink()
    assert timing.energy(torch.device("cpu")) is None


def test_energy_of_a_gpu(monkeypatch):
    """With a stand-in for the driver's library, whose functions return 0 for success."""
    library = SimpleNamespace(
        nvmlInit_v2=lambda: 0, nvmlDeviceGetHandleByUUID=lambda uuid, handle: 0 if uuid == b"GPU-one" else 6,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle, found: setattr(found._obj, "value", 2500) or 0)
    monkeypatch.setattr(timing.ctypes, "CDLL", lambda name: library)
    assert timing.gpu_energy("one") == 2.5
    assert timing.gpu_energy("another") is None


@pytest.mark.parametrize("after, joules", [(10.0 + 2.0 * (timing.WARM_UP + efficiency.REPEATS), 2.0), (1.0, None)])
def test_energy_of_a_pass_is_that_of_one_call(after, joules, monkeypatch):
    """None where the counter has restarted at 0."""
    counter = iter([10.0, after])
    monkeypatch.setattr(efficiency, "energy", lambda device: next(counter))
    assert efficiency.measure_pass(lambda: None, torch.device("cpu"))[2] == joules


def test_peak_memory_starts_at_the_reset():
    device = torch.device("cpu")
    timing.reset_peak_memory(device)
    before = timing.peak_memory(device)
    block = bytearray(300_000_000)
    assert timing.peak_memory(device) - before > 250e6
    del block
    timing.reset_peak_memory(device)
    assert timing.peak_memory(device) - before < 100e6
