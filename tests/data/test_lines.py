"""People's own JSON lines as they come: from Windows, from a spreadsheet, with rows that make no sense."""

import json

import pytest
from makers_data import write_rows
from PIL import Image

from hivg.data.batches import SampleTensors, count_cut
from hivg.data.published.check import check
from hivg.data.published.reading import Report, read_samples
from hivg.tokenizer import Tokenizer

GOOD = {"image": "a.png", "expression": "cup", "bbox": [1, 1, 9, 9], "split": "train"}


def read(folder, content, split="train"):
    """-> the samples of a .jsonl file of this content, bytes, text or a list of rows, and the report."""
    Image.new("RGB", (30, 20)).save(folder / "a.png")
    path = folder / "mine.jsonl"
    if isinstance(content, list):
        write_rows(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    report = Report()
    return read_samples(folder, path, split, report=report), report


ROW = json.dumps(GOOD)


@pytest.mark.parametrize("content", [
    "\ufeff" + ROW, "\n\n" + ROW, "\ufeff\r\n \r\n" + ROW + "\r\n", ROW + "\n" * 3, " " + ROW,
    ROW.replace("cup", "cup\u2028dog\u2029\x85"), ROW + "\n" + ROW.replace("cup", "\x85"),
    ROW + ",\n" + ROW + ",\n", '{"data": [' + ROW + "]}"],
    ids=["mark", "blank", "windows", "end", "space", "separators in a text", "separator alone", "commas", "named list"])
def test_files_as_they_come(tmp_path, content):
    samples, report = read(tmp_path, content)
    assert samples[0].expression in ("cup", "cup\u2028dog\u2029\x85") and "incomplete row" not in report.problems


@pytest.mark.parametrize("root", [".", "data"])
def test_a_file_of_the_current_folder(tmp_path, monkeypatch, root):
    """Its image beside it, and no folder named anywhere."""
    read(tmp_path, ROW)
    monkeypatch.chdir(tmp_path)
    assert len(read_samples(root, "mine.jsonl", "train")) == 1


def test_lines_are_counted_as_editors_do(tmp_path):
    """With those that are blank, of other splits, or fine; the first one too."""
    other = json.dumps(GOOD | {"split": "val"})
    samples, report = read(tmp_path, f"image,text\n\n{other}\n{ROW}\n" + json.dumps(GOOD | {"bbox": [5, 5, 5, 9]}))
    assert len(samples) == 1 and report.first["box without area"].startswith("line 5: ")
    assert report.first["incomplete row"] == "line 1: not a JSON object: 'image,text'"


@pytest.mark.parametrize("content, message", [
    (b"", "it has no rows; there must be one for each expression"),
    (ROW.encode("utf-16"), "cannot be read as annotations: not text in UTF-8; save it with that encoding"),
    (ROW.replace("cup", "café").encode("latin1").replace(b"\\u00e9", b"\xe9"), "not text in UTF-8"),
    (ROW.replace("train", "\x1b[31m" * 100), "not a JSON object"),
    (ROW.replace("train", "x" * 5000), "no split 'train'; there are xxx"),
], ids=["empty", "UTF-16", "Latin-1", "controls", "a long split"])
def test_other_files_get_one_line(tmp_path, content, message):
    try:
        _, report = read(tmp_path, content)
        line = report.lines()[0]
    except ValueError as error:
        line = str(error)
    assert message in line and line.isprintable() and len(line) <= 300, line


HUGE = 10**400
BAD_ROWS = {  # name: (changes of a good row, the problem it is counted as)
    "a split of numbers": ({"split": 1}, "incomplete row"), "a blank split": ({"split": " "}, "incomplete row"),
    "no split where others have one": ({"split": None}, "incomplete row"),
    "no image": ({"image": None}, "no image named"), "a text for an image": ({"image": "mine.jsonl"}, "damaged image"),
    "a box beyond the image": ({"bbox": [5, 5, 40, 10]}, "box outside the image"),
    "a box of nan": ({"bbox": [float("nan"), 0, 1, 1]}, "box without area"),
    "a box of three": ({"bbox": [1, 2, 3]}, "box that is not four numbers"),
    "a huge box": ({"bbox": [1, 1, HUGE, 9]}, "box that is not four numbers"),
    "a box of texts": ({"bbox": ["1", "1", "9", "9"]}, "box that is not four numbers"),
    "a box of true and false": ({"bbox": [False, False, True, True]}, "box that is not four numbers"),
    "a box of five": ({"bbox": [1, 1, 9, 9, 9]}, "box that is not four numbers"),
    "a box with names": ({"bbox": {"1": 1, "2": 1, "3": 9, "4": 9}}, "box that is not four numbers"),
    "an outline of nan": ({"segmentation": [[1, 1, 5, 1, float("nan"), 5]]}, "damaged segmentation"),
    "an outline of huge numbers": ({"segmentation": [[1, 1, 5, 1, HUGE, 5]]}, "damaged segmentation"),
    "an outline without end": ({"segmentation": [[1, 1, 5, 1, 5, 5] * 20_000]}, "damaged segmentation"),
    "outlines without end": ({"segmentation": [[1, 1, 5, 1, 5, 5]] * 2000}, "damaged segmentation"),
    "run lengths of 10^12 pixels": ({"segmentation": {"size": [10**6, 10**6], "counts": [10**12]}},
                                    "damaged segmentation"),
    "run lengths of a huge size": ({"segmentation": {"size": [HUGE, 1], "counts": [HUGE]}}, "damaged segmentation"),
    "a long name": ({"image": "x" * 5000}, "missing image"),
    "a name with a zero": ({"image": "a\0.png"}, "missing image"),
    "a name of a surrogate": ({"image": "\ud800.png"}, "missing image"),
    "a name of controls": ({"image": "\x1b[2J.png"}, "missing image"),
    "a name of a folder": ({"image": "."}, "missing image"),
    "a number for a text": ({"expression": 5}, "expression that is not text"),
    "nothing for a text": ({"expression": None}, "no expression"),
    "an endless text": ({"expression": "cup " * 10_000}, "expression of more than 10,000 characters"),
    "a text of blanks": ({"expression": "\u2028 \n"}, "empty expression"),
    "a text without a visible letter": ({"expression": "\u200b\x07"}, "empty expression"),
    "nested brackets": ('{"image": ' + "[" * 100_000, "incomplete row"),
    "a number of 5,000 digits": ('{"image": "a.png", "bbox": [' + "9" * 5000 + "]}", "incomplete row"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_each_bad_row_is_left_out_with_its_reason(tmp_path, name):
    changes, problem = BAD_ROWS[name]
    row = changes if isinstance(changes, str) else json.dumps(GOOD | changes)
    samples, report = read(tmp_path, f"{ROW}\n{row}\n{ROW}")
    assert len(samples) == 2 and report.problems == {problem: 1}, report.lines()
    line, = report.lines()
    assert len(line) <= 300 and line.isprintable(), line


TRIANGLE = [1, 1, 5, 1, 5, 5]
OUTLINES = [  # (what a row has, what is kept of it, what is told)
    *((none, None, None) for none in (None, [], {}, "")), ([TRIANGLE], [TRIANGLE], None),
    *((odd, None, "dropped, neither polygons nor run lengths")
      for odd in ("foo", [[1, 2]], [[*TRIANGLE, 7]], TRIANGLE, {"size": [20, 30]})),
    ([[3, 3], TRIANGLE], [TRIANGLE], "without their damaged parts"),  # a tool may write a point among the polygons
]


@pytest.mark.parametrize("outline, kept, told", OUTLINES, ids=str)
def test_an_outline_that_is_none_is_told(tmp_path, outline, kept, told):
    """The row keeps its box. Published lists hold other things there, and nothing is told of them."""
    samples, report = read(tmp_path, [GOOD, GOOD | {"segmentation": outline}])
    assert [sample.segmentation for sample in samples] == [None, kept] and not report.problems
    lines = report.lines()
    assert len(lines) == bool(told)
    for line in lines:
        assert f": 1 outlines {told} (first: line 2: a.png: " in line and len(line) <= 300 and line.isprintable()


# --- boxes in another form; the image is 30 wide and 20 high ---

CORNERS = [[16, 2, 28, 9], [1, 1, 29, 19], [2, 12, 9, 18], [20, 11, 27, 19]]
WRONG = {  # form: the numbers that stand for these corners
    "ymin xmin ymax xmax": lambda a, b, c, d: [b, a, d, c],
    "x y width height": lambda a, b, c, d: [a, b, c - a, d - b],
    "x and y of the centre, width, height": lambda a, b, c, d: [(a + c) / 2, (b + d) / 2, c - a, d - b],
    "shares of the sides, 0 to 1": lambda a, b, c, d: [a / 30, b / 20, c / 30, d / 20],
    "thousandths of the sides, 0 to 1000": lambda a, b, c, d: [a / 0.03, b / 0.02, c / 0.03, d / 0.02],
}


def with_boxes(*boxes, **fields):
    return [GOOD | {"bbox": box} | fields for box in boxes]


@pytest.mark.parametrize("form", WRONG)
def test_boxes_in_another_form_are_refused(tmp_path, form):
    """The whole file, whichever split is read; the signs may all be in another one."""
    rows = with_boxes(*(WRONG[form](*box) for box in CORNERS)) + with_boxes(WRONG[form](2, 11, 29, 19), split="val")
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=f"its boxes look like {form}.*; write xmin ymin xmax ymax,") as caught:
            read(tmp_path, rows, split)
        assert len(str(caught.value)) <= 290


SMALL = [[1, 1, 9, 9], [2, 3, 12, 9]]  # near the upper left corner: they could be x y width height


@pytest.mark.parametrize("boxes, n_kept", [
    *(([*CORNERS, box], 4) for box in ([5, 5, 5, 9], [5, 5, 9, 4.5], [9, 9, 4, 4], [5, 5, 40, 9])),
    ([*CORNERS, [0, 0, 1, 1]], 5), ([*SMALL, [5, 5, 5, 9]], 2), ([*SMALL, [5, 5, 4, 9]], 2),
    ([*SMALL] * 10 + [[9, 9, 4, 4]], 20), ([[0, 0, 1, 1]], 1), ([[0, 0, 32, 9], [5, 5, 33, 9]], 0)], ids=str)
def test_right_forms_with_wrong_boxes_are_not_refused(tmp_path, boxes, n_kept):
    """One that is rounded, reversed, or beyond the image is left out alone; one of a pixel is kept."""
    assert len(read(tmp_path, with_boxes(*boxes))[0]) == n_kept


def test_a_box_that_is_reversed_by_more_than_rounding_decides(tmp_path):
    with pytest.raises(ValueError, match="look like x y width height"):
        read(tmp_path, with_boxes(*SMALL, [5, 5, 3.9, 9]))


def test_relative_and_whole_paths_of_an_image_share_its_split(tmp_path):
    names = []
    for number in range(20):
        Image.new("RGB", (30, 20)).save(tmp_path / f"{number}.png")
        names += [f"{number}.png", str(tmp_path / f"{number}.png")]
    rows = [{"image": name, "expression": "cup", "bbox": [1, 1, 9, 9]} for name in names]
    splits = [{sample.image_id for sample in read(tmp_path, rows, split)[0]} for split in ("train", "val")]
    assert not splits[0] & splits[1] and len(splits[0] | splits[1]) == 20


def test_images_that_are_moved_keep_their_splits(tmp_path):
    names = [f"{folder}/{number}.png" for folder in "ab" for number in range(12)]
    splits = []
    for root in ("images", "other/photos"):
        for name in names:
            (tmp_path / root / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 20)).save(tmp_path / root / name)
        rows = [{"image": f"{root}/{name}", "expression": name, "bbox": [1, 1, 9, 9]} for name in names]
        splits.append({sample.expression for sample in read(tmp_path, rows, "val")[0]})
    assert splits[0] == splits[1] and 0 < len(splits[0]) < 24


@pytest.mark.parametrize("largest, unit", [(100, "percent"), (1000, "thousandths")])
def test_boxes_that_may_be_shares_are_doubted(tmp_path, largest, unit):
    """But kept: they lie in their images."""
    Image.new("1", (1600, 1510)).save(tmp_path / "large.png")
    boxes = [[i, 2 * i, largest - i, largest] for i in range(20)]
    rows = with_boxes(*boxes, image="large.png")
    samples, report = read(tmp_path, rows)
    line, = report.lines()
    assert f"all boxes lie in 0..{largest} of images as large as 1600 x 1510" in line and unit in line
    assert len(samples) == 20
    assert not read(tmp_path, [*rows, rows[0] | {"bbox": [0, 0, 1100, 9]}])[1].lines()
    assert not read(tmp_path, rows[1:])[1].lines()


def test_a_caption_about_several_boxes_is_no_expression(tmp_path):
    """MDETR's files of phrases."""
    annotations = [{"image_id": 1, "bbox": [1, 1, 9 - i, 9]} for i in range(3)]
    data = {"images": [{"id": i, "file_name": "a.png", "caption": f"cups {i}", "split": "train"} for i in (1, 2)],
            "annotations": [*annotations, {"image_id": 2, "bbox": [1, 1, 9, 9]}]}
    samples, report = read(tmp_path, json.dumps(data))
    assert [sample.expression for sample in samples] == ["cups 2"]
    assert "one caption for 3 boxes" in report.first["box that is not four numbers"]


def test_a_split_of_null_leaves_a_row_in_its_list(tmp_path):
    data = {split: [GOOD | {"expression": f"the {split} cup", "split": None}] for split in ("train", "val")}
    assert [sample.expression for sample in read(tmp_path, json.dumps(data))[0]] == ["the train cup"]


def test_half_a_character_does_not_stop_the_training(tmp_path):
    samples, _ = read(tmp_path, [GOOD | {"expression": "the cup \ud83d"}])
    tokenizer = Tokenizer([])
    assert count_cut(SampleTensors(samples, 32), tokenizer) == 0 and tokenizer([samples[0].expression]).shape[0] == 1


def test_every_caption_of_an_image_is_a_row(tmp_path):
    """COCO's layout, one line or many."""
    annotations = [{"image_id": 1, "caption": text, "bbox": [1, 1, 9, 9]} for text in ("cup", "the cup")]
    data = {"images": [{"id": 1, "file_name": "a.png", "split": "train"}], "annotations": annotations}
    assert [sample.expression for sample in read(tmp_path, json.dumps(data, indent=1))[0]] == ["cup", "the cup"]
    with pytest.raises(ValueError, match="its rows have info, train; they need image, expression and bbox"):
        read(tmp_path, json.dumps({"info": {}, "train": [GOOD]}, indent=1))


def test_corners_under_a_name_that_means_x_y_width_height(tmp_path):
    """COCO's file_name goes with COCO's boxes."""
    rows = [{"file_name": "a.png", "caption": "cup", "bbox": box, "split": "train"} for box in CORNERS]
    with pytest.raises(ValueError, match='look like xmin .*; write x y width height, in pixels, or .* as "image"'):
        read(tmp_path, json.dumps(rows))
    for row in rows:
        row["bbox"] = WRONG["x y width height"](*row["bbox"])
    samples, _ = read(tmp_path, json.dumps(rows))
    assert [list(sample.box) for sample in samples] == CORNERS


# --- one image, several spellings ---

SPELLINGS = ["caf\u00e9.png", "./caf\u00e9.png", "x/../caf\u00e9.png", ".\\caf\u00e9.png", "cafe\u0301.png"]


@pytest.mark.parametrize("on_disk", SPELLINGS[::4])
def test_an_image_in_several_spellings_is_one(tmp_path, on_disk):
    """For the automatic split, for the leak check, and for the contrastive loss."""
    (tmp_path / "x").mkdir()
    Image.new("RGB", (30, 20)).save(tmp_path / on_disk)
    rows = [{"image": name, "expression": "cup", "bbox": [1, 1, 9, 9]} for name in SPELLINGS]
    samples, _ = read(tmp_path, rows)
    assert len(samples) == len(SPELLINGS)  # all of them in train
    assert len(set(SampleTensors(samples, 32).image_ids)) == 1
    for row, split in zip(rows, ["train", "val", "test", "dev", "other"]):
        row["split"] = split
    write_rows(tmp_path / "mine.jsonl", rows)
    text = check(tmp_path, tmp_path / "mine.jsonl")
    assert text.count(": 1, for instance ") == 4


def test_what_is_no_json_file_says_what_to_write(tmp_path):
    for name in ("mine.csv", "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=f"{name}: your own data must be a .jsonl or .json file"):
            read_samples(tmp_path, str(tmp_path / name), "train")
    for box in ({"xmin": 1}, "1 1 9 9", [[1, 1], [9, 9]]):
        assert read(tmp_path, [GOOD | {"bbox": box}])[1].first["box that is not four numbers"].endswith(
            "; write [xmin, ymin, xmax, ymax], in pixels")
