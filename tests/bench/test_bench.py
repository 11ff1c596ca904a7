"""The benchmarks measure real work: the files that they write are read like those of other programs, a step trains."""

import sys
from types import SimpleNamespace

import pytest
import torch
from makers import BUNDLED
from makers_use import call

from hivg import weights
from hivg.bench import __main__ as bench
from hivg.bench import training, use
from hivg.bench.timing import measure, measure_alone
from hivg.clip import CLIP, CLIP_SIZES, CLIPConfig
from hivg.data.published.reading import read_samples
from hivg.losses import LossWeights
from hivg.training.criterion import Criterion

SMALL = CLIPConfig(image_size=64, patch_size=16, vision_width=64, vision_layers=12, vision_heads=1, text_width=64,
                   text_layers=12, text_heads=1, embed_dim=32, vocab_size=600)


def test_measure_counts_the_runs_after_the_warm_up():
    calls = []
    low, median, high = measure(lambda: calls.append(1), 5)
    assert len(calls) == 8 and 0 < low <= median <= high


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
    criterion = Criterion(model, LossWeights(), "smooth_l1")
    training.forward_backward(criterion, training.random_batch(2, SMALL, torch.device("cpu")))
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_memory_of_a_step_is_counted(monkeypatch):
    """Parameters, gradients, AdamW's two averages, and a part that grows with the batch."""
    monkeypatch.setitem(CLIP_SIZES, "small", SMALL)
    model = training.preset_model("refcoco-base", "small")
    constant = sum(p.nbytes * (4 if p.requires_grad else 1) for p in model.parameters())
    two, four, eight = (training.count_memory("refcoco-base", "small", n, torch.float32) for n in (2, 4, 8))
    assert constant < two < four < eight
    assert (eight - four) == pytest.approx(2 * (four - two), rel=0.1)


def test_tensors_are_counted_as_long_as_they_exist():
    with training.TensorMemory() as memory:
        a = torch.ones(1000)
        b = a.view(10, 100)  # shares the storage
        c = a + 1
        assert (memory.now, memory.most) == (8000, 8000)
        del a, c
        assert (memory.now, memory.most) == (4000, 8000)
        del b
        assert (memory.now, memory.most) == (0, 8000)


@pytest.mark.slow
def test_only_the_work_is_measured():
    (low, median, high), most = measure_alone("import numpy as np", "a = np.ones(int(sys.argv[1]))", "20000000")
    assert 0 < low <= median <= high and 1.5e8 < most < 2.5e8


def test_forward_is_measured_in_each_dtype(monkeypatch):
    calls = []
    monkeypatch.setattr(use, "measure", lambda function, repeats, device: function() and [1.0, 2.0, 3.0])
    monkeypatch.setattr(use, "choose_dtype", lambda name, device: torch.bfloat16)
    monkeypatch.setattr(use, "show", lambda name, times: calls.append(name))
    use.bench_forward(SimpleNamespace(weights=BUNDLED, device="cpu"))
    assert len(calls) == 8 and calls[0] == "forward, float32, 1 expression"
    assert calls[-1] == "forward, bfloat16, 32 expressions about one image"


@pytest.mark.parametrize("words, told", [
    (["backward"], "no benchmark is called 'backward'; there are forward, data"),
    (["step", "--batch_sizes", "8", "-1"], "--batch_sizes must be 1 or more, not -1"),
    (["fusion"], "fusion needs Triton"), (["compile"], "compile needs Triton"),
    (["start", "--weights", "none.safetensors", "--device", "cpu"], "none.safetensors: no such weights file")])
def test_what_cannot_be_measured_gets_one_line(monkeypatch, capfd, words, told):
    monkeypatch.setitem(sys.modules, "triton", None)  # as if it were not installed
    code, _, err = call(bench.main, capfd, monkeypatch, *words)
    assert code == 2 and err.startswith(f"error: {told}") and len(err.splitlines()) == 1


@pytest.mark.parametrize("child, told", [
    ("print('a\\nerror: b.png: no image\\n', file=sys.stderr); sys.exit(2)", "b.png: no image"),
    ("sys.exit(3)", "ended with 3"), ("1 / 0", "ZeroDivisionError: division by zero")])
def test_a_program_that_fails_gives_one_line(child, told):
    with pytest.raises(ValueError) as caught:
        measure_alone("pass", child, "")
    assert str(caught.value).endswith(told) and "\n" not in str(caught.value)
