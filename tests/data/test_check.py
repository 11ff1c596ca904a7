"""The report of `python -m hivg.data check`."""

import json

import pytest
from makers import refusal
from makers_data import make_scenes, write_list, write_own, write_refer, write_rows
from makers_use import call
from PIL import Image

from hivg.data.__main__ import main
from hivg.data.published.catalogue import COCO
from hivg.data.published.check import check, splits_of
from hivg.utils.messages import shown


def test_counts_and_leakage(tmp_path):
    train = make_scenes(tmp_path, 5, 1)
    val = make_scenes(tmp_path, 4, 2)
    write_list(tmp_path, {"train": train, "val": val + train[:1], "testA": val})
    text = check(tmp_path, "refcoco")
    assert f"refcoco train: {len(train)} expressions (120,624 published), 5 images" in text
    assert f"images of refcoco train that are also in refcoco val: 1, for instance {train[0].file}" in text
    assert "images of refcoco train that are also in refcoco testA: 0" in text and "no split 'testB'" in text


def test_leakage_between_the_parts_of_the_mixture(tmp_path):
    """Parts that are not there are passed over, and a file that is named is that of no part."""
    train = make_scenes(tmp_path, 5, 1)
    val = make_scenes(tmp_path, 4, 2)
    write_list(tmp_path, {"val": val}, "gref_umd")
    write_list(tmp_path, {"train": train + val[-1:]}, "mixup")
    text = check(tmp_path, "mixup")
    assert f"images of mixup train that are also in refcocog val: 1, for instance {val[-1].file}" in text
    assert "no split 'val' of mixup" in text
    assert "of flickr" not in text and "of refcocog" not in text
    file = (tmp_path / "mixup/mixup_train.pth").rename(tmp_path / "rows.pth")
    text = check(tmp_path, "mixup", file)
    assert "mixup val: " in text and "refcoco" not in text and "flickr" not in text


def test_own_data_is_reported_by_its_splits(tmp_path):
    path = write_own(tmp_path, 3, split="mine")
    (tmp_path / "images/2.png").unlink()
    lines = check("nowhere", path).splitlines()
    assert lines[0] == f"{path} mine: 4 expressions, 2 images, boxes read as xmin ymin xmax ymax"
    assert "2 left out, missing image" in lines[1]


def test_images_of_one_name_in_two_folders_are_two(tmp_path):
    rows = []
    for folder, split in (("a", "train"), ("b", "train"), ("b", "val"), ("c", "val")):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (30, 20)).save(tmp_path / folder / "000.png")
        rows.append({"image": f"{folder}/000.png", "expression": "cup", "bbox": [1, 2, 11, 12], "split": split})
    path = write_rows(tmp_path / "mine.jsonl", rows)
    read = "2 expressions, 2 images, boxes read as xmin ymin xmax ymax"
    assert check("nowhere", path).splitlines() == [
        f"{path} train: {read}", f"{path} val: {read}",
        f"images of {path} train that are also in {path} val: 1, for instance {shown(tmp_path / 'b/000.png', 80)}"]


def test_copies_of_an_image_are_one_where_images_are_read(tmp_path):
    rows = []
    for name, split in (("a.png", "train"), ("copy of a.png", "val"), ("b.png", "val")):
        Image.new("RGB", (30, 20), "red" if "a.png" in name else "blue").save(tmp_path / name)
        rows.append({"image": name, "expression": "cup", "bbox": [1, 2, 11, 12], "split": split})
    path = write_rows(tmp_path / "mine.jsonl", rows)
    in_both = f"images of {path} train that are also in {path} val: "
    assert f"{in_both}0" in check("nowhere", path)
    assert f"{in_both}1, for instance {shown(tmp_path / 'copy of a.png', 80)}" in check("nowhere", path, decode=True)


def test_what_is_not_read_is_told(tmp_path):
    """A split under another name would be drawn anew, and nobody would see it."""
    path = write_own(tmp_path, 20, set="test", source="mine")
    note = ': no row has a "split", so 1 of 20 images are val; not read: set, source'
    assert [note in line for line in check("nowhere", path).splitlines()] == [False, True, False, False]


@pytest.mark.parametrize("n, fields, lacking", [(3, {}, None), (1, {}, "val"), (3, {"split": "train"}, "val"),
                                                (3, {"split": "validation"}, "train"), (3, {"split": "val"}, "train")])
def test_a_split_that_own_data_lack_is_told(tmp_path, n, fields, lacking):
    """Where there is one, no line on images that are in both."""
    path = write_own(tmp_path, n, **fields)
    notes, lines = [], []
    for line in check(tmp_path, path).splitlines():
        (notes if 'no row has a "split", so ' in line else lines).append(line)
    assert len(notes) == (not fields)
    told = f"{path}: it has no {lacking}, which train.py needs; "
    assert [line.startswith(told) for line in lines] == ([False, True] if lacking else [False] * 3)
    assert lines[-1].endswith("add a second image") == (n == 1)


