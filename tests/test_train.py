"""The training: its schedule, what it writes, what an interruption costs (nothing), what it says to bad settings."""

import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path

import pytest
import torch
from makers import assert_close, make_clip, make_hivg
from PIL import Image
from safetensors import safe_open

import train
from hivg import weights
from hivg.clip import CLIP, CLIPConfig
from hivg.data.shapes import HARD_MIX, SPLITS, Shapes
from hivg.lora import MODES
from hivg.losses import LossWeights
from hivg.tokenizer import split_words
from hivg.training import criterion as objective
from train import Settings, learning_rate, stages

ROOT = Path(train.__file__).parent
NAMES = ["warmup", "lora1", "lora2", "lora3"]
ON_CPU = {"dtype": "float32", "device": "cpu", "workers": 0}


def shrink(monkeypatch, dropout=0.1):
    """A validation split of 4 pictures, and a small grounding encoder with dropout, so that a resumed run must find
    its random numbers again."""
    monkeypatch.setitem(SPLITS, "val", (4, SPLITS["val"][1]))
    for_clip = train.HiVGConfig.for_clip
    small = dict(width=32, encoder_layers=2, encoder_ffn=64, rtcc_hidden=64, dropout=dropout, lora_dropout=dropout)
    monkeypatch.setattr(train.HiVGConfig, "for_clip", lambda clip, **changes: for_clip(clip, **(small | changes)))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """An empty current folder and a small world -> the folder."""
    shrink(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def tiny(clip_file):
    """A second: 3 steps an epoch, 8 expressions a step, 5 epochs in all."""
    return Settings(name="tiny", clip=str(clip_file), epoch_samples=24, batch_size=8, epochs=(2, 1, 1, 1),
                    warmup_steps=2, save_minutes=1000, **ON_CPU)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """runs/tiny after all stages, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.chdir(folder)
        path = train.train(tiny)
    return (folder / path).parent


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def contents(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def assert_same_run(run, other):
    """Bit for bit: the best weights of each stage, the last state, the log, the curves."""
    assert sorted(p.name for p in run.iterdir()) == sorted(p.name for p in other.iterdir())
    assert (run / "log.jsonl").read_text() == (other / "log.jsonl").read_text()
    assert (run / "curves.png").read_bytes() == (other / "curves.png").read_bytes()
    for path in run.glob("*.safetensors"):
        (ours, ours_metadata), (theirs, theirs_metadata) = contents(path), contents(other / path.name)
        assert ours_metadata == theirs_metadata and ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), f"{path.name}: {name}"
    ours, theirs = (torch.load(r / "state.pt", weights_only=True) for r in (run, other))
    for part in ("model", "optimizers", "random", "log", "stage", "step", "best"):
        assert_same_tree(part, ours[part], theirs[part])


def assert_same_tree(name, a, b):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
    if isinstance(a, (dict, list)):
        for key in a if isinstance(a, dict) else range(len(a)):
            assert_same_tree(f"{name}.{key}", a[key], b[key])
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


# --- the schedule ---


@pytest.mark.parametrize("pretrain", [False, True])
@pytest.mark.parametrize("mode, names", [("hierarchical", NAMES), ("shared", NAMES), ("vanilla", NAMES[:2]),
                                         ("none", NAMES[:1])])
def test_stages(mode, names, pretrain):
    s = Settings(lora=mode, pretrain=pretrain, epochs=(9, 3, 2, 1), lr=(4e-3, 3e-3, 2e-3, 1e-3), pretrain_epochs=7,
                 pretrain_lr=5e-3, batch_size=24, pretrain_batch_size=48)
    rows = stages(s)
    if pretrain:
        first, *rows = rows
        assert asdict(first) == dict(name="pretrain", lora_stage=None, epochs=7, lr=5e-3, batch_size=48,
                                     accumulate=1)
    assert [asdict(row) for row in rows] == [
        dict(name=name, lora_stage=j, epochs=s.epochs[j], lr=s.lr[j], batch_size=24, accumulate=1)
        for j, name in enumerate(names)]


def test_every_lora_mode_has_stages():
    assert all(stages(Settings(lora=mode)) for mode in MODES)


@pytest.mark.parametrize("steps, warmup", [(100, 10), (40, 1), (1000, 100)])
def test_learning_rate(steps, warmup):
    lr = [learning_rate(step, steps, 2.0, warmup) for step in range(steps)]
    assert lr == [learning_rate(step, steps, 2.0, warmup) for step in range(steps)]
    top = lr.index(max(lr))
    assert top in (warmup - 1, warmup - 2, 0)  # linear up to there, against the first of the cosine
    assert lr[0] == pytest.approx(2.0 / warmup) and 1.9 < max(lr) <= 2.0
    assert all(a > b for a, b in zip(lr[warmup:], lr[warmup + 1 :]))
    assert lr[steps // 2] == pytest.approx(1.0)  # half of the peak at half of the way
    assert 0 < lr[-1] < 0.01 * lr[top]


def test_learning_rate_of_a_stage_shorter_than_its_rise():
    assert all(0 < learning_rate(step, 5, 1.0, 100) <= 0.06 for step in range(5))
    assert learning_rate(0, 1, 1.0, 0) == 1.0


# --- a run ---


def test_what_a_run_writes(whole):
    assert sorted(p.name for p in whole.iterdir()) == sorted(
        ["curves.png", "log.jsonl", "state.pt", *(f"{name}.safetensors" for name in NAMES)])
    assert Image.open(whole / "curves.png").size[0] > 300
    epochs = [row for row in log_of(whole) if "epoch" in row]
    assert [(row["stage"], row["epoch"], row["step"]) for row in epochs] == [
        ("warmup", 1, 3), ("warmup", 2, 6), ("lora1", 1, 3), ("lora2", 1, 3), ("lora3", 1, 3)]
    steps = [row for row in log_of(whole) if "lr" in row]
    assert [(row["stage"], row["step"]) for row in steps] == list(zip(NAMES, (6, 3, 3, 3)))  # the last of each stage
    for row, stage in zip(steps, stages(Settings())):
        assert row["lr"] == learning_rate(row["step"] - 1, row["step"], stage.lr, 2)
        terms = [v for k, v in row.items() if k in ("box", "giou", "clc", *(f"{a}_{b}" for a in ("token", "mask")
                                                                            for b in ("focal", "dice")))]
        assert len(terms) == 7 and sum(terms) == pytest.approx(row["loss"], abs=1e-3)


def test_accuracy_never_falls_from_stage_to_stage(whole):
    best = {name: weights.load_hivg(whole / f"{name}.safetensors").info["accuracy"] for name in NAMES}
    assert list(best.values()) == sorted(best.values()) and best["warmup"] >= 0
    for row in log_of(whole):
        assert "best" not in row or row["best"] <= best[row["stage"]]


def test_what_each_stage_trains(whole, clip_file):
    """CLIP's own weights stay as they were; a stage adds pairs and leaves those of the stage before it as they are."""
    clip = weights.load_clip(clip_file).state_dict()
    before = {}
    for stage, name in enumerate(NAMES):
        model = weights.load_hivg(whole / f"{name}.safetensors")
        assert model.config.stage == stage and model.tokenizer.context_length == 24
        tensors = model.state_dict()
        for key, tensor in clip.items():
            assert torch.equal(tensors["clip." + key], tensor), f"{name}: {key}"
        pairs = {key: tensor for key, tensor in tensors.items() if re.search(r"\.[AB]\.\d+$", key)}
        frozen = {key: tensor for key, tensor in before.items() if key in pairs}
        assert len(frozen) == len(before) and all(torch.equal(pairs[key], tensor) for key, tensor in frozen.items())
        visual = {key for key in pairs.keys() - before.keys() if ".visual." in key}
        assert len(visual) == 2 * stage * 4 * 2  # A and B, the layers up to 6 stage / 3, their four projections
        before = pairs


def test_what_is_trained_is_told(world, tiny, capfd):
    train.train(replace(tiny, epochs=(1, 1, 1, 1)))
    told = capfd.readouterr().err
    for stage, name in enumerate(NAMES):
        model = weights.load_hivg(f"runs/tiny/{name}.safetensors")
        part = told.split(f"stage {name}: 1 epochs")[1].split("stage ")[0]
        numbers = {m[0]: [int(n.replace(",", "")) for n in m[1:]]
                   for m in re.findall(r"^  (\S+(?: all)?) +([\d,]+) parameters, +([\d,]+) trained$", part, re.M)}
        assert numbers["in all"] == [sum(p.numel() for p in model.parameters()),
                                     sum(p.numel() for p in model.parameters() if p.requires_grad)]
        assert numbers["bridges"][0] == numbers["bridges"][1] > 0
        assert numbers["clip"][0] > numbers["clip"][1] and (numbers["clip"][1] > 0) == (stage > 0)
        assert [sum(n[i] for key, n in numbers.items() if key != "in all") for i in (0, 1)] == numbers["in all"]


def test_loss_falls(world, tiny):
    train.train(replace(tiny, lora="none", epochs=(1,), epoch_samples=150 * 8, warmup_steps=10, lr=(2e-3,)))
    # means of steps 1..50, 51..100, 101..150
    first, _, last = (row["loss"] for row in log_of(Path("runs/tiny")) if "loss" in row)
    assert last < 0.9 * first


@pytest.mark.parametrize("scores, kept, best", [
    # epochs 1, 2 of the warm-up, then one of each stage -> the accuracies of the files
    ((0.5, 0.4, 0.3, 0.2, 0.1), "0 . . .", [0.5, 0.5, 0.5, 0.5]),
    ((0.2, 0.4, 0.4, 0.6, 0.5), "1 . 3 .", [0.4, 0.4, 0.6, 0.6]),
    ((0.0, 0.0, 0.0, 0.0, 0.1), "0 . . 4", [0.0, 0.0, 0.0, 0.1])])
def test_a_stage_keeps_its_best_or_what_it_started_from(world, tiny, monkeypatch, scores, kept, best):
    seen = []

    def validate(model, s, device):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return {"accuracy": scores[len(seen) - 1], "mean_iou": 0.1}

    monkeypatch.setattr(train, "validate", validate)
    train.train(tiny)
    before = None
    for name, epoch, accuracy in zip(NAMES, kept.split(), best):
        model = weights.load_hivg(f"runs/tiny/{name}.safetensors")
        assert model.info["accuracy"] == accuracy
        tensors = model.state_dict()
        if epoch == ".":  # as the stage before, with new pairs that add nothing
            new = tensors.keys() - before.keys()
            assert all(torch.equal(tensors[key], before[key]) for key in before)
            assert new and not any(tensors[key].any() for key in new if ".B." in key)
        else:
            assert tensors.keys() == seen[int(epoch)].keys()
            assert all(torch.equal(tensors[key], seen[int(epoch)][key]) for key in tensors)
        before = tensors


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_accumulation_counts_steps(world, tiny, accumulate):
    train.train(replace(tiny, lora="none", epochs=(2,), batch_size=8, epoch_samples=48, accumulate=(accumulate,)))
    rows = [row for row in log_of(Path("runs/tiny")) if "epoch" in row]
    assert [row["step"] for row in rows] == [6 // accumulate, 12 // accumulate]


def test_accumulated_gradients_are_those_of_the_whole_batch(world, tiny, monkeypatch):
    """Without dropout and CLC, the only term that compares the samples of a batch."""
    shrink(monkeypatch, dropout=0.0)
    gradients, clip_grad_norm = [], torch.nn.utils.clip_grad_norm_

    def spy(parameters, largest):
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]))
        return clip_grad_norm(parameters, largest)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spy)
    for batch_size, accumulate in ((16, 1), (8, 2), (4, 4)):
        train.train(replace(tiny, name=f"{batch_size}", lora="none", epochs=(1,), epoch_samples=16,
                            batch_size=batch_size, accumulate=(accumulate,), loss_weights=astuple(LossWeights(clc=0))))
    whole, *parts = gradients
    assert len(parts) == 2 and whole.norm() > 0.1
    for part in parts:
        assert_close("gradient", part, whole, 1e-5 * whole.norm().item())


