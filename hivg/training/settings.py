"""Settings that are flags: each is declared once, with its default, its help, and its choices or range.

    @dataclass
    class Settings(RunSettings):
        patience: int = setting(3, "epochs without progress before it stops", low=1, group="Optimization")

    s = settings_from_flags(Settings, __doc__)   # --patience 5; --help prints the flags by group
"""

import argparse
import math
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import get_args

from hivg.training.checkpoint import load_state
from hivg.utils.cli import DTYPES, Parser
from hivg.utils.messages import quoted

RUNS = Path("runs")  # every run has a folder in here, named by its --name
GROUPS = ("The run", "Data", "Model", "Optimization", "Machine")  # the headings of --help, in their order


def setting(default, text, *, group=None, choices=None, low=None, high=math.inf, resumable=False, of_model=False):
    """A field of a settings dataclass.

    default: its value without the flag. Where that is a dataclass, the flag takes NAME=VALUE pairs for its fields.
    text: the help. group: one of GROUPS, from this setting on. choices: the only values allowed. low, high: the
    smallest and the largest value of a number, or of each of several. resumable: --resume may change it. of_model: a
    property of a new model, so it does not go with --finetune.
    """
    metadata = {"text": text, "group": group, "choices": choices, "low": low, "high": high, "resumable": resumable,
                "of_model": of_model}
    return field(default=default, metadata=metadata)


@dataclass
class RunSettings:
    """The settings that every training has."""

    name: str = setting("run", "the run's folder under runs/", group="The run")
    resume: bool = setting(False, "continue an interrupted run from its last saved state", resumable=True)
    save_minutes: float = setting(2.0, "save the state every so many minutes", low=0, high=1e4, resumable=True)
    seed: int = setting(0, "seed of all random numbers", low=0, high=2**31)

    workers: int = setting(-1, "processes that prepare the data; -1 = automatic", low=-1, high=256, group="Data",
                           resumable=True)

    optimizer: str = setting("muon", "muon (for matrices, adamw for the rest) or adamw", choices=("muon", "adamw"),
                             group="Optimization")
    batch_size: int = setting(32, "samples in a batch, over all processes", low=1, high=10**6)
    warmup_steps: int = setting(100, "steps in which the learning rate rises, at most half of a stage", low=0,
                                high=10**9)
    weight_decay: float = setting(1e-4, "weight decay of all trained parameters", low=0, high=1)
    clip_grad: float = setting(1.0, "largest norm of the gradient; inf = no clipping", low=1e-12, high=float("inf"))

    device: str = setting("auto", "auto, cpu or cuda", group="Machine", resumable=True)
    dtype: str = setting("auto", "dtype of the model's products; auto = bfloat16 where the hardware is fast at it",
                         choices=DTYPES)
    compile: bool = setting(False, "speed the model up with torch.compile", resumable=True)

    def __post_init__(self):
        """Refuse at once what would fail hours later, or be ignored. Raises ValueError, one line with the flag."""
        folder_of(self.name)
        for f in fields(self):
            value = getattr(self, f.name)
            if is_dataclass(f.default) and isinstance(value, dict):  # from a saved state
                if value.keys() != vars(f.default).keys():  # of a version with other fields
                    raise ValueError(f"--{f.name} must name {', '.join(vars(f.default))}")
                value = type(f.default)(**value)
                setattr(self, f.name, value)
            choices = f.metadata["choices"]
            kind = (float, int) if f.type is float else type(f.default)
            if not isinstance(value, kind):
                raise ValueError(f"--{f.name} must be of type {type(f.default).__name__}, not {value!r:.60}")
            if choices and value not in choices:
                raise ValueError(f"--{f.name} must be one of {', '.join(choices)}, not {value!r:.60}")
            numbers = vars(value).values() if is_dataclass(value) else value if isinstance(value, tuple) else [value]
            for number in numbers:
                if range_text(f) and not f.metadata["low"] <= number <= f.metadata["high"]:  # NaN is in no range
                    raise ValueError(f"--{f.name} must be {range_text(f)}, not {number}")


def folder_of(name):
    """runs/NAME. Raises ValueError for a name that is not that of a folder below runs/."""
    path = Path(name)
    if not name.isprintable() or not path.parts or path.anchor or ".." in path.parts:
        problem = f"{quoted(name)} is not the name of a folder below runs/" if name else "is empty"
        raise ValueError(f"--name {problem}; give it letters and digits")
    return RUNS / path


