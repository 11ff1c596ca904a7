"""A run: what it writes and keeps, and that every setting of the optimization does what it says."""

import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from makers import assert_close, make_hivg, trained
from makers_training import NAMES, Killed, assert_same_run, kill, log_of, run_script, shrink
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend

import train
from hivg import weights
from hivg.data.drawn.scenes import HARD_KINDS, SPLITS, WIDE_SPLITS, Shapes
from hivg.evaluate.report import guessers
from hivg.lora import without_adapters
from hivg.losses import LossWeights
from hivg.training import optimizers
from hivg.training.log import Log
from hivg.training.optimizers import learning_rate
from train import Settings, stages


def test_what_a_run_writes(whole):
    assert sorted(p.name for p in whole.iterdir()) == sorted(
        ["curves.png", "lock", "log.jsonl", "state.pt", *(f"{name}.safetensors" for name in NAMES)])
    assert Image.open(whole / "curves.png").size[0] > 300
    epochs = [row for row in log_of(whole) if "epoch" in row]
    assert [(row["stage"], row["epoch"], row["step"]) for row in epochs] == [
        ("warmup", 1, 3), ("warmup", 2, 6), ("lora1", 1, 3), ("lora2", 1, 3), ("lora3", 1, 3)]
    steps = [row for row in log_of(whole) if "lr" in row]
    assert [(row["stage"], row["step"]) for row in steps] == list(zip(NAMES, (6, 3, 3, 3)))  # the last of each stage
    names = {f.name for f in fields(LossWeights)}
    for row, stage in zip(steps, stages(Settings())):
        assert row["lr"] == learning_rate(row["step"] - 1, row["step"], stage.lr, 2)
        assert names <= row.keys()
        assert sum(row[name] for name in names) == pytest.approx(row["loss"], abs=1e-3)


@pytest.fixture
def charts(monkeypatch):
    """The panels of the curves.png that are drawn from now on, by their titles."""
    drawn = []
    monkeypatch.setattr("hivg.training.log.plot_panels", lambda panels, path: drawn.append(
        {panel["title"].split(",")[0]: panel for panel in panels}))
    return drawn


@pytest.mark.parametrize("lengths", [(3, 1, 2), (50, 51, 120), (16, 16, 400)], ids=str)
def test_curves_show_each_stage(charts, tmp_path, lengths):
    """However short it is, between its start and its end, with no line to the next; and the parts of the loss."""
    log = Log(tmp_path / "run")
    starts = [0, lengths[0], lengths[0] + lengths[1]]
    for name, steps in zip(NAMES, lengths):
        for step in range(1, steps + 1):
            v = torch.tensor(float(step))
            log.step(name, step, steps, 0.1, {"loss": 3 * v, "box": 2 * v, "clc": v, "gradient_norm": v})
        log.epoch(name, steps, 1, {"accuracy": 0.5}, 0.5)
    panels = charts[-1]
    assert list(panels) == ["Training loss", "Its parts", "Accuracy on val", "Learning rate"]
    assert list(panels["Its parts"]["curves"]) == ["box", "clc"]  # which are the loss; the largest first
    for title, panel in panels.items():
        assert panel["boundaries"] == list(zip(starts, NAMES))
        for curve in panel["curves"].values():
            gaps = [x for x, y in curve if not math.isfinite(y)]
            assert gaps == starts[1:]
            for start, steps in zip(starts, lengths):
                xs = [x for x, y in curve if math.isfinite(y) and start < x <= start + steps]
                assert xs and xs == sorted(xs)
    for x, mean in panels["Training loss"]["curves"]["loss"]:  # in the middle of the steps that it is the mean of
        start = max(start for start in starts if start <= x)
        assert math.isnan(mean) or mean == pytest.approx(3 * (x - start + 0.5))


@pytest.mark.parametrize("dataset", ["shapes", "shapes-wide"])
def test_curves_show_what_guessing_reaches(world, tiny, charts, dataset):
    train.train(replace(tiny, dataset=dataset, lora="none", epochs=(1,), epoch_samples=8, lr=(2e-3,)))
    val = Shapes("val", wide=dataset == "shapes-wide")
    assert charts[-1]["Accuracy on val"]["levels"] == {"guessing the largest object": guessers(val)["largest object"]}


