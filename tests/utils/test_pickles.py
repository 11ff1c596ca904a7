"""Pickles that would crash the process or fill its memory: each gets a line, in a process of its own."""

import argparse
import collections
import pickle
import pickletools
import struct
import zipfile

import numpy as np
import pytest
import torch
from makers_limits import outcomes
from makers_weights import save_legacy

from hivg.utils import pickles
from hivg.utils.messages import quoted, shown


def text(value):
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    return b"J" + struct.pack("<i", value)


def data_of(value):
    return b"B" + struct.pack("<I", len(value)) + value


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


DTYPE = name("numpy", "dtype")
EMPTY_ARRAY = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray") + number(0) + b"\x85" + (
    text("b") + b"\x87R")


def array(dtype, values, count):
    """The steps that build an array of `count` elements of a dtype, "O8" for instance, over these bytes."""
    dtype = DTYPE + text(dtype) + b"\x89\x88\x87R"
    dtype += b"(" + number(3) + text("|") + b"NNN" + number(-1) * 2 + number(0) + b"tb"
    return EMPTY_ARRAY + b"(" + number(1) + number(count) + b"\x85" + dtype + b"\x89" + data_of(values) + b"tb"


def shared_modules(levels):
    """A TorchScript module with twice the same module under two names, `levels` deep."""
    module = name("__torch__", "M") + b")\x81"
    steps = module + b"q\0"
    for level in range(levels):
        steps = module + b"}(" + text("a") + steps + text("b") + b"h" + bytes([level]) + b"ubq" + bytes([level + 1])
    return steps


def state_of(what, slots=False):
    state = b"}" + text("__doc__") + number(1) + b"s"
    return what + (b"N" + state + b"\x86" if slots else state) + b"b"


def tensor(shape, stride, kind="FloatStorage"):
    described = name("torch._utils", "_rebuild_tensor_v2") + b"((" + text("storage") + name("torch", kind) + (
        text("0") + text("cpu") + number(4) + b"tQ" + number(0))
    return b"}" + text("w") + described + shape + stride + b"\x89" + name("collections", "OrderedDict") + b")RtRs"


def hidden(steps):
    """A text. But if a text's length crosses the end of a frame, here 4 bytes long, the unpickler drops what the frame
    holds of it: then an empty text and these steps."""
    return b"](" + b"\x95" + struct.pack("<Q", 4) + b"X" + struct.pack("<I", 3 + len(steps)) + b"\0\0\0" + steps + b"e"


def power_of_ten(n):
    return b"L1" + b"0" * n + b"L\n"


