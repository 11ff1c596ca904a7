"""Damaged files by the thousand: `PYTHONPATH=.:tests python -m fuzz [--inputs N] [--seed N]`.

Valid weights, merge tables, annotations and images are damaged at random, in their bytes and in what they say, and
read. Each must give a result, or a ValueError of one line: no other error, no warning, no line that is long or would
move a terminal, no crash, not more than SECONDS, not more memory than MEGABYTES. The process ends with 1 and the
damaged file is kept where one does not; with the signal that killed it if one crashes it.
"""

import argparse
import io
import json
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import torch
from fuzz_seeds import write_annotations, write_images, write_tables, write_weights
from makers import raising
from makers_limits import limit

from hivg import weights
from hivg.data.augment import Augment
from hivg.data.batches import SampleTensors
from hivg.data.images import open_image, open_published, upright_size
from hivg.data.published.check import splits_of
from hivg.data.published.reading import Report, read_samples
from hivg.tokenizer import Tokenizer

SECONDS = 20  # for one input, on a busy machine
MEGABYTES = 700  # more than at the start
ODD = [None, True, 0, -1, 1, 2**31, 2**63, 10**30, 10**400, 1e308, float("nan"), float("inf"), "", " ", "a", "\0",
       "\ud800", "\x1b[2J", "\u2028", "x" * 5000, [], {}, [[]], [None] * 5, {"a": [1]}, "../..", "9" * 5000]


# ---- damage

def damage_bytes(rng, data, others):
    """Some bytes changed, lost, doubled, or from another file."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        at = rng.randrange(len(data) + 1)
        if rng.random() < 0.4:
            at = min(at, rng.randrange(200))  # headers are at the start
        size = rng.choice((1, 1, 2, 4, 8, 100))
        kind = rng.randrange(7)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at : at + size] = rng.randbytes(size)
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at:at] = data[at : at + size] * rng.choice((1, 3, 50))
        elif kind == 4:
            data[at : at + 4] = struct.pack("<I", rng.choice((0, 2**31 - 1, 2**32 - 1, 2**28, 1)))
        elif kind == 5:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            data[at : at + size] = other[start : start + size]
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def damage_json(rng, value):
    """One value somewhere in it, changed, lost or doubled."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if rng.random() < 0.1:
            del value[key]
        else:
            value[key] = damage_json(rng, value[key])
        return value
    if isinstance(value, list) and rng.random() < 0.3:
        return value * 2
    return rng.choice(ODD)


def damage(rng, name, data, others):
    """A damaged copy of a valid file: its bytes, or what it says with all checksums and lengths right."""
    if rng.random() < 0.35:
        return damage_bytes(rng, data, others)
    if zipfile.is_zipfile(io.BytesIO(data)):
        return damage_zip(rng, data, others)
    if data[8:9] == b"{":
        return damage_safetensors(rng, data)
    if name.endswith((".json", ".jsonl")):
        lines = data.decode().split("\n")
        number = rng.randrange(len(lines))
        if lines[number]:
            lines[number] = json.dumps(damage_json(rng, json.loads(lines[number])))
        return "\n".join(lines).encode()
    return damage_bytes(rng, data, others)


