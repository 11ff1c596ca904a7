"""The readers of the data sets: the same random scenes in all four formats give the same samples; what is wrong in a
file is counted and left out; nothing in a pickle is run."""

import collections
import json
import os
import pickle
import pickletools
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hivg.data.annotations import COCO, DATASETS, FLICKR, REFERIT, Report, check, read_samples

ROOT = Path(__file__).resolve().parents[1]
Scene = collections.namedtuple("Scene", "file size box expression segmentation number")


def make_scenes(root, n=6, seed=0, folder=COCO, head="COCO_train2014_"):
    """Random pictures with an object or two: a Scene for each expression, the pictures below root."""
    rng, scenes = random.Random(seed), []
    (root / folder).mkdir(parents=True, exist_ok=True)
    for i in range(n):
        size = rng.randint(20, 90), rng.randint(20, 90)
        number = 1000 * seed + i
        file = f"{head}{number:012d}.jpg"
        Image.new("RGB", size).save(root / folder / file)
        for _ in range(rng.randint(1, 2)):
            w, h = rng.randint(1, 4 * size[0]) / 4, rng.randint(1, 4 * size[1]) / 4
            x, y = rng.randint(0, int(4 * (size[0] - w))) / 4, rng.randint(0, int(4 * (size[1] - h))) / 4
            polygon = [[x, y, x + w, y, x + w, y + h]]
            rle = {"size": [size[1], size[0]], "counts": [size[0] * size[1] - 3, 3]}
            text = rng.choice(["the red cup", "Zebra on the LEFT", "café, 2nd", "man in a hat, looking up"]) + f" {i}"
            scenes.append(Scene(file, size, (x, y, x + w, y + h), text, rng.choice([None, polygon, rle]), number))
    return scenes


def xywh(box):
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def expected(root, scenes, folder=COCO, segmentation=True):
    return [(root / folder / s.file, s.expression, s.box, s.segmentation if segmentation else None, s.file)
            for s in scenes]


def found(samples):
    return [(s.image, s.expression, s.box, s.segmentation, s.image_id) for s in samples]


# --- writers of the published formats ---


def python2(data):
    """`data` as Python 2's pickle wrote it: text as byte strings."""
    def encode(value):
        if isinstance(value, str):
            return value.encode()
        if isinstance(value, dict):
            return {encode(k): encode(v) for k, v in value.items()}
        return [encode(v) for v in value] if isinstance(value, list) else value

    out = pickle.dumps(encode(data), protocol=3)  # SHORT_BINBYTES is to Python 3 what SHORT_BINSTRING was to Python 2
    for op, _, at in pickletools.genops(out):
        if op.name in ("SHORT_BINBYTES", "BINBYTES"):
            code = b"U" if op.name == "SHORT_BINBYTES" else b"T"
            out = out[:at] + code + out[at + 1 :]
    return b"\x80\x02" + out[2:]


def write_refer(root, splits, names=("refcoco", "refs(unc).p"), dump=python2):
    refs, annotations, images, n = [], [], {}, 0
    for split, scenes in splits.items():
        for s in scenes:
            n += 1
            stem, suffix = s.file.rsplit(".", 1)
            refs.append({"ref_id": n, "ann_id": 10 * n, "image_id": s.number, "category_id": 3, "sent_ids": [n],
                         "file_name": f"{stem}_{n}.{suffix}", "split": split,
                         "sentences": [{"sent": s.expression, "raw": s.expression.upper(), "sent_id": n,
                                        "tokens": s.expression.split()}]})
            annotations.append({"id": 10 * n, "image_id": s.number, "bbox": xywh(s.box), "segmentation": s.segmentation,
                                "iscrowd": 0})
            images[s.number] = {"id": s.number, "file_name": s.file, "width": s.size[0], "height": s.size[1]}
    folder = root / names[0]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[1]).write_bytes(dump(refs))
    (folder / "instances.json").write_text(json.dumps({"annotations": annotations, "images": list(images.values())}))


