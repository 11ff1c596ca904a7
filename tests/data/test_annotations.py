"""Samples of the data sets: the same scenes in all formats give the same samples; rows with a problem are counted."""

import json
import pickle
import re
import zlib
from pathlib import Path

import pytest
import torch
from makers import refusal
from makers_data import (
    PROGRAMS,
    expected,
    found,
    make_scenes,
    python2,
    write_list,
    write_mdetr,
    write_own,
    write_program,
    write_refer,
    write_rows,
    xywh,
)
from PIL import Image

from hivg.data.published.catalogue import COCO, DATA_ROOT, DATASETS, FLICKR, REFERIT, canonical
from hivg.data.published.check import splits_of
from hivg.data.published.formats import val_images
from hivg.data.published.reading import Report, read_samples
from hivg.utils.messages import shown

WRITERS = {  # name: the function and its arguments
    "REFER, Python 2": (write_refer, {"dump": python2}), "REFER, Python 3": (write_refer, {"dump": pickle.dumps}),
    "REFER, protocol 0": (write_refer, {"dump": lambda data: pickle.dumps(data, 0)}), ".pth": (write_list, {}),
    ".pth, arrays": (write_list, {"array": True}), ".pth, older torch.save": (write_list, {"legacy": True}),
    ".pth, older torch.save, arrays": (write_list, {"legacy": True, "array": True}),
    ".pth, named unc": (write_list, {"dataset": "unc"}), "MDETR": (write_mdetr, {}),
    "HiVG, no sizes": (write_program, {"sizes": False}),
    **{name: (write_program, {"program": name}) for name in PROGRAMS},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_gives_the_same_samples(tmp_path, writer, seed):
    splits = {}
    for i, split in enumerate(("train", "val", "testA")):
        splits[split] = make_scenes(tmp_path, seed=10 * seed + i)
    write, arguments = WRITERS[writer]
    write(tmp_path, splits, **arguments)
    for split, scenes in splits.items():
        for name in ("refcoco", "unc"):
            report = Report()
            samples = read_samples(tmp_path, name, split, report=report)
            assert found(samples) == expected(tmp_path, scenes)
            assert not report.problems
    with pytest.raises(ValueError, match="no split 'testB'.*there are testA, train, val"):
        read_samples(tmp_path, "refcoco", "testB")


@pytest.mark.parametrize("dataset", ["unc", "unc+", "gref", "gref_umd", "referit", "flickr"])
@pytest.mark.parametrize("new", [True, False])
def test_published_lists(tmp_path, dataset, new):
    folder = {"referit": REFERIT, "flickr": FLICKR}.get(dataset, COCO)
    scenes = make_scenes(tmp_path, folder=folder, head="")
    write_list(tmp_path, {"val": scenes}, dataset, new)
    samples = read_samples(tmp_path, dataset, "val")
    assert found(samples) == expected(tmp_path, scenes, folder, segmentation=new and dataset != "flickr")


def test_mixture(tmp_path):
    """Boxes are xywh throughout; the second field says where the image is."""
    rows = []
    want = []
    for seed, source, folder in ((1, "coco", COCO), (2, "flickr", FLICKR), (3, "referit", REFERIT)):
        is_coco = source == "coco"
        scenes = make_scenes(tmp_path, 3, seed, folder, head="")
        want += expected(tmp_path, scenes, folder, segmentation=is_coco)
        for s in scenes:
            second = s.coco_size() if is_coco else source
            rows.append((s.file, second, xywh(s.box), s.expression, s.segmentation if is_coco else None))
    (tmp_path / "mixup").mkdir()
    torch.save(rows, tmp_path / "mixup" / "mixup_train.pth")
    assert found(read_samples(tmp_path, "mixup", "train")) == want


@pytest.mark.parametrize("place, dataset", [
    ("refcoco+/refs(unc).p", "unc+"), ("refcocog/refs(umd).p", "gref_umd"), ("refcocog/refs(google).p", "gref"),
    ("refer/refcocog/refs(umd).p", "refcocog"), ("annotations/refclef/refs(berkeley).p", "referit"),
])
def test_places_of_refer(tmp_path, place, dataset):
    folder = DATASETS[canonical(dataset)].image_folder
    scenes = make_scenes(tmp_path, folder=folder)
    write_refer(tmp_path, {"val": scenes}, place)
    want = expected(tmp_path, scenes, folder)
    assert found(read_samples(tmp_path, dataset, "val")) == want
    file = tmp_path / place
    assert found(read_samples(tmp_path, dataset, "val", annotations=file)) == want
    assert found(read_samples(tmp_path, dataset, "val", annotations=str(file.parent))) == want


@pytest.mark.parametrize("name", ["refcoco", "unc"])
def test_the_folder_of_lists_as_it_is_unpacked(tmp_path, name):
    """--annotations DIR with DIR/unc/unc_val.pth, as CLIP-VG and HiVG publish them."""
    lists = tmp_path / "full_sup_data"
    for i, dataset in enumerate(("unc", "unc+", "flickr")):
        folder = FLICKR if dataset == "flickr" else COCO
        scenes = make_scenes(tmp_path, 3, seed=i, folder=folder, head="")
        write_list(lists, {"val": scenes}, dataset)
        wanted = expected(tmp_path, scenes, folder, segmentation=dataset != "flickr")
        assert found(read_samples(tmp_path, dataset, "val", lists)) == wanted
    assert found(read_samples(tmp_path, name, "val", lists)) == found(read_samples(tmp_path, "unc", "val", lists))
    with pytest.raises(ValueError, match="no split 'testC' of refcoco; there are val"):
        read_samples(tmp_path, name, "testC", lists)


def test_the_likelier_place_comes_first(tmp_path):
    """A split's own file in the data set's folder before one in the data root."""
    near = make_scenes(tmp_path, 2, seed=1)
    far = make_scenes(tmp_path, 2, seed=2)
    write_mdetr(tmp_path, {"val": far})
    assert found(read_samples(tmp_path, "refcoco", "val")) == expected(tmp_path, far)
    write_program(tmp_path, {"val": near})
    assert found(read_samples(tmp_path, "refcoco", "val")) == expected(tmp_path, near)


def test_other_files_are_no_splits(tmp_path):
    """Results, a folder, empty lists, as `trainval` is published, or people's own .jsonl files in the data root, which
    are read only by their exact name."""
    scenes = make_scenes(tmp_path, 3)
    write_list(tmp_path, {"train": scenes, "trainval": [], "mine": scenes})
    write_list(tmp_path, {"old": []}, legacy=True)
    write_program(tmp_path, {"val": scenes})
    folder = tmp_path / "refcoco"
    (folder / "val.jsonl").rename(tmp_path / "val.jsonl")
    (folder / "refcoco_val.pth").mkdir()
    for name in ("refcoco_results.json", "refcoco_results.jsonl", "predictions.jsonl"):
        (folder / name).write_text("{}")
    assert splits_of("refcoco", tmp_path) == ["train", "mine"]
    assert found(read_samples(tmp_path, "refcoco", "val")) == expected(tmp_path, scenes)
    with pytest.raises(ValueError, match="no split 'test' of refcoco; there are mine, train, by file name$"):
        read_samples(tmp_path, "refcoco", "test")
    (folder / "refcoco_val.pth").rmdir()
    for path in folder.glob("*_*"):
        path.unlink()
    with pytest.raises(ValueError, match="no annotations of refcoco"):
        splits_of("refcoco", tmp_path)


@pytest.mark.parametrize("name", ["rows.pth", "train.pth", "val.jsonl", "unc_train.pth", "finetune_refcoco_val.json"])
def test_a_file_is_not_both_train_and_val(tmp_path, name):
    """One that does not say its split, in its name or its rows, can be evaluated on, not trained on."""
    scenes = make_scenes(tmp_path, 3)
    write_list(tmp_path, {"train": scenes}, "unc")
    file = (tmp_path / "unc/unc_train.pth").rename(tmp_path / name)
    read = []
    for split in ("train", "val"):
        try:
            read.append((split, found(read_samples(tmp_path, "unc", split, file))))
        except ValueError as error:
            hint = f"no split '{split}' of refcoco; there are .*, by file name"
            if name == "rows.pth":
                hint = "neither its name nor its rows say which split.*; name it unc_train.pth"
            assert re.search(hint, str(error)) and len(str(error)) < 290
    assert read == [("train" if "train" in name else "val", expected(tmp_path, scenes))]


def test_rows_may_say_their_split(tmp_path):
    (tmp_path / COCO).mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(tmp_path / COCO / "a.png")
    path = write_own_splits(tmp_path, "train", "val", "val")
    assert [len(read_samples(tmp_path, "unc", split, path)) for split in ("train", "val")] == [1, 2]
    path = write_own_splits(tmp_path, "train", None)
    with pytest.raises(ValueError, match="neither its name nor its rows"):
        read_samples(tmp_path, "unc", "train", path)


@pytest.mark.parametrize("dataset, name", [
    ("unc", "unc+_val.pth"), ("gref", "gref_umd_val.pth"), ("refcocog", "finetune_refcocog_google_val.json"),
    ("flickr", "mixup_val.pth")])
def test_a_file_of_another_data_set_is_refused(tmp_path, dataset, name):
    write_list(tmp_path, {"val": make_scenes(tmp_path, 1)}, "unc")
    file = (tmp_path / "unc/unc_val.pth").rename(tmp_path / name)
    with pytest.raises(ValueError, match=f"by its name annotations of .*, not of {canonical(dataset)}; "):
        read_samples(tmp_path, dataset, "val", file)
    with pytest.raises(ValueError, match="by its name annotations of"):
        splits_of(dataset, tmp_path, file)


def test_one_file_may_hold_splits_and_rows_several_expressions(tmp_path):
    """As SeqTR's does."""
    splits = {split: make_scenes(tmp_path, 2, seed) for seed, split in enumerate(("train", "val"))}
    write_program(tmp_path, splits, "SeqTR, SimVG")
    files = {split: tmp_path / f"refcoco/{split}.json" for split in splits}
    data = {split: json.loads(file.read_text()) for split, file in files.items()}
    data["val"][0]["expressions"] = ["the cup", "the red cup"]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(data, indent=1))
    assert splits_of("unc", tmp_path, path) == ["train", "val"]
    assert found(read_samples(tmp_path, "unc", "train", path)) == expected(tmp_path, splits["train"])
    first, second, *rest = read_samples(tmp_path, "unc", "val", path)
    assert (first.expression, second.expression) == ("the cup", "the red cup")
    assert first.box == second.box == splits["val"][0].box
    assert found(rest) == expected(tmp_path, splits["val"][1:])


