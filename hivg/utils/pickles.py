"""Files that PyTorch saved, read without running any of their content.

A pickle is a program: it names functions, and unpickling calls them. The reader here looks every name up in a short
table of its own, whose entries all build plain data, and refuses a file that names anything else. A file cannot make
it hang, crash or fill the memory either: nothing is built that is much larger than the file. A tensor comes as
`TensorOnDisk`, which reads its numbers only when asked, so the optimiser's state beside a model costs nothing.

Four containers are known: the zip of `torch.save`; the zip of `torch.jit.save` (TorchScript), whose code is never
looked at and whose modules become plain objects with attributes; the older torch.save, one stream of pickles with the
tensors behind them; and a bare pickle.
"""

import io
import os
import pickle
import zipfile
from pathlib import Path

import torch

from hivg.utils.messages import shown
from hivg.utils.plain import (
    Array,
    Attributes,
    Dict,
    DType,
    Module,
    Namespace,
    check_key,
    encode,
    first,
    make_set,
    new_array,
    no_bytes,
    plain_text,
    scalar,
)
from hivg.utils.storages import Storage, StreamStorages, TensorOnDisk, ZipStorages

LEGACY = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # in the first pickle of an older torch.save
COPIES = 2  # elements that a file's calls may copy, for each byte of it; honest files stay below 1
MAX_DIMENSIONS = 8


class RefusedError(ValueError):
    """The file asks for more than data; nothing of it was run. The message names what it asks for."""

    def __init__(self, name):
        super().__init__(f"holds {shown(name, 60)}, which is not plain data and could run a command; nothing of it was "
                         "run; get the file from a source you trust, as a state dict or .safetensors")


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
PLAIN = {  # (module, name) in the pickle -> what is called for it; `Reader.find_class` adds tensors
    ("collections", "OrderedDict"): Dict,
    ("collections", "Counter"): Dict,
    ("argparse", "Namespace"): Namespace,
    ("builtins", "set"): make_set,
    ("builtins", "frozenset"): make_set,
    ("builtins", "bytes"): no_bytes,
    ("__builtin__", "set"): make_set,
    ("__builtin__", "frozenset"): make_set,
    ("__builtin__", "bytes"): no_bytes,
    ("torch", "Size"): first,
    ("torch", "device"): first,
    ("torch._utils", "_rebuild_parameter"): first,
    ("torch.jit._pickle", "restore_type_tag"): first,
    ("torch.jit._pickle", "build_intlist"): first,
    ("torch.jit._pickle", "build_doublelist"): first,
    ("torch.jit._pickle", "build_boollist"): first,
    ("torch.jit._pickle", "build_tensorlist"): first,
    ("numpy", "ndarray"): Array,
    ("numpy", "dtype"): DType,
    ("numpy.core.multiarray", "_reconstruct"): new_array,
    ("numpy._core.multiarray", "_reconstruct"): new_array,
    ("numpy.core.multiarray", "scalar"): scalar,
    ("numpy._core.multiarray", "scalar"): scalar,
    ("_codecs", "encode"): encode,
}


# ---- reading