def write_list(root, splits, dataset="refcoco", new=True, array=False, legacy=False):
    def bbox(s):
        b = list(s.box) if dataset in ("referit", "flickr") else xywh(s.box)
        return np.array(b) if array else b

    for split, scenes in splits.items():
        if dataset == "flickr":
            rows = [(s.file, bbox(s), s.expression) for s in scenes]
        else:
            rows = [(s.file, {"height": s.size[1], "width": s.size[0]} if new else f"{s.number}.mat", bbox(s), s.expression,
                     s.segmentation if new else [["r1", ["none"]], ["r2", ["red"]]]) for s in scenes]
        path = root / dataset / f"{dataset}_{split}.pth"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(rows, path, _use_new_zipfile_serialization=not legacy)


def write_mdetr(root, splits):
    for split, scenes in splits.items():
        images = [{"id": i, "file_name": s.file, "height": s.size[1], "width": s.size[0], "original_id": s.number,
                   "caption": s.expression, "dataset_name": "refcoco"} for i, s in enumerate(scenes)]
        boxes = [{"id": i, "image_id": i, "bbox": xywh(s.box), "segmentation": s.segmentation, "area": 1, "iscrowd": 0,
                  "tokens_positive": [[0, 3]]} for i, s in enumerate(scenes)]
        data = {"info": {}, "licenses": [], "images": images, "annotations": boxes[::-1], "categories": []}
        (root / f"finetune_refcoco_{split}.json").write_text(json.dumps(data))


def write_lines(root, splits):
    for split, scenes in splits.items():
        path = root / "refcoco" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"image": s.file, "expression": s.expression, "bbox": s.box, "id": i} |
                ({"segmentation": s.segmentation} if s.segmentation else {}) for i, s in enumerate(scenes)]
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


