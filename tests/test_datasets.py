"""Data sets from disk: samples to tensors, training and evaluation on them, presets, the comparison of two runs."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from makers import assert_close, make_clip, make_hivg, make_tokenizer
from PIL import Image
from test_annotations import COCO, FLICKR, REFERIT, make_scenes, write_list, write_mdetr, write_refer, xywh

import train
from hivg import Grounder, evaluate, weights
from hivg.data.annotations import Sample, read_samples
from hivg.data.augment import Augment
from hivg.data.batches import SampleTensors, box_mask, collate, evaluation_batches, open_dataset, training_batches
from hivg.data.shapes import Shapes
from hivg.losses import LossWeights
from hivg.metrics import mcnemar
from hivg.training.presets import PRESETS, preset

ROOT = Path(__file__).resolve().parents[1]


def write_shapes(folder, scenes=12, split="train", to="train"):
    """Scenes of the bundled data set as people's own data: pictures and a JSON line for each expression."""
    shapes, rows = Shapes(split), []
    (folder / "pictures").mkdir(exist_ok=True)
    for i in range(scenes):
        item = shapes[i]
        item["image"].save(folder / "pictures" / f"{split}{i}.png")
        for text, box, target in zip(item["expressions"], item["boxes"].tolist(), item["targets"]):
            mask = item["labels"] == target + 1
            runs = np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel(), [0]])))
            counts = np.diff([0, *runs, mask.size]).tolist()
            rows.append({"image": f"pictures/{split}{i}.png", "expression": text, "bbox": box, "split": to,
                         "segmentation": {"size": list(mask.shape), "counts": counts}})
    with open(folder / "mine.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder / "mine.jsonl"


# --- samples to tensors ---


def test_samples_from_disk_are_what_shapes_draws(tmp_path):
    """A picture written and read back gives the tensors of the bundled data set itself, masks too."""
    path = write_shapes(tmp_path, 5)
    ours, drawn = open_dataset(str(path), "train", 64), open_dataset("shapes", "train", 64)
    for i in range(5):
        rows, expected = collate([ours[4 * i + k] for k in range(4)]), drawn[i]
        assert rows["expressions"] == expected["expressions"]
        for name in ("images", "padding_mask", "boxes", "masks", "pixel_boxes", "has_mask"):
            assert_close(name, rows[name], expected[name], 1e-6)
        assert rows["image_ids"].tolist() == [i] * 4


def make_samples(tmp_path, n=10):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    return [Sample(tmp_path / "a.png", f"cup {i}", (10.0, 10.0, 30.0, 20.0), None, "a.png") for i in range(n)]


def test_training_order(tmp_path):
    """Every epoch is all samples once, in another order; an item depends on (seed, index) alone."""
    samples = make_samples(tmp_path)
    data = SampleTensors(samples, 32, augment=Augment())
    orders = [[data.number(10 * epoch + i) for i in range(10)] for epoch in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders) and orders[0] != orders[1] != orders[2]
    again, other = SampleTensors(samples, 32, augment=Augment()), SampleTensors(samples, 32, seed=1, augment=Augment())
    for index in (25, 3, 2**33 + 5):  # any order; a stage starts at a large index
        a, b, c = data[index], again[index], other[index]
        assert a["expressions"] == b["expressions"] and torch.equal(a["images"], b["images"])
        assert not torch.equal(a["images"], c["images"])
    assert not torch.equal(data[0]["images"], data[10 + orders[1].index(orders[0][0])]["images"])  # augmented anew


def test_batches_resume_and_share(tmp_path):
    data = SampleTensors(make_samples(tmp_path), 32, augment=Augment())
    texts = [b["expressions"] for b in training_batches(data, 0, 4, 5)]
    assert [b["expressions"] for b in training_batches(data, 0, 4, 5, start=3)] == texts[3:]
    shares = [[b["expressions"] for b in training_batches(data, 0, 4, 5, rank=r, world=2)] for r in (0, 1)]
    assert [a + b for a, b in zip(*shares)] == texts
    whole = SampleTensors(make_samples(tmp_path), 32)
    for world in (1, 2, 3):  # every sample once, whatever the number of processes
        seen = [t for r in range(world) for b in evaluation_batches(whole, 3, rank=r, world=world)
                for t in b["expressions"]]
        assert sorted(seen) == sorted(f"cup {i}" for i in range(10))


def test_box_stands_in_for_a_mask(tmp_path):
    row = SampleTensors(make_samples(tmp_path, 1), 40)[0]
    assert not row["has_mask"].any()
    rows, columns = row["masks"][0].any(1).nonzero()[:, 0], row["masks"][0].any(0).nonzero()[:, 0]
    assert (columns[0], columns[-1] + 1) == (10, 30)  # the picture is 40 wide and lies 5 lower in the square
    assert (rows[0], rows[-1] + 1) == (15, 25)
    assert torch.equal(row["masks"][0], box_mask(row["boxes"][0], 40))


# --- training ---


def small(clip_file, **changes):
    return train.Settings(name="mine", clip=str(clip_file), epoch_samples=0, batch_size=8, epochs=(1, 1, 1, 1),
                          warmup_steps=1, save_minutes=1000, device="cpu", workers=0, **changes)


def test_train_and_evaluate_on_ones_own_data(tmp_path, clip_file, monkeypatch, capfd):
    write_shapes(tmp_path, 6)
    path = write_shapes(tmp_path, 3, split="val", to="val")
    monkeypatch.chdir(tmp_path)
    final = train.train(small(clip_file, dataset=str(path), dtype="float32", lora="vanilla"))
    log = [json.loads(line) for line in Path("runs/mine/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log if "epoch" in row] == [3, 3]  # 24 expressions an epoch, 8 a step
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["evaluate", "--weights", str(final), "--dataset", str(path), "--split", "val",
                                      "--device", "cpu", "--per-sample", "a.jsonl", "--sheet", "sheet.png"])
    evaluate.main()
    out = capfd.readouterr().out
    assert "12 expressions" in out and "Acc@0.9" in out and "mask IoU" in out and "shuffled" not in out
    rows = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()]
    samples = read_samples("data", path, "val")
    assert [(row["image"], row["expression"]) for row in rows] == [(str(s.image), s.expression) for s in samples]
    assert [row["target"] for row in rows] == [list(s.box) for s in samples]
    assert all(0 <= row["mask_iou"] <= 1 for row in rows)
    assert Image.open("sheet.png").width > 1000
    monkeypatch.setattr(sys, "argv", ["evaluate", "--compare", "a.jsonl", "a.jsonl"])
    evaluate.main()
    assert "0 right in the first alone, 0 in the second alone" in capfd.readouterr().out


def test_two_processes_train_as_one_on_data_from_disk(tmp_path, clip_file):
    write_shapes(tmp_path, 4)
    path = write_shapes(tmp_path, 3, split="val", to="val")
    logs = []
    for n in (1, 2):
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] if n > 1 else []
        folder = tmp_path / str(n)
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, *start, ROOT / "train.py", "--name", "run", "--device", "cpu", "--dtype", "float32",
             "--optimizer", "adamw", "--workers", "0", "--clip", clip_file, "--dataset", path, "--epoch_samples", "0",
             "--batch_size", "8", "--lora", "none", "--epochs", "1", "--loss_weights", *"2 2 1 20 2 20 2".split()],
            cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        logs.append([json.loads(line) for line in (folder / "runs/run/log.jsonl").read_text().splitlines()])
    for a, b in zip(*logs, strict=True):
        for name, value in a.items():
            assert b[name] == (pytest.approx(value, rel=1e-5, abs=2e-5) if isinstance(value, float) else value), name


