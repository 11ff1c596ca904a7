"""The table of the stages, --plan, the presets, and what each stage really trains."""

import re
import shutil
from dataclasses import asdict, replace

import pytest
import torch
from makers import trained
from makers_training import NAMES, assert_one_line, run_script

import train
from hivg import weights
from hivg.clip import CLIP_SIZES
from hivg.lora import adapted_layers
from hivg.losses import LossWeights
from hivg.training.presets import PRESETS
from hivg.training.stages import clip_config
from train import Settings, stages


@pytest.mark.parametrize("mode, names, epochs", [
    ("hierarchical", NAMES, (9, 3, 2, 1)), ("shared", NAMES, (9, 3, 2, 1)),
    ("vanilla", NAMES[:2], (9, 6)), ("none", NAMES[:1], (15,))])
def test_stages(mode, names, epochs):
    """However adapters are added, the stages have as many epochs together."""
    s = Settings(lora=mode, epochs=(9, 3, 2, 1), lr=(4e-3, 3e-3, 2e-3, 1e-3), batch_size=24)
    rows = []
    for j, name in enumerate(names):
        rows.append(dict(name=name, bridge="adaptive", lora_stage=j, epochs=epochs[j], lr=s.lr[j], batch_size=24,
                         accumulate=1, clip_rate=0.0))
    assert [asdict(stage) for stage in stages(s)] == rows


def test_bridgeless_stage_comes_first():
    rows = stages(Settings(bridgeless=True, epochs=(1, 2, 3, 4, 5), lr=(1e-3,) * 5, accumulate=(5, 4, 3, 2, 1)))
    assert [(row.name, row.bridge, row.lora_stage, row.epochs, row.accumulate) for row in rows] == [
        ("bridgeless", "none", 0, 1, 5), ("warmup", "adaptive", 0, 2, 4), ("lora1", "adaptive", 1, 3, 3),
        ("lora2", "adaptive", 2, 4, 2), ("lora3", "adaptive", 3, 5, 1)]


@pytest.mark.parametrize("lora", ["hierarchical", "vanilla", "none"])
def test_one_learning_rate_holds_for_all_stages(lora):
    rows = stages(Settings(lora=lora, lr=(2e-3,), accumulate=(3,)))
    assert {(row.lr, row.accumulate) for row in rows} == {(2e-3, 3)}


@pytest.mark.parametrize("changes", [
    dict(epochs=(1, 1, 1, 12, 4)), dict(lr=(1e-3,) * 5), dict(accumulate=(1,) * 5), dict(epochs=(1, 1, 1)),
    PRESETS["refcoco-large"] | dict(bridgeless=False),  # its first numbers are those of the stage without a bridge
    dict(lora="vanilla", epochs=(1,) * 5)])
def test_numbers_that_belong_to_no_stage_are_refused(changes):
    with pytest.raises(ValueError, match=r"--(epochs|lr|accumulate): \d values, \d needed \(warmup, lora1"):
        Settings(**changes)


# --- the published schedules (RELEASED, last table): epochs, learning rates, batches of 7 GPUs ---

BASE = [560, 420, 420, 280]
RATES = [2.5e-4, 1e-4, 5e-5, 2.5e-5]
MIXTURE_RATES = [2.5e-4, 1e-4, 5e-5, 2e-5]
PUBLISHED = {
    **dict.fromkeys(["refcoco-base", "refcoco+-base", "refcocog-base", "referit-base"],
                    ([60, 20, 20, 20], RATES, BASE)),
    "flickr-base": ([30, 5, 5, 5], RATES, [560, 420, 420, 420]),
    "mixup-base": ([60, 20, 20, 20], MIXTURE_RATES, [448] * 4),
    **dict.fromkeys(["refcoco-large", "refcoco+-large", "refcocog-large"],
                    ([10, 60, 10, 10, 10], [2.5e-4, *RATES], [224] * 5)),
    "referit-large": ([5, 60, 10, 10, 10], [2.5e-4, *RATES], [224] * 5),
    "flickr-large": ([10, 30, 5, 5, 5], [2.5e-4, *RATES], [224] * 5),
    "mixup-large": ([10, 30, 10, 10, 10], [2.5e-4, *MIXTURE_RATES], [224] * 5),
}


