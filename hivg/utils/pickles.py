"""Files that PyTorch saved, read without running any of their content.

A pickle is a program: it names functions, and unpickling calls them. The reader here looks every name up in a short
table of its own, which holds containers, numpy arrays and the parts of tensors, and refuses a file that names anything
else. A tensor comes as `TensorOnDisk`, which reads its numbers only when asked, so the optimiser's state beside a model
costs nothing.

Four containers are known: the zip of `torch.save`; the zip of `torch.jit.save` (TorchScript), whose code is never
looked at and whose modules become plain objects with attributes; the older torch.save, one stream of pickles, which
PyTorch's own `weights_only` reader reads, with as short a table, if there are tensors in it; and a bare pickle.
"""

import argparse
import math
import os
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

LEGACY = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # in the first pickle of an older torch.save


class RefusedError(ValueError):
    """The file asks for more than data; nothing of it was run. The message names what it asks for."""

    def __init__(self, name):
        super().__init__(f"holds {name}, which is not plain data and could run a command; nothing of it was run; "
                         "get the file from a source you trust, as a state dict or .safetensors")


@dataclass(frozen=True)
class TensorOnDisk:
    """A tensor of a zip, not read yet."""

    archive: zipfile.ZipFile  # open, and shared: its list of contents is read once, not for every tensor
    entry: str  # the file in it that holds the tensor's storage
    dtype: torch.dtype
    offset: int  # of its first element in the storage, in elements
    shape: tuple
    stride: tuple  # in elements

    def read(self):
        """-> the tensor, on the CPU, in the type it was saved in. Raises ValueError if the file does not hold it."""
        try:
            storage = self._read_storage()
        except (KeyError, ValueError, zipfile.BadZipFile) as error:  # not there; not whole numbers; a wrong checksum
            raise ValueError(f"its part {self.entry} is damaged ({error})") from None
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        is_empty = math.prod(self.shape) == 0
        if not is_empty and not 0 <= last < len(storage):
            raise ValueError(f"its part {self.entry} is too short for a tensor of shape {self.shape}")
        tensor = storage.as_strided(self.shape, self.stride, self.offset)
        return tensor.clone() if tensor.numel() < storage.numel() else tensor  # a slice does not keep its storage

    def _read_storage(self):
        """-> (n,), all numbers of the storage."""
        size = self.archive.getinfo(self.entry).file_size
        if size > os.path.getsize(self.archive.filename):  # PyTorch never compresses; a zip bomb would
            raise ValueError("compressed")
        data = bytearray(size)
        with self.archive.open(self.entry) as part:
            part.readinto(data)
        return torch.frombuffer(data, dtype=self.dtype) if size else torch.empty(0, dtype=self.dtype)


class Module:
    """A TorchScript module as plain attributes."""

    def __setstate__(self, state):
        if not isinstance(state, dict):
            raise ValueError("a module without named attributes")
        self.__dict__.update(state)


@dataclass
class Storage:
    """The pickle's reference to the numbers of a tensor, which are in a file of the zip."""

    entry: str
    dtype: torch.dtype


# Storage types by name, which says the type of the numbers
DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def first(value, *_):
    """For functions of PyTorch's that only mark their first argument."""
    return value


def encode(text, encoding):
    """How Python 3 spells bytes in a pickle for Python 2; the encoding is always Latin-1."""
    return text.encode("latin1")


ARRAY = np.zeros(1).__reduce__()[0]  # the function that rebuilds a numpy array; its module has had two names
NUMBER = np.float64(1).__reduce__()[0]  # likewise of a numpy number
PLAIN = {  # (module, name) in the pickle -> what is called for it; `Reader.find_class` adds tensors
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "Counter"): Counter,
    ("argparse", "Namespace"): argparse.Namespace,
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch", "Size"): tuple,
    ("torch", "device"): str,
    ("torch._utils", "_rebuild_parameter"): first,
    ("torch.jit._pickle", "restore_type_tag"): first,
    ("torch.jit._pickle", "build_intlist"): list,
    ("torch.jit._pickle", "build_doublelist"): list,
    ("torch.jit._pickle", "build_boollist"): list,
    ("torch.jit._pickle", "build_tensorlist"): list,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): ARRAY,
    ("numpy._core.multiarray", "_reconstruct"): ARRAY,
    ("numpy.core.multiarray", "scalar"): NUMBER,
    ("numpy._core.multiarray", "scalar"): NUMBER,
    ("_codecs", "encode"): encode,
}