def range_text(f):
    """The range of a setting in words: "from 1 to 8", "1 or more", or "" for one without."""
    low = f.metadata["low"]
    high = f.metadata["high"]
    if low is None:
        return ""
    return f"{low:g} or more" if high >= 10**6 else f"from {low:g} to {high:g}"  # a bound so large only stops nonsense


def help_text(f):
    """A setting's help: its sentence, its range, its default."""
    if f.type is bool:
        return f.metadata["text"]
    default = f.default
    if is_dataclass(default):
        default = [f"{name}={value:g}" for name, value in vars(default).items()]
    if isinstance(default, list | tuple):
        default = " ".join(map(str, default))
    notes = [range_text(f), f"default: {default}" if str(default) else ""]
    notes = "; ".join(note for note in notes if note)
    return f"{f.metadata['text']} ({notes})" if notes else f.metadata["text"]


def pair_of(kind):
    """A parser of NAME=VALUE for the fields of a dataclass of numbers -> (name, value)."""
    def pair(text):
        name, _, value = text.partition("=")
        if name not in kind.__dataclass_fields__:
            raise argparse.ArgumentTypeError(f"{text!r:.60} is none of {', '.join(kind.__dataclass_fields__)}=NUMBER")
        try:
            return name, float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r:.60} gives {name} no number; write {name}=1") from None
    return pair


def add_flags(parser, settings):
    """Give the parser a flag for every setting of the dataclass, under the headings of their groups."""
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    title = GROUPS[0]
    for f in fields(settings):
        title = f.metadata["group"] or title
        group = groups[title]
        options = {"dest": f.name, "default": argparse.SUPPRESS}
        if f.type is bool:  # --x and --no_x; the help shows the one that is not the default
            yes_help = argparse.SUPPRESS if f.default else help_text(f)
            no_help = f"without {help_text(f)}" if f.default else argparse.SUPPRESS
            group.add_argument(f"--{f.name}", action="store_true", help=yes_help, **options)
            group.add_argument(f"--no_{f.name}", action="store_false", help=no_help, **options)
            continue
        if is_dataclass(f.default):
            options |= {"type": pair_of(f.type), "metavar": "NAME=VALUE", "nargs": "+"}
        elif isinstance(f.default, tuple):
            options |= {"type": get_args(f.type)[0], "metavar": get_args(f.type)[0].__name__, "nargs": "+"}
        else:
            options |= {"type": f.type, "metavar": "|".join(f.metadata["choices"] or [f.type.__name__])}
        group.add_argument(f"--{f.name}", help=help_text(f), **options)


def settings_from_flags(settings, description, defaults_of=None):
    """Settings from the command line. A resumed run takes its settings from its state and refuses others.

    settings: the dataclass. defaults_of: None, or a function of the flags given, {name: value}, and the dataclass that
    returns the defaults they bring along, as a --preset does. Ends the program with one line for flags that are unknown
    or do not fit.
    """
    parser = Parser(description=description)
    add_flags(parser, settings)
    given = vars(parser.parse_args())
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    defaults = {f.name: f.default for f in fields(settings)}
    if defaults_of and not (given.get("resume") and "name" in given):
        defaults |= defaults_of(given, settings)
    if not given.get("resume"):
        return settings(**with_flags(defaults, given))

    run = folder_of(given.get("name", defaults["name"]))
    state = load_state(run)["settings"]
    try:
        saved = vars(settings(**state))
    except (TypeError, ValueError):  # a setting that is unknown, or not what it may be
        saved = {}
    if state.keys() != saved.keys():
        raise ValueError(f"{run}/state.pt: a state of another version of the program, or of another one "
                         "(train.py, hivg.training.pretrain); train again under another --name")
    wanted = with_flags(saved, given)
    free = {f.name for f in fields(settings) if f.metadata["resumable"]}
    changed = [f"{as_typed(name, wanted[name], saved[name])} (was {as_typed(name, saved[name], wanted[name])})"
               for name in given
               if name not in free and wanted[name] != saved[name]]
    if changed:
        parser.error(f"--resume continues {run} with its own settings; it cannot change {', '.join(changed)}")
    return settings(**wanted)


def as_typed(name, value, other):
    """A setting as it is typed, with its flag; of pairs those that differ from another value's."""
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no_{name}"
    if is_dataclass(value):
        value = [f"{term}={number:g}" for term, number in vars(value).items() if number != getattr(other, term)]
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, tuple | list) else value}"


def with_flags(values, given):
    """The values with those of the flags in their place; pairs NAME=VALUE replace some fields of theirs."""
    values = dict(values)
    for name, value in given.items():
        if is_dataclass(values[name]):
            value = replace(values[name], **dict(value))
        values[name] = value
    return values
