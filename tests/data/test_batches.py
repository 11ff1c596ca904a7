"""From data sets to batches of tensors: the same from files as drawn, in an order that depends on the step alone."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from makers import ROOT, assert_close, make_tokenizer, python, raising
from makers_data import make_scenes, write_list, write_own, write_shapes
from PIL import Image

from hivg.data import batches
from hivg.data.augment import Augment
from hivg.data.batches import (
    STAGE_ITEMS,
    SampleTensors,
    ShapesTensors,
    box_mask,
    collate,
    evaluation_batches,
    open_dataset,
    to_device,
    training_batches,
)
from hivg.data.drawn.scenes import HARD_KINDS, HARD_MIX, Shapes
from hivg.data.masks import mask_of
from hivg.data.published.reading import Sample
from hivg.data.transforms import NORMALIZATION

ROWS = {  # the keys of a row: shape and type of the tensors, None for lists
    "pixels": ((3, 32, 32), torch.uint8), "padding_mask": ((32, 32), torch.bool), "boxes": ((4,), torch.float32),
    "masks": ((32, 32), torch.bool), "image_ids": ((), torch.int64), "has_mask": ((), torch.bool),
    "pixel_boxes": ((4,), torch.float32), "expressions": None, "kinds": None, "details": None, "image_names": None,
    "letterboxes": None}


def make_samples(folder, n=10):
    Image.new("RGB", (40, 30), "red").save(folder / "a.png")
    return [Sample(folder / "a.png", f"cup {i}", (10.0, 10.0, 30.0, 20.0), None, "a.png", False) for i in range(n)]


@pytest.mark.parametrize("kind", ["shapes", "shapes-wide", "samples", "augmented"])
def test_keys_shapes_and_types(tmp_path, kind):
    rows = ROWS
    if "shapes" in kind:
        dataset = open_dataset(kind, "train", 32)
        rows = ROWS | {"present": ((), torch.bool)}
    else:
        dataset = SampleTensors(make_samples(tmp_path), 32, augment=Augment() if kind == "augmented" else None)
    batch = next(iter(training_batches(dataset, 0, 8, 1)))
    assert batch.keys() == rows.keys() | {"normalization"}
    for key, wanted in rows.items():
        assert len(batch[key]) == 8, key
        if wanted is None:
            assert isinstance(batch[key], list), key
        else:
            assert (tuple(batch[key].shape[1:]), batch[key].dtype) == wanted, key


def test_drawn_scenes_as_tensors():
    """Boxes and masks are those of the item, in the square."""
    dataset = ShapesTensors("train", 64, seed=3)
    for index in range(5):
        row = dataset[index]
        item = Shapes("train", seed=3)[index]
        assert row["expressions"] == item["expressions"] and row["kinds"] == item["kinds"]
        assert row["pixel_boxes"].tolist() == item["boxes"].tolist()
        letterbox = row["letterboxes"][0]
        assert_close("boxes", letterbox.boxes_to_image(row["boxes"]), row["pixel_boxes"], 1e-3)
        for mask, target in zip(row["masks"], item["targets"]):
            assert torch.equal(mask, letterbox.mask(item["labels"] == target + 1)) and mask.any()
        assert row["image_ids"].tolist() == [index] * 4
        assert row["image_names"] == [f"train {index}"] * 4


def test_rows_of_nothing_have_no_box_and_no_mask():
    dataset = open_dataset("shapes-wide", "train", 64)
    item = collate([dataset[index] for index in range(20)])
    assert 0 < (~item["present"]).sum() < 20
    assert torch.equal(item["present"], item["masks"].flatten(1).any(1))
    for name in ("boxes", "pixel_boxes"):
        assert torch.equal(item["present"], (item[name] != 0).any(1)), name
    assert item["present"].tolist() == [not kind.startswith("absent") for kind in item["kinds"]]
    assert not open_dataset("shapes-wide", "absent", 64)[0]["present"].any()
    assert open_dataset("shapes", "val", 64)[0]["present"].all()


def test_samples_from_files_are_what_shapes_draws(tmp_path):
    """An image written and read back gives the tensors of the bundled data set itself, masks too."""
    path = write_shapes(tmp_path, 5)
    ours = open_dataset(str(path), "train", 64)
    drawn = open_dataset("shapes", "train", 64)
    for i in range(5):
        rows = collate([ours[4 * i + k] for k in range(4)])
        expected = drawn[i]
        assert rows["expressions"] == expected["expressions"]
        for name in ("pixels", "padding_mask", "boxes", "masks", "pixel_boxes", "has_mask"):
            assert_close(name, rows[name], expected[name], 1e-6)
        assert rows["image_ids"].tolist() == [i] * 4
        assert rows["image_names"] == [str(tmp_path / f"images/train{i}.png")] * 4


def test_only_training_is_augmented_and_harder(tmp_path):
    path = write_shapes(tmp_path, 2)
    assert open_dataset(path, "train", 32).augment is None
    assert open_dataset(path, "train", 32, train=True).augment == Augment()
    assert open_dataset("shapes", "train", 32, train=True, hard_mix=True).shapes.weights == HARD_KINDS
    for options in ({"train": True}, {"hard_mix": True}):
        assert open_dataset("shapes", "val", 32, **options).shapes.weights != HARD_KINDS
        usual = open_dataset("shapes-wide", "train", 32, **options).shapes
        assert usual.plain == usual.reframe == 0
    harder = open_dataset("shapes-wide", "train", 32, train=True, hard_mix=True).shapes
    assert {name: getattr(harder, name) for name in HARD_MIX["shapes-wide"]} == HARD_MIX["shapes-wide"]


def test_a_box_in_another_form_is_refused(tmp_path):
    samples = make_samples(tmp_path, 1)
    samples.append(replace(samples[0], box=(30.0, 10.0, 8.0, 12.0)))  # x, y, width, height
    with pytest.raises(ValueError, match="a.png: its box .* has no area; boxes are"):
        SampleTensors(samples, 32)


def test_a_data_set_without_samples_is_refused(tmp_path, capsys):
    path = write_own(tmp_path, 2, bbox=[5, 5, 5, 5], split="train")
    with pytest.raises(ValueError, match="no samples are left; `python -m hivg.data check .*mine.jsonl` says why"):
        open_dataset(str(path), "train", 32)


def test_training_order(tmp_path):
    """Every epoch is all samples once, in another order; an item depends on (seed, index) alone."""
    samples = make_samples(tmp_path)
    data = SampleTensors(samples, 32, augment=Augment())
    orders = []
    for first in (0, 10, 20, STAGE_ITEMS, STAGE_ITEMS + 10, 3 * STAGE_ITEMS):
        orders.append([data.number(first + i) for i in range(10)])
        assert sorted(orders[-1]) == list(range(10))
    assert len(set(map(tuple, orders))) == len(orders)
    again = SampleTensors(samples, 32, augment=Augment())
    other = SampleTensors(samples, 32, seed=1, augment=Augment())
    for index in (25, 3, 2**33 + 5):  # any order; a stage starts at a large index
        row = data[index]
        assert row["expressions"] == again[index]["expressions"]
        assert torch.equal(row["pixels"], again[index]["pixels"])
        assert not torch.equal(row["pixels"], other[index]["pixels"])
    same_sample = 10 + orders[1].index(orders[0][0])
    assert data[0]["expressions"] == data[same_sample]["expressions"]
    assert not torch.equal(data[0]["pixels"], data[same_sample]["pixels"])  # augmented differently


def texts(loader):
    return [batch["expressions"] for batch in loader]


def test_batches_resume_and_are_shared(tmp_path):
    data = SampleTensors(make_samples(tmp_path), 32, augment=Augment())
    whole = texts(training_batches(data, 0, 4, 5))
    assert len(whole) == 5 and all(len(batch) == 4 for batch in whole)
    assert texts(training_batches(data, 0, 4, 5, start=3)) == whole[3:]
    first = texts(training_batches(data, 0, 4, 5, rank=0, world_size=2))
    second = texts(training_batches(data, 0, 4, 5, rank=1, world_size=2))
    assert [a + b for a, b in zip(first, second, strict=True)] == whole


def test_batches_of_scenes_follow_their_first_item():
    dataset = ShapesTensors("train", 32)
    seen = [batch["image_ids"].tolist() for batch in training_batches(dataset, 100, 8, 3)]
    assert seen == [[100] * 4 + [101] * 4, [102] * 4 + [103] * 4, [104] * 4 + [105] * 4]


@pytest.mark.parametrize("batch_size, world_size, nearest", [
    (6, 1, "4 or 8"), (0, 1, "4"), (4, 2, "8"), (12, 2, "8 or 16"), (60, 7, "56 or 84"), (-4, 1, "4")])
def test_a_batch_is_of_whole_scenes_for_every_rank(batch_size, world_size, nearest):
    message = f"batch_size: {batch_size}, a multiple of {4 * world_size} needed .*; use {nearest}$"
    with pytest.raises(ValueError, match=message):
        training_batches(ShapesTensors("train", 32), 0, batch_size, 1, world_size=world_size)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_sample_once(tmp_path, world):
    data = SampleTensors(make_samples(tmp_path), 32)
    seen = []
    for rank in range(world):
        for batch in texts(evaluation_batches(data, 3, rank=rank, world_size=world)):
            assert 1 <= len(batch) <= 3
            seen += batch
    assert sorted(seen) == sorted(f"cup {i}" for i in range(10))


def test_loaders_leave_the_random_numbers_alone(tmp_path):
    data = SampleTensors(make_samples(tmp_path), 32, augment=Augment())
    torch.manual_seed(0)
    for _ in training_batches(data, 0, 2, 3):
        pass
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


def test_workers_change_nothing(tmp_path):
    data = SampleTensors(make_samples(tmp_path), 32, augment=Augment())
    tokenizer = make_tokenizer()
    alone = list(training_batches(data, 0, 4, 3))
    for a, b in zip(alone, training_batches(data, 0, 4, 3, workers=2, tokenizer=tokenizer), strict=True):
        assert a["expressions"] == b["expressions"] and torch.equal(a["pixels"], b["pixels"])
        assert "token_ids" not in a and torch.equal(b["token_ids"], tokenizer(b["expressions"]))
        here = to_device(a, tokenizer, "cpu")
        there = to_device(b, None, "cpu")
        for name in ("images", "token_ids"):
            assert torch.equal(here[name], there[name]), name


LOST = "too little shared memory .*--shm-size.*--workers 0"


@pytest.mark.slow  # the loader looks after its workers every five seconds
@pytest.mark.parametrize("setup, told", [
    ("from makers import raising; torch.UntypedStorage._share_fd_cpu_ = raising(RuntimeError("
     "'unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)'))", LOST),
    ("batches.collate = lambda items: os.kill(os.getpid(), signal.SIGKILL)", f"{LOST}|DataLoader worker .* killed")],
    ids=["cannot send", "is killed"])
def test_a_worker_that_is_lost_is_told(setup, told):
    """In a process of its own that cleans nothing up: PyTorch raises wherever the program is, with a lock or not."""
    script = f"""
