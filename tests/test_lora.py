"""Hi LoRA: which layers hold which stage's pairs, what is trained, and that new pairs and merging change nothing."""

import copy
import math
from fractions import Fraction

import pytest
import torch
import torch.nn as nn
from makers import OUTPUTS, assert_close, assert_same_output, loss_of, make_hivg, randomise, trained

from hivg.clip import Block
from hivg.lora import MODES, ORDERS, TARGETS, LoRALinear, adapted_layers, add_stage, merge


def make_blocks(n_layers):
    torch.manual_seed(0)
    return nn.ModuleList([Block(8, 2) for _ in range(n_layers)])


def make_linear(pairs, bias=True, dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    linear = LoRALinear(nn.Linear(7, 5, bias=bias), rank=3, alpha=12, dropout=dropout)
    for stage in range(1, pairs + 1):
        linear.add_pair(stage)
    return linear.to(dtype)


# --- one layer ---


@pytest.mark.parametrize("training", [True, False])
def test_new_pair_is_the_base_bit_for_bit(training):
    x, base = torch.randn(4, 7), nn.Linear(7, 5)
    linear = LoRALinear(base, rank=3, alpha=12, dropout=0.1).train(training)
    linear.add_pair(1)
    assert torch.equal(linear(x), base(x))
    assert linear.A[0].any(), "A must not start at zero too, or nothing is ever trained"


@pytest.mark.parametrize("pairs", [1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_formula(pairs, bias):
    """h = W_0 x + b + (alpha / r) sum_k B_k A_k x, with rank 3 and alpha 12."""
    linear, x = randomise(make_linear(pairs, bias), std=0.5), torch.randn(2, 4, 7, dtype=torch.float64)
    expected = x @ linear.weight.T + (linear.bias if bias else 0)
    for A, B in zip(linear.A, linear.B):
        expected = expected + 12 / 3 * (x @ A.T) @ B.T
    assert len(linear.A) == len(linear.B) == pairs
    assert_close("h", linear(x), expected, 1e-10)


def test_dropout_is_on_the_adapters_input_only():
    """With everything dropped the base is left; with half dropped, the mean over many draws is the whole."""
    linear, x = randomise(make_linear(1, dropout=1.0), std=0.5).train(), torch.ones(1, 7, dtype=torch.float64)
    base = x @ linear.weight.T + linear.bias
    assert_close("all dropped", linear(x), base, 1e-12)
    linear.dropout = 0.5
    many = linear(x.expand(400000, -1)).mean(0, keepdim=True)
    assert_close("mean of half dropped", many, linear.eval()(x), 0.05)
    assert (linear(x) - base).abs().max() > 0.2


def test_new_pair_freezes_what_was_there():
    linear = make_linear(2)
    assert trained(linear) == {"A.1", "B.1"}


def test_start():
    """A uniform within 1 / sqrt(in), as nn.Linear's weight (Kaiming, a = sqrt 5); B zero."""
    linear = LoRALinear(nn.Linear(400, 50), rank=32, alpha=16, dropout=0.1)
    linear.add_pair(1)
    A, bound = linear.A[0], 400**-0.5
    assert A.shape == (32, 400) and linear.B[0].shape == (50, 32)
    assert 0.99 * bound < A.abs().max() <= bound
    assert A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not linear.B[0].any()


@pytest.mark.parametrize("training", [True, False])
def test_wrapping_keeps_the_mode(training):
    """Adapters added to a model in evaluation mode must not drop anything out."""
    linear = LoRALinear(nn.Linear(3, 3).train(training), rank=2, alpha=2, dropout=0.5)
    assert linear.training == training


def test_wrapping_renames_nothing():
    blocks = make_blocks(3)
    before = {name: p.clone() for name, p in blocks.state_dict().items()}
    add_stage(blocks, 1, groups=1)
    after = blocks.state_dict()
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert {name.rsplit(".", 2)[1] for name in after.keys() - before.keys()} == {"A", "B"}


# --- the stages ---

CASES = [  # layers, groups, the last layer that stages 1, 2, .. reach: the whole numbers in j L / G
    (12, 3, [4, 8, 12]), (6, 3, [2, 4, 6]), (7, 3, [2, 4, 7]), (5, 2, [2, 5]), (24, 3, [8, 16, 24]), (2, 3, [0, 1, 2]),
    (4, 1, [4, 4, 4])]  # one group, as in the text tower: a new pair everywhere in each stage


def pairs_of(layer, n_layers, groups, stage, mode):
    """The stages whose pairs layer `layer` holds in stage `stage`, and those trained, straight from the definition."""
    reached = [k for k in range(1, stage + 1) if Fraction(layer) <= Fraction(k * n_layers, groups)]
    held = {"hierarchical": reached, "shared": reached[:1], "vanilla": [1], "none": []}[mode]
    trained = {"hierarchical": held[-1:], "shared": held, "vanilla": held if stage == 1 else [], "none": []}[mode]
    return held, trained


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_layers, groups, last", CASES)
def test_which_layers_hold_which_pairs(n_layers, groups, last, mode):
    blocks = make_blocks(n_layers).requires_grad_(False)
    for stage in range(1, len(last) + 1):
        if mode in ("hierarchical", "shared"):
            assert adapted_layers(stage, n_layers, groups, mode) == list(range(1, last[stage - 1] + 1))
        add_stage(blocks, stage, groups, rank=2, mode=mode)
        for layer, block in enumerate(blocks, start=1):
            held, trained = pairs_of(layer, n_layers, groups, stage, mode)
            if mode == "hierarchical":
                assert len(held) == max(0, stage - math.ceil(Fraction(layer * groups, n_layers)) + 1)
            for name in TARGETS:
                linear, where = getattr(block.attn, name), f"stage {stage}, layer {layer}, {name}"
                if not held:
                    assert type(linear) is nn.Linear, where
                    continue
                assert linear.stages == held and len(linear.A) == len(linear.B) == len(held), where
                for A, B, k in zip(linear.A, linear.B, held):
                    assert A.requires_grad == B.requires_grad == (k in trained), f"{where}, pair of stage {k}"
                assert not linear.weight.requires_grad and not linear.bias.requires_grad, where
            for name, module in block.named_modules():
                assert not isinstance(module, LoRALinear) or name.removeprefix("attn.") in TARGETS, name


def test_orders_of_the_layers():
    assert all(adapted_layers(0, 12, 3, mode) == [] for mode in MODES)  # the warm-up has no adapters
    for stage in (1, 2, 3):
        shallow = adapted_layers(stage, 12, 3)
        assert adapted_layers(stage, 12, 3, order="deep_first") == sorted(13 - layer for layer in shallow)
        assert adapted_layers(stage, 12, 3, order="at_once") == list(range(1, 13))
    for order in ORDERS:
        assert adapted_layers(1, 4, 1, order=order) == [1, 2, 3, 4]  # the text tower is one group
        assert adapted_layers(0, 12, 3, order=order) == adapted_layers(1, 12, 3, "none", order) == []


@pytest.mark.parametrize("mode", ["Hierarchical", "", "all"])
def test_unknown_mode(mode):
    with pytest.raises(ValueError, match="hierarchical, shared, vanilla, none"):
        adapted_layers(1, 12, 3, mode)


@pytest.mark.parametrize("mode, stage, bridge", [
    ("hierarchical", 0, "adaptive"), ("hierarchical", 1, "adaptive"), ("hierarchical", 3, "adaptive"),
    ("shared", 2, "projected"), ("vanilla", 1, "constant"), ("none", 0, "none")])
def test_gradients_reach_what_is_trained_and_nothing_else(mode, stage, bridge):
    model = make_hivg(dtype=torch.float32, lora=mode, stage=stage, bridge=bridge).train()
    loss_of(model).backward()
    adapters = set()  # that are trained
    for tower, groups in ((model.clip.visual, 3), (model.clip.text, 1)):
        for layer, block in enumerate(tower.blocks, start=1):
            held, active = pairs_of(layer, len(tower.blocks), groups, stage, mode) if stage else ([], [])
            for linear in (getattr(block.attn, name) for name in TARGETS):
                adapters |= {p for i, k in enumerate(held) if k in active for p in (linear.A[i], linear.B[i])}
    assert bool(adapters) == (stage > 0 and mode != "none")
    for name, p in model.named_parameters():
        if p in adapters or not name.startswith("clip."):
            assert p.requires_grad and p.grad is not None and p.grad.isfinite().all(), f"{name} has no gradient"
            if not name.endswith("k_proj.bias"):  # which moves all of a query's logits alike, so the softmax not
                assert p.grad.any(), f"the gradient of {name} is zero"
        else:
            assert not p.requires_grad and p.grad is None, f"{name} is frozen, yet has a gradient"


def test_the_settings_reach_the_adapters():
    model = make_hivg(stage=2, lora_rank=3, lora_alpha=12, lora_dropout=0.3)
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    assert adapters
    for linear in adapters:
        assert (linear.rank, linear.scale, linear.dropout) == (3, 4, 0.3)
        assert all(A.shape[0] == 3 for A in linear.A)


def test_new_stage_changes_no_prediction(batch):
    model = make_hivg(stage=0)
    for stage in (1, 2, 3):
        before = model(*batch, with_patch_boxes=True, with_reg_attention=True)
        model.add_stage(stage)
        after = model(*batch, with_patch_boxes=True, with_reg_attention=True)
        assert_same_output(after, before, names=(*OUTPUTS, "patch_boxes"))
        randomise(model, stage)
        assert not torch.allclose(model(*batch).boxes, before.boxes, atol=1e-4)
        assert model.config.stage == stage


def test_stages_come_in_turn():
    """Of others a file could be written and not be read."""
    model = make_hivg(stage=1)
    for stage in (0, 1, 3):
        with pytest.raises(ValueError, match=f"after stage 1 comes stage 2, not {stage}"):
            model.add_stage(stage)
    model.add_stage(2)


def test_a_stage_without_adapters_is_refused():
    """It would count, and train nothing of CLIP: of a released checkpoint, whose adapters are folded, and of vanilla,
    which has one; one more than there are groups would adapt all layers anew."""
    last = [make_hivg(lora=lora, stage=3) for lora in ("hierarchical", "shared")]
    for model in (make_hivg(stage=1).merged(), make_hivg(lora="vanilla", stage=1), *last):
        c = model.config
        advice = "; first model.config" if c.lora == "none" else "$"
        with pytest.raises(ValueError, match=f"lora '{c.lora}' has no stage {c.stage + 1}{advice}"):
            model.add_stage(c.stage + 1)
    model = make_hivg(stage=1).merged()
    model.config = model.config.with_lora("vanilla", 3, 6)
    model.add_stage(1)


# --- merging ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_merged_linear(bias, dtype, tol):
    linear = randomise(make_linear(3, bias, dropout=0.1, dtype=dtype), std=0.5).eval()
    x = torch.randn(9, 7, dtype=dtype)
    merged, expected = linear.merged(), linear(x)
    assert type(merged) is nn.Linear and merged.weight.dtype == dtype
    assert (merged.in_features, merged.out_features) == (7, 5)
    assert_close("merged, relative", merged(x) / expected.abs().max(), expected / expected.abs().max(), tol)
    randomise(merged)  # nothing is shared
    assert torch.equal(linear(x), expected)


def test_merge_returns_a_new_module(batch):
    model = make_hivg(stage=3)
    before, names = copy.deepcopy(model.state_dict()), trained(model)
    merged = merge(model)
    assert not any(isinstance(module, LoRALinear) for module in merged.modules())
    assert sum(isinstance(module, LoRALinear) for module in model.modules()) == 4 * (3 + 2)
    randomise(merged)  # nothing is shared
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert trained(model) == names
    assert trained(merged) == {name for name, _ in merged.named_parameters() if not name.startswith("clip.")}
