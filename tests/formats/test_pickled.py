"""Pickles of plain data, and what else a pickle can ask for."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any

import pytest

from moe_train.formats import dcp_metadata, pickled
from moe_train.formats.dtypes import DTYPES

VALUES: list[Any] = [
    None, True, 0, 255, 256, 70_000, -1, -(2**40), 2**62, 1.5, "", "\u00e9" * 300, b"bytes", (), (1,), (1, 2),
    (1, 2, 3), (1, 2, 3, 4), [], [1], [1, [2, (3,)]], {}, {"a": 1}, {"a": {"b": [1]}, "c": (None, True)},
]  # fmt: skip


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data(protocol: int) -> None:
    values = [value for value in VALUES if protocol > 2 or not isinstance(value, bytes)]
    assert pickled.load(pickle.dumps([values, values], protocol), {}) == [values, values]
    names = {("collections", "OrderedDict"): lambda *_: {}}
    assert pickled.load(pickle.dumps(OrderedDict(a=1, b=2), protocol), names) == {"a": 1, "b": 2}


def nested(levels: int) -> bytes:
    """A dictionary whose key is a pair of pairs of pairs, each twice the same: its hash takes 2^levels steps."""
    return b"\x80\x04})" + b"\x94h\x00\x86" * levels + b"K\x01s."


LARGE = {
    "an index into the memo": b"\x80\x02]r\xff\xff\xff\x7f0N.",
    "a string of 4 GB": b"\x80\x02X\xff\xff\xff\xffabc.",
    "a million lists": b"\x80\x02(" + b"]" * 1_000_000 + b"t.",
    "a number of 255 bytes": b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".",
    "a key whose hash never ends": nested(60),
}
WRONG = {
    "another class": pickle.dumps(pytest.raises),
    "a call of a builtin": b"\x80\x02cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
    "an operation of protocol 0": b"(lp0\n.",
    "no end": b"\x80\x02]",
    "nothing": b"",
    "less than it takes": b"\x80\x020.",
    "what is before a mark": b"\x80\x02](0.",
    "a reference": b"\x80\x02NQ.",
    "two values": b"\x80\x02NN.",
    "an entry of a number": b"\x80\x02K\x01K\x01K\x01s.",
}


@pytest.mark.parametrize("name", [*LARGE, *WRONG])
def test_refused(name: str) -> None:
    data = (LARGE | WRONG)[name]
    if name == "an index into the memo":
        assert pickled.load(data, {}) is None  # it takes no memory
        return
    with pytest.raises((pickle.UnpicklingError, EOFError, IndexError, ValueError, TypeError)):
        pickled.load(data, {})


def test_a_pickle_cannot_change_what_the_program_shares() -> None:
    """`BUILD` of Python's unpickler writes into any object and class that a pickle names."""
    for target in (b"ctorch\nfloat32\n", b"ctorch.distributed.checkpoint.metadata\nMetadata\n"):
        with pytest.raises(pickle.UnpicklingError):
            pickled.load(b"\x80\x02" + target + b"}X\x08\x00\x00\x00itemsizeK\x01sb.", dcp_metadata._NAMES)
    assert DTYPES["float32"].itemsize == 4
