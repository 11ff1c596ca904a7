"""The count of launches: its limits, what counts as one, and which part it belongs to."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from hivg import clip
from hivg.bench import training

pytest.importorskip("triton")
from hivg.bench import launches  # noqa: E402  after the check that Triton is there

# The most launches of a training step, {preset: limit}; None is the default run. Whoever saves some lowers them.
LIMITS = {None: 1990, "refcocog-base": 2422}


@pytest.fixture(scope="module")
def default_run():
    return launches.count(None, 32)


def by_phase(counts, column, name):
    """{phase: launches} of a part (column 1) or a kind (column 2)."""
    return {phase: sum(n for key, n in counts.items() if (key[0], key[column]) == (phase, name))
            for phase in launches.PHASES}


def test_the_default_run_launches_no_more(default_run):
    assert default_run.total() <= LIMITS[None]


@pytest.mark.slow
def test_a_preset_launches_no_more():
    assert launches.count("refcocog-base", 140).total() <= LIMITS["refcocog-base"]


def test_attention_and_fusion_are_single_operators(default_run):
    attentions = 4 + 6 + 3 + 4  # text tower, ViT, bridges, grounding encoder
    assert by_phase(default_run, 2, "attention") == {"forward": attentions, "backward": 3 * attentions, "step": 0}
    assert by_phase(default_run, 2, "fusion") == {"forward": 2 * 3, "backward": 12 * 3, "step": 0}
    assert clip.attend is not launches.attend and F.dropout is not launches.dropout  # put back


def test_a_backward_belongs_to_the_part_that_made_its_node(default_run):
    parts = {part for _, part, _ in default_run}
    assert {"lora.AddUpdate", "clip.MLP", "bridge.Bridge", "model.EncoderLayer", "losses", "optimizers"} <= parts
    # these launch in the forward or the backward alone
    for part in parts - {"fusion_triton", "gradients summed", "fast.JoinedAttention", "lora.JoinedLoRA"}:
        phases = by_phase(default_run, 1, part)
        assert (phases["forward"] > 0) == (phases["backward"] > 0) != (phases["step"] > 0), part
    assert by_phase(default_run, 1, "gradients summed")["backward"] < 50


@pytest.mark.parametrize("function, launched", [
    (lambda x: x @ x, 1), (lambda x: x.T.view(2, 8)[1:], 0), (lambda x: x.add_(1), 1), (lambda x: x.bfloat16(), 1),
    (lambda x: torch.empty_like(x), 0), (lambda x: torch._foreach_add_([x] * 49, 1.0), 2)],
    ids=["product", "view", "in place", "conversion", "empty", "list"])
def test_what_counts(function, launched):
    x = torch.ones(4, 4).T
    with launches.Launches() as counted:
        counted.phase = "forward"
        function(x)
    assert counted.counts.total() == launched


def test_the_default_run_is_that_of_train():
    settings = vars(train.Settings())
    assert training.DEFAULT_RUN.items() <= settings.items()


def test_tables(monkeypatch, capsys, default_run):
    monkeypatch.setattr(launches, "count", lambda preset, batch_size: default_run)
    launches.bench_launches(SimpleNamespace(preset=None, batch_size=None))
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"python train.py, batch 32: {default_run.total():,} launches"
    rows = [[int(cell) for cell in line.split(" | ")[1:-1] + [line.split(" | ")[-1].rstrip(" |")]]
            for line in lines if line[-3:-2].isdigit()]
    assert all(sum(phases) == whole for *phases, whole in rows)
    assert sum(whole for *_, whole in rows) == 2 * default_run.total()  # in each of the two tables
