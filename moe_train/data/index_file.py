"""The .idx file of a Megatron dataset, read without Megatron-Core and torch: login nodes ask for its tokens too."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from parallel.errors import DataError

# As megatron/core/datasets/indexed_dataset.py writes it: magic, version, token type, numbers of sequences, documents.
HEADER, MAGIC = struct.Struct("<9sQBQQ"), b"MMIDIDX\0\0"
_INTEGERS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # code of a token type -> bytes; 6 and 7 are floating point
_CODES = {"uint16": 8, "int32": 4}  # of those that moe-data writes


def code_of(dtype: np.dtype[Any]) -> int:
    """Code of a token type in an .idx file."""
    return _CODES[dtype.name]


@dataclass(frozen=True)
class Index:
    """What an .idx file says of its .bin file: sequences of `lengths` tokens, each of `itemsize` bytes."""

    lengths: np.ndarray
    itemsize: int
    end: int
    """Bytes that the .bin file has at least."""

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return int(self.lengths.sum(dtype=np.int64))


def read_index(prefix: str) -> Index:
    """The index of the pair of files at `prefix`.

    Raises:
        DataError: a file is missing, empty, cut off or of another kind.
    """
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for file in (tokens, index):
        if not file.is_file():
            raise DataError(f"data.blend names {file}, which is not there", "correct the prefix in data.blend")
    try:
        return _read(prefix, index, tokens)
    except OSError as error:
        raise DataError(f"{error.filename or index} cannot be read: {error.strerror}", "make it readable") from error


def _read(prefix: str, index: Path, tokens: Path) -> Index:
    if tokens.stat().st_size == 0:
        raise DataError(f"{tokens} is empty", "make it again")
    with open(index, "rb") as stream:
        header = stream.read(HEADER.size)
    magic, _, code, sequences, documents = HEADER.unpack(header.ljust(HEADER.size, b"\0"))
    # Lengths of sequences are 4 bytes, where each begins 8, where each document begins 8.
    if magic != MAGIC or index.stat().st_size < HEADER.size + 12 * sequences + 8 * documents:
        raise DataError(f"{index} is not a whole index of a Megatron dataset", "make or copy it again")
    if code not in _INTEGERS:
        raise DataError(f"{index} says that tokens are of type {code}, not an integer", "make it again")
    if not sequences:
        raise DataError(f"{index} has no sequences", "make it again")
    lengths = np.memmap(index, np.int32, "r", HEADER.size, (sequences,))
    last = np.memmap(index, np.int64, "r", HEADER.size + 12 * sequences - 8, (1,))
    end = int(last[0]) + int(lengths[-1]) * _INTEGERS[code]
    if tokens.stat().st_size < end:
        raise DataError(
            f"{prefix}.bin is cut off: its index needs {end} bytes, it has {tokens.stat().st_size}",
            "make or copy it again",
        )
    return Index(lengths, _INTEGERS[code], end)
