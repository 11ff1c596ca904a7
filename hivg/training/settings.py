"""Settings that are flags: a setting is declared once, with its default, a sentence of help, its choices or its range.

    @dataclass
    class Settings:
        batch_size: int = setting(32, "images in a batch", low=1, high=4096, group="optimization")

    s = settings_from_flags(Settings, __doc__)   # --batch_size 64; --help prints them by group
"""

import argparse
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import get_args

from hivg.training.checkpoint import load_state
from hivg.utils.cli import Parser

RUNS = Path("runs")  # every run has a folder in here, named by its --name


def setting(default, text, *, choices=None, low=None, high=None, length=None, group=None, resumable=False,
            of_model=False):
    """A field of a settings dataclass.

    default: its value when the flag is not given; the type of the field says what the flag takes. text: its help.
    choices: the only values allowed. low, high: the range of a number, or of each number of a tuple, both included.
    length: how many numbers a tuple must have.
    group: the heading in --help from this setting on. resumable: a resumed run may change it. of_model: a property of a
    new model, which a model loaded from a file brings with it.
    """
    metadata = {"text": text, "choices": choices, "low": low, "high": high, "length": length, "group": group,
                "resumable": resumable, "of_model": of_model}
    return field(default=default, metadata=metadata)


def names_with(settings, key):
    """The names of the settings declared with this property ("resumable" or "of_model")."""
    return {f.name for f in fields(settings) if f.metadata[key]}


def check_settings(settings):
    """Refuse at once what would fail hours later, or be ignored. Raises ValueError, one line with the flag."""
    if not settings.name:
        raise ValueError("--name is empty; give the run a name, that of its folder under runs/")
    for f in fields(settings):
        value = getattr(settings, f.name)
        choices = f.metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"--{f.name} must be one of {', '.join(map(str, choices))}, not {value!r:.60}")
        length = f.metadata["length"]
        if length and len(value) != length:
            raise ValueError(f"--{f.name} needs {length} numbers, not {len(value)}; --help names them")
        for number in value if isinstance(value, tuple) else (value,):
            if not in_range(number, f.metadata["low"], f.metadata["high"]):
                raise ValueError(f"--{f.name} must be {range_text(f)}, not {number}")


def in_range(number, low, high):
    """Whether low <= number <= high, where a bound that is None bounds nothing. NaN is in no range."""
    if low is None and high is None:
        return True
    return (low is None or number >= low) and (high is None or number <= high)


def range_text(f):
    """The range of a setting in words: "from 1 to 8", "1 or more", or ""."""
    low = f.metadata["low"]
    high = f.metadata["high"]
    if low is None and high is None:
        return ""
    if high is None or high >= 10**6:  # such a bound only keeps nonsense out
        return f"{low:g} or more"
    return f"from {low:g} to {high:g}"


def help_text(f):
    """A setting's help: its sentence, its range, its default."""
    if f.type is bool:
        return f.metadata["text"]
    default = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
    notes = [range_text(f), f"default: {default or 'none'}"]
    return f"{f.metadata['text']} ({'; '.join(note for note in notes if note)})"


def add_flags(parser, settings):
    """Give the parser a flag for every setting of the dataclass, under the headings of their groups."""
    group = parser
    for f in fields(settings):
        assert f.default is not MISSING, f"{f.name} has no default"
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        options = {"dest": f.name, "default": argparse.SUPPRESS}
        if f.type is bool:  # --x and --no_x; the help shows the one that is not the default
            yes_help = argparse.SUPPRESS if f.default else help_text(f)
            no_help = f"without {help_text(f)}" if f.default else argparse.SUPPRESS
            group.add_argument(f"--{f.name}", action="store_true", help=yes_help, **options)
            group.add_argument(f"--no_{f.name}", action="store_false", help=no_help, **options)
            continue
        is_tuple = isinstance(f.default, tuple)
        options["type"] = get_args(f.type)[0] if is_tuple else f.type
        options["metavar"] = "|".join(f.metadata["choices"]) if f.metadata["choices"] else options["type"].__name__
        if is_tuple:
            options["nargs"] = "+"
        group.add_argument(f"--{f.name}", help=help_text(f), **options)


def settings_from_flags(settings, description, preset_of=None):
    """Settings from the command line. A resumed run takes its settings from its state and refuses others.

    settings: the dataclass. preset_of: a function of the --preset given that returns its settings, {name: value}. Ends
    the program with one line for flags that are unknown or do not fit.
    """
    parser = Parser(description=description)
    add_flags(parser, settings)
    given = {}
    for name, value in vars(parser.parse_args()).items():
        given[name] = tuple(value) if isinstance(value, list) else value
    new = sorted(given.keys() & names_with(settings, "of_model"))
    if given.get("finetune"):
        if new:
            parser.error(f"--finetune keeps the model as it is in its file; leave out --{', --'.join(new)}")
        for name in ("epochs", "lr", "accumulate"):
            if len(given.get(name, ())) > 1:
                parser.error(f"--finetune is one stage; give --{name} one number")
    preset = preset_of(given["preset"]) if "preset" in given else {}
    if not given.get("resume"):
        return settings(**(preset | given))

    run = RUNS / (preset | given).get("name", settings.name)
    saved = load_state(run)["settings"]
    if saved.keys() != {f.name for f in fields(settings)}:
        raise ValueError(f"{run}/state.pt: a state of another version of the program; train again under another --name")
    free = names_with(settings, "resumable")
    changed = [f"--{name} {value} (was {saved.get(name)})" for name, value in given.items()
               if name not in free and value != saved.get(name)]
    if changed:
        parser.error(f"--resume continues {run} with its own settings; it cannot change {', '.join(changed)}")
    return settings(**(saved | {name: value for name, value in given.items() if name in free}))