def test_same_seed_same_run(whole, world, tiny):
    """Worker processes change nothing; another seed does."""
    train.train(replace(tiny, workers=2))
    assert_same_run(world / "runs/tiny", whole)
    for seed in (0, 1):
        train.train(replace(tiny, name=f"seed{seed}", seed=seed, epochs=(1, 0, 0, 0)))
    same, other = (log_of(world / f"runs/seed{seed}")[0]["loss"] for seed in (0, 1))
    assert same != other
    assert len(list(Path("runs/seed1").glob("*.safetensors"))) == 4  # a stage of no epochs keeps what it started from


def test_harder_is_of_the_training_alone():
    model, s = make_hivg(), Settings(hard_mix=True)
    assert train.data_of(s, model, "train").shapes.weights == HARD_MIX
    assert train.data_of(s, model, "val").shapes.weights == SPLITS["val"][1] != HARD_MIX
    assert train.data_of(Settings(), model, "train").shapes.weights == SPLITS["train"][1] != HARD_MIX


def test_muon_steps_the_matrices_of_linear_layers():
    model = make_hivg(dtype=torch.float32, stage=2)
    muon, adamw = train.optimizers(Settings(optimizer="muon"), model)
    names = {p: name for name, p in model.named_parameters()}
    by_muon, by_adamw = ([names[p] for group in o.param_groups for p in group["params"]] for o in (muon, adamw))
    assert sorted(by_muon + by_adamw) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert {"visual_proj.weight", "bridges.0.proj.weight", "encoder.1.attn.q_proj.weight"} <= {*by_muon}
    assert any(".A.1" in name for name in by_muon)
    assert {"position", "reg_token", "visual_proj.bias", "bridges.0.adaptive_weights", "bridges.0.norm_weight",
            "mask_convs.0.weight"} <= {*by_adamw}
    alone, = train.optimizers(Settings(optimizer="adamw"), model)
    assert type(alone) is torch.optim.AdamW and len(alone.param_groups[0]["params"]) == len(by_muon + by_adamw)