def damage_zip(rng, data, others):
    """The pickle of a zip is damaged, its checksum right."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(result, "w") as target:
        for entry in source.namelist():
            content = source.read(entry)
            if entry.endswith("data.pkl") or rng.random() < 0.01:
                content = damage_bytes(rng, content, others)
            target.writestr(entry, content)
    return result.getvalue()


def damage_safetensors(rng, data):
    """Its header is damaged, or the JSON in its metadata, the header's length right."""
    size, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    metadata = header.get("__metadata__", {})
    name = rng.choice(("config", "config", "config", "info"))
    if name in metadata and rng.random() < 0.8:
        metadata[name] = json.dumps(damage_json(rng, json.loads(metadata[name])))
    else:
        header = damage_json(rng, header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


# ---- reading

def is_line(text):
    return text.isprintable() and len(text) <= 300


def read_table(path):
    Tokenizer.from_file(path)("the red cup")


def read_annotations(path):
    """The samples, every line of the report, and the tensors of a few of them."""
    own = path.suffix == ".jsonl"
    dataset = path if own else "refcoco"
    annotations = None if own else path
    report = Report()
    try:
        for split in splits_of(dataset, path.parent, annotations)[-2:]:  # not train: refused without a split
            samples = read_samples(path.parent, dataset, split, annotations, report)
            tensors = SampleTensors(samples[:6], 32, masks="segmentation", augment=random.choice((None, Augment())))
            for i in range(len(samples[:6])):
                tensors[i]
    finally:
        for line in report.lines():
            check_line(line)


def read_image(path):
    for read in (open_image, open_published, upright_size):
        try:
            read(path)
        except ValueError as error:
            check_line(str(error))
    assert open_image(path).size == upright_size(path)


class Wrong(Exception):
    """Not how a file that cannot be used is to be met."""


def check_line(line):
    if not is_line(line):
        raise Wrong(f"no short plain line: {line[:400]!r}")


# ---- the run

KINDS = {  # name: (the writer of its valid files, how they are read, its share)
    "weights": (write_weights, weights.load, 0.35), "tables": (write_tables, read_table, 0.05),
    "annotations": (write_annotations, read_annotations, 0.35), "images": (write_images, read_image, 0.25),
}


def run(inputs, seed, folder, seconds):
    """-> how many inputs of each outcome there were; damaged files that are met wrongly are kept in `folder`."""
    files = {}
    for kind, (write, _, _) in KINDS.items():
        (folder / kind).mkdir()
        write(folder / kind)
        paths = [path for path in sorted((folder / kind).glob("*")) if path.is_file() and path.name != "instances.json"]
        files[kind] = {path: path.read_bytes() for path in paths}
    for kind, (_, read, _) in KINDS.items():
        for path in files[kind]:
            read(path)  # as it is, it is fine
    limit(MEGABYTES)
    warnings.simplefilter("error")
    signal.signal(signal.SIGALRM, raising(Wrong(f"more than {SECONDS} seconds")))
    counts = Counter()
    start = time.monotonic()
    for number in range(inputs):
        if time.monotonic() - start > seconds:
            break
        rng = random.Random(f"{seed} {number}")
        random.seed(number)
        kind = rng.choices(list(KINDS), [share for _, _, share in KINDS.values()])[0]
        path = rng.choice(list(files[kind]))
        bad = path.with_name(f"bad {path.name}")
        bad.write_bytes(damage(rng, path.name, files[kind][path], list(files[kind].values())))
        (folder / "last").write_text(f"{kind} {number} {bad}")  # should the process be killed
        signal.alarm(SECONDS)
        try:
            KINDS[kind][1](bad)
            outcome = "read"
        except Exception as error:  # and MemoryError is one
            is_told = isinstance(error, ValueError) and not isinstance(error, (UnicodeError, json.JSONDecodeError))
            outcome = "refused" if is_told and is_line(str(error)) else "wrong"
            if outcome == "wrong":
                traceback.print_exc()
        finally:
            signal.alarm(0)
        if outcome == "wrong":
            kept = folder / f"wrong-{number}{bad.suffix}"
            shutil.copy(bad, kept)
            print(f"wrong: input {number}, of {path.name}, kept as {kept}", file=sys.stderr)
        counts[f"{kind} {outcome}"] += 1
    return counts


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after these")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    counts = run(args.inputs, args.seed, folder, args.seconds)
    for name, count in sorted(counts.items()):
        print(f"{name}: {count}")
    wrong = sum(count for name, count in counts.items() if name.endswith("wrong"))
    print(f"{counts.total()} inputs, {wrong} wrong")
    if not wrong:
        shutil.rmtree(folder)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
