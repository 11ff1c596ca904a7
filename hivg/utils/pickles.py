"""Files that `torch.save`, `torch.jit.save` or `pickle` wrote, read as plain data; nothing in them is executed.

A pickle is a program: its steps name functions and call them. Two guards make the standard library's unpickler safe:

- `check_steps` walks over the steps first. It allows only those that real files contain, and no length or memo index
  for which the unpickler would allocate more than the file warrants. It empties frames, the stretches to read at once:
  of a step that crosses the end of one, the unpickler would drop a part, and go on elsewhere than the walk.
- `Reader.find_class` answers each known name with a stand-in that builds plain data, and refuses all others. The pickle
  cannot change a stand-in; the `__setstate__` methods below are the only ones it can call.

A crafted file cannot crash the process, nor use more memory than a constant times its size. It can waste time.
"""

import codecs
import functools
import io
import math
import os
import pickle
import re
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from hivg.utils.memory import is_out_of_memory
from hivg.utils.messages import shown

LEGACY = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # in the first pickle of torch.save before 1.6
COPIES = 4  # elements that calls may copy, per byte of the pickle; real files stay below 2
DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
          "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
          "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
          "BoolStorage": torch.bool}
AS_GIVEN = ("collections.Counter", "torch.Size", "torch.device", "torch._utils._rebuild_parameter",
            "torch.jit._pickle.build_intlist", "torch.jit._pickle.build_doublelist",
            "torch.jit._pickle.build_boollist", "torch.jit._pickle.build_tensorlist",
            "torch.jit._pickle.restore_type_tag")  # calls of which the first argument stands for the result
# Python 2's text: UTF-8, and what is not, as Latin-1
codecs.register_error("latin1", lambda error: (error.object[error.start : error.end].decode("latin1"), error.end))


class RefusedError(ValueError):
    """The file names something that is not plain data."""


