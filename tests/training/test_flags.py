"""The command line of train.py: every setting is a flag, and a bad one gets one line."""

import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from makers import BUNDLED, make_clip, raising
from makers_training import assert_one_line, flags, ids, run_script

import train
from hivg import weights
from hivg.losses import DRAWN_WORLD, LossWeights
from hivg.model import HiVG, HiVGConfig
from hivg.training.presets import QUICK, defaults_of, preset_of
from hivg.training.settings import RunSettings, help_text, setting, settings_from_flags
from train import Settings


def parsed(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    return settings_from_flags(Settings, "", defaults_of)


def test_every_setting_is_a_flag(monkeypatch):
    other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v / 2, tuple: lambda v: v[::-1],
             LossWeights: lambda v: LossWeights(*range(1, 10))}
    words = {"name": "n", "clip": "c", "bridge": "none", "lora": "shared", "box_loss": "smooth_l1", "device": "cpu",
             "dtype": "bfloat16", "data_root": "d", "optimizer": "adamw", "text_layers": (2, 3),
             "epochs": (1, 2, 3, 4, 5), "lr": (1e-3,) * 5}
    changed = {}
    for f in fields(Settings):
        # not those that exclude others or stand for them
        if f.name not in ("preset", "quick", "finetune", "resume", "dataset", "masks", "annotations", "graph"):
            changed[f.name] = words.get(f.name) or other[type(f.default)](f.default)
    s = Settings(**changed)
    assert parsed(monkeypatch, *flags(s)) == s
    assert parsed(monkeypatch) == Settings()


def test_hyphens_are_accepted(monkeypatch):
    s = Settings(batch_size=8, text_norm=False, data_root="a-b", name="--odd")
    words = ["--batch-size=8", "--no-text-norm", "--data-root", "a-b", "--name=--odd"]
    assert parsed(monkeypatch, *words) == s
    assert parsed(monkeypatch, "--no_text_norm") == Settings(text_norm=False)


def test_presets_are_defaults(monkeypatch):
    s = parsed(monkeypatch, "--preset", "referit-base", "--batch_size", "8")
    assert s == Settings(**(preset_of("referit-base") | {"preset": "referit-base", "batch_size": 8}))
    assert s.name == "referit-base"  # so that it has a folder of its own


def test_quick_is_a_recipe(monkeypatch):
    s = parsed(monkeypatch, "--quick", "--batch_size", "8")
    assert s == Settings(**(QUICK | {"quick": True, "batch_size": 8})) and len(train.stages(s)) == 1