def test_a_run_on_the_wider_world(world, tiny, monkeypatch):
    """Of nothing there it learns and validates, and counts the others alone."""
    monkeypatch.setitem(WIDE_SPLITS, "val", (6, WIDE_SPLITS["absent"][1] | {"attribute": 1.0}))
    seen = []
    predict = train.predict

    def predict_well(*args):
        rows = predict(*args)
        seen.extend(rows)
        return [row | {"iou": 0.9 if row["target"] else 0.0} for row in rows]

    monkeypatch.setattr(train, "predict", predict_well)
    path = train.train(replace(tiny, dataset="shapes-wide", lora="none", epochs=(1,), epoch_samples=16, lr=(2e-3,)))
    assert 0 < sum(row["target"] is None for row in seen) < len(seen)
    assert weights.load(path).info["accuracy"] == 1.0 and weights.load(path).info["dataset"] == "shapes-wide"


def test_quick_shows_what_it_learned(world, clip_file, monkeypatch, capfd):
    code, out, _ = run_script(monkeypatch, capfd, "--quick", "--clip", clip_file, "--epoch_samples", 16,
                              "--batch_size", 8, "--workers", 0, "--device", "cpu")
    path, drawing = map(Path, out.splitlines())
    assert code == 0 and path == Path("runs/quick/warmup.safetensors") and weights.load(path).config.lora == "none"
    assert Image.open(drawing).width == Image.open(weights.bundled("example.png")).width


@pytest.mark.slow
def test_loss_falls(world, tiny):
    train.train(replace(tiny, lora="none", epochs=(1,), epoch_samples=150 * 8, warmup_steps=10, lr=(2e-3,)))
    # means of steps 1..50, 51..100, 101..150
    first, _, last = (row["loss"] for row in log_of("runs/tiny") if "loss" in row)
    assert last < 0.9 * first


@pytest.mark.parametrize("scores, kept, best", [
    # epochs 1, 2 of the warm-up, then one of each stage -> the accuracies of the files
    ((0.5, 0.4, 0.3, 0.2, 0.1), "0 . . .", [0.5, 0.5, 0.5, 0.5]),
    ((0.2, 0.4, 0.4, 0.6, 0.5), "1 2 3 .", [0.4, 0.4, 0.6, 0.6]),
    ((0.0, 0.0, 0.0, 0.0, 0.1), "1 2 3 4", [0.0, 0.0, 0.0, 0.1])])
def test_a_stage_keeps_the_last_of_its_best_or_its_start(world, tiny, monkeypatch, scores, kept, best):
    seen = []

    def validate(s, dataset, model, device):
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
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
    assert [row["best"] for row in log_of("runs/tiny") if row.get("epoch") == 1][1:] == best[1:]


