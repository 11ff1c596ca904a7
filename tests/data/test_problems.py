"""Rows with a problem: counted, named and left out, or kept as far as they are right."""

import json

import numpy as np
import pytest
from makers import calls_of
from makers_data import (
    TURNED,
    expected,
    found,
    make_scenes,
    write_list,
    write_mdetr,
    write_program,
    write_refer,
    write_rows,
)
from PIL import Image

from hivg.data.published import reading
from hivg.data.published.catalogue import COCO
from hivg.data.published.check import check
from hivg.data.published.reading import Report, checked_segmentation, read_samples


def test_problems_are_counted_named_and_left_out(tmp_path, capsys):
    """The kinds are in test_lines.py."""
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    good = {"image": "a.png", "expression": "x", "bbox": [9, 0, 30.5, 20]}  # half a pixel too wide is how people draw
    changes = [{}, {"image": "b.png"}, {"bbox": [5, 5, 5, 10]}, {"bbox": [9, 5, 7, 10]}]
    rows = [good | change | {"split": "train"} for change in changes]
    path = write_rows(tmp_path / "mine.jsonl", [*rows, "not an object"])
    report = Report()
    samples = read_samples(tmp_path, path, "train", report=report)
    assert [s.box for s in samples] == [(9.0, 0.0, 30.5, 20.0)]
    assert report.problems == {"missing image": 1, "box without area": 2, "incomplete row": 1}
    assert report.first["missing image"].startswith("line 2: ")
    assert report.first["box without area"] == "line 3: a.png: (5.0, 5.0, 5.0, 10.0); boxes are xmin ymin xmax ymax"
    assert not capsys.readouterr().err
    read_samples(tmp_path, path, "train")
    assert capsys.readouterr().err.splitlines() == report.lines()


@pytest.mark.parametrize("box, is_inside", [
    ([-1, -1, 31, 21], True), ([-1.1, 0, 9, 9], False), ([0, -1.1, 9, 9], False), ([0, 0, 31.1, 9], False),
    ([0, 0, 9, 21.1], False), ([30, 0, 31, 9], False), ([0, 20.2, 9, 20.9], False), ([-0.9, 0, 0, 9], False),
    ([0, -0.9, 9, 0], False), ([29.9, 19.9, 31, 21], True)])
def test_a_box_may_reach_out_by_a_pixel(tmp_path, box, is_inside):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    row = {"image": "a.png", "expression": "x", "bbox": box, "split": "train"}
    path = write_rows(tmp_path / "mine.jsonl", [row])
    assert len(read_samples(tmp_path, path, "train", report=Report())) == is_inside


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


def test_file_names_without_their_object(tmp_path):
    """Where instances.json lists no images, REFER's own file names are used, less the number of the object."""
    scenes = make_scenes(tmp_path)
    write_refer(tmp_path, {"val": scenes})
    instances = tmp_path / "refcoco" / "instances.json"
    instances.write_text(json.dumps({"annotations": json.loads(instances.read_text())["annotations"]}))
    assert found(read_samples(tmp_path, "refcoco", "val")) == expected(tmp_path, scenes)