def test_warm_up_without_the_bridge(tmp_path, clip_file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s, run = small(clip_file, warmup_bridge=False, dataset="mine.jsonl"), tmp_path / "runs" / "mine"
    rows = train.stages(s)
    warm, _ = train.begin_stage(s, rows[0], None, run)
    assert warm.config.bridge == "none" and not warm.bridges
    weights.save(run / "warmup.safetensors", warm, {"accuracy": 0.5})
    model, best = train.begin_stage(s, rows[1], rows[0], run)
    assert best == 0.5 and model.config.bridge == "adaptive" and model.config.stage == 1 and len(model.bridges) == 3
    assert all(p.requires_grad for p in model.bridges.parameters())
    fresh = warm.with_bridge("adaptive").eval()
    images, padding = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32).bool()
    ids = model.tokenizer(["red cup", "the star"])
    with torch.no_grad():
        assert_close("boxes", fresh(images, padding, ids).boxes, warm.eval()(images, padding, ids).boxes, 1e-6)
    trained = {n for n, p in warm.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in fresh.named_parameters() if p.requires_grad and not n.startswith("bridges.")}


def test_checkpointing_changes_no_gradient():
    model, grads = make_hivg(fresh=True).train(), []
    images, padding = torch.randn(2, 3, 64, 64, dtype=torch.float64), torch.zeros(2, 64, 64).bool()
    for on in (False, True):
        model.clip.visual.checkpoint = on
        model.zero_grad()
        torch.manual_seed(0)  # dropout
        output = model(images, padding, model.tokenizer(["the red cup", "man"]))
        (output.boxes.sum() + output.token_similarity.sum() + output.mask_logits.sum()).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any(n.startswith("bridges.") for n in grads[0])
    for name in grads[0]:
        assert_close(name, grads[1][name], grads[0][name], 1e-12)


# --- every data set, in its own files and folders ---


def write_mixture(root, splits):
    for split, scenes in splits.items():
        rows = [(s.file, {"height": s.size[1], "width": s.size[0]}, xywh(s.box), s.expression, s.segmentation)
                for s in scenes]
        (root / "mixup").mkdir(exist_ok=True)
        torch.save(rows, root / "mixup" / f"mixup_{split}.pth")


