"""--graph without a GPU: a call takes the place of the recording, on the same memory and in the same order."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from makers import assert_close, calls_of
from makers_training import assert_one_line, assert_same_log, assert_same_run, log_of, run_script, shrink, train_until

import train
from hivg.training.graph import WARM_UP, GraphedStep
from hivg.training.optimizers import make_optimizers, set_learning_rate

CPU = torch.device("cpu")


def make_part(length, seed):
    """Two samples whose texts have `length` positions."""
    numbers = torch.Generator().manual_seed(seed)
    part = {name: torch.rand(2, 3, generator=numbers) for name in ("images", "padding_mask", "boxes", "masks")}
    ids = torch.randint(1, 90, (2, length), generator=numbers)
    return part | {"image_ids": torch.arange(2), "token_ids": ids, "expressions": ["a", "b"]}


def test_recorded_steps_read_the_same_memory():
    """Each length, rounded up, is recorded once, after its warm-up; all parts of a step are as long as the longest."""
    calls = []

    def step(batches):
        calls.append([batch["images"].data_ptr() for batch in batches] + [batches[0]["token_ids"].data_ptr()])
        return {"sum": sum(batch["token_ids"].sum() + batch["images"].sum() for batch in batches),
                "lengths": [batch["token_ids"].shape[1] for batch in batches]}

    graphed = GraphedStep(step, [], 13, CPU)
    for lengths, expected in (((5, 3), 8), ((8, 1), 8), ((9, 2), 13), ((13, 13), 13)):
        for seed in range(WARM_UP + 2):
            parts = [make_part(length, seed) for length in lengths]
            results = graphed(iter(parts))
            assert results["lengths"] == [expected] * 2
            assert results["sum"] == sum(part["token_ids"].sum() + part["images"].sum() for part in parts)
    assert len({tuple(call) for call in calls}) == 1 and graphed.replays.keys() == {8, 13}


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_the_rate_of_a_recorded_step_can_change(kind):
    """It is a tensor, the same one at all times, and gives the same parameters as a number."""
    ends = []
    for is_graphed in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 4)
        optimizers = make_optimizers(model, kind, 0.1)
        if is_graphed:
            GraphedStep(None, optimizers, 8, CPU)
            rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
        for rate in (1e-2, 3e-2):
            set_learning_rate(optimizers, rate)
            model(torch.ones(2, 5)).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
        ends.append(model.weight.detach())
    assert all(group["lr"] is rate for group, rate in zip(
        (group for optimizer in optimizers for group in optimizer.param_groups), rates, strict=True))
    assert_close("weight", *ends, 1e-6)


def test_graphed_training_is_the_same(world, tiny, monkeypatch):
    """All stages, with accumulation, up to the rounding of longer padding; it can be resumed, bit for bit."""
    shrink(monkeypatch, dropout=0.0)
    s = replace(tiny, accumulate=(2,), epoch_samples=16 * (WARM_UP + 2), epochs=(1, 1, 1, 1))
    recorded = calls_of(monkeypatch, GraphedStep, "record")
    train.train(replace(s, name="plain"))
    assert not recorded
    train.train(replace(s, name="graphed", graph=True))
    assert len(recorded) > 1
    assert_same_log(log_of("runs/graphed"), log_of("runs/plain"), rel=2e-3, abs=1e-4)
    s = replace(s, name="killed", graph=True, save_minutes=0)
    train_until(monkeypatch, s, "to_device", 2 * WARM_UP + 4)
    train.train(replace(s, resume=True))
    assert_same_run(Path("runs/killed"), Path("runs/graphed"))


@pytest.mark.parametrize("cause, expected, message", [
    ("not permitted in a recording\nmore", ValueError, "--graph: this step cannot be recorded .not permitted"),
    ("CUDA out of memory. Tried to allocate 2 GiB", RuntimeError, "out of memory")])
def test_a_recording_that_fails_says_how_to_go_on(monkeypatch, cause, expected, message):
    """As torch.cuda.graph does, its stand-in raises another error when it is left."""
    @contextmanager
    def recording(*args, **options):
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    def step(batches):
        raise RuntimeError(cause)

    graphed = GraphedStep(step, [], 8, CPU)
    graphed.stream = "a stream"
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    with pytest.raises(expected, match=message):
        graphed.record([])


def test_graph_is_refused_where_it_cannot_be(world, tiny, monkeypatch, capfd):
    assert_one_line(run_script(monkeypatch, capfd, "--graph", "--recompute"), "--recompute")
    monkeypatch.setattr(train.distributed, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="--graph is for one process, not 2"):
        train.train(replace(tiny, graph=True))