@pytest.mark.parametrize("change", [lambda width, height: (width // 2, height // 2),
                                    lambda width, height: (height, width + 1)], ids=["smaller", "turned"])
@pytest.mark.parametrize("write", [write_refer, write_list, write_mdetr, write_program])
def test_an_image_of_another_size_than_stated_is_left_out(tmp_path, write, change):
    """Its boxes are those of another image."""
    scenes = make_scenes(tmp_path)
    write(tmp_path, {"train": scenes})
    assert found(read_samples(tmp_path, "refcoco", "train")) == expected(tmp_path, scenes)
    bad = scenes[0]
    size = change(*bad.size)
    Image.new("RGB", size).save(tmp_path / COCO / bad.file)
    report = Report()
    samples = read_samples(tmp_path, "refcoco", "train", report=report)
    assert found(samples) == expected(tmp_path, [scene for scene in scenes if scene.file != bad.file])
    line, = report.lines()
    assert f"{bad.file}: {size[0]} x {size[1]}, annotated as {bad.size[0]} x {bad.size[1]}" in line
    assert line in check(tmp_path, "refcoco", decode=True)
    for scene in scenes:
        Image.new("RGB", change(*scene.size)).save(tmp_path / COCO / scene.file)
    assert f"{len(scenes)} left out, image of another size" in check(tmp_path, "refcoco", decode=True)


def test_a_size_stated_for_own_images_is_that_of_the_upright_one(tmp_path):
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=TURNED)
    row = {"image": "a.jpg", "expression": "cup", "bbox": [1, 2, 11, 25], "width": 20, "height": 30}
    path = write_rows(tmp_path / "mine.jsonl", [row])
    assert len(read_samples("nowhere", path, "train")) == 1
    write_rows(path, [row | {"width": 30, "height": 20}])
    report = Report()
    assert not read_samples("nowhere", path, "train", report=report)
    assert "a.jpg: 20 x 30, annotated as 30 x 20" in report.lines()[0]


def test_a_damaged_image_whose_size_is_stated_stays(tmp_path, monkeypatch):
    """It is named when it is opened. However many rows it has, it is looked at once."""
    looked_at = calls_of(monkeypatch, reading, "stored_size")
    scenes = make_scenes(tmp_path)
    write_list(tmp_path, {"val": scenes + scenes})
    write_list(tmp_path, {"val": scenes}, "unc+", new=False)
    for s in scenes:
        (tmp_path / COCO / s.file).write_bytes(b"")
    assert found(read_samples(tmp_path, "refcoco", "val")) == expected(tmp_path, scenes + scenes)
    assert len(looked_at) == len(scenes)
    report = Report()
    assert not read_samples(tmp_path, "unc+", "val", report=report)
    assert report.problems == {"damaged image": len(scenes)}


TRIANGLE = [1.0, 1.0, 5.0, 1.0, 5.0, 5.0]
RLE = {"size": [2, 3], "counts": [1, 2, 3]}


@pytest.mark.parametrize("given, wanted", [
    (None, None), ([], None), ("7.mat", None), ([TRIANGLE, TRIANGLE], [TRIANGLE, TRIANGLE]),
    ((tuple(TRIANGLE),), [tuple(TRIANGLE)]),
    ([TRIANGLE[:4]], None), ([[*TRIANGLE, 7.0]], None), ([["r1", ["none"]]], None), (TRIANGLE, None),
    ([TRIANGLE, ["r1"] * 6, TRIANGLE[:4], TRIANGLE[:2], [], [*TRIANGLE[:5], np.nan]], [TRIANGLE]),
    ([RLE], [RLE]), ([TRIANGLE, RLE, RLE | {"size": [3, 3]}], [TRIANGLE, RLE]),
    (RLE, RLE), ({"size": (np.int64(2), 3), "counts": (1, 2, 3)}, RLE),
    ({"size": [2.0, "3"], "counts": [1.0, "2", 3]}, RLE),
    ({"size": [2, 3], "counts": b"123"}, {"size": [2, 3], "counts": "123"}), ({"size": [2, 3]}, None)], ids=str)
def test_segmentations_are_plain_numbers(given, wanted):
    """Anything that is no segmentation, as mask names and lists of attributes, is none."""
    assert checked_segmentation(given, 3, 2, "a.jpg") == wanted


def test_the_first_annotation_of_an_image_counts(tmp_path):
    scenes = make_scenes(tmp_path, 1)[:1]
    write_mdetr(tmp_path, {"val": scenes})
    path = tmp_path / "finetune_refcoco_val.json"
    data = json.loads(path.read_text())
    data["annotations"].append(data["annotations"][0] | {"bbox": [0, 0, 1, 1]})
    path.write_text(json.dumps(data))
    assert found(read_samples(tmp_path, "refcoco", "val")) == expected(tmp_path, scenes)
