"""python -m hivg.bench efficiency: its counts against formulas, and its tables and picture."""

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
    """Operations of transformer blocks: q, k, v, out and an MLP four times as wide; q k^T and the mean of v."""
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
def test_parts_sum_up_with_every_bridge(kind):
    config = HiVGConfig.for_clip(SMALL, bridge=kind)
    counts = efficiency.operations(config)
    assert (counts["bridges"] == 0) == (kind == "none") and min(counts.values()) >= 0


@pytest.mark.slow
def test_a_step_costs_about_three_forwards_less_what_is_frozen():
    config = HiVGConfig.for_clip(SMALL, lora_rank=1)
    forward = sum(efficiency.operations(config).values())
    assert 1.5 * forward < efficiency.step_operations(config) < 3.3 * forward


def test_parameters_are_the_models():
    config = HiVGConfig.for_clip(SMALL, lora_rank=2)
    rows = efficiency.parameters(config)
    assert [name for name, _, _ in rows] == ["warm-up", "Hi LoRA 1", "Hi LoRA 2", "Hi LoRA 3"]
    model = HiVG(config)
    clip = sum(p.numel() for p in model.clip.parameters())
    assert rows[0][2] - rows[0][1] == clip
    pair = 2 * 2 * 4  # rank 2, A and B, on four projections; times the width
    assert rows[1][2] - rows[0][2] == pair * (2 * 32 + 4 * 24)
    assert rows[3][1] - rows[0][1] == pair * (6 * 32 + 4 * 24)


@pytest.mark.slow
def test_tables_and_picture(monkeypatch, tmp_path, capsys):
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


def test_memory_counts_from_the_reset():
    """Memory that was given back before does not count."""
    device = torch.device("cpu")
    timing.reset_peak_memory(device)
    before = timing.peak_memory(device)
    block = bytearray(300_000_000)
    assert timing.peak_memory(device) - before > 250e6
    del block
    timing.reset_peak_memory(device)
    assert timing.peak_memory(device) - before < 100e6