@pytest.mark.parametrize("name", ["000000001000", "COCO_train2014_000000001000_7", "1000", "train2014/1000.jpg",
                                  "D:\\coco\\COCO_train2014_000000001000.jpg"])
def test_a_published_image_has_many_names(tmp_path, name):
    """Without its suffix, by its number alone, with an object's number behind, and on another machine."""
    scene = make_scenes(tmp_path, 1, seed=1)[0]
    path = tmp_path / "unc_val.json"
    path.write_text(json.dumps([{"image": name, "expression": "cup", "bbox": scene.box}]))
    sample, = read_samples(tmp_path, "unc", "val", path)
    assert sample.image == tmp_path / COCO / scene.file and sample.image_id == scene.file


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("dataset", ["unc", "own"])
def test_an_unknown_shape_is_refused_by_its_keys(tmp_path, dataset, suffix):
    path = (tmp_path / "rows").with_suffix(suffix)
    row = {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "the cup"}]}
    path.write_text(json.dumps([row]) if suffix == ".json" else json.dumps(row) + "\n" + json.dumps(row))
    message = refusal(read_samples, tmp_path, *(("unc", "val", path) if dataset == "unc" else (path, "val")))
    assert "its rows have id, image, conversations; they need image, expression and bbox" in message
    assert len(message) <= 290


