"""The arms: each is what it says, and all see the same expressions."""

from dataclasses import replace

import pytest
import torch
from makers import assert_close, make_batch, make_hivg

import train
from hivg.ablate.arms import ARMS, BY_NAME, CLAIMS, COMPARED, Arm, deep_first, mixed_forward, patched
from hivg.ablate.runs import BUDGETS, settings_of
from hivg.bridge import Bridge
from hivg.clip import CLIPConfig
from hivg.lora import adapted_layers
from hivg.model import HiVG

TINY = CLIPConfig(image_size=32, patch_size=16, vision_width=32, vision_layers=6, vision_heads=2, text_width=32,
                  text_layers=4, text_heads=2, embed_dim=32, context_length=24, vocab_size=100)


def test_the_table_is_whole():
    assert len(BY_NAME) == len(ARMS) and {arm.name for arm in COMPARED} == BY_NAME.keys() - {"base"}
    assert {arm.claim for arm in ARMS} == {"", *CLAIMS}
    for arm in ARMS:
        assert arm.against in BY_NAME
    for arm in COMPARED:
        assert arm.definition() != BY_NAME[arm.against].definition()
    for budget in BUDGETS.values():
        assert set(budget.arms) <= BY_NAME.keys()


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_an_arm_can_be_trained_and_sees_as_many_expressions(arm):
    settings = settings_of(arm, "short", 1e-3, 0)
    with patched(arm, settings):
        config = train.first_config(settings, TINY)
        HiVG(config)
    assert sum(stage.epochs for stage in train.stages(settings)) == sum(BUDGETS["short"].epochs)
    for name, value in arm.config.items():
        assert getattr(config, name) == value
    assert train.first_config(settings, TINY) == replace(config, **{name: getattr(train.first_config(settings, TINY),
                                                                                  name) for name in arm.config})


@pytest.mark.slow
def test_equal_capacity_is_equal():
    """No bridge but a deeper encoder; plain adapters of a higher rank: about as many parameters as the base."""
    counts = {}
    for name in ("base", "bridge none", "bridge none, deeper", "lora vanilla", "lora vanilla, wide"):
        arm = BY_NAME[name]
        settings = settings_of(arm, "short", 1e-3, 0)
        with patched(arm, settings), torch.device("meta"):
            clip = CLIPConfig(image_size=64, patch_size=8, vision_width=128, vision_layers=6, vision_heads=4,
                              text_width=128, text_layers=4, text_heads=4, embed_dim=128, context_length=77,
                              vocab_size=600)
            model = HiVG(train.first_config(settings, clip))
            for stage in train.stages(settings)[1:]:
                model.add_stage(stage.lora_stage)
        counts[name] = sum(p.numel() for p in model.parameters())
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
    assert_close("mixed", mixed_forward(bridge, x, keys, None), bridge(x, mixed), 1e-6)
    assert_close("one sample", mixed_forward(bridge, x[:1], keys[:1], None), bridge(x[:1], keys[:1]), 1e-6)


def test_mixed_predictions_depend_on_the_batch():
    model = make_hivg(stage=2)
    images, padding, ids = make_batch()
    with patched(BY_NAME["mixed"], settings_of(BY_NAME["mixed"], "short", 1e-3, 0)):
        whole = model(images, padding, ids).boxes
        part = model(images[:2], padding[:2], ids[:2]).boxes
        assert (whole[:2] - part).abs().max() > 1e-6
    whole = model(images, padding, ids).boxes
    part = model(images[:2], padding[:2], ids[:2]).boxes
    assert_close("without the trick", whole[:2], part, 1e-9)


def test_deep_first_is_the_other_end():
    for stage in (1, 2, 3):
        mirrored = sorted(13 - layer for layer in adapted_layers(stage, 12, 3))
        assert deep_first(stage, 12, 3) == mirrored
    assert deep_first(1, 4, 1) == [1, 2, 3, 4]  # the text tower is one group