WRITERS = {
    "REFER, Python 2": write_refer,
    "REFER, Python 3": lambda root, splits: write_refer(root, splits, dump=pickle.dumps),
    "REFER, protocol 0": lambda root, splits: write_refer(root, splits, dump=lambda x: pickle.dumps(x, 0)),
    ".pth": write_list,
    ".pth, arrays": lambda root, splits: write_list(root, splits, array=True),
    ".pth, older torch.save": lambda root, splits: write_list(root, splits, legacy=True),
    ".pth, older torch.save, arrays": lambda root, splits: write_list(root, splits, legacy=True, array=True),
    ".pth, named unc": lambda root, splits: write_list(root, splits, "unc"),
    "MDETR": write_mdetr,
    "JSON lines": write_lines,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_gives_the_same_samples(tmp_path, writer, seed):
    splits = {split: make_scenes(tmp_path, seed=10 * seed + i) for i, split in enumerate(("train", "val", "testA"))}
    WRITERS[writer](tmp_path, splits)
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
    """xywh throughout; the second field says where the picture is."""
    parts = {"coco": make_scenes(tmp_path, 3, 1), "flickr": make_scenes(tmp_path, 3, 2, FLICKR, ""),
             "referit": make_scenes(tmp_path, 3, 3, REFERIT, "")}
    rows = [(s.file, {"height": s.size[1], "width": s.size[0]} if part == "coco" else part, xywh(s.box), s.expression,
             s.segmentation if part == "coco" else None) for part, scenes in parts.items() for s in scenes]
    (tmp_path / "mixup").mkdir()
    torch.save(rows, tmp_path / "mixup" / "mixup_train.pth")
    want = [row for part, folder in (("coco", COCO), ("flickr", FLICKR), ("referit", REFERIT))
            for row in expected(tmp_path, parts[part], folder, segmentation=part == "coco")]
    assert found(read_samples(tmp_path, "mixup", "train")) == want


@pytest.mark.parametrize("place, dataset", [("refcoco+/refs(unc).p", "unc+"), ("refcocog/refs(umd).p", "gref_umd"),
                                            ("refcocog/refs(google).p", "gref"), ("refer/refcocog/refs(umd).p", "refcocog")])
def test_places_of_refer(tmp_path, place, dataset):
    scenes = make_scenes(tmp_path)
    folder, name = place.rsplit("/", 1)
    write_refer(tmp_path, {"val": scenes}, (folder, name))
    assert found(read_samples(tmp_path, dataset, "val")) == expected(tmp_path, scenes)
    elsewhere = tmp_path / folder / name
    assert found(read_samples(tmp_path, dataset, "val", annotations=elsewhere)) == expected(tmp_path, scenes)
    assert found(read_samples(tmp_path, dataset, "val", annotations=tmp_path / folder)) == expected(tmp_path, scenes)


# --- one's own data ---


def write_own(tmp_path, n=40, **fields):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = []
    for i in range(n):
        Image.new("RGB", (30, 20)).save(pictures / f"{i}.png")
        rows += [{"image": f"pictures/{i}.png", "expression": f"{word} {i}", "bbox": [1, 2, 11, 12.5]} | fields
                 for word in ("cup", "dog")]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_own_lines_are_split_by_picture(tmp_path):
    path = write_own(tmp_path)
    train, val = (read_samples("nowhere", path, split) for split in ("train", "val"))
    assert len(train) + len(val) == 80 and 1 <= len(val) <= 20
    assert not {s.image for s in train} & {s.image for s in val}
    assert train[0].box == (1.0, 2.0, 11.0, 12.5) and train[0].image == tmp_path / "pictures/0.png"


def test_own_lines_may_name_their_split(tmp_path):
    path = write_own(tmp_path, split="train")
    assert len(read_samples(tmp_path, str(path), "train")) == 80
    with pytest.raises(ValueError, match="no split 'val'; there are train"):
        read_samples(tmp_path, path, "val")


# --- what is wrong ---


def test_problems_are_counted_named_and_left_out(tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    good = {"image": "a.png", "expression": "x", "bbox": [0, 0, 30.5, 20]}  # half a pixel too wide is how people draw
    bad = {"missing picture": {"image": "b.png"}, "damaged picture": {"image": "broken.png"},
           "box outside the picture": {"bbox": [5, 5, 40, 10]}, "box without area": {"bbox": [5, 5, 5, 10]},
           "empty expression": {"expression": "  "}, "box that is not four numbers": {"bbox": [1, 2, 3]},
           "no picture named": {"image": None}}
    more = [{"bbox": [9, 5, 7, 10]}, {"bbox": [float("nan"), 0, 1, 1]}]
    rows = [good, *(good | change for change in [*bad.values(), *more])]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row | {"split": "train"}) for row in rows) + "\nnot JSON\n")
    report = Report()
    assert [s.box for s in read_samples(tmp_path, path, "train", report=report)] == [(0.0, 0.0, 30.5, 20.0)]
    assert report.problems == {kind: 1 for kind in bad} | {"box without area": 3, "incomplete row": 1}
    for index, kind in enumerate(bad, 1):
        assert report.first[kind].startswith(f"index {index}: ")
    capsys.readouterr()
    read_samples(tmp_path, path, "train")
    assert len(capsys.readouterr().err.splitlines()) == len(report.problems)


def test_a_missing_join_is_counted(tmp_path):
    scenes = make_scenes(tmp_path)
    write_refer(tmp_path, {"val": scenes})
    instances = tmp_path / "refcoco" / "instances.json"
    data = json.loads(instances.read_text())
    del data["annotations"][0]
    instances.write_text(json.dumps(data))
    report = Report()
    samples = read_samples(tmp_path, "refcoco", "val", report=report)
    assert found(samples) == expected(tmp_path, scenes[1:])
    assert "ann_id 10" in report.first["incomplete row"]
    instances.unlink()
    with pytest.raises(ValueError, match="needs .*instances.json"):
        read_samples(tmp_path, "refcoco", "val")


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("write", [lambda x, p: p.write_bytes(pickle.dumps(x)), torch.save,
                                   lambda x, p: p.write_bytes(pickle.dumps(x, 0)),
                                   lambda x, p: torch.save(x, p, _use_new_zipfile_serialization=False)])