# --- names ---


def test_names_are_unambiguous():
    names = []
    for name, published in DATASETS.items():
        assert published.names[0] == name
        names += published.names
    assert len(names) == len(set(names))
    assert canonical("gref_umd") == "refcocog" and canonical("flickr30k") == canonical("flickr") == "flickr"


def test_unknown_names_and_empty_roots(tmp_path):
    with pytest.raises(ValueError, match=r"no data set 'coco'; there are shapes, refcoco, .*also as flickr30k, gref,"):
        read_samples(tmp_path, "coco", "train")
    with pytest.raises(ValueError, match="no annotations of refcoco.*refcoco_train.pth"):
        read_samples(tmp_path, "unc", "train")
    with pytest.raises(ValueError, match="no such file"):
        read_samples(tmp_path, tmp_path / "mine.jsonl", "train")


# --- people's own data ---


def test_own_lines_are_split_by_image(tmp_path):
    path = write_own(tmp_path)
    train = read_samples("nowhere", path, "train")
    val = read_samples("nowhere", path, "val")
    assert len(train) + len(val) == 80 and 1 <= len(val) <= 20
    assert not {s.image for s in train} & {s.image for s in val}
    assert train[0].box == (1.0, 2.0, 11.0, 12.5) and train[0].image == tmp_path / "images/0.png"