@pytest.mark.parametrize("args, word", [
    (["--quick", "--preset", "refcoco-base"], "leave out --preset"), (["--batchsize", "8"], "--batchsize"),
    (["--quick", "--lora", "vanilla"], "leave out --lora"), (["--batch", "8"], "--batch"),  # no abbreviations
    (["--quick", "--finetune", "x.safetensors"], "leave out --finetune"), (["extra"], "extra"),
    (["--batch_size", "many"], "many"), (["--batch_size", "6"], "--batch_size: 6, a multiple of 4 needed"),
    (["--batch_size", "1.5"], "1.5"), (["--lora_alpha", "x"], "x"), (["--lora_alpha", "0"], "--lora_alpha"),
    (["--epochs", "1", "1"], "epochs"),
    (["--epochs", "1", "two", "1", "1"], "two"),
    (["--lr", "1e-3", "1e-3"], "lr"), (["--epochs", "9"], "epochs"), (["--lr", "nan", "1", "1", "1"], "--lr"),
    (["--lr", "1", "-1", "1", "1"], "--lr"),
    (["--epochs", "0", "1", "1", "1"], "epochs"), (["--epoch_samples", "-1"], "epoch_samples"),
    *(([f"--{name}", "0"], name) for name in ("batch_size", "accumulate", "lora_rank")), (["--seed", "-1"], "seed"),
    (["--loss_weights", *(f"{f.name}=0" for f in fields(LossWeights))], "all 0"), (["--name", ""], "--name is empty"),
    *((["--name", name], "is not the name of a folder below runs/")
      for name in (".", "..", "a/../../b", "/tmp/a", "a\nb", "\x1b[31m")),
    (["--resume", "--name", "../runs/a"], "is not the name of a folder below runs/"),
    (["--workers", "-2"], "--workers must be from -1"), (["--masks", "polygon"], "auto, box, segmentation"),
    (["--dataset", "shapes", "--masks", "box"], "shapes is drawn"), (["--clip_grad", "0"], "clip_grad"),
    (["--annotations", "somewhere"], "shapes-wide is drawn"), (["--bridge", "golden"], "golden"),
    (["--lora", "deep"], "deep"), (["--box_loss", "l3"], "l3"), (["--loss_weights", "1", "2"], "is none of box, giou"),
    (["--loss_weights", "clc=many"], "no number"), (["--loss_weights", "clc=-1"], "--loss_weights must be 0 or more"),
    (["--loss_weights", "cls=1"], "cls=1"), (["--dataset", "coco"], "refcoco+"), (["--dtype", "float8"], "float8"),
    (["--dataset", "refcoco"], "no annotations of refcoco"), (["--preset", "refcoco"], "refcoco-base"),
    (["--accumulate", "1", "2"], "accumulate"), (["--device", "foo"], "foo"), (["--device", "cuda:99"], "cuda:99"),
    (["--clip", "no/such.safetensors"], "no/such.safetensors"), (["--resume"], "state.pt"),
    (["--optimizer", "sgd"], "muon, adamw"), (["--finetune", "none.safetensors"], "leave out --clip"),
    (["--hard_mix", "--dataset", "mine.jsonl"], "--hard_mix"),
    (["--resume", "--name", "unheard"], "unheard")], ids=ids)
def test_bad_flags_get_one_line(world, clip_file, monkeypatch, capfd, args, word):
    args = args if {"--clip", "--resume"} & {*args} else ["--clip", clip_file, *args]
    assert_one_line(run_script(monkeypatch, capfd, *args, "--workers", "0", *args), word)
    assert not list(world.glob("runs/*/state.pt"))


@pytest.mark.parametrize("args, words", [
    *(([flag, *numbers], [f"{flag}: {len(numbers)} values, 1 needed (finetune)"])  # else left out without a word
      for flag in ("--epochs", "--lr", "--accumulate") for numbers in (("3", "9"), ("3", "9", "9", "9"))),
    *(([flag, "8"], [f"leave out {flag}"]) for flag in ("--lora_rank", "--lora_alpha")),
    (["--lora", "vanilla"], ["--lora vanilla: ", "has adapters (hierarchical, stage 3)"])], ids=ids)
def test_what_a_finetuning_of_the_bundled_weights_refuses(world, monkeypatch, capfd, args, words):
    assert_one_line(run_script(monkeypatch, capfd, "--finetune", str(BUNDLED), *args), *words)
    assert not (world / "runs").exists()


def test_a_finetuning_of_another_model_takes_the_papers_losses(monkeypatch, tmp_path):
    """The tiny model keeps what suits the drawn world, Muon and the hints."""
    path = tmp_path / "deep.safetensors"
    clip = make_clip(dtype=torch.float32, vision_layers=12, text_layers=12)
    config = HiVGConfig.for_clip(clip.config, width=16, encoder_layers=1, encoder_ffn=16, rtcc_hidden=16)
    weights.save(path, HiVG(config))
    s = parsed(monkeypatch, "--finetune", str(path), "--lora", "hierarchical", "--lr", "1e-4", "1e-4", "5e-5")
    assert (s.optimizer, s.loss_weights, s.warmup_steps, s.lora_rank) == ("adamw", LossWeights(), 0, 32)
    assert [(row.name, row.epochs, row.lr) for row in train.stages(s)] == [
        ("lora1", 1, 1e-4), ("lora2", 1, 1e-4), ("lora3", 1, 5e-5)]
    assert [row.lr for row in train.stages(parsed(monkeypatch, "--finetune", str(path)))] == [2.5e-5]
    s = parsed(monkeypatch, "--finetune", str(BUNDLED))
    assert (s.optimizer, s.loss_weights, s.lora, s.lr) == ("muon", DRAWN_WORLD, "none", (1e-3,))
    preset = parsed(monkeypatch, "--finetune", str(path), "--preset", "flickr-base")
    assert (preset.dataset, preset.epochs, preset.name) == ("flickr", (1,), "flickr-base")