def test_a_command_in_a_pickle_is_not_run(tmp_path, write):
    (tmp_path / "refcoco").mkdir()
    for name in ("refs(unc).p", "refcoco_train.pth"):
        write([Payload(tmp_path / "touched")], tmp_path / "refcoco" / name)
        with pytest.raises(ValueError, match=r"\.system"):
            read_samples(tmp_path, "refcoco", "train", annotations=tmp_path / "refcoco" / name)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"{}", b"[1, 2]", b'{"image": ', pickle.dumps({"a": 1}),
                                     b"<html></html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_other_files_get_one_line(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_samples(tmp_path, "refcoco", "train", annotations=tmp_path / "x")
    assert str(caught.value).startswith(str(tmp_path / "x")) and "\n" not in str(caught.value)


def test_unknown_names_and_empty_roots(tmp_path):
    with pytest.raises(ValueError, match="no data set 'coco'; there are shapes, refcoco"):
        read_samples(tmp_path, "coco", "train")
    with pytest.raises(ValueError, match="no annotations of refcoco.*refcoco_train.pth"):
        read_samples(tmp_path, "unc", "train")
    with pytest.raises(ValueError, match="no such file"):
        read_samples(tmp_path, tmp_path / "mine.jsonl", "train")


# --- the report of a data set ---