import os, signal, torch
from hivg.data import batches
{setup}
try:
    list(batches.evaluation_batches(batches.ShapesTensors("val", 32), 4, workers=2))
except (ValueError, RuntimeError) as error:
    print(error, flush=True)
os._exit(0)
"""
    done = python("-c", script, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT / "tests")})
    assert re.search(told, done.stdout) and (told != LOST or not done.stderr), done


@pytest.mark.slow
@pytest.mark.parametrize("command", ["-m hivg.evaluate --split val", "train.py --epoch_samples 64"])
def test_commands_with_few_open_files_end_with_one_line(tmp_path, command):
    script, *words = command.replace("train.py", str(ROOT / "train.py"), 1).split()
    command = f'ulimit -n 30; cd "{tmp_path}"; exec "{sys.executable}" {script} {" ".join(words)} --workers 4'
    done = subprocess.run(["bash", "-c", command], env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "--workers 0" in done.stderr


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_an_item_is_its_own(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(batches, "collate", raising(RuntimeError("its own")))
    with pytest.raises(RuntimeError, match="its own"):
        list(evaluation_batches(SampleTensors(make_samples(tmp_path), 32), 2, workers=workers))


@pytest.mark.parametrize("normalization", NORMALIZATION)
def test_images_are_normalised_on_the_device(normalization):
    """Bit for bit what NumPy gives in float32, for every value of a byte and on a GPU too; padding is zero."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, -1, -1)
    padding = torch.zeros(2, 16, 16, dtype=torch.bool)
    padding[1, :5] = True
    batch = {"pixels": values, "padding_mask": padding, "normalization": normalization, "token_ids": padding,
             "expressions": []}
    moved = to_device(batch, None, device)
    mean, std = np.array(NORMALIZATION[normalization], dtype=np.float32)
    expected = (np.arange(256, dtype=np.float32)[:, None] / 255 - mean) / std  # (256, 3)
    expected = expected.T.reshape(3, 16, 16)
    assert moved["images"].dtype == torch.float32 and "pixels" not in moved
    assert np.array_equal(moved["images"][0].cpu(), expected)
    assert np.array_equal(moved["images"][1, :, 5:].cpu(), expected[:, 5:]) and not moved["images"][1, :, :5].any()