def write_own_splits(folder, *splits):
    """mine.jsonl with one image and a row for each split; None: a row without one."""
    Image.new("RGB", (30, 20)).save(folder / "a.png")
    rows = []
    for split in splits:
        row = {"image": "a.png", "expression": f"the {split} cup", "bbox": [1, 2, 11, 12]}
        rows.append(row if split is None else row | {"split": split})
    return write_rows(folder / "mine.jsonl", rows)


@pytest.mark.parametrize("train, val", [("train", "validation"), ("Train", "Validation"), ("TRAIN", "VAL"),
                                        ("training", "valid"), ("train", "dev")])
def test_usual_names_of_splits(tmp_path, train, val):
    path = write_own_splits(tmp_path, train, val, val, "mine")
    for wanted, given, n in (("train", train, 1), ("val", val, 2), (val, val, 2), ("mine", "mine", 1)):
        samples = read_samples(tmp_path, path, wanted)
        assert [sample.expression for sample in samples] == [f"the {given} cup"] * n
    assert splits_of(path) == ["mine", "train", "val"]
    with pytest.raises(ValueError, match="no split 'test'; there are mine, train, val; name it as the \"split\""):
        read_samples(tmp_path, path, "test")
    path = write_own_splits(tmp_path, "Train", "train", "val")  # two spellings of one name are one
    assert len(read_samples(tmp_path, path, "train")) == 2 and splits_of(path) == ["train", "val"]
    path = write_own_splits(tmp_path, "train", "dev", "val")  # two names of one split stay two
    assert splits_of(path) == ["dev", "train", "val"]
    assert [sample.expression for sample in read_samples(tmp_path, path, "val")] == ["the val cup"]


def test_there_is_a_val_from_two_images_on():
    """The image of the smallest hash, unless some are in the tenth."""
    for n in range(2, 9):
        for seed in range(20):
            files = [f"{seed}_{i}.png" for i in range(n)]
            tenth = {file for file in files if zlib.crc32(file.encode()) % 10 == 0}
            smallest = {min(files, key=lambda file: zlib.crc32(file.encode()))}
            assert val_images(files + files) == (tenth if 0 < len(tenth) < n else smallest)
    assert val_images(["a.png"]) == set()


def test_a_row_without_image_is_no_val(tmp_path):
    """Else the one row that is val might be left out."""
    path = write_own(tmp_path, 2)
    path.write_text("nonsense\n{}\n" + '{"image": ["a.png"]}\n' + path.read_text())
    assert len(read_samples(tmp_path, path, "val")) == 2 == len(read_samples(tmp_path, path, "train", report=Report()))


@pytest.mark.parametrize("root", ["root", DATA_ROOT])
def test_own_images_are_below_the_data_root_or_beside_the_file(tmp_path, monkeypatch, root):
    """A data root that is named comes first; a folder data/ that nobody named may be anybody's."""
    monkeypatch.chdir(tmp_path)
    path = write_own(tmp_path, 1, split="train").rename("MINE.JSONL").absolute()
    beside = tmp_path / "images/0.png"
    below = Path(root, "images/0.png")
    below.parent.mkdir(parents=True)
    assert read_samples(root, path, "train")[0].image == beside
    below.write_bytes(beside.read_bytes())
    for image in (beside, below) if root == DATA_ROOT else (below, beside):
        assert read_samples(root, path, "train")[0].image == image
        image.unlink()
    report = Report()
    assert not read_samples(root, path, "train", report=report)
    assert report.first["missing image"] == f"line 1: {shown(beside)}"