def test_check_counts_and_finds_leakage(tmp_path):
    train, val = make_scenes(tmp_path, 5, 1), make_scenes(tmp_path, 4, 2)
    write_list(tmp_path, {"train": train, "val": val + train[:1], "testA": val})
    text = check(tmp_path, "refcoco")
    assert f"refcoco train: {len(train)} expressions (120,624 published), 5 pictures" in text
    assert f"pictures of refcoco train in refcoco val: 1, for instance {train[0].file}" in text
    assert "pictures of refcoco train in refcoco testA: 0" in text and "no split 'testB'" in text
    done = subprocess.run([sys.executable, "-m", "hivg.data", "check", "unc", "--data_root", tmp_path], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout == text + "\n" and done.returncode == 0


def test_check_finds_leakage_between_the_parts_of_the_mixture(tmp_path):
    train, val = make_scenes(tmp_path, 5, 1), make_scenes(tmp_path, 4, 2)
    write_list(tmp_path, {"val": val}, "gref_umd")
    (tmp_path / "mixup").mkdir()
    rows = [(s.file, {"height": s.size[1], "width": s.size[0]}, xywh(s.box), s.expression, None)
            for s in train + val[-1:]]
    torch.save(rows, tmp_path / "mixup" / "mixup_train.pth")
    assert f"pictures of mixup train in refcocog val: 1, for instance {val[-1].file}" in check(tmp_path, "mixup")


def test_names_are_unambiguous():
    names = [name for published in DATASETS.values() for name in published.names]
    assert len(names) == len(set(names))


# --- twenty ways to be malformed ---


def listing(*rows):
    return lambda path: torch.save(list(rows), path)


def refs(change, instances=None):
    """A REFER file whose first ref was changed, and its instances.json."""
    def write(path):
        ref = {"ref_id": 1, "ann_id": 7, "image_id": 3, "file_name": "a_1.jpg", "split": "val",
               "sentences": [{"sent": "cup", "raw": "cup", "sent_id": 1, "tokens": ["cup"]}]}
        change(ref)
        path.write_bytes(pickle.dumps([ref]))
        good = {"annotations": [{"id": 7, "image_id": 3, "bbox": [1, 1, 5, 5]}],
                "images": [{"id": 3, "file_name": "a.jpg", "width": 20, "height": 20}]}
        path.with_name("instances.json").write_text(instances or json.dumps(good))
    return write


SIZE, BOX = {"width": 20, "height": 20}, [1, 1, 5, 5]
MALFORMED = {  # what is written; how many samples it gives; what is said of it
    "good list": (listing(("a.jpg", SIZE, BOX, "cup", None)), 1, ""),
    "an empty list": (listing(), None, "no list of rows"),
    "a dict": (lambda p: torch.save({"a": 1}, p), None, "no list of rows"),
    "a list of numbers": (listing(1, 2), 0, "not of 3 or 5 fields"),
    "two columns": (listing(("a.jpg", BOX)), 0, "not of 3 or 5 fields"),
    "columns in another order": (listing((BOX, SIZE, "a.jpg", "cup", None)), 0, "no picture named"),
    "nan in a box": (listing(("a.jpg", SIZE, [1, 1, float("nan"), 5], "cup", None)), 0, "box without area"),
    "infinity in a box": (listing(("a.jpg", SIZE, [1, 1, float("inf"), 5], "cup", None)), 0, "box outside"),
    "a box of text": (listing(("a.jpg", SIZE, "1 1 5 5", "cup", None)), 0, "not four numbers"),
    "no box": (listing(("a.jpg", SIZE, None, "cup", None)), 0, "not four numbers"),
    "a negative size": (listing(("a.jpg", SIZE, [5, 5, -3, 2], "cup", None)), 0, "box without area"),
    "bytes for text": (listing((b"a.jpg", SIZE, BOX, "café".encode(), None)), 1, ""),
    "a number for text": (listing(("a.jpg", SIZE, BOX, 5, None)), 0, "empty expression"),
    "a Windows path": (listing(("sub\\b.jpg", SIZE, BOX, "cup", None)), 1, ""),
    "a picture that is a folder's": (listing(("sub", SIZE, BOX, "cup", None)), 0, "missing picture"),
    "sizes of zero": (listing(("a.jpg", {"width": 0, "height": 0}, BOX, "cup", None)), 1, ""),
    "a mask of another size": (listing(("a.jpg", SIZE, BOX, "cup", {"size": [3, 3], "counts": [4, 5]})), 0,
                               "damaged segmentation"),
    "a mask of text": (listing(("a.jpg", SIZE, BOX, "cup", {"size": ["x", 3], "counts": 5})), 0, "damaged segmentation"),
    "a cut list": (lambda p: (listing(("a.jpg", SIZE, BOX, "cup", None))(p), p.write_bytes(p.read_bytes()[:-90])), None,
                   "cannot be read"),
    "a good ref": (refs(lambda r: None), 1, ""),
    "ids as text": (refs(lambda r: r.update(ann_id="7", image_id="3")), 1, ""),
    "no ann_id": (refs(lambda r: r.pop("ann_id")), None, "'ann_id'"),
    "sentences of text": (refs(lambda r: r.update(sentences=["cup"])), None, "cannot be read"),
    "no sentence": (refs(lambda r: r.update(sentences=[])), None, "no split"),
    "instances cut short": (refs(lambda r: None, '{"annotations": [{"id": 7'), None, "cannot be read"),
    "instances a list": (refs(lambda r: None, "[]"), None, "cannot be read"),
    "unicode": (refs(lambda r: r["sentences"][0].update(sent="das Café \U0001f431 左")), 1, ""),
    "a nested bracket bomb": (lambda p: p.write_text("[" * 100000), None, "cannot be read"),
    "a lone surrogate": (lambda p: p.write_text('{"image": "a.jpg", "expression": "\\ud800", "bbox": [1, 1, 5, 5]}'), 1,
                         ""),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_get_a_line(tmp_path, name):
    write, n, said = MALFORMED[name]
    folder = tmp_path / COCO
    (folder / "sub").mkdir(parents=True)
    for picture in ("a.jpg", "sub/b.jpg"):
        Image.new("RGB", (20, 20)).save(folder / picture)
    write(tmp_path / "file")
    report = Report()
    if n is None:
        with pytest.raises(ValueError) as caught:
            read_samples(tmp_path, "refcoco", "val", tmp_path / "file", report)
        assert said in str(caught.value) and "\n" not in str(caught.value)
        return
    samples = read_samples(tmp_path, "refcoco", "val", tmp_path / "file", report)
    assert len(samples) == n and said in "".join(report.lines())
    assert all(isinstance(s.expression, str) and s.image.is_file() for s in samples)
