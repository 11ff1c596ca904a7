"""What PyTorch saved, read without running any of it.

A pickle is a program: it names functions, and unpickling calls them. The reader here looks every name up in a short
table of its own, which holds containers, numpy arrays and what tensors are made of, and refuses a file that names
anything else. Tensors come as `TensorOnDisk`, which reads its numbers when asked, so the optimiser's state beside a
model costs nothing.

Four containers are known: the zip of `torch.save`; the zip of `torch.jit.save` (TorchScript), whose code is never
looked at and whose modules become plain objects with attributes; the older torch.save, one stream of pickles, which
PyTorch's own `weights_only` reader reads, with as short a table, if there are tensors in it; and a bare pickle.
"""

import argparse
import math
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

LEGACY = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # stands in the first pickle of an older torch.save


class RefusedError(ValueError):
    """The file asks for more than data; nothing of it was run. The message names what it asks for."""

    def __init__(self, name):
        super().__init__(f"holds {name}, which is not plain data and could run a command; nothing of it was run; "
                         "get the file from a source you trust, as a state dict or .safetensors")


@dataclass(frozen=True)
class TensorOnDisk:
    """A tensor of a zip, not read yet: size and stride in elements, offset in elements of its storage."""

    archive: Path
    entry: str
    dtype: torch.dtype
    offset: int
    shape: tuple
    stride: tuple

    def read(self):
        """-> the tensor, on the CPU, in the type it was saved in. Raises ValueError if the file does not hold it."""
        numbers = torch.empty(0, dtype=self.dtype)
        try:
            with zipfile.ZipFile(self.archive) as archive, archive.open(self.entry) as part:
                size = archive.getinfo(self.entry).file_size
                if size > self.archive.stat().st_size:  # PyTorch never compresses; a bomb would
                    raise ValueError("compressed")
                data = bytearray(size)
                part.readinto(data)
                if size:
                    numbers = torch.frombuffer(data, dtype=self.dtype)
        except (KeyError, ValueError, zipfile.BadZipFile) as error:  # not there; not whole numbers; a wrong checksum
            raise ValueError(f"its part {self.entry} is damaged ({error})") from None
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        if math.prod(self.shape) and not 0 <= last < len(numbers):
            raise ValueError(f"its part {self.entry} is too short for a tensor of shape {self.shape}")
        tensor = numbers.as_strided(self.shape, self.stride, self.offset)
        return tensor.clone() if tensor.numel() < numbers.numel() else tensor  # a slice does not keep its storage


class Module:
    """A TorchScript module as plain attributes."""

    def __setstate__(self, state):
        if not isinstance(state, dict):
            raise ValueError("a module without named attributes")
        self.__dict__.update(state)


@dataclass
class Storage:
    """What a pickle says about the numbers of a tensor, which lie in a file of the zip."""

    entry: str
    dtype: torch.dtype


# Storage types by name: those of torch.save name the numbers' type.
DTYPES = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
          "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
          "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
          "BoolStorage": torch.bool}


# What a numpy array and a numpy number are built with; its module has had several names.
ARRAY, NUMBER = np.zeros(1).__reduce__()[0], np.float64(1).__reduce__()[0]
NUMPY = {(f"numpy.{core}.multiarray", name): f for core in ("core", "_core")
         for name, f in (("_reconstruct", ARRAY), ("scalar", NUMBER))}
NUMPY |= {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
          ("_codecs", "encode"): lambda text, encoding: text.encode("latin1")}  # how Python 3 spells bytes to Python 2


class HasTensors(Exception):
    """An older torch.save whose tensors lie behind the pickles."""


class Reader(pickle.Unpickler):
    """find_class gives nothing but what stands in it here, so that is all that can be called."""

    def __init__(self, file, archive, folder, encoding="utf-8"):
        super().__init__(file, encoding=encoding)
        self.archive, self.folder = archive, folder

    def find_class(self, module, name):
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("collections", "Counter"): Counter,
            ("argparse", "Namespace"): argparse.Namespace,
            ("builtins", "set"): set,
            ("__builtin__", "set"): set,
            ("torch", "Size"): tuple,
            ("torch", "device"): str,
            ("torch._utils", "_rebuild_tensor_v2"): self.tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
        }
        known |= {("torch.jit._pickle", f"build_{kind}list"): list for kind in ("int", "double", "bool", "tensor")}
        known |= NUMPY
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module.startswith("__torch__"):  # a class of the archive's own code, which is not looked at
            return type("Module", (Module,), {})
        raise RefusedError(f"{module}.{name}")

    def persistent_load(self, saved):
        if self.folder is None:
            raise HasTensors
        if not (isinstance(saved, tuple) and len(saved) >= 3 and saved[0] == "storage"
                and isinstance(saved[1], torch.dtype)):
            raise ValueError("a reference that is not to a tensor")
        return Storage(f"{self.folder}data/{saved[2]}", saved[1])

    def tensor(self, storage, offset, shape, stride, *_):
        sizes = (offset, *shape, *stride)
        if not (isinstance(storage, Storage) and len(shape) == len(stride)
                and all(isinstance(n, int) and n >= 0 for n in sizes)):
            raise ValueError("a tensor that is not described as PyTorch does")
        return TensorOnDisk(self.archive, storage.entry, storage.dtype, offset, tuple(shape), tuple(stride))


def read(path):
    """What `torch.save`, `torch.jit.save` or `pickle.dump` wrote to `path`: containers, numbers, text, numpy arrays,
    `argparse.Namespace`, `Module` and tensors (`TensorOnDisk`, or torch.Tensor from the older torch.save).

    Raises RefusedError for a file that names anything else, ValueError for one that is damaged or something else.
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
        if start.startswith((b"\x80", b"(", b"]", b"}", b"c")):  # protocol 2 and later; what 0 and 1 begin with
            return _read_bare(path)
        raise ValueError("not a file that PyTorch saved")
    except (ValueError, OSError):
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"damaged ({type(error).__name__}: {error})") from None


def _read_zip(path):
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.split("/")[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError("a zip archive, but not of PyTorch: no data.pkl in it")
        with archive.open(pickles[0]) as file:
            return Reader(file, path, pickles[0].removesuffix("data.pkl")).load()


def _read_bare(path, number=1):
    """The last of the first `number` pickles of a stream. Python 2 did not say how its text is encoded, nor what of it
    is text: what is not UTF-8 is read as bytes, and decoded one by one."""
    def load(encoding):
        with open(path, "rb") as file:
            return [Reader(file, path, None, encoding).load() for _ in range(number)][-1]

    try:
        return load("utf-8")
    except UnicodeDecodeError:
        return plain_text(load("bytes"))


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
        return {plain_text(k): plain_text(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(plain_text(v) for v in value)
    return value