def test_own_boxes_are_told_as_they_are_read(tmp_path):
    """By the key that names the image: small boxes could be in either form."""
    Image.new("RGB", (300, 200)).save(tmp_path / "a.jpg")
    for key, name, form in (("image", "a.jpg", "xmin ymin xmax ymax"), ("file_name", "a.jpg", "x y width height"),
                            ("img_id", "a", "x y width height")):  # MiniGPT-v2 leaves the suffix out
        (tmp_path / "mine.jsonl").write_text(json.dumps({key: name, "expression": "cup", "bbox": [10, 20, 40, 50]}))
        assert f"1 images, boxes read as {form}" in check("data", tmp_path / "mine.jsonl")
    with open(tmp_path / "mine.jsonl", "a") as file:
        file.write('\n{"image": "a.jpg", "expr')  # a line that was cut short has no box
    assert "1 images, boxes read as x y width height\n" in check("data", tmp_path / "mine.jsonl")


def test_the_reason_of_rows_that_exist_comes_first(tmp_path):
    """Not only that there is no train."""
    write_list(tmp_path, {"val": make_scenes(tmp_path, 2), "testA": []})
    for image in (tmp_path / COCO).iterdir():
        image.unlink()
    first, reason, *others = check(tmp_path, "refcoco").splitlines()
    assert "refcoco val: 0 expressions" in first and "refcoco_val.pth, val: 2 left out, missing image" in reason
    assert "no split 'train'" in others[1]
    rows = (tmp_path / "refcoco/refcoco_val.pth").rename(tmp_path / "rows")
    assert "rows, val: 2 left out, missing image" in check(tmp_path, "refcoco", rows)


@pytest.mark.parametrize("name, content", [
    ("shapes", None), ("coco", None), ("refcoco", None), ("mine.jsonl", ""), ("mine.jsonl", "\n"),
    ("mine.jsonl", "hello"), ("mine.jsonl", "{}"), ("mine.jsonl", '{"image": "b.png", "expression": "x"}')])
def test_to_check_nothing_is_an_error(tmp_path, monkeypatch, capfd, name, content):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_text(content)
    code, out, err = call(main, capfd, monkeypatch, "check", name, "--data_root", tmp_path)
    assert code == 2 and out == ""
    assert len(err.splitlines()) == 1 and len(err) <= 300 and err.startswith("error: "), err


def test_the_splits_that_a_file_has(tmp_path):
    assert splits_of("shapes")[:2] == ["val", "test"] and "train" not in splits_of("shapes")
    scenes = make_scenes(tmp_path, 3)
    with pytest.raises(ValueError, match="no annotations of refcoco"):
        splits_of("refcoco", tmp_path)
    write_refer(tmp_path, {"testB": scenes, "val": scenes})
    assert splits_of("unc", tmp_path) == ["val", "testB"]
    write_list(tmp_path, {"train": scenes, "mine": scenes}, "unc")
    assert splits_of("refcoco", tmp_path) == ["train", "val", "testB", "mine"]
    assert splits_of("refcoco", "nowhere", tmp_path / "unc/unc_train.pth") == ["train"]
    assert splits_of("refcoco", "nowhere", tmp_path / "unc") == ["train", "mine"]
    (tmp_path / "unc/unc_train.pth").rename(tmp_path / "rows")
    assert splits_of("refcoco", "nowhere", tmp_path / "rows") == ["train", "val", "testA", "testB"]  # any name will do
    own = write_own(tmp_path, 3, split="mine")
    assert splits_of(own) == ["mine"]


@pytest.mark.parametrize("place", ["data_root", "annotations"])
def test_folders_that_cannot_be(place):
    places = {"data_root": "data"} | {place: "x/" * 3000}
    assert "no annotations of refcoco" in refusal(check, dataset="refcoco", **places)


def test_a_longer_name_of_a_data_set_is_another(tmp_path):
    """gref_umd_val.pth and refcocog_google_val.pth are no splits "umd_val" of gref and "google_val" of refcocog."""
    scenes = make_scenes(tmp_path, 3)
    lists = {"gref_umd": ("val", "test"), "gref": ("train",), "refcocog_google": ("val",), "unc": ("testA",)}
    for name, splits in lists.items():
        write_list(tmp_path, dict.fromkeys(splits, scenes), name)
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in lists:
        for path in (tmp_path / name).iterdir():
            path.rename(flat / path.name)
    assert splits_of("gref", tmp_path, flat) == ["train", "val"]  # under both of its names
    assert splits_of("refcocog", tmp_path, flat) == ["val", "test"]
    assert splits_of("gref_umd", tmp_path, flat / "gref_umd_test.pth") == ["test"]
