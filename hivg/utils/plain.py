"""What a pickle may build besides containers, numbers, text and tensors (pickles.py): the only classes whose state it
may set, and the only functions it may call. None of them does more work than there are bytes for it."""

import argparse
import math
import re

import numpy as np

from hivg.utils.messages import shown

MAX_KEY = 100  # parts of a key that is a tuple


class Dict(dict):
    """An OrderedDict or a Counter."""

    def __init__(self, items=()):
        pairs = items.items() if isinstance(items, dict) else items
        for key, value in pairs:
            self[check_key(key)] = value

    def __setstate__(self, state):
        pass  # PyTorch keeps the versions of its modules here


class Attributes:
    """An object of whose class nothing is kept but the attributes."""

    def __setstate__(self, state):
        if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
            raise ValueError("an object without named attributes")
        self.__dict__.update(state)


class Module(Attributes):
    """A TorchScript module."""


class Namespace(Attributes, argparse.Namespace):
    """The flags of a program."""


class Array(list):
    """A numpy array as nested lists of Python's numbers."""

    def __init__(self, *_):
        super().__init__()  # its numbers come as its state

    def __setstate__(self, state):
        _, shape, dtype, by_columns, data = state
        if math.prod(shape) != len(numbers(dtype, data)):
            raise ValueError(f"an array of shape {shown(shape, 60)} with other than so many numbers")
        self[:] = numbers(dtype, data).reshape(shape, order="F" if by_columns else "C").tolist()


class DType:
    """A numpy type; numbers and text of a fixed length alone, as an array of objects would be one of addresses."""

    def __init__(self, name, *_):
        name = plain_text(name)
        if not isinstance(name, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]|[SU]\d{1,6}", name):
            raise ValueError(f"a numpy array of the type {shown(name, 60)}; only numbers and text can be read")
        self.name = name
        self.order = "<"

    def __setstate__(self, state):
        self.order = plain_text(state[1])
        if self.order not in ("<", ">", "|", "="):
            raise ValueError("a numpy type without an order of its bytes")


def numbers(dtype, data):
    """Bytes of a DType -> (n,) numpy array."""
    if not isinstance(dtype, DType):
        raise ValueError("a numpy array without a type")
    data = data.encode("latin1") if isinstance(data, str) else data  # Python 2's bytes
    return np.frombuffer(data, dtype.order + dtype.name)


def scalar(dtype, data):
    """A numpy number -> Python's."""
    return numbers(dtype, data)[0].item()


def first(value, *_):
    """For functions that only mark, or copy, their first argument."""
    return value


def new_array(*_):
    return Array()


def encode(text, encoding):
    """How Python 3 spells bytes in a pickle for Python 2; the encoding is always Latin-1."""
    return text.encode("latin1")


def no_bytes():
    """How Python 3 spells b"" in a pickle for Python 2."""
    return b""


def make_set(items=()):
    return {check_key(item) for item in items}


def check_key(key):
    """The key of a dict or element of a set, if it is text, a number of 64 bits, or a short flat tuple of these. Raises
    ValueError for others: to look up long tuples, or such that share tuples, or huge numbers made to collide, takes
    forever."""
    if type(key) is str:  # nearly always
        return key
    parts = key if isinstance(key, tuple) else (key,)
    if len(parts) > MAX_KEY:
        raise ValueError(f"an entry under a name of {len(parts)} parts")
    for part in parts:
        if not isinstance(part, str | bytes | int | float | None) or (isinstance(part, int) and abs(part) >= 2**64):
            raise ValueError("an entry under a name that is neither text nor a number")
    return key


def plain_text(value, done=None):
    """The same lists, tuples and dicts with the bytes in them, keys too, as text: UTF-8, or Latin-1 where it is not.

    done: {id: (value, its text)} of what has been seen, as lists may share lists."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.decode("latin1")
    if not isinstance(value, list | tuple | dict):
        return value
    done = {} if done is None else done
    if id(value) not in done:
        if isinstance(value, dict):
            text = {plain_text(key, done): plain_text(inner, done) for key, inner in value.items()}
        else:
            text = (tuple if isinstance(value, tuple) else list)(plain_text(inner, done) for inner in value)
        done[id(value)] = (value, text)  # the value too, so that its id is not given to another
    return done[id(value)][1]