def test_a_batch_is_refused_before_the_start_of_a_fine_tuning_is_measured(world, tiny, monkeypatch):
    monkeypatch.setattr(train, "validate", None)  # calling it would be a TypeError
    with pytest.raises(ValueError, match="multiple of 4"):
        train.train(replace(tiny, finetune=str(BUNDLED), lora="none", epochs=(1,), lr=(1e-3,), batch_size=6))


def test_help_explains_every_setting_by_group(monkeypatch, capfd):
    code, out, err = run_script(monkeypatch, capfd, "--help")
    assert (code, err) == (0, "")
    headings = re.findall(r"^(\w[\w ]+):$", out, re.M)
    assert headings == ["options", "The run", "Data", "Model", "Optimization", "Machine"]
    text = " ".join(out.split()).replace("- ", "-")  # the help wraps its lines, also after a hyphen
    for f in fields(Settings):
        assert f"--{f.name}" in text or f"--no_{f.name}" in text
        assert len(f.metadata["text"].split()) >= 3, f"--{f.name} is not explained"
        assert " ".join(help_text(f).split()).replace("- ", "-") in text


def test_a_setting_is_checked_wherever_it_comes_from():
    @dataclass
    class Small(RunSettings):
        n: int = setting(2, "a number", low=1, high=3)
        kinds: str = setting("a", "a kind", choices=("a", "b"))
        least: int = setting(2, "a number without an upper bound", low=1)
        rates: tuple[float, ...] = setting((1.0,), "rates", low=0, high=1e9)

    Small(n=3, kinds="b", rates=(0.0,))
    for wrong, words in (({"n": 4}, "--n must be from 1 to 3, not 4"), ({"kinds": "c"}, "--kinds must be one of a, b"),
                         ({"least": 0}, "--least must be 1 or more, not 0"),
                         ({"rates": (float("nan"),)}, "--rates must be 0 or more, not nan")):
        with pytest.raises(ValueError, match=words):
            Small(**wrong)
    terms = vars(LossWeights())
    assert train.Settings(loss_weights=terms).loss_weights == LossWeights()
    with pytest.raises(ValueError, match="--loss_weights must name .*clc"):  # a state from before this loss
        train.Settings(loss_weights={name: 1.0 for name in terms if name != "clc"})


def test_wrong_clip_gets_one_line(world, monkeypatch, capfd, whole):
    """A HiVG instead of a CLIP, and a CLIP of a depth that has no bridge blocks."""
    assert_one_line(run_script(monkeypatch, capfd, "--clip", whole / "warmup.safetensors"), "warmup.safetensors")
    weights.save("three.safetensors", make_clip(dtype=torch.float32))
    assert_one_line(run_script(monkeypatch, capfd, "--clip", "three.safetensors"), "3 layers")


def test_runs_folder_that_cannot_be_made(world, clip_file, monkeypatch, capfd):
    Path("runs").write_text("a file")
    assert_one_line(run_script(monkeypatch, capfd, "--clip", clip_file), "runs")


def test_a_machine_that_cannot_compile_gets_one_line(world, clip_file, monkeypatch, capfd):
    """Before the folder of the run is made."""
    monkeypatch.setattr(torch, "compile", raising(RuntimeError("\nInvalidCxxCompiler: no g++\nmore\n")))
    ended = run_script(monkeypatch, capfd, "--clip", clip_file, "--compile", "--device", "cpu")
    assert_one_line(ended, "InvalidCxxCompiler: no g++); install a C++ compiler", "leave --compile out")
    assert not Path("runs").exists()


def test_a_loss_that_is_not_finite_ends_the_command(world, tiny, monkeypatch, capfd):
    code, out, err = run_script(monkeypatch, capfd, *flags(replace(tiny, lr=(1e30,) * 4)))
    assert code == 2 and out == "" and err.count("error: ") == 1
    assert re.fullmatch(r"error: the loss is .* of warmup .*", err.splitlines()[-1])
