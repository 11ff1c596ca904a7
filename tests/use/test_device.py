"""Everything runs on a device that is not the CPU, with the CPU's results: on a GPU where there is one, else on a
stand-in that refuses to mix its tensors with those of the CPU."""

import elsewhere
import numpy as np
import pytest
import torch
from makers import make_batch, make_hivg
from makers_training import ON_CPU, Killed, assert_same_log, kill, log_of, shrink
from makers_use import TEXTS, make_image

import train
from hivg import Grounder, grounder, weights
from hivg.data.batches import ShapesTensors, evaluation_batches
from hivg.data.drawn.scenes import SPLITS
from hivg.evaluate import __main__ as evaluate
from hivg.training import run
from train import Settings

HAS_GPU = torch.cuda.is_available()


@pytest.fixture
def device(monkeypatch):
    if HAS_GPU:
        yield torch.device("cuda")
        return
    elsewhere.stand_in(monkeypatch)
    with elsewhere.ElsewhereMode():
        yield elsewhere.DEVICE


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU, which refuses by itself")
def test_the_stand_in_refuses_mixed_devices(device):
    there = torch.arange(6.0).view(2, 3).to(device)
    assert there.device.type == "meta" and (there + 1).sum().item() == 21
    assert torch.equal((there @ there.T).cpu(), torch.tensor([[5.0, 14.0], [14.0, 50.0]]))
    assert (there * torch.tensor(2.0)).device.type == "meta"  # a scalar may be anywhere
    for mix in (lambda: there + torch.ones(2, 3), lambda: there @ torch.ones(3, 1), lambda: there[torch.tensor([0])],
                lambda: torch.cat([there, torch.ones(1, 3)]), lambda: torch.nn.Linear(3, 2)(there)):
        with pytest.raises(elsewhere.MixedDevices):
            mix()


def assert_near(a, b):
    np.testing.assert_allclose(a, b, atol=1e-3 if HAS_GPU else 1e-5, rtol=1e-3 if HAS_GPU else 1e-5)


@pytest.mark.parametrize("kind", ["adaptive", "projected", "constant", "none"])
def test_forward(kind, device):
    model = make_hivg(dtype=torch.float32, stage=1, bridge=kind)
    batch = make_batch(dtype=torch.float32)
    expected = model(*batch)
    output = model.to(device)(*(x.to(device) for x in batch))
    for name, value in vars(expected).items():
        if value is not None:
            there = getattr(output, name)
            assert there.device.type == device.type, name
            assert_near(there.detach().cpu(), value.detach())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_grounder(model, device, monkeypatch, dtype):
    expected = Grounder(model, "cpu", dtype)
    monkeypatch.setattr(grounder, "choose_device", lambda name: device)
    there = Grounder(model, "auto", dtype)
    assert there.model.reg_token.device.type == device.type
    images = [make_image(), make_image().rotate(90, expand=True)]
    results = there.ground(images[0], TEXTS) + there.ground_pairs(images, TEXTS[:2])
    wanted = expected.ground(images[0], TEXTS) + expected.ground_pairs(images, TEXTS[:2])
    for a, b in zip(results, wanted, strict=True):
        tolerance = 200 * (0.02 if dtype == "bfloat16" else 1e-4)
        np.testing.assert_allclose(a.box, b.box, atol=tolerance)
        assert a.heatmap.shape == b.heatmap.shape and a.mask.shape == b.mask.shape and 0 <= a.score <= 1


def test_evaluation(model, device, monkeypatch):
    monkeypatch.setitem(SPLITS, "val", (3, SPLITS["val"][1]))
    dataset = ShapesTensors("val", 64)
    expected = evaluate.predict(model, evaluation_batches(dataset), masks=True)
    there = model.for_prediction(device, torch.float32)
    rows = evaluate.predict(there, evaluation_batches(dataset), device, masks=True)
    for a, b in zip(rows, expected, strict=True):
        assert_near(a["box"], b["box"])
        assert_near(a["score"], b["score"])
        assert a["mask_iou"] == pytest.approx(b["mask_iou"], abs=0.05)


@pytest.mark.slow
def test_training(clip_file, device, monkeypatch, tmp_path):
    """All stages with validation and the files they write, two steps each, once interrupted and resumed. Muon
    leaves what is no matrix to AdamW, so both are tried."""
    shrink(monkeypatch, dropout=0.0)  # a GPU draws other random numbers
    monkeypatch.chdir(tmp_path)
    s = Settings(name="cpu", clip=str(clip_file), epochs=(1, 1, 1, 1), epoch_samples=16, batch_size=8, warmup_steps=1,
                 optimizer="muon", **ON_CPU)
    train.train(s)
    monkeypatch.setattr(run, "choose_device", lambda name: device)
    there = Settings(**vars(s) | {"name": "there"})
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, train, "clip_and_step", 4)
        train.train(there)
    last = train.train(Settings(**vars(there) | {"resume": True}))
    assert_same_log(log_of("runs/cpu"), log_of("runs/there"), rel=2e-3, abs=2e-3)
    assert all(p.device.type == "cpu" for p in weights.load_hivg(last).parameters())