DEEP = 150_000  # hashing tuples that are nested so deeply needs more than the usual 8 MB of stack
STAND_INS = {
    "a class": name("argparse", "Namespace"), "a module's class": name("__torch__.a", "b"),
    "an array's class": name("numpy", "ndarray"), "a function": name("_codecs", "encode"),
    "a type": name("torch", "float32"), "a tensor": tensor(number(4) + b"\x85", number(1) + b"\x85")[7:-1],
    "a list": b"]",
}
STEPS = {  # name: the steps of a pickle
    "an array of objects": array("O8", b"\x10" * 8, 1),
    "an array of objects, by a forged dtype": EMPTY_ARRAY + b"(" + number(1) * 2 + b"\x85" + name(
        "argparse", "Namespace") + b")\x81}" + text("dtype") + text("O") + b"sb\x89" + data_of(b"\x10" * 8) + b"tb",
    "an array larger than its bytes": array("f8", b"\0" * 8, 2**20),
    "an array of no elements and no type": EMPTY_ARRAY + b"(" + number(1) + b")NNNtb",
    "an array of 10^8 texts of no letters": array("S0", b"", 10**8),
    "a scalar of 10^8 lists": name("numpy.core.multiarray", "scalar") + b"(" + DTYPE + text("f8") + b"\x89\x88\x87R" + (
        data_of(b"") + number(10**8) + number(0) + b"\x86tR"),
    "a scalar copied again and again": b"](" + data_of(b"a" * 10**5) + b"q\x01" + DTYPE + text("S99999") + (
        b"\x89\x88\x87Rq\x02") + (name("numpy.core.multiarray", "scalar") + b"h\x02h\x01\x86R") * 4000 + b"e",
    "text of four gigabytes": array("U999999999", b"\0" * 8, 1),
    "a dtype of fields": DTYPE + text("f8,O8") + b"\x89\x88\x87R",
    "the state of a dtype": DTYPE + text("f8") + b"\x89\x88\x87R(" + number(3) + text("O") + b"NNNtb",
    **{f"the state of {called}": state_of(what) for called, what in STAND_INS.items()},
    **{f"the slots of {called}": state_of(what, slots=True) for called, what in STAND_INS.items()},
    "elements of a class": name("argparse", "Namespace") + number(1) + b"a",
    "a memo of 2^28 entries": b"]r" + struct.pack("<I", 2**28),
    "a memo of 2^31 entries": b"]r" + struct.pack("<I", 2**31), "a memo of 10^9 entries, as text": b"]p1000000000\n",
    "modules that share modules": shared_modules(60), "bytes that are not there": b"\x8e" + struct.pack("<Q", 2**40),
    "a bytearray that is not there": b"\x96" + struct.pack("<Q", 2**40),
    "text that is not there": b"\x8d" + struct.pack("<Q", 2**40),
    "a frame that is not there": b"\x95" + struct.pack("<Q", 2**40) + b"N",
    "a memo of 2^28 entries, behind a frame": hidden(b"]r" + struct.pack("<I", 2**28)),
    "a deep tuple as a key, behind a frame": hidden(b"})" + b"\x85" * DEEP + b"Ns"), "an extension": b"\x82\x01",
    "a text copied again and again": b"](" + text("a" * 10**5) + b"q\x01" + (
        name("_codecs", "encode") + b"h\x01" + text("latin1") + b"\x86R") * 2000 + b"e",
    "a dict copied again and again": b"](](" + (number(1) + number(1) + b"\x86") * 10**4 + b"eq\x01" + (
        name("collections", "OrderedDict") + b"h\x01\x85R") * 1000 + b"e",
    "an old-style instance": b"(" + name("collections", "OrderedDict") + b"]o", "a deep tuple": b")" + b"\x85" * DEEP,
    "a deep tuple as a key": b"})" + b"\x85" * DEEP + b"Ns",
    "a deep tuple as an element": b"\x8f()" + b"\x85" * DEEP + b"\x90",
    "a deep tuple in a set": name("builtins", "set") + b"]()" + b"\x85" * DEEP + b"e\x85R",
    "a deep list": b"]" * DEEP + b"a" * (DEEP - 1),
    "a tensor of quantised numbers": tensor(number(4) + b"\x85", number(1) + b"\x85", "qint8"),
    "a tensor of half bytes": tensor(number(4) + b"\x85", number(1) + b"\x85", "quint4x2"),
    "a tensor of 10^30": tensor(power_of_ten(30) + b"\x85", number(1) + b"\x85"),
    "a tensor of one number for all": tensor(number(2**30) + b"\x85", number(0) + b"\x85"),
    "an empty tensor of 2^47": tensor(b"L" + str(2**47).encode() + b"L\n" + number(0) + b"\x86",
                                      number(1) + number(1) + b"\x86"),
    "a tensor of a million dimensions": tensor(b"(" + number(1) * 10**6 + b"t", b"(" + number(1) * 10**6 + b"t"),
    "a number for a storage": name("torch._utils", "_rebuild_tensor_v2") + number(1) * 3 + b"\x87R",
}


HARMLESS = {"a deep tuple", "a deep tuple as a key", "a deep tuple as an element", "a deep tuple in a set",
            "a deep list", "modules that share modules", "a tensor of one number for all", "an empty tensor of 2^47",
            "a frame that is not there", "a memo of 2^28 entries, behind a frame"}


def write_bare(path, steps):
    path.write_bytes(b"\x80\x04" + steps + b".")


def write_zip(path, steps):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + steps + b".")
        archive.writestr("archive/data/0", b"\0" * 16)


@pytest.mark.slow
def test_nothing_crashes_or_fills_the_memory(tmp_path):
    """Bare and in an archive; read as weights, alone or as what their arguments are, and as annotations."""
    paths = {"alone": [], "args": [], "table": []}
    (tmp_path / "instances.json").write_text('{"annotations": []}')
    for i, (case, steps) in enumerate(STEPS.items()):
        args = b"}(" + text("model") + b"}" + text("args") + name("argparse", "Namespace") + b")\x81}" + (
            text("model") + steps + b"sbu")
        outline = b"](" + b"(" + text("a.jpg") + b"}" + b"](NNNNe" + text("cup") + b"](" + steps + b"ete"
        ref = b"](}(" + text("ann_id") + number(1) + text("image_id") + number(1) + text("file_name") + text("a.jpg")
        ref += text("sentences") + b"](}" + text("sent") + text("cup") + b"se" + text("split") + steps + b"ue"
        for write, table in ((write_bare, ref), (write_zip, outline)):  # REFER's files are bare, the lists archives
            for kind, wrapped in (("alone", steps), ("args", args), ("table", table)):
                paths[kind].append(tmp_path / f"{i} {kind} {write.__name__} {case}")
                write(paths[kind][-1], wrapped)
    lines = outcomes("from hivg.weights import load", "load(path)", paths["alone"] + paths["args"], seconds=240)
    assert "fine" not in lines
    read = "from hivg.data.published.reading import read_samples\nfrom hivg.utils.pickles import read"
    lines = outcomes(read, "read_samples('.', 'refcoco', 'val', path) if ' table ' in path else read(path)",
                     paths["alone"] + paths["table"], seconds=240)
    fine = {path.name.split(" ", 3)[3] for path, line in zip(paths["alone"], lines) if line == "fine"}
    assert fine <= HARMLESS, fine


