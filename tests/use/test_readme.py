"""Every command and every Python block of the READMEs, run in a folder of its own.

Files that a command names and that are not there are made small: a bundled image, the bundled weights, two evaluations.
Commands that need data, a GPU, the network or hours are only parsed: by --plan (train.py), or by the parser of the
program. A command of a program that is not known here fails.
"""

import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
from itertools import dropwhile, takewhile
from pathlib import Path
from socketserver import ThreadingTCPServer

import pytest
import torch
import typed
from makers import BUNDLED, ROOT, python
from torch.distributed.run import get_args_parser as torchrun_parser

from hivg import __main__ as ground
from hivg import weights
from hivg.bench import __main__ as bench
from hivg.data.drawn.scenes import DRAWN
from hivg.evaluate import __main__ as evaluate
from hivg.training import pretrain
from hivg.training.settings import settings_from_flags
from hivg.weights import __main__ as weights_program
from hivg.weights import download

pytestmark = pytest.mark.slow
PAGES = ["README.md", "weights/README.md", "notebooks/README.md", "hivg/data/README.md", "hivg/bench/README.md"]
SMALL = 4  # scenes of a split of `shapes`


# --- what is on a page ---


def blocks_of(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands_of(lines):
    """The commands in shell lines, each a list of words, without comments and redirections."""
    parts = [shlex.split(part, comments=True) for part in re.split(r"&&|\n", lines.replace("\\\n", " "))]
    return [list(takewhile(lambda word: word not in (">", ">>", "|"), words)) for words in parts if words]


def commands_of_page(page):
    """The commands of the shell blocks, and those within the text: `python ...` with at least one more word."""
    text = (ROOT / page).read_text(encoding="utf-8")
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    quoted = re.findall(r"`((?:\w+=\S+\s+)*(?:python|torchrun)\s[^`]+)`", prose)  # also over the end of a line
    lines = [*blocks_of(text, "bash"), *(" ".join(command.split()) for command in quoted)]
    return [words for part in lines for words in commands_of(part)]


# --- the rules, by program ---


def check_command(words, monkeypatch):
    """Run or parse one command in the current folder. Fails for a wrong one, and for a program that is not known."""
    words = list(dropwhile(re.compile(r"\w+=\S*").fullmatch, words))  # without VARIABLE=value in front
    program, *args = words
    try:
        if program in ("python", "python3"):
            check_python(args, monkeypatch)
        elif program == "torchrun":
            started = torchrun_parser().parse_args(args)
            check_python(["-m"] * started.module + [started.training_script, *started.training_script_args],
                         monkeypatch)
        elif program == "pip":
            check_pip(args, monkeypatch)
        elif words != [".", ".venv/bin/activate"] and program != "jupyter":
            pytest.fail(f"no rule for {shlex.join(words)!r}; add one to this file")
    except SystemExit as stop:  # of a parser
        assert not stop.code, f"{shlex.join(words)}: exit code {stop.code}"


def check_python(words, monkeypatch):
    rules = {"ground.py": run_ground, "train.py": plan_training, "-m venv": check_venv, "-m pip": check_pip,
             "-m pytest": check_pytest, "-m hivg.evaluate": run_evaluate, "-m hivg.weights": run_weights,
             "-m hivg.bench": parse_bench, "-m hivg.training.pretrain": parse_pretraining,
             "-m tests.typed": run_typed}
    n = 2 if words[0] == "-m" else 1
    program, args = " ".join(words[:n]), words[n:]
    if program in rules:
        rules[program](args, monkeypatch)
    elif n == 2:
        check_by_help(words[1], args, monkeypatch)
    else:
        pytest.fail(f"no rule for python {program}; add one to this file")


def run_ground(args, monkeypatch):
    images = args[: args.index("-e")] if "-e" in args else []
    for image in images:
        make_image(Path(image))
    make_weights(value_of(args, "--weights"))
    if "--page" in args:  # it would serve until Ctrl-C
        monkeypatch.setattr(ThreadingTCPServer, "serve_forever", lambda server: None)
        args = [*args, "--port", "0"]
    call(ground.main, args, monkeypatch)


def plan_training(args, monkeypatch):
    """The flags are accepted, and the stages printed; it needs no data. A resumed run is planned as a new one."""
    make_weights(value_of(args, "--finetune"))
    make_clip(value_of(args, "--clip"))
    args = [*without_flag(without_flag(args, "--resume"), "--plan"), "--plan"]
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def run_evaluate(args, monkeypatch):
    if "--compare" in args:
        for path in args[args.index("--compare") + 1 :]:
            make_rows(Path(path))
    dataset = value_of(args, "--dataset") or "shapes-wide"
    monkeypatch.setattr(sys, "argv", ["evaluate", *args])
    settings = evaluate.arguments()
    if dataset in DRAWN or "--compare" in args:
        split = settings.split or evaluate.DEFAULT_SPLITS[0]
        monkeypatch.setitem(DRAWN[dataset], split, (SMALL, DRAWN[dataset][split][1]))
        make_weights(value_of(args, "--weights"))
        call(evaluate.main, args, monkeypatch)


def run_weights(args, monkeypatch):
    command, *names = args
    if command == "fetch":
        assert len(names) == 1 and names[0] in download.FILES, f"nothing to fetch is called {names}"
    else:
        make_weights(names[0])
        call(weights_program.main, args, monkeypatch)


def parse_bench(args, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench", *args])
    bench.arguments()  # exits for flags and names that are not known


def parse_pretraining(args, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain", *without_flag(args, "--resume")])
    settings_from_flags(pretrain.Settings, "")


def run_typed(args, monkeypatch):
    assert args[-2] == "--scenes"
    found = python("-m", "tests.typed", "--help")
    assert not found.returncode, found.stderr  # it finds the project that is not installed
    monkeypatch.setattr(sys, "argv", ["typed", *args[:-1], "1"])
    typed.main()


def check_venv(args, monkeypatch):
    assert args == [".venv"]


def check_pip(args, monkeypatch):
    assert args[0] == "install"
    assert all((ROOT / name).is_file() for name in args if name.endswith(".txt"))


def check_pytest(args, monkeypatch):
    for name in args:
        assert not name.startswith("tests") or (ROOT / name.split("::")[0]).exists(), f"there is no {name}"


def check_by_help(module, args, monkeypatch):
    """Any other program of this project: it is there, and its --help knows the flags."""
    assert module.startswith("hivg.") and importlib.util.find_spec(module), f"no program is called {module}"
    lines = []
    monkeypatch.setattr(sys.stdout, "write", lines.append)
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    monkeypatch.undo()
    assert not stop.value.code
    for flag in re.findall(r"--\w[\w-]*", " ".join(args)):
        assert flag in "".join(lines), f"{module} has no {flag}"


def call(main, args, monkeypatch):
    """A program's main, which must not fail."""
    monkeypatch.setattr(sys, "argv", ["program", *args])
    assert not main()


def value_of(args, flag):
    return args[args.index(flag) + 1] if flag in args else None


def without_flag(args, flag):
    return [arg for arg in args if arg != flag]


# --- the files that commands name ---


def make_image(path):
    if path.suffix:
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "weights" / "example.png", path)
    else:
        make_image(path / "a.png")


def make_weights(name):
    """The bundled HiVG under a name, unless there is such a file. As a .pth its adapters are folded, as released."""
    if name and not Path(name).exists():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(BUNDLED, name)
        if name.endswith(".pth"):
            model = weights.load_hivg(BUNDLED)
            weights.save(name, model.merged(), model.info)


def make_clip(name):
    """The bundled CLIP under a name that is not that of a published one, whose sizes --plan knows without the file."""
    published = [Path(address).name for address, _ in download.FILES.values()]
    if name and Path(name).name not in published and not Path(name).exists():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "weights" / "clip-tiny.safetensors", name)


def make_state(name):
    """What a run resumes from, of which a page reads the weights alone."""
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    torch.save({"trained": weights.load_hivg(BUNDLED).state_dict()}, name)


def make_rows(path):
    row = {"image": "a.png", "expression": "cup", "target": [0, 0, 1, 1], "iou": 0.5}
    path.write_text(json.dumps(row) + "\n")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder like the project's, with copies of the bundled files, so that nothing of the project is written to."""
    shutil.copytree(ROOT / "weights", tmp_path / "weights", ignore=lambda _, names: [n for n in names if n[0] == "."])
    (tmp_path / "DIR").mkdir()  # the reader's data
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- the tests ---


@pytest.mark.parametrize("page", PAGES)
def test_commands(page, folder):
    commands = list(dict.fromkeys(map(tuple, commands_of_page(page))))  # each once, in order
    assert commands
    for words in commands:
        print(shlex.join(words))  # shown where the test fails
        with pytest.MonkeyPatch.context() as monkeypatch:
            check_command(words, monkeypatch)


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks(page, folder):
    """All in one namespace, in their order."""
    blocks = blocks_of((ROOT / page).read_text(encoding="utf-8"), "python")
    assert blocks or page not in ("README.md", "weights/README.md")
    names = {}
    for block in blocks:
        for path in re.findall(r'"([\w/.-]+\.safetensors)"', block):
            (make_clip if path.endswith("/clip.safetensors") else make_weights)(path)
        for path in re.findall(r'"([\w/.-]+/state\.pt)"', block):
            make_state(path)
        exec(compile(block, page, "exec"), names)


def test_the_printed_box_is_the_readmes(folder, capfd, monkeypatch):
    """The output that the README shows for `python ground.py`, but for the last digit of the numbers, in float32."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"^```\n(weights/example\.png .*?)^```", text, re.DOTALL | re.MULTILINE)[1]
    monkeypatch.chdir(ROOT)
    capfd.readouterr()
    machine = ["--device", "cpu", "--dtype", "float32"]
    call(ground.main, ["--output", str(folder / "drawn.png"), *machine], monkeypatch)
    printed = capfd.readouterr().out
    number = r"\d+\.\d+"
    assert re.sub(number, "N", printed) == re.sub(number, "N", shown)
    for a, b in zip(re.findall(number, printed), re.findall(number, shown), strict=True):
        assert float(a) == pytest.approx(float(b), abs=0.2)


@pytest.mark.parametrize("line", [
    "make all", "python solve.py", "python -m hivg.nothing", "python -m hivg.data check mine.jsonl --fast",
    "python train.py --batchsize 3", "torchrun --processes=2 train.py", "python -m hivg.evaluate --split nope",
    "python -m hivg.bench backward", "python -m hivg.weights fetch RN50", "python -m hivg.training.pretrain --stages 3",
    "python ground.py image.png",
])
def test_wrong_commands_are_found(line, folder, monkeypatch):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_command(shlex.split(line), monkeypatch)