def test_every_preset_is_published():
    assert PRESETS.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_hold_the_published_schedules(name):
    s = Settings(**PRESETS[name])
    rows = stages(s)
    schedule = [row.epochs for row in rows], [row.lr for row in rows], [row.batch_size * row.accumulate for row in rows]
    assert schedule == PUBLISHED[name]
    names = ["bridgeless", *NAMES] if name.endswith("large") else NAMES
    assert [row.name for row in rows] == names
    assert (s.optimizer, s.weight_decay, s.warmup_steps, s.clip_grad) == ("adamw", 1e-4, 0, float("inf"))
    assert s.loss_weights == LossWeights() and not (s.loss_weights.patch_box or s.loss_weights.reg_attention)


@pytest.mark.parametrize("data, layers", [
    ("refcoco", (12,)), ("refcoco+", (6, 12)), ("refcocog", (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)),
    ("referit", (6, 12)), ("flickr", (12,)), ("mixup", (12,))])
@pytest.mark.parametrize("size", ["base", "large"])
def test_presets_hold_the_published_model(data, layers, size):
    s = Settings(**PRESETS[f"{data}-{size}"])
    assert s.dataset == data and s.text_layers == layers
    assert s.bridge == ("projected" if data == "mixup" else "adaptive")
    assert (s.lora, s.lora_rank, s.lora_alpha, s.box_loss, s.level_norm) == ("hierarchical", 32, 16, "l1", False)


# --- the plan ---


def numbers_of(text):
    """A printed plan -> {row: [text of each stage]}."""
    rows = {}
    for line in text.splitlines():
        rows[line[:28].strip()] = re.split(r"\s{2,}", line[28:].strip())
    return rows


@pytest.mark.parametrize("name", ["refcocog-base", "refcoco-large"])
def test_plan_of_a_preset_needs_no_files(tmp_path, monkeypatch, capfd, name):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_script(monkeypatch, capfd, "--preset", name, "--plan")
    assert (code, err) == (0, "") and not list(tmp_path.iterdir())
    rows = numbers_of(out)
    epochs, rates, batches = PUBLISHED[name]
    assert rows["epochs"] == [str(n) for n in epochs]
    assert [float(text) for text in rows["learning rate"]] == rates
    assert [int(text) for text in rows["expressions per step"]] == batches
    depth = 24 if name.endswith("large") else 12
    last = [f"1-{depth * j // 3}" for j in (1, 2, 3)]
    assert rows["on vision layers, from 1"][-3:] == last
    assert rows["bridge"] == (["none"] if depth == 24 else []) + ["adaptive"] * 4
    counts = [int(text.replace(",", "")) for text in rows["parameters trained"]]
    assert counts == sorted(counts)


def test_plan_says_what_is_trained(whole, tiny, clip_file, world, capfd):
    """The numbers of the plan are those of the models that the run wrote."""
    table = stages(tiny)
    train.print_plan(table, train.first_config(tiny, weights.load_clip(clip_file).config))
    rows = numbers_of(capfd.readouterr().out)
    for i, name in enumerate(NAMES):
        model = weights.load_hivg(whole / f"{name}.safetensors")
        for row, module in (("clip", model.clip), ("bridges", model.bridges), ("encoder", model.encoder),
                            ("parameters trained", model)):
            assert rows[row][i] == f"{sum(p.numel() for p in module.parameters() if p.requires_grad):,}"
        assert rows["parameters in all"][i] == f"{sum(p.numel() for p in model.parameters()):,}"
        in_adapters = sum(p.numel() for name, p in model.named_parameters() if ".A." in name or ".B." in name)
        assert rows["in adapters, of all stages"][i] == f"{in_adapters:,}" and (in_adapters > 0) == (i > 0)


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_plan_says_whether_clip_is_trained(tiny, clip_file, world, capfd, monkeypatch, share):
    s = replace(tiny, clip_rate=share)
    model, _ = train.begin_stage(s, 0, None)
    monkeypatch.setattr(train, "settings_from_flags", lambda *_: replace(s, plan=True))
    train.main()
    count = sum(p.numel() for p in model.clip.parameters() if p.requires_grad)
    assert numbers_of(capfd.readouterr().out)["clip"][0] == f"{count:,}" and (count > 0) == (share > 0)