# --- going on from a HiVG ---


def test_going_on_from_a_hivg(whole, world, tiny, monkeypatch):
    """One stage; what the last one trained is trained, the rest stays; and it can be resumed."""
    s = replace(tiny, name="more", hivg=str(whole / "lora3.safetensors"), epochs=(2,), lr=(1e-3,))
    path = train.train(s)
    assert path == Path("runs/more/tune.safetensors")
    before, state = weights.load_hivg(s.hivg), torch.load("runs/more/state.pt", weights_only=True)
    changed = {name for name, p in before.state_dict().items() if not torch.equal(p, state["model"][name])}
    trained = {name for name, p in before.named_parameters() if p.requires_grad}
    assert changed <= trained and len(changed) > 0.9 * len(trained)
    assert any(".A.2" in name for name in changed)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, "to_device", 4)
        train.train(replace(s, name="again"))
    train.train(replace(s, name="again", resume=True))
    assert_same_run(world / "runs/again", world / "runs/more")


def test_going_on_keeps_what_it_cannot_better(whole, world, tiny, monkeypatch):
    """Measured before the first step, for the accuracy in the file may be of another data set."""
    scores = iter([0.5, 0.4, 0.5])
    monkeypatch.setattr(train, "validate", lambda *args: {"accuracy": next(scores)})
    path = train.train(replace(tiny, hivg=str(whole / "lora3.safetensors"), epochs=(2,)))
    kept, before = weights.load_hivg(path), weights.load_hivg(whole / "lora3.safetensors")
    assert kept.info["accuracy"] == 0.5
    assert all(torch.equal(p, before.state_dict()[name]) for name, p in kept.state_dict().items())


