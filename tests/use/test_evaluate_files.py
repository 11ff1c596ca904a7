"""The evaluation of people's own files: the split that is taken, what is written where, flags out of range."""

import os
import re
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
from makers_data import TURNED, make_scenes, rows_of, write_list, write_rows
from makers_use import assert_fails, call, make_image
from PIL import Image

from hivg.evaluate import __main__ as evaluate
from hivg.evaluate import report


def write_data(name, splits, image="im/a.png"):
    """A .jsonl file with a row for each of the splits."""
    Path("im").mkdir(exist_ok=True)
    make_image().save("im/a.png")
    write_rows(Path(name), [{"image": image, "expression": f"star {number}", "bbox": [10, 10, 60, 50], "split": split}
                            for number, split in enumerate(splits)])


@pytest.fixture
def run(monkeypatch, capfd, tmp_path, weights_file):
    """python -m hivg.evaluate ARGS in a folder with mine.jsonl -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    write_data("mine.jsonl", ["val", "val", "train"])

    def run(*args):
        common = ["--weights", weights_file, "--device", "cpu", "--dtype", "float32"]
        return call(evaluate.main, capfd, monkeypatch, *common, *args)

    return run


# --- the split ---


@pytest.mark.parametrize("splits, taken", [
    (["train", "val", "test"], "test"), (["val", "train", "testA", "testB"], "testA"), (["train", "val"], "val"),
    (["train", "mine"], "mine"), (["train", "zoo"], "zoo"), (["train"], "train")], ids=lambda names: "_".join(names))
def test_default_split(run, splits, taken):
    """One that the file has; it is named on stderr."""
    write_data("own.jsonl", splits)
    code, out, err = run("--dataset", "own.jsonl")
    assert code == 0 and f" on own.jsonl {taken} in float32" in out
    assert err == f"evaluating the split {taken} (the data set has {', '.join(sorted(splits))})\n"
    code, out, err = run("--dataset", "own.jsonl", "--split", "train")  # a given one is taken in silence
    assert code == 0 and " on own.jsonl train in float32" in out and err == ""


def test_a_published_train_is_no_default(run):
    write_list(Path("."), {"train": make_scenes(Path("."), 1), "testB": make_scenes(Path("."), 1, 1)}, "unc")
    code, out, err = run("--dataset", "unc", "--data_root", ".")
    assert code == 0 and " on unc testB in" in out
    assert err == "evaluating the split testB (the data set has train, testB)\n"


@pytest.mark.parametrize("flags", [[], ["--split", "val"], ["--split", "Validation"]], ids=str)
def test_validation_is_val(run, flags):
    write_data("named.jsonl", ["train", "Validation", "Validation"])
    code, out, _ = run("--dataset", "named.jsonl", *flags)
    assert code == 0 and "2 expressions" in out and (flags or " on named.jsonl val in" in out)


def test_there_must_be_a_val_to_calibrate_on(run):
    write_data("own.jsonl", ["train", "test"])
    ended = run("--dataset", "own.jsonl", "--calibrate", "new.safetensors")
    assert_fails(ended, "no val to calibrate on; give --split, of test, train")
    assert not Path("new.safetensors").exists()


def test_file_of_nothing(run):
    Path("empty.jsonl").touch()
    assert_fails(run("--dataset", "empty.jsonl"), "empty.jsonl", "no expression")


# --- what is drawn and written ---


def test_sheet_shows_images_upright(run):
    """As they are evaluated, turned by their EXIF."""
    make_image().save("im/turned.png", exif=TURNED)
    write_data("turned.jsonl", ["val"], "im/turned.png")
    assert run("--dataset", "turned.jsonl", "--sheet", "sheet.png", "--per_sample", "rows.jsonl")[0] == 0
    dataset = evaluate.open_dataset("turned.jsonl", "val", 64)
    rows = rows_of("rows.jsonl")
    tile = np.asarray(report.sheet_tile(dataset, rows, 0))
    upright = np.asarray(dataset.image(0))
    assert upright.shape == (200, 120, 3) and tile.shape[0] >= 200
    same = (tile[:200, :120] == upright).all(2)
    assert same.mean() > 0.3 and Image.open("sheet.png").size[0] > 200


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_disk_that_is_full(run):
    code, out, err = run("--dataset", "mine.jsonl", "--split", "val", "--per_sample", "/dev/full")
    assert code == 2 and re.fullmatch("error: /dev/full: cannot be written [^\n]+\n", err)
    assert "Acc@0.5" in out  # what took the time is not lost


def test_rows_for_another_program(run):
    """Through a pipe, whose reader stops at its first end."""
    os.mkfifo("pipe")
    read = []
    reader = Thread(target=lambda: read.append(Path("pipe").read_text()))
    reader.start()
    code = run("--dataset", "mine.jsonl", "--split", "val", "--per_sample", "pipe")[0]
    reader.join()
    assert code == 0 and len(read[0].splitlines()) == 2


def test_files_are_written_though_nobody_reads_the_report(run, monkeypatch):
    def closed(*args, **options):
        if options.get("file") is None:
            raise BrokenPipeError

    monkeypatch.setattr(evaluate, "print", closed, raising=False)
    run("--dataset", "mine.jsonl", "--split", "val", "--per_sample", "rows.jsonl")
    assert len(Path("rows.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("flags, words", [
    *((["--workers", value], ["--workers must be from 0 to 256"]) for value in ("-2", "100000")),
    *((["--batch_size", value], ["--batch_size must be from 1 to 4096"]) for value in ("0", "-64")),
    (["--workers", "1e3"], ["--workers"]), (["--batch_size", "9" * 400], ["a huge number"]),
    (["--data_root", "nowhere"], ["nowhere: there is no such folder"]),
    (["--data_root", "mine.jsonl"], ["there is no such folder"]),
    (["--split", "x\x1b[31m" * 100, "--dataset", "shapes"], ["shapes has no split"]),
    (["--per_sample", "no/rows.jsonl"], ["no/rows.jsonl", "folder"]),
    (["--per_sample", "x" * 300], ["xxx", "too long"]), (["--sheet", "no/sheet.png"], ["no/sheet.png", "folder"]),
    (["--sheet", "sheet.xyz"], ["sheet.xyz", ".png"]),
    (["--sheet", "both.png", "--per_sample", "both.png"], ["both.png: named twice"]),
    (["--sheet", "both.png", "--per_sample", "im/../both.png"], ["both.png: named twice"]),
    (["--per_sample", "mine.jsonl"], ["mine.jsonl", "would replace"]),
    (["--per_sample", "./im/../mine.jsonl"], ["would replace"]),
    (["--compare", "a", "b", "--per_sample", "rows.jsonl"], ["--compare writes no file"]),
    (["--compare", "a", "b", "--sheet", "sheet.png"], ["--compare writes no file"]),
    (["--compare", "a", "b", "--calibrate", "own.safetensors"], ["--compare writes no file"]),
], ids=lambda value: str(value)[:40])
def test_flags_that_are_refused_at_once(run, monkeypatch, flags, words):
    """Before the model is loaded; no file changes."""
    monkeypatch.setattr(evaluate, "load_hivg", None)
    before = Path("mine.jsonl").read_bytes()
    assert_fails(run("--dataset", "mine.jsonl", *flags), *words)
    assert Path("mine.jsonl").read_bytes() == before and sorted(os.listdir()) == ["im", "mine.jsonl"]


def test_weights_are_not_drawn_over(run, weights_file):
    before = weights_file.read_bytes()
    assert_fails(run("--dataset", "mine.jsonl", "--per_sample", weights_file), "would replace")
    assert weights_file.read_bytes() == before


@pytest.mark.parametrize("output, image", [("im/a.png", "im/a.png"), ("linked.png", "im/a.png"),
                                           ("im/train.png", "im/train.png"), ("im/empty.png", "im/empty.png")])
def test_images_are_not_drawn_over(run, output, image):
    """By none of their names; nor are those of other splits, or of rows that are left out."""
    os.link("im/a.png", "linked.png")
    rows = rows_of("mine.jsonl")
    for name, changes in (("train", {"split": "train"}), ("empty", {"expression": ""})):
        make_image().save(f"im/{name}.png")
        rows.append(rows[0] | {"image": f"im/{name}.png"} | changes)
    write_rows(Path("mine.jsonl"), rows)
    before = Path(output).read_bytes()
    for flag in ("--sheet", "--per_sample"):
        code, out, err = run("--dataset", "mine.jsonl", "--split", "val", flag, output)
        assert (code, out) == (2, "") and re.search(f"\nerror: {image}: {output} would replace the image.*\n$", err)
    assert Path(output).read_bytes() == before


@pytest.mark.parametrize("file", ["unc_val.pth", "instances.json"])
def test_published_annotations_are_not_written_over(run, file):
    write_list(Path("."), {"val": make_scenes(Path("."), 1)}, "unc")
    [annotations] = Path().rglob("unc_val.pth")
    path = annotations.with_name(file)
    path.touch()  # instances.json, which REFER's files have beside them
    before = path.read_bytes()
    assert_fails(run("--dataset", "unc", "--data_root", ".", "--split", "val", "--per_sample", path), file,
                 "replace the annotations")
    assert path.read_bytes() == before


def test_what_was_there_stays_if_the_work_fails(run):
    """Rows of before, and a link that leads nowhere."""
    Path("rows.jsonl").write_text("old\n")
    os.symlink("target.png", "link.png")
    outputs = ["--per_sample", "rows.jsonl", "--sheet", "link.png"]
    assert run("--dataset", "mine.jsonl", "--split", "nope", *outputs)[0] == 2
    assert Path("rows.jsonl").read_text() == "old\n"
    assert os.path.islink("link.png") and not os.path.exists("target.png")


@pytest.mark.parametrize("dataset", ["shapes", "mine.jsonl"])
def test_annotations_are_not_ignored(run, dataset):
    assert_fails(run("--dataset", dataset, "--annotations", "other.json"), "--annotations other.json", "leave it out")
