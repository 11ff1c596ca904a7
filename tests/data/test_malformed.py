"""Annotation files that are damaged, hostile or of another kind: nothing in them is run, and each gets one line."""

import json
import pickle
from functools import partial

import pytest
import torch
from makers import refusal
from makers_weights import Payload, save_bare, save_legacy
from PIL import Image

from hivg.data.published.catalogue import COCO
from hivg.data.published.reading import Report, read_samples


@pytest.mark.parametrize("save", [save_bare, partial(save_bare, protocol=0), torch.save, save_legacy])
def test_a_command_in_a_pickle_is_not_run(tmp_path, save):
    for name in ("refs(unc).p", "refcoco_train.pth"):
        save([Payload(tmp_path / "touched")], tmp_path / name)
        with pytest.raises(ValueError, match=r"\.system"):
            read_samples(tmp_path, "refcoco", "train", annotations=tmp_path / name)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"{}", b"[1, 2]", b'{"image": ', pickle.dumps({"a": 1}),
                                     b"<html></html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_other_files_get_one_line(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    message = refusal(read_samples, tmp_path, "refcoco", "train", annotations=tmp_path / "x")
    assert message.startswith(str(tmp_path / "x"))


# --- files of their kind, but for one thing ---

SIZE = {"width": 20, "height": 20}
BOX = [1, 1, 5, 5]


def saved(*rows):
    """-> a writer of a .pth list."""
    return lambda path: torch.save(list(rows), path)


def row(file="a.jpg", size=SIZE, box=BOX, phrase="cup", segmentation=None):
    """-> a writer of a .pth list of one row."""
    return saved((file, size, box, phrase, segmentation))


def cut_short(path):
    row()(path)
    path.write_bytes(path.read_bytes()[:-90])


GOOD_SENTENCE = {"sent": "cup", "raw": "cup", "sent_id": 1, "tokens": ["cup"]}
GOOD_REF = {"ref_id": 1, "ann_id": 7, "image_id": 3, "file_name": "a_1.jpg", "split": "val",
            "sentences": [GOOD_SENTENCE]}
GOOD_INSTANCES = json.dumps({"annotations": [{"id": 7, "image_id": 3, "bbox": BOX}],
                             "images": [{"id": 3, "file_name": "a.jpg", "width": 20, "height": 20}]})


def ref(without=None, instances=GOOD_INSTANCES, **changes):
    """-> a writer of a REFER file of one ref, and of its instances.json."""
    def write(path):
        changed = GOOD_REF | changes
        changed.pop(without, None)
        path.write_bytes(pickle.dumps([changed]))
        path.with_name("instances.json").write_text(instances)
    return write


MALFORMED = {  # the writer; how many samples it gives, None for an error; a part of the message
    "a good list": (row(), 1, ""),
    "an empty list": (saved(), None, "no list of rows"),
    "a dict": (lambda path: torch.save({"a": 1}, path), None, "no list of rows"),
    "a list of numbers": (saved(1, 2), 0, "not of 3 or 5 fields"),
    "two columns": (saved(("a.jpg", BOX)), 0, "not of 3 or 5 fields"),
    "columns in another order": (saved((BOX, SIZE, "a.jpg", "cup", None)), 0, "no image named"),
    "infinity in a box": (row(box=[1, 1, float("inf"), 5]), 0, "box outside"),
    "a box of texts": (row(box=["1", "1", "5", "5"]), 1, ""),  # the released program takes them
    "an outline of text": (row(segmentation="7.mat"), 1, ""),
    "a box in 0..1": (row(box=[0, 0, 1, 1]), 1, ""),
    "a negative size": (row(box=[5, 5, -3, 2]), 0, "box without area"),
    "bytes for text": (row("a.jpg".encode(), phrase="café".encode()), 1, ""),
    "a Windows path": (row("sub\\b.jpg"), 1, ""),
    "sizes of zero": (row(size={"width": 0, "height": 0}), 1, ""),
    "a mask of another size": (row(segmentation={"size": [3, 3], "counts": [4, 5]}), 0, "damaged segmentation"),
    "a mask of text": (row(segmentation={"size": ["x", 3], "counts": 5}), 0, "damaged segmentation"),
    "a mask of other bytes": (row(segmentation={"size": [20, 20], "counts": b"\xff"}), 0, "damaged segmentation"),
    "a list cut short": (cut_short, None, "cannot be read"),
    "a good ref": (ref(), 1, ""),
    "ids as text": (ref(ann_id="7", image_id="3"), 1, ""),
    "no ann_id": (ref(without="ann_id"), None, "'ann_id'"),
    "sentences of text": (ref(sentences=["cup"]), None, "cannot be read"),
    "no sentence": (ref(sentences=[]), None, "it has no rows"),
    "instances cut short": (ref(instances='{"annotations": [{"id": 7'), None, "cannot be read"),
    "instances a list": (ref(instances="[]"), None, "cannot be read"),
    "unicode": (ref(sentences=[GOOD_SENTENCE | {"sent": "das Café \U0001f431 左"}]), 1, ""),
    "a nested bracket bomb": (lambda path: path.write_text("[" * 100000), None, "cannot be read"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_get_a_line(tmp_path, name):
    write, n, message = MALFORMED[name]
    folder = tmp_path / COCO
    (folder / "sub").mkdir(parents=True)
    for image in ("a.jpg", "sub/b.jpg"):
        Image.new("RGB", (20, 20)).save(folder / image)
    write(tmp_path / "file")
    report = Report()
    if n is None:
        assert message in refusal(read_samples, tmp_path, "refcoco", "val", tmp_path / "file", report)
        return
    samples = read_samples(tmp_path, "refcoco", "val", tmp_path / "file", report)
    assert len(samples) == n and message in "".join(report.lines())
    assert n == 0 or not report.lines()
    assert all(isinstance(s.expression, str) and s.image.is_file() for s in samples)