NAMED = {  # name: preset, folder of the pictures, how its files are written
    "refcoco": ("refcoco-base", COCO, write_refer),
    "unc": ("refcoco-large", COCO, write_mdetr),
    "unc+": ("refcoco+-base", COCO, lambda root, splits: write_list(root, splits, "unc+")),
    "gref": ("refcocog-base", COCO, lambda root, splits: write_list(root, splits, "gref")),
    "gref_umd": ("refcocog-base", COCO, lambda root, splits: write_list(root, splits, "gref_umd", new=False)),
    "referit": ("referit-base", REFERIT, lambda root, splits: write_list(root, splits, "referit")),
    "flickr": ("flickr-base", FLICKR, lambda root, splits: write_list(root, splits, "flickr")),
    "mixup": ("mixup-base", COCO, write_mixture),
}


@pytest.mark.parametrize("name", NAMED)
def test_every_data_set_from_files_to_a_box(tmp_path, name, monkeypatch, capfd):
    """Trained for a few steps through all stages at ViT-B/16's depth and layers, saved, evaluated, grounded."""
    row, folder, write = NAMED[name]
    splits = {split: make_scenes(tmp_path, 4, seed, folder) for seed, split in enumerate(("train", "val"))}
    write(tmp_path, splits)
    clip = make_clip(dtype=torch.float32, image_size=32, vision_width=32, vision_layers=12, vision_heads=2,
                     text_width=24, text_layers=12, text_heads=2, embed_dim=16, context_length=77)
    clip.tokenizer = make_tokenizer()
    weights.save(tmp_path / "clip.safetensors", clip)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.HiVGConfig, "for_clip", small_heads(train.HiVGConfig.for_clip))
    s = train.Settings(**(preset(row) | dict(name="run", dataset=name, data_root=str(tmp_path), clip="clip.safetensors",
                                             batch_size=2, accumulate=(2,), epochs=(1, 1, 1, 1), workers=0, lora_rank=2,
                                             device="cpu", warmup_steps=1)))
    final = train.train(s)
    model = weights.load_hivg(final)
    assert model.config.stage == 3 and model.config.text_layers == s.text_layers
    assert model.config.bridge == ("projected" if name == "mixup" else "adaptive") and len(model.bridges) == 4
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["evaluate", "--weights", str(final), "--dataset", name, "--split", "val",
                                      "--data-root", str(tmp_path), "--device", "cpu"])
    evaluate.main()
    assert f"{len(splits['val'])} expressions" in capfd.readouterr().out
    scene = splits["val"][0]
    result = Grounder.from_pretrained(final, "cpu").ground(tmp_path / folder / scene.file, scene.expression)
    assert 0 <= result.box[0] <= result.box[2] <= scene.size[0]


def small_heads(for_clip):
    return lambda clip, **changes: for_clip(clip, width=16, encoder_layers=2, encoder_heads=2, encoder_ffn=16,
                                            rtcc_hidden=16, **changes)


# --- presets ---


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings_with_the_papers_batches(name):
    s = train.Settings(**preset(name))
    batches = [stage.batch_size * stage.accumulate for stage in train.stages(s)]
    assert batches == ([7 * 80, 7 * 60, 7 * 60, 7 * 40] if name.endswith("base") else [7 * 32] * 4)
    assert s.loss_weights == dataclasses.astuple(LossWeights())  # the paper's
    assert set(preset(name)) <= {f.name for f in dataclasses.fields(train.Settings)}


def test_preset_flags(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "refcoco+-base", "--batch_size", "70"])
    s = train.settings_from_flags()
    assert (s.dataset, s.text_layers, s.batch_size, s.lr[0]) == ("refcoco+", (6, 12), 70, 2.5e-4)


# --- comparing two runs ---


@pytest.mark.parametrize("a, b, chance", [(0, 0, 1.0), (5, 0, 2 / 32), (1, 3, 2 * 5 / 16), (3, 3, 1.0),
                                          (10, 2, 2 * (1 + 12 + 66) / 4096)])
def test_mcnemar_by_hand(a, b, chance):
    assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(chance)


def test_mcnemar_of_many_is_near_the_exact_one():
    exact = 2 * sum(math.comb(1001, k) for k in range(461)) / 2**1001
    assert mcnemar(460, 541) == pytest.approx(exact, rel=0.02)


def test_compare_names_the_samples(tmp_path):
    rows = [{"image": f"{i}.png", "expression": f"cup {i}", "target": [0, 0, i, i]} for i in range(8)]
    for name, right in (("a", range(8)), ("b", range(2))):
        (tmp_path / name).write_text("".join(json.dumps(row | {"iou": 0.9 * (i in right)}) + "\n"
                                             for i, row in enumerate(rows)))
    text = evaluate.compare(tmp_path / "a", tmp_path / "b")
    assert "6 right in the first alone, 0 in the second alone" in text and "0.0312" in text and "more than" in text
    assert text.count("right in the first alone: ") == 6 and "7.png: cup 7" in text
    (tmp_path / "c").write_text((tmp_path / "a").read_text().replace("cup 3", "dog 3"))
    for other in ("c", "none"):
        with pytest.raises(ValueError):
            evaluate.compare(tmp_path / "a", tmp_path / other)