class Reader(pickle._Unpickler):
    """An unpickler that can call nothing but what `find_class` returns, set the state of nothing but what the table
    builds, and look nothing up by nested keys. It is Python's own in Python: in the one in C these steps are out of
    reach, and some of them end the process.

    data: bytes, from `start` on. storages: where its tensors are; None for a pickle without tensors.
    """

    def __init__(self, data, storages=None, encoding="utf-8", start=0):
        self.file = io.BytesIO(data)  # which never reads more than there is, whatever length a pickle asks for
        self.file.seek(start)
        super().__init__(self.file, encoding=encoding)
        self.storages = storages
        self.copies_left = COPIES * len(data)

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
            return Module
        raise RefusedError(f"{module}.{name}")

    def persistent_load(self, saved):
        """A reference to a storage, ("storage", type, key, device, size, ..) -> Storage."""
        is_storage = isinstance(saved, tuple) and len(saved) >= 3 and saved[0] == "storage"
        if not is_storage or saved[1] not in DTYPES.values() or not isinstance(saved[2], str) or self.storages is None:
            raise ValueError("a reference that is not to a tensor")
        if isinstance(self.storages, StreamStorages):
            if saved[5:] not in ((), (None,)):
                raise ValueError("tensors as PyTorch saved them before 0.4; save them again with a later one")
            self.storages.types[saved[2]] = saved[1]
        return Storage(saved[2], saved[1])

    def tensor(self, storage, offset, shape, stride, *_):
        """In place of `torch._utils._rebuild_tensor_v2` -> TensorOnDisk."""
        sizes = (offset, *shape, *stride)
        are_sizes = all(type(n) is int and 0 <= n < 2**48 for n in sizes)
        if not isinstance(storage, Storage) or len(shape) != len(stride) or not are_sizes:
            raise ValueError("a tensor that is not described as PyTorch does")
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {len(shape)} dimensions")
        return TensorOnDisk(self.storages, storage.key, storage.dtype, offset, tuple(shape), tuple(stride))

    def spend(self, values):
        """Count the elements that a call is about to copy: a short file can ask for the same copy a million times."""
        self.copies_left -= 1
        for value in values:
            self.copies_left -= len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 1
        if self.copies_left < 0:
            raise ValueError("holds far less data than it unfolds to")

    # the steps of a pickle that need a check; `dispatch` puts them in the place of Python's own

    def load_reduce(self):
        if not isinstance(self.stack[-1], tuple):
            raise ValueError("a call without arguments")
        self.spend(self.stack[-1])
        super().load_reduce()

    def load_build(self):
        state = self.stack.pop()
        instance = self.stack[-1]
        if not isinstance(instance, (Dict, Attributes, Array, DType)):
            raise ValueError(f"sets the state of a {shown(type(instance).__name__, 60)}")
        self.spend(state if isinstance(state, tuple) else [state])
        instance.__setstate__(state)

    def load_setitem(self):
        value = self.stack.pop()
        key = self.stack.pop()
        self.set_items([key, value])

    def load_setitems(self):
        self.set_items(self.pop_mark())

    def load_dict(self):
        items = self.pop_mark()
        self.append({})
        self.set_items(items)

    def set_items(self, items):
        """Put [key, value, key, value, ..] into the dict on top of the stack."""
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError("named entries of something that is not a dict")
        for i in range(0, len(items), 2):
            target[check_key(items[i])] = items[i + 1]

    def load_append(self):
        value = self.stack.pop()
        self.extend([value])

    def load_appends(self):
        self.extend(self.pop_mark())

    def extend(self, items):
        """Add items to the list on top of the stack."""
        if not isinstance(self.stack[-1], list):
            raise ValueError("elements of something that is not a list")
        self.stack[-1].extend(items)

    def load_additems(self):
        items = make_set(self.pop_mark())
        if not isinstance(self.stack[-1], set):
            raise ValueError("elements of something that is not a set")
        self.stack[-1].update(items)

    def load_put(self):
        index = int(self.readline())
        if not 0 <= index < 2**32:
            raise ValueError("a memo that no pickle needs")
        self.memo[index] = self.stack[-1]

    def load_frozenset(self):
        items = self.pop_mark()
        self.append(make_set(items))

    def refuse(self):
        raise ValueError("holds a step that no file of PyTorch's and no annotations have")

    dispatch = pickle._Unpickler.dispatch | {
        pickle.REDUCE[0]: load_reduce,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.APPEND[0]: load_append,
        pickle.APPENDS[0]: load_appends,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
        pickle.PUT[0]: load_put,
        pickle.INST[0]: refuse,
        pickle.OBJ[0]: refuse,
        pickle.NEWOBJ_EX[0]: refuse,
        pickle.BYTEARRAY8[0]: refuse,  # takes memory before it looks whether the bytes are there
        pickle.EXT1[0]: refuse,
        pickle.EXT2[0]: refuse,
        pickle.EXT4[0]: refuse,
    }


def read(path):
    """Read a file of `torch.save`, `torch.jit.save` or `pickle.dump` -> containers, numbers, text, `Namespace`,
    `Module`, numpy arrays as lists, and tensors as `TensorOnDisk`.

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
            return _read_stream(path.read_bytes(), _read_legacy)
        if start.startswith((b"\x80", b"(", b"]", b"}", b"c")):  # the first is protocol 2 and later, the others 0 and 1
            return _read_stream(path.read_bytes(), _read_bare)
        raise ValueError("not a file that PyTorch saved")
    except (ValueError, OSError):
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(f"damaged ({type(error).__name__}: {shown(error, 80)})") from None


def _read_zip(path):
    archive = zipfile.ZipFile(path)  # closed with the last tensor that refers to it
    pickles = [name for name in archive.namelist() if name.split("/")[-1] == "data.pkl"]
    if len(pickles) != 1:
        raise ValueError("a zip archive, but not of PyTorch: no data.pkl in it")
    folder = pickles[0].removesuffix("data.pkl")
    if archive.getinfo(pickles[0]).file_size > 2 * os.path.getsize(path) + 10**6:
        raise ValueError(f"{shown(pickles[0], 60)} in it is compressed")
    return Reader(archive.read(pickles[0]), ZipStorages(archive, folder, os.path.getsize(path))).load()


def _read_stream(data, reader):
    """Python 2 did not say how its text is encoded, nor which bytes are text: if not all are UTF-8, they are read as
    bytes and decoded one by one."""
    try:
        return reader(data, "utf-8")
    except UnicodeDecodeError:
        return plain_text(reader(data, "bytes"))


def _read_bare(data, encoding):
    return Reader(data, encoding=encoding).load()


def _read_legacy(data, encoding):
    """A magic number, a version, facts about the machine, the data, the keys of the storages; then the storages."""
    storages = StreamStorages(data)
    start = 0
    values = []
    for _ in range(5):
        if len(values) == 4 and not storages.types:
            return values[3]  # data without tensors
        reader = Reader(data, storages, encoding, start)
        values.append(reader.load())
        start = reader.file.tell()
    keys = values[4]
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("no list of its tensors in it")
    storages.find(keys, start)
    return values[3]