# --- a pickle that means well is read ---


def test_plain_data_comes_back(tmp_path):
    value = [{"a": (1, 2.5, "é", b"\xff", None, True), 3: {4, "x"}}, collections.OrderedDict(a=[1]),
             collections.Counter("aab"), 10**50, [[]] * 3, frozenset([1])]
    for protocol in range(6):
        (tmp_path / "x").write_bytes(pickle.dumps(value, protocol))
        assert pickles.read(tmp_path / "x") == value


def test_text_of_python_2(tmp_path):
    """UTF-8, or Latin-1."""
    (tmp_path / "x").write_bytes(b"]U\x05caf\xc3\xa9aU\x04caf\xe9a.")
    assert pickles.read(tmp_path / "x") == ["café", "café"]


def test_frames(tmp_path):
    value = [bytes([i]) * 1000 for i in range(256)] + ["a" * 10**5] + list(range(10**5))
    data = pickle.dumps(value, 4)
    assert data.count(b"\x95") > 5
    (tmp_path / "x").write_bytes(data)
    assert pickles.read(tmp_path / "x") == value


@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_become_lists(tmp_path, protocol):
    arrays = [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.zeros((0, 4)),
              np.array([1, 2], ">i2"), np.array([True, False]), np.array(["é", "ab"]), np.float32(1.5), np.int64(-3),
              np.array([b"ab"]), np.str_("word")]
    (tmp_path / "x").write_bytes(pickle.dumps(arrays, protocol))
    assert pickles.read(tmp_path / "x") == [array.tolist() for array in arrays]


@pytest.mark.parametrize("save", [torch.save, save_legacy])
def test_tensors_of_both_containers(tmp_path, save):
    whole = torch.arange(12).reshape(3, 4)
    tensors = {"whole": whole, "part": whole[1:, 2], "turned": whole.T, "half": torch.rand(3).half(),
               "bfloat": torch.rand(3).bfloat16(), "bool": torch.tensor([True, False]), "number": torch.tensor(2.5),
               "empty": torch.zeros(0, 3), "parameter": torch.nn.Parameter(torch.ones(2))}
    save({"model": tensors, "args": argparse.Namespace(a=1), "size": whole.shape}, tmp_path / "x")
    found = pickles.read(tmp_path / "x")
    assert vars(found["args"]) == {"a": 1} and found["size"] == (3, 4)
    for key, tensor in tensors.items():
        read = found["model"][key].read()
        assert read.dtype == tensor.dtype and torch.equal(read, tensor), key


def test_the_makers_build_what_they_say():
    assert pickle.loads(array("f8", struct.pack("<d", 1.5), 1) + b".").tolist() == [1.5]
    pickletools.dis(tensor(number(2) + b"\x85", number(1) + b"\x85") + b".", out=open("/dev/null", "w"))


# --- what messages quote ---


@pytest.mark.parametrize("value, expected", [
    ("a.jpg", "a.jpg"), ("\x1b[31mred\n", "\\x1b[31mred\\n"), ("a" * 500, "a" * 59 + ".." + "a" * 59),
    ("\ud800", "\\ud800"), ("é 左", "é 左")])
def test_shown(value, expected):
    assert shown(value) == expected


@pytest.mark.parametrize("value, expected", [
    ([1, "a", 2.5], "[1, 'a', 2.5]"), ((1, [2]), "(1, a list of 1)"), (10**400, "a huge number"),
    ("\x1b", "'\\x1b'"),
    ({"a": 1}, "a dict of 1"), (None, "None"), (object(), "a object"), ("ab" * 99, "'" + "ab" * 14 + ".." + "ab" * 14)])
def test_quoted(value, expected):
    assert quoted(value).startswith(expected) and len(quoted(value)) <= 60