# --- interruptions ---


class Killed(BaseException):
    pass


def kill(monkeypatch, name, call):
    """Stop the process, as it were, when train.NAME is called for the call-th time; torch.save stops half way."""
    owner = train
    for part in name.split(".")[:-1]:
        owner = getattr(owner, part)
    name = name.split(".")[-1]
    function, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        calls.append(name)
        if len(calls) < call:
            return function(*args, **kwargs)
        if owner is torch:
            Path(args[1]).write_bytes(b"half a file")
        raise Killed

    monkeypatch.setattr(owner, name, wrapper)


def ids(x):
    return "_".join(map(str, x)) if isinstance(x, (list, tuple)) else str(x)


@pytest.mark.parametrize("save_minutes, name, call", [
    (0, "to_device", 2), (0, "to_device", 8),  # before a step
    (1000, "to_device", 6), (1000, "to_device", 8),  # with the state of the last epoch
    (0, "validate", 1), (1000, "validate", 3), (0, "weights.save", 3), (0, "Log.draw", 2),  # between two steps
    (0, "begin_stage", 2), (1000, "describe_trained", 3), (1000, "training_batches", 2),  # between two stages
    (0, "torch.save", 6), (1000, "torch.save", 3), (0, "os.replace", 4), (1000, "os.replace", 5)])  # writing a file