@contextmanager
def damage_as_value_error():
    """What a damaged file raises can be nearly anything."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError | OSError) or is_out_of_memory(error):
            raise
        raise ValueError(f"damaged ({type(error).__name__}: {shown(error, 80)})") from None


# ---- the steps of a pickle

TUPLES = {b"t", b"\x85", b"\x86", b"\x87"}
# a text, bytes or huge integer: how many bytes give its length
TEXTS = {b"U": 1, b"X": 4, b"\x8c": 1, b"T": 4, b"B": 4, b"C": 1, b"\x8a": 1, b"\x8b": 4, b"\x8d": 8, b"\x8e": 8}
STEPS = re.compile(b"(?s:" + b"|".join([  # the bulk of the steps; `check_steps` takes those in between
    rb"[(NQRab}\])edlsu\x81\x88\x89\x8f\x90\x91\x93\x94]",  # without an argument
    rb"[hq].|j.{4}|r..[\x00-\x0f]\x00|g[^\n]*\n|p\d{1,6}\n",  # the memo, up to 2^20
    rb"K.|M..|J.{4}|G.{8}|[FILSV][^\n]*\n|c[^\n]*\n[^\n]*\n|\x80.",  # numbers, lines, names
    *(re.escape(s + n.to_bytes(TEXTS[s], "little")) + b".{%d}" % n for s in (b"U", b"X", b"\x8c") for n in range(64)),
]) + b")*+")


def check_steps(data, start):
    """Walk over the pickle that begins at `start` of a bytearray -> where it ends, how many tuples it builds. Its
    frames become empty. Raises ValueError."""
    at = start
    n_tuples = 0
    while True:
        at = STEPS.match(data, at).end()
        step = bytes(data[at : at + 1])
        at += 1
        if step in TUPLES:
            n_tuples += 1
        elif step in TEXTS:
            at += TEXTS[step] + int.from_bytes(data[at : at + TEXTS[step]], "little")
        elif step == b"r" and int.from_bytes(data[at : at + 4], "little") < len(data):
            at += 4
        elif step == b"p" and (line := re.match(rb"\d{1,10}\n", data[at : at + 11])) and int(line[0]) < len(data):
            at += line.end()
        elif step == b"\x95":  # a frame
            data[at : at + 8] = bytes(8)
            at += 8
        elif step == b".":
            return at, n_tuples
        else:
            raise ValueError("not a file that PyTorch saved, or only a part of one")


# ---- what they may build

class Call(functools.partial):
    """Stands in for a function or class."""

    def __setstate__(self, state):
        raise ValueError("changes a function")


class Attributes:
    """A TorchScript module or argparse.Namespace, reduced to its attributes."""

    def __setstate__(self, state):
        self.__dict__ = state  # no copy: a short file may give one state to many objects


class Dict(dict):
    """An OrderedDict."""

    def __setstate__(self, state):
        pass  # PyTorch keeps the versions of its modules here


class DType:
    """A numpy dtype of numbers or text; arrays of objects would hold addresses."""

    def __init__(self, name, *_):
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|[SU][1-9]\d{0,5}", name):
            raise ValueError(f"a numpy array of the type {shown(name, 60)}; only numbers and text can be read")
        self.dtype = np.dtype(name)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class Array(list):
    """A numpy array as nested lists."""

    def __init__(self, values):
        self.values = values  # of the Reader

    def __setstate__(self, state):
        _, shape, dtype, by_columns, data = state
        if 0 not in shape:  # a shape (10^9, 0) would make as many lists
            self[:] = self.values(dtype, data, shape or (1,), "F" if by_columns else "C")
        del self.values


class TensorOnDisk(NamedTuple):  # which a pickle cannot change
    """A tensor of a file, not read yet, so that the optimizer state beside a model costs nothing."""

    read_storage: object  # key -> its bytes, writable
    key: str  # of its storage
    dtype: torch.dtype
    offset: int = 0  # of its first element in the storage, in elements
    shape: tuple = ()
    stride: tuple = ()  # in elements

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize

    @damage_as_value_error()
    def read(self):
        """-> the tensor on the CPU, in the dtype it was saved in. Raises ValueError if the file does not hold it."""
        if math.prod(self.shape) == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        data = self.read_storage(self.key)
        count, rest = divmod(len(data), self.dtype.itemsize)
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        if rest or last >= count or math.prod(self.shape) > count:  # with a stride of 0, one element is many
            raise ValueError(f"its part {shown(self.key, 60)} is too short for a tensor of {shown(self.shape, 60)}")
        storage = torch.frombuffer(data, dtype=self.dtype)  # (count,)
        return storage.as_strided(self.shape, self.stride, self.offset).clone()  # not a view that keeps all of it


def make_tensor(storage, offset, shape, stride, *_):
    """What `torch._utils._rebuild_tensor_v2` would do -> TensorOnDisk."""
    are_sizes = all(type(n) is int and 0 <= n < 2**48 for n in (offset, *shape[:9], *stride[:9]))
    if not isinstance(storage, TensorOnDisk) or not are_sizes or not len(shape) == len(stride) < 9:
        raise ValueError("a tensor that is not described as PyTorch does")
    return storage._replace(offset=offset, shape=tuple(shape), stride=tuple(stride))


class Reader(pickle.Unpickler):
    """Unpickles what `check_steps` has checked. read_storage: see TensorOnDisk; None for a pickle without tensors."""

    def __init__(self, data, read_storage):
        super().__init__(io.BufferedReader(io.BytesIO(data), 2**17), encoding="utf-8", errors="latin1")
        self.read_storage = read_storage
        self.dtypes = {}  # of the storages, by key
        self.copies_left = COPIES * len(data)
        self.calls = dict.fromkeys(AS_GIVEN, lambda value, *_: value) | {
            "collections.OrderedDict": lambda items=(): Dict(self.spend(items)),
            "builtins.set": lambda items=(): set(self.spend(items)),
            "builtins.frozenset": lambda items=(): set(self.spend(items)),
            "builtins.bytes": lambda: b"",  # how Python 3 writes b"" for Python 2, and in the next line other bytes
            "_codecs.encode": lambda text, _: self.spend(text).encode("latin1"),
            "numpy.dtype": DType,
            "numpy.core.multiarray._reconstruct": lambda *_: Array(self.values),
            "numpy.core.multiarray.scalar": lambda dtype, data: self.values(dtype, data),
            "torch._utils._rebuild_tensor_v2": make_tensor,
        }

    def spend(self, items):
        """-> items, which a call copies: a short file can ask for the same copy a million times."""
        self.copies_left -= len(items)
        if self.copies_left < 0:
            raise ValueError("holds far less data than it unfolds to")
        return items

    def values(self, dtype, data, shape=(), order="C"):
        """What a numpy array or scalar holds -> numbers or texts, in nested lists."""
        if not isinstance(dtype, DType):
            raise ValueError("a numpy array without a type")
        return np.ndarray(shape, dtype.dtype, self.spend(data), order=order).tolist()

    def find_class(self, module, name):
        name = f"{module}.{name}".replace("__builtin__", "builtins").replace("numpy._core", "numpy.core")
        if name == "argparse.Namespace" or module.startswith("__torch__"):  # a class of the archive's own code
            return Attributes
        if name in self.calls:
            return Call(self.calls[name])
        last = name.removeprefix("torch.")
        if last in DTYPES or name == "numpy.ndarray" or isinstance(vars(torch).get(last), torch.dtype):
            return last  # as text: a type that is named, not called
        raise RefusedError(f"holds {shown(name, 60)}, which is not plain data and could run a command; nothing of it "
                           "was run; get the file from a source you trust, as a state dict or .safetensors")

    def persistent_load(self, saved):
        """("storage", type, key, device, size, ..) -> TensorOnDisk of its first element; `make_tensor` says more."""
        match saved:
            case (_, kind, str(key), _, _) | (_, kind, str(key), _, _, None) if self.read_storage:
                self.dtypes[key] = DTYPES[kind]
                return TensorOnDisk(self.read_storage, key, DTYPES[kind])
        raise ValueError("a reference that is not to a tensor of PyTorch 0.4 or later")


# ---- files

@damage_as_value_error()
def read(path):
    """A file of `torch.save`, `torch.jit.save` or `pickle.dump` -> containers, numbers, text, `Attributes`, numpy
    arrays as lists, and tensors as `TensorOnDisk`.

    Raises RefusedError if it names anything else, ValueError if it is damaged or of another format.
    """
    if zipfile.is_zipfile(path):
        return read_zip(path)
    data = bytearray(Path(path).read_bytes())
    return read_legacy(data) if LEGACY in data[:64] else unpickle(data)[0]


def read_zip(path):
    archive = zipfile.ZipFile(path)  # closed with the last tensor that refers to it
    pickles = [name for name in archive.namelist() if name.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError("a zip archive, but not of PyTorch: no data.pkl in it")
    size = os.path.getsize(path)

    @functools.lru_cache(1)  # tensors that share a storage mostly follow each other
    def read_part(name):
        info = archive.getinfo(pickles[0].removesuffix("data.pkl") + name)
        if info.compress_type != zipfile.ZIP_STORED or not info.compress_size == info.file_size <= size:
            raise ValueError(f"its part {shown(info.filename, 60)} is compressed")  # PyTorch never does that
        return bytearray(archive.read(info))  # checks the CRC

    return unpickle(read_part("data.pkl"), 0, lambda key: read_part(f"data/{key}"))[0]


def read_legacy(data):
    """torch.save before 1.6: a magic number, a version, the machine, the value, the keys of the storages, and these."""
    parts = {}  # key: the bytes of its storage

    def read_part(key):
        if key not in parts:
            raise ValueError(f"the numbers of its tensor {shown(key, 60)} are not in it")
        return parts[key]

    end = 0
    for _ in range(4):
        value, end, dtypes = unpickle(data, end, read_part)
    keys, end, _ = unpickle(data, end)
    for key in keys:
        start = end + 8  # behind the number of elements
        end = start + int.from_bytes(data[end:start], "little") * dtypes[key].itemsize
        parts[key] = memoryview(data)[start:end]
    if end > len(data):
        raise ValueError("cut short")
    return value


def unpickle(data, start=0, read_storage=None):
    """The pickle that begins at `start` of a bytearray -> its value, its end, and {key: dtype} of its storages."""
    end, n_tuples = check_steps(data, start)
    reader = Reader(data[start:end], read_storage)
    # hashing nested tuples recurses in C, with up to 80 bytes of stack for each: use a thread with room for all of them
    usual = threading.stack_size((8 + n_tuples // 4096) * 2**20)
    try:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(reader.load).result(), end, reader.dtypes
    finally:
        threading.stack_size(usual)
