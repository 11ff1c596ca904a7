"""The learning rate, the optimizers, and their step."""

import pytest
import torch
from makers import assert_close, calls_of, make_hivg

from hivg.training.optimizers import (
    Muon,
    check_finite,
    learning_rate,
    make_optimizers,
    orthogonalise,
    set_learning_rate,
    step_optimizers,
)


@pytest.mark.parametrize("steps, warmup", [(100, 10), (40, 1), (1000, 100)])
def test_learning_rate(steps, warmup):
    lr = [learning_rate(step, steps, 2.0, warmup) for step in range(steps)]
    top = lr.index(max(lr))
    assert top in (warmup - 1, warmup - 2, 0)  # linear up to there, against the first of the cosine
    assert lr[0] == pytest.approx(2.0 / warmup) and 1.9 < max(lr) <= 2.0
    assert all(a > b for a, b in zip(lr[warmup:], lr[warmup + 1 :]))
    assert lr[steps // 2] == pytest.approx(1.0)  # half of the peak at half of the way
    assert 0 < lr[-1] < 0.01 * lr[top]


def test_learning_rate_of_a_stage_shorter_than_its_rise():
    """It rises for half of the stage, and so comes near to the peak all the same."""
    lr = [learning_rate(step, 60, 1.0, 100) for step in range(60)]
    assert lr == [learning_rate(step, 60, 1.0, 30) for step in range(60)]
    assert 0.5 < max(lr) < 0.7 and lr[0] < 0.05
    assert learning_rate(0, 1, 1.0, 0) == learning_rate(0, 1, 1.0, 100) == 1.0


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_some_parameters_have_a_share_of_the_rate(kind):
    """As CLIP has with --clip_rate."""
    model = make_hivg(fresh=True)
    model.clip.requires_grad_(True)
    of_clip = set(model.clip.parameters())
    optimizers = make_optimizers(model, kind, 0.1, {p: 0.1 for p in of_clip})
    set_learning_rate(optimizers, 2e-3)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert {p in of_clip for p in group["params"]} == {group["lr"] == pytest.approx(2e-4)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_muon_adds_the_updates_of_a_shape_in_one_call(monkeypatch, dtype):
    """torch._foreach_add_ is one call on a GPU only if what it adds has the strides of what it is added to."""
    monkeypatch.setattr("hivg.training.optimizers.choose_dtype", lambda name, device: dtype)  # of `orthogonalise`
    calls = calls_of(monkeypatch, torch, "_foreach_add_")
    for rows, columns in ((7, 3), (3, 7)):
        matrices = [torch.nn.Parameter(torch.randn(rows, columns)) for _ in range(2)]
        for p in matrices:
            p.grad = torch.randn(rows, columns)
        Muon(matrices).step()
    added = [pair for ps, updates in calls for pair in zip(ps, updates)]
    assert len(added) == 4 and all(p.stride() == update.stride() for p, update in added)


def test_muon_steps_the_matrices_of_linear_layers():
    model = make_hivg(dtype=torch.float32, stage=2)
    muon, adamw = make_optimizers(model, "muon", 0.0)
    names = {p: name for name, p in model.named_parameters()}
    by_muon = [names[p] for p in muon.param_groups[0]["params"]]
    by_adamw = [names[p] for p in adamw.param_groups[0]["params"]]
    assert sorted(by_muon + by_adamw) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert {"visual_proj.weight", "bridges.0.proj.weight", "encoder.1.attn.q_proj.weight"} <= {*by_muon}
    assert any(".A.1" in name for name in by_muon)
    assert {"position", "reg_token", "visual_proj.bias", "bridges.0.adaptive_weights", "bridges.0.norm_weight",
            "mask_convs.0.weight"} <= {*by_adamw}
    alone, = make_optimizers(model, "adamw", 0.0)
    assert type(alone) is torch.optim.AdamW and len(alone.param_groups[0]["params"]) == len(by_muon + by_adamw)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 40, 5), (2, 5, 40)])
@pytest.mark.parametrize("able, dtype", [({"avx512_bf16": True}, torch.bfloat16), ({}, torch.float32)])
def test_orthogonalise(monkeypatch, shape, able, dtype):
    """Singular values near 1 on the same sides, in the type that this CPU multiplies fast."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(0.2, 1, min(shape[1:]))
    made = orthogonalise(u * values @ v)
    assert made.dtype == dtype
    for value in torch.diagonal(u.mT @ made.float() @ v.mT, dim1=1, dim2=2).flatten():
        assert 0.6 < value < 1.3


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_weight_decay_shrinks_every_trained_parameter(kind):
    """With gradients of zero a step is the decay alone: p becomes p (1 - lr * decay)."""
    model = make_hivg(dtype=torch.float32, stage=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = make_optimizers(model, kind, weight_decay=0.5)
    set_learning_rate(optimizers, 0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    step_optimizers(optimizers)
    for name, p in model.named_parameters():
        factor = 0.95 if p.requires_grad else 1.0
        assert_close(name, p.detach(), factor * before[name], 1e-6)
        assert p.grad is None


def test_check_finite():
    """test_stops_when_not_finite of test_resume.py has a loss that is not a number."""
    values = {"loss": torch.tensor(1.0), "box": torch.tensor(0.5), "gradient_norm": torch.tensor(float("inf"))}
    check_finite("step 2 of warmup", values | {"gradient_norm": torch.tensor(2.0)})
    with pytest.raises(ValueError, match=r"step 3 of warmup \(box 0.5\)"):
        check_finite("step 3 of warmup", values)