def test_resumed_is_uninterrupted(whole, world, tiny, monkeypatch, save_minutes, name, call):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, name, call)
        train.train(replace(tiny, save_minutes=save_minutes))
    assert (world / "runs/tiny/state.pt").exists()
    train.train(replace(tiny, resume=True))
    assert_same_run(world / "runs/tiny", whole)


def test_resumed_after_every_step(whole, world, tiny, monkeypatch):
    """A machine that never lives for more than a step or two."""
    times = 0
    while True:
        try:
            with monkeypatch.context() as patch:
                kill(patch, "to_device", 2 + times % 2)
                train.train(replace(tiny, save_minutes=0, resume=times > 0))
            break
        except Killed:
            times += 1
    assert times >= 7
    assert_same_run(world / "runs/tiny", whole)


def test_killed_before_the_first_state(whole, world, tiny, monkeypatch):
    """There is nothing to resume yet, and the same command starts anew."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, "to_device", 3)
        train.train(tiny)
    train.train(tiny)
    assert_same_run(world / "runs/tiny", whole)


def test_resuming_a_finished_run_changes_nothing(whole, world, tiny):
    train.train(tiny)
    before = {p: p.stat().st_mtime_ns for p in Path("runs/tiny").glob("*.safetensors")}
    assert train.train(replace(tiny, resume=True)) == Path("runs/tiny/lora3.safetensors")
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert_same_run(world / "runs/tiny", whole)


def flags(s, **changes):
    """The command line of these settings."""
    given = {k: v for k, v in (asdict(s) | changes).items() if v != getattr(Settings(), k)}
    return [word for k, v in given.items() for word in (
        [f"--{'' if v else 'no-'}{k}"] if isinstance(v, bool) else
        [f"--{k}", *map(str, v if isinstance(v, tuple) else [v])])]


def test_killed_by_the_system(tmp_path, monkeypatch, tiny):
    """A process of its own, ended by SIGKILL at some moment after its first state, then resumed by command."""
    s = replace(tiny, lora="none", epochs=(1,), epoch_samples=40 * 8, workers=1)
    command = [sys.executable, str(ROOT / "train.py"), *flags(s)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "--save_minutes", "0"], cwd=tmp_path, env=environment,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    state = tmp_path / "runs/tiny/state.pt"
    deadline = time.monotonic() + 300
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 0 < torch.load(state, weights_only=True)["step"] < 40
    again = subprocess.run([*command, "--resume"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stdout == "runs/tiny/warmup.safetensors\n"

    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train.train(replace(s, name="other"))
    finally:
        torch.set_num_threads(threads)
    assert_same_run(tmp_path / "runs/tiny", tmp_path / "runs/other")


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_stops_when_not_finite(world, tiny, monkeypatch, bad):
    """In the fifth step: the state after the third is there, finite, and can be resumed."""
    grounding_losses, calls = objective.grounding_losses, []

    def spoiled(*args):
        calls.append(1)
        terms = grounding_losses(*args)
        if len(calls) == 5 and bad == "loss":
            terms["box"] = terms["box"] * math.nan
        elif len(calls) == 5:
            terms["box"].register_hook(lambda gradient: gradient * math.nan)
        return terms

    monkeypatch.setattr(objective, "grounding_losses", spoiled)
    with pytest.raises(ValueError) as caught:
        train.train(tiny)
    message = str(caught.value)
    assert "\n" not in message and "step 5 of warmup" in message and "nan" in message
    state = torch.load("runs/tiny/state.pt", weights_only=True)
    assert state["step"] == 3 and all(v.isfinite().all() for v in state["model"].values())
    train.train(replace(tiny, resume=True))


# --- pre-training ---


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """runs/tiny after a contrastive pre-training and a warm-up."""
    folder = tmp_path_factory.mktemp("pretrained")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.chdir(folder)
        patch.setitem(train.CLIP_SIZES, "tiny", CLIPConfig(32, 16, 32, 6, 2, 32, 4, 2, 32))
        train.train(Settings(name="tiny", pretrain=True, pretrain_epochs=2, epochs=(1,), lora="none", epoch_samples=16,
                             pretrain_batch_size=8, batch_size=8, warmup_steps=1, **ON_CPU))
    return folder / "runs/tiny"


def test_pretraining(pretrained):
    rows = [(row["stage"], row["step"]) for row in log_of(pretrained) if "epoch" in row]
    assert rows == [("pretrain", 2), ("pretrain", 4), ("warmup", 2)]
    clip = weights.load_clip(pretrained / "pretrain.safetensors")
    assert 0 <= clip.info["accuracy"] <= 1 and clip.info["stage"] == "pretrain"
    model = weights.load_hivg(pretrained / "warmup.safetensors")
    assert model.tokenizer.merges == clip.tokenizer.merges
    for key, tensor in clip.state_dict().items():  # the warm-up starts from what the pre-training made
        assert torch.equal(model.state_dict()["clip." + key], tensor), key


def test_tokenizer_knows_the_words_of_its_world(pretrained):
    """Every word of the drawn world is a single token, so a row has as many tokens as its text has words."""
    tokenizer = weights.load_clip(pretrained / "pretrain.safetensors").tokenizer
    items = [Shapes(split)[i] for split in ("val", "testA", "testB", "compose") for i in range(60)]
    words = {word for item in items for text in [item["caption"], *item["expressions"]] for word in split_words(text)}
    assert len(words) > 80
    assert {word for word in words if len(tokenizer.encode(word)) != 1} == set()


def test_pretraining_resumes(pretrained, world, monkeypatch):
    monkeypatch.setitem(train.CLIP_SIZES, "tiny", CLIPConfig(32, 16, 32, 6, 2, 32, 4, 2, 32))
    tokenizer = weights.load_clip(pretrained / "pretrain.safetensors").tokenizer

    def new_clip(s):
        clip = CLIP(replace(train.CLIP_SIZES["tiny"], vocab_size=tokenizer.vocab_size))
        clip.tokenizer = tokenizer
        return clip

    monkeypatch.setattr(train, "new_clip", new_clip)  # the same, but for the seconds that learning the words takes
    s = Settings(**torch.load(pretrained / "state.pt", weights_only=True)["settings"])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, "to_device", 4)
        train.train(replace(s, save_minutes=0))
    train.train(replace(s, resume=True))
    assert_same_run(world / "runs/tiny", pretrained)


# --- the command line ---


def run_script(monkeypatch, capfd, *args):
    """python train.py ARGS in this process -> (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    capfd.readouterr()
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capfd.readouterr()


def assert_one_line(result, *words):
    code, out, err = result
    assert (code, out) == (2, "") and re.fullmatch(r"error: [^\n]+\n", err), result
    assert all(str(word) in err for word in words), err


def test_every_setting_is_a_flag(monkeypatch):
    other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v + 0.5, tuple: lambda v: v[::-1]}
    words = {"name": "n", "dataset": "shapes", "clip": "c", "bridge": "none", "lora": "shared", "box_loss": "smooth_l1",
             "device": "cpu", "dtype": "bfloat16", "data_root": "d", "annotations": "a", "optimizer": "adamw",
             "text_layers": (2, 3)}
    changed = {f.name: words.get(f.name) or other[type(f.default)](f.default) for f in fields(Settings)
               if f.name not in ("preset", "hivg")}  # which stand for other settings
    s = Settings(**(changed | {"resume": False}))
    monkeypatch.setattr(sys, "argv", ["train.py", *flags(s)])
    assert train.settings_from_flags() == s
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert train.settings_from_flags() == Settings()