def test_stage_is_described_when_it_starts(world, tiny, capfd):
    train.train(replace(tiny, lora="vanilla", epochs=(1, 1)))
    told = capfd.readouterr().err
    assert re.search(r"^stage +warmup$", told, re.M) and re.search(r"^stage +lora1$", told, re.M)
    assert re.search(r"^adapters trained +rank 16$", told, re.M)


# --- what a stage trains ---


def test_each_stage_trains_its_layers(whole, clip_file):
    """CLIP's own weights stay as they were; a stage adds pairs to its layers and leaves earlier pairs as they are."""
    clip = weights.load_clip(clip_file).state_dict()
    before = {}
    for stage, name in enumerate(NAMES):
        model = weights.load_hivg(whole / f"{name}.safetensors")
        assert model.config.stage == stage and model.tokenizer.context_length == 24
        tensors = model.state_dict()
        for key, tensor in clip.items():
            assert torch.equal(tensors["clip." + key], tensor), f"{name}: {key}"
        pairs = {key: tensor for key, tensor in tensors.items() if re.search(r"\.[AB]\.\d+$", key)}
        assert before.keys() <= pairs.keys()
        for key, tensor in before.items():
            assert torch.equal(pairs[key], tensor), f"{name}: {key} of an earlier stage has changed"
        new_layers = {int(re.search(r"visual\.blocks\.(\d+)", key)[1]) + 1
                      for key in pairs.keys() - before.keys() if ".visual." in key}
        assert sorted(new_layers) == adapted_layers(stage, 6, 3)
        before = pairs


@pytest.mark.parametrize("mode", ["hierarchical", "shared", "vanilla"])
def test_what_has_a_gradient_is_what_changes(world, tiny, monkeypatch, mode):
    """In the last stage each trained parameter moves, and no other."""
    s = replace(tiny, lora=mode, epochs=(1, 1, 1, 1), warmup_steps=0)
    start, end = {}, {}
    begin_stage = train.begin_stage

    def spy(*args):
        model, best = begin_stage(*args)
        start.update({name: p.detach().clone() for name, p in model.named_parameters()})
        end["model"] = model
        return model, best

    monkeypatch.setattr(train, "begin_stage", spy)
    train.train(s)
    names = trained(end["model"])
    changed = {name for name, p in end["model"].named_parameters() if not torch.equal(p, start[name])}
    assert changed <= names and len(changed) > 0.9 * len(names), names - changed
    stage = len(stages(s)) - 1
    assert any(name.endswith(".A.0" if mode == "shared" else f".A.{stage - 1}") for name in changed)


def test_plan_of_a_file_called_tiny_is_of_what_is_in_it(clip_file, tmp_path):
    """No published CLIP has this name."""
    path = shutil.copy(clip_file, tmp_path / "tiny.safetensors")
    assert clip_config(path) == weights.read(clip_file).config != CLIP_SIZES["tiny"]


@pytest.mark.parametrize("flag, wanted", [("--clip", "a CLIP"), ("--finetune", "a HiVG")])
def test_plan_of_the_wrong_kind_of_file_gets_one_line(whole, clip_file, monkeypatch, capfd, flag, wanted):
    path = whole / "warmup.safetensors" if flag == "--clip" else clip_file
    assert_one_line(run_script(monkeypatch, capfd, "--plan", flag, path), path, f"does not hold {wanted}")


@pytest.mark.parametrize("layers, words", [((9,), "from 1 to 4"), ((4, 4), "different numbers, not (4, 4)")], ids=str)
def test_text_layers_that_cannot_be_get_one_line(clip_file, monkeypatch, capfd, layers, words):
    """At the start: a model that is trained can be loaded."""
    args = ["--plan", "--clip", clip_file, "--text_layers", *layers]
    assert_one_line(run_script(monkeypatch, capfd, *args), f"text_layers must be {words}")