@pytest.mark.parametrize("asked, device, ranks, cores, own, workers", [
    (3, "cuda", 1, 4, 4, 3), (0, "cuda", 1, 4, 4, 0), (-1, "cpu", 1, 64, 64, 1), (-1, "cuda", 1, 64, 64, 8),
    (-1, "cuda", 1, 6, 6, 5), (-1, "cuda", 4, 16, 16, 3), (-1, "cuda", 8, 4, 4, 1), (-1, "cuda", 8, 64, 6, 5)])
def test_automatic_workers(monkeypatch, asked, device, ranks, cores, own, workers):
    """ranks: of this machine. own: the cores that this process may use, fewer if the launcher has divided them."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(batches.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(batches.os, "sched_getaffinity", lambda process: range(own), raising=False)
    assert batches.choose_workers(asked, torch.device(device)) == workers


@pytest.mark.parametrize("megabytes, ranks, workers", [
    (1000, 1, 8), (0, 1, 8), (64, 1, 1), (50, 1, 0), (130, 1, 3), (130, 2, 1)])
def test_workers_have_room_in_the_shared_memory(monkeypatch, capsys, megabytes, ranks, workers):
    """Two batches of each, here of 15 MB, and two more; 0 is what a file system without a limit tells."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(batches.os, "cpu_count", lambda: 64)
    monkeypatch.setattr(batches.os, "sched_getaffinity", lambda process: range(9), raising=False)
    monkeypatch.setattr(batches, "SHARED_MEMORY", ".")
    monkeypatch.setattr(batches.os, "statvfs", lambda path: SimpleNamespace(
        f_blocks=megabytes, f_bavail=megabytes, f_frsize=10**6))
    batches.tell.cache_clear()
    for _ in range(2):
        assert batches.choose_workers(-1, torch.device("cuda"), 15 * 10**6) == workers
        assert batches.choose_workers(3, torch.device("cuda"), 15 * 10**6) == 3  # as asked
    err = capsys.readouterr().err
    told = f"data workers: {workers} instead of 8"
    assert err == "" if workers == 8 else err.startswith(told) and err.count("\n") == 1


