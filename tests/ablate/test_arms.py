"""The arms: each is what it says, and all see the same expressions."""

import pytest
import torch
from makers import assert_close, make_batch, make_hivg

import train
from hivg.ablate.arms import ARMS, BY_NAME, CLAIMS, COMPARED, TRICKS
from hivg.ablate.runs import BUDGETS, settings_of
from hivg.bridge import Bridge
from hivg.clip import CLIPConfig
from hivg.model import HiVG

TINY = CLIPConfig(image_size=32, patch_size=16, vision_width=32, vision_layers=6, vision_heads=2, text_width=32,
                  text_layers=4, text_heads=2, embed_dim=32, context_length=24, vocab_size=100)


def model_of(arm, clip=TINY, stages=None):
    """The model of an arm in its first stage, or after its first so many stages."""
    settings = settings_of(arm, "short", 1e-3, 0)
    model = HiVG(train.first_config(settings, clip, train.Hooks(arm.config)))
    for stage in train.stages(settings)[1:stages]:
        model.add_stage(stage.lora_stage)
    arm.prepare(model)
    return model


def test_the_table_is_whole():
    assert len(BY_NAME) == len(ARMS) and {arm.name for arm in COMPARED} == {arm.name for arm in ARMS if arm.claim}
    assert {arm.claim for arm in ARMS} == {"", *CLAIMS} and {arm.trick for arm in ARMS} == TRICKS.keys()
    for arm in ARMS:
        assert arm.against in BY_NAME
    for arm in COMPARED:
        assert arm.definition() != BY_NAME[arm.against].definition()
    for budget in BUDGETS.values():
        assert set(budget.arms) <= BY_NAME.keys()


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_an_arm_can_be_trained_and_sees_as_many_expressions(arm):
    settings = settings_of(arm, "short", 1e-3, 0)
    config = model_of(arm, stages=1).config
    assert sum(stage.epochs for stage in train.stages(settings)) == sum(BUDGETS["short"].epochs)
    for name, value in arm.config.items():
        assert getattr(config, name) == value


@pytest.mark.slow
def test_equal_capacity_is_equal():
    """No bridge but a deeper encoder; plain adapters of a higher rank: about as many parameters as the base."""
    clip = CLIPConfig(image_size=64, patch_size=8, vision_width=128, vision_layers=6, vision_heads=4, text_width=128,
                      text_layers=4, text_heads=4, embed_dim=128, context_length=77, vocab_size=600)
    counts = {}
    for name in ("base", "bridge none", "bridge none, deeper", "lora vanilla", "lora vanilla, wide"):
        with torch.device("meta"):
            counts[name] = sum(p.numel() for p in model_of(BY_NAME[name], clip).parameters())
    assert counts["bridge none, deeper"] == pytest.approx(counts["base"], rel=0.02)
    assert counts["lora vanilla, wide"] == pytest.approx(counts["base"], rel=0.005)
    assert counts["bridge none"] < 0.85 * counts["base"]
    assert counts["lora vanilla"] < 0.97 * counts["base"]


def test_mixing_is_the_released_reshape():
    """Read position by position as the released program does: entry (b, t) is entry number b T + t of (T, B)."""
    torch.manual_seed(0)
    bridge = Bridge("adaptive", 12, 2, 16, 2, 8)
    torch.nn.init.normal_(bridge.mlp.c_proj.weight)
    x = torch.randn(3, 5, 16)
    keys = torch.randn(3, 4, 16)
    mixed = torch.empty_like(keys)
    for b in range(3):
        for t in range(4):
            number = b * 4 + t
            mixed[b, t] = keys[number % 3, number // 3]
    expected = bridge(x, mixed), bridge(x[:1], keys[:1])
    is_key = torch.zeros(3, 4, dtype=torch.bool)  # would mask everything
    model = torch.nn.Module()
    model.bridges = {"0": bridge}
    BY_NAME["mixed"].prepare(model)
    assert_close("mixed", bridge(x, keys, is_key), expected[0], 1e-6)
    assert_close("one sample", bridge(x[:1], keys[:1], is_key), expected[1], 1e-6)


def test_mixed_predictions_depend_on_the_batch_also_after_merging():
    images, padding, ids = make_batch()
    for name, depends in (("mixed", True), ("base", False)):
        model = make_hivg(stage=2)
        BY_NAME[name].prepare(model)
        model = model.for_prediction("cpu", torch.float32)
        whole = model(images, padding, ids).boxes
        part = model(images[:2], padding[:2], ids[:2]).boxes
        assert ((whole[:2] - part).abs().max() > 1e-6) == depends


def test_clc_without_bridges_reads_no_text_and_the_boxes_stay():
    images, padding, ids = make_batch()
    plain, arm = make_hivg(stage=2), make_hivg(stage=2)
    BY_NAME["CLC of CLIP"].prepare(arm)
    before = plain(images, padding, ids)
    one, other = arm(images, padding, ids), arm(images, padding, ids.flip(0))
    assert torch.equal(one.image_features, other.image_features) and torch.equal(one.boxes, before.boxes)
    assert not torch.allclose(before.image_features, one.image_features, atol=1e-4)
    assert_close("logits", one.logits_per_text, other.logits_per_text.flip(0), 1e-5)


def test_all_at_once_trains_one_pair_a_layer_through_all_stages():
    arm = BY_NAME["lora at once"]
    names = [stage.name for stage in train.stages(settings_of(arm, "short", 1e-3, 0))]
    assert names == ["warmup", "lora1", "lora2", "lora3"]
    counts = set()
    for model in (*(model_of(arm, stages=n) for n in (2, 3, 4)), model_of(BY_NAME["lora vanilla"])):
        counts.add(sum(p.numel() for p in model.clip.parameters() if p.requires_grad))
    assert len(counts) == 1


def test_every_arm_sees_the_same_expressions():
    """The items of all stages one after the other: the same whatever the stages are, and none twice."""
    orders = []
    for name in ("base", "lora vanilla", "lora none"):
        settings = settings_of(BY_NAME[name], "short", 1e-3, 0)
        items = []
        table = train.stages(settings)
        for number, stage in enumerate(table):
            first = train.first_item_of(settings, table, number, 4, one_stream=True)
            items += range(first, first + stage.epochs * settings.epoch_samples // 4)
        orders.append(items)
    assert orders[0] == orders[1] == orders[2] == list(range(sum(BUDGETS["short"].epochs) * 2048 // 4))


def test_zero_weights_stay_zero_and_the_bridge_is_trained():
    parameters = dict(model_of(BY_NAME["weights zero"]).named_parameters())
    frozen = [name for name, p in parameters.items() if name.startswith("bridges.") and not p.requires_grad]
    assert frozen and all(name.endswith("adaptive_weights") for name in frozen)
