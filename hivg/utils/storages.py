"""Tensors in files that PyTorch saved (pickles.py), whose numbers are read only when they are asked for."""

import math
import os
import zipfile
from dataclasses import dataclass

import torch

from hivg.utils.messages import shown

READINGS = 4  # how often all of a file may be read, in all: many tensors may be parts of one storage


class Storages:
    """The numbers of the tensors of a file of `size` bytes."""

    def __init__(self, size):
        self.bytes_left = READINGS * size
        self.last = None  # (key, numbers) of the storage read last, as its parts mostly follow each other

    def read(self, key):
        """-> bytearray, which must not be changed. Raises ValueError for a storage that is not there, or damaged."""
        if self.last is None or self.last[0] != key:
            data = self.read_file(key)
            self.bytes_left -= len(data)
            if self.bytes_left < 0:
                raise ValueError("its tensors are larger than the file")
            self.last = key, data
        return self.last[1]


class ZipStorages(Storages):
    """As files of an open zip, which is shared: its list of contents is read once."""

    def __init__(self, archive, folder, size):
        super().__init__(size)
        self.archive = archive
        self.folder = folder  # where the tensors are in it

    def read_file(self, key):
        entry = f"{self.folder}data/{key}"
        try:
            info = self.archive.getinfo(entry)
            # PyTorch never compresses; a zip bomb would
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > os.path.getsize(self.archive.filename):
                raise ValueError("compressed")
            data = bytearray(info.file_size)
            with self.archive.open(info) as part:
                if part.readinto(data) < len(data):
                    raise ValueError("cut short")
            return data
        except (KeyError, ValueError, OSError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"its part {shown(entry, 60)} is damaged ({shown(error, 80)})") from None


class StreamStorages(Storages):
    """Behind the pickles of an older torch.save."""

    def __init__(self, data):
        super().__init__(len(data))
        self.data = data  # the whole file
        self.types = {}  # key: the type of its numbers, as the pickle names them
        self.places = {}  # key: (start, end) in `data`, once `find` has been called

    def find(self, keys, start):
        """Note where each storage is. keys: of all storages in their order. start: where the first one begins."""
        for key in keys:
            if key not in self.types:
                raise ValueError("numbers that belong to no tensor")
            count = int.from_bytes(self.data[start : start + 8], "little")
            end = start + 8 + count * self.types[key].itemsize
            if end > len(self.data):
                raise ValueError("cut short")
            self.places[key] = (start + 8, end)
            start = end

    def read_file(self, key):
        if key not in self.places:
            raise ValueError(f"the numbers of tensor {shown(key, 60)} are not in it")
        start, end = self.places[key]
        return bytearray(memoryview(self.data)[start:end])


@dataclass(frozen=True)
class TensorOnDisk:
    """A tensor of a file, not read yet."""

    storages: Storages
    key: str  # of its storage
    dtype: torch.dtype
    offset: int  # of its first element in the storage, in elements
    shape: tuple
    stride: tuple  # in elements

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self):
        """-> the tensor, on the CPU, in the type it was saved in. Raises ValueError if the file does not hold it."""
        if math.prod(self.shape) == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        data = self.storages.read(self.key)
        count, rest = divmod(len(data), self.dtype.itemsize)
        if rest:
            raise ValueError(f"its part {shown(self.key, 60)} is damaged (not whole numbers)")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        # the second: one number may stand for many with a stride of 0
        if last >= count or math.prod(self.shape) > count:
            raise ValueError(f"its part {shown(self.key, 60)} is too short for a tensor of shape "
                             f"{shown(self.shape, 60)}")
        storage = torch.frombuffer(data, dtype=self.dtype)  # (count,)
        # a tensor of its own: the storage may be another's too, and a slice shall not keep all of it
        return storage.as_strided(self.shape, self.stride, self.offset).clone()


@dataclass
class Storage:
    """The pickle's reference to the numbers of a tensor."""

    key: str
    dtype: torch.dtype