@pytest.mark.parametrize("args, word", [
    (["--batchsize", "8"], "--batchsize"),
    (["--batch", "8"], "--batch"),  # no abbreviations
    (["extra"], "extra"),
    (["--batch_size", "many"], "many"),
    (["--batch_size", "1.5"], "1.5"),
    (["--lora_alpha", "x"], "x"),
    (["--epochs", "1", "two", "1", "1"], "two"),
    (["--epochs", "1", "1"], "epochs"),
    (["--lr", "1e-3"], "lr"),
    (["--epochs", "0", "1", "1", "1"], "epochs"),
    *(([f"--{name}", "0"], name) for name in ("batch_size", "accumulate", "lora_rank", "epoch_samples")),
    (["--seed", "-1"], "seed"),
    (["--bridge", "golden"], "golden"),
    (["--lora", "deep"], "deep"),
    (["--box_loss", "l3"], "l3"),
    (["--dataset", "coco"], "refcoco+"),
    (["--dataset", "refcoco"], "no annotations of refcoco"),
    (["--preset", "refcoco"], "refcoco-base"),
    (["--dtype", "float8"], "float8"),
    (["--accumulate", "1", "2"], "accumulate"),
    (["--device", "foo"], "foo"),
    (["--device", "cuda:99"], "cuda:99"),
    (["--clip", "no/such.safetensors"], "no/such.safetensors"),
    (["--resume"], "state.pt"),
    (["--optimizer", "sgd"], "adamw or muon"), (["--hivg", "none.safetensors"], "leave out --clip"),
    (["--hard_mix", "--dataset", "mine.jsonl"], "--hard_mix"),
    (["--resume", "--name", "unheard"], "unheard")], ids=ids)
