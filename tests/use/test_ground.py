"""python ground.py: what it prints, draws and refuses."""

import json
import os
import re
import sys
import time
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch
from makers import ROOT, calls_of, ended, make_clip, make_hivg, python, raising
from makers_use import BAD_IMAGES, TEXTS, assert_fails, make_image, write_cut
from PIL import Image, ImageFile

from hivg import __main__ as ground
from hivg import weights


@pytest.fixture
def run(monkeypatch, capfd, tmp_path, weights_file):
    """python ground.py ARGS in this process, in a folder with a.png -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    make_image().save("a.png")

    def run(*args, model=weights_file, device="cpu", warnings=False):
        command = ["ground.py", "--dtype", "float32", "--weights", model, "--device", device, *args]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        code, out, err = ended(capfd, ground.start)
        if not warnings:  # the tokenizer here knows only a few words
            err = "".join(line for line in err.splitlines(keepends=True) if not line.startswith("warning: "))
        return code, out, err

    return run


def pixels(path):
    return np.asarray(Image.open(path))


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


def assert_row(line, grounder, image, texts):
    """A line of --json: exactly the keys promised, and the values of the Python interface."""
    row = json.loads(line)
    assert list(row) == ["image", "width", "height", "results"] and row["image"] == image
    assert (row["width"], row["height"]) == Image.open(image).size and len(row["results"]) == len(texts)
    for entry, result in zip(row["results"], grounder.ground(image, texts)):
        assert list(entry) == ["label", "score", "box"] and list(entry["box"]) == ["xmin", "ymin", "xmax", "ymax"]
        assert entry["label"] == result.expression and entry["score"] == pytest.approx(result.score, abs=1e-6)
        assert list(entry["box"].values()) == pytest.approx(result.box, abs=1e-3)
        assert all(type(v) is float for v in (entry["score"], *entry["box"].values()))


def make_folder(name, *files):
    """A folder with copies of the image."""
    Path(name).mkdir()
    for file in files:
        make_image().save(Path(name) / file)


# --- good input ---


def test_json(run, grounder):
    code, out, err = run("a.png", "-e", TEXTS[0], "--expression", "星", "--json")
    assert code == 0 and out.endswith("\n")
    assert_row(out, grounder, "a.png", [TEXTS[0], "星"])  # fails unless stdout is a single JSON object
    assert names_in(".") == ["a.png"]  # draws only with --output
    code, out, err = run("a.png", "-e", TEXTS[0], "--json", "--output", "drawn/b.png")
    assert code == 0 and json.loads(out)["image"] == "a.png"
    assert Image.open("drawn/b.png").size[0] >= 200


def test_json_of_several(run, grounder):
    make_folder("more", "c.jpg", "b.PNG", "d.gif")
    Path("more/notes.txt").write_text("not an image, and no image's name")
    Path("more/paper.pdf").write_text("Pillow writes this kind, but cannot read it")
    code, out, err = run("more", "a.png", "-e", TEXTS[0], "--json")
    assert code == 0 and "error" not in err
    for line, image in zip(out.splitlines(), ["more/b.PNG", "more/c.jpg", "more/d.gif", "a.png"], strict=True):
        assert_row(line, grounder, image, TEXTS[:1])


def test_a_folder_of_other_files(run, capfd):
    """What Pillow knows by name but cannot read is left out, as hidden files are, and told."""
    make_folder("more", "a.png")
    Path("more/._a.png").write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X        ")
    for name in ("film.mpg", "numbers.h5", "weather.grib", "drawing.wmf", "figure.eps"):
        Path("more", name).write_bytes(b"no picture")
    Path("more/no.png").mkdir()
    assert ground.list_images(["more"]) == ["more/a.png"]
    assert capfd.readouterr().err == ("warning: more: left out 6 of 7, which by their names are no images that can be "
                                      "read, for instance drawing.wmf\n")
    for kind, (read, _) in Image.OPEN.items():
        if isinstance(read, type) and issubclass(read, ImageFile.StubImageFile):
            assert kind in ground.UNREADABLE


def test_words_and_drawing(run, grounder):
    code, out, _ = run("a.png", "-e", "star", "-e", "circle")
    number = r"\d+\.\d"
    box = rf"box \({number}, {number}, {number}, {number}\), score \d\.\d\d, uncalibrated\n"
    assert code == 0 and re.fullmatch(rf"a.png \(200 x 120\)\n  star: {box}  circle: {box}", out)
    plain = pixels("grounded.png")
    run("a.png", "-e", "star", "-e", "circle", "--mask", "--output", "dimmed.png")
    assert pixels("dimmed.png")[:120, :200].mean() < plain[:120, :200].mean()


@pytest.mark.parametrize("words, heatmap", [
    (["a.png", "-e", "star", "--heatmap"], "tokens"), (["--heatmap", "a.png", "-e", "star"], "tokens"),
    (["a.png", "--heatmap", "-e", "star"], "tokens"), (["a.png", "-e", "star", "--heatmap", "tokens"], "tokens"),
    (["a.png", "-e", "star", "--heatmap=attention"], "attention"),
    (["--heatmap", "attention", "a.png", "-e", "star"], "attention"),
    (["--heatmap", "words", "a.png", "-e", "star"], "words")], ids=lambda value: "".join(value))
def test_heatmap(run, grounder, words, heatmap):
    assert run(*words)[0] == 0
    result = grounder.ground("a.png", "star", attention=True)
    np.testing.assert_array_equal(pixels("grounded.png"), np.asarray(result.draw(heatmap)))


def test_drawings_of_several(run):
    """A file each, also for two images of one name."""
    make_folder("more", "a.png", "b.png", "b.jpg")
    assert run("more", "-e", "star")[0] == 0
    assert names_in("grounded") == ["a.png", "b-2.png", "b.png"]
    assert run("a.png", "more/a.png", "-e", "star", "--output", "out")[0] == 0
    assert len(names_in("out")) == 2
    # a folder by its slash, although there is one image and no such folder yet
    assert run("a.png", "-e", "star", "--output", "new/deep/")[0] == 0
    assert names_in("new/deep") == ["a.png"]


def test_nothing_is_drawn_over(run):
    """Neither the image itself nor a mask."""
    make_folder("m", "b.png", "b-1.png")
    before = Path("a.png").read_bytes()
    assert_fails(run("a.png", "-e", "star", "--output", "a.png"), "a.png", "--output")
    assert_fails(run("a.png", "m/b.png", "-e", "star", "--output", "."), "a.png", "--output")
    assert_fails(run("a.png", "-e", "star", "--save_masks", "m", "--output", "./m/a-1.png"), "--save_masks")
    assert_fails(run("m", "-e", "star", "--save_masks", "out", "--output", "out"), "--save_masks")
    assert Path("a.png").read_bytes() == before


def test_each_of_many_files_is_looked_at_once(run, monkeypatch):
    """Not once for each pair of an image and a file to write."""
    files = [Path(f"{number}.png") for number in range(100)]
    for path in files:
        path.touch()
    looked_at = calls_of(monkeypatch, os, "stat")
    ground.refuse_to_overwrite(files[:50], files[50:])
    assert len(looked_at) <= 100
    with pytest.raises(ValueError, match="7.png: 7.png would replace the image"):
        ground.refuse_to_overwrite(files[:50], [*files[50:], None, Path("new.png"), Path("7.png")])
    ground.refuse_to_overwrite(["missing.png", "\0"], [Path("new.png"), None])


def test_names_of_many_images():
    start = time.process_time()
    names = ground.names_of([f"{number}/a.png" for number in range(5000)] + ["a-2.jpg"])
    assert time.process_time() - start < 2
    assert names[:3] == ["a", "a-2", "a-3"] and names[-1] == "a-2-2" and len(set(names)) == 5001


def test_names_that_are_one_file_on_other_systems():
    """On macOS and Windows A.png is a.png, and an accent may be a letter of its own."""
    assert ground.names_of(["1/A.png", "2/a.png", "caf\u00e9.png", "cafe\u0301.png"]) == [
        "A", "a-2", "caf\u00e9", "cafe\u0301-2"]
    with pytest.raises(ValueError, match="replace a mask"):
        ground.refuse_to_overwrite([], [Path("out/a-1.png"), Path("out/A-1.png")])


@pytest.mark.parametrize("name, args, named", [
    ("b.png", ["a.png", "-e", "star", "b.png", "--json"], "b.png"),  # on both sides of the expression
    ("-e.png", ["-e", "star", "--json", "--", "a.png", "-e.png"], "./-e.png")])
def test_images_anywhere_in_the_command(run, name, args, named):
    make_image().save(name)
    code, out, _ = run(*args)
    assert code == 0 and [json.loads(line)["image"] for line in out.splitlines()] == ["a.png", named]


def test_an_image_from_a_pipe(run):
    """Of another program, `cat a.png |` or `<(cat a.png)`: a path that can be read once."""
    os.mkfifo("pipe")
    writer = Thread(target=lambda: Path("pipe").write_bytes(Path("a.png").read_bytes()))
    writer.start()
    code, out, _ = run("pipe", "-e", "star", "--json")
    writer.join()
    assert code == 0 and json.loads(out)["results"] == json.loads(run(*STAR, "--json")[1])["results"]


def test_dtype(run):
    exact = run("a.png", "-e", "star", "--json")[1]
    code, rough, _ = run("a.png", "-e", "star", "--json", "--dtype", "bfloat16")
    assert code == 0 and json.loads(rough) != json.loads(exact)


def test_nothing_found(run):
    """Below --min_score: said in words, null in --json, and not drawn."""
    both = ["a.png", "-e", "star", "-e", "red circle"]
    row = json.loads(run(*both, "--json")[1])
    scores = [entry["score"] for entry in row["results"]]
    assert scores[0] != scores[1]
    between = str(sum(scores) / 2)
    found = [entry if entry["score"] == max(scores) else entry | {"box": None} for entry in row["results"]]
    assert json.loads(run(*both, "--json", "--min_score", between)[1]) == row | {"results": found}
    code, out, _ = run(*both, "--min_score", between, "--output", "one.png")
    assert code == 0 and out.count("nothing found, score 0.") == 1 and out.count("box (") == 1
    # no mask is written or drawn either; a heat map is drawn
    run("a.png", "-e", "star", "--min_score", "1", "--output", "none.png", "--mask", "--save_masks", "out")
    assert (pixels("none.png") == pixels("a.png")).all()
    mask = Image.open("out/a-1.png")
    assert (mask.mode, mask.size) == ("L", (200, 120)) and not np.asarray(mask).any()
    run("a.png", "-e", "star", "--min_score", "1", "--output", "none.png", "--heatmap")
    assert (pixels("none.png")[:120, :200] != pixels("a.png")).any()


def test_masks_as_files(run, grounder):
    make_folder("more", "a.png", "b.jpg")
    code, _, _ = run("more", "a.png", "-e", "star", "-e", "circle", "--json", "--save_masks", "out")
    assert code == 0
    assert names_in("out") == ["a-1.png", "a-2-1.png", "a-2-2.png", "a-2.png", "b-1.png", "b-2.png"]
    mask = grounder.ground("a.png", "circle").mask
    np.testing.assert_array_equal(pixels("out/a-2-2.png"), np.where(mask > 0.5, 255, 0))
    assert Image.open("out/a-2-2.png").mode == "L" and 0.01 < (mask > 0.5).mean() < 0.99  # else nothing was tested


def test_masks_as_run_lengths(run, grounder):
    code, out, _ = run("a.png", "-e", "star", "-e", "circle", "--json", "--rle")
    assert code == 0
    for entry, result in zip(json.loads(out)["results"], grounder.ground("a.png", ["star", "circle"]), strict=True):
        assert list(entry) == ["label", "score", "box", "mask"]
        assert entry["mask"] == result.mask_rle() and entry["mask"]["size"] == [120, 200]
    [entry] = json.loads(run("a.png", "-e", "star", "--json", "--rle", "--min_score", "1")[1])["results"]
    assert entry["box"] is None and entry["mask"] is None  # nothing is found


def test_warnings_are_told_once(run):
    make_folder("more", "a.png", "b.png")
    code, out, err = run("more", "-e", "a !", "-e", "zyxwvu", "-e", "zyxwvu", "--json", warnings=True)
    assert code == 0 and len(out.splitlines()) == 2 and err.count("warning: ") == 1 and "zyxwvu" in err


# --- bad input ---


@pytest.mark.parametrize("name", ["missing.png", "cut.jpg", "huge.png", "x" * 300 + ".png"], ids=lambda name: name[:9])
def test_bad_image(run, name):
    write, word = BAD_IMAGES[name]
    write(Path(name))
    assert_fails(run(name, "-e", "star"), name[:20], word)
    assert_fails(run(name, "-e", "star", "--json"), name[:20], word)


def test_folder_with_a_bad_image(run, grounder):
    """It is reported, the others are grounded, exit code 1."""
    make_folder("more", "a.png", "c.png")
    write_cut(Path("more/b.png"))
    code, out, err = run("more", "-e", "star", "--json")
    assert code == 1 and re.fullmatch(r"error: more/b.png: [^\n]+\n", err)
    for line, name in zip(out.splitlines(), ("more/a.png", "more/c.png"), strict=True):
        assert_row(line, grounder, name, ["star"])


STAR = ["a.png", "-e", "star"]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize("args, options, word", [
    (["a.png", "-e", ""], {}, "expression"), (["a.png", "-e", "star", "-e", "  "], {}, "expression"),
    (["a.png"], {}, "no expression"), (["-e", "star"], {}, "no image"), (["", "-e", "star"], {}, "'': "),
    (["folder", "-e", "star"], {}, "folder"), ([*STAR, "--fast"], {}, "--fast"),
    ([*STAR, "--wieghts", "x"], {}, "arguments: --wieghts x; did you mean --weights? --help lists the flags"),
    (["-", "-e", "star"], {}, "-: there is no such file; to read a program's output, name /dev/stdin"),
    (["a.png", "-e", "the", "red", "star"], {}, "red: there is no such file; check the path, and put an expression of"),
    ([*STAR, "--out", "x.png"], {}, "--out"),  # no abbreviations
    ([*STAR, "--dtype", "int8"], {}, "int8"), ([*STAR, "--heatmap=rtcc"], {}, "attention"),
    (["--heatmap", "attn", *STAR], {}, "--heatmap: invalid choice: 'attn'"), ([*STAR, "--rle"], {}, "--json"),
    ([*STAR, "--min_score", "2"], {}, "--min_score"), ([*STAR, "--min_score", "nan"], {}, "--min_score"),
    (["a.png", "-e"], {}, "expected one argument"), ([*STAR, "--output", ""], {}, "must name a file or folder"),
    ([*STAR, "--json", "--mask"], {}, "give --output"), ([*STAR, "--json", "--heatmap"], {}, "give --output"),
    ([*STAR, "--save_masks", ""], {}, "must name a file or folder"), (STAR, {"model": "folder"}, "folder: is a folder"),
    (STAR, {"device": "foo"}, "foo"), (STAR, {"device": "cuda:99"}, "device cuda:99 is not available"),
    pytest.param(STAR, {"device": "cuda"}, "use --device cpu", marks=NO_GPU),
    (STAR, {"model": "missing.safetensors"}, "missing.safetensors"), (STAR, {"model": "a.png"}, "a.png"),
    (STAR, {"model": "clip.safetensors"}, "clip.safetensors"),
    ([], {"model": "missing.safetensors"}, "missing.safetensors"),
    ([*STAR, "--output", "drawn"], {}, "drawn: its suffix"), ([*STAR, "--save_masks", "a.txt"], {}, "a.txt: is a file"),
    (["a.png", *STAR, "--output", "a.txt"], {}, "a.txt: is a file, a folder is needed"),
    ([*STAR, "--output", "drawn.xyz"], {}, "drawn.xyz"), ([*STAR, "--output", "a.psd"], {}, "a.psd"),
    ([*STAR, "--heatmap", "words", "--mask"], {}, "two drawings"),
], ids=str)
def test_bad_arguments(run, args, options, word):
    Path("folder").mkdir()
    Path("a.txt").write_text("of somebody")
    weights.save("clip.safetensors", make_clip(dtype=torch.float32))
    assert_fails(run(*args, **options), word)
    assert not Path("grounded.png").exists()


def test_a_terminal_obeys_nothing(run):
    """Of an expression or of the name of a file in a folder."""
    make_folder("more", "a\x1b[31m.png")
    code, out, err = run("more", "-e", "star\x1b[31m\n red", warnings=True)
    assert code == 0 and "\x1b" not in out + err and "\\x1b[31m.png" in out and len(out.splitlines()) == 2


def test_folder_that_cannot_be_listed(run, monkeypatch):
    Path("folder").mkdir()
    monkeypatch.setattr(Path, "iterdir", raising(PermissionError(13, "Permission denied")))
    assert_fails(run("folder", "-e", "star"), "folder: cannot be listed (Permission denied)")


def test_a_drawing_that_cannot_be_written(run):
    code, _, err = run("a.png", "-e", "star", "--output", "a.png/b.png")
    assert code == 2 and re.fullmatch(r"error: [^\n]+\n", err) and "a.png/b.png" in err


@pytest.mark.parametrize("args", [[], ["--json"]])
def test_weights_that_are_damaged(run, args):
    """They load, and give boxes that are not finite."""
    broken = make_hivg(dtype=torch.float32)
    broken.reg_token.data.fill_(3e38)  # a float32, yet too large to compute with
    weights.save("nan.safetensors", broken)
    assert_fails(run("a.png", "-e", "star", *args, model="nan.safetensors"), "weights are damaged")


# --- in processes of its own ---


@pytest.mark.slow
def test_process_of_its_own(run, weights_file, grounder):
    """Also where the output can hold nothing but ASCII."""
    make_folder("more", "a.png")
    Path("more/b.png").write_bytes(b"")
    done = python(ROOT / "ground.py", "more", "-e", "星", "--json", "--weights", weights_file, "--device", "cpu",
                  "--dtype", "float32", cwd=".", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 1 and re.fullmatch(r"error: more/b.png: [^\n]+\n", done.stderr)
    assert_row(done.stdout, grounder, "more/a.png", ["星"])


def test_start_imports_no_compiler():
    """torch._dynamo and sympy take a second, a third of the whole command; nothing here needs them."""
    code = ("import sys, torch; before = set(sys.modules); from hivg.__main__ import main; "
            "main(); print(*{'torch._dynamo', 'sympy', 'triton'} & (set(sys.modules) - before))")
    done = python("-c", code, "--json", "--device", "cpu")
    assert (done.returncode, done.stdout.splitlines()[1:]) == (0, [""]), done.stderr + done.stdout