class HasTensors(Exception):
    """An older torch.save whose tensors lie behind the pickles."""


class Reader(pickle.Unpickler):
    """An unpickler that can call nothing but what `find_class` returns.

    archive, folder: the open zip and the folder in it that hold the tensors; None for a pickle without tensors.
    """

    def __init__(self, file, archive=None, folder=None, encoding="utf-8"):
        super().__init__(file, encoding=encoding)
        self.archive = archive
        self.folder = folder

    def find_class(self, module, name):
        if (module, name) in PLAIN:
            return PLAIN[module, name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self.tensor
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith("__torch__"):  # a class of the archive's own code, which is not looked at
            return type("Module", (Module,), {})
        raise RefusedError(f"{module}.{name}")

    def persistent_load(self, saved):
        """A reference to a storage, ("storage", type, key, device, size) -> Storage."""
        if self.folder is None:
            raise HasTensors
        is_storage = isinstance(saved, tuple) and len(saved) >= 3 and saved[0] == "storage"
        if not is_storage or not isinstance(saved[1], torch.dtype):
            raise ValueError("a reference that is not to a tensor")
        return Storage(f"{self.folder}data/{saved[2]}", saved[1])

    def tensor(self, storage, offset, shape, stride, *_):
        """In place of `torch._utils._rebuild_tensor_v2` -> TensorOnDisk."""
        sizes = (offset, *shape, *stride)
        are_sizes = all(isinstance(n, int) and n >= 0 for n in sizes)
        if not isinstance(storage, Storage) or len(shape) != len(stride) or not are_sizes:
            raise ValueError("a tensor that is not described as PyTorch does")
        return TensorOnDisk(self.archive, storage.entry, storage.dtype, offset, tuple(shape), tuple(stride))


def read(path):
    """Read a file of `torch.save`, `torch.jit.save` or `pickle.dump` -> containers, numbers, text, numpy arrays,
    `argparse.Namespace`, `Module` and tensors (`TensorOnDisk`, or torch.Tensor from the older torch.save).

    Raises RefusedError for a file that names anything else, ValueError for one that is damaged or of another format.
    """
    path = Path(path)
    try:
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        with open(path, "rb") as file:
            start = file.read(64)
        if start.startswith(b"PK"):
            raise ValueError("cut short: a zip archive without its end")
        if LEGACY in start:
            return _read_legacy(path)
        if start.startswith((b"\x80", b"(", b"]", b"}", b"c")):  # the first is protocol 2 and later, the others 0 and 1
            return _read_bare(path)
        raise ValueError("not a file that PyTorch saved")
    except (ValueError, OSError):
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"damaged ({type(error).__name__}: {error})") from None


def _read_zip(path):
    archive = zipfile.ZipFile(path)  # closed with the last tensor that refers to it
    pickles = [name for name in archive.namelist() if name.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError("a zip archive, but not of PyTorch: no data.pkl in it")
    with archive.open(pickles[0]) as file:
        return Reader(file, archive, pickles[0].removesuffix("data.pkl")).load()


def _read_bare(path, number=1):
    """The last of the first `number` pickles of a stream. Python 2 did not say how its text is encoded, nor which bytes
    are text: if not all are UTF-8, they are read as bytes and decoded one by one."""
    try:
        return _read_stream(path, number, "utf-8")
    except UnicodeDecodeError:
        return plain_text(_read_stream(path, number, "bytes"))


def _read_stream(path, number, encoding):
    with open(path, "rb") as file:
        for _ in range(number):
            value = Reader(file, encoding=encoding).load()
    return value


def _read_legacy(path):
    try:
        return _read_bare(path, 4)  # a magic number, a version, facts about the machine, the data
    except HasTensors:
        pass
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), open(path, "rb") as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            raise RefusedError(name[1]) from None
        raise


def plain_text(value):
    """The same lists, tuples and dicts with the bytes in them, keys too, as text: UTF-8, or Latin-1 where it is not."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin1")
    if isinstance(value, dict):
        return {plain_text(key): plain_text(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain_text(inner) for inner in value)
    return value