def test_bad_flags_get_one_line(world, clip_file, monkeypatch, capfd, args, word):
    args = args if {"--clip", "--resume"} & {*args} else ["--clip", clip_file, *args]
    assert_one_line(run_script(monkeypatch, capfd, *args, "--workers", "0"), word)
    assert not list(world.glob("runs/*/state.pt"))


def test_a_batch_is_of_whole_pictures(world, tiny):
    with pytest.raises(ValueError, match="multiple of 4"):
        train.train(replace(tiny, batch_size=6))


def test_help_names_every_setting(monkeypatch, capfd):
    code, out, err = run_script(monkeypatch, capfd, "--help")
    assert (code, err) == (0, "")
    assert all(f"--{f.name}" in out and str(f.default) in out for f in fields(Settings))


def test_wrong_clip_gets_one_line(world, clip_file, monkeypatch, capfd, whole):
    """A HiVG instead of a CLIP, and a CLIP of a depth that has no bridge blocks."""
    assert_one_line(run_script(monkeypatch, capfd, "--clip", whole / "warmup.safetensors"), "warmup.safetensors")
    tokenizer = weights.load_clip(clip_file).tokenizer
    clip = make_clip(dtype=torch.float32, vocab_size=tokenizer.vocab_size, context_length=24)
    clip.tokenizer = tokenizer
    weights.save("three.safetensors", clip)
    assert_one_line(run_script(monkeypatch, capfd, "--clip", "three.safetensors"), "3 layers")