def test_bridgeless_stage_gets_its_bridge_after(world, tiny):
    """The bridge is new in the warm-up, and changes nothing yet: what was learned without it stays."""
    s = replace(tiny, lora="none", bridgeless=True, epochs=(1, 0), lr=(1e-3, 1e-3))
    train.train(s)
    bare = weights.load_hivg("runs/tiny/bridgeless.safetensors")
    warm = weights.load_hivg("runs/tiny/warmup.safetensors")
    assert bare.config.bridge == "none" and warm.config.bridge == "adaptive" and len(warm.bridges) == 3
    new = {name for name in warm.state_dict() if name.startswith("bridges.")}
    assert warm.state_dict().keys() - bare.state_dict().keys() == new
    assert all(torch.equal(tensor, warm.state_dict()[name]) for name, tensor in bare.state_dict().items())


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_accumulation_counts_steps(world, tiny, accumulate):
    train.train(replace(tiny, lora="none", epochs=(2,), batch_size=8, epoch_samples=48, accumulate=(accumulate,)))
    rows = [row for row in log_of("runs/tiny") if "epoch" in row]
    assert [row["step"] for row in rows] == [6 // accumulate, 12 // accumulate]


@pytest.fixture
def gradients(monkeypatch):
    """The gradient of each step of a run, flattened, as the optimizers get it."""
    seen = []
    step = optimizers.step_optimizers

    def spy(optimizers):
        parts = []
        for optimizer in optimizers:
            parts += [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        seen.append(torch.cat(parts))
        step(optimizers)

    monkeypatch.setattr(optimizers, "step_optimizers", spy)
    return seen


def test_accumulated_gradients_are_those_of_the_whole_batch(world, tiny, monkeypatch, gradients):
    """Without dropout and CLC, the only term that compares the samples of a batch."""
    shrink(monkeypatch, dropout=0.0)
    for batch_size, accumulate in ((16, 1), (8, 2), (4, 4)):
        train.train(replace(tiny, name=f"{batch_size}", lora="none", epochs=(1,), epoch_samples=16,
                            batch_size=batch_size, accumulate=(accumulate,), loss_weights=LossWeights(clc=0)))
    whole, *parts = gradients
    assert len(parts) == 2 and whole.norm() > 0.1
    for part in parts:
        assert_close("gradient", part, whole, 1e-5 * whole.norm().item())


def test_gradient_is_clipped(world, tiny, gradients):
    """The log holds the norm as it was; the optimizers get a gradient no longer than clip_grad."""
    s = replace(tiny, lora="none", epochs=(1,), epoch_samples=8)
    for name, limit in (("free", float("inf")), ("clipped", 0.25)):
        train.train(replace(s, name=name, clip_grad=limit))
    free, clipped = gradients
    norm = log_of("runs/free")[0]["gradient_norm"]
    assert norm > 1 and log_of("runs/clipped")[0]["gradient_norm"] == norm
    assert free.norm().item() == pytest.approx(norm, rel=1e-3)
    assert clipped.norm().item() == pytest.approx(0.25, rel=1e-3)
    assert_close("direction", clipped / clipped.norm(), free / free.norm(), 1e-6)


def test_weight_decay_reaches_the_optimizers(world, tiny):
    """The same step with and without: AdamW's and Muon's decay shrink a parameter by lr * decay * its value."""
    s = replace(tiny, lora="none", epochs=(1,), epoch_samples=8, warmup_steps=0, lr=(1e-2,))
    start = train.begin_stage(s, 0, Path("none"))[0].state_dict()
    for name, decay in (("without", 0.0), ("with", 0.5)):
        train.train(replace(s, name=name, weight_decay=decay))
    without = torch.load("runs/without/state.pt", weights_only=True)["trained"]
    decayed = torch.load("runs/with/state.pt", weights_only=True)["trained"]
    for name in ("position", "visual_proj.weight"):  # one of AdamW's, one of Muon's
        assert_close(name, without[name] - decayed[name], 1e-2 * 0.5 * start[name], 1e-6)


def test_every_step_trains_with_dropout(world, tiny, monkeypatch):
    """Also after a validation, which needs the model without."""
    modes = []
    forward = train.Criterion.forward

    def spy(criterion, batch):
        dropouts = [m for m in criterion.model.modules() if isinstance(m, torch.nn.Dropout)]
        modes.append(bool(dropouts) and all(m.training and m.p > 0 for m in dropouts))
        return forward(criterion, batch)

    monkeypatch.setattr(train.Criterion, "forward", spy)
    train.train(replace(tiny, lora="vanilla", epochs=(2, 1)))
    assert len(modes) == 9 and all(modes)


def test_box_loss_is_the_one_asked_for(world, tiny):
    """Smooth L1 of an error x below 1 is x^2 / 2, at most half of |x|."""
    for kind in ("l1", "smooth_l1"):
        train.train(replace(tiny, name=kind, lora="none", epochs=(1,), epoch_samples=8, box_loss=kind))
    l1, smooth = (log_of(f"runs/{kind}")[0] for kind in ("l1", "smooth_l1"))
    assert 0 < smooth["box"] < 0.5 * l1["box"] and smooth["giou"] == l1["giou"]


def test_a_loss_of_weight_zero_is_left_out(world, tiny):
    train.train(replace(tiny, lora="none", epochs=(1,), epoch_samples=8, loss_weights=LossWeights(1, 0, 0, 0, 3, 0, 0)))
    assert log_of("runs/tiny")[0].keys() == {"stage", "step", "lr", "loss", "box", "rtcc_dice", "gradient_norm"}


@pytest.mark.slow
def test_same_seed_same_run(whole, world, tiny):
    """Worker processes change nothing; another seed does."""
    train.train(replace(tiny, workers=2))
    assert_same_run(world / "runs/tiny", whole)
    for seed in (0, 1):
        train.train(replace(tiny, name=f"seed{seed}", seed=seed, epochs=(1, 0, 0, 0)))
    same, other = (log_of(f"runs/seed{seed}")[0]["loss"] for seed in (0, 1))
    assert same != other
    assert len(list(Path("runs/seed1").glob("*.safetensors"))) == 4  # a stage of no epochs keeps its start


def test_accumulated_losses_are_logged_as_their_mean(world, tiny, monkeypatch):
    losses = []
    forward = train.Criterion.forward

    def spy(criterion, batch):
        terms = forward(criterion, batch)
        losses.append({name: value.item() for name, value in terms.items()})
        return terms

    monkeypatch.setattr(train.Criterion, "forward", spy)
    train.train(replace(tiny, lora="none", epochs=(1,), epoch_samples=24, accumulate=(3,)))
    row = log_of("runs/tiny")[0]
    assert len(losses) == 3
    for name in losses[0]:
        assert row[name] == pytest.approx(sum(part[name] for part in losses) / 3, abs=1e-5)


@pytest.mark.slow
def test_compiled_training_is_the_same(world, tiny, monkeypatch):
    """The warm-up and the last stage, which has blocks of all kinds, log the same with --compile, and no block is left
    as it was for being the ninth kind. The graphs are those that faster programs would be made of, which is PyTorch's
    part, and takes minutes. The first step is the same to the digit; later ones differ by rounding, which grows, in the
    gradient most."""
    counter = CompileCounterWithBackend("aot_eager")
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda model: compile(model, backend=counter, fullgraph=True))
    monkeypatch.setattr("hivg.training.run.check_compile", lambda device: None)  # it makes a faster program
    torch._dynamo.reset()
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    s = replace(tiny, epochs=(1, 0, 0, 1), epoch_samples=16)
    for name, is_compiled in (("plain", False), ("compiled", True)):
        train.train(replace(s, name=name, compile=is_compiled))
    # far fewer than blocks and stages, to train and to validate: blocks of a kind share a program
    assert 8 < counter.frame_count <= 40
    first, *later = zip(log_of("runs/compiled"), log_of("runs/plain"), strict=True)
    assert first[0] == first[1]
    for a, b in later:
        for name, value in a.items():
            rel = 5e-3 if name == "gradient_norm" else 1e-3
            assert b[name] == (pytest.approx(value, rel, 1e-4) if isinstance(value, float) else value), name


def test_an_epoch_is_the_whole_data_set_by_default():
    class Rows(list):
        rows = 1

    stage, = stages(Settings(lora="none"))
    own = Settings(dataset="a.jsonl")
    for s, samples, steps in ((own, 3200, 100), (own, 63, 2), (own, 1, 1), (replace(own, epoch_samples=64), 3200, 2),
                              (Settings(), 0, train.SHAPES_EPOCH // 32)):
        assert train.count_steps_per_epoch(s, stage, Rows(range(samples))) == steps


def test_seed_and_hard_mix_do_not_move_val():
    model = make_hivg()
    for seed, hard_mix in ((0, False), (7, True)):
        s = Settings(seed=seed, hard_mix=hard_mix, dataset="shapes")
        val, training = (train.open_split(s, model, split).shapes for split in ("val", "train"))
        assert (val.seed, val.weights) == (0, SPLITS["val"][1])
        assert (training.seed, training.weights) == (seed, HARD_KINDS if hard_mix else SPLITS["train"][1])


def test_clip_rate_is_of_clips_own_weights(whole, tiny):
    """Adapters are trained as without it: those of this stage alone, at the full rate."""
    usual, _ = train.begin_stage(tiny, 2, whole)
    also, _ = train.begin_stage(replace(tiny, clip_rate=0.1), 2, whole)
    names = [name for name, _ in also.named_parameters() if name.startswith("clip.")]
    own = {name for name in names if not re.search(r"\.[AB]\.\d", name)}
    assert trained(also) == trained(usual) | own and trained(usual).isdisjoint(own)
    assert len(without_adapters(also.clip)) == len(own)


# --- an existing HiVG trained further ---


def test_the_state_is_the_first_file_of_a_run(world, finetuning, monkeypatch):
    """Else, where the disk is full, weights without a state would stand in the way of starting again."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch, train.Run, "save", 1)
        train.train(finetuning)
    assert not list(Path("runs/tiny").glob("*.safetensors"))
    train.train(finetuning)


@pytest.mark.slow
def test_finetune(world, finetuning):
    """One stage that trains the parameters the last one trained."""
    path = train.train(replace(finetuning, epochs=(2,)))
    assert path == Path("runs/tiny/finetune.safetensors")
    before = weights.load_hivg(finetuning.finetune)
    state = torch.load("runs/tiny/state.pt", weights_only=True)
    assert trained(before) == state["trained"].keys()
    changed = [name for name, p in state["trained"].items() if not torch.equal(p, before.get_parameter(name))]
    assert len(changed) > 0.9 * len(state["trained"])
    assert any(".A.2" in name for name in changed)


def test_finetune_keeps_its_start_if_it_gets_worse(world, finetuning, monkeypatch, capfd):
    """Measured before the first step, for the accuracy in the file may be of another data set."""
    calibrated = weights.load_hivg(finetuning.finetune)
    weights.save("calibrated.safetensors", calibrated, calibrated.info | {"score_calibration": [1, 0]})
    finetuning = replace(finetuning, finetune="calibrated.safetensors")
    scores = iter([0.5, 0.4, 0.45])
    monkeypatch.setattr(train, "validate", lambda *args: {"accuracy": next(scores)})
    path = train.train(replace(finetuning, epochs=(2,)))
    assert [(row["epoch"], row["accuracy"]) for row in log_of("runs/tiny") if "epoch" in row] == [
        (0, 0.5), (1, 0.4), (2, 0.45)]
    kept = weights.load_hivg(path)
    before = weights.load_hivg(finetuning.finetune).state_dict()
    assert kept.info["accuracy"] == 0.5 and kept.info["epoch"] == 0 and kept.info["score_calibration"] == [1, 0]
    assert "finetune: no epoch was better than the start" in capfd.readouterr().err
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.state_dict().items())


def test_finetune_adds_adapters_to_a_model_without(whole, world, finetuning, capfd):
    """A released checkpoint has its adapters folded, that of a warm-up has none yet: the start says so, and --lora adds
    some to the first."""
    s = replace(finetuning, epoch_samples=8)
    train.train(replace(s, name="early", finetune=str(whole / "warmup.safetensors")))
    assert "no adapters to train; --lora" in capfd.readouterr().err
    weights.save("folded.safetensors", (folded := weights.load_hivg(whole / "lora3.safetensors").merged()), folded.info)
    s = replace(s, finetune="folded.safetensors")
    train.train(s)
    assert "no adapters to train; --lora" in capfd.readouterr().err
    path = train.train(replace(s, name="adapted", lora="vanilla", lora_rank=3, lora_alpha=6.0))
    config = weights.load_hivg(path).config
    assert (path.stem, config.lora, config.stage, config.lora_rank, config.lora_alpha) == ("lora1", "vanilla", 1, 3, 6)
    assert "no adapters" not in capfd.readouterr().err
    with pytest.raises(ValueError, match="has adapters already"):
        train.train(replace(s, name="twice", finetune=str(path), lora="vanilla"))