def test_all_at_once_trains_one_pair_a_layer_through_all_stages():
    arm = BY_NAME["lora at once"]
    settings = settings_of(arm, "short", 1e-3, 0)
    assert [stage.name for stage in train.stages(settings)] == ["warmup", "lora1", "lora2", "lora3"]
    counts = []
    with patched(arm, settings):
        model = HiVG(train.first_config(settings, TINY))
        for stage in train.stages(settings)[1:]:
            model.add_stage(stage.lora_stage)
            counts.append(sum(p.numel() for p in model.clip.parameters() if p.requires_grad))
    plain = HiVG(replace(train.first_config(settings, TINY), lora="vanilla"))
    plain.add_stage(1)
    assert set(counts) == {sum(p.numel() for p in plain.clip.parameters() if p.requires_grad)}


def test_every_arm_sees_the_same_expressions(monkeypatch):
    """The items of all stages one after the other: the same whatever the stages are, and none twice."""
    class Data:
        rows = 4

    seen = []
    monkeypatch.setattr("hivg.ablate.arms.training_batches", lambda data, first, _, n, *more: seen.append((first, n)))
    orders = []
    for name in ("base", "lora vanilla", "lora none"):
        arm = BY_NAME[name]
        settings = settings_of(arm, "short", 1e-3, 0)
        seen.clear()
        with patched(arm, settings):
            for number, stage in enumerate(train.stages(settings)):
                steps = stage.epochs * settings.epoch_samples // 32
                train.training_batches(Data, number * 2**32, 32, steps, 0, 0)
        items = []
        for first, n in seen:
            items += range(first, first + n * 32 // Data.rows)
        orders.append(items)
    assert orders[0] == orders[1] == orders[2] == list(range(sum(BUDGETS["short"].epochs) * 2048 // 4))


def test_frozen_and_trained():
    """What a stage trains, with the tricks that change it."""
    def begin(*args):
        return make_hivg(fresh=True), None

    for name, frozen, trained in (("weights zero", "adaptive_weights", "bridges.0.proj"),
                                  ("CLIP trained", None, "clip.text.token_embedding")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hivg.ablate.arms.begin_stage", begin)
            with patched(BY_NAME[name], settings_of(BY_NAME[name], "short", 1e-3, 0)):
                model, _ = train.begin_stage()
        parameters = dict(model.named_parameters())
        assert any(p.requires_grad for key, p in parameters.items() if key.startswith(trained)), name
        if frozen:
            assert not any(p.requires_grad for key, p in parameters.items() if key.endswith(frozen)), name


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_clip_trained_slowly_has_a_tenth_of_the_rate(kind):
    model = make_hivg(fresh=True)
    model.clip.requires_grad_(True)
    of_clip = set(model.clip.parameters())
    arm = BY_NAME["CLIP trained slowly"]
    with patched(arm, settings_of(arm, "short", 1e-3, 0)):
        optimizers = train.make_optimizers(model, kind, 0.1)
        train.set_learning_rate(optimizers, 2e-3)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for group in groups:
        assert group["lr"] == pytest.approx(2e-4 if of_clip.issuperset(group["params"]) else 2e-3)
        assert of_clip.issuperset(group["params"]) or of_clip.isdisjoint(group["params"])


def test_the_tricks_end_with_the_run():
    before = (Bridge.forward, train.begin_stage, train.first_config, train.training_batches)
    with pytest.raises(KeyError), patched(BY_NAME["mixed"], settings_of(BY_NAME["mixed"], "short", 1e-3, 0)):
        assert Bridge.forward is mixed_forward
        raise KeyError
    assert before == (Bridge.forward, train.begin_stage, train.first_config, train.training_batches)
    with pytest.raises(KeyError), patched(Arm("x", "", "", trick="no such"), settings_of(ARMS[0], "short", 1e-3, 0)):
        pass