@pytest.fixture(scope="module")
def interrupted(tiny, tmp_path_factory):
    """A folder with runs/tiny, killed in the second epoch."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        shrink(patch)
        patch.chdir(folder)
        kill(patch, "to_device", 5)
        train.train(tiny)
    return folder


@pytest.fixture
def begun(world, tiny, interrupted):
    """The settings of a run that was killed; it is in the current folder."""
    shutil.copytree(interrupted, world, dirs_exist_ok=True)
    return tiny


def test_a_run_is_not_overwritten(begun, monkeypatch, capfd):
    before = {p: p.read_bytes() for p in Path("runs/tiny").iterdir()}
    assert_one_line(run_script(monkeypatch, capfd, *flags(begun)), "runs/tiny", "--resume")
    assert before == {p: p.read_bytes() for p in Path("runs/tiny").iterdir()}


@pytest.mark.parametrize("args, word", [
    (["--batch_size", "16"], "--batch_size 16 (was 8)"), (["--epochs", "9", "1", "1", "1"], "--epochs"),
    (["--lora", "shared"], "--lora shared (was hierarchical)"), (["--no-text_norm"], "--text_norm"),
    (["--seed", "5", "--lr", "1"], "--seed 5")], ids=ids)
def test_resume_with_other_settings_gets_one_line(begun, monkeypatch, capfd, args, word):
    assert_one_line(run_script(monkeypatch, capfd, "--name", "tiny", "--resume", *args), word)


def test_resume_by_command(begun, whole, monkeypatch, capfd):
    """The name is enough; what only concerns the machine may change."""
    code, out, _ = run_script(monkeypatch, capfd, "--name", "tiny", "--resume", "--workers", "1", "--save_minutes", "3")
    assert (code, out) == (0, "runs/tiny/lora3.safetensors\n")
    assert_same_run(Path("runs/tiny"), whole)


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b""),
                                   lambda path: path.write_bytes(path.read_bytes()[:1000]),
                                   lambda path: path.write_text("<html>"),
                                   lambda path: torch.save({"settings": Path("x")}, path)],
                         ids=["empty", "cut", "html", "objects"])
def test_damaged_state_gets_one_line(begun, monkeypatch, capfd, spoil):
    spoil(Path("runs/tiny/state.pt"))
    assert_one_line(run_script(monkeypatch, capfd, "--name", "tiny", "--resume"), "runs/tiny/state.pt")


def test_runs_folder_that_cannot_be_made(world, clip_file, monkeypatch, capfd):
    Path("runs").write_text("a file")
    assert_one_line(run_script(monkeypatch, capfd, "--clip", clip_file), "runs")


def test_a_loss_that_is_not_finite_ends_the_command(world, tiny, monkeypatch, capfd):
    code, out, err = run_script(monkeypatch, capfd, *flags(replace(tiny, lr=(1e30,) * 4)))
    assert code == 2 and out == "" and err.count("error: ") == 1
    assert re.fullmatch(r"error: the loss is .* of warmup .*", err.splitlines()[-1])
