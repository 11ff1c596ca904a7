"""Two evaluations of the same samples: python -m hivg.evaluate --compare. Its test of significance: test_metrics.py."""

import json

import pytest

from hivg.evaluate.compare import compare


def write_rows(path, right):
    """A per-sample file of eight rows, of which `right` have a good box."""
    lines = []
    for i in range(8):
        row = {"image": f"{i}.png", "expression": f"cup {i}", "target": [0, 0, i, i], "iou": 0.9 if i in right else 0.0}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines))


def test_compare_names_the_samples(tmp_path):
    write_rows(tmp_path / "a", range(8))
    write_rows(tmp_path / "b", range(2))
    text = compare(tmp_path / "a", tmp_path / "b")
    assert text.startswith(f"Acc@0.5 1.0000 {tmp_path / 'a'}\nAcc@0.5 0.2500 {tmp_path / 'b'}\n")
    assert "6 right in the first alone, 0 in the second alone; McNemar's p = 0.0312: significant at 5 %\n" in text
    assert text.count("right in the first alone: ") == 6 and "7.png: cup 7 (IoU 0.90, 0.00)" in text
    text = compare(tmp_path / "b", tmp_path / "a")
    assert text.count("right in the second alone: ") == 6 and "7.png: cup 7 (IoU 0.00, 0.90)" in text


def test_expressions_of_nothing_are_left_out(tmp_path):
    write_rows(tmp_path / "a", range(8))
    nothing = json.dumps({"image": "8.png", "expression": "no cup", "target": None, "iou": 0.0}) + "\n"
    (tmp_path / "b").write_text((tmp_path / "a").read_text() + nothing)
    assert "left out: 1 expressions that are true of nothing" in compare(tmp_path / "b", tmp_path / "b")
    (tmp_path / "c").write_text(nothing)
    with pytest.raises(ValueError, match="true of nothing"):
        compare(tmp_path / "c", tmp_path / "c")


@pytest.mark.parametrize("folder", ["/data/", r"C:\\data\\"])
def test_compare_knows_images_by_their_names(tmp_path, folder):
    """From another folder or system, or with another --data_root, their paths are spelled otherwise."""
    write_rows(tmp_path / "a", range(8))
    (tmp_path / "b").write_text((tmp_path / "a").read_text().replace('"image": "', f'"image": "{folder}'))
    assert "McNemar" in compare(tmp_path / "a", tmp_path / "b")


def test_compare_refuses_other_samples(tmp_path):
    write_rows(tmp_path / "a", range(8))
    (tmp_path / "c").write_text((tmp_path / "a").read_text().replace("cup 3", "dog 3"))
    with pytest.raises(ValueError, match="not of the same samples"):
        compare(tmp_path / "a", tmp_path / "c")
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError, match="empty: has no rows"):
        compare(tmp_path / "empty", tmp_path / "a")
    (tmp_path / "list").write_text("[1]\n")
    for name, reason in (("missing", "cannot be read .No such file"), ("list", "not a file")):
        with pytest.raises(ValueError, match=f"{name}: {reason}"):
            compare(tmp_path / "a", tmp_path / name)


GOOD = {"image": "0.png", "expression": "cup", "target": [0, 0, 1, 1], "iou": 0.5}
DAMAGED = {
    "no IoU": {"image": "0.png", "expression": "cup", "target": [0, 0, 1, 1]},
    "no target": {"image": "0.png", "expression": "cup", "iou": 0.5}, "no object": [1, 2],
    "no image": GOOD | {"image": 3}, "no text": GOOD | {"expression": ["cup"]},
    "three numbers": GOOD | {"target": [0, 0, 1]}, "no list": GOOD | {"target": "0011"},
    "words": GOOD | {"target": [0, 0, "1", 1]}, "no number": GOOD | {"iou": "0.5"}, "null": GOOD | {"iou": None},
    "true": GOOD | {"iou": True}, "NaN": GOOD | {"iou": float("nan")},
    "beyond all floats": GOOD | {"target": [0, 0, 1, 10**400]},
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_rows(tmp_path, name):
    (tmp_path / "good").write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\n")
    (tmp_path / "bad").write_text(json.dumps(GOOD) + "\n" + json.dumps(DAMAGED[name]) + "\n")
    with pytest.raises(ValueError, match="bad, line 2: not a file of --per_sample"):
        compare(tmp_path / "good", tmp_path / "bad")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"[" * 100_000, b"{", b"\n", b"9" * 5000], ids=lambda b: str(b[:4]))
def test_damaged_files(tmp_path, content):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match="bad: not a file of --per_sample"):
        compare(tmp_path / "bad", tmp_path / "bad")


def test_a_terminal_obeys_nothing_of_a_file(tmp_path):
    for name, iou in (("a", 0.9), ("b", 0.1)):
        (tmp_path / name).write_text(json.dumps(GOOD | {"expression": "cup\x1b[31m\ncup", "iou": iou}))
    text = compare(tmp_path / "a", tmp_path / "b")
    assert "\x1b" not in text and len(text.splitlines()) == 4
