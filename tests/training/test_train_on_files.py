"""Training and evaluation on data sets from files: people's own, and every published one in its own format."""

import json
import re
from dataclasses import replace

import pytest
import torch
from makers import make_clip, make_hivg
from makers_data import make_scenes, rows_of, write_list, write_mdetr, write_refer, write_shapes
from makers_training import ON_CPU, log_of, shrink
from makers_use import call
from PIL import Image

import train
from hivg import Grounder, weights
from hivg.data.published.catalogue import COCO, FLICKR, REFERIT
from hivg.data.published.reading import read_samples
from hivg.evaluate import __main__ as evaluate
from hivg.training.presets import PRESETS, preset_of
from train import Settings


def test_train_and_evaluate_on_own_data(tmp_path, clip_file, monkeypatch, capfd):
    write_shapes(tmp_path, 6)
    path = write_shapes(tmp_path, 3, split="val", to="val")
    monkeypatch.chdir(tmp_path)
    final = train.train(Settings(name="mine", dataset=str(path), clip=str(clip_file), epoch_samples=0, batch_size=8,
                                 lora="vanilla", epochs=(1, 1), lr=(1e-3, 1e-3), warmup_steps=1, **ON_CPU))
    assert "in train too" not in capfd.readouterr().err
    assert [row["step"] for row in log_of("runs/mine") if "epoch" in row] == [3, 3]  # 24 expressions, 8 a step
    _, out, _ = call(evaluate.main, capfd, monkeypatch, "--weights", final, "--dataset", path, "--split", "val",
                     "--device", "cpu", "--per_sample", "a.jsonl", "--sheet", "sheet.png")
    assert "12 expressions" in out and "Acc@0.9" in out and "mask IoU" in out and "shuffled" not in out
    rows = rows_of("a.jsonl")
    samples = read_samples("data", path, "val")
    assert [(row["image"], row["expression"]) for row in rows] == [(str(s.image), s.expression) for s in samples]
    assert [row["target"] for row in rows] == [list(s.box) for s in samples]
    assert all(0 <= row["mask_iou"] <= 1 for row in rows)
    assert Image.open("sheet.png").width > 1000
    _, out, _ = call(evaluate.main, capfd, monkeypatch, "--compare", "a.jsonl", "a.jsonl")
    assert "0 right in the first alone, 0 in the second alone" in out


def test_other_rows_of_own_data_are_not_resumed(tmp_path, clip_file, monkeypatch, capfd):
    """As many, but one of them with another box. What is too long for CLIP is told at the start, and that `val` has
    images of `train`."""
    path = write_shapes(tmp_path, 2)
    path = write_shapes(tmp_path, 1, split="val", to="val")
    first, *others = path.read_text().splitlines(keepends=True)
    row = json.loads(first)
    others.append(json.dumps(row | {"split": "val"}) + "\n")
    path.write_text("".join([json.dumps(row | {"expression": "the red cup " * 50}) + "\n", *others]))
    monkeypatch.chdir(tmp_path)
    s = Settings(name="mine", dataset=str(path), clip=str(clip_file), epoch_samples=0, batch_size=8, lora="none",
                 epochs=(1,), lr=(1e-3,), warmup_steps=1, **ON_CPU)
    train.train(s)
    told = capfd.readouterr().err
    assert re.search(r"^expressions that are too long for CLIP, cut to their first \d+ tokens: 1$", told, re.M)
    assert re.search(r"^images of val that are in train too: 1;", told, re.M)
    train.train(replace(s, resume=True, data_root="elsewhere"))
    path.write_text("".join([json.dumps(row | {"bbox": [0, 0, 9, 9]}) + "\n", *others]))
    with pytest.raises(ValueError, match="the data are not those that this run began with"):
        train.train(replace(s, resume=True))


def test_a_missing_val_is_noticed_before_any_work(tmp_path, clip_file, monkeypatch):
    path = write_shapes(tmp_path, 3)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no split 'val'; there are train; name it"):
        train.train(Settings(name="mine", dataset=str(path), clip=str(clip_file), batch_size=4, **ON_CPU))
    assert not list(tmp_path.glob("runs/*/state.pt"))


def test_the_mask_head_learns_the_masks_asked_for(tmp_path):
    """By default the outlines of people's own data (test_mask_targets has all cases)."""
    own = write_shapes(tmp_path, 2)
    for masks in ("auto", "box"):
        s = Settings(dataset=str(own), data_root=str(tmp_path), masks=masks)
        assert train.open_split(s, make_hivg(), "train")[0]["has_mask"].item() == (masks == "auto")
    assert all(Settings(**PRESETS[name]).masks == "auto" for name in PRESETS)


# --- every data set, in its own files and folders ---

NAMED = {  # name: preset, folder of the images, the writer of its files and its arguments
    "refcoco": ("refcoco-base", COCO, write_refer, {}),
    "unc": ("refcoco-large", COCO, write_mdetr, {}),
    "unc+": ("refcoco+-base", COCO, write_list, {"dataset": "unc+"}),
    "gref": ("refcocog-base", COCO, write_list, {"dataset": "gref"}),
    "gref_umd": ("refcocog-base", COCO, write_list, {"dataset": "gref_umd", "new": False}),
    "referit": ("referit-base", REFERIT, write_list, {"dataset": "referit"}),
    "flickr": ("flickr-base", FLICKR, write_list, {"dataset": "flickr"}),
    "mixup": ("mixup-base", COCO, write_list, {"dataset": "mixup"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_every_data_set_from_files_to_a_box(tmp_path, name, monkeypatch, capfd):
    """Trained for a step or two in each stage of its preset, saved, evaluated, grounded: a model of few numbers, at
    ViT-B/16's depth."""
    shrink(monkeypatch)
    preset, folder, write, arguments = NAMED[name]
    splits = {"train": make_scenes(tmp_path, 4, 0, folder), "val": make_scenes(tmp_path, 4, 1, folder)}
    write(tmp_path, splits, **arguments)
    clip = make_clip(dtype=torch.float32, image_size=32, vision_width=32, vision_layers=12, vision_heads=2,
                     text_width=24, text_layers=12, text_heads=2, embed_dim=16)
    weights.save(tmp_path / "clip.safetensors", clip)
    monkeypatch.chdir(tmp_path)
    recipe = preset_of(preset)
    small = dict(name="run", dataset=name, data_root=str(tmp_path), clip="clip.safetensors", batch_size=2,
                 accumulate=(2,), epochs=(1,) * len(recipe["epochs"]), lora_rank=2, **ON_CPU)
    s = Settings(**(recipe | small))
    final = train.train(s)
    model = weights.load_hivg(final)
    assert model.config.stage == 3 and model.config.text_layers == s.text_layers
    assert model.config.bridge == ("projected" if name == "mixup" else "adaptive") and len(model.bridges) == 4
    _, out, _ = call(evaluate.main, capfd, monkeypatch, "--weights", final, "--dataset", name, "--split", "val",
                     "--data_root", tmp_path, "--device", "cpu")
    assert f"{len(splits['val'])} expressions" in out
    scene = splits["val"][0]
    result = Grounder.from_pretrained(final, "cpu").ground(tmp_path / folder / scene.file, scene.expression)
    assert 0 <= result.box[0] <= result.box[2] <= scene.size[0]