def test_batches_are_pinned_for_a_gpu_alone(monkeypatch):
    """The loader is told so; nothing else can be seen of it without a GPU."""
    told = []
    monkeypatch.setattr(batches, "DataLoader", lambda *args, pin_memory, **options: told.append(pin_memory) or ())
    for device in ("cuda", "cpu"):
        list(training_batches(ShapesTensors("train", 32), 0, 4, 1, device=torch.device(device)))
        list(evaluation_batches(ShapesTensors("val", 32), device=torch.device(device)))
    assert told == [True, True, False, False]


def test_a_box_stands_in_for_a_mask(tmp_path):
    row = SampleTensors(make_samples(tmp_path, 1), 40)[0]
    assert not row["has_mask"].any()
    rows = row["masks"][0].any(1).nonzero()[:, 0]
    columns = row["masks"][0].any(0).nonzero()[:, 0]
    assert (columns[0], columns[-1] + 1) == (10, 30)  # the image is 40 wide and lies 5 lower in the square
    assert (rows[0], rows[-1] + 1) == (15, 25)
    assert torch.equal(row["masks"][0], box_mask(row["boxes"][0], 40))
    for middle, pixel in ((0.5, 20), (0.0, 0), (1.0, 39)):  # of a box thinner than a pixel
        mask = box_mask(torch.tensor([middle, 0.5, 0.001, 0.001]), 40)
        assert mask.nonzero().tolist() == [[20, pixel]]


def test_mask_targets(tmp_path):
    """Boxes for the published data sets unless their outlines are asked for, for people's own data what it says."""
    scenes = [scene for scene in make_scenes(tmp_path, 20) if scene.segmentation]
    for name, new in (("unc", True), ("unc+", False)):  # lists with outlines, and without
        write_list(tmp_path, {"val": scenes}, name, new)
        for masks in ("auto", "box", "segmentation"):
            data = open_dataset(name, "val", 64, data_root=tmp_path, masks=masks)
            outlined = masks == "segmentation" and new
            for i, scene in enumerate(scenes):
                row = data[i]
                is_box = torch.equal(row["masks"][0], box_mask(row["boxes"][0], 64))
                assert row["has_mask"].item() == outlined and (is_box or outlined), masks
                if outlined:
                    mask = mask_of(scene.segmentation, *reversed(scene.size))
                    assert torch.equal(row["masks"][0], row["letterboxes"][0].mask(mask))
    own = write_shapes(tmp_path, 1)
    drawn = open_dataset("shapes", "train", 64)[0]["masks"]
    for masks, expected in (("auto", drawn), ("segmentation", drawn), ("box", None)):
        row = collate([open_dataset(own, "train", 64, masks=masks)[i] for i in range(4)])
        expected = torch.stack([box_mask(box, 64) for box in row["boxes"]]) if expected is None else expected
        assert torch.equal(row["masks"], expected), masks
        assert torch.equal(open_dataset("shapes", "train", 64, masks=masks)[0]["masks"], drawn)
    with pytest.raises(ValueError, match="auto, box, segmentation"):
        open_dataset(own, "train", 64, masks="outline")
